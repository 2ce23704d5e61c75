"""Guest memory: checked access by guest-physical address.

The rule here: every GPA and length that a guest names passes through `readable`, `writable` or
`at`, which check it against the memory and its protections without overflow. What they give is
the guest's memory itself, not a copy: a handler reads each field once.
"""

from __future__ import annotations

import mmap
import posix as os
from itertools import pairwise

from tender._native import ffi, lib
from tender.errors import GuestFault, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

# Linux, asm-generic/mman.h: the memory is reserved, not counted, until the guest touches it.
# The mmap module names it from Python 3.11 on.
MAP_NORESERVE = 0x4000


HUGE_PAGE = 2 << 20
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4

_cast = ffi.cast


class Layout:
    """A struct of abi/ that a guest passes: its pointer type and its size."""

    __slots__ = ("pointer", "size")

    def __init__(self, name: str) -> None:
        self.pointer = ffi.typeof(f"struct {name} *")
        self.size = ffi.sizeof(f"struct {name}")


class GuestMemory:
    """`size` bytes at GPA 0, zero until somebody writes them.

    `beyond` bytes more are mapped for the guest above them and are no hypercall's to name: the
    network ring's region. With `huge`, the kernel is asked for pages of 2 MiB, which it can give
    where host and guest addresses lie alike in them. Without `host_protected`, `protect` binds the
    guest's CPU and the checks here, but not this process: a debugger may write anywhere.
    """

    def __init__(
        self,
        size: int,
        beyond: int = 0,
        *,
        huge: bool = False,
        shared: bool = False,
        host_protected: bool = True,
    ) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            slack = HUGE_PAGE if huge else 0
            self._map = mmap.mmap(
                -1, size + beyond + slack, flags, mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError as error:
            what = f"cannot reserve {size >> 20} MiB of guest memory"
            raise HostError(what, "mmap", error.errno or 0) from None
        self.size = size
        self.mapped = size + beyond
        self._whole = ffi.from_buffer(self._map)
        start = -int(ffi.cast("uintptr_t", self._whole)) % HUGE_PAGE if huge else 0
        self.view = memoryview(self._map)[start : start + size]
        self.pointer = self._whole + start
        self.base = int(ffi.cast("uintptr_t", self.pointer))
        self.fd = self._share() if shared else -1
        if huge:
            self._ask_for_huge_pages(start)
        self._host_protected = host_protected
        self.protected: list[tuple[int, int, bool]] = []  # start, end, readable
        self._protected_end = 0
        self.backed: set[int] = set()  # the numbers of pages that a snapshot has, touched or not

    def _share(self) -> int:
        """Make it the memory of a file that another process can map: its descriptor."""
        fd: int = lib.native_memfd(b"guest-memory", self.mapped, 0)
        if fd < 0 or not lib.native_map(self.pointer, self.mapped, fd):
            what = f"cannot reserve {self.mapped >> 20} MiB of guest memory"
            raise HostError(what, "memfd_create", ffi.errno)
        return fd

    def _ask_for_huge_pages(self, start: int) -> None:
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE, start, self.mapped)
        except OSError as error:
            raise HostError(
                "--hugepages: the kernel has none", "madvise", error.errno or 0
            ) from None

    def close(self) -> None:
        """Give the memory back, now or with the last view of it that somebody still holds."""
        self.view.release()
        ffi.release(self._whole)
        try:
            self._map.close()
        except BufferError:
            pass

    def alias(self) -> memoryview:
        """Shared memory once more, which this process may write to whatever is protected.

        No other process will map it: its descriptor is closed.
        """
        try:
            return memoryview(mmap.mmap(self.fd, self.size))
        except OSError as error:
            raise HostError("cannot map guest memory again", "mmap", error.errno or 0) from None
        finally:
            os.close(self.fd)
            self.fd = -1

    def map_private(self, fd: int, offset: int) -> None:
        """Let it begin as what the file has from `offset` on, which is not read before it is used.

        What is written stays here. Pages that are not used are the file's for as long as it runs:
        where the file becomes shorter, SIGBUS ends this process.
        """
        if lib.host_map_private(self.pointer, self.size, fd, offset):
            raise HostError("cannot map the guest's memory", "mmap", ffi.errno)

    def protect(self, start: int, end: int, *, readable: bool, writable: bool) -> None:
        """Take rights away from whole pages, for the tender and for the guest's writes."""
        if readable and writable:
            return
        if self._host_protected and lib.host_protect(
            self.pointer + start, end - start, writable, readable
        ):
            raise HostError("cannot protect guest memory", "mprotect", ffi.errno)
        last = self.protected[-1] if self.protected else None
        if last and last[1] == start and last[2] == readable:
            start = self.protected.pop()[0]
        self.protected.append((start, end, readable))
        self._protected_end = max(self._protected_end, end)

    def put(self, gpa: int, data: bytes) -> None:
        """Write the tender's own data."""
        self.writable(gpa, len(data))[:] = data

    def readable(self, gpa: int, size: int) -> memoryview:
        """The memory [gpa, gpa + size) for reading."""
        if gpa < self._protected_end or gpa + size > self.size:
            self._check(gpa, size, False)
        return self.view[gpa : gpa + size]

    def writable(self, gpa: int, size: int) -> memoryview:
        """The memory [gpa, gpa + size) for writing; the tender must not die of a read-only page."""
        if gpa < self._protected_end or gpa + size > self.size:
            self._check(gpa, size, True)
        return self.view[gpa : gpa + size]

    def at(self, layout: Layout, gpa: int, *, out: bool = True) -> Any:
        """The struct at `gpa` in place; `out`: the tender writes to it."""
        if gpa < self._protected_end or gpa + layout.size > self.size:
            self._check(gpa, layout.size, out)
        return _cast(layout.pointer, self.base + gpa)

    def address(self, gpa: int) -> Any:
        """A `char *` to a GPA that was checked."""
        return self.pointer + gpa

    def _check(self, gpa: int, size: int, write: bool) -> None:
        """All of the rules; callers skip it where an access is inside and above what is protected.

        Neither number is negative: a guest's are unsigned, and Python's sums do not overflow.
        """
        if gpa + size > self.size:
            raise invalid_access(gpa, size)
        for start, end, readable in self.protected:
            if gpa < end and gpa + size > start and size and (write or not readable):
                raise invalid_access(gpa, size, "protected ")


def invalid_access(gpa: int, size: int, kind: str = "") -> GuestFault:
    """The words that scripts know from solo5-hvt."""
    return GuestFault(f"Invalid guest access: {kind}gpa={gpa:#x}, len={size:#x}", gpa, size)


def regions(
    memory: GuestMemory, executable: Iterable[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """The memory as pieces of equal protection: start, end and PROT_*.

    Pages that can't be read are left out: what the host forbids, the CPU must not touch.
    """
    protected = {start: (end, readable) for start, end, readable in memory.protected}
    code = dict(executable)
    edges = {0, memory.size, *protected, *code, *code.values()}
    edges.update(end for end, _ in protected.values())
    pieces = []
    protected_end = code_end = 0
    readable = True
    for start, end in pairwise(sorted(edges)):
        if start in protected:
            protected_end, readable = protected[start]
        code_end = code.get(start, code_end)
        prot = PROT_READ | PROT_WRITE
        if start < protected_end:
            prot = PROT_READ if readable else 0
        if start < code_end:
            prot |= PROT_EXEC
        if prot & PROT_READ:
            pieces.append((start, end, prot))
    return pieces
