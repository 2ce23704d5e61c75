"""The region that stays mapped beside an spt guest's memory: code, plan, and what it points to.

The guest can read it: nothing of the host's may be in it but what is the guest's own.
"""

from __future__ import annotations

import mmap
import os
import sys

from tender._native import ffi, lib
from tender.boot.layout import PAGE_SIZE
from tender.errors import HostError
from tender.memory import MAP_NORESERVE, PROT_EXEC, PROT_READ, PROT_WRITE
from tender.sandbox.fdtable import FIXED, device_fd
from tender.sandbox.seccomp import FILTER_MAX, INSTRUCTION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from tender.image.elf import Image
    from tender.memory import GuestMemory
    from tender.modules.block import BlockDevice

    Range = tuple[int, int, int]

CODE = os.path.join(os.path.dirname(__file__), "code")
SIGNAL_STACK = 24 << 10  # beside the frame: what the handlers use of it, and the start
FRAME_MAX = 32 << 10  # where the kernel does not say: with AVX-512 and AMX
FILTER = lib.SPT_PLAN + ffi.sizeof("struct spt_plan")  # its offset in the region
CORE_HEADER = -(-(FILTER + FILTER_MAX) // PAGE_SIZE) * PAGE_SIZE
REPORT_TAIL = CORE_HEADER + PAGE_SIZE
SLOTS = REPORT_TAIL + PAGE_SIZE
SLOT = 4  # bytes: uint32_t
FIRST_OVERLAY_FD = 0x1000  # numbers at which nothing is open


class Overlay:
    """The memory of a disk's overlay: a file whose length is sealed. Raises HostError."""

    def __init__(self, handle: int, disk: BlockDevice) -> None:
        self.handle = handle
        self.disk = disk
        self.blocks = disk.overlay_bytes // disk.sector_size
        self.fd: int = lib.native_memfd(b"overlay", disk.overlay_bytes, 0)
        if self.fd < 0:
            what = f"block device '{disk.name}': no memory for an overlay"
            raise HostError(what, "memfd_create", ffi.errno)

    @property
    def slots_size(self) -> int:
        """How many bytes the table takes that says where each block is."""
        return -(-self.disk.capacity // self.disk.sector_size * SLOT // PAGE_SIZE) * PAGE_SIZE

    @staticmethod
    def guest_fd(handle: int) -> int:
        """What the guest has for its descriptor: nothing is open there."""
        return FIRST_OVERLAY_FD + handle


class Region:
    """The region of code.c, with its plan (spt.h). Raises HostError.

    `ranges` is of protections(); with `is_report`, a program gets the messages.
    """

    def __init__(
        self,
        memory: GuestMemory,
        entry: int,
        ranges: Sequence[Range],
        overlays: Sequence[Overlay],
        *,
        is_report: bool,
    ) -> None:
        with open(CODE, "rb") as file:
            code = file.read()
        stack_size = SIGNAL_STACK + (lib.spt_frame_size() or FRAME_MAX)
        size = SLOTS + sum(each.slots_size for each in overlays) + stack_size
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            mapping = mmap.mmap(-1, size, flags)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "errno", 0)
            raise HostError("cannot map an spt guest's region", "mmap", reason) from None
        mapping[: len(code)] = code
        self.start = ffi.from_buffer(mapping)
        at = int(ffi.cast("uintptr_t", self.start))
        self._plan = plan = ffi.cast("struct spt_plan *", self.start + lib.SPT_PLAN)
        plan.region, plan.region_size = at, size
        plan.stack_end, plan.stack_size = at + size, stack_size
        plan.memory, plan.mem_size, plan.entry = memory.base, memory.size, entry
        plan.range_count = len(ranges)
        for into, (first, end, prot) in zip(plan.ranges, ranges, strict=False):
            into.start, into.end, into.prot = first, end, prot
        plan.is_report = is_report
        plan.message_fd = FIXED["report" if is_report else "stderr"]
        plan.is_init = os.getpid() == 1
        program = os.path.basename(sys.argv[0]).encode(errors="surrogateescape")
        plan.program = program[: lib.SPT_PROGRAM_MAX - 1]
        self._set_overlays(overlays)

    def _set_overlays(self, overlays: Sequence[Overlay]) -> None:
        plan = self._plan
        plan.overlay_count = len(overlays)
        slots = plan.region + SLOTS
        for into, each in zip(plan.overlays, overlays, strict=False):
            into.fd = Overlay.guest_fd(each.handle)
            into.image_fd, into.memory_fd = device_fd(each.handle), each.fd
            into.block_size, into.capacity = each.disk.sector_size, each.disk.capacity
            into.blocks, into.slots = each.blocks, slots
            slots += each.slots_size

    def set_core(self, mem_bytes: int) -> None:
        """Have a core file written, to the descriptors of FIXED."""
        from tender.image.elf import EM_X86_64
        from tender.observe import core

        header = core.header_of(mem_bytes, EM_X86_64, [0] * len(core.REGISTER_ORDER))
        ffi.memmove(self.start + CORE_HEADER, header, len(header))
        plan = self._plan
        plan.core_header = plan.region + CORE_HEADER
        plan.core_registers = core.REGISTERS_OFFSET
        plan.core_fd, plan.core_helper_fd = FIXED["core"], FIXED["core-helper"]
        plan.has_core = plan.traps_exit = 1

    def set_report(self) -> None:
        """Have a report of the guest's end written, to the descriptor of FIXED."""
        from json import dumps

        from tender.outcome import Outcome

        versions = dumps({"versions": Outcome("halted", 0).as_dict()["versions"]})
        tail = f", {versions[1:]}\n".encode()
        ffi.memmove(self.start + REPORT_TAIL, tail, len(tail))
        plan = self._plan
        plan.report_tail, plan.report_tail_size = plan.region + REPORT_TAIL, len(tail)
        plan.report_fd = FIXED["report-file"]
        plan.has_report = plan.traps_exit = 1

    def set_filter(self, filter: bytes) -> None:
        """Put the system call filter into it."""
        plan = self._plan
        ffi.memmove(self.start + FILTER, filter, len(filter))
        plan.filter, plan.filter_length = plan.region + FILTER, len(filter) // INSTRUCTION


def protections(image: Image, heap_end: int = 0) -> list[tuple[int, int, int]]:
    """What of guest memory is not to be read and written: start, end and PROT_*.

    With `heap_end`, heap and stack up to there can be executed as well.
    """
    wanted = [
        (
            each.start,
            each.end,
            PROT_READ * each.readable | PROT_WRITE * each.writable | PROT_EXEC * each.executable,
        )
        for each in image.segments
    ]
    if heap_end > image.kernel_end:
        wanted.append((image.kernel_end, heap_end, PROT_READ | PROT_WRITE | PROT_EXEC))
    return [each for each in wanted if each[2] != PROT_READ | PROT_WRITE]
