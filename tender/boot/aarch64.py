"""How an aarch64 guest wakes up: registers and page tables.

The rule here: pure. Sources: the hvt target's boot state (ABI version 2); names and encodings from
the Arm Architecture Reference Manual for A-profile (DDI 0487), chapters D8 (translation) and D24
(system registers).
"""

from __future__ import annotations

import struct

from tender.boot import layout
from tender.dataclass import dataclass, replace

# Descriptors of translation tables (D8.3).
TABLE, BLOCK, PAGE = 3, 1, 3
ATTR_DEVICE_NGNRE, ATTR_NORMAL = 1, 4  # indices into MAIR_EL1, below
READ_ONLY, SHAREABLE, ACCESSED, PXN, UXN = 1 << 7, 3 << 8, 1 << 10, 1 << 53, 1 << 54
NORMAL = ATTR_NORMAL << 2 | SHAREABLE | ACCESSED | UXN
DEVICE = ATTR_DEVICE_NGNRE << 2 | SHAREABLE | ACCESSED | UXN | PXN

GIB = 1 << 30
MAPPED_FROM = 0x10000  # pages below it are not mapped: a null pointer traps

MAIR = int.from_bytes(bytes((0x00, 0x04, 0x0C, 0x44, 0xFF, 0xBB)), "little")
SCTLR_M, SCTLR_C, SCTLR_I = 1 << 0, 1 << 2, 1 << 12
CPACR_FPEN = 3 << 20
# Both halves: 40 bits of address, write-back inner shareable walks, pages of 4 KiB; 16-bit ASIDs,
# 40 bits of physical address, and the lower half ignores the top byte of an address.
_TCR_HALF = 64 - 40 | 1 << 8 | 1 << 10 | 3 << 12
TCR = _TCR_HALF | _TCR_HALF << 16 | 2 << 30 | 2 << 32 | 1 << 36 | 1 << 37
PSTATE_DAIF, PSTATE_MODE, PSTATE_EL1H = 0xF << 6, 0x1F, 5

GENERAL = tuple(f"x{n}" for n in range(31))
REGISTERS = (*GENERAL, "sp_el0", "sp_el1", "pc", "pstate")
# op0, op1, CRn, CRm, op2 of MRS and MSR.
SYSTEM = {
    "sctlr_el1": (3, 0, 1, 0, 0),
    "cpacr_el1": (3, 0, 1, 0, 2),
    "ttbr0_el1": (3, 0, 2, 0, 0),
    "ttbr1_el1": (3, 0, 2, 0, 1),
    "tcr_el1": (3, 0, 2, 0, 2),
    "spsr_el1": (3, 0, 4, 0, 0),
    "elr_el1": (3, 0, 4, 0, 1),
    "esr_el1": (3, 0, 5, 2, 0),
    "far_el1": (3, 0, 6, 0, 0),
    "mair_el1": (3, 0, 10, 2, 0),
    "vbar_el1": (3, 0, 12, 0, 0),
    "contextidr_el1": (3, 0, 13, 0, 1),
    "tpidr_el1": (3, 0, 13, 0, 4),
    "tpidr_el0": (3, 3, 13, 0, 2),
    "tpidrro_el0": (3, 3, 13, 0, 3),
}
VECTORS = 32  # registers of 128 bits


@dataclass
class State:
    """What an aarch64 CPU of a guest has in its registers."""

    registers: dict[str, int]  # by REGISTERS
    system: dict[str, int]  # by SYSTEM
    vectors: tuple[int, ...] = (0,) * VECTORS
    fpcr: int = 0
    fpsr: int = 0


def tables(mem_bytes: int, code: list[tuple[int, int]] | None = None) -> list[tuple[int, bytes]]:
    """What the CPU reads in guest memory: (GPA, bytes)."""
    return [(layout.AARCH64_PGD, page_tables(mem_bytes, code))]


def page_tables(mem_bytes: int, code: list[tuple[int, int]] | None = None) -> bytes:
    """The tables from layout.AARCH64_PGD on: all of guest memory, identity-mapped.

    Memory is mapped in blocks, but for the first 2 MiB: there the first 64 KiB are absent and what
    the tender wrote for the guest is read-only to it. Behind 4 GiB is the device that a hypercall
    is a store to. `code` are the pages that can be executed, as (start, end); None: all of them.
    """
    directories = range(layout.AARCH64_PMD, layout.AARCH64_PTE, layout.PAGE_SIZE)
    pgd = [layout.AARCH64_PUD | TABLE]
    pud = [address | TABLE for address in directories[: -(-mem_bytes // GIB)]]
    pud += [0] * (layout.MMIO_BASE // GIB - len(pud)) + [layout.MMIO_BASE | DEVICE | BLOCK]
    places = range(layout.AARCH64_PTE, layout.TABLES_END, layout.PAGE_SIZE)
    whole, parts = layout.pages_of_code([(0, mem_bytes)] if code is None else code, len(places))
    blocks = [
        number * layout.LARGE_PAGE | NORMAL | BLOCK | (0 if number in whole else PXN)
        for number in range(mem_bytes // layout.LARGE_PAGE)
    ]
    pages = []
    for place, (number, of_code) in zip(places, parts.items(), strict=False):
        blocks[number] = place | TABLE
        first = number * layout.LARGE_PAGE
        pages += [
            _page(first + page * layout.PAGE_SIZE, page in of_code)
            for page in range(layout.LARGE_PAGE // layout.PAGE_SIZE)
        ]
    return b"".join((
        _entries(pgd, 1), _entries(pud, 1), _entries(blocks, len(directories)),
        _entries(pages, len(parts)),
    ))  # fmt: skip


def _page(gpa: int, is_code: bool) -> int:
    if gpa < MAPPED_FROM:
        return 0
    if gpa < layout.MIN_BASE:
        return gpa | NORMAL | PAGE | READ_ONLY | PXN
    return gpa | NORMAL | PAGE | (0 if is_code else PXN)


def _entries(values: list[int], tables: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values).ljust(tables * layout.PAGE_SIZE, b"\0")


def initial_state(entry: int, mem_bytes: int, *, nx: bool = False) -> State:  # noqa: ARG001
    """The registers of a guest that starts at `entry` with `mem_bytes` of memory.

    `nx` is for x86_64: here page tables can always say what can be executed.
    """
    registers = dict.fromkeys(REGISTERS, 0)
    registers.update(
        x0=layout.BOOT_INFO,
        sp_el1=layout.aarch64_stack_top(mem_bytes),
        pc=entry,
        pstate=PSTATE_DAIF | PSTATE_EL1H,
    )
    system = dict.fromkeys(SYSTEM, 0)
    system.update(
        sctlr_el1=SCTLR_M | SCTLR_C | SCTLR_I,
        cpacr_el1=CPACR_FPEN,
        ttbr0_el1=layout.AARCH64_PGD,
        tcr_el1=TCR,
        mair_el1=MAIR,
    )
    return State(registers, system)


def stack_pointer(pstate: int) -> str:
    """Which register SP is (D1.2.2): that of EL1 in EL1h, else that of EL0."""
    return "sp_el1" if pstate & PSTATE_MODE == PSTATE_EL1H else "sp_el0"


def with_trap(state: State, trap: dict[str, int]) -> State:
    """`state` as it was when the guest trapped; `trap` has the fields of hvt_aarch64_trap."""
    registers = {**state.registers, **{name: trap[name] for name in GENERAL}}
    registers.update(pc=trap["elr"], pstate=trap["spsr"])
    registers[stack_pointer(trap["spsr"])] = trap["sp"]
    return replace(state, registers=registers)
