"""A block device that keeps what is written in memory, and leaves its file unchanged.

A page is in the file until it is written to, and in the overlay from then on. The overlay has room
for as many pages as its limit says, and takes memory as they are written. The file is only read,
by pread(2). It is not mapped: a file that becomes shorter would end the tender with SIGBUS
(docs/decisions/0009-devices-of-a-program.md).
"""

from __future__ import annotations

import mmap
import os
from errno import ENOMEM

from tender._native import lib
from tender.backends import OVERLAY_MAX
from tender.errors import HostError
from tender.memory import MAP_NORESERVE
from tender.modules.block import BlockDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from tender.backends import BlockFile
    from tender.cleanup import Cleanup
    from tender.modules import Warn
    from tender.stop import Stop

PAGE = 4096  # bytes, what is copied on the first write
ENTRY_MAX = 256  # bytes that the map needs per page, while it grows


class OverlayBlock(BlockDevice):
    """`fd` is the file, open for reading."""

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
        self.overlay_bytes = size(disk.overlay, capacity)
        self._pages = self.overlay_bytes // PAGE
        self._full = f"its overlay of {self._pages * PAGE} bytes is full"
        self._slots: dict[int, int] = {}  # where each written page is in the overlay
        try:
            overlay = _reserve(self._pages * PAGE)
            # Address space for the map: the sandbox limits it to what there is before the start.
            self._room = _reserve(self._pages * ENTRY_MAX)
        except (OSError, OverflowError):
            what = f"block device '{name}': no memory for an overlay of {self._pages * PAGE} bytes"
            raise HostError(what, "mmap", ENOMEM) from None
        self._overlay = memoryview(overlay)
        cleanup.callback(self._overlay.release)

    def read(self, offset: int, data: memoryview) -> int:
        """As BlockDevice.read: from the overlay where the guest has written, else from the file."""
        for start, end, at in self._runs(offset, offset + len(data)):
            piece = data[start - offset : end - offset]
            if at is not None:
                piece[:] = self._overlay[at : at + end - start]
                self.counters.bytes += end - start
            elif self._all(lib.host_pread, piece, start, self.fd) != lib.HVT_R_OK:
                return lib.HVT_R_EUNSPEC
        return lib.HVT_R_OK

    def write(self, offset: int, data: memoryview) -> int:
        """As BlockDevice.write, into memory; all of it or nothing."""
        end = offset + len(data)
        if not self._add_pages(offset, end):
            return lib.HVT_R_EUNSPEC
        for start, stop, at in self._runs(offset, end):
            if at is not None:
                self._overlay[at : at + stop - start] = data[start - offset : stop - offset]
        self.counters.bytes += len(data)
        return lib.HVT_R_OK

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int, int | None]]:
        """The parts of [offset, end) that lie together: start, end, where in the overlay or None
        for the file."""
        slots = self._slots
        start, first = offset, slots.get(offset // PAGE)
        following = first
        for page in range(offset // PAGE + 1, -(-end // PAGE)):
            following = None if following is None else following + 1
            slot = slots.get(page)
            if slot != following:
                yield start, page * PAGE, _place(start, first)
                start, first = page * PAGE, slot
                following = slot
        if start < end:
            yield start, end, _place(start, first)

    def _add_pages(self, offset: int, end: int) -> bool:
        """Give each page of [offset, end) its place in the overlay; whether that succeeded."""
        slots, first, after = self._slots, offset // PAGE, -(-end // PAGE)
        new = []
        for page in range(first, after) if offset < end else ():
            if page not in slots:
                new.append(page)
                if len(slots) + len(new) > self._pages:
                    self.errors.report(self.counters, self._full)
                    return False
        edges = {at // PAGE for at in (offset, end) if at % PAGE}
        for index, page in enumerate(new, len(slots)):
            if page in edges and not self._copy(page, index):
                return False
        self._room.close()
        slots.update(zip(new, range(len(slots), self._pages), strict=False))
        return True

    def _copy(self, page: int, slot: int) -> bool:
        """Copy a page that will be written in part to `slot`; whether that succeeded."""
        start = page * PAGE
        piece = self._overlay[slot * PAGE :][: min(PAGE, self.capacity - start)]
        before = self.counters.bytes
        copied: bool = self._all(lib.host_pread, piece, start, self.fd) == lib.HVT_R_OK
        self.counters.bytes = before
        return copied


def size(overlay: bool | int | str, capacity: int) -> int:
    """How much memory an overlay has for a disk of this capacity: whole pages, in bytes."""
    limit = default_limit() if overlay is True else int(overlay)
    return min(limit, -(-capacity // PAGE) * PAGE) // PAGE * PAGE


def default_limit() -> int:
    """How much memory an overlay takes where nothing is said, in bytes."""
    return min(OVERLAY_MAX, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


def _reserve(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


def _place(start: int, slot: int | None) -> int | None:
    return None if slot is None else slot * PAGE + start % PAGE
