"""Every address that a guest finds something at when it wakes up: one table.

All are guest-physical addresses (GPAs), and identity-mapped. Source: the hvt target's memory maps
for x86_64 and aarch64, ABI version 2.
"""

from __future__ import annotations

from tender._native import ffi, lib

MIB = 1 << 20
PAGE_SIZE = 4096

MEM_STEP = 2 * MIB  # guest memory is a multiple of a large page
MEM_MIN = 2 * MIB
MEM_MAX = 4096 * MIB
MEM_DEFAULT = 512 * MIB

X86_GDT = 0x1000
X86_PML4 = 0x2000
X86_PDPT = 0x3000
X86_PD = 0x4000  # four page directories, one per GiB
X86_PT = 0x8000  # page table of the first 2 MiB

AARCH64_PGD = 0x1000  # level 0: one table
AARCH64_PUD = 0x2000  # level 1: entries of 1 GiB
AARCH64_PMD = 0x3000  # level 2: four tables, one per GiB
AARCH64_PTE = 0x7000  # level 3: the first 2 MiB

BOOT_INFO = 0x10000  # boot info, then the manifest, then the command line
BOOT_INFO_SIZE = ffi.sizeof("struct hvt_boot_info")
MANIFEST = BOOT_INFO + BOOT_INFO_SIZE
CMDLINE_MAX = lib.HVT_CMDLINE_SIZE - 1  # bytes, without the NUL

MMIO_BASE = lib.HVT_HYPERCALL_MMIO_BASE  # aarch64: where a store is a hypercall, not memory

MIN_BASE = lib.HVT_GUEST_MIN_BASE  # lowest load address


def stack_top(mem_bytes: int) -> int:
    """Where the stack pointer starts: (rsp + 8) is a multiple of 16, as after a call."""
    return mem_bytes - 8


def aarch64_stack_top(mem_bytes: int) -> int:
    """The same for aarch64, where the stack pointer is a multiple of 16 at any time."""
    return mem_bytes - 16
