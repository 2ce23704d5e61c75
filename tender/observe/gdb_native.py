"""The debugger's side of the native CPU: int3, and the trap flag for steps.

The guest runs beside the tender, so a pause is a signal to its process, which may come after what
the guest does by itself.
"""

from __future__ import annotations

import tender.cpu.xsave  # noqa: F401 - the native CPU needs it, and after lockdown it is too late
from tender.cpu.vcpu import Debug, Interrupted, NotSupported, Stops
from tender.observe.gdb_int3 import Int3Debug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.boot.x86_64 import State
    from tender.cpu.native import NativeCpu
    from tender.cpu.vcpu import Exit


class NativeDebug(Int3Debug):
    """The interface is cpu.vcpu.DebugCpu; `memory` is the guest's, code too is writable."""

    def __init__(self, vcpu: NativeCpu, memory: memoryview) -> None:
        super().__init__(vcpu, memory)
        self._vcpu = vcpu
        self._waiting: Exit | None = None  # what the guest did before it was paused
        self._pause_is_late = False

    def enable_debug(self) -> None:
        """Traps of the debugger's come back as exits."""
        self._vcpu.debugged = True

    def debug_state(self) -> State:
        """As cpu.vcpu.DebugCpu has it."""
        return self._vcpu.get_state()

    def set_stops(self, stops: Stops) -> None:
        """Any number of breakpoints."""
        if stops.watchpoints:
            raise NotSupported("the native CPU has no watchpoints: use --cpu=soft")
        self._set_stops(stops, tuple({*stops.breakpoints, *stops.hardware}))

    def pause(self) -> None:
        """Let the guest stand, which may be running."""
        if self._vcpu.is_running:
            self._vcpu.pause()
            exit = self._vcpu.run()
            while isinstance(exit, Interrupted):
                exit = self._vcpu.run()
            self._pause_is_late = exit != Debug("pause")
            if not isinstance(exit, Debug):
                self._waiting = exit
        self._take_traps()

    def _single_step(self) -> Exit:
        self._vcpu.single_step = True
        try:
            return self._run()
        finally:
            self._vcpu.single_step = self._vcpu.is_running

    def _continue(self) -> Exit:
        self._vcpu.single_step = False
        self._vcpu.traps = frozenset(self._traps)
        return self._run()

    def _run(self) -> Exit:
        exit, self._waiting = self._waiting, None
        if exit is not None:
            return exit
        exit = self._vcpu.run()
        if self._pause_is_late and exit == Debug("pause"):
            self._pause_is_late = False
            exit = self._vcpu.run()
        return exit
