"""A block device that keeps what is written in memory, and leaves its file as it was.

The rule here: a page is in the file until it is written to, and in the overlay from then on. The
file is only ever read, by pread(2): it is no mapping, in which a file that somebody makes shorter
would end the tender with SIGBUS (docs/decisions/0009-devices-of-a-program.md).
"""

from __future__ import annotations

import os

from tender._abi import lib
from tender.errors import HostError
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
    """`fd` is the file, open for reading; the overlay is a memfd that grows as it is written."""

    in_engine = False

    def __init__(
        self,
        name: str,
        fd: int,
        capacity: int,
        spec: BlockFile,
        stop: Stop,
        warn: Warn,
        cleanup: Cleanup,
    ) -> None:
        super().__init__(name, fd, capacity, spec.sector_size, False, stop, warn)
        self._written: set[int] = set()  # numbers of pages
        try:
            self.overlay_fd = os.memfd_create("ptender-overlay", os.MFD_CLOEXEC)
            cleanup.callback(lambda: os.close(self.overlay_fd))
            os.ftruncate(self.overlay_fd, capacity)
        except OSError as error:
            what = f"block device '{name}': no memory for an overlay of {capacity} bytes"
            raise HostError(what, "memfd_create", error.errno or 0) from None

    def read(self, offset: int, data: memoryview) -> int:
        for start, end, fd in self._runs(offset, offset + len(data)):
            result = self._all(os.preadv, data[start - offset : end - offset], start, fd)
            if result != lib.HVT_R_OK:
                return result
        return lib.HVT_R_OK

    def write(self, offset: int, data: memoryview) -> int:
        end = offset + len(data)
        for edge in {offset, end} if data else ():
            if edge % PAGE and not self._copy(edge // PAGE):
                return lib.HVT_R_EUNSPEC
        result = self._all(os.pwritev, data, offset, self.overlay_fd)
        if result == lib.HVT_R_OK and data:
            self._written.update(range(offset // PAGE, (end - 1) // PAGE + 1))
        return result

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The parts of [offset, end) that are in one place each: from, to, descriptor."""
        start, inside = offset, offset // PAGE in self._written
        for page in range(offset // PAGE + 1, -(-end // PAGE)):
            if (page in self._written) != inside:
                yield start, page * PAGE, self.overlay_fd if inside else self.fd
                start, inside = page * PAGE, not inside
        if start < end:
            yield start, end, self.overlay_fd if inside else self.fd

    def _copy(self, page: int) -> bool:
        """Bring a page into the overlay that is about to be written in part."""
        if page in self._written:
            return True
        start = page * PAGE
        size = min(PAGE, self.capacity - start)
        buffer = memoryview(bytearray(size))
        before = self.counters.bytes
        copied = not self._all(os.preadv, buffer, start, self.fd) and not self._all(
            os.pwritev, buffer, start, self.overlay_fd
        )
        self.counters.bytes = before
        if copied:
            self._written.add(page)
        return copied
