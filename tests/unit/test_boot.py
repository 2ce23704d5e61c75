"""What a guest finds when it wakes up, walked as a CPU would."""

from __future__ import annotations

import struct

import pytest

from tender.boot import aarch64, bootinfo, layout, x86_64
from tender.errors import ConfigError
from tender.image.manifest import Device, Manifest, encode

MIB = 1 << 20


# Page of code, gap, more code; a large page with both of its halves, and one that goes on into the
# next; 9 that are partly code, more than there are tables for.
CODES = (
    [(0x100000, 0x103000), (0x104000, 0x105000)],
    [(2 * MIB, 3 * MIB), (3 * MIB, 4 * MIB), (6 * MIB, 9 * MIB)],
    [(at * MIB, at * MIB + 4096) for at in range(2, 20, 2)],
)


def is_code(address: int, code: list[tuple[int, int]]) -> bool:
    return any(start <= address < end for start, end in code)


def walk(
    mem_bytes: int, address: int, code: list[tuple[int, int]] | None = None
) -> tuple[int, bool] | None:
    """Translate as the MMU does: physical address and writable, None when not present.

    With `code`: physical address and executable.
    """
    memory = bytes(layout.X86_PML4) + x86_64.page_tables(mem_bytes, code)
    table, writable, executable = layout.X86_PML4, True, True
    for shift in (39, 30, 21, 12):
        (entry,) = struct.unpack_from("<Q", memory, table + (address >> shift & 511) * 8)
        if not entry & x86_64.PTE_PRESENT:
            return None
        writable = writable and bool(entry & x86_64.PTE_WRITABLE)
        executable = executable and not entry & x86_64.PTE_NX
        table = entry & 0x000F_FFFF_FFFF_F000
        if shift == 12 or entry & x86_64.PTE_LARGE:
            rights = writable if code is None else executable
            return table | address & ((1 << shift) - 1), rights
    return None


@pytest.mark.parametrize("mem_mib", [2, 4, 512, 1024, 4096])
def test_all_memory_is_mapped_to_itself(mem_mib: int) -> None:
    end = mem_mib * MIB
    for address in (0x100000, 0x1FFFFF, end // 2 | 0x123, end - 1):
        assert walk(end, address) == (address, True)
    for address in (0, 0xFFFF):
        assert walk(end, address) is None
    for address in (0x10000, 0xFFFFF):
        assert walk(end, address) == (address, False)
    for address in (end, end + 5 * MIB, 1 << 32, 1 << 39):
        assert walk(end, address) is None


def test_tables_fill_their_places() -> None:
    assert len(x86_64.page_tables(2 * MIB)) == 0x9000 - layout.X86_PML4
    assert len(x86_64.page_tables(4096 * MIB)) == 0x9000 - layout.X86_PML4


@pytest.mark.parametrize("code", CODES[:2])
def test_what_can_be_executed(code: list[tuple[int, int]]) -> None:
    edges = {at + by for each in code for at in each for by in (-4096, 0)}
    for address in (*edges, 0x10000, 20 * MIB, 32 * MIB - 1):
        assert walk(32 * MIB, address, code) == (address, is_code(address, code)), hex(address)
        found = walk_aarch64(32 * MIB, address, code)
        assert found, hex(address)
        assert found[1][1] == is_code(address, code), hex(address)


def test_code_in_more_places_than_there_are_tables() -> None:
    found = {start: walk(32 * MIB, start + 4096, CODES[2]) for start, _ in CODES[2]}
    assert [each for each in found if found[each] == (each + 4096, True)] == [16 * MIB, 18 * MIB]
    assert all(walk(32 * MIB, start, CODES[2]) == (start, True) for start in found)
    for of in (x86_64, aarch64):
        ((gpa, data),) = of.tables(32 * MIB, CODES[2])[-1:]
        assert gpa + len(data) <= layout.TABLES_END == layout.BOOT_INFO


def test_gdt_is_what_the_segments_say() -> None:
    null, code, data = struct.unpack("<3Q", x86_64.gdt())
    assert null == 0
    assert code == 0x00AF99000000FFFF  # 64-bit execute-only code, accessed
    assert data == 0x00CF93000000FFFF  # 4 GiB read/write data, accessed


def test_registers_of_a_guest_that_starts() -> None:
    state = x86_64.initial_state(0x100020, 64 * MIB)
    assert state.registers["rip"] == 0x100020
    assert state.registers["rsp"] == 64 * MIB - 8
    assert state.registers["rdi"] == 0x10000
    assert state.registers["rflags"] == 2
    assert state.control["cr0"] == 0x80010021
    assert state.control["cr3"] == 0x2000
    assert state.control["cr4"] == 0x620
    assert state.control["efer"] == 0x500
    assert (state.segments["cs"].selector, state.segments["ds"].selector) == (8, 16)
    assert state.segments["ldt"].unusable == 1
    assert (state.gdt.base, state.gdt.limit) == (0x1000, 23)


# aarch64.

RW_EXECUTE, READ, DEVICE = (True, True, 0xFF), (False, False, 0xFF), (True, False, 0x04)


def walk_aarch64(
    mem_bytes: int, address: int, code: list[tuple[int, int]] | None = None
) -> tuple[int, tuple[bool, bool, int]] | None:
    """Physical address and (writable, executable, memory type), None when not mapped."""
    memory = bytes(layout.AARCH64_PGD) + aarch64.page_tables(mem_bytes, code)
    state = aarch64.initial_state(0x100000, mem_bytes)
    table = state.system["ttbr0_el1"]
    mair = state.system["mair_el1"].to_bytes(8, "little")
    for shift in (39, 30, 21, 12):
        (entry,) = struct.unpack_from("<Q", memory, table + (address >> shift & 511) * 8)
        if not entry & 1:
            return None
        table = entry & 0x0000_FFFF_FFFF_F000
        if shift == 12 or not entry & 2:
            assert entry & aarch64.ACCESSED
            assert bool(entry & 2) == (shift == 12)
            rights = not entry & aarch64.READ_ONLY, not entry & aarch64.PXN
            return table | address & ((1 << shift) - 1), (*rights, mair[entry >> 2 & 7])
    return None


@pytest.mark.parametrize("mem_mib", [2, 4, 512, 1024, 1026, 4096])
def test_aarch64_memory_and_device(mem_mib: int) -> None:
    end = mem_mib * MIB
    for address in (0x100000, 0x1FFFFF, end // 2 | 0x123, end - 1):
        assert walk_aarch64(end, address) == (address, RW_EXECUTE)
    for address in (0, 0xFFFF):
        assert walk_aarch64(end, address) is None
    for address in (0x10000, 0xFFFFF):
        assert walk_aarch64(end, address) == (address, READ)
    for address in (1 << 32, (1 << 32) + 0x40, (5 << 30) - 1):
        assert walk_aarch64(end, address) == (address, DEVICE)
    for address in (5 << 30, 1 << 39, *([end] if end < 1 << 32 else [])):
        assert walk_aarch64(end, address) is None
    assert len(aarch64.page_tables(end)) == 0x8000 - layout.AARCH64_PGD


def test_aarch64_registers_of_a_guest_that_starts() -> None:
    state = aarch64.initial_state(0x100020, 64 * MIB)
    assert state.registers["pc"] == 0x100020
    assert state.registers["sp_el1"] == 64 * MIB - 16
    assert state.registers["x0"] == 0x10000
    assert state.registers["pstate"] == 0x3C5
    assert state.system["ttbr0_el1"] == 0x1000
    assert state.system["sctlr_el1"] == 0x1005
    assert state.system["mair_el1"] == 0xBBFF440C0400
    assert state.system["cpacr_el1"] == 0x300000
    assert state.system["tcr_el1"] == 0x32B5183518


def test_aarch64_registers_after_a_trap() -> None:
    trap = {f"x{n}": n for n in range(31)} | {"sp": 31, "elr": 32, "spsr": 0x3C5, "esr": 34}
    state = aarch64.initial_state(0, 2 * MIB)
    registers = aarch64.with_trap(state, trap).registers
    assert [registers[f"x{n}"] for n in range(31)] == list(range(31))
    assert (registers["pc"], registers["pstate"]) == (32, 0x3C5)
    assert (registers["sp_el0"], registers["sp_el1"]) == (0, 31)
    assert aarch64.with_trap(state, trap | {"spsr": 0x3C4}).registers["sp_el0"] == 31


def test_boot_info() -> None:
    manifest = encode(Manifest((Device("a", 1, 1),)))
    data = bootinfo.build(bootinfo.BootInfo(64 * MIB, 0x200000, 2_500_000_000, b"a b", manifest))
    fields = struct.unpack_from("<5Q2IQ", data)
    cmdline = layout.BOOT_INFO + 56 + len(manifest)
    assert fields == (64 * MIB, 0x200000, 2_500_000_000, cmdline, layout.MANIFEST, 0, 0, 0)
    assert data[56:] == manifest + b"a b\0"


def test_the_command_line_has_a_length() -> None:
    assert bootinfo.join_cmdline(("a", "", "b c")) == b"a  b c"
    assert len(bootinfo.join_cmdline(("x" * 8191,))) == 8191
    with pytest.raises(ConfigError, match="8192 bytes, longer than the maximum 8191"):
        bootinfo.join_cmdline(("x" * 8192,))


def test_bytes_that_are_no_text_reach_the_guest() -> None:
    assert bootinfo.join_cmdline((b"\xff\xfe".decode("utf-8", "surrogateescape"),)) == b"\xff\xfe"


def test_everything_at_boot_fits_below_the_image() -> None:
    manifest = encode(Manifest(tuple(Device(f"d{n}", 1, n) for n in range(1, 64))))
    info = bootinfo.BootInfo(2 * MIB, 0x200000, 1, b"x" * 8191, manifest)
    assert layout.BOOT_INFO + len(bootinfo.build(info)) <= layout.MIN_BASE
