"""Replaying: a recorded run once more, answered from its record.

No device is needed: what came in comes from the record, and what goes out is compared with it. The
console is written. The first difference ends the run, in words that name it.
"""

from __future__ import annotations

from tender._native import lib
from tender.dataclass import replace
from tender.errors import EXIT_FAILURE, GuestFault, one_line
from tender.hypercalls import HYPERCALLS
from tender.replay.calls import CallDispatcher, fields, how
from tender.replay.file import END, FAULT, STEP, ReplayError, read_bytes, read_event, read_into

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from tender.cpu.vcpu import Exit
    from tender.errors import TenderError
    from tender.hypercalls import Halt, Hypercall, Module
    from tender.memory import GuestMemory
    from tender.outcome import Outcome
    from tender.replay.calls import Call
    from tender.replay.file import Event
    from tender.stop import Stop

_TEXT_MAX = 256


class Replay(CallDispatcher):
    """Answers hypercalls from `fd`, a record behind its image. Raises ReplayError as well."""

    def __init__(
        self,
        fd: int,
        memory: GuestMemory,
        modules: Iterable[Module],
        machine: int,
        clock: Any,
        stop: Stop,
    ) -> None:
        super().__init__(memory, modules, machine, clock, stop)
        self._fd = fd
        self._count = 0

    def handle(self, exit: Exit, call: Call) -> Halt | None:
        """As CallDispatcher has it."""
        self._count += 1
        event = self._next(call)
        self._compare(call, event)
        self._clock.cell.now_ns = event.now_ns
        if event.flags & FAULT:
            raise self._fault(call)
        if call.number in (lib.HVT_HYPERCALL_PUTS, lib.HVT_HYPERCALL_HALT):
            return self.answer(exit)
        if call.kind.data == "in":
            self._receive(call, event.data_size)
        if call.kind.answers:
            self._memory.writable(call.gpa, len(call.block))[:] = event.answered
        return None

    def end(self, outcome: Outcome) -> Outcome:
        """The outcome of a run that has ended, compared with the recorded one."""
        if isinstance(outcome.error, ReplayError) or outcome.reason == "stopped":
            return outcome
        try:
            event = read_event(self._fd)
            recorded = self._how_it_ended(event) if event and event.number == END else ""
            if recorded == how(outcome):
                return outcome
            wanted = f"ended so: {recorded}" if recorded else "went on, or was cut off"
            error = self._differs(f"it ends so: {how(outcome)}; the recorded run {wanted}")
        except ReplayError as failed:
            error = failed.with_traceback(None)
        return replace(outcome, reason="host", status=EXIT_FAILURE, error=error)

    def _next(self, call: Call) -> Event:
        event = read_event(self._fd)
        ends = f"the record ends before hypercall {self._count}, {call.kind.name}"
        if event is None:
            raise ReplayError(ends)
        if event.number == END:
            raise ReplayError(f"{ends}: {self._how_it_ended(event)}")
        return event

    def _how_it_ended(self, event: Event) -> str:
        text = read_bytes(self._fd, min(event.data_size, _TEXT_MAX))
        return one_line(text.decode(errors="replace"))

    def _compare(self, call: Call, event: Event) -> None:
        kind = HYPERCALLS.get(event.number)
        asked = (call.gpa, call.block, call.crc)
        if kind is call.kind and asked == (event.gpa, event.asked, event.crc):
            if len(event.answered) != len(call.block):
                raise ReplayError(f"the record is malformed at hypercall {self._count}")
            return
        now = _shown(call.kind, call.gpa, call.block)
        if kind is None or len(event.asked) != kind.layout.size:
            raise self._differs(f"{now}; recorded: no hypercall")
        then = _shown(kind, event.gpa, event.asked)
        if now == then:
            raise self._differs(f"{now}: what it passes out is not what was recorded")
        raise self._differs(f"{now}; recorded: {then}")

    def _differs(self, how: str) -> ReplayError:
        return ReplayError(f"the replay differs from its record at hypercall {self._count}: {how}")

    def _fault(self, call: Call) -> TenderError:
        check = self._memory.writable if call.kind.data == "in" else self._memory.readable
        try:
            check(call.asked.data_gpa, call.asked.len)
        except GuestFault as fault:
            fault.hypercall = call.number
            return fault
        return self._differs(f"{call.kind.name} was the guest's end when it was recorded")

    def _receive(self, call: Call, size: int) -> None:
        asked, done = call.asked, 0
        if size > asked.len:
            raise ReplayError(f"the record is malformed at hypercall {self._count}")
        target = self._memory.writable(asked.data_gpa, size)
        while done < size:
            count = read_into(self._fd, target[done : done + STEP])
            if not count:
                raise ReplayError(f"the record ends in the middle of hypercall {self._count}")
            self._stop.check()
            done += count


def _shown(kind: Hypercall, gpa: int, block: bytes) -> str:
    asked = fields(kind, block)
    values = " ".join(f"{name}={getattr(asked, name):#x}" for name in kind.asks)
    return f"{kind.name} at {gpa:#x}, {values}"
