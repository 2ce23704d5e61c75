"""BLOCK_READ, BLOCK_WRITE: a block device is a file.

A guest reads and writes [0, capacity) of its own device and nothing else. An error of the host
(disk full, I/O error) is a result code.
"""

from __future__ import annotations

import errno
import posix as os

from tender._native import ffi, lib
from tender.errors import HostError
from tender.modules import STEP, DeviceErrors, new_counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    Transfer = Callable[[int, Any, int, int], int]

    class OverlayFile(Protocol):
        """The file that keeps what a guest writes: `capacity` is its maximum length in bytes."""

        fd: int
        capacity: int

    from tender.hypercalls import Handler
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.modules.rate import RateLimit
    from tender.stop import Stop


class BlockDevice:
    """An open image: `capacity` bytes in sectors of `sector_size`."""

    in_engine = True  # it is a plain descriptor, which engine.c serves as well
    rate: RateLimit | None = None
    syncs_at_end = False  # all is written to the host's disk when the guest has ended
    overlay_bytes = 0  # of memory that keeps what the guest writes, if that is not the file
    overlay_file: OverlayFile | None = None  # the same for a file

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
        self._warn = warn
        self.counters = new_counters()
        self.errors = DeviceErrors(f"block device '{name}'", warn)

    def count_in(self, counters: Any) -> None:
        """Count in the first of these two from now on (struct counters[2])."""
        self.counters = counters + 0

    def read(self, offset: int, data: memoryview) -> int:
        """Fill `data` from the file; a result code."""
        return self._all(lib.host_pread, data, offset, self.fd)

    def write(self, offset: int, data: memoryview) -> int:
        """Write `data` to the file; a result code."""
        if self.readonly:
            self.counters.drops += 1
            return lib.HVT_R_EUNSPEC
        return self._all(lib.host_pwrite, data, offset, self.fd)

    def end(self) -> None:
        """What is left to do when the guest has ended; a failure is a warning."""
        if self.syncs_at_end:
            try:
                os.fsync(self.overlay_file.fd if self.overlay_file else self.fd)
            except OSError as error:
                self.counters.errors += 1
                why = HostError("cannot write it out", "fsync", error.errno or 0)
                self._warn(f"block device '{self.name}': {why}; what the guest wrote may be lost")

    def _all(self, call: Transfer, data: memoryview, offset: int, fd: int) -> int:
        length, done = len(data), 0
        start = ffi.from_buffer(data)
        while done < length:
            count = call(fd, start + done, min(length - done, STEP), offset + done)
            if count < 0 and ffi.errno == errno.EINTR:
                count = 0
            elif count <= 0:
                what = os.strerror(ffi.errno) if count else "the file became shorter"
                self.errors.report(self.counters, what)
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

    def end(self) -> None:
        """The guest has ended."""
        for device in self.devices.values():
            device.end()

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
        if device is None:
            block.ret = lib.HVT_R_EINVAL
            return
        data = memory.writable(data_gpa, length)
        if device.rate:
            device.rate.wait_and_take(length, device.counters)
        block.ret = device.read(offset, data)

    def block_write(self, memory: GuestMemory, block: Any) -> None:
        """BLOCK_WRITE: the other way, with the same result codes."""
        device, offset, data_gpa, length = self._check(block)
        if device is None:
            block.ret = lib.HVT_R_EINVAL
            return
        data = memory.readable(data_gpa, length)
        if device.rate and not device.readonly:
            device.rate.wait_and_take(length, device.counters)
        block.ret = device.write(offset, data)

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
