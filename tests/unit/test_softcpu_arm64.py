"""The aarch64 CPU in software, without a machine around it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tender.boot import aarch64, layout
from tender.cleanup import Cleanup
from tender.clock import HostClock, VirtualClock
from tender.config import VirtualTime
from tender.cpu import soft
from tender.cpu.soft_aarch64 import Arm64Vcpu, syndrome_offset, vector
from tender.cpu.vcpu import Failure, Fault, Interrupted, Mmio
from tender.dataclass import replace
from tender.errors import HostError
from tender.memory import GuestMemory

MEM = 4 << 20
CODE = layout.MIN_BASE
AS = "aarch64-linux-gnu-as"

pytestmark = [
    pytest.mark.skipif(not soft.installed(), reason="the Unicorn emulator is not installed"),
    pytest.mark.skipif(not shutil.which(AS), reason="no assembler for aarch64"),
]
Make = Callable[..., Arm64Vcpu]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A CPU that is about to execute `text`."""
    cleanup = Cleanup()

    def make(text: str, clock: HostClock | None = None) -> Arm64Vcpu:
        (tmp_path / "code.s").write_text(text + "\n")
        for command in ([AS, "-o", "code.o", "code.s"], [AS[:-2] + "objcopy", "-O", "binary"]):
            files = [] if "-o" in command else ["code.o", "code.bin"]
            subprocess.run([*command, *files], cwd=tmp_path, check=True)
        code = (tmp_path / "code.bin").read_bytes()
        memory = GuestMemory(MEM)
        cleanup.callback(memory.close)
        memory.writable(CODE, len(code))[:] = code
        for gpa, table in aarch64.tables(MEM):
            memory.writable(gpa, len(table))[:] = table
        memory.protect(CODE, CODE + 4096, readable=True, writable=False)
        vcpu = Arm64Vcpu(memory, [(CODE, CODE + 4096)], clock or HostClock(), cleanup)
        vcpu.set_state(aarch64.initial_state(CODE, MEM))
        return vcpu

    yield make
    cleanup.close()


CALL = "mov x9, #0x100000000\nstr {}, [x9, #16]"


def test_a_store_behind_memory_is_an_exit(make: Make) -> None:
    vcpu = make(f"mov w1, #42\n{CALL.format('w1')}\nmov w1, #43\n{CALL.format('w1')}\nwfi")
    for value in (42, 43):
        exit = vcpu.run()
        assert isinstance(exit, Mmio)
        assert (exit.gpa, exit.size, exit.is_write, exit.value) == (0x100000010, 4, True, value)
    exit = vcpu.run()
    assert isinstance(exit, Failure)
    assert "HLT" in exit.what


def test_a_state_moves_to_another_cpu(make: Make) -> None:
    text = f"{CALL.format('wzr')}\nadd x1, x1, #1\nmrs x2, tpidr_el0\n{CALL.format('w1')}"
    first, second = make(text), make(text)
    numbers = {f"x{n}": n << 40 | n for n in range(31)} | {"sp_el0": 0x1234560}
    start = aarch64.initial_state(CODE, MEM)
    given = replace(
        start,
        registers={**start.registers, **numbers, "pstate": 0x600003C5},
        system={**start.system, "tpidr_el0": 0x77, "vbar_el1": CODE + 0x800},
        vectors=tuple(n << 120 | n for n in range(32)),
        fpcr=1 << 24,
        fpsr=1 << 27,
    )
    first.set_state(given)
    assert first.get_state() == given
    assert isinstance(first.run(), Mmio)
    moved = first.get_state()
    assert moved.registers["pc"] == CODE + 8
    second.set_state(moved)
    assert second.get_state() == moved
    exit = second.run()
    assert isinstance(exit, Mmio)
    assert exit.value == 2
    after = second.get_state()
    assert (after.registers["x2"], after.vectors, after.fpsr) == (0x77, given.vectors, 1 << 27)


def test_a_state_of_32_bit_code_is_refused(make: Make) -> None:
    start = aarch64.initial_state(CODE, MEM)
    with pytest.raises(HostError, match="64-bit code only"):
        make("nop").set_state(replace(start, registers={**start.registers, "pstate": 0x1D3}))


@pytest.mark.parametrize(
    ("text", "registers"),
    [
        ("ldr x0, [x30]", {"esr_el1": 0x96000007, "far_el1": 0x8000}),
        ("str x0, [x30, x30]", {"esr_el1": 0x9600004F, "far_el1": 0x10000}),
        ("br x30", {"esr_el1": 0x86000007, "far_el1": 0x8000}),
        ("hlt #1", {"esr_el1": 0x02000000, "far_el1": 0}),
        ("smc #1", {"esr_el1": 0x02000000, "far_el1": 0}),
        ("hvc #1", {"esr_el1": 0x02000000, "far_el1": 0}),
        ("msr s3_0_c15_c15_7, x0", {"esr_el1": 0x02000000, "far_el1": 0}),
    ],
)
def test_exceptions_reach_the_handler(make: Make, text: str, registers: dict[str, int]) -> None:
    handler = f".balign 2048\n1: .skip 512\nmov w1, #7\n{CALL.format('w1')}"
    vcpu = make(f"adr x0, 1f\nmsr vbar_el1, x0\nmov x30, #0x8000\n{text}\n{handler}")
    exit = vcpu.run()
    assert isinstance(exit, Mmio), exit
    assert exit.value == 7
    state = vcpu.get_state()
    assert {name: state.system[name] for name in registers} == registers
    assert state.system["elr_el1"] == (0x8000 if text == "br x30" else CODE + 12)
    assert (state.system["spsr_el1"], state.registers["pstate"]) == (0x3C5, 0x3C5)
    assert vcpu.instruction_pointer() == CODE + 0x800 + 512 + 8


def test_an_exception_on_the_other_stack(make: Make) -> None:
    handler = (
        f".balign 2048\n1: mov x1, sp\n{CALL.format('w1')}\nmsr spsel, #0\n{CALL.format('w1')}"
    )
    text = "adr x0, 1f\nmsr vbar_el1, x0\nmov x0, #0x3000\nmsr spsel, #0\nmov sp, x0\nbrk #0"
    vcpu = make(f"{text}\n{handler}")
    assert isinstance(vcpu.run(), Mmio)
    registers = vcpu.get_state().registers
    assert (registers["x1"], registers["sp_el0"], registers["sp_el1"]) == (
        MEM - 16, 0x3000, MEM - 16,
    )  # fmt: skip
    assert isinstance(vcpu.run(), Mmio)
    registers = vcpu.get_state().registers
    assert (registers["sp_el0"], registers["sp_el1"]) == (0x3000, MEM - 16)


def test_handlers_behind_the_end_of_all_addresses(make: Make) -> None:
    vcpu = make("mov x0, #-2048\nmsr vbar_el1, x0\nmsr spsel, #1\nbrk #0")
    exit = vcpu.run()
    assert isinstance(exit, Failure)
    assert "handler can't be executed" in exit.what
    assert vcpu.instruction_pointer() == (1 << 64) - 2048 + 512


@pytest.mark.parametrize("pstate", [0x3C0, 0x3C4, 0x3C5])
def test_a_handlers_address_wraps(make: Make, pstate: int) -> None:
    vcpu = make("brk #0")
    state = aarch64.initial_state(CODE, MEM)
    system = {**state.system, "vbar_el1": (1 << 64) - 1}
    registers = {**state.registers, "pstate": pstate}
    vcpu.set_state(replace(state, system=system, registers=registers))
    assert isinstance(vcpu.run(), Failure | Fault)


def test_where_handlers_are() -> None:
    assert [vector(pstate) for pstate in (0x3C0, 0x3C4, 0x3C5)] == [0x400, 0, 0x200]


def test_protections(make: Make) -> None:
    vcpu = make(
        "adr x0, 1f\nmsr vbar_el1, x0\nmov x0, #0x200000\nbr x0\n"
        ".balign 2048\n1: .skip 512\nmrs x1, esr_el1\nmrs x2, far_el1\nmrs x3, elr_el1\n"
        f"{CALL.format('wzr')}"
    )
    assert isinstance(vcpu.run(), Mmio)
    registers = vcpu.get_state().registers
    assert [registers[name] for name in ("x1", "x2", "x3")] == [0x8600000F, 0x200000, 0x200000]
    exit = make("mov x0, #0x200000\nbr x0").run()
    assert isinstance(exit, Failure)
    assert "handler can't be executed" in exit.what
    vcpu = make("adr x0, .\nstr x0, [x0]")
    exit = vcpu.run()
    assert isinstance(exit, Mmio)
    assert (exit.gpa, exit.size, exit.is_write) == (CODE, 8, True)
    assert vcpu.instruction_pointer() == CODE + 4


def test_the_counter_is_the_clocks(make: Make) -> None:
    clock = VirtualClock(VirtualTime(0, 1000))
    text = "mrs x30, cntvct_el0\nmrs x29, cntpct_el0\nmrs x0, cntfrq_el0\nmrs xzr, cntvct_el0"
    vcpu = make(f"{text}\nmrs x1, cntvct_el0\n{CALL.format('wzr')}", clock)
    vcpu.run()
    registers = vcpu.get_state().registers
    values = [registers[name] for name in ("x30", "x29", "x1", "x0")]
    assert values == [1000, 2000, 4000, 1_000_000_000]


def test_a_kick_ends_a_loop(make: Make) -> None:
    import threading

    vcpu = make("b .")
    done = threading.Event()

    def kick() -> None:
        while not done.wait(0.01):
            vcpu.kick()

    thread = threading.Thread(target=kick)
    thread.start()
    exit = vcpu.run()
    done.set()
    thread.join()
    assert isinstance(exit, Interrupted)


def test_the_experiment_gives_one_answer() -> None:
    soft.load()
    assert syndrome_offset() == syndrome_offset() > 0
