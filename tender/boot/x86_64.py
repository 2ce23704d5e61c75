"""How an x86_64 guest wakes up: registers, GDT and page tables.

The rule here: pure. Sources: the hvt target's boot state (ABI version 2); bit names and
encodings from the Intel SDM volume 3, chapters 2 to 4.
"""

from __future__ import annotations

import _struct as struct

from tender.boot import layout
from tender.dataclass import dataclass, replace

CR0_PE, CR0_NE, CR0_WP, CR0_PG = 1 << 0, 1 << 5, 1 << 16, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_OSXSAVE = 1 << 5, 1 << 9, 1 << 10, 1 << 18
EFER_LME, EFER_LMA, EFER_NXE = 1 << 8, 1 << 10, 1 << 11
RFLAGS_ALWAYS_1 = 1 << 1
MXCSR_MM = 1 << 17  # AMD's "misalignsse" (APM volume 1, 4.2.2)

PTE_PRESENT, PTE_WRITABLE, PTE_LARGE, PTE_NX = 1 << 0, 1 << 1, 1 << 7, 1 << 63

SELECTOR_CODE, SELECTOR_DATA = 0x08, 0x10
TYPE_CODE, TYPE_DATA, TYPE_TSS = 9, 3, 11  # execute-only accessed, read/write accessed, busy TSS

READ_ONLY_FROM = 0x10000  # pages below it are not present: a null pointer traps

SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
# apic_base 0: no local APIC. (A KVM that emulates the guest keeps one all the same, at 0xfee00000
# in the middle of a large guest's memory, and so it is with solo5-hvt.)
CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")

# What a guest can set beside the segment bases and the TSC (Intel SDM volume 4).
MSRS = {
    "sysenter_cs": 0x174, "sysenter_esp": 0x175, "sysenter_eip": 0x176, "pat": 0x277,
    "star": 0xC0000081, "lstar": 0xC0000082, "cstar": 0xC0000083, "fmask": 0xC0000084,
    "kernel_gs_base": 0xC0000102, "tsc_aux": 0xC0000103,
}  # fmt: skip
MSR_TSC = 0x10
PAT_AT_RESET = 0x0007040600070406  # SDM volume 3, table 12-12


@dataclass
class Segment:
    """A segment register with its hidden part; fields as in struct kvm_segment."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - the manual's name: a 64-bit code segment
    g: int = 0
    avl: int = 0
    unusable: int = 0


@dataclass
class Table:
    """GDTR or IDTR."""

    base: int = 0
    limit: int = 0


@dataclass
class Fpu:
    """x87 and SSE, as they are after a reset if nothing is said (the SDM's FNINIT)."""

    fcw: int = 0x37F
    fsw: int = 0
    ftwx: int = 0  # one bit per register: it is in use
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0
    st: tuple[bytes, ...] = (bytes(10),) * 8  # from the top of the stack
    xmm: tuple[bytes, ...] = (bytes(16),) * 16
    mxcsr: int = 0x1F80
    extended: dict[int, bytes] = {}  # noqa: RUF012 - in use, by EXTENDED; never written to


# The parts of AVX and AVX-512 by their numbers in XCR0, and their sizes in bytes: the upper halves
# of YMM, K0 to K7, the upper halves of ZMM0 to ZMM15, ZMM16 to ZMM31 (SDM volume 1, 13.1).
X87_AND_SSE = 3  # of XCR0
EXTENDED = {2: 256, 5: 64, 6: 512, 7: 1024}


@dataclass
class DebugRegisters:
    """As they are after a reset if nothing is said (SDM volume 3, 18.2)."""

    breakpoints: tuple[int, ...] = (0,) * 4  # DR0 to DR3
    dr6: int = 0xFFFF0FF0
    dr7: int = 0x400


@dataclass
class State:
    """What an x86_64 CPU of a guest has in its registers, but for its TSC, which is a clock.

    None, 0 for `xcr0` and an MSR that is not named: as the CPU has it.
    """

    registers: dict[str, int]  # by REGISTERS
    segments: dict[str, Segment]  # by SEGMENTS
    control: dict[str, int]  # by CONTROL
    gdt: Table
    idt: Table
    fpu: Fpu | None = None
    msrs: dict[str, int] = {}  # noqa: RUF012 - by MSRS; never written to
    xcr0: int = 0  # what XSAVE and AVX may use (SDM volume 1, 13.3)
    debug: DebugRegisters | None = None


CODE = Segment(
    limit=0xFFFFFFFF, selector=SELECTOR_CODE, type=TYPE_CODE, present=1, s=1, l=1, g=1
)  # fmt: skip
DATA = Segment(
    limit=0xFFFFFFFF, selector=SELECTOR_DATA, type=TYPE_DATA, present=1, s=1, db=1, g=1
)  # fmt: skip
TSS = Segment(type=TYPE_TSS, present=1)
UNUSABLE = Segment(unusable=1)


def descriptor(segment: Segment) -> int:
    """A segment as the 8 bytes of its descriptor (Intel SDM volume 3, figure 3-8)."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    return (
        (limit & 0xFFFF)
        | (segment.base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )


def gdt() -> bytes:
    """Null, code, data."""
    return struct.pack("<3Q", 0, descriptor(CODE), descriptor(DATA))


def tables(mem_bytes: int, code: list[tuple[int, int]] | None = None) -> list[tuple[int, bytes]]:
    """What the CPU reads in guest memory: (GPA, bytes)."""
    return [(layout.X86_GDT, gdt()), (layout.X86_PML4, page_tables(mem_bytes, code))]


def page_tables(mem_bytes: int, code: list[tuple[int, int]] | None = None) -> bytes:
    """The tables from layout.X86_PML4 on: all of guest memory, identity-mapped.

    Memory is mapped in large pages, but for the first 2 MiB: there the first 64 KiB are absent
    and what the tender wrote for the guest is read-only to it. `code` are the pages that can be
    executed, as (start, end); None: all of them.
    """
    link = PTE_PRESENT | PTE_WRITABLE
    pml4 = [layout.X86_PDPT | link]
    directories = range(layout.X86_PD, layout.X86_PT, layout.PAGE_SIZE)
    pdpt = [address | link for address in directories]
    places = range(layout.X86_PT, layout.TABLES_END, layout.PAGE_SIZE)
    whole, parts = layout.pages_of_code(code or [], len(places))
    data = link if code is None else link | PTE_NX
    large = _identity(0, mem_bytes // layout.LARGE_PAGE, layout.LARGE_PAGE, PTE_LARGE | data)
    for number in whole:
        large[number] = number * layout.LARGE_PAGE | PTE_LARGE | link
    pages = []
    for place, (number, of_code) in zip(places, parts.items(), strict=False):
        large[number] = place | link
        first = number * layout.LARGE_PAGE
        table = _identity(first, layout.LARGE_PAGE // layout.PAGE_SIZE, layout.PAGE_SIZE, data)
        for page in of_code:
            table[page] = first + page * layout.PAGE_SIZE | link
        pages += table
    absent, read_only = READ_ONLY_FROM // layout.PAGE_SIZE, layout.MIN_BASE // layout.PAGE_SIZE
    pages[:absent] = [0] * absent
    pages[absent:read_only] = [entry & ~PTE_WRITABLE for entry in pages[absent:read_only]]
    return b"".join((
        _entries(pml4, 1), _entries(pdpt, 1), _entries(large, len(directories)),
        _entries(pages, len(parts)),
    ))  # fmt: skip


def _identity(start: int, count: int, size: int, flags: int) -> list[int]:
    """Entries for `count` pages of `size` bytes from `start` on."""
    return list(range(start | flags, (start | flags) + count * size, size))


def _entries(values: list[int], tables: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values).ljust(tables * layout.PAGE_SIZE, b"\0")


def initial_state(entry: int, mem_bytes: int, *, nx: bool = False) -> State:
    """The registers of a guest that starts at `entry` with `mem_bytes` of memory.

    `nx`: its page tables say which pages can be executed.
    """
    registers = dict.fromkeys(REGISTERS, 0)
    registers.update(
        rip=entry,
        rsp=layout.stack_top(mem_bytes),
        rdi=layout.BOOT_INFO,
        rflags=RFLAGS_ALWAYS_1,
    )
    segments = dict.fromkeys(SEGMENTS, DATA) | {"cs": CODE, "tr": TSS, "ldt": UNUSABLE}
    control = dict.fromkeys(CONTROL, 0)
    control.update(
        cr0=CR0_PE | CR0_NE | CR0_WP | CR0_PG,
        cr3=layout.X86_PML4,
        cr4=CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT,
        efer=EFER_LME | EFER_LMA | (EFER_NXE if nx else 0),
    )
    return State(registers, segments, control, Table(layout.X86_GDT, len(gdt()) - 1), Table())


def with_trap(state: State, trap: dict[str, int]) -> State:
    """`state` as it was when the guest trapped; `trap` has the fields of struct hvt_x86_trap."""
    registers = {**state.registers, **{name: trap[name] for name in ("rip", "rflags", "rsp")}}
    segments = dict(state.segments)
    for name in ("cs", "ss"):
        segments[name] = replace(segments[name], selector=trap[name] & 0xFFFF)
    return replace(state, registers=registers, segments=segments)
