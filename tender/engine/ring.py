"""The network ring: its region in guest memory, its kick, its thread.

The rule here: the ring is an offer beside the hypercalls, and made only where it helps: the guest
waits for each answer on its own CPU, so the thread that gives it needs another one.
Source: the hvt target's network ring (host feature bit 0).
"""

from __future__ import annotations

import os

from tender._native import ffi, lib
from tender.errors import GuestFault, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.cleanup import Cleanup
    from tender.image.elf import Image
    from tender.memory import GuestMemory
    from tender.modules.net import Net
    from tender.stop import Stop

SPINS = 2000  # some 50 us of looking again before the thread sleeps
FILTER_INSTRUCTION = 8  # bytes
CPUS_NEEDED = 2  # the guest's own, and the ring's


def is_worth_it(wanted: bool | None, fast_cpu: bool) -> bool:
    """Whether to offer a ring: as the user wants, else where it is faster than hypercalls.

    A guest that reads waits for the answer in a loop. On a single CPU that keeps the ring's
    thread from running, and on a CPU that is emulated (not `fast_cpu`) the loop itself costs more
    than a hypercall: docs/performance.md has the figures.
    """
    if wanted is None:
        return fast_cpu and len(os.sched_getaffinity(0)) >= CPUS_NEEDED
    return wanted


def region(mem_bytes: int, image: Image) -> int:
    """Bytes to take from the top of guest memory for the ring; 0: it can't have one.

    That is a guest that is too small, or one of more protected parts than the thread looks through.
    """
    rest = mem_bytes - lib.HVT_RING_REGION
    fits = rest >= max(lib.HVT_RING_REGION, image.memory_end)
    return lib.HVT_RING_REGION if fits and len(image.segments) <= lib.ENGINE_RANGES else 0


def open_kick(signal_on_out: Callable[[int, int], None], cleanup: Cleanup) -> int:
    """The eventfd that KVM signals when the guest kicks; the argument is kvm.Vm's method."""
    kick_fd = os.eventfd(0, os.EFD_CLOEXEC)
    cleanup.callback(lambda: os.close(kick_fd))
    signal_on_out(kick_fd, lib.HVT_RING_KICK_PIO)
    return kick_fd


class Ring:
    """A ring that is served from its `start` until `cleanup` ends it.

    `engine` is the struct engine that answers beside it, `kick_fd` an eventfd (open_kick).
    """

    def __init__(
        self,
        kick_fd: int,
        memory: GuestMemory,
        engine: Any,
        net: Net,
        stop: Stop,
        cleanup: Cleanup,
    ) -> None:
        self._net = net
        self._engine, self._stop = engine, stop  # the thread works on their memory
        self.cell = ffi.new("struct engine_ring *")
        self.cell.engine = engine
        self.cell.stop = stop.cell
        self.cell.kick_fd = kick_fd
        self.cell.gpa = memory.size
        self.cell.spins = SPINS
        self._cleanup = cleanup
        self._filter: Any = None

    def start(self, filter: bytes = b"") -> None:
        """Start the thread; `filter`: the system calls that it may make (struct sock_filter[])."""
        self._filter = ffi.from_buffer(filter)  # the thread installs it after ring_start() returns
        self.cell.filter = self._filter if filter else ffi.NULL
        self.cell.filter_length = len(filter) // FILTER_INSTRUCTION
        error = lib.ring_start(self.cell)
        if error:
            raise HostError("cannot start the thread of the network ring", "clone", error)
        if not filter:  # under one it can't even end by itself: it goes with the process
            self._cleanup.callback(lambda: lib.ring_end(self.cell))

    def report_error(self) -> None:
        """Warn of a failure of the host, if the thread has met one since the last time."""
        error = self.cell.host_errno
        if error:
            device = self._net.devices[self.cell.host_errno_handle]
            device.warn_once(os.strerror(error))
            self.cell.host_errno = 0

    def fault(self) -> GuestFault | None:
        """What the guest did with the ring that ends it."""
        gpa, size = self.cell.fault_gpa, self.cell.fault_len
        if self.cell.fault == lib.RING_ADDRESS:
            return GuestFault(f"Invalid guest access: ring gpa={gpa:#x}, len={size:#x}", gpa, size)
        if self.cell.fault == lib.RING_INDEX:
            return GuestFault(f"Invalid guest access: ring index {size} entries ahead", gpa, size)
        return None
