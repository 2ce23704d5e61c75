"""Recording: each hypercall as the guest has made it, and all that has come in with its answer.

Between two hypercalls nothing enters a guest of the software CPU but its clock and RDRAND. So both
are functions of what the guest does: time goes on by a tick per reading, and at each hypercall to
what the host's clock says.
"""

from __future__ import annotations

import os
import stat
from time import monotonic_ns, time_ns

from tender._native import lib
from tender.clock import VirtualClock
from tender.config import VirtualTime
from tender.errors import ConfigError, GuestFault, HostError
from tender.host import write_all
from tender.observe.output import Output
from tender.replay.calls import CallDispatcher, block_at, fields, how
from tender.replay.file import END, FAULT, IMAGE_MAX, Event, Header, encode_header

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from tender.config import Config
    from tender.cpu.vcpu import Exit
    from tender.hypercalls import Halt, Module
    from tender.image.file import ImageFile
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.outcome import Outcome
    from tender.replay.calls import Call
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
        write_all(fd, encode_header(header, size))
        for piece in image.contents():
            write_all(fd, piece)
    except OSError as error:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.ftruncate(fd, 0)
        raise HostError(
            f"Could not write record: {config.record}", "write", error.errno or 0
        ) from None


class Recorder(CallDispatcher):
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
        super().__init__(memory, modules, machine, clock, stop)
        self._output = Output(fd, "record", stop, warn)

    def handle(self, exit: Exit, call: Call) -> Halt | None:
        """As CallDispatcher has it."""
        try:
            halt = self.answer(exit)
        except GuestFault:
            self._write(call, FAULT, call.block)
            raise
        answered = block_at(self._memory, call.kind, call.gpa) or call.block
        self._write(call, 0, answered, self._data(call, answered))
        return halt

    def end(self, outcome: Outcome) -> Outcome:
        """Write the last event, how the run has ended: `outcome`, as it is."""
        text = how(outcome).encode()
        event = Event(END, 0, 0, b"", b"", 0, self._clock.cell.now_ns, len(text))
        self._output.write(event.encode() + text)
        return outcome

    def _data(self, call: Call, answered: bytes) -> bytes | memoryview:
        """What has come in with the answer."""
        if call.kind.data != "in":
            return b""
        before, after = call.asked, fields(call.kind, answered)
        if after.ret != lib.HVT_R_OK:
            return b""
        size = min(before.len, after.len) if "len" in call.kind.answers else before.len
        return self._memory.readable(before.data_gpa, size)

    def _write(
        self, call: Call, flags: int, answered: bytes, data: bytes | memoryview = b""
    ) -> None:
        self._clock.synchronise()
        now_ns = int(self._clock.cell.now_ns)
        event = Event(
            call.number, flags, call.gpa, call.block, answered, call.crc, now_ns, len(data)
        )
        self._output.write(event.encode() + data)
