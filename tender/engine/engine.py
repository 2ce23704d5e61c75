"""The Python side of engine.c, which answers most hypercalls without the interpreter.

It answers them as tender/modules/ would, and counts them in the same counters.
"""

from __future__ import annotations

from tender._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.boot.x86_64 import State
    from tender.cpu.vcpu import Exit
    from tender.engine.ring import Ring
    from tender.kvm import Vcpu
    from tender.memory import GuestMemory
    from tender.modules.block import Block
    from tender.modules.console import Console
    from tender.modules.net import Net
    from tender.modules.poll import Poll


class Engine:
    """A struct engine, filled in from the modules of one machine."""

    def __init__(
        self, memory: GuestMemory, console: Console, poll: Poll, block: Block, net: Net
    ) -> None:
        self._console, self._poll = console, poll
        self.cell = ffi.new("struct engine *")
        self.cell.vcpu_fd = -1
        self.cell.memory = ffi.cast("uint8_t *", memory.base)
        self.cell.mem_size = memory.size
        self._set_ranges(memory)
        self._set_devices(block, net)
        self.cell.console_fd = console.fd if console.allowance is None else -1
        self.cell.console = console.counters
        self.cell.poll = poll.counters
        if poll.in_engine:
            self.cell.pollset = poll.pollset

    def _set_ranges(self, memory: GuestMemory) -> None:
        ranges = memory.protected
        self.cell.protected_end = max((end for _, end, _ in ranges), default=0)
        if len(ranges) <= lib.ENGINE_RANGES:
            for index, (start, end, readable) in enumerate(ranges):
                self.cell.ranges[index] = {"start": start, "end": end, "readable": readable}
            self.cell.range_count = len(ranges)

    def _set_devices(self, block: Block, net: Net) -> None:
        for handle, disk in block.devices.items():
            if not disk.in_engine:
                continue
            self.cell.devices[handle] = {
                "kind": lib.ENGINE_BLOCK,
                "fd": disk.fd,
                "writable": not disk.readonly,
                "capacity": disk.capacity,
                "in": disk.counters,
            }
        for handle, port in net.devices.items():
            if not port.in_engine:
                continue
            self.cell.devices[handle] = {
                "kind": lib.ENGINE_NET,
                "fd": port.fd,
                "frame_max": port.frame_max,
                "in": port.received,
                "out": port.sent,
            }

    def answer(self, number: int, gpa: int) -> bool:
        """Make one hypercall, without a CPU; False: it is Python's, and nothing has happened."""
        answered = bool(lib.engine_answer(self.cell, number, gpa))
        self.hand_over()
        return answered

    def hand_over(self) -> None:
        """Python's handlers go on where a call was begun."""
        self._console.begun = self.cell.console_done
        self._poll.begun = self.cell.poll_deadline_ns


class EngineVcpu:
    """`vcpu` (the interface is cpu.vcpu.Vcpu), whose plain hypercalls `engine` answers."""

    def __init__(self, vcpu: Vcpu, engine: Engine, ring: Ring | None = None) -> None:
        self._vcpu = vcpu
        self._engine = engine
        self._ring = ring
        self._cell = engine.cell
        self._cell.vcpu_fd = vcpu.fd
        self._cell.run = vcpu.shared
        self.fds = vcpu.fds
        self.cpu_cycle_freq, self.pc_name = vcpu.cpu_cycle_freq, vcpu.pc_name

    def run(self) -> Exit:
        """Run the guest until an exit that the engine does not answer, as kvm.Vcpu.run gives it."""
        error = lib.engine_run(self._cell)
        self._engine.hand_over()
        if self._ring:
            self._ring.report_error()
        return self._vcpu.exit(error)

    def get_state(self) -> State:
        """As kvm.Vcpu has it."""
        return self._vcpu.get_state()

    def core_state(self) -> State:
        """As kvm.Vcpu has it."""
        return self._vcpu.core_state()

    def set_state(self, state: State) -> None:
        """As kvm.Vcpu has it."""
        self._vcpu.set_state(state)

    def instruction_pointer(self) -> int:
        """As kvm.Vcpu has it."""
        return self._vcpu.instruction_pointer()
