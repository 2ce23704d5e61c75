"""A line of JSON for each hypercall, as it was asked and as it was answered.

The rule here: the file is opened before the guest starts and only written to after that: each line
in one write(2) as soon as its call has ended, so that none is missing however the guest, or the
tender, ends. Trouble with the file ends the trace and not the guest. What is shown of a call is
read from the guest's memory with the checks of memory.py; the guest stands still meanwhile.
"""

from __future__ import annotations

import errno
import os
from json import dumps

from tender._abi import lib
from tender._host import ffi as host
from tender._host import lib as hostlib
from tender.errors import ConfigError, GuestFault, HostError
from tender.hypercalls import decode
from tender.memory import Layout
from tender.modules import Trouble, keep_descriptor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.cleanup import Cleanup
    from tender.cpu.vcpu import Exit
    from tender.hypercalls import Dispatcher, Halt
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.outcome import Outcome
    from tender.stop import Stop

TEXT_MAX, DATA_MAX = 256, 64  # bytes that are shown: of the console, of frames and sectors
NANOSECONDS = 1_000_000_000
_WAIT_MS = 1000


class Call:
    """How a hypercall is written: fields of its block, asked and answered; which data, and when."""

    __slots__ = ("answered", "asked", "layout", "name", "shows")

    def __init__(
        self, name: str, layout: str, asked: str, answered: str = "", shows: str = ""
    ) -> None:
        self.name = name
        self.layout = Layout(layout)
        self.asked = asked.split()
        self.answered = answered.split()
        self.shows = shows  # "text", "out" (data that leaves the guest) or "in"


CALLS = {
    lib.HVT_HYPERCALL_WALLTIME: Call("WALLTIME", "hvt_walltime", "", "nsecs"),
    lib.HVT_HYPERCALL_PUTS: Call("PUTS", "hvt_puts", "data_gpa len", "", "text"),
    lib.HVT_HYPERCALL_POLL: Call("POLL", "hvt_poll", "timeout_nsecs", "ready_set ret"),
    lib.HVT_HYPERCALL_BLOCK_WRITE: Call(
        "BLOCK_WRITE", "hvt_block_io", "handle offset data_gpa len", "ret", "out"
    ),
    lib.HVT_HYPERCALL_BLOCK_READ: Call(
        "BLOCK_READ", "hvt_block_io", "handle offset data_gpa len", "ret", "in"
    ),
    lib.HVT_HYPERCALL_NET_WRITE: Call(
        "NET_WRITE", "hvt_net_io", "handle data_gpa len", "ret", "out"
    ),
    lib.HVT_HYPERCALL_NET_READ: Call(
        "NET_READ", "hvt_net_io", "handle data_gpa len", "len ret", "in"
    ),
    lib.HVT_HYPERCALL_HALT: Call("HALT", "hvt_halt", "exit_status cookie_gpa"),
}


class Trace:
    """An open trace. `now_ns` is the time since the start."""

    def __init__(self, fd: int, stop: Stop, warn: Warn, now_ns: Callable[[], int]) -> None:
        self._fd = fd
        self._stop = stop
        self._trouble = Trouble("trace", warn)
        self._ended = False
        self.now_ns = now_ns

    def line(self, begun_ns: int, fields: dict[str, object]) -> None:
        """Write `fields` of what began then and ends now; those that are None are left out."""
        if self._ended:
            return
        took_ns = self.now_ns() - begun_ns
        shown = {name: value for name, value in fields.items() if value is not None}
        times = f'"t": {_seconds(begun_ns)}, "took": {_seconds(took_ns)}'
        self._write(f"{{{times}, {dumps(shown)[1:]}\n".encode())

    def _write(self, data: bytes) -> None:
        while data:
            written = hostlib.host_write(self._fd, data, len(data))
            if written >= 0:
                data = data[written:]
            elif not self._go_on(host.errno):
                self._ended = True
                return

    def _go_on(self, error: int) -> bool:
        if error in (errno.EINTR, errno.EAGAIN):
            if self._stop.requested:
                return False  # nobody takes it, and the guest is to end
            if error == errno.EAGAIN:
                hostlib.host_events(self._fd, hostlib.POLLOUT, _WAIT_MS)
            return True
        self._trouble.warn_once(f"it ends here: {HostError('write', 'write', error)}")
        return False

    def end(self, outcome: Outcome) -> None:
        """The last line: how the guest ended."""
        fields: dict[str, object] = {"end": outcome.reason, "status": outcome.status}
        fields["signal"] = outcome.signo or None
        fields["error"] = None if outcome.error is None else str(outcome.error)
        self.line(self.now_ns(), fields)


class Traced:
    """The face of a Dispatcher, and a line for each call that it answers."""

    def __init__(
        self, calls: Dispatcher, memory: GuestMemory, trace: Trace, devices: dict[int, str]
    ) -> None:
        self.mmio_base = calls.mmio_base
        self._calls = calls
        self._memory = memory
        self._trace = trace
        self._devices = devices  # their names, by handle

    def dispatch(self, exit: Exit) -> Halt | None:
        """As Dispatcher.dispatch, and a line about it."""
        begun_ns = self._trace.now_ns()
        fields, call, gpa = self._asked(exit)
        try:
            halt = self._calls.dispatch(exit)
        except BaseException as error:
            kind = "fault" if isinstance(error, GuestFault) else "error"
            fields[kind] = str(error) or type(error).__name__
            self._trace.line(begun_ns, fields)
            raise
        if call is not None:
            self._answered(call, gpa, fields)
        self._trace.line(begun_ns, fields)
        return halt

    def _asked(self, exit: Exit) -> tuple[dict[str, object], Call | None, int]:
        """What is known before the call; no Call where the exit is none."""
        try:
            number, gpa = decode(exit)
        except GuestFault:
            return {"call": None}, None, 0
        call = CALLS.get(number)
        if call is None:
            return {"call": number}, None, gpa
        fields: dict[str, object] = {"call": call.name}
        block = self._block(call, gpa)
        if block is None:
            fields["gpa"] = gpa
            return fields, None, gpa
        for name in call.asked:
            fields[name] = getattr(block, name)
            if name == "handle":
                fields["device"] = self._devices.get(block.handle)
        if call.shows == "text":
            text = self._peek(block.data_gpa, block.len, TEXT_MAX)
            fields["text"] = None if text is None else text.decode(errors="replace")
        elif call.shows == "out":
            fields["data"] = self._hex(block.data_gpa, block.len)
        return fields, call, gpa

    def _answered(self, call: Call, gpa: int, fields: dict[str, object]) -> None:
        block = self._block(call, gpa)
        for name in call.answered:
            shown = "received" if name in fields else name  # NET_READ's len is both
            fields[shown] = getattr(block, name)
        if call.shows == "in" and fields["ret"] == lib.HVT_R_OK:
            length = fields.get("received", fields["len"])
            fields["data"] = self._hex(fields["data_gpa"], length)

    def _block(self, call: Call, gpa: int) -> Any:
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


def _seconds(ns: int) -> str:
    return f"{ns // NANOSECONDS}.{ns % NANOSECONDS // 1000:06}"


def keep(fd: int, cleanup: Cleanup) -> int:
    """A copy of the descriptor that a trace is written to.

    To be made before the tender opens anything: see modules.keep_descriptors.
    """
    kept = keep_descriptor(fd, f"Could not open trace: {fd}")
    cleanup.callback(lambda: os.close(kept))
    return kept


def open_file(path: str, cleanup: Cleanup) -> int:
    """Open the file that a trace is written to."""
    fd = _open(path)
    cleanup.callback(lambda: os.close(fd))
    return fd


def _open(path: str) -> int:
    # Not blocking while it is opened: a FIFO that nobody reads must not hang the command.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o666)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        hint = " (nobody reads it)" if getattr(error, "errno", 0) == errno.ENXIO else ""
        raise ConfigError(f"Could not open trace: {path}: {reason}{hint}") from None
    os.set_blocking(fd, True)
    return fd
