"""BLOCK_READ, BLOCK_WRITE: a block device is a file.

The rule here: a guest reads and writes [0, capacity) of its own file and nothing else; the host's
trouble (disk full, I/O error) is a result code. A file that a guest writes to is locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from tender._abi import lib
from tender._host import ffi as host
from tender._host import lib as hostlib
from tender.config import BlockDescriptor, BlockFile, BlockRemote, check_capacity
from tender.errors import DeviceError, HostError
from tender.modules import STEP, Trouble, new_counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Transfer = Callable[[int, Any, int, int], int]

    from tender.cleanup import Cleanup
    from tender.config import BlockValue
    from tender.hypercalls import Handler
    from tender.image.manifest import Device
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.stop import Stop

_COMMAND_MAX = 160  # of a command that is shown in a message


class BlockDevice:
    """An open image: `capacity` bytes in sectors of `sector_size`."""

    in_engine = True  # it is a plain descriptor, which engine.c serves as well

    def __init__(
        self,
        name: str,
        fd: int,
        capacity: int,
        sector_size: int,
        readonly: bool,
        stop: Stop,
        warn: Warn,
    ) -> None:
        self.name = name
        self.fd = fd
        self.capacity = capacity
        self.sector_size = sector_size
        self.readonly = readonly
        self._stop = stop
        self.counters = new_counters()
        self.trouble = Trouble(f"block device '{name}'", warn)

    def read(self, offset: int, data: memoryview) -> int:
        """Fill `data` from the file; a result code."""
        return self._all(hostlib.host_pread, data, offset, self.fd)

    def write(self, offset: int, data: memoryview) -> int:
        """Write `data` to the file; a result code."""
        if self.readonly:
            self.counters.drops += 1
            return lib.HVT_R_EUNSPEC
        return self._all(hostlib.host_pwrite, data, offset, self.fd)

    def _all(self, call: Transfer, data: memoryview, offset: int, fd: int) -> int:
        length, done = len(data), 0
        start = host.from_buffer(data)
        while done < length:
            count = call(fd, start + done, min(length - done, STEP), offset + done)
            if count < 0 and host.errno == errno.EINTR:
                count = 0
            elif count <= 0:
                what = os.strerror(host.errno) if count else "the file became shorter"
                self.trouble.tell(self.counters, what)
                return lib.HVT_R_EUNSPEC
            done += count
            if done < length:
                self._stop.check()
        self.counters.bytes += done
        return lib.HVT_R_OK


class Block:
    """The guest's block devices, by handle."""

    def __init__(self, devices: dict[int, BlockDevice]) -> None:
        self.devices = devices

    def hypercalls(self) -> dict[int, Handler]:
        """The handlers by hypercall number."""
        return {
            lib.HVT_HYPERCALL_BLOCK_READ: self.block_read,
            lib.HVT_HYPERCALL_BLOCK_WRITE: self.block_write,
        }

    def block_read(self, memory: GuestMemory, block: Any) -> None:
        """BLOCK_READ: `length` bytes from `offset` of the device to `data`; `ret` is a result code.

        EINVAL: no block device, or a range that is not inside it; EUNSPEC: the host failed.
        """
        device, offset, data_gpa, length = self._check(block)
        block.ret = (
            device.read(offset, memory.writable(data_gpa, length)) if device else lib.HVT_R_EINVAL
        )

    def block_write(self, memory: GuestMemory, block: Any) -> None:
        """BLOCK_WRITE: the other way, with the same result codes."""
        device, offset, data_gpa, length = self._check(block)
        block.ret = (
            device.write(offset, memory.readable(data_gpa, length)) if device else lib.HVT_R_EINVAL
        )

    def _check(self, block: Any) -> tuple[BlockDevice | None, int, int, int]:
        """Read the argument block, once; without a device where handle or range are wrong."""
        device = self.devices.get(block.handle)
        offset, data_gpa, length = block.offset, block.data_gpa, block.len
        if device is None:
            return None, 0, 0, 0
        device.counters.calls += 1
        if offset >= device.capacity or offset + length > device.capacity:
            return None, 0, 0, 0
        return device, offset, data_gpa, length


def attach(
    device: Device, spec: BlockValue, cleanup: Cleanup, stop: Stop, warn: Warn
) -> BlockDevice:
    """Open, check and lock what one device is."""
    where = _where(device, spec)
    if isinstance(spec, BlockRemote):
        from tender.host.remote import RemoteBlock

        _check_remote(where, spec.fd)
        return RemoteBlock(device.name, spec, stop, warn)
    if isinstance(spec, BlockDescriptor):
        fd, reads = _check_access(where, spec), spec.readonly
    else:
        reads = spec.readonly or spec.overlay
        fd = _open(where, spec.path, reads)
        cleanup.callback(lambda: os.close(fd))
    capacity = _capacity(where, fd)
    try:
        check_capacity(capacity, spec.sector_size)
    except DeviceError as error:
        raise DeviceError(f"{where}: {error}") from None
    _lock(where, fd, reads, warn)
    if isinstance(spec, BlockFile) and spec.overlay:
        from tender.host.overlay import OverlayBlock

        return OverlayBlock(device.name, fd, capacity, spec, stop, warn, cleanup)
    return BlockDevice(device.name, fd, capacity, spec.sector_size, spec.readonly, stop, warn)


def _where(device: Device, spec: BlockValue) -> str:
    return f"block device '{device.name}'" + (
        f", {spec.path}" if isinstance(spec, BlockFile) else ""
    )


def _check_access(where: str, spec: BlockDescriptor) -> int:
    """The descriptor, which was opened for what the guest may do."""
    access = fcntl.fcntl(spec.fd, fcntl.F_GETFL) & os.O_ACCMODE
    if access == os.O_WRONLY:
        raise DeviceError(f"{where}: it is open for writing only")
    if access == os.O_RDONLY and not spec.readonly:
        raise DeviceError(f"{where}: it is open for reading only (attach it read-only: add ,ro)")
    return spec.fd


def _check_remote(where: str, fd: int) -> None:
    import socket

    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        with socket.socket(fileno=os.dup(fd)) as copy:
            if copy.type == socket.SOCK_SEQPACKET:
                return
    raise DeviceError(f"{where}: not a seqpacket socket, at whose other end a device is")


def _open(where: str, path: str, reads: bool) -> int:
    # Not blocking: a FIFO in the place of an image must not hang the command.
    flags = (os.O_RDONLY if reads else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except OSError as error:
        what = f"Could not open block device: {where}"
        hint = ""
        if error.errno in (errno.EACCES, errno.EROFS) and not reads:
            hint = " (to attach it read-only, add ,ro)"
        elif isinstance(error, FileNotFoundError):
            hint = _how_to_have(path, reads)
        raise DeviceError(f"{what}: {os.strerror(error.errno or 0)}{hint}") from None


def _how_to_have(path: str, reads: bool) -> str:
    """What was meant by the name of a file that is not there, in brackets; or nothing."""
    before, comma, _ = path.rpartition(",")
    while comma:
        if os.path.exists(before):
            return f" (after a comma, --block NAME={before} takes: ro, overlay, sector-size=N)"
        before, comma, _ = before.rpartition(",")
    if reads or not os.path.isdir(os.path.dirname(path) or "."):
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


def _lock(where: str, fd: int, reads: bool, warn: Warn) -> None:
    """One writer, or any number of readers: a lock of the open file, which ends with it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if reads else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DeviceError(f"{where}: locked by {_holder(fd)}") from None
    except OSError as error:
        # A file system without locks: Solo5's own tender never locks, so the guest runs.
        reason = HostError("cannot be locked", "flock", error.errno or 0)
        warn(f"{where}: {reason}; make sure that nobody else writes to it")


def _holder(fd: int) -> str:
    """Who holds the lock, as /proc/locks and /proc/PID/comm tell: best effort, for a message."""
    info = os.fstat(fd)
    inode = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    try:
        with open("/proc/locks") as locks:
            fields = [line.split() for line in locks]
        locks_of = {words[5]: words[4] for words in fields if words[1] == "FLOCK"}
        # On an overlay, fstat() and the lock name different devices with one inode number.
        alike = [pid for where, pid in locks_of.items() if where.endswith(f":{info.st_ino}")]
        pid = locks_of.get(inode) or alike[0]
    except (OSError, IndexError):
        return "another process"
    if pid == str(os.getpid()):
        return "this guest itself or another one of this program"
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as words:
            command = _command(words.read(4096).decode(errors="replace").rstrip("\0").split("\0"))
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({command})"


def _command(words: list[str]) -> str:
    """A command as it was typed: where it is ours, without the interpreter and its options."""
    program = 0
    if os.path.basename(words[0]).startswith("python"):
        program = 1
        while program < len(words) and words[program].startswith("-"):
            program += 1
    name = os.path.basename(words[program]) if program < len(words) else ""
    if name.startswith(("ptender", "solo5-hvt")):
        words = [name, *words[program + 1 :]]
    text = " ".join(words)
    return text if len(text) <= _COMMAND_MAX else f"{text[:_COMMAND_MAX]}..."
