"""WALLTIME: the host's clock or a virtual one, UTC."""

from __future__ import annotations

from tender._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.clock import HostClock
    from tender.hypercalls import Handler
    from tender.memory import GuestMemory


class Time:
    """The wall clock; the monotonic one is the guest's TSC and needs no hypercall."""

    def __init__(self, clock: HostClock) -> None:
        self._wall_ns = clock.wall_ns

    def hypercalls(self) -> dict[int, Handler]:
        """The handlers by hypercall number."""
        return {lib.HVT_HYPERCALL_WALLTIME: self.walltime}

    def walltime(self, _memory: GuestMemory, block: Any) -> None:
        """WALLTIME: ns since the epoch, UTC."""
        block.nsecs = self._wall_ns()
