"""A block device that keeps what is written in memory, and leaves its file unchanged.

A page is in the file until it is written to, and in the overlay from then on. The file is only
read, by pread(2). It is not mapped: a file that becomes shorter would end the tender with SIGBUS
(docs/decisions/0009-devices-of-a-program.md).
"""

from __future__ import annotations

import mmap
from errno import ENOMEM

from tender._native import lib
from tender.errors import HostError
from tender.memory import MAP_NORESERVE
from tender.modules.block import BlockDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from tender.cleanup import Cleanup
    from tender.config import BlockFile
    from tender.modules import Warn
    from tender.stop import Stop

PAGE = 4096  # bytes, what is copied on the first write


class OverlayBlock(BlockDevice):
    """`fd` is the file, open for reading; the overlay is memory, allocated as it is written."""

    in_engine = False

    def __init__(
        self,
        name: str,
        fd: int,
        capacity: int,
        disk: BlockFile,
        stop: Stop,
        warn: Warn,
        cleanup: Cleanup,
    ) -> None:
        super().__init__(name, fd, capacity, disk.sector_size, False, stop, warn)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            overlay = mmap.mmap(-1, capacity, flags)
            # A byte for each page, allocated now: the guest cannot make it grow.
            self._written = bytearray(-(-capacity // PAGE))
        except (OSError, OverflowError, MemoryError):
            what = f"block device '{name}': no memory for an overlay of {capacity} bytes"
            raise HostError(what, "mmap", ENOMEM) from None
        self._overlay = memoryview(overlay)
        cleanup.callback(self._overlay.release)

    def read(self, offset: int, data: memoryview) -> int:
        """As BlockDevice.read: from the overlay where the guest has written, else from the file."""
        for start, end, written in self._runs(offset, offset + len(data)):
            piece = data[start - offset : end - offset]
            if written:
                piece[:] = self._overlay[start:end]
                self.counters.bytes += end - start
            elif self._all(lib.host_pread, piece, start, self.fd) != lib.HVT_R_OK:
                return lib.HVT_R_EUNSPEC
        return lib.HVT_R_OK

    def write(self, offset: int, data: memoryview) -> int:
        """As BlockDevice.write, into memory."""
        end = offset + len(data)
        for edge in {offset, end} if data else ():
            if edge % PAGE and not self._copy(edge // PAGE):
                return lib.HVT_R_EUNSPEC
        self._overlay[offset:end] = data
        self.counters.bytes += len(data)
        if data:
            first, after = offset // PAGE, -(-end // PAGE)
            self._written[first:after] = b"\1" * (after - first)
        return lib.HVT_R_OK

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """The parts of [offset, end) in one place each: start, end, whether in the overlay."""
        written = self._written
        start, inside = offset, end > offset and bool(written[offset // PAGE])
        for page in range(offset // PAGE + 1, -(-end // PAGE)):
            if bool(written[page]) != inside:
                yield start, page * PAGE, inside
                start, inside = page * PAGE, not inside
        if start < end:
            yield start, end, inside

    def _copy(self, page: int) -> bool:
        """Copy a page into the overlay that will be written in part; whether that succeeded."""
        if self._written[page]:
            return True
        start = page * PAGE
        end = min(start + PAGE, self.capacity)
        before = self.counters.bytes
        piece = self._overlay[start:end]
        copied: bool = self._all(lib.host_pread, piece, start, self.fd) == lib.HVT_R_OK
        self.counters.bytes = before
        if copied:
            self._written[page] = 1
        return copied
