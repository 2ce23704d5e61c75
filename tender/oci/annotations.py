"""What a container image says of its unikernel.

The names are urunc's (a project of the CNCF), so that an image runs under either; `ptender.` names
what urunc has no name for. Docker passes no annotations on, so the root file system has them too.
"""

from __future__ import annotations

import base64
import json
import re

from tender.boot import layout
from tender.dataclass import dataclass
from tender.errors import ConfigError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

URUNC = "com.urunc.unikernel."
OURS = "ptender."
ROOT_FILE = "urunc.json"  # the same in the root file system; each value in base64

TARGETS = ("hvt", "spt")
PORTS_MAX = 64
MEM_MIB_MAX = layout.MEM_MAX // layout.MIB
GUESTS = ("mirage", "rumprun", "ptender", "none")
"""By whose conventions a guest takes its address and gateway; "none": it takes none."""


@dataclass
class Unikernel:
    """A unikernel in a container image. Paths begin at the root file system."""

    guest: str  # one of GUESTS
    target: str  # "hvt" or "spt"
    binary: str
    args: tuple[str, ...]  # unless the container is given others
    disks: Mapping[str, str]  # the path of each, by its device's name
    devices: tuple[tuple[str, str], ...]  # name and type of all that the manifest declares
    mem_mib: int | None  # None: the tender's default
    ports: tuple[str, ...] = ()  # that it serves: "80", "53/udp"
    mount_point: str = "/data"  # of its disk, for rumprun


def to_annotations(unikernel: Unikernel) -> dict[str, str]:
    """The annotations that say all of it, by name."""
    values = {
        f"{URUNC}unikernelType": unikernel.guest,
        f"{URUNC}hypervisor": unikernel.target,
        f"{URUNC}binary": unikernel.binary,
        f"{URUNC}cmdline": " ".join(unikernel.args),
        f"{OURS}ports": " ".join(unikernel.ports),
        f"{OURS}devices": " ".join(f"{name}:{kind}" for name, kind in unikernel.devices),
    }
    if len(unikernel.disks) == 1:
        values[f"{URUNC}block"] = next(iter(unikernel.disks.values()))
    values |= {f"{OURS}block.{name}": path for name, path in unikernel.disks.items()}
    if unikernel.mem_mib is not None:
        values[f"{OURS}mem"] = str(unikernel.mem_mib)
    return {name: value for name, value in values.items() if value}


def root_file(values: Mapping[str, str]) -> bytes:
    """The contents of ROOT_FILE."""
    coded = {name: base64.b64encode(value.encode()).decode() for name, value in values.items()}
    return json.dumps(coded, indent=2).encode() + b"\n"


def parse_root_file(data: bytes) -> dict[str, str]:
    """The annotations in ROOT_FILE. Raises ConfigError."""
    try:
        coded = json.loads(data)
        values = {
            str(name): base64.b64decode(value, validate=True).decode()
            for name, value in coded.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"/{ROOT_FILE}: not an object of texts in base64") from None
    for name, value in values.items():
        if "\0" in value:
            raise ConfigError(f"/{ROOT_FILE}: {shown(name)}: {shown(value)} has a NUL")
    return values


def from_annotations(values: Mapping[str, str]) -> Unikernel | None:
    """What annotations say; None where they name no unikernel.

    Raises ConfigError for one that this tender can't run, or a value that is malformed.
    """
    binary = values.get(f"{URUNC}binary")
    if not binary:
        return None
    target = values.get(f"{URUNC}hypervisor") or "hvt"
    if target not in TARGETS:
        raise ConfigError(f"{URUNC}hypervisor: {shown(target)} is not {' or '.join(TARGETS)}")
    guest = values.get(f"{URUNC}unikernelType") or "mirage"
    if guest not in GUESTS:
        expected = ", ".join(GUESTS)
        raise ConfigError(f"{URUNC}unikernelType: {shown(guest)} is not one of {expected}")
    mem = values.get(f"{OURS}mem")
    if mem is not None and not (re.fullmatch("[1-9][0-9]{0,3}", mem) and int(mem) <= MEM_MIB_MAX):
        raise ConfigError(f"{OURS}mem: {shown(mem)} is not a number of MiB")
    block = f"{OURS}block."
    disks = {name[len(block) :]: path for name, path in values.items() if name.startswith(block)}
    if f"{URUNC}block" in values and not disks:
        disks = {"": values[f"{URUNC}block"]}  # the only one, whatever its name
    ports = tuple(values.get(f"{OURS}ports", "").split())
    if len(ports) > PORTS_MAX or not all(map(is_port, ports)):
        raise ConfigError(f"{OURS}ports: {shown(' '.join(ports))} is not a list as '80 53/udp'")
    args = tuple(values.get(f"{URUNC}cmdline", "").split())
    mem_mib = int(mem) if mem else None
    mount_point = values.get(f"{URUNC}blkMntPoint") or "/data"
    return Unikernel(guest, target, binary, args, disks, (), mem_mib, ports, mount_point)


def is_port(text: str) -> bool:
    """Whether it is a port as a Containerfile's EXPOSE has it: "80", "80/tcp" or "53/udp"."""
    match = re.fullmatch("([1-9][0-9]{0,4})(/tcp|/udp)?", text)
    return match is not None and int(match[1]) <= 65535
