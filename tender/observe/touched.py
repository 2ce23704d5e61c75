"""The pages that a guest has touched, written to a file that has holes for all others.

Sources: Linux, Documentation/admin-guide/mm/pagemap.rst; lseek(2), SEEK_DATA.
"""

from __future__ import annotations

import errno
import os

from tender.boot.layout import PAGE_SIZE
from tender.memory import regions
from tender.sandbox.confine import open_as_anyone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tender.memory import GuestMemory

PAGEMAP_PRESENT_OR_SWAPPED = 3 << 62
BATCH = 512  # pages looked up at a time
BATCH_BYTES = BATCH * PAGE_SIZE
_ZERO = bytes(PAGE_SIZE)


def open_source(memory_fd: int) -> dict[str, int]:
    """The descriptor that tells which pages are touched, by its label; raises OSError.

    `memory_fd` is the file of the guest's memory where it has one: then the guest's process touches
    pages that this process does not.
    """
    if memory_fd >= 0:
        return {"memory-file": os.dup(memory_fd)}
    # To root's descriptor the kernel would show where in its memory a page is.
    return {"pagemap": open_as_anyone("/proc/self/pagemap")}


def write(
    fd: int,
    offset: int,
    source: Mapping[str, int],
    memory: GuestMemory,
    check: Callable[[], None],
) -> None:
    """Write the touched pages to a file of holes, where the memory begins at `offset`.

    `source` has the descriptor of `open_source`. `check` is called now and then, and may raise.
    Raises OSError.
    """
    for low, high, _ in regions(memory, ()):
        for start, end in _touched(source, memory, low, high):
            check()
            data = memory.readable(start, end - start)
            for first, last in _not_zero(data):
                pwrite(fd, data[first:last], offset + start + first)


def _not_zero(data: memoryview) -> Iterator[tuple[int, int]]:
    """The runs of pages with anything in them: a huge page has more pages than are touched."""
    start = None
    for page in range(0, len(data), PAGE_SIZE):
        if bytes(data[page : page + PAGE_SIZE]) != _ZERO:
            start = page if start is None else start
        elif start is not None:
            yield start, page
            start = None
    if start is not None:
        yield start, len(data)


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`; raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def data_ranges(fd: int, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The runs [start, end) in [low, high) of a file that are no holes, each of 2 MiB at most."""
    end = low
    while end < high:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the file's end
                return
            raise
        if start >= high:
            return
        end = min(os.lseek(fd, start, os.SEEK_HOLE), start + BATCH_BYTES, high)
        yield start, end


def _touched(
    source: Mapping[str, int], memory: GuestMemory, low: int, high: int
) -> Iterator[tuple[int, int]]:
    """The runs [start, end) in [low, high) of pages that hold something of the guest's."""
    if "memory-file" in source:
        yield from data_ranges(source["memory-file"], low, high)
        return
    first = memory.base // PAGE_SIZE
    for batch in range(low // PAGE_SIZE, high // PAGE_SIZE, BATCH):
        count = min(BATCH, high // PAGE_SIZE - batch)
        found = os.pread(source["pagemap"], count * 8, (first + batch) * 8)
        flags = memoryview(found).cast("Q")
        start = None
        for index, each in enumerate(flags):
            page = batch + index
            if each & PAGEMAP_PRESENT_OR_SWAPPED or page in memory.backed:
                start = page if start is None else start
            elif start is not None:
                yield start * PAGE_SIZE, page * PAGE_SIZE
                start = None
        if start is not None:
            yield start * PAGE_SIZE, (batch + count) * PAGE_SIZE
