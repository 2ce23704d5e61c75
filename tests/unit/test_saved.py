"""The state of a CPU as bytes: what comes back, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tender.boot import aarch64, x86_64
from tender.boot.x86_64 import DebugRegisters, Fpu, State, Table
from tender.config import VirtualTime
from tender.cpu import saved
from tender.dataclass import replace
from tender.errors import HostError, SnapshotError

MEM = 8 << 20
NON_CANONICAL = 1 << 47
Change = Callable[[State], State]


def full_state() -> State:
    """One in which no two registers are alike."""
    boot = x86_64.initial_state(0x100000, MEM)
    registers = {name: 0x1000 + index for index, name in enumerate(x86_64.REGISTERS)}
    segments = {**boot.segments, "fs": replace(x86_64.DATA, base=0x7000)}
    control = {**boot.control, "efer": 0xD00, "cr2": 0x123, "apic_base": 0}
    parts = {part: bytes([part]) * size for part, size in x86_64.EXTENDED.items() if part != 6}
    fpu = Fpu(
        *(0x27F, 0x3800, 0x81, 0x7FF, 0x1111, 0x2222),
        st=tuple(bytes([index]) * 10 for index in range(8)),
        xmm=tuple(bytes([0x80 + index]) * 16 for index in range(16)),
        mxcsr=0x1FA0,
        extended=parts,
    )
    msrs = {name: index + 1 for index, name in enumerate(x86_64.MSRS) if name != "tsc_aux"}
    msrs["pat"] = x86_64.PAT_AT_RESET
    debug = DebugRegisters((1, 2, 3, 4), 0xFFFF0FF1, 0x401)
    tables = Table(0x3000, 23), Table(0x4000, 511)
    return State(registers | {"rflags": 0x246}, segments, control, *tables, fpu, msrs, 0xE7, debug)


def test_what_is_saved_is_what_is_read() -> None:
    data = saved.encode(full_state())
    assert len(data) == saved.X86_SIZE
    assert saved.decode(data, is_aarch64=False) == full_state()
    boot = aarch64.initial_state(0x100000, MEM)
    other = replace(boot, vectors=tuple(range(32)), fpcr=1, fpsr=2)
    data = saved.encode(other)
    assert len(data) == saved.AARCH64_SIZE
    assert saved.decode(data, is_aarch64=True) == other


def test_registers_that_could_not_be_read_are_not_saved() -> None:
    with pytest.raises(HostError, match="registers can't be read"):
        saved.encode(replace(full_state(), fpu=None))


def register(name: str, value: int) -> Change:
    return lambda state: replace(state, registers={**state.registers, name: value})


def control(name: str, set_: int, clear: int = 0) -> Change:
    return lambda state: replace(
        state, control={**state.control, name: state.control[name] & ~clear | set_}
    )


def segment(name: str, **fields: int) -> Change:
    return lambda state: replace(
        state, segments={**state.segments, name: replace(state.segments[name], **fields)}
    )


def msr(name: str, value: int) -> Change:
    return lambda state: replace(state, msrs={**state.msrs, name: value})


REFUSED: dict[str, tuple[str, Change]] = {
    "rip": ("RIP", register("rip", NON_CANONICAL)),
    "rflags": ("RFLAGS", register("rflags", 1 << 40 | 2)),
    "virtual-8086": ("RFLAGS", register("rflags", 1 << 17 | 2)),
    "cr0": ("CR0", control("cr0", 1 << 32)),
    "no paging": ("CR0", control("cr0", 0, x86_64.CR0_PG)),
    "nw": ("CR0", control("cr0", 1 << 29)),
    "cr3": ("CR3", control("cr3", 1 << 60)),
    "cr4": ("CR4", control("cr4", 1 << 13)),
    "no pae": ("CR4", control("cr4", 0, x86_64.CR4_PAE)),
    "cr8": ("CR8", control("cr8", 16)),
    "efer": ("EFER: it is not in long mode", control("efer", 1 << 12)),
    "not in long mode": ("EFER: it is not in long mode", control("efer", 0, x86_64.EFER_LMA)),
    "ring 3": ("CS: it is not in ring 0", segment("cs", dpl=3)),
    "32-bit": ("CS", segment("cs", l=0, db=1)),
    "no code": ("CS", segment("cs", type=3)),
    "fs": ("FS", segment("fs", base=NON_CANONICAL)),
    "type": ("LDT", segment("ldt", type=16)),
    "gdt": ("GDTR", lambda state: replace(state, gdt=Table(NON_CANONICAL, 1))),
    "lstar": ("MSRs", msr("lstar", NON_CANONICAL)),
    "pat": ("PAT", msr("pat", 2)),
    "xcr0": ("XCR0", lambda state: replace(state, xcr0=5)),
    "dr0": ("DR0", lambda state: replace(state, debug=DebugRegisters((NON_CANONICAL, 0, 0, 0)))),
    "dr7": ("DR6, DR7", lambda state: replace(state, debug=DebugRegisters(dr7=1 << 32))),
    "mxcsr": ("MXCSR", lambda state: replace(state, fpu=Fpu(mxcsr=1 << 16))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_of_no_guest(name: str) -> None:
    what, change = REFUSED[name]
    with pytest.raises(SnapshotError, match=f"snapshot is damaged.*CPU state, {what}") as raised:
        saved.decode(saved.encode(change(full_state())), is_aarch64=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("pstate", [0, 0x3C9, 1 << 4 | 5, 1 << 40 | 5])
def test_an_aarch64_state_of_no_guest(pstate: int) -> None:
    boot = aarch64.initial_state(0x100000, MEM)
    state = replace(boot, registers={**boot.registers, "pstate": pstate})
    with pytest.raises(SnapshotError, match="PSTATE: it is not in EL1"):
        saved.decode(saved.encode(state), is_aarch64=True)


@pytest.mark.parametrize("size", [0, saved.X86_SIZE - 1, saved.X86_SIZE + 1, saved.AARCH64_SIZE])
def test_another_size(size: int) -> None:
    with pytest.raises(SnapshotError, match="its size"):
        saved.decode(bytes(size), is_aarch64=False)


@given(st.lists(st.tuples(st.integers(0, saved.X86_SIZE - 1), st.integers(0, 255)), max_size=8))
def test_bytes_that_somebody_has_changed(changes: list[tuple[int, int]]) -> None:
    """What is taken for a state is one, and a CPU in software runs or refuses it."""
    data = bytearray(saved.encode(replace(full_state(), fpu=Fpu(), xcr0=1)))
    for at, value in changes:
        data[at] = value
    try:
        state = saved.decode(bytes(data), is_aarch64=False)
    except SnapshotError:
        return
    assert saved.decode(saved.encode(state), is_aarch64=False) == state
    run(state)


def run(state: Any) -> None:
    from tests.unit.cpurig import CODE, CpuRig

    rig = CpuRig("nop\n" * 20 + "hlt", clock=VirtualTime(0, 1), instructions=100)
    try:
        rig.cpu.set_state(replace(state, registers={**state.registers, "rip": CODE}))
        for _ in range(10):
            rig.run()
    except HostError:
        pass
    finally:
        rig.close()
