"""WALLTIME: the host's clock or a virtual one, UTC."""

from __future__ import annotations

from tender._abi import lib
from tender.memory import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.clock import HostClock
    from tender.hypercalls import Handler
    from tender.memory import GuestMemory

_WALLTIME = Layout("hvt_walltime")


class Time:
    """The wall clock; the monotonic one is the guest's TSC and needs no hypercall."""

    def __init__(self, clock: HostClock) -> None:
        self._wall_ns = clock.wall_ns

    def hypercalls(self) -> dict[int, Handler]:
        """The handlers by hypercall number."""
        return {lib.HVT_HYPERCALL_WALLTIME: self.walltime}

    def walltime(self, memory: GuestMemory, gpa: int) -> None:
        """WALLTIME: ns since the epoch, UTC."""
        memory.at(_WALLTIME, gpa).nsecs = self._wall_ns()
