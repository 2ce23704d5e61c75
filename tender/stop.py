"""Stop requests, which reach a guest whatever it is doing.

The rule here: a stop request is never lost. stop.h says how a signal that arrives in the
instant before a thread blocks is kept from being slept over.
"""

from __future__ import annotations

import posix as os
from _thread import allocate_lock

from tender._native import ffi, lib
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Stopped(Exception):
    """Raised where a hypercall was interrupted by a stop request."""


class Stop:
    """The stop request of one guest. The thread that runs the guest enters it."""

    def __init__(self) -> None:
        self.cell = ffi.new("struct stop *")
        self._entered = False
        # Called where the guest was interrupted, or a hypercall of it was: for those who want it.
        self.on_interrupt: list[Callable[[], None]] = []
        self.check_cpu: Callable[[], None] | None = None  # raises where the CPU can't go on
        self._lock = allocate_lock()  # a request must not touch a vCPU that is being closed

    @property
    def requested(self) -> bool:
        """Whether the guest is to end."""
        return bool(self.cell.requested)

    @property
    def signo(self) -> int:
        """The signal that asked for the stop, 0 when a program did."""
        return int(self.cell.signo)

    def enter(self) -> None:
        """From here on, this thread is the one that is interrupted."""
        if lib.stop_enter(self.cell):
            raise HostError("cannot handle signals", "sigaction", ffi.errno)
        self._entered = True

    def leave(self) -> None:
        """This thread is not to be interrupted any more."""
        with self._lock:
            self._entered = False
            lib.stop_enter(ffi.NULL)

    def watch(self, immediate_exit: Any) -> None:
        """`immediate_exit`: the address of the vCPU's byte of that name, or NULL."""
        with self._lock:
            self.cell.immediate_exit = int(ffi.cast("uintptr_t", immediate_exit))

    def watch_kick(self, kick: int, of: int) -> None:
        """`kick`: the address of the C function that stops the software CPU at `of`, or 0."""
        lib.stop_watch_kick(self.cell, kick, of)

    def request(self) -> None:
        """Ask once, from any thread. Repeat it until the guest has ended: see stop.h."""
        with self._lock:
            self.cell.requested = 1
            if self._entered:
                lib.stop_request(self.cell)

    def check(self) -> None:
        """Raise Stopped if the guest is to end."""
        if self.cell.requested:
            raise Stopped
        if self.check_cpu is not None:
            self.check_cpu()
        for call in self.on_interrupt:
            call()

    def check_request(self) -> None:
        """The same, for whoever is what `on_interrupt` calls."""
        if self.cell.requested:
            raise Stopped


def end_with(parent: int) -> None:
    """Let the kernel end this process with `parent`, its own; a change of credentials undoes that.

    Where that has ended already, this is the end.
    """
    if lib.host_end_with_parent() or os.getppid() != parent:
        os._exit(1)


def on_termination_signals(*, interrupt: bool) -> None:
    """SIGTERM stops the guest of this thread from here on, and SIGINT too with `interrupt`."""
    if lib.stop_on_termination(interrupt):
        raise HostError("cannot handle signals", "sigaction", ffi.errno)


def default_signals() -> None:
    """SIGINT and SIGTERM end the process from here on."""
    lib.stop_default_actions()
