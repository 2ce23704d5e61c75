"""Block devices: files, block devices and descriptors of the host, opened, checked and locked.

A file that a guest writes to has one user at a time; the lock ends with the open file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from tender.config import BlockDescriptor, BlockFile, BlockRemote, check_capacity
from tender.errors import DeviceError, HostError, setting
from tender.host import socket_type
from tender.modules.block import BlockDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.cleanup import Cleanup
    from tender.config import BlockValue
    from tender.image.manifest import Device
    from tender.modules import Warn
    from tender.stop import Stop

_COMMAND_MAX = 160  # letters of a command in a message


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
        fd = _open(where, disk.path, readonly)
        cleanup.callback(lambda: os.close(fd))
    capacity = _capacity(where, fd)
    try:
        check_capacity(capacity, disk.sector_size)
    except DeviceError as error:
        raise DeviceError(f"{where}: {error}") from None
    _lock(where, fd, readonly, warn)
    if isinstance(disk, BlockFile) and disk.overlay:
        from tender.host.overlay import OverlayBlock

        return OverlayBlock(device.name, fd, capacity, disk, stop, warn, cleanup)
    return BlockDevice(device.name, fd, capacity, disk.sector_size, disk.readonly, stop, warn)


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
    return disk.fd


def _read_only() -> str:
    return setting("add ,ro", "give readonly=True")


def _open(where: str, path: str, readonly: bool) -> int:
    # Not blocking: a FIFO in the place of an image must not hang the command.
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except OSError as error:
        what = f"Could not open block device: {where}"
        hint = ""
        if error.errno in (errno.EACCES, errno.EROFS) and not readonly:
            hint = f" (to attach it read-only, {_read_only()})"
        elif isinstance(error, FileNotFoundError):
            hint = _hint(path, readonly)
        raise DeviceError(f"{what}: {os.strerror(error.errno or 0)}{hint}") from None


def _hint(path: str, readonly: bool) -> str:
    """What to do about a file that does not exist, in brackets; or nothing."""
    before, comma, _ = path.rpartition(",")
    while comma:
        if os.path.exists(before):
            take = "takes: ro, overlay[=SIZE], sector-size=N"
            command = f"after a comma, --block NAME={before} {take}"
            return f" ({setting(command, f'BlockFile({before!r}, ...) {take}')})"
        before, comma, _ = before.rpartition(",")
    if readonly or not os.path.isdir(os.path.dirname(path) or "."):
        return ""
    return f" (to make an empty one: truncate -s 1M {path})"


def _capacity(where: str, fd: int) -> int:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise DeviceError(f"{where}: neither a file nor a block device")
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise DeviceError(f"{where}: it has no size: {reason}") from None


def _lock(where: str, fd: int, readonly: bool, warn: Warn) -> None:
    """One writer, or any number of readers: a lock of the open file, which ends with it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EACCES is SMB's answer to a conflict
        raise DeviceError(f"{where}: locked by {_holder(fd)}") from None
    except OSError as error:
        # A file system without locks: Solo5's own tender never locks, so the guest runs.
        reason = HostError("cannot be locked", "flock", error.errno or 0)
        warn(f"{where}: {reason}; make sure that no other process writes to it")


def _holder(fd: int) -> str:
    """Who holds the lock, from /proc/locks and /proc/PID/cmdline: best effort, for a message."""
    info = os.fstat(fd)
    inode = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    try:
        with open("/proc/locks") as locks:
            rows = [line.split() for line in locks]
        locks_of = {row[5]: row[4] for row in rows if row[1] == "FLOCK"}
        # On an overlay, fstat() and the lock name different devices with one inode number.
        alike = [pid for where, pid in locks_of.items() if where.endswith(f":{info.st_ino}")]
        pid = locks_of.get(inode) or alike[0]
    except (OSError, IndexError):
        return "another process"
    if pid == str(os.getpid()):
        return "this guest itself or another one of this program"
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            command = _command(cmdline.read(4096).decode(errors="replace").rstrip("\0").split("\0"))
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({command})"


def _command(argv: list[str]) -> str:
    """A command as it was typed: where it is ours, without the interpreter and its options."""
    program = 0
    if os.path.basename(argv[0]).startswith("python"):
        program = 1
        while program < len(argv) and argv[program].startswith("-"):
            program += 1
    name = os.path.basename(argv[program]) if program < len(argv) else ""
    if name.startswith(("ptender", "solo5-hvt")):
        argv = [name, *argv[program + 1 :]]
    text = " ".join(argv)
    return text if len(text) <= _COMMAND_MAX else f"{text[:_COMMAND_MAX]}..."
