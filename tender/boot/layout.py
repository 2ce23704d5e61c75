"""Every address that a guest finds something at when it wakes up: one table.

All are guest-physical addresses (GPAs), and identity-mapped. Source: the hvt target's memory maps
for x86_64 and aarch64, ABI version 2.
"""

from __future__ import annotations

from tender._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MIB = 1 << 20
PAGE_SIZE = 4096
LARGE_PAGE = 2 * MIB

MEM_STEP = LARGE_PAGE  # guest memory is a multiple of a large page
MEM_MIN = 2 * MIB
MEM_MAX = 4096 * MIB
MEM_DEFAULT = 512 * MIB

X86_GDT = 0x1000
X86_PML4 = 0x2000
X86_PDPT = 0x3000
X86_PD = 0x4000  # four page directories, one per GiB
X86_PT = 0x8000  # page tables of 2 MiB each: of the first, and of those that are partly code

AARCH64_PGD = 0x1000  # level 0: one table
AARCH64_PUD = 0x2000  # level 1: entries of 1 GiB
AARCH64_PMD = 0x3000  # level 2: four tables, one per GiB
AARCH64_PTE = 0x7000  # level 3: tables of 2 MiB each, as above

TABLES_END = 0x10000

BOOT_INFO = 0x10000  # boot info, then the manifest, then the command line
BOOT_INFO_SIZE = ffi.sizeof("struct hvt_boot_info")
MANIFEST = BOOT_INFO + BOOT_INFO_SIZE
CMDLINE_MAX = lib.HVT_CMDLINE_SIZE - 1  # bytes, without the NUL

MMIO_BASE = lib.HVT_HYPERCALL_MMIO_BASE  # aarch64: where a store is a hypercall, not memory

MIN_BASE = lib.HVT_GUEST_MIN_BASE  # lowest load address


def pages_of_code(
    code: Iterable[tuple[int, int]], tables: int
) -> tuple[set[int], dict[int, set[int]]]:
    """Where code is, for page tables: the large pages that are code, and those that are partly.

    `code` are ranges of whole pages. A large page is named by its number; one that is partly code
    has a table of its own, and the numbers of its pages of code in it. The first one always has;
    where `tables` are not enough, the rest counts as code.
    """
    whole: set[int] = set()
    parts: dict[int, set[int]] = {0: set()}
    for start, end in code:
        for number in range(start // LARGE_PAGE, -(-end // LARGE_PAGE)):
            first = max(start - number * LARGE_PAGE, 0) // PAGE_SIZE
            last = min(end - number * LARGE_PAGE, LARGE_PAGE) // PAGE_SIZE
            if number and last - first == LARGE_PAGE // PAGE_SIZE:
                whole.add(number)
            elif number in parts or len(parts) < tables:
                parts.setdefault(number, set()).update(range(first, last))
            else:
                whole.add(number)
    return whole, parts


def stack_top(mem_bytes: int) -> int:
    """Where the stack pointer starts: (rsp + 8) is a multiple of 16, as after a call."""
    return mem_bytes - 8


def aarch64_stack_top(mem_bytes: int) -> int:
    """The same for aarch64, where the stack pointer is a multiple of 16 at any time."""
    return mem_bytes - 16
