"""Block devices: files, block devices and descriptors of the host, opened, checked and locked."""

from __future__ import annotations

import _stat as stat
import errno
import fcntl
import posix as os

from tender.backends import (
    SECTOR_SIZE,
    BlockDescriptor,
    BlockFile,
    BlockRemote,
    check_capacity,
)
from tender.errors import DeviceError, setting
from tender.host import socket_type
from tender.host.lock import lock
from tender.modules.block import BlockDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.backends import BlockValue
    from tender.cleanup import Cleanup
    from tender.image.manifest import Device
    from tender.modules import Warn
    from tender.stop import Stop

SEEK_END = 2  # unistd.h
# What files begin with whose bytes are not those of a disk: offset and bytes. Sources: QEMU,
# docs/interop/qcow2.txt; VMware, Virtual Disk Format 5.0; Microsoft, Virtual Hard Disk Image Format
# and [MS-VHDX]; VirtualBox, include/VBox/vd.h.
_FORMATS = {
    "qcow2": (0, b"QFI\xfb"),
    "VMDK": (0, b"KDMV"),
    "VHD": (0, b"conectix"),
    "VHDX": (0, b"vhdxfile"),
    "VDI": (64, b"\x7f\x10\xda\xbe"),
}
_VMDK_TEXT = b"# Disk DescriptorFile"


def attach(
    device: Device, disk: BlockValue, cleanup: Cleanup, stop: Stop, warn: Warn
) -> BlockDevice:
    """Open, check and lock a disk of the host; raises DeviceError."""
    where = _where(device, disk)
    if isinstance(disk, BlockRemote):
        from _socket import SOCK_SEQPACKET

        from tender.host.remote import RemoteBlock

        if socket_type(disk.fd) != SOCK_SEQPACKET:
            raise DeviceError(f"{where}: not a seqpacket socket, as a remote disk takes")
        return RemoteBlock(device.name, disk, stop, warn)
    if isinstance(disk, BlockDescriptor):
        fd, readonly = _check_access(where, disk), disk.readonly
    else:
        readonly = disk.readonly or bool(disk.overlay)
        fd = _open(where, disk.path, readonly, disk.sync)
        cleanup.callback(lambda: os.close(fd))
        _check_raw(where, fd, disk.path)
    capacity = _capacity(where, fd)
    try:
        check_capacity(capacity, disk.sector_size)
    except DeviceError as error:
        raise DeviceError(f"{where}: {error}") from None
    lock(where, fd, readonly, warn)
    attached: BlockDevice
    if not isinstance(disk, BlockFile) or not disk.overlay:
        attached = BlockDevice(
            device.name, fd, capacity, disk.sector_size, disk.readonly, stop, warn
        )
    elif isinstance(disk.overlay, str):
        from tender.host.overlay_file import OverlayFileBlock, open_overlay

        file = open_overlay(disk, fd, capacity, where, warn, cleanup)
        attached = OverlayFileBlock(device.name, fd, capacity, disk, file, stop, warn)
    else:
        from tender.host.overlay import OverlayBlock

        attached = OverlayBlock(device.name, fd, capacity, disk, stop, warn, cleanup)
    attached.syncs_at_end = disk.sync == "fsync"
    return attached


def _where(device: Device, disk: BlockValue) -> str:
    return f"block device '{device.name}'" + (
        f", {disk.path}" if isinstance(disk, BlockFile) else ""
    )


def _check_access(where: str, disk: BlockDescriptor) -> int:
    """The descriptor, which was opened for what the guest may do."""
    access = fcntl.fcntl(disk.fd, fcntl.F_GETFL) & os.O_ACCMODE
    if access == os.O_WRONLY:
        raise DeviceError(f"{where}: it is open for writing only")
    if access == os.O_RDONLY and not disk.readonly:
        hint = f"to attach it read-only, {_read_only()}"
        raise DeviceError(f"{where}: it is open for reading only ({hint})")
    if disk.sync == "always" and not fcntl.fcntl(disk.fd, fcntl.F_GETFL) & os.O_DSYNC:
        raise DeviceError(f"{where}: it is open without O_DSYNC, which sync=always takes")
    return disk.fd


def _read_only() -> str:
    return setting("add ,ro", "give readonly=True")


def _open(where: str, path: str, readonly: bool, sync: str) -> int:
    # Not blocking: a FIFO in the place of an image must not hang the command.
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    flags |= os.O_DSYNC if sync == "always" else 0
    try:
        return os.open(path, flags)
    except OSError as error:
        what = f"Could not open block device: {where}"
        hint = ""
        is_readable = os.access(path, os.R_OK, effective_ids=True)
        if error.errno in (errno.EACCES, errno.EROFS) and not readonly and is_readable:
            hint = f" (to attach it read-only, {_read_only()})"
        elif isinstance(error, FileNotFoundError):
            hint = _hint(path, readonly)
        raise DeviceError(f"{what}: {os.strerror(error.errno or 0)}{hint}") from None


def _hint(path: str, readonly: bool) -> str:
    """What to do about a file that does not exist, in brackets; or nothing."""
    from os.path import dirname, exists, isdir

    before, comma, _ = path.rpartition(",")
    while comma:
        if exists(before):
            take = "takes: ro, overlay[=SIZE|FILE], sector-size=N, sync=WHEN"
            command = f"after a comma, --block NAME={before} {take}"
            return f" ({setting(command, f'BlockFile({before!r}, ...) {take}')})"
        before, comma, _ = before.rpartition(",")
    if readonly or not isdir(dirname(path) or "."):
        return ""
    return f" (to make an empty one: truncate -s 1M {path})"


def _capacity(where: str, fd: int) -> int:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise DeviceError(f"{where}: neither a file nor a block device")
    try:
        return os.lseek(fd, 0, SEEK_END)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise DeviceError(f"{where}: it has no size: {reason}") from None


def _check_raw(where: str, fd: int, path: str) -> None:
    """Refuse a file in another format than raw; a guest would take its headers for its disk."""
    try:
        head = os.pread(fd, SECTOR_SIZE, 0)
    except OSError:  # a FIFO, which _capacity refuses, or an error that reads will meet
        return
    found = [name for name, (at, magic) in _FORMATS.items() if head.startswith(magic, at)]
    if head.startswith(_VMDK_TEXT):
        found = ["VMDK"]
    if found:
        import shlex
        from os.path import splitext

        stem, extension = splitext(path)
        raw = path + ".raw" if extension == ".raw" else stem + ".raw"
        command = f"qemu-img convert -O raw {shlex.quote(path)} {shlex.quote(raw)}"
        raise DeviceError(
            f"{where}: a {found[0]} image, and a disk is a raw image; to make one: {command}"
        )
