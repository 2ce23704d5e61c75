"""Every address that a guest finds something at when it wakes up: one table.

All are guest-physical addresses (GPAs), and identity-mapped. Source: the hvt target's x86_64
memory map, ABI version 2.
"""

from __future__ import annotations

from tender._abi import ffi, lib

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

BOOT_INFO = 0x10000  # boot info, then the manifest, then the command line
BOOT_INFO_SIZE = ffi.sizeof("struct hvt_boot_info")
MANIFEST = BOOT_INFO + BOOT_INFO_SIZE
CMDLINE_MAX = lib.HVT_CMDLINE_SIZE - 1  # bytes, without the NUL

MIN_BASE = lib.HVT_GUEST_MIN_BASE  # lowest load address


def stack_top(mem_bytes: int) -> int:
    """Where the stack pointer starts: (rsp + 8) is a multiple of 16, as after a call."""
    return mem_bytes - 8
