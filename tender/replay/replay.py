"""Replaying: a recorded run once more, answered from its record.

No device is needed: what came in comes from the record, and what goes out is compared with it. The
console is written. The first difference ends the run, in words that name it.
"""

from __future__ import annotations

import os

from tender._native import lib
from tender.dataclass import replace
from tender.errors import EXIT_FAILURE, GuestFault, HostError, one_line
from tender.hypercalls import HYPERCALLS, Dispatcher, decode
from tender.replay.file import END, FAULT, STEP, read_event
from tender.replay.record import block_at, crc_of, fields, how

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from tender.clock import HostClock
    from tender.cpu.vcpu import Exit
    from tender.errors import TenderError
    from tender.hypercalls import Halt, Hypercall, Module
    from tender.memory import GuestMemory
    from tender.outcome import Outcome
    from tender.replay.file import Event
    from tender.stop import Stop

_TEXT_MAX = 256


class ReplayError(HostError):
    """The run differs from its record, or the record ends."""


class Replay(Dispatcher):
    """Answers hypercalls from `fd`, a record behind its image."""

    def __init__(
        self,
        fd: int,
        memory: GuestMemory,
        modules: Iterable[Module],
        machine: int,
        clock: HostClock,
        stop: Stop,
    ) -> None:
        super().__init__(memory, modules, machine)
        self._fd = fd
        self._clock = clock
        self._stop = stop
        self._count = 0

    def dispatch(self, exit: Exit) -> Halt | None:
        """As Dispatcher has it. Raises ReplayError as well."""
        number, gpa = decode(exit)
        call = HYPERCALLS.get(number)
        asked = None if call is None else block_at(self._memory, call, gpa)
        if call is None or asked is None:
            return super().dispatch(exit)  # which raises, as it did
        self._count += 1
        event = self._next(call)
        crc = crc_of(self._memory, call, asked, self._stop)
        self._compare(call, gpa, asked, crc, event)
        self._clock.cell.now_ns = event.now_ns
        if event.flags & FAULT:
            raise self._fault(call, asked, number)
        if number in (lib.HVT_HYPERCALL_PUTS, lib.HVT_HYPERCALL_HALT):
            return super().dispatch(exit)
        if call.data == "in":
            self._receive(call, asked, event.data_size)
        if call.answers:
            self._memory.writable(gpa, len(asked))[:] = event.answered
        return None

    def end(self, outcome: Outcome) -> Outcome:
        """The outcome of a run that has ended, compared with the recorded one."""
        if isinstance(outcome.error, ReplayError) or outcome.reason == "stopped":
            return outcome
        event = read_event(self._fd)
        recorded = self._how_it_ended(event) if event and event.number == END else ""
        if recorded == how(outcome):
            return outcome
        wanted = f"ended so: {recorded}" if recorded else "went on, or was cut off"
        error = self._differs(f"it ends so: {how(outcome)}; the recorded run {wanted}")
        return replace(outcome, reason="host", status=EXIT_FAILURE, error=error)

    def _next(self, call: Hypercall) -> Event:
        event = read_event(self._fd)
        if event is None:
            raise ReplayError(f"the record ends before hypercall {self._count}, {call.name}")
        if event.number == END:
            raise ReplayError(
                f"the record ends before hypercall {self._count}, {call.name}: "
                f"{self._how_it_ended(event)}"
            )
        return event

    def _how_it_ended(self, event: Event) -> str:
        return one_line(os.read(self._fd, min(event.data_size, _TEXT_MAX)).decode(errors="replace"))

    def _compare(self, call: Hypercall, gpa: int, asked: bytes, crc: int, event: Event) -> None:
        recorded = HYPERCALLS.get(event.number)
        if recorded is call and (gpa, asked, crc) == (event.gpa, event.asked, event.crc):
            if len(event.answered) != len(asked):
                raise ReplayError(f"the record is malformed at hypercall {self._count}")
            return
        now = f"{call.name} at {gpa:#x}, {_shown(call, asked)}"
        if recorded is None or len(event.asked) != recorded.layout.size:
            raise self._differs(f"{now}; recorded: no hypercall")
        then = f"{recorded.name} at {event.gpa:#x}, {_shown(recorded, event.asked)}"
        if now == then:
            raise self._differs(f"{now}: what it passes out is not what was recorded")
        raise self._differs(f"{now}; recorded: {then}")

    def _differs(self, how: str) -> ReplayError:
        return ReplayError(f"the replay differs from its record at hypercall {self._count}: {how}")

    def _fault(self, call: Hypercall, asked: bytes, number: int) -> TenderError:
        block = fields(call, asked)
        check = self._memory.writable if call.data == "in" else self._memory.readable
        try:
            check(block.data_gpa, block.len)
        except GuestFault as fault:
            fault.hypercall = number
            return fault
        return self._differs(f"{call.name} was the guest's end when it was recorded")

    def _receive(self, call: Hypercall, asked: bytes, size: int) -> None:
        block, done = fields(call, asked), 0
        if size > block.len:
            raise ReplayError(f"the record is malformed at hypercall {self._count}")
        target = self._memory.writable(block.data_gpa, size)
        while done < size:
            count = os.readv(self._fd, [target[done : done + STEP]])
            if not count:
                raise ReplayError(f"the record ends in the middle of hypercall {self._count}")
            self._stop.check()
            done += count


def _shown(call: Hypercall, block: bytes) -> str:
    values = fields(call, block)
    return " ".join(f"{name}={getattr(values, name):#x}" for name in call.asks)
