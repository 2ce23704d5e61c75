"""A guest under gdb: a vCPU that stops where the debugger wants it to.

While the guest runs, or waits in a hypercall, a timer interrupts it every 10 ms to look at what the
debugger has sent. A debugger that vanishes leaves the guest running.
"""

from __future__ import annotations

import os

from tender._native import lib
from tender.boot.x86_64 import READ_ONLY_FROM
from tender.cpu.vcpu import Debug, NotSupported, Stops
from tender.dataclass import replace
from tender.errors import NotEmulated
from tender.observe import gdb_registers
from tender.observe.gdb_packets import ProtocolError
from tender.observe.gdb_session import (
    SIGABRT,
    SIGILL,
    SIGINT,
    SIGSEGV,
    SIGSYS,
    SIGTRAP,
    Session,
)
from tender.outcome import Statistics
from tender.stop import Stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.cpu.vcpu import DebugCpu, Engine, Exit, Ring, Vcpu
    from tender.errors import GuestFault
    from tender.hypercalls import Halt
    from tender.observe.gdb_link import Link
    from tender.outcome import Outcome
    from tender.stop import Stop

SIGKILL, SIGTERM = 9, 15
HELP = "stats    what the guest's devices have done\nhelp     this text\n"


class GdbVcpu:
    """`vcpu`, of which `debug` is the debugger's side; the interface is cpu.vcpu.Vcpu.

    `memory` is the guest's, writable whatever the image protects; `kernel` is the image's path.
    """

    def __init__(
        self,
        vcpu: Vcpu[Any],
        debug: DebugCpu,
        memory: memoryview,
        kernel: str,
        link: Link,
        stop: Stop,
    ) -> None:
        self.path = os.path.abspath(kernel)
        self.joined = False
        self.pending: Exit | None = None  # what the guest waits in when the debugger comes
        self.statistics: Callable[[], Statistics] = Statistics
        self.fds = vcpu.fds
        self.cpu_cycle_freq, self.pc_name = vcpu.cpu_cycle_freq, vcpu.pc_name
        self._vcpu = vcpu
        self._debug = debug
        self._memory = memory
        self._link = link
        self._stop = stop
        self._architecture = gdb_registers.of("aarch64" if vcpu.pc_name == "pc" else "x86_64")
        self._session: Session | None = None
        self._begun = False
        self._ending = False  # the guest will not run again
        self._state: Any = None  # the registers of a guest that stands still, once they are read
        debug.enable_debug()

    # The interface of a vCPU.

    def use_engine(self, engine: Engine | None, ring: Ring | None) -> None:
        """There is none: Python answers all hypercalls of a guest that is debugged."""

    def count_in(self, activity: Any) -> None:
        """As cpu.vcpu.Vcpu has it."""
        self._vcpu.count_in(activity)

    def start(self, filter: bytes) -> None:
        """As cpu.vcpu.Vcpu has it."""
        self._vcpu.start(filter)

    def end(self) -> None:
        """As cpu.vcpu.Vcpu has it."""
        self._vcpu.end()

    def run(self) -> Exit:
        """Let the guest run until an exit that is not the debugger's."""
        if not self._begun:
            self._begun = True
            self._wait_for_debugger()
            self._stop.on_interrupt.append(self._look)
            if self.pending is not None:
                return self.pending
        while True:
            exit = self._debug.run()
            if type(exit) is not Debug:
                return exit
            self._stand(SIGTRAP, exit.reason, exit.address)

    def get_state(self) -> Any:
        """As kvm.Vcpu has it."""
        return self._vcpu.get_state()

    def core_state(self) -> Any:
        """As kvm.Vcpu has it."""
        return self._vcpu.core_state()

    def set_state(self, state: Any) -> None:
        """As kvm.Vcpu has it."""
        self._vcpu.set_state(state)

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """As cpu.vcpu.Vcpu has it."""
        return self._vcpu.cpuid(leaf, subleaf)

    def counter(self) -> int:
        """As cpu.vcpu.Vcpu has it."""
        return self._vcpu.counter()

    def set_counter(self, value: int, hz: int) -> int:
        """As cpu.vcpu.Vcpu has it."""
        return self._vcpu.set_counter(value, hz)

    def registers(self) -> dict[str, int]:
        """As kvm.Vcpu has it."""
        return self._vcpu.registers()

    def instruction_pointer(self) -> int:
        """As kvm.Vcpu has it."""
        return self._vcpu.instruction_pointer()

    # How a guest ends.

    def failed(self, error: GuestFault) -> None:
        """The guest is about to end by its own fault: show it to the debugger first."""
        signal = SIGILL if isinstance(error, NotEmulated) else SIGSEGV
        self._last_look(SIGSYS if error.hypercall is not None else signal, str(error))

    def aborted(self, halt: Halt, boot: Any) -> None:
        """The guest has halted as one that failed; `boot` is the module of its architecture."""
        if self._session is not None:
            state = self._debug.debug_state()
            state = boot.with_trap(state, halt.trap) if halt.trap else state
            self._last_look(SIGABRT, "the guest has aborted", state)

    def _last_look(self, signal: int, text: str, state: Any = None) -> None:
        if self._session is None:
            return
        self._ending = True
        try:
            self._send(Session.say(f"ptender: {text}\n"))
            self._stand(signal, state=state)
        except Stopped:
            pass  # it ends as it would have

    def ended(self, outcome: Outcome) -> None:
        """The guest has ended: tell the debugger."""
        lib.stop_tick(0)
        if self._session is None:
            return
        if outcome.reason == "halted":
            message = self._session.exited(outcome.status)
        else:
            message = self._session.killed(
                outcome.signo or (SIGSEGV if outcome.reason == "fault" else SIGTERM)
            )
        try:
            self._send(message)
        except Stopped:
            pass  # it does not read, and there is no more time

    # Standing still.

    def _wait_for_debugger(self) -> None:
        if self._link.is_pipe:
            self._session = Session(self)
            self._serve()
        while not self._link.is_pipe and not self._join():
            self._link.wait()

    def _look(self) -> None:
        """See what the debugger wants of the guest, which runs."""
        if self._ending:
            return
        self._join()
        if self._session is not None:
            self._take()
        if self._session is not None and self._session.interrupted:
            self._stand(SIGINT)

    def _join(self) -> bool:
        """Let a debugger that waits stop the guest; whether there was one."""
        if not self._link.accept():
            return False
        self._session = Session(self)
        self._debug.pause()
        self._serve()
        self.joined = True  # the next one does
        return True

    def _stand(self, signal: int, reason: str = "", address: int = 0, state: Any = None) -> None:
        """Report that the guest has stopped, and serve the debugger until it is to go on."""
        if self._session is None:
            return
        self._debug.pause()
        self._state = state
        pc = self._vcpu.instruction_pointer() if reason == "breakpoint" else 0
        self._send(self._session.stopped(signal, reason, address, pc))
        self._serve()

    def _serve(self) -> None:
        lib.stop_tick(0)
        try:
            self._stop.check_request()
            while self._session is not None and self._session.action is None:
                self._take()
                if self._session is not None and self._session.action is None:
                    self._link.wait()
                    self._link.accept()
            self._go_on()
        finally:
            lib.stop_tick(1)

    def _go_on(self) -> None:
        session = self._session
        if session is None:
            return
        action = session.action
        if action == "kill":
            self._end(SIGKILL)
        self._state = None
        if action == "detach":
            self._leave()
        elif not self._ending:
            self._debug.set_stops(replace(session.stops, step=action == "step"))

    def _take(self) -> None:
        """Take what the debugger has sent, and answer it."""
        session = self._session
        data = self._link.read()
        if session is None or data == b"":
            return
        try:
            if data is None:
                self._vanished()
            else:
                self._send(session.receive(data))
        except ProtocolError:
            self._vanished()

    def _send(self, data: bytes) -> None:
        if not self._link.write(data):
            self._vanished()

    def _vanished(self) -> None:
        is_pipe = self._link.is_pipe
        self._leave()
        if is_pipe:
            self._end(SIGTERM)  # nobody else can come

    def _leave(self) -> None:
        """Without the debugger, nothing stops the guest."""
        self._link.disconnect()
        self._session = None
        if not self._ending:
            self._debug.pause()
            self._debug.set_stops(Stops())

    def _end(self, signo: int) -> None:
        self._stop.cell.signo = signo
        self._stop.cell.requested = 1
        raise Stopped

    # What a debugger asks of a guest that stands still (gdb_session.Target).

    def _read_state(self) -> Any:
        if self._state is None:
            self._state = self._debug.debug_state()
        return self._state

    def _write_state(self, state: Any) -> None:
        if self._ending:
            raise NotSupported("the guest has ended")
        self._debug.set_state(state)
        self._state = None

    def xml(self) -> bytes:
        """Its target description."""
        return self._architecture.xml()

    def memory_map(self) -> list[tuple[int, int]]:
        """What it can address."""
        return [(READ_ONLY_FROM, len(self._memory) - READ_ONLY_FROM)]

    def read_registers(self) -> bytes:
        """All of them."""
        return self._architecture.read_all(self._read_state())

    def write_registers(self, data: bytes) -> None:
        """All of them."""
        self._write_state(self._architecture.write_all(self._read_state(), data))

    def read_register(self, number: int) -> bytes:
        """One by its number."""
        return self._architecture.read(self._read_state(), number)

    def write_register(self, number: int, data: bytes) -> None:
        """One by its number."""
        self._write_state(self._architecture.write(self._read_state(), number, data))

    def read_memory(self, address: int, size: int) -> bytes:
        """What is there; all of the guest's memory is at its physical address."""
        if address < READ_ONLY_FROM:
            return b""
        return bytes(self._memory[address : address + size])

    def write_memory(self, address: int, data: bytes) -> None:
        """Code as well."""
        if address < READ_ONLY_FROM or address + len(data) > len(self._memory):
            raise NotSupported(f"no memory at {address:#x}")
        self._memory[address : address + len(data)] = data
        self._debug.forget_code()

    def set_stops(self, stops: Stops) -> None:
        """What it is to stop at."""
        self._debug.set_stops(stops)

    def monitor(self, words: str) -> str:
        """The commands of HELP."""
        if words.strip() != "stats":
            return HELP
        lines = []
        for name, counters in self.statistics().rows():
            numbers = ", ".join(f"{value} {key}" for key, value in counters.__dict__.items())
            lines.append(f"{name}: {numbers}\n")
        return "".join(lines)
