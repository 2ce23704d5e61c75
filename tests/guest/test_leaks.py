"""Nothing of the host gets into a guest: its memory and registers before its first instruction.

The rule here: the whole memory is accounted for, byte by byte: what the image has, what the tables
and the boot info are by their specification, and zeros. Then it is searched all the same.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender._native import ffi
from tender.accel import executable
from tender.assemble import Machine, assemble
from tender.backends import BlockFile, Descriptor
from tender.boot import layout, x86_64
from tender.boot.x86_64 import PAT_AT_RESET, DebugRegisters, Fpu, State
from tender.cleanup import Cleanup
from tender.config import Config
from tender.cpu.soft import SoftCpu
from tender.devices import open_inputs
from tender.stop import Stop
from tests.guest.conftest import PTENDER, Build, Namespace

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="what x86_64 guests find")

MIB = 1 << 20
MEM = 8 * MIB
RING = 2 * MIB
BLOCK, NET = 1, 2
MAC = b"\x02\x11\x22\x33\x44\x55"
ARGS = ("--some", "words of its own")
DESCRIPTORS = range(1000, 1003)  # numbers that stand out
RIP_AT_RESET = 0xFFF0


class Started:
    """A guest that is ready to run and has not run."""

    def __init__(self, machine: Machine, kernel: Path, secrets: dict[str, bytes]) -> None:
        self.machine = machine
        self.kernel = kernel
        self.secrets = secrets
        memory = machine.guest.memory
        self.memory = bytes(ffi.buffer(memory.pointer, memory.mapped))
        self.size = memory.size
        self.state: State = machine.vcpu.get_state()
        self.host_ranges = list(host_ranges())


def process_number_stands_out() -> bool:
    """On a machine that has just started it is as small as the numbers that belong here."""
    return os.getpid() >= 10_000


def host_ranges() -> Iterator[tuple[int, int]]:
    """Beyond 4 GiB: below, where some builds of Python lie, a number may be the guest's own."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = line.split()[0].split("-")
            if int(start, 16) >= 1 << 32:
                yield int(start, 16), int(end, 16)


@pytest.fixture(params=[False, True], ids=["plain", "ring"])
def started(
    request: pytest.FixtureRequest, guest: Build, tmp_path: Path, cpu: str
) -> Iterator[Started]:
    if request.param and cpu != "kvm":
        pytest.skip("only KVM offers a ring")
    image = tmp_path / "secret-of-the-host.img"
    image.write_bytes(b"what is on the disk" + bytes(4096 - 19))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernel = guest("textblock")
    null = os.open("/dev/null", os.O_WRONLY)
    numbers = list(DESCRIPTORS)
    for fd, number in zip((theirs.fileno(), ours.fileno(), null), numbers, strict=True):
        os.dup2(fd, number)
    config = Config(
        str(kernel),
        ARGS,
        MEM,
        net=(("service", Descriptor(numbers[0], mac=MAC, mtu=1400)),),
        block=(("storage", BlockFile(str(image), sector_size=1024)),),
        console_fd=numbers[2],
        net_ring=request.param,
        cpu=cpu,
    )
    cleanup = Cleanup()
    machine = assemble(open_inputs(config, cleanup), Stop(), pytest.fail, cleanup)
    if machine.ring:
        machine.ring.start()
    secrets = {
        "the kernel's path": os.fsencode(kernel),
        "the disk's path": os.fsencode(image),
        "a part of the disk's path": b"secret-of-the-host",
        "what is on the disk": b"what is on the disk",
        "this machine's name": os.fsencode(os.uname().nodename),
        "this kernel's release": os.fsencode(os.uname().release),
        "the folder": os.fsencode(os.getcwd()),
    }
    if process_number_stands_out():
        secrets["this process's number"] = str(os.getpid()).encode()
    yield Started(machine, kernel, secrets)
    cleanup.close()
    for fd in (*numbers, null):
        os.close(fd)
    ours.close()
    theirs.close()


def manifest() -> bytes:
    """The guest's copy of it, with nothing in the field that is the tender's."""

    def entry(name: bytes, kind: int, of_its_kind: bytes, attached: int) -> bytes:
        private = 0
        return struct.pack("<68sI16sQB7x", name, kind, of_its_kind, private, attached)

    return struct.pack("<II", 1, 3) + b"".join((
        entry(b"", 1 << 30, b"", 0),
        entry(b"storage", BLOCK, struct.pack("<QH", 4096, 1024), 1),
        entry(b"service", NET, MAC + struct.pack("<H", 1400), 1),
    ))  # fmt: skip


def cpu_is_soft(started: Started) -> bool:
    return isinstance(started.machine.vcpu, SoftCpu)


def expected(started: Started) -> bytes:
    """All of the guest's memory, from the image and the specification."""
    memory = bytearray(len(started.memory))
    file = started.kernel.read_bytes()
    image = started.machine.guest.image
    for segment in image.segments:
        part = file[segment.offset : segment.offset + segment.filesz]
        memory[segment.vaddr : segment.vaddr + len(part)] = part
    code = executable(image) if cpu_is_soft(started) else None
    for gpa, table in x86_64.tables(MEM, code):  # tests/unit/test_boot.py walks them as a CPU does
        memory[gpa : gpa + len(table)] = table
    ring = started.size if len(started.memory) > started.size else 0
    described = manifest()
    head = struct.pack(
        "<5Q2IQ",
        started.size,
        image.kernel_end,
        started.machine.vcpu.cpu_cycle_freq,
        0x10000 + 56 + len(described),
        0x10000 + 56,
        1 if ring else 0,
        0,
        ring,
    )
    boot_info = head + described + " ".join(ARGS).encode() + b"\0"
    memory[0x10000 : 0x10000 + len(boot_info)] = boot_info
    if ring:  # its thread waits for entries already; whether it sleeps is for it to say
        needs_kick = started.memory[ring + 72]
        assert needs_kick in (0, 1)
        memory[ring + 72] = needs_kick
    return bytes(memory)


def test_every_byte_is_accounted_for(started: Started) -> None:
    wanted = expected(started)
    if started.memory == wanted:
        return
    differ = [at for at in range(len(wanted)) if started.memory[at] != wanted[at]]
    pytest.fail(f"{len(differ)} bytes differ, first at {differ[0]:#x}")


def test_the_ring_is_there_where_it_was_asked_for(started: Started) -> None:
    wants_ring = started.machine.ring is not None
    assert len(started.memory) == MEM
    assert started.size == (MEM - RING if wants_ring else MEM)


def test_no_text_of_the_host(started: Started) -> None:
    image = started.kernel.read_bytes()  # a machine may be named as something in it
    for what, text in started.secrets.items():
        assert text not in started.memory or text in image, what


def test_no_address_of_the_host(started: Started) -> None:
    assert started.host_ranges
    low = min(start for start, _ in started.host_ranges)
    for at, value in numbers(started.memory, 8):
        if value >= low:
            for start, end in started.host_ranges:
                assert not start <= value < end, f"{value:#x} at {at:#x}"


def test_no_descriptor_and_no_process_number(started: Started) -> None:
    """Not in what the tender itself writes; the code of a guest has numbers of all kinds."""
    unwelcome = {*DESCRIPTORS, *([os.getpid()] if process_number_stands_out() else [])}
    for size in (4, 8):
        for at, value in numbers(started.memory[: layout.MIN_BASE], size):
            assert value not in unwelcome, f"{value} at {at:#x}"


def numbers(memory: bytes, size: int) -> Iterator[tuple[int, int]]:
    """All numbers but 0, at each address, aligned or not."""
    for match in re.finditer(rb"[^\0](?:[^\0]|\0{1,7}(?=[^\0]))*", memory):
        for at in range(max(0, match.start() - size + 1), match.end()):
            yield at, int.from_bytes(memory[at : at + size], "little")


def test_registers(started: Started) -> None:
    nx = cpu_is_soft(started)
    wanted = x86_64.initial_state(started.machine.guest.image.entry, started.size, nx=nx)
    state = started.state
    assert state.registers == wanted.registers
    zero = set(state.registers) - {"rip", "rsp", "rdi", "rflags"}
    assert {state.registers[name] for name in zero} == {0}
    assert state.control == wanted.control
    for name, segment in wanted.segments.items():
        if name in ("tr", "ldt"):
            continue  # hidden parts of what is not used
        found = state.segments[name]
        assert (found.base, found.limit) == (0, 0xFFFFFFFF), name
        assert found.selector in (segment.selector, 0), name
    for name in ("tr", "ldt"):
        assert state.segments[name].base == 0
    assert state.gdt == wanted.gdt
    assert state.idt.base == 0
    fpu = state.fpu
    assert fpu is not None
    assert (fpu.fcw, fpu.fsw) == (0x37F, 0)
    assert fpu.mxcsr == 0x1F80
    assert fpu.xmm == Fpu().xmm  # zeros
    assert {bytes(register)[:8] for register in fpu.st} == {bytes(8)}
    assert fpu.extended == {}
    assert {name: value for name, value in state.msrs.items() if value} == {"pat": PAT_AT_RESET}
    assert state.debug in (None, DebugRegisters())


def test_the_memory_of_a_guest_that_aborts(namespace: Namespace, tmp_path: Path, cpu: str) -> None:
    """The same search in a core file of the command, with a tap and what the guest itself wrote."""
    from tests.guest.conftest import BINDINGS

    kernel = tmp_path / "secretkernel.hvt"
    source = BINDINGS / "tests" / "abort.c"
    words = ["--manifest", source.with_name("textblock.json"), "-o", kernel]
    namespace.run(PTENDER, "build", source, *words)
    disk = tmp_path / "secretdisk.img"
    disk.write_bytes(b"what is on the disk" + bytes(4096 - 19))
    namespace.tap("secrettap")
    options = [f"--net=service=secrettap,mac={MAC.hex(':')}", f"--block={disk}"]
    done = namespace.run(
        PTENDER, "--mem=8", f"--dumpcore={tmp_path}", *options, kernel, "a word", check=False
    )
    assert done.returncode == 255, done
    (core,) = tmp_path.glob("core.solo5-hvt.*")
    memory = core.read_bytes()[4096:]
    assert len(memory) == MEM
    assert b"a word" in memory
    secrets = [str(tmp_path), "secret", "ptender/", "what is on the disk", "/dev/kvm", "/dev/net"]
    secrets += [os.uname().nodename, os.uname().release]
    secrets += [core.suffix[1:]] if len(core.suffix) > 5 else []  # the process's number
    for secret in map(os.fsencode, secrets):
        assert secret not in memory or secret in kernel.read_bytes(), secret
    for (value,) in struct.iter_unpack("<Q", memory):
        # Where x86_64 processes have their programs, libraries and stacks.
        assert value >> 40 not in (0x55, 0x56, 0x7E, 0x7F), hex(value)
