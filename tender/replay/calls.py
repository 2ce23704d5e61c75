"""Hypercalls as a record has them: what recording and replaying share."""

from __future__ import annotations

from zlib import crc32

from tender._native import ffi
from tender.dataclass import dataclass
from tender.errors import GuestFault
from tender.hypercalls import HYPERCALLS, Dispatcher, decode
from tender.replay.file import STEP

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from tender.cpu.vcpu import Exit
    from tender.hypercalls import Halt, Hypercall, Module
    from tender.memory import GuestMemory
    from tender.outcome import Outcome
    from tender.stop import Stop


@dataclass
class Call:
    """A hypercall that the guest makes: its kind, its number, the GPA of its argument block, the
    block, and the CRC-32 of what it passes out of the guest (0: it passes nothing)."""

    kind: Hypercall
    number: int
    gpa: int
    block: bytes
    crc: int

    @property
    def asked(self) -> Any:
        """The fields of the block."""
        return fields(self.kind, self.block)


class CallDispatcher(Dispatcher):
    """A Dispatcher whose `handle` gets each hypercall with its argument block.

    One that can't have a block is the guest's end, recorded or replayed, as ever.
    """

    def __init__(
        self, memory: GuestMemory, modules: Iterable[Module], machine: int, clock: Any, stop: Stop
    ) -> None:
        super().__init__(memory, modules, machine)
        self._clock = clock  # a VirtualClock
        self._stop = stop

    def dispatch(self, exit: Exit) -> Halt | None:
        """As Dispatcher has it."""
        number, gpa = decode(exit)
        kind = HYPERCALLS.get(number)
        block = None if kind is None else block_at(self._memory, kind, gpa)
        if kind is None or block is None:
            return self.answer(exit)
        return self.handle(exit, Call(kind, number, gpa, block, self._crc(kind, block)))

    def handle(self, exit: Exit, call: Call) -> Halt | None:
        """Answer a hypercall."""
        raise NotImplementedError

    def answer(self, exit: Exit) -> Halt | None:
        """Have the modules answer it."""
        return super().dispatch(exit)

    def _crc(self, kind: Hypercall, block: bytes) -> int:
        if kind.data not in ("text", "out"):
            return 0
        asked, crc = fields(kind, block), 0
        try:
            data = self._memory.readable(asked.data_gpa, asked.len)
        except GuestFault:
            return 0
        for at in range(0, len(data), STEP):
            self._stop.check()
            crc = crc32(data[at : at + STEP], crc)
        return crc


def block_at(memory: GuestMemory, kind: Hypercall, gpa: int) -> bytes | None:
    """The argument block of a hypercall; None where it can't have one there."""
    try:
        memory.at(kind.layout, gpa, out=bool(kind.answers))
        return bytes(memory.readable(gpa, kind.layout.size))
    except GuestFault:
        return None


def fields(kind: Hypercall, block: bytes) -> Any:
    """The fields of an argument block."""
    return ffi.from_buffer(kind.layout.pointer, block)


def how(outcome: Outcome) -> str:
    """How a run ended, as the record has it."""
    return f"{outcome.reason}, status {outcome.status}"
