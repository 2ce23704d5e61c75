"""A line of JSON for each hypercall, as it was asked and as it was answered.

Each line is written as soon as its call has ended. What is shown of a call is read from the guest's
memory with the checks of memory.py; the guest stands still meanwhile.
"""

from __future__ import annotations

import os
from json import dumps

from tender._native import lib
from tender.cpu.vcpu import Failure, Fault, Interrupted
from tender.dataclass import dataclass
from tender.errors import GuestFault
from tender.host import keep_descriptor
from tender.hypercalls import HYPERCALLS, decode
from tender.observe.output import Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.cleanup import Cleanup
    from tender.cpu.vcpu import Exit
    from tender.hypercalls import Hypercall
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.outcome import Outcome
    from tender.stop import Stop

VERSION = 1  # of the lines' format: the first one says it
TEXT_MAX, DATA_MAX = 256, 64  # bytes that are shown: of the console, of frames and sectors
NANOSECONDS = 1_000_000_000


class Trace:
    """An open trace: a hook on a vCPU's exits (loop.ExitHook).

    `guest` is its name, `now_ns` the time since the start; `devices` has the names of the guest's
    by handle.
    """

    def __init__(
        self,
        fd: int,
        guest: str,
        memory: GuestMemory,
        devices: dict[int, str],
        now_ns: Callable[[], int],
        stop: Stop,
        warn: Warn,
    ) -> None:
        self._output = Output(fd, "trace", stop, warn)
        self._memory = memory
        self._devices = devices
        self._now_ns = now_ns
        self._current: _Current | None = None  # the exit that is being handled
        self._output.write(f"{dumps({'trace': VERSION, 'guest': guest})}\n".encode())

    def before(self, exit: Exit) -> None:
        """Read what the guest asks for."""
        self._current = None if type(exit) in _NO_CALLS else self._asked(exit)

    def after(self, error: BaseException | None) -> None:
        """Write the line of what was asked, with the answer."""
        current, self._current = self._current, None
        if current is None:
            return
        if error is not None:
            kind = "fault" if isinstance(error, GuestFault) else "error"
            current.fields[kind] = str(error) or type(error).__name__
        elif current.call is not None:
            self._answered(current.call, current.gpa, current.fields)
        self._line(current.begun_ns, current.fields)

    def end(self, outcome: Outcome) -> None:
        """The last line: how the guest ended."""
        fields: dict[str, object] = {"end": outcome.reason, "status": outcome.status}
        fields["signal"] = outcome.signo or None
        fields["error"] = None if outcome.error is None else str(outcome.error)
        self._line(self._now_ns(), fields)

    def _line(self, begun_ns: int, fields: dict[str, object]) -> None:
        """Write `fields` of what began then and ends now; those that are None are left out."""
        if self._output.ended:
            return
        took_ns = self._now_ns() - begun_ns
        shown = {name: value for name, value in fields.items() if value is not None}
        times = f'"t": {_seconds(begun_ns)}, "took": {_seconds(took_ns)}'
        self._output.write(f"{{{times}, {dumps(shown)[1:]}\n".encode())

    def _asked(self, exit: Exit) -> _Current:
        """What is known before the call."""
        begun_ns = self._now_ns()
        try:
            number, gpa = decode(exit)
        except GuestFault:
            return _Current(begun_ns, {"call": None})
        call = HYPERCALLS.get(number)
        if call is None:
            return _Current(begun_ns, {"call": number})
        fields: dict[str, object] = {"call": call.name}
        block = self._block(call, gpa)
        if block is None:
            return _Current(begun_ns, {**fields, "gpa": gpa})
        for name in call.asks:
            fields[name] = getattr(block, name)
            if name == "handle":
                fields["device"] = self._devices.get(block.handle)
        if call.data == "text":
            text = self._peek(block.data_gpa, block.len, TEXT_MAX)
            fields["text"] = None if text is None else text.decode(errors="replace")
        elif call.data == "out":
            fields["data"] = self._hex(block.data_gpa, block.len)
        return _Current(begun_ns, fields, call, gpa)

    def _answered(self, call: Hypercall, gpa: int, fields: dict[str, object]) -> None:
        block = self._block(call, gpa)
        for name in call.answers:
            shown = "received" if name in fields else name  # NET_READ's len is both
            fields[shown] = getattr(block, name)
        if call.data == "in" and fields["ret"] == lib.HVT_R_OK:
            length = fields.get("received", fields["len"])
            fields["data"] = self._hex(fields["data_gpa"], length)

    def _block(self, call: Hypercall, gpa: int) -> Any:
        try:
            return self._memory.at(call.layout, gpa, out=False)
        except GuestFault:  # the call itself will say so
            return None

    def _peek(self, gpa: int, length: int, most: int) -> bytes | None:
        try:
            return bytes(self._memory.readable(gpa, min(length, most)))
        except GuestFault:
            return None

    def _hex(self, gpa: Any, length: Any) -> str | None:
        data = self._peek(gpa, length, DATA_MAX)
        return None if data is None else data.hex()


_NO_CALLS = (Interrupted, Failure, Fault)


@dataclass
class _Current:
    """An exit that is being handled: when it came, what its line shows, and its argument block."""

    begun_ns: int
    fields: dict[str, object]
    call: Hypercall | None = None  # None where there is no block to read the answer from
    gpa: int = 0


def _seconds(ns: int) -> str:
    return f"{ns // NANOSECONDS}.{ns % NANOSECONDS // 1000:06}"


def keep(fd: int, cleanup: Cleanup) -> int:
    """A copy of the descriptor that a trace is written to.

    To be made before the tender opens anything: see modules.keep_descriptors.
    """
    kept = keep_descriptor(fd, f"Could not open trace: {fd}")
    cleanup.callback(lambda: os.close(kept))
    return kept
