"""Breakpoints that are int3 in guest memory, and the steps over them, for CPUs that need both.

The rule here: guest memory has no int3 of ours while the guest stands: neither the debugger nor a
hypercall sees one.
"""

from __future__ import annotations

from tender.cpu.vcpu import Debug, Interrupted, IoIn, IoOut, Stops

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.cpu.vcpu import Exit, Vcpu

INT3 = 0xCC


class Int3Debug:
    """The part of cpu.vcpu.DebugCpu that they share; `memory` is the guest's, code is writable."""

    def __init__(self, vcpu: Vcpu[Any], memory: memoryview) -> None:
        self._memory = memory
        self._interface = vcpu
        self._stops = Stops()
        self._traps: tuple[int, ...] = ()  # where breakpoints are int3
        self._put: list[tuple[int, int]] = []  # those in memory now, and what was there
        self._passing = False  # the breakpoint at which the guest stands does not stop it
        self._in_step = False  # a step that is a hypercall has been answered

    # What a CPU does.

    def _single_step(self) -> Exit:
        """Let the guest do one instruction, without breakpoints: Debug("step")."""
        raise NotImplementedError

    def _continue(self) -> Exit:
        """Let it run, with breakpoints."""
        raise NotImplementedError

    def _end_of_hypercall(self) -> Exit:
        """A step was a hypercall, which has been answered: Debug("step")."""
        return Debug("step")

    # The interface.

    def forget_code(self) -> None:
        """The CPU sees changes."""

    def set_state(self, state: Any) -> None:
        """As cpu.vcpu.Vcpu has it."""
        self._interface.set_state(state)

    def _set_stops(self, stops: Stops, traps: tuple[int, ...]) -> None:
        self._stops = stops
        self._traps = traps
        self._passing = True
        self._in_step = False

    def run(self) -> Exit:
        """Let the guest run until an exit, a stop among them."""
        if self._in_step:
            self._in_step = False
            return self._end_of_hypercall()
        if self._stops.step:
            exit = self._single_step()
            self._in_step = isinstance(exit, (IoOut, IoIn))
            return exit
        if self._passing:
            self._passing = False
            at = self._interface.instruction_pointer()
            if at in self._stops.breakpoints or at in self._stops.hardware:
                exit = self._single_step()
                if not isinstance(exit, Debug) or exit.reason != "step":
                    self._passing = isinstance(exit, Interrupted)
                    return exit
        self._put_traps()
        exit = self._continue()
        if not isinstance(exit, Interrupted):  # after which the guest may be running
            self._take_traps()
        return exit

    def _put_traps(self) -> None:
        if not self._put:
            self._put = [(address, self._memory[address]) for address in self._traps]
            for address in self._traps:
                self._memory[address] = INT3

    def _take_traps(self) -> None:
        for address, byte in self._put:
            self._memory[address] = byte
        self._put = []
