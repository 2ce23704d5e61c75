"""The memory that the children of a fork server share with it.

Python writes to an object whenever it uses it: it counts references. So a start writes to hundreds
of pages that a fork shares, each of which is copied, and afterwards many are as before. The server
makes its memory the private mapping of a file; so a child can give such pages back.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_right
from functools import partial

from tender._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tender.stop import Stop

KEPT_BYTES = range(64 << 10, 64 << 20)  # of a mapping: of smaller ones little is shared
BLOCKS_MAX = 1 << 16
NOT_INHERITED = {b"wf", b"dc"}  # Linux, fs/proc/task_mmu.c: MADV_WIPEONFORK, MADV_DONTFORK
# Objects of each size that Python has free places for, the largest first.
_MAKERS: list[Callable[[], object]] = [
    *(partial(bytes, size - sys.getsizeof(b"")) for size in range(512, 32, -16)),
    partial(complex, 1, 1),
    object,
]

_taken: list[object] = []


def keep() -> None:
    """In a server that is about to fork: keep its memory for children to share. Raises OSError."""
    lib.heap_clear_cache()
    _take_free_blocks()
    lib.heap_fill()
    mappings = _mappings("smaps")
    lib.heap_clear_cache()
    kept = [(start, end - start) for start, end in mappings if end - start in KEPT_BYTES]
    if lib.heap_reserve(sum(length for _, length in kept)):
        raise OSError(ffi.errno, os.strerror(ffi.errno))
    for start, length in kept:
        if lib.heap_keep(start, length):
            raise OSError(ffi.errno, os.strerror(ffi.errno))


def _take_free_blocks() -> None:
    """Have Python's next objects come from fresh pages, not from free places in many."""
    mappings = _mappings("maps")
    starts = [start for start, _ in mappings]

    def is_old(address: int) -> bool:
        index = bisect_right(starts, address) - 1
        return index >= 0 and address < mappings[index][1]

    for make in _MAKERS:
        while len(_taken) < BLOCKS_MAX:
            _taken.append(make())
            if not is_old(id(_taken[-1])):
                break


def _mappings(file: str) -> list[tuple[int, int]]:
    """The private, writable memory of this process but its stack, in the order of addresses.

    `file` is "maps", or "smaps", which takes 2.8 ms: without what a fork wipes or leaves out, as
    the C library's random state.
    """
    found, is_found = [], False
    with open(f"/proc/self/{file}", "rb") as lines:
        for line in lines:
            name, *rest = line.split()
            if b"-" in name:
                is_found = rest[0] == b"rw-p" and rest[-1] != b"[stack]"
                if is_found:
                    start, end = (int(each, 16) for each in name.split(b"-"))
                    found.append((start, end))
            elif is_found and name == b"VmFlags:" and not NOT_INHERITED.isdisjoint(rest):
                found.pop()
    return found


class Copies:
    """The pages that a child has copied. A handler of signals writes to the request `stop`."""

    def __init__(self, stop: Stop) -> None:
        self._stop = int(ffi.cast("uintptr_t", stop.cell))

    def open(self) -> None:
        """Open what tells which they are, while there is a /proc. Raises OSError."""
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def note(self) -> None:
        """Note those that there are now, and close it."""
        lib.heap_note_copies(self._pagemap)
        os.close(self._pagemap)

    def give_back(self) -> None:
        """Give back the noted ones that are as they were, while there is one thread."""
        lib.heap_give_back(self._stop)
