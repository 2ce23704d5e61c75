"""Recording: each hypercall as the guest has made it, and all that has come in with its answer.

Between two hypercalls nothing enters a guest of the software CPU but its clock and RDRAND. So both
are functions of what the guest does: time goes on by a tick per reading, and at each hypercall to
what the host's clock says.
"""

from __future__ import annotations

import os
from time import monotonic_ns, time_ns
from zlib import crc32

from tender._native import ffi, lib
from tender.clock import VirtualClock
from tender.config import VirtualTime
from tender.errors import ConfigError, GuestFault, HostError
from tender.hypercalls import HYPERCALLS, Dispatcher, decode
from tender.observe.output import Output
from tender.replay.file import END, FAULT, IMAGE_MAX, STEP, Event, Header, encode_header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from tender.config import Config
    from tender.cpu.vcpu import Exit
    from tender.hypercalls import Halt, Hypercall, Module
    from tender.image.file import ImageFile
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.outcome import Outcome
    from tender.stop import Stop

_TICK_NS = 100  # about what it takes a guest of the software CPU to read its TSC


class RecordedClock(VirtualClock):
    """The host's time as it was at the last hypercall, and a tick more for each reading since."""

    virtual = False  # POLL waits

    def __init__(self) -> None:
        super().__init__(VirtualTime(time_ns(), _TICK_NS))
        self.cell.random = int.from_bytes(os.urandom(8), "little")

    def synchronise(self) -> None:
        """Go on to the host's time, if that is later."""
        self.cell.now_ns = max(self.cell.now_ns, monotonic_ns() - self._begun_ns)


def begin(fd: int, config: Config, clock: Any, manifest: bytes, image: ImageFile) -> None:
    """Write what a run is started with: `clock` is a VirtualClock. Raises TenderError."""
    size = image.info.st_size
    if size > IMAGE_MAX:
        raise ConfigError(f"{image.path}: too large to be recorded: {size} bytes")
    header = Header(
        os.path.abspath(config.kernel),
        config.args,
        config.mem_bytes,
        config.exec_heap,
        config.instructions,
        manifest,
        clock.start_ns,
        int(clock.cell.tick_ns),
        int(clock.cell.random),
    )
    try:
        for piece in (encode_header(header, size), *image.contents()):
            while piece:
                piece = piece[os.write(fd, piece) :]
    except OSError as error:
        raise HostError("record", "write", error.errno or 0) from None


class Recorder(Dispatcher):
    """Writes each hypercall, with its answer, to `fd`."""

    def __init__(
        self,
        fd: int,
        memory: GuestMemory,
        modules: Iterable[Module],
        machine: int,
        clock: Any,
        stop: Stop,
        warn: Warn,
    ) -> None:
        super().__init__(memory, modules, machine)
        self._output = Output(fd, "record", stop, warn)
        self._clock = clock
        self._stop = stop

    def dispatch(self, exit: Exit) -> Halt | None:
        """As Dispatcher has it."""
        number, gpa = decode(exit)
        call = HYPERCALLS.get(number)
        asked = None if call is None else block_at(self._memory, call, gpa)
        if call is None or asked is None:
            return super().dispatch(exit)  # which raises, in a replay as well
        crc = crc_of(self._memory, call, asked, self._stop)
        try:
            halt = super().dispatch(exit)
        except GuestFault:
            self._write(Event(number, FAULT, gpa, asked, asked, crc, self._now(), 0))
            raise
        answered = block_at(self._memory, call, gpa) or asked
        data = self._data(call, asked, answered)
        self._write(Event(number, 0, gpa, asked, answered, crc, self._now(), len(data)), data)
        return halt

    def end(self, outcome: Outcome) -> Outcome:
        """Write the last event, how the run has ended: `outcome`, as it is."""
        text = how(outcome).encode()
        self._write(Event(END, 0, 0, b"", b"", 0, self._clock.cell.now_ns, len(text)), text)
        return outcome

    def _now(self) -> int:
        if isinstance(self._clock, RecordedClock):
            self._clock.synchronise()
        return int(self._clock.cell.now_ns)

    def _data(self, call: Hypercall, asked: bytes, answered: bytes) -> bytes | memoryview:
        if call.data != "in":
            return b""
        before, after = fields(call, asked), fields(call, answered)
        if after.ret != lib.HVT_R_OK:
            return b""
        size = min(before.len, after.len) if "len" in call.answers else before.len
        return self._memory.readable(before.data_gpa, size)

    def _write(self, event: Event, data: bytes | memoryview = b"") -> None:
        self._output.write(event.encode() + data)


def how(outcome: Outcome) -> str:
    """How a run ended, as the record has it."""
    return f"{outcome.reason}, status {outcome.status}"


def block_at(memory: GuestMemory, call: Hypercall, gpa: int) -> bytes | None:
    """The argument block of a call; None where it can't have one there."""
    try:
        memory.at(call.layout, gpa, out=bool(call.answers))
        return bytes(memory.readable(gpa, call.layout.size))
    except GuestFault:
        return None


def fields(call: Hypercall, block: bytes) -> Any:
    """The fields of an argument block."""
    return ffi.from_buffer(call.layout.pointer, block)


def crc_of(memory: GuestMemory, call: Hypercall, asked: bytes, stop: Stop) -> int:
    """The CRC-32 of what a call passes out of the guest; 0 where it passes nothing."""
    if call.data not in ("text", "out"):
        return 0
    block, crc = fields(call, asked), 0
    try:
        data = memory.readable(block.data_gpa, block.len)
    except GuestFault:
        return 0
    for at in range(0, len(data), STEP):
        stop.check()
        crc = crc32(data[at : at + STEP], crc)
    return crc
