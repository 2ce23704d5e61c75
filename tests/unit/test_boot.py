"""What a guest finds when it wakes up, walked as a CPU would."""

from __future__ import annotations

import struct

import pytest

from tender.boot import bootinfo, layout, x86_64
from tender.errors import ConfigError
from tender.manifest import Device, Manifest, encode

MIB = 1 << 20


def walk(mem_bytes: int, address: int) -> tuple[int, bool] | None:
    """Translate as the MMU does: physical address and writable, None when not present."""
    memory = bytes(layout.X86_PML4) + x86_64.page_tables(mem_bytes)
    table, writable = layout.X86_PML4, True
    for shift in (39, 30, 21, 12):
        (entry,) = struct.unpack_from("<Q", memory, table + (address >> shift & 511) * 8)
        if not entry & x86_64.PTE_PRESENT:
            return None
        writable = writable and bool(entry & x86_64.PTE_WRITABLE)
        table = entry & 0x000F_FFFF_FFFF_F000
        if shift == 12 or entry & x86_64.PTE_LARGE:
            return table | address & ((1 << shift) - 1), writable
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
