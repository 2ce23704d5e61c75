"""The unikernel of a bundle, and the command line of the tender that runs it.

What the image says chooses among the bundle's own files; every device is an open descriptor, so
nothing that it says is an option.
"""

from __future__ import annotations

import os

from tender.boot import layout
from tender.dataclass import dataclass
from tender.errors import ConfigError, TenderError
from tender.image.file import ImageFile
from tender.oci import bundle as bundles
from tender.oci import network
from tender.oci.annotations import ROOT_FILE, Unikernel, from_annotations, parse_root_file
from tender.oci.conventions import guest_args

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from tender.image.elf import Image
    from tender.oci.bundle import Bundle
    from tender.oci.network import Network

OVERHEAD_MIB = 32  # of a tender beside its guest's memory, at most
ROOT_FILE_MAX = 1 << 20


@dataclass
class Guest:
    """A unikernel that was found in a bundle; `kernel` is its open file."""

    unikernel: Unikernel
    kernel: int
    image: Image
    args: tuple[str, ...]


def find_guest(bundle: Bundle) -> Guest | None:
    """The bundle's unikernel; None where it is a container of another kind.

    By its annotations, by the file in its root, else by an entry point that is a Solo5 image.
    Raises TenderError for one that can't be run.
    """
    unikernel = from_annotations(bundle.annotations) or from_annotations(_root_file(bundle.root))
    args = bundle.args
    if unikernel is None:
        if not args or not args[0].startswith("/"):
            return None
        unikernel = Unikernel("mirage", "hvt", args[0], (), {}, (), None)
        try:
            kernel, image = _open_kernel(bundle, unikernel)
        except TenderError:
            return None
        if image.ptender_bindings:
            unikernel = Unikernel("ptender", "hvt", args[0], (), {}, (), None)
    else:
        kernel, image = _open_kernel(bundle, unikernel)
    if args and os.path.normpath(f"/{args[0]}") == os.path.normpath(f"/{unikernel.binary}"):
        args = args[1:]
    return Guest(unikernel, kernel, image, args or unikernel.args)


def _root_file(root: str) -> dict[str, str]:
    try:
        fd = bundles.open_in_root(root, ROOT_FILE, os.O_RDONLY)
    except ConfigError:
        return {}
    with open(fd, "rb") as file:
        return parse_root_file(file.read(ROOT_FILE_MAX))


def _open_kernel(bundle: Bundle, unikernel: Unikernel) -> tuple[int, Image]:
    fd = bundles.open_in_root(bundle.root, unikernel.binary, os.O_RDONLY)
    return fd, ImageFile(unikernel.binary, fd).image  # which closes it where it raises


def memory(bundle: Bundle, guest: Guest, more_mib: int = 0) -> int:
    """The guest's memory in MiB, under the container's limit where it has one.

    `more_mib` is what others than the tender take. Raises ConfigError where what the image asks for
    does not fit.
    """
    most = layout.MEM_MAX // layout.MIB
    overhead_mib = OVERHEAD_MIB + more_mib
    limit = bundle.limits.get("memory.limit")
    if isinstance(limit, int) and limit > 0:
        most = min(most, limit // layout.MIB - overhead_mib)
    mem_mib = guest.unikernel.mem_mib or min(layout.MEM_DEFAULT // layout.MIB, most)
    least = layout.MEM_MIN // layout.MIB
    if mem_mib > most or mem_mib < least:
        passt = " and passt" if more_mib else ""
        raise ConfigError(
            f"the container's memory limit is too low: a guest of {max(mem_mib, least)} MiB "
            f"takes {max(mem_mib, least) + overhead_mib} MiB with its tender{passt}"
        )
    return mem_mib


def tender_command(bundle: Bundle, guest: Guest, tender: Sequence[str]) -> list[str]:
    """The tender's command line. Every device is a descriptor, which it inherits."""
    command = [*tender]
    disks = {**guest.unikernel.disks}
    names = _devices(guest, "BLOCK_BASIC")
    if "" in disks and len(names) == 1:
        disks[names[0]] = disks.pop("")
    given = {mount.destination.strip("/"): mount for mount in bundle.mounts}
    for name in names:
        if name in given:
            fd, readonly = _open_disk(given[name].source, given[name].readonly)
        elif name in disks:
            readonly = bundle.readonly_root
            flags = os.O_RDONLY if readonly else os.O_RDWR
            fd = bundles.open_in_root(bundle.root, disks[name], flags)
        else:
            raise ConfigError(f"nothing is attached to the disk {name}: mount a file at /{name}")
        os.set_inheritable(fd, True)
        command.append(f"--block={name}=@{fd}{',ro' if readonly else ''}")
    net = _network(bundle, guest)
    if net is not None:
        command.append(f"--net={net[0]}={net[1].device}")
    os.set_inheritable(guest.kernel, True)
    taken = net[1] if net else None
    command.append(f"--mem={memory(bundle, guest, taken.overhead_mib if taken else 0)}")
    arguments = guest_args(guest.unikernel, guest.args, bundle.env, taken, bool(names))
    return [*command, "--", f"/proc/self/fd/{guest.kernel}", *arguments]


def _network(bundle: Bundle, guest: Guest) -> tuple[str, Network] | None:
    """The name of the guest's network device, and what it gets; None where it has none."""
    names = _devices(guest, "NET_BASIC")
    if not names:
        return None
    if len(names) > 1:
        raise ConfigError(
            f"the guest has {len(names)} networks ({', '.join(names)}), a container one"
        )
    if bundle.network is None:  # the host's own interfaces are nobody's to take over
        return names[0], network.through_passt(guest.unikernel.ports)
    found = network.of_container(guest.unikernel.ports)
    if found is None:
        raise ConfigError(f"the guest has the network {names[0]}, the container no interface")
    return names[0], found


def _devices(guest: Guest, kind: str) -> list[str]:
    return [each.name for each in guest.image.manifest.devices if each.type_name == kind]


def _open_disk(path: str, readonly: bool) -> tuple[int, bool]:
    try:
        # Not blocking: a FIFO in the place of a disk must not hang the command.
        return os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_NONBLOCK), readonly
    except OSError as error:
        raise ConfigError(f"the disk {path}: {os.strerror(error.errno or 0)}") from None
