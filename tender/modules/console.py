"""PUTS: the guest's console is a descriptor, standard output for a command.

The rule here: the console never ends a guest for what the host can't store; but where its reader
is gone for good (EPIPE), nobody is left to run the guest for. A limit is for the host's disk: it
counts in the host's time, whatever the guest's is, and what it drops are whole lines.
"""

from __future__ import annotations

import errno
from time import monotonic_ns

from tender._native import ffi, lib
from tender.errors import HostError, setting
from tender.modules import STEP, DeviceErrors, new_counters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.hypercalls import Handler
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.stop import Stop

_SECOND_NS = 1_000_000_000
_BURST_MIN = 4096  # bytes that come through at once, however low the rate: a banner, a trap
_NEWLINE = 0x0A
_WAIT_MS = 1000  # at a time, until it can be written to; a stop request ends the wait


class Allowance:
    """How much may be written now: `rate` bytes per second, saved up for a second at most."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._most = max(rate, _BURST_MIN) * _SECOND_NS
        self._room = self._most  # in byte-nanoseconds, so that nothing is lost by rounding
        self._at_ns = monotonic_ns()

    def take(self, wanted: int) -> int:
        """How many of `wanted` bytes may be written now; they are used up."""
        now_ns = monotonic_ns()
        self._room = min(self._most, self._room + (now_ns - self._at_ns) * self.rate)
        self._at_ns = now_ns
        taken = min(wanted, self._room // _SECOND_NS)
        self._room -= taken * _SECOND_NS
        return taken

    def is_saved_up(self) -> bool:
        """Whether a whole second's worth may be written."""
        self.take(0)
        return self._room == self._most

    def give_back(self, unused: int) -> None:
        """Of what was taken, so many bytes are not written."""
        self._room += unused * _SECOND_NS


class Console:
    """Writes what the guest says to `fd`, and no more than `limit` bytes per second of it."""

    def __init__(self, fd: int, stop: Stop, warn: Warn, limit: int | None = None) -> None:
        self.fd = fd
        self.allowance = None if limit is None else Allowance(limit)
        self.counters = new_counters()
        self.begun = 0  # bytes of this call that the engine has written
        self.dropped_bytes = 0  # by the limit
        self._in_line = False  # what was written last is no whole line
        self._skipping = False  # the end of a line of which the rest was dropped is to come
        self._stop = stop
        self._warn = warn
        self._errors = DeviceErrors("console", warn)

    def hypercalls(self) -> dict[int, Handler]:
        """The handlers by hypercall number."""
        return {lib.HVT_HYPERCALL_PUTS: self.puts}

    def puts(self, memory: GuestMemory, block: Any) -> None:
        """PUTS: write `length` bytes at `data` to the console."""
        data_gpa, length = block.data_gpa, block.len
        memory.readable(data_gpa, length)
        self.counters.calls += 1
        self.counters.bytes += length
        begun, self.begun = self.begun, 0
        data_gpa, length = data_gpa + begun, max(0, length - begun)  # the block may have changed
        if self.allowance is not None:
            data = memory.readable(data_gpa, length)
            start, end = self._allowed(self.allowance, data)
            self._note_dropped(self.allowance, length - (end - start))
            data_gpa, length = data_gpa + start, end - start
        while length:
            written = lib.host_write(self.fd, memory.address(data_gpa), min(length, STEP))
            if written < 0:
                if not self._go_on(ffi.errno):
                    return
                continue
            self._stop.check()
            data_gpa += written
            length -= written

    def _allowed(self, allowance: Allowance, data: memoryview) -> tuple[int, int]:
        """Which part of `data` may be written now, from and to: whole lines, where there are any.

        The rest of a line that was begun in an earlier call may have to go; it is ended here. A
        line that does not end is written again once a second's worth is saved up.
        """
        start = 0
        if self._skipping:
            start = self._line_end(data)
            self._skipping = not start and not allowance.is_saved_up()
            if self._skipping:
                return 0, 0
        taken = allowance.take(len(data) - start)
        end = start + taken
        if end < len(data):
            lines = bytes(data[start:end]).rfind(b"\n") + 1
            allowance.give_back(taken - lines)
            end = start + lines
            self._skipping = data[-1] != _NEWLINE
            if not lines and self._in_line:
                lib.host_write(self.fd, b"\n", 1)
                self._in_line = False
        if start < end:
            self._in_line = data[end - 1] != _NEWLINE
        return start, end

    def _line_end(self, data: memoryview) -> int:
        """What follows the first end of a line; 0: there is none."""
        for at in range(0, len(data), STEP):
            self._stop.check()
            found = bytes(data[at : at + STEP]).find(b"\n")
            if found >= 0:
                return at + found + 1
        return 0

    def _note_dropped(self, allowance: Allowance, count: int) -> None:
        if count:
            self.dropped_bytes += count
            self.counters.drops += 1
            limit = setting("--console-limit", "console_limit")
            self._errors.warn_once(
                f"output beyond {allowance.rate} bytes per second is dropped ({limit})"
            )

    def report_dropped(self) -> None:
        """Warn of how much was dropped, once the guest has ended."""
        if self.dropped_bytes:
            limit = setting("--console-limit", "console_limit")
            self._warn(f"console: {self.dropped_bytes} bytes of output were dropped ({limit})")

    def _go_on(self, error: int) -> bool:
        """What to do when a write failed: True to try again, False to drop the output."""
        if error == errno.EINTR:
            self._stop.check()
            return True
        if error == errno.EAGAIN:
            self._wait_for_room()
            return True
        if error == errno.EPIPE:
            raise HostError("console: nobody reads it any more", "write", error)
        self.counters.drops += 1
        self._errors.report(self.counters, f"output lost: {HostError('write', 'write', error)}")
        return False

    def _wait_for_room(self) -> None:
        # Another process that shares the descriptor can have made it non-blocking.
        lib.host_events(self.fd, lib.POLLOUT, _WAIT_MS)
        self._stop.check()
