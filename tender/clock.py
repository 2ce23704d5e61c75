"""The guest's time: the host's, or a virtual one that goes on only when it is read.

The rule here: all the time that a guest sees comes from one clock, its TSC included, so that its
clocks agree. A virtual one depends on nothing but what the guest does.
"""

from __future__ import annotations

from time import monotonic_ns, time_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.config import VirtualTime

_U64 = 1 << 64


class HostClock:
    """The host's clocks."""

    virtual = False
    _cell: Any = None

    def __init__(self) -> None:
        self.wall_ns: Callable[[], int] = time_ns  # nanoseconds since the epoch, UTC
        self._begun_ns = monotonic_ns()

    @property
    def cell(self) -> Any:
        """The struct soft_clock that the TSC of a CPU in software is read from (soft.h)."""
        if self._cell is None:
            from tender._soft import ffi  # not by a run on KVM

            self._cell = ffi.new("struct soft_clock *")
        return self._cell

    def elapsed_ns(self) -> int:
        """Nanoseconds since the start, for observers: not a reading of a virtual clock."""
        return monotonic_ns() - self._begun_ns

    def observed_ns(self) -> int:
        """Nanoseconds since the epoch, for observers."""
        return time_ns()

    def advance(self, ns: int) -> None:
        """Let `ns` nanoseconds pass at once, which real time can't."""
        raise NotImplementedError


class VirtualClock(HostClock):
    """A clock that starts at an instant, advances by a tick per reading, and can be moved on."""

    virtual = True

    def __init__(self, time: VirtualTime) -> None:
        super().__init__()
        self.wall_ns = self._read
        self.start_ns = time.start_ns
        self.cell.tick_ns = time.tick_ns
        self.cell.random = time.start_ns

    def _read(self) -> int:
        from tender._soft import lib

        return (self.start_ns + lib.soft_now_ns(self.cell)) % _U64

    def elapsed_ns(self) -> int:
        """The guest's time since it started, in ns."""
        return int(self.cell.now_ns)

    def observed_ns(self) -> int:
        """As HostClock has it."""
        return (self.start_ns + self.elapsed_ns()) % _U64

    def advance(self, ns: int) -> None:
        """Let time go on without the guest."""
        self.cell.now_ns = (self.cell.now_ns + ns) % _U64

    def synchronise(self) -> None:
        """The guest makes a hypercall: no other time is to be followed."""
