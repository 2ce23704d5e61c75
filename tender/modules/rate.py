"""The rate limit of a device, as its handlers see it: when they may go on, and what they took.

tender/host/rate.h has the meaning; the engine uses the same struct.
"""

from __future__ import annotations

from time import monotonic_ns

from tender._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.backends import Rate
    from tender.stop import Stop

NS = 10**9
_NOTHING = ffi.new("struct pollset *")


class RateLimit:
    """One direction of a device. A new one has a whole burst to give."""

    def __init__(self, rate: Rate, stop: Stop) -> None:
        self._stop = stop
        self.cell = ffi.new("struct rate *")
        for bucket, per_second, burst in (
            (self.cell.bytes, rate.bytes, rate.burst_bytes),
            (self.cell.ops, rate.ops, rate.burst_ops),
        ):
            if per_second is not None:
                bucket.per_second = per_second
                bucket.burst_ns = NS if burst is None else burst * NS // per_second

    def due_ns(self) -> int:
        """When the next operation may be done, by time.monotonic_ns(); 0: now."""
        return lib.rate_due(self.cell, monotonic_ns())

    def note_wait(self) -> None:
        """An operation that could be done has to wait."""
        self.cell.has_waited = 1

    def take(self, size: int, counters: Any) -> None:
        """An operation that moves `size` bytes is done."""
        if lib.rate_take(self.cell, monotonic_ns(), size):
            counters.delays += 1

    def wait_and_take(self, size: int, counters: Any) -> None:
        """Wait until an operation may be done, and take what it moves."""
        while due_ns := self.due_ns():
            self.note_wait()
            self._stop.check()
            lib.host_poll(_NOTHING, due_ns)
        self.take(size, counters)
