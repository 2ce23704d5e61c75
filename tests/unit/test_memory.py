"""Guest memory can't be left, and its protections hold for the tender too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tender.errors import GuestFault, HostError
from tender.memory import GuestMemory, Layout

SIZE = 2 << 20
PUTS = Layout("hvt_puts")
ANY_U64 = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(SIZE - 64, SIZE + 64),
    st.integers((1 << 64) - 64, (1 << 64) - 1),
    st.integers(0, 64),
)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    value = GuestMemory(SIZE)
    value.protect(0x100000, 0x102000, readable=True, writable=False)
    value.protect(0x102000, 0x103000, readable=False, writable=False)
    yield value
    value.close()


@given(gpa=ANY_U64, size=ANY_U64)
def test_an_access_is_inside_or_a_guest_fault(memory: GuestMemory, gpa: int, size: int) -> None:
    for access in (memory.readable, memory.writable):
        try:
            view = access(gpa, size)
        except GuestFault as fault:
            assert "Invalid guest access" in str(fault)
            assert (fault.gpa, fault.size) == (gpa, size)
        else:
            assert gpa + size <= SIZE
            assert len(view) == size


@given(gpa=ANY_U64)
def test_a_struct_is_inside_or_a_guest_fault(memory: GuestMemory, gpa: int) -> None:
    try:
        block = memory.at(PUTS, gpa)
    except GuestFault:
        return
    assert gpa + PUTS.size <= SIZE
    block.len = 5
    assert memory.readable(gpa + 8, 8) == (5).to_bytes(8, "little")


def test_a_buffer_may_end_at_the_end(memory: GuestMemory) -> None:
    assert len(memory.writable(SIZE - 16, 16)) == 16
    assert len(memory.writable(SIZE, 0)) == 0
    memory.at(PUTS, SIZE - 16)
    with pytest.raises(GuestFault):
        memory.writable(SIZE - 16, 17)
    with pytest.raises(GuestFault):
        memory.at(PUTS, SIZE - 15)


@pytest.mark.parametrize(
    ("gpa", "size", "readable", "writable"),
    [
        (0xFFFF0, 16, True, True),
        (0xFFFF0, 17, True, False),
        (0x100000, 1, True, False),
        (0x101FFF, 1, True, False),
        (0x101FFF, 2, False, False),
        (0x102000, 0x1000, False, False),
        (0x102FFF, 1, False, False),
        (0x103000, 1, True, True),
        (0, SIZE, False, False),
    ],
)
def test_protected_pages(
    memory: GuestMemory, gpa: int, size: int, readable: bool, writable: bool
) -> None:
    for access, allowed in ((memory.readable, readable), (memory.writable, writable)):
        if allowed:
            access(gpa, size)
        else:
            with pytest.raises(GuestFault, match="Invalid guest access: protected"):
                access(gpa, size)


def test_structs_on_protected_pages(memory: GuestMemory) -> None:
    assert memory.at(PUTS, 0x100000, out=False).len == 0
    with pytest.raises(GuestFault):
        memory.at(PUTS, 0x100000)
    with pytest.raises(GuestFault):
        memory.at(PUTS, 0x102000, out=False)


def test_memory_is_zero_and_not_touched() -> None:
    large = GuestMemory(4 << 30)
    assert large.readable(0, 4096) == bytes(4096)
    assert large.readable((4 << 30) - 4096, 4096) == bytes(4096)
    large.close()


def test_memory_that_the_host_does_not_have() -> None:
    with pytest.raises(HostError, match="cannot reserve"):
        GuestMemory(1 << 62)


def test_a_view_that_somebody_keeps_stays_valid() -> None:
    value = GuestMemory(SIZE)
    view = value.readable(0, 16)
    value.close()
    assert view == bytes(16)


def test_huge_pages_are_asked_for_and_aligned() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no huge pages")
    value = GuestMemory(16 << 20, 2 << 20, huge=True)
    assert value.base % (2 << 20) == 0
    for gpa in range(0, 16 << 20, 4096):
        value.view[gpa] = 1
    assert huge_bytes(value.base) >= 8 << 20
    assert len(value.writable((16 << 20) - 1, 1)) == 1
    value.close()


def huge_bytes(address: int) -> int:
    """What of the mapping at an address the kernel holds in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = start <= address < end
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0
