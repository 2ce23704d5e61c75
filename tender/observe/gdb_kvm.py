"""The debugger's side of a vCPU of KVM: debug registers, int3, steps.

Breakpoints and watchpoints take the four debug registers as long as there are some; then
breakpoints are int3. Sources: Linux, Documentation/virt/kvm/api.rst, KVM_SET_GUEST_DEBUG; Intel SDM
volume 3, chapter 18. What is written of a KVM that emulates the guest was seen on one (PVM).
"""

from __future__ import annotations

from tender import kvm
from tender._native import lib
from tender.cpu import kvm_state
from tender.cpu.vcpu import Debug, Failure, Interrupted, NotSupported
from tender.cpu.x86_64 import BP
from tender.dataclass import replace
from tender.observe.gdb_int3 import Int3Debug

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.cpu.vcpu import Exit, Stops, Watchpoint

REGISTERS = 4  # DR0 to DR3
DR7_EXACT, DR7_ENABLE = 1 << 9, 2  # global, as all of these
ON_EXECUTION, ON_WRITE, ON_ACCESS = 0, 1, 3
_LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}


class KvmDebug(Int3Debug):
    """The interface is cpu.vcpu.DebugCpu; `memory` is the guest's, code too is writable."""

    def __init__(self, vcpu: kvm.Vcpu, memory: memoryview) -> None:
        super().__init__(vcpu, memory)
        self._vcpu = vcpu
        self._is_hardware = kvm.is_hardware()
        self._registers: list[Watchpoint | int] = []  # what DR0 to DR3 have: an int is a breakpoint
        self._applied: Any = None  # the last arguments of KVM_SET_GUEST_DEBUG

    def enable_debug(self) -> None:
        """Nothing has to be made ready."""

    def debug_state(self) -> Any:
        """As cpu.vcpu.DebugCpu has it."""
        return replace(self._vcpu.core_state(), fpu=kvm_state.get_fpu(self._vcpu))

    def pause(self) -> None:
        """It stands when it was interrupted."""
        self._take_traps()

    def set_stops(self, stops: Stops) -> None:
        """As cpu.vcpu.DebugCpu has it."""
        for watch in stops.watchpoints:
            self._check(watch)
        wanted: list[Watchpoint | int] = [*stops.watchpoints, *stops.hardware]
        if len(wanted) > REGISTERS:
            raise NotSupported(f"the CPU has {REGISTERS} hardware breakpoints and watchpoints")
        free = REGISTERS - len(wanted)
        self._registers = [*wanted, *stops.breakpoints[:free]]
        self._set_stops(stops, stops.breakpoints[free:])

    def _check(self, watch: Watchpoint) -> None:
        if not self._is_hardware:
            raise NotSupported("this KVM emulates the guest, and sees no watchpoints")
        if not watch.write:
            raise NotSupported("x86_64 has no watchpoints for reading only: use awatch")
        if watch.size not in _LENGTHS or watch.address % watch.size:
            raise NotSupported("x86_64 watches 1, 2, 4 or 8 bytes at an address that they divide")

    def _single_step(self) -> Exit:
        self._apply(lib.KVM_GUESTDBG_SINGLESTEP, watch_only=True)
        exit = self._vcpu.run()
        stopped = self._vcpu.debug_exit() if isinstance(exit, Failure) else None
        if stopped is None:
            return exit
        return self._watched(stopped[2]) or Debug("step")

    def _end_of_hypercall(self) -> Exit:
        """A hypercall is an exit from the middle of its instruction. KVM ends that in the next
        KVM_RUN, and then reports the step; an emulating KVM has ended it, and would do the next one
        as well. So KVM_RUN is to do no more than that, and whatever it says, the step is done."""
        self._vcpu.shared.immediate_exit = 1
        exit = self._vcpu.run()
        self._vcpu.shared.immediate_exit = 0
        if isinstance(exit, Interrupted) or self._vcpu.debug_exit() is not None:
            return Debug("step")
        return exit

    def _continue(self) -> Exit:
        self._apply(lib.KVM_GUESTDBG_USE_SW_BP if self._traps else 0)
        exit = self._vcpu.run()
        if not isinstance(exit, Failure):
            return exit
        stopped = self._vcpu.debug_exit()
        if stopped is None:
            # The KVM that emulates can't do an int3 that is to be reported, and says where.
            if exit.emulation and self._vcpu.instruction_pointer() in self._traps:
                return Debug("breakpoint")
            return exit
        exception, pc, dr6 = stopped
        if exception != BP:
            return self._watched(dr6) or Debug("breakpoint")
        if pc in self._traps:
            return Debug("breakpoint")
        self._apply(lib.KVM_GUESTDBG_USE_SW_BP | lib.KVM_GUESTDBG_INJECT_BP)
        return self._vcpu.run()  # an int3 of the guest's own, which its handler gets

    def _watched(self, dr6: int) -> Exit | None:
        for index, each in enumerate(self._registers):
            if dr6 >> index & 1 and not isinstance(each, int):
                return Debug("write", each.address)
        return None

    def _apply(self, control: int, *, watch_only: bool = False) -> None:
        debugreg = [0] * 8
        for index, each in enumerate(self._registers):
            if isinstance(each, int):
                address, kind, length = each, ON_EXECUTION, 0
                if watch_only:
                    continue
            else:
                address, length = each.address, _LENGTHS[each.size]
                kind = ON_ACCESS if each.read else ON_WRITE
            debugreg[index] = address
            debugreg[7] |= DR7_EXACT | DR7_ENABLE << 2 * index
            debugreg[7] |= (kind | length << 2) << 16 + 4 * index
        if debugreg[7]:
            control |= lib.KVM_GUESTDBG_USE_HW_BP
        control |= lib.KVM_GUESTDBG_ENABLE if control else 0
        if (control, debugreg) != self._applied:
            self._vcpu.set_guest_debug(control, debugreg)
            self._applied = control, debugreg
