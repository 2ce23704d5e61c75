"""What QEMU boots: a kernel, and an initramfs with busybox, the modules and the command.

The rule here: bytes in, bytes out. Files of the host are read, nothing is written, and no program
but `zstd` is run.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIRED_MODULES = (
    "virtio_pci",
    "virtio_console",
    "9p",
    "9pnet_virtio",
    "overlay",
    "kvm_amd",
    "tun",
)
OPTIONAL_MODULES = ("veth", "dummy", "bridge")
# The names under which boot.sh and finish.sh call busybox.
APPLETS = (
    *("cat", "chmod", "cp", "echo", "env", "hostname", "insmod", "ip", "ln", "mkdir", "mkfifo"),
    *("mount", "setsid", "sh", "sleep", "switch_root", "sync"),
)
# The end of an ELF note's header: type XEN_ELFNOTE_PHYS32_ENTRY, owner "Xen".
PVH_NOTE = struct.pack("<I4s", 18, b"Xen")


class Missing(Exception):
    """Something the host must have; the message names the Debian package."""


@dataclass(frozen=True)
class Kernel:
    """An installed kernel and the folder of its modules."""

    image: Path
    modules: Path


# -- the kernel ------------------------------------------------------------------------------------


def find_kernel(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> Kernel:
    """The newest kernel that has its modules; it need not be the running one."""
    images = sorted(boot.glob("vmlinuz-*"), key=_version_key, reverse=True)
    for image in images:
        kernel = Kernel(image, modules / image.name.removeprefix("vmlinuz-"))
        if (kernel.modules / "modules.dep").exists() and _has_required_modules(kernel.modules):
            if not os.access(image, os.R_OK):  # Ubuntu installs them 0600
                raise Missing(f"{image} is not readable: run as root, or chmod a+r {image}")
            return kernel
    raise Missing(f"no kernel with its modules in {boot} and {modules}: install linux-image-amd64")


def _version_key(image: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", image.name)]


def read_bootable(image: Path) -> bytes:
    """The ELF inside a bzImage, which QEMU enters through PVH: the machine would unpack it slowly.

    The kernel's Documentation/arch/x86/boot.rst describes the header. What cannot be unpacked here
    is left to the machine: the bzImage boots as well.
    """
    data = image.read_bytes()
    setup_sectors = data[0x1F1] or 4
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    end = (
        start + length - 4
    )  # the kernel's build appends the unpacked size, which zstd would reject
    try:
        unpacked = _unpack(data[start:end])
    except (Missing, lzma.LZMAError, zlib.error, subprocess.CalledProcessError):
        return data
    return unpacked if PVH_NOTE in unpacked else data


def _unpack(data: bytes) -> bytes:
    """Undo the compression that the first bytes name; anything else comes back as it is."""
    if data.startswith(b"\xfd7zXZ"):
        return lzma.decompress(data)
    if data.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(data)  # 31: with gzip's header
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return _unpack_zstd(data)
    return data


def _unpack_zstd(data: bytes) -> bytes:
    if shutil.which("zstd") is None:
        raise Missing("the kernel's files are compressed with zstd: install zstd")
    return subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout


# -- its modules -----------------------------------------------------------------------------------


def _module_name(path: str) -> str:
    return Path(path).name.split(".ko")[0].replace("-", "_")


def _read_dependencies(modules: Path) -> dict[str, list[str]]:
    """modules.dep: each module's path, and those of the modules it needs."""
    lines = (modules / "modules.dep").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines)
    return {path: needs.split() for path, needs in pairs}


def _read_builtins(modules: Path) -> set[str]:
    return {_module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}


def _has_required_modules(modules: Path) -> bool:
    known = {_module_name(path) for path in _read_dependencies(modules)} | _read_builtins(modules)
    return known.issuperset(REQUIRED_MODULES)


def module_load_order(modules: Path) -> list[str]:
    """The modules the machine loads, each one after those it needs; no built-in or absent ones."""
    dependencies = _read_dependencies(modules)
    path_of = {_module_name(path): path for path in dependencies}
    order: dict[str, None] = {}

    def visit(path: str) -> None:
        for needed in dependencies[path]:
            visit(needed)
        order.setdefault(path)

    for name in REQUIRED_MODULES + OPTIONAL_MODULES:
        if name in path_of:
            visit(path_of[name])
    return list(order)


# -- the archive -----------------------------------------------------------------------------------


def build_initramfs(kernel: Kernel, command: bytes, share: Path | None) -> bytes:
    """The first file system: boot.sh is its first process, `command` is what finish.sh runs."""
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "modules", "proc")]
    entries.append(("bin/busybox", stat.S_IFREG | 0o755, read_busybox()))
    entries += [(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox") for applet in APPLETS]
    entries.append(("init", stat.S_IFREG | 0o755, (HERE / "boot.sh").read_bytes()))
    entries.append(("finish.sh", stat.S_IFREG | 0o644, (HERE / "finish.sh").read_bytes()))
    entries.append(("command", stat.S_IFREG | 0o600, command))
    entries.append(("shared-folder", stat.S_IFREG | 0o600, os.fsencode(share) if share else b""))
    entries += _module_entries(kernel.modules)
    return b"".join(_cpio_record(*entry) for entry in [*entries, ("TRAILER!!!", 0, b"")])


def _module_entries(modules: Path) -> Iterator[tuple[str, int, bytes]]:
    names = []
    for path in module_load_order(modules):
        names.append(f"{_module_name(path)}.ko")
        yield f"modules/{names[-1]}", stat.S_IFREG | 0o644, _unpack((modules / path).read_bytes())
    yield "modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in names).encode()


def read_busybox() -> bytes:
    path = shutil.which("busybox", path="/bin:/usr/bin")
    data = Path(path).read_bytes() if path else b""
    if not data or b"/ld-linux" in data:  # the dynamic one finds no libc in the initramfs
        raise Missing("no static busybox: install busybox-static")
    return data


def _cpio_record(name: str, mode: int, data: bytes) -> bytes:
    """One file in the "newc" format.

    The kernel's Documentation/driver-api/early-userspace/buffer-format.rst has the fields.
    """
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _pad(header + encoded) + _pad(data)


def _pad(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
