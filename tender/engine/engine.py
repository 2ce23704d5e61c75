"""The Python side of engine.c, which answers most hypercalls without the interpreter.

It answers them as tender/modules/ would, and counts them in the same counters.
"""

from __future__ import annotations

from tender._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tender.cleanup import Cleanup
    from tender.cpu.vcpu import Vcpu
    from tender.devices import Devices
    from tender.engine.ring import Ring
    from tender.memory import GuestMemory
    from tender.modules.block import Block
    from tender.modules.console import Console
    from tender.modules.net import Net
    from tender.modules.poll import Poll
    from tender.stop import Stop


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
                "rate_in": disk.rate.cell if disk.rate else ffi.NULL,
            }
        for handle, port in net.devices.items():
            self.cell.devices[handle] = {
                "kind": lib.ENGINE_NET,
                "fd": port.fd,
                "frame_max": port.frame_max,
                "in": port.received,
                "out": port.sent,
                "pcap": port.pcap.cell if port.pcap else ffi.NULL,
                "rate_in": port.rate_in.cell if port.rate_in else ffi.NULL,
                "rate_out": port.rate_out.cell if port.rate_out else ffi.NULL,
            }
        self._pcaps = [port.pcap for port in net.devices.values() if port.pcap]

    def give_back_copies(self, stop: Stop) -> None:
        """Have a child's only thread give back its copies once, when the guest is idle."""
        self.cell.gives_back = stop.cell

    def answer(self, number: int, gpa: int) -> bool:
        """Make one hypercall, without a CPU; False: it is Python's, and nothing has happened."""
        answered = bool(lib.engine_answer(self.cell, number, gpa))
        self.hand_over()
        return answered

    def hand_over(self) -> None:
        """Python's handlers go on where a call was begun; what the engine has met is reported."""
        self.cell.has_report = 0
        for pcap in self._pcaps:
            pcap.report()
        self._console.begun = self.cell.console_done
        self._poll.begun = self.cell.poll_deadline_ns


def start(
    fds: Mapping[str, int],
    memory: GuestMemory,
    console: Console,
    poll: Poll,
    devices: Devices,
    vcpu: Vcpu[Any],
    stop: Stop,
    cleanup: Cleanup,
    *,
    copies: bool,
) -> tuple[Engine, Ring | None]:
    """Let engine.c answer what it can for `vcpu`; with the network ring, where it is offered.

    `copies`: this process has copies of pages to give back (tender/embed/heap.py).
    """
    engine = Engine(memory, console, poll, devices.block, devices.net)
    ring = None
    if "kick" in fds:
        from tender.engine.ring import Ring

        ring = Ring(fds["kick"], memory, engine.cell, devices.net, stop, cleanup)
    if copies and ring is None:
        engine.give_back_copies(stop)
    vcpu.use_engine(engine, ring)
    return engine, ring
