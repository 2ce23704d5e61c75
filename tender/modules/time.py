"""WALLTIME: the host's clock, UTC."""

from __future__ import annotations

from time import time_ns

from tender._abi import lib
from tender.memory import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.hypercalls import Handler
    from tender.memory import GuestMemory

_WALLTIME = Layout("hvt_walltime")


class Time:
    """The wall clock; the monotonic one is the guest's TSC and needs no hypercall."""

    def hypercalls(self) -> dict[int, Handler]:
        return {lib.HVT_HYPERCALL_WALLTIME: self.walltime}

    def walltime(self, memory: GuestMemory, gpa: int) -> None:
        memory.at(_WALLTIME, gpa).nsecs = time_ns()
