"""A block device that another process serves, at the other end of a seqpacket socket.

One request, one reply, of at most 64 KiB each beside their headers. The other side may be late (a
stop request ends the wait), may fail (an errno) and may be closed: for the guest that is a result
code.

A request is {u32 operation, u32 length, u64 offset} and the data of a write; a reply is {u32 errno}
and, where that is 0, the data of a read.
"""

from __future__ import annotations

import os
from errno import EINTR
from struct import Struct

from tender._native import ffi, lib
from tender.modules.block import BlockDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.backends import BlockRemote
    from tender.modules import Warn
    from tender.stop import Stop

HEADER = Struct("<IIQ")
STATUS = Struct("<I")
READ, WRITE = 1, 2
PIECE = 1 << 16  # bytes of data in one message
_WAIT_MS = 1000  # at a time; a stop request ends the wait


class RemoteBlock(BlockDevice):
    """A block device at the other end of `disk.fd`."""

    in_engine = False

    def __init__(self, name: str, disk: BlockRemote, stop: Stop, warn: Warn) -> None:
        super().__init__(name, disk.fd, disk.capacity, disk.sector_size, disk.readonly, stop, warn)
        self._gone = False
        os.set_blocking(disk.fd, False)

    def read(self, offset: int, data: memoryview) -> int:
        """As BlockDevice.read, by requests to the program."""
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            reply = self._request(HEADER.pack(READ, len(piece), offset + start), len(piece))
            if reply is None:
                return lib.HVT_R_EUNSPEC
            piece[:] = reply
        return self._done(len(data))

    def write(self, offset: int, data: memoryview) -> int:
        """As BlockDevice.write, by requests to the program."""
        if self.readonly:
            self.counters.drops += 1
            return lib.HVT_R_EUNSPEC
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            request = HEADER.pack(WRITE, len(piece), offset + start) + bytes(piece)
            if self._request(request, 0) is None:
                return lib.HVT_R_EUNSPEC
        return self._done(len(data))

    def _done(self, length: int) -> int:
        self.counters.bytes += length
        return lib.HVT_R_OK

    def _request(self, request: bytes, length: int) -> memoryview | None:
        """The data of the reply, `length` bytes; None where the request failed."""
        if self._gone:
            self.counters.errors += 1
            return None
        try:
            self._wait(lib.POLLOUT)
            os.write(self.fd, request)
            self._wait(lib.POLLIN)
            reply = os.read(self.fd, STATUS.size + PIECE)
        except OSError as error:
            return self._fail(os.strerror(error.errno or 0))
        if not reply:
            return self._fail("disconnected")
        status = STATUS.unpack_from(reply)[0] if len(reply) >= STATUS.size else None
        if status:
            self.counters.errors += 1  # which the other side reports
            return None
        if status is None or len(reply) != STATUS.size + length:
            return self._fail(f"the peer gave {len(reply)} bytes instead of {length}")
        return memoryview(reply)[STATUS.size :]

    def _wait(self, events: int) -> None:
        while True:
            ready = lib.host_events(self.fd, events, _WAIT_MS)
            self._stop.check()
            if ready > 0:
                return
            if ready < 0 and ffi.errno != EINTR:
                raise OSError(ffi.errno, os.strerror(ffi.errno))

    def _fail(self, reason: str) -> memoryview | None:
        """Give up the device: after a reply that does not match, none can be trusted."""
        self._gone = True
        self.errors.report(self.counters, reason)
        return None
