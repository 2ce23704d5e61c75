"""The state of a CPU: complete, on every CPU, and on any other that can have it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import cycle, permutations, product
from pathlib import Path
from typing import Any

import pytest

from tender import accel, loop
from tender._native import lib
from tender.assemble import Machine, assemble
from tender.cleanup import Cleanup
from tender.config import Config
from tender.cpu import saved
from tender.cpu.vcpu import IoOut
from tender.dataclass import replace
from tender.devices import open_inputs
from tender.errors import HostError
from tender.memory import PROT_WRITE, regions
from tender.stop import Stop
from tests.guest.conftest import CPUS, Build, missing

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="states of x86_64 guests")
MEM = 8 << 20
HALT = lib.HVT_HYPERCALL_PIO_BASE + lib.HVT_HYPERCALL_HALT


class Taken(Exception):
    """The guest stands behind a hypercall."""


class Hook:
    """Takes the guest at each hypercall but its last."""

    def before(self, exit: Any) -> None:
        self._is_last = isinstance(exit, IoOut) and exit.port == HALT

    def after(self, error: BaseException | None) -> None:
        if error is None and not self._is_last:
            raise Taken


class Moving:
    """A guest that is taken from CPU to CPU, each a machine of its own; `text` is its console."""

    def __init__(self, kernel: Path, words: tuple[str, ...]) -> None:
        self.cleanup = Cleanup()
        self._config = Config(str(kernel), words, MEM, engine="python")
        reader, self._writer = os.pipe()
        self.reader = os.fdopen(reader)
        self._machine: Machine | None = None

    @property
    def vcpu(self) -> Any:
        assert self._machine
        return self._machine.vcpu

    def start(self, cpu: str, counter: int = 0) -> bool:
        """False: the guest's counter can't be `counter`, and it is not started."""
        config = replace(self._config, cpu=cpu, console_fd=self._writer)
        inputs = open_inputs(config, self.cleanup)
        self._machine = assemble(inputs, Stop(), pytest.fail, self.cleanup)
        if counter and self.vcpu.set_counter(counter, self.vcpu.cpu_cycle_freq) < counter:
            return False
        self.vcpu.start(b"")
        return True

    def run(self) -> bool:
        """To behind its next hypercall; False: it has ended, with success."""
        machine = self._machine
        assert machine
        try:
            loop.run(machine.vcpu, machine.guest.memory, machine.dispatcher, Stop(), [Hook()])
        except Taken:
            return True
        self.end()
        return False

    def run_to_test(self) -> None:
        """To behind the hypercall of `state`: before it are two lines of its runtime."""
        assert [self.run() for _ in range(3)] == [True] * 3

    def end(self) -> None:
        self.vcpu.end()
        os.close(self._writer)
        lines = self.reader.read().splitlines()
        assert "SUCCESS" in lines
        assert len(lines) == len(set(lines)), "a hypercall was made twice"
        self.reader.close()
        self.cleanup.close()

    def move(self, cpu: str) -> None:
        old = self._machine
        assert old
        data = saved.encode(old.vcpu.get_state())
        counter, hz = old.vcpu.counter(), old.vcpu.cpu_cycle_freq
        self.start(cpu)
        new = self._machine
        assert new
        for start, end, prot in regions(old.guest.memory, ()):
            if prot & PROT_WRITE:
                new.guest.memory.view[start:end] = old.guest.memory.view[start:end]
        self.vcpu.set_state(saved.decode(data, is_aarch64=False))
        if hz == self.vcpu.cpu_cycle_freq or cpu == "soft":
            assert self.vcpu.set_counter(counter, hz) >= counter  # time never goes back
        old.vcpu.end()


@pytest.fixture
def cpus() -> list[str]:
    """Those that this machine has."""
    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    return [cpu for cpu in CPUS if not missing(cpu)]


@pytest.fixture
def moving(guest: Build) -> Iterator[Callable[..., Moving]]:
    made: list[Moving] = []

    def make(name: str, *words: str) -> Moving:
        made.append(Moving(guest(name), words))
        return made[-1]

    yield make
    for each in made:
        each.cleanup.close()


@pytest.mark.parametrize("name", ["tls", "state", "clib", "memory"])
def test_a_guest_goes_from_cpu_to_cpu(
    moving: Callable[..., Moving], cpus: list[str], name: str
) -> None:
    one = moving(name, "general", "msrs")
    hops = iter([*permutations(cpus, 2), *((cpu, cpu) for cpu in cpus)])
    one.start(cpus[0])
    while one.run():
        for cpu in next(hops, ()):
            one.move(cpu)


def check_pairs(moving: Callable[..., Moving], cpus: list[str], word: str) -> None:
    for one, other in product(cpus, cpus):
        guest = moving("state", word)
        guest.start(one)
        moves = cycle((other, one))
        while guest.run():
            guest.move(next(moves))


def with_fp(cpus: list[str]) -> list[str]:
    """A KVM that emulates its guests does no SSE."""
    return [cpu for cpu in cpus if cpu != "kvm" or not accel.emulated()]


def test_x87_and_sse_go_with_it(moving: Callable[..., Moving], cpus: list[str]) -> None:
    check_pairs(moving, with_fp(cpus), "sse")


def test_debug_registers_go_with_it_where_the_cpu_has_them(
    moving: Callable[..., Moving], cpus: list[str]
) -> None:
    check_pairs(moving, [cpu for cpu in cpus if cpu != "native"], "debug")
    if "native" in cpus:
        guest = moving("state", "debug")
        guest.start("soft")
        guest.run_to_test()
        with pytest.raises(HostError, match="native CPU: the guest uses debug registers"):
            guest.move("native")


@pytest.mark.skipif(not lib.xsave_offset(2), reason="this machine has no AVX")
@pytest.mark.parametrize("word", ["avx", "avx512"])
def test_avx_goes_where_it_is(moving: Callable[..., Moving], cpus: list[str], word: str) -> None:
    if word == "avx512" and not lib.xsave_offset(7):
        pytest.skip("this machine has no AVX-512")
    if "native" not in cpus:
        pytest.skip("a guest has AVX at once on the native CPU only")
    for other in with_fp(cpus):
        guest = moving("state", word)
        guest.start("native")
        guest.run_to_test()
        if other == "soft":
            with pytest.raises(HostError, match="no AVX"):
                guest.move(other)
            continue
        guest.move(other)  # which lets a guest of the native CPU use AVX
        while guest.run():
            pass


def test_a_counter_of_another_frequency(moving: Callable[..., Moving], cpus: list[str]) -> None:
    guest = moving("hello")
    for cpu in cpus:
        guest.start(cpu)
        vcpu = guest.vcpu
        value, own = 1 << 62, vcpu.cpu_cycle_freq
        if cpu == "soft":
            assert value <= vcpu.set_counter(value, 3 * own) < value + 100 * own
            assert vcpu.cpu_cycle_freq == 3 * own
            continue
        with pytest.raises(HostError, match=f"counts time in {3 * own} Hz.*soft"):
            vcpu.set_counter(value, 3 * own)
        assert vcpu.cpu_cycle_freq == own
        assert vcpu.set_counter(value, own) == pytest.approx(vcpu.counter(), abs=own)


def test_a_counter_that_is_set(moving: Callable[..., Moving], cpus: list[str]) -> None:
    """On the native CPU RDTSC traps then."""
    for cpu in cpus:
        guest = moving("state", "tsc")
        if not guest.start(cpu, 1 << 60):
            assert cpu == "kvm"  # some report success and change nothing
            continue
        while guest.run():
            pass
