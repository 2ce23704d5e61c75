"""The software CPU: what a guest sees of it, without KVM, an image or root."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("unicorn", reason="the emulator is not installed: pip install 'ptender[soft]'")

from tender.boot import layout, x86_64
from tender.boot.x86_64 import Fpu, State, Table
from tender.config import VirtualTime
from tender.cpu import soft_x86_64
from tender.cpu import x86_64 as cpu_x86_64
from tender.cpu.vcpu import Failure, Fault, Interrupted, IoIn, IoOut, Mmio
from tender.dataclass import replace
from tender.errors import HostError
from tender.memory import GuestMemory, regions
from tests.unit.cpurig import (
    CODE,
    CODE_END,
    DATA,
    GDT,
    HIDDEN,
    IDT,
    RODATA,
    SIZE,
    STACKS,
    TASK,
    CpuRig,
    assemble,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., CpuRig]

DE, BP, UD, DF, NP, GP, PF = 0, 3, 6, 8, 11, 13, 14


@pytest.fixture
def cpu() -> Iterator[Make]:
    rigs: list[CpuRig] = []

    def make(*words: Any, **options: Any) -> CpuRig:
        rigs.append(CpuRig(*words, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_the_emulators_numbers_are_those_of_its_package() -> None:
    from unicorn import x86_const

    aliases = {
        "idt": "IDTR", "gdt": "GDTR", "ldt": "LDTR", "fcw": "FPCW", "fsw": "FPSW",
        "last_ip": "FIP", "last_dp": "FDP", "last_opcode": "FOP",
    }  # fmt: skip
    for name, number in soft_x86_64.NUMBERS.items():
        assert number == getattr(x86_const, "UC_X86_REG_" + aliases.get(name, name.upper())), name
    for name in ("IN", "OUT", "CPUID", "RDTSC", "RDTSCP", "SYSCALL", "SYSENTER"):
        ours = getattr(soft_x86_64, f"INS_{name}")
        assert ours == getattr(x86_const, f"UC_X86_INS_{name}"), name


# Exits.


def test_out_and_in_are_exits(cpu: Make) -> None:
    rig = cpu(
        """
        mov $0x502, %edx
        mov $0x1234, %eax
        out %eax, %dx
        outb %al, $0x40
        outw %ax, %dx
        in %dx, %eax
        """
    )
    seen = [rig.run() for _ in range(4)]
    assert [(e.port, e.size, e.value) for e in seen[:3] if isinstance(e, IoOut)] == [
        (0x502, 4, 0x1234),
        (0x40, 1, 0x34),
        (0x502, 2, 0x1234),
    ]
    assert seen[3] == IoIn(0x502, 4)


def test_the_guest_goes_on_after_an_answer(cpu: Make) -> None:
    """What the tender writes is there for the very next instruction."""
    rig = cpu(
        f"mov $0x501, %edx\nmov ${DATA}, %eax\nout %eax, %dx\nmov ({DATA}), %eax\nout %eax, %dx"
    )
    assert rig.out() == (0x501, DATA)
    rig.put(DATA, b"\x07\0\0\0")
    assert rig.out() == (0x501, 7)


def test_hlt_is_a_failure_in_the_words_of_kvm(cpu: Make) -> None:
    exit = cpu("hlt").run()
    assert isinstance(exit, Failure)
    assert "(HLT)" in exit.what


def test_a_stop_ends_an_endless_loop(cpu: Make) -> None:
    rig = cpu("1: jmp 1b")
    ended: list[float] = []
    done = threading.Event()

    def kick() -> None:
        time.sleep(0.05)
        ended.append(time.monotonic())
        while not done.wait(0.001):
            rig.cpu.kick()

    thread = threading.Thread(target=kick)
    thread.start()
    assert rig.run() == Interrupted()
    done.set()
    thread.join()
    assert rig.cpu.instruction_pointer() == CODE


def test_a_stopped_guest_can_go_on(cpu: Make) -> None:
    rig = cpu("mov $0x501, %edx\nout %eax, %dx\nmov $5, %eax\nout %eax, %dx")
    rig.out()
    rig.cpu.kick()
    assert rig.run() == Interrupted()
    while isinstance(exit := rig.run(), Interrupted):
        pass
    assert isinstance(exit, IoOut)
    assert exit.value == 5


# Memory.


@pytest.mark.parametrize(
    "text",
    [
        "movb $1, {to}",
        "lock incl {to}",
        "xchg %eax, {to}",
        "lock cmpxchg16b {to}",
        "movaps %xmm0, {to}",
        "fxsave {to}",
        "mov ${to}, %edi\nmov $100, %ecx\nrep stosb",
        "mov ${to} + 256, %esp\npush %rax",
        "mov ${to} + 256, %esp\ncall .",
    ],
)
def test_read_only_pages_stay_so(cpu: Make, text: str) -> None:
    rig = cpu(text.format(to=f"{RODATA:#x}"))
    exit = rig.run()
    assert isinstance(exit, Mmio), exit
    assert exit.is_write
    assert exit.gpa & ~0xFFF == RODATA
    assert bytes(rig.memory.view[RODATA : RODATA + 4096]) == bytes(4096)


def test_hidden_pages_cannot_be_read(cpu: Make) -> None:
    exit = cpu("mov HIDDEN, %eax").run()
    assert isinstance(exit, Mmio)
    assert (exit.gpa, exit.is_write) == (HIDDEN, False)


@pytest.mark.parametrize("target", [DATA, RODATA, SIZE - 4096])
def test_only_code_is_executed(cpu: Make, target: int) -> None:
    text = f"mov ${target}, %eax\njmp *%rax"
    rig = cpu(text, handlers=True)
    rig.put(DATA, b"\xf4")
    vector, frame = rig.trap()
    assert (vector, frame[:2]) == (PF, [0x11, target])
    assert rig.cpu.get_state().control["cr2"] == target
    rig = cpu(text)
    exit = rig.run()
    assert isinstance(exit, Failure)
    assert "triple fault" in exit.what
    assert rig.cpu.instruction_pointer() == target


def test_code_that_runs_into_data(cpu: Make) -> None:
    rig = cpu(
        f"mov ${CODE_END - 1}, %eax\njmp *%rax\n.org {CODE_END - CODE - 1}\n.byte 0xb8",
        handlers=True,
    )
    vector, frame = rig.trap()
    assert (vector, frame[:2]) == (PF, [0x11, CODE_END - 1])


def test_memory_that_the_guest_maps_and_is_not_there(cpu: Make) -> None:
    rig = cpu("mov 0x300000, %eax")
    entry = 0x80000000 | 0x83  # a page for 2 MiB, far beyond the memory
    rig.put(layout.X86_PD + 8, struct.pack("<Q", entry))
    exit = rig.run()
    assert isinstance(exit, Mmio)
    assert (exit.gpa, exit.is_write) == (0x80100000, False)


@pytest.mark.parametrize("table", [CODE, RODATA, HIDDEN, SIZE, 1 << 40, 0xFFFFFFFFFF000])
def test_page_tables_in_strange_places(cpu: Make, table: int) -> None:
    """Whatever the guest says that its tables are: it ends, and the tender does not."""
    rig = cpu(f"mov ${table}, %rax\nmov %rax, %cr3\nmov 0x123456, %eax\nhlt")
    exit = rig.run()
    assert isinstance(exit, (Failure, Fault, Mmio))


def test_tables_that_are_read_only_are_not_written(cpu: Make) -> None:
    """A CPU notes in its tables that a page was used: not where the guest may not write."""
    rig = cpu(
        """
        mov $RODATA, %eax
        mov %rax, %cr3
        movl $1, DATA
        mov $0x500, %edx
        out %eax, %dx
        """,
        rodata=struct.pack("<Q", layout.X86_PDPT | 3),  # a PML4 with one entry, not used yet
    )
    assert isinstance(rig.run(), (IoOut, Mmio, Failure))
    assert rig.u64(RODATA) == layout.X86_PDPT | 3


# Exceptions.


def test_exceptions_have_frames_as_the_manual_says(cpu: Make) -> None:
    rig = cpu("mov $0x1000000, %eax\n1: movl $1, (%rax)\nnop", handlers=True)
    vector, frame = rig.trap()
    assert vector == PF
    error_code, rip, cs, rflags, rsp, ss = frame
    assert (error_code, rip, cs, rsp, ss) == (2, CODE + 5, 8, SIZE - 8, 0x10)
    assert rflags & 0x10002 == 0x10002  # RF: the instruction would be done again
    state = rig.cpu.get_state()
    assert state.control["cr2"] == 0x1000000
    assert STACKS[0] - 200 < state.registers["rsp"] < STACKS[0]


@pytest.mark.parametrize(
    ("text", "vector", "error_code"),
    [
        ("xor %ecx, %ecx\ndiv %ecx", DE, None),
        ("ud2", UD, None),
        (".byte 0x06", UD, None),
        ("lock; nop", UD, None),
        ("mov $0x38, %eax\nmov %eax, %ds", GP, 0x38),
        ("mov $0x8000000000000000, %rax\nmov (%rax), %eax", GP, 0),
        ("mov 0x8, %eax", PF, 0),
        ("mov %eax, 0x8", PF, 2),
        ("mov %eax, 0x20000", PF, 3),
        ("mov $0x8, %eax\njmp *%rax", PF, 0),
        ("mov $0xdead, %ecx\nrdmsr", GP, 0),
        ("mov $0xdead, %ecx\nwrmsr", GP, 0),
        ("mov $0x1b, %ecx\nrdmsr", GP, 0),
        ("mov $0x1a0, %ecx\nrdmsr", GP, 0),
        ("mov $0x1a0, %ecx\nwrmsr", GP, 0),
        ("mov $0xc0000100, %ecx\nmov $0x40000000, %edx\nwrmsr", GP, 0),
        (".byte 0x48\nrdmsr", GP, 0),
    ],
)
def test_faults(cpu: Make, text: str, vector: int, error_code: int | None) -> None:
    rig = cpu(text, handlers=True)
    seen, frame = rig.trap()
    assert seen == vector
    if error_code is not None:
        assert frame.pop(0) == error_code
    assert frame[1] == 8


@pytest.mark.parametrize(("text", "vector", "length"), [("int3", BP, 1), ("int $13", GP, 2)])
def test_traps_go_on_behind_the_instruction(cpu: Make, text: str, vector: int, length: int) -> None:
    rig = cpu(text, handlers=True)
    seen, frame = rig.trap()
    assert seen == vector
    assert frame[:2] == [CODE + length, 8]  # no error code, even for the number of one that has it
    assert not frame[2] & 0x10000


def test_a_handler_may_return_again_and_again(cpu: Make) -> None:
    """The exceptions of a guest that handles them have nothing to do with one another."""
    rig = cpu("1: mov 0x8, %eax\nmov %eax, 0x20000\ndiv %ecx\njmp 1b", handlers=True)
    expected = [(PF, 0, CODE), (PF, 3, CODE + 7), (DE, None, CODE + 14)]
    for vector, error_code, rip in expected * 10:
        seen, frame = rig.trap()
        assert seen == vector
        at = rig.register("rsp") + 16  # behind what the handler has pushed
        if error_code is not None:
            assert frame.pop(0) == error_code
            at += 8
        assert frame[0] == rip
        rig.put(at, struct.pack("<Q", rip + (2 if vector == DE else 7)))


def test_breakpoints_one_after_the_other(cpu: Make) -> None:
    rig = cpu("int3\n" * 50 + "mov $0x777, %edx\nout %eax, %dx", handlers=True)
    for count in range(50):
        assert rig.trap() == (BP, rig_frame(rig, CODE + count + 1))
    assert rig.out()[0] == 0x777


def rig_frame(rig: CpuRig, rip: int) -> list[int]:
    top = STACKS[0] - 40
    frame = [rig.u64(top + 8 * index) for index in range(6)]
    assert frame[0] == rip
    return frame


def test_a_handler_that_cannot_be_called(cpu: Make) -> None:
    rig = cpu("ud2", handlers=True)
    rig.put_gate(UD, 0, kind=0)  # no gate: #GP, with the gate's number
    vector, frame = rig.trap()
    assert (vector, frame[0]) == (GP, UD << 3 | 3)
    rig = cpu("ud2", handlers=True)
    rig.put_gate(UD, CODE, kind=0x0E)  # not present
    assert rig.trap()[0] == NP
    rig = cpu("ud2", handlers=True)
    rig.put_gate(UD, CODE, selector=0x10)  # data
    vector, frame = rig.trap()
    assert (vector, frame[0]) == (GP, 0x11)


def test_a_handler_that_cannot_be_executed(cpu: Make) -> None:
    rig = cpu("ud2", handlers=True)
    for vector in (UD, PF):
        rig.put_gate(vector, RODATA)
    exit = rig.run()
    assert isinstance(exit, Failure)
    assert exit.what == "software CPU: the exception's handler can't be executed"


def test_a_double_fault_has_its_handler(cpu: Make) -> None:
    rig = cpu("mov 0x8, %eax", handlers=True)
    rig.put_gate(PF, CODE, ist=3)
    rig.put(TASK + 0x24 + 16, struct.pack("<Q", 0x9000))  # IST 3: there is no page
    vector, frame = rig.trap()
    assert (vector, frame[0]) == (DF, 0)
    assert STACKS[1] - 200 < rig.register("rsp") < STACKS[1]


@pytest.mark.parametrize("limit", [0, 16 * 8 - 1])
def test_a_triple_fault_ends_the_guest(cpu: Make, limit: int) -> None:
    rig = cpu("mov 0x8, %eax", handlers=True)
    state = rig.state
    rig.cpu.set_state(
        State(state.registers, state.segments, state.control, state.gdt, Table(IDT, limit))
    )
    exit = rig.run()
    assert isinstance(exit, Failure)
    assert "(triple fault)" in exit.what


TOP = 1 << 64


@pytest.mark.parametrize("base", [TOP - 1, TOP - UD * 16, TOP - UD * 16 - 8, 1 << 47])
@pytest.mark.parametrize("table", ["idt", "gdt", "tr"])
def test_tables_at_the_end_of_all_addresses(cpu: Make, table: str, base: int) -> None:
    """No page is there: each exception raises the next one, up to the third."""
    rig = cpu("ud2", handlers=True)
    if table == "tr":
        task = replace(rig.state.segments["tr"], base=base)
        rig.cpu.set_state(replace(rig.state, segments={**rig.state.segments, "tr": task}))
    else:
        rig.cpu.set_state(replace(rig.state, **{table: Table(base, 0xFFFF)}))
    exit = rig.run()
    assert isinstance(exit, Failure)
    assert "(triple fault)" in exit.what


@pytest.mark.parametrize("stack", [0, 8, 1 << 47, TOP - 8, TOP - 1])
def test_a_frame_at_the_end_of_all_addresses(cpu: Make, stack: int) -> None:
    rig = cpu("ud2", handlers=True)
    for vector in range(32):
        rig.put_gate(vector, CODE, ist=0)
    registers = {**rig.state.registers, "rsp": stack}
    rig.cpu.set_state(replace(rig.state, registers=registers))
    exit = rig.run()
    assert isinstance(exit, Failure)
    assert "(triple fault)" in exit.what


def map_last_page(rig: CpuRig) -> None:
    """The code's first page as the last one of all addresses, in tables of their own."""
    tables = [layout.X86_PML4, DATA, DATA + 0x1000, DATA + 0x2000]
    for table, entry in zip(tables, [*tables[1:], CODE], strict=True):
        rig.put(table + 511 * 8, struct.pack("<Q", entry | 3))


@pytest.mark.parametrize("text", ["ud2", "out %eax, %dx", "wrmsr", "rdrand %eax"])
def test_the_last_instruction_of_all_addresses(cpu: Make, text: str) -> None:
    code = f".skip 4096 - (2f - 1f)\n1: {text}\n2:"
    rig = cpu(code, handlers=True)
    map_last_page(rig)
    start = TOP - len(assemble(text))
    rig.cpu.set_state(replace(rig.state, registers={**rig.state.registers, "rip": start}))
    if text == "ud2":
        assert rig.trap()[1][0] == start
    else:
        rig.run()
    assert 0 <= rig.cpu.get_state().registers["rip"] < TOP


def test_a_stack_that_is_no_memory(cpu: Make) -> None:
    """The guest's tables let its handler's frame be written, but the tender does not."""
    rig = cpu("ud2", handlers=True)
    rig.put(TASK + 0x24, struct.pack("<Q", RODATA + 64))
    assert rig.run() == Fault()


def test_exceptions_outside_ring_0_are_beyond_it(cpu: Make) -> None:
    """A guest that leaves ring 0 is none of Solo5's: it ends, in words."""
    rig = cpu("push $0x1b\npush $0\npush $2\npush $0x23\npush $1f\niretq\n1: ud2", handlers=True)
    user_code, user_data = 0x00AFFB000000FFFF, 0x00CFF3000000FFFF
    rig.put(GDT + 0x18, struct.pack("<2Q", user_data, user_code))
    rig.cpu.set_state(replace(rig.state, gdt=Table(GDT, 0x27)))
    for table in (layout.X86_PML4, layout.X86_PDPT, layout.X86_PD):
        rig.put(table, struct.pack("<Q", rig.u64(table) | 4))  # the user's, too
    for at in range(layout.X86_PT, layout.X86_PT + 4096, 8):
        rig.put(at, struct.pack("<Q", rig.u64(at) | 4))
    exit = rig.run()
    assert isinstance(exit, Failure)
    assert "ring 0 only" in exit.what


def test_an_instruction_beyond_the_emulator_ends_the_guest(cpu: Make) -> None:
    for text in (
        "vaddps %ymm0, %ymm0, %ymm0",
        "vaddps %zmm0, %zmm0, %zmm0",
        "vaddps %xmm1, %xmm2, %xmm3",  # the emulator would do an SSE instruction instead
        "vmovdqu %fs:8(%esp), %xmm1",
        "vaddsd %xmm10, %xmm11, %xmm12",
        "vzeroupper",
        "syscall",
    ):
        rig = cpu(text, handlers=True)
        exit = rig.run()
        assert isinstance(exit, Failure)
        assert "can't do this instruction" in exit.what
        assert rig.cpu.instruction_pointer() == CODE


def test_what_only_looks_like_avx_is_done(cpu: Make) -> None:
    rig = cpu(
        """
        mov $0xc5c5c5c5, %eax
        jmp 1f
        .byte 0xc5, 0xc5
    1:  add $0xc441c4c5, %eax
        andn %eax, %eax, %ebx
        mov $3, %ecx
    2:  add $0x10c5f8c5, %eax
        dec %ecx
        jnz 2b
        mov $0x500, %edx
        out %eax, %dx
        """
    )
    assert rig.out() == (0x500, (0xC5C5C5C5 + 0xC441C4C5 + 3 * 0x10C5F8C5) % (1 << 32))


# Registers and instructions.


def test_fs_base_and_its_msr(cpu: Make) -> None:
    rig = cpu(
        f"""
        mov $0xc0000100, %ecx
        mov ${DATA}, %eax
        xor %edx, %edx
        wrmsr
        mov %fs:8, %eax
        mov $0x500, %edx
        out %eax, %dx
        mov $0xc0000100, %ecx
        rdmsr
        mov $0x501, %edx
        out %eax, %dx
        """,
        handlers=True,
    )
    rig.put(DATA + 8, b"\x78\x56\x34\x12")
    assert rig.out() == (0x500, 0x12345678)
    assert rig.out() == (0x501, DATA)
    assert rig.cpu.get_state().segments["fs"].base == DATA


def test_cpuid_promises_what_the_emulator_does() -> None:
    _, _, ecx, edx = soft_x86_64.leaf_values(1, 0)
    for bit in (12, 26, 27, 28, 29):  # FMA, XSAVE, OSXSAVE, AVX, F16C
        assert not ecx >> bit & 1
    for bit in (9, 11, 12):  # APIC, SEP, MTRR
        assert not edx >> bit & 1
    for bit in (0, 25, 26):  # x87, SSE, SSE2
        assert edx >> bit & 1
    assert ecx >> 30 & 1
    ebx = soft_x86_64.leaf_values(7, 0)[1]
    assert ebx >> 18 & 1  # RDSEED
    assert ebx & (1 << 5 | 1 << 16) == 0  # AVX2, AVX-512
    assert soft_x86_64.leaf_values(0x1234, 0) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("feature", "text"),
    [
        ("sse3", "haddps %xmm0, %xmm0"),
        ("pclmul", "pclmulqdq $0, %xmm0, %xmm0"),
        ("ssse3", "pabsb %xmm0, %xmm0"),
        ("cx16", "lock cmpxchg16b DATA"),
        ("sse4.1", "ptest %xmm0, %xmm0"),
        ("sse4.2", "crc32 %eax, %eax"),
        ("movbe", "movbe DATA, %eax"),
        ("popcnt", "popcnt %eax, %eax"),
        ("aes", "aesenc %xmm0, %xmm0"),
        ("rdrand", "rdrand %eax"),
        ("rdseed", "rdseed %eax"),
        ("bmi1", "andn %eax, %eax, %eax"),
        ("bmi2", "shlx %eax, %eax, %eax"),
        ("lzcnt", "lzcnt %eax, %eax"),
        ("rdtscp", "rdtscp"),
        ("mmx", "paddb %mm0, %mm0"),
        ("x87", "fld1\nfsin\nfstp %st(0)"),
    ],
)
def test_what_cpuid_promises_can_be_done(cpu: Make, feature: str, text: str) -> None:
    rig = cpu(f"{text}\nmov $0x500, %edx\nout %eax, %dx", handlers=True)
    assert rig.out()[0] == 0x500, feature


def test_cpuid_answers_the_guest(cpu: Make) -> None:
    rig = cpu("mov $0x40000000, %eax\ncpuid\nmov %ebx, %eax\nmov $0x500, %edx\nout %eax, %dx")
    assert rig.out()[1].to_bytes(4, "little") == b"pten"


def test_the_counter_follows_the_frequency(cpu: Make) -> None:
    read = "rdtsc\nshl $32, %rdx\nor %rdx, %rax\nmov %rax, DATA\nmov $0x500, %edx\nout %eax, %dx\n"
    rig = cpu(read * 2)
    before = time.monotonic_ns()
    rig.out()
    first = rig.u64(DATA)
    time.sleep(0.02)
    rig.out()
    passed = rig.u64(DATA) - first
    assert rig.cpu.cpu_cycle_freq == 10**9
    assert 20_000_000 <= passed <= time.monotonic_ns() - before


@pytest.mark.parametrize("before", ["", "jmp 1f\n1: ", "call 1f\n1: ", "int3\n", "ud2\n"])
@pytest.mark.parametrize("prefix", ["", ".byte 0x66\n", ".byte 0x2e, 0x48\n"])
def test_msrs_are_the_guests_wherever_a_block_of_code_starts(
    cpu: Make, before: str, prefix: str
) -> None:
    """#GP for an MSR that the guest has not, also behind a prefix that was jumped over before."""
    start = len(assemble(before + "mov $0xdead, %ecx\n"))
    rig = cpu(f"{before}mov $0xdead, %ecx\n{prefix}rdmsr", handlers=True)
    if before in ("int3\n", "ud2\n"):
        rig.trap()
        if before == "ud2\n":
            rig.put(rig.register("rsp") + 16, struct.pack("<Q", CODE + 2))
    vector, frame = rig.trap()
    assert (vector, frame[1]) == (GP, CODE + start)


def test_a_prefix_that_was_jumped_over_before(cpu: Make) -> None:
    rig = cpu(
        "mov $0x10, %ecx\njmp 2f\n1: .byte 0x66\n2: rdmsr\nmov $0xdead, %ecx\njmp 1b", handlers=True
    )
    vector, frame = rig.trap()
    assert (vector, frame[1]) == (GP, CODE + 7)


def test_instructions_in_code_that_is_mapped_elsewhere(cpu: Make) -> None:
    text = "rdrand %eax\nmov $0xdead, %ecx\nrdmsr"
    rig = cpu(text, handlers=True)
    map_last_page(rig)
    rip = TOP - 4096
    rig.cpu.set_state(replace(rig.state, registers={**rig.state.registers, "rip": rip}))
    vector, frame = rig.trap()
    assert (vector, frame[1]) == (GP, rip + 8)


def test_instructions_at_address_zero(cpu: Make) -> None:
    rig = cpu(
        "rdrand %eax\nmov $0xdead, %ecx\nxor %eax, %eax\njmp *%rax\n.org 0x1000\nrdmsr",
        handlers=True,
    )
    rig.put(layout.X86_PT, struct.pack("<Q", CODE + 0x1000 | 1))
    vector, frame = rig.trap()
    assert (vector, frame[1]) == (GP, 0)


# The state, as a value.


def full_state() -> State:
    state = x86_64.initial_state(CODE, SIZE)
    registers = {name: 0x0808080808080808 * index for index, name in enumerate(x86_64.REGISTERS)}
    registers |= {"rip": CODE, "rsp": SIZE - 64, "rflags": 0x246}
    fpu = Fpu(
        fcw=0x27F,
        fsw=0x3800,
        ftwx=0x81,
        last_opcode=0x123,
        last_ip=CODE,
        last_dp=DATA,
        st=tuple(bytes([index]) * 10 for index in range(8)),
        xmm=tuple(bytes([index]) * 16 for index in range(16)),
        mxcsr=0x1F90,
    )
    segments = dict(state.segments)
    segments["fs"] = x86_64.Segment(**{**segments["fs"].__dict__, "base": 0x7000})
    msrs = {"star": 0x10, "lstar": CODE, "kernel_gs_base": 0x8000, "tsc_aux": 3}
    return State(registers, segments, state.control, state.gdt, Table(IDT, 0x1FF), fpu, msrs)


def test_what_is_set_is_what_is_got(cpu: Make) -> None:
    state = full_state()
    rig = cpu("hlt")
    rig.cpu.set_state(state)
    got = rig.cpu.get_state()
    assert got.registers == state.registers
    assert (got.fpu, got.gdt, got.idt) == (state.fpu, state.gdt, state.idt)
    assert got.segments["fs"].base == 0x7000
    assert {name: got.segments[name].selector for name in ("cs", "ds", "es", "ss")} == {
        "cs": 8,
        "ds": 16,
        "es": 16,
        "ss": 16,
    }
    assert got.segments["tr"] == state.segments["tr"]
    assert got.segments["ldt"].unusable
    assert got.control["cr4"] == state.control["cr4"]
    assert {name: got.msrs[name] for name in state.msrs} == state.msrs


def test_a_guest_moves_in_the_middle_of_its_work(cpu: Make) -> None:
    text = """
        mov $3, %ebx
        cvtsi2sd %ebx, %xmm3
        fld1
        mov $0x500, %edx
        out %eax, %dx
        addsd %xmm3, %xmm3
        cvtsd2si %xmm3, %eax
        out %eax, %dx
        fadd %st(0), %st(0)
        fistpl DATA
        mov DATA, %eax
        out %eax, %dx
        """
    first, second = cpu(text), cpu(text)
    first.out()
    second.cpu.set_state(first.cpu.get_state())
    assert [second.out()[1], second.out()[1]] == [6, 2]
    first.cpu.set_state(first.cpu.get_state())  # the same CPU, in the middle of an instruction
    assert [first.out()[1], first.out()[1]] == [6, 2]


def test_a_state_that_it_cannot_be_in(cpu: Make) -> None:
    rig = cpu("hlt")
    state = full_state()
    user = x86_64.Segment(**{**state.segments["cs"].__dict__, "dpl": 3})
    with pytest.raises(HostError, match="ring 0 only"):
        rig.cpu.set_state(replace(state, segments={**state.segments, "cs": user}))


# Virtual time, and a limit.


def test_virtual_time_is_what_the_guest_makes_of_it(cpu: Make) -> None:
    read = "rdtsc\nmov %eax, %ebx\nrdtsc\nsub %ebx, %eax\nmov $0x500, %edx\nout %eax, %dx\n"
    rig = cpu(read + "rdrand %rax\n" + read + "rdtscp\n", clock=VirtualTime(5 * 10**9, 250))
    assert rig.out() == (0x500, 250)
    assert rig.clock.wall_ns() == 5 * 10**9 + 750
    rig.clock.advance(10**9)
    assert rig.clock.wall_ns() == 6 * 10**9 + 1000
    assert rig.out() == (0x500, 250)


RANDOM = ("rax", "rbx", "r9", "r15d", "esp", "cx", "r8w", "sp")


def random_numbers(rig: CpuRig) -> list[int]:
    """What RDRAND and RDSEED give, once each, of 64, 32 and 16 bits."""
    found = []
    while rig.out()[0] == 0x501:
        found.append(rig.u64(DATA))
        assert rig.u64(DATA + 8) & 0x8D5 == 1  # CF alone
    return found


@pytest.fixture
def randomly(cpu: Make) -> Callable[..., CpuRig]:
    def make(**options: Any) -> CpuRig:
        text = "mov $DATA + 256, %ebp\n"
        for name in RANDOM:
            whole = {"r15d": "r15", "esp": "rsp", "cx": "rcx", "r8w": "r8"}.get(name, name)
            whole = "rsp" if name == "sp" else whole
            for kind in ("rdrand", "rdseed"):
                text += f"""
                    mov $-1, %{whole}
                    cmp %eax, %eax
                    stc
                    {kind} %{name}
                    mov %{whole}, DATA
                    mov %rbp, %rsp
                    pushf
                    pop %rax
                    mov %rax, DATA + 8
                    mov $0x501, %edx
                    out %eax, %dx
                """
        return cpu(text + "mov $0x500, %edx\nout %eax, %dx", **options)

    return make


@pytest.mark.parametrize("clock", [None, VirtualTime()])
def test_random_numbers_of_each_size(
    randomly: Callable[..., CpuRig], clock: VirtualTime | None
) -> None:
    found = random_numbers(randomly(clock=clock))
    assert len(set(found)) == 2 * len(RANDOM)
    for name, pair in zip(RANDOM, zip(found[::2], found[1::2], strict=True), strict=True):
        for number in pair:
            if name in ("cx", "r8w", "sp"):  # the rest of the register stays
                assert number >> 16 == 0xFFFFFFFFFFFF
            elif name in ("r15d", "esp"):
                assert 0 < number < 1 << 32
            else:
                assert number > 1 << 32


def test_random_numbers_are_the_same_in_every_virtual_run(
    randomly: Callable[..., CpuRig],
) -> None:
    runs = [random_numbers(randomly(clock=VirtualTime(start))) for start in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    real = [random_numbers(randomly()) for _ in range(2)]
    assert real[0] != real[1]


def test_a_second_cpu_goes_on_with_the_random_numbers(randomly: Callable[..., CpuRig]) -> None:
    """A CPU is created anew when its state is set in the middle of an instruction."""
    whole = random_numbers(randomly(clock=VirtualTime()))
    rig = randomly(clock=VirtualTime())
    assert rig.out()[0] == 0x501
    first = rig.u64(DATA)
    rig.cpu.set_state(rig.cpu.get_state())
    assert [first, *random_numbers(rig)] == whole


def test_random_numbers_with_a_wrong_prefix(cpu: Make) -> None:
    assert cpu(".byte 0xf0\nrdrand %eax", handlers=True).trap()[0] == UD
    for prefix in ("0xf2", "0xf3"):  # other instructions of some CPUs
        assert isinstance(cpu(f".byte {prefix}\nrdseed %eax", handlers=True).run(), Failure)


def test_a_limit_of_instructions_is_exact(cpu: Make) -> None:
    rig = cpu("inc %eax\n" * 20, instructions=7)
    exit = rig.run()
    assert isinstance(exit, Failure)
    assert "--instructions" in exit.what
    assert rig.register("rax") == 7
    assert rig.cpu.instruction_pointer() == CODE + 14


# Pure parts.


def test_regions_are_of_one_protection(cpu: Make) -> None:
    rig = cpu("hlt")
    pieces = regions(rig.memory, [(CODE, CODE + 0x4000)])
    assert (CODE, CODE + 0x4000, 5) in pieces
    assert (RODATA, RODATA + 4096, 1) in pieces
    assert not any(start <= HIDDEN < end for start, end, _ in pieces)
    assert pieces[0] == (0, CODE, 3)


def test_regions_where_protections_meet() -> None:
    memory = GuestMemory(8 * 4096)
    for page, readable in ((4, False), (1, True), (2, True)):
        memory.protect(page * 4096, (page + 1) * 4096, readable=readable, writable=False)
    pieces = regions(memory, [(6 * 4096, 8 * 4096), (2 * 4096, 4 * 4096)])
    memory.close()
    assert [(start >> 12, end >> 12, prot) for start, end, prot in pieces] == [
        (0, 1, 3), (1, 2, 1), (2, 3, 5), (3, 4, 7), (5, 6, 3), (6, 8, 7),
    ]  # fmt: skip


def test_undefined_is_what_no_cpu_does() -> None:
    for text in ("ud2", "ud1 %eax, %eax", "ud0 %eax, %eax", ".byte 0x27", "lock; nop"):
        assert cpu_x86_64.is_undefined(assemble(text)), text
    for text in ("vaddps %ymm0, %ymm0, %ymm0", "xsave DATA", "invpcid DATA, %rax"):
        assert not cpu_x86_64.is_undefined(assemble(text)), text


def test_nothing_is_left_of_a_cpu(cpu: Make) -> None:
    from pathlib import Path

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    for suspended in ("out %eax, %dx", "ud2", "hlt"):
        before = 0
        for count in range(20):
            rig = CpuRig(suspended)
            rig.run()
            rig.close()
            before = before or (mappings() if count == 2 else 0)
        assert mappings() <= before + 4
