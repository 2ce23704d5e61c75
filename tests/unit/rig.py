"""A guest without a CPU: memory and real devices, and hypercalls put in by hand.

The same table of cases runs over Python's handlers and over the engine in front of them.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tender._native import ffi, lib
from tender.backends import BlockFile, Descriptor
from tender.cleanup import Cleanup
from tender.clock import HostClock
from tender.cpu.vcpu import IoOut
from tender.engine.engine import Engine
from tender.host import block, net
from tender.hypercalls import HYPERCALLS, Dispatcher, Halt
from tender.image.manifest import Device
from tender.memory import GuestMemory
from tender.modules.block import Block, BlockDevice
from tender.modules.console import Console
from tender.modules.net import Net, NetDevice
from tender.modules.poll import Poll
from tender.modules.time import Time
from tender.stop import Stop

if TYPE_CHECKING:
    from tender.hypercalls import Module

SIZE = 4 << 20
TEXT = 0x100000  # one read-only page
ARGS = 0x200000  # where an argument block goes
DATA = 0x201000
U64 = 1 << 64
CAPACITY = 64 * 512

DISK, READONLY, PORT, OTHER_PORT = 1, 2, 3, 4  # handles
MAC = b"\x02\x00\x00\x00\x00\x01"

NUMBERS = {call.name: number for number, call in HYPERCALLS.items()}


class Rig:
    """Handles: a disk, a read-only disk, two ports whose other ends are `wire` and `other_wire`."""

    def __init__(self, folder: Path, engine: str, *, ring_bytes: int = 0) -> None:
        self.cleanup = Cleanup()
        self.warnings: list[str] = []
        self.memory = GuestMemory(SIZE, ring_bytes)
        self.cleanup.callback(self.memory.close)
        self.memory.protect(TEXT, TEXT + 4096, readable=True, writable=False)
        self.disk = folder / "disk.img"
        self.readonly = folder / "readonly.img"
        self.disk.write_bytes(bytes(CAPACITY))
        self.readonly.write_bytes(b"r" * CAPACITY)
        self.stop = Stop()
        self.block = Block({
            DISK: self._block(DISK, BlockFile(str(self.disk))),
            READONLY: self._block(READONLY, BlockFile(str(self.readonly), readonly=True)),
        })  # fmt: skip
        self.wire, port = self._wire()
        self.other_wire, other_port = self._wire()
        self.net = Net({PORT: self._net(PORT, port), OTHER_PORT: self._net(OTHER_PORT, other_port)})
        self.output, console = os.pipe()
        self.cleanup.callback(lambda: os.close(self.output))
        self.cleanup.callback(lambda: os.close(console))
        self.console = Console(console, self.stop, self.warnings.append)
        self.clock = HostClock()
        self.poll = Poll(self.net, self.stop, self.clock)
        time = Time(self.clock)
        self.modules: list[Module] = [self.console, time, self.poll, self.block, self.net]
        self._dispatcher = Dispatcher(self.memory, self.modules)
        self.has_engine = engine == "c"
        self.answered = 0  # by the engine

    def renew_engine(self) -> Engine:
        """The engine of the devices as they are: some tests change their descriptors."""
        return Engine(self.memory, self.console, self.poll, self.block, self.net)

    def _block(self, handle: int, spec: BlockFile) -> BlockDevice:
        device = Device(f"disk{handle}", lib.MFT_DEV_BLOCK_BASIC, handle)
        return block.attach(device, spec, self.cleanup, self.stop, self.warnings.append)

    def _wire(self) -> tuple[socket.socket, socket.socket]:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in ends:
            end.setblocking(False)
            self.cleanup.callback(end.close)
        return ends

    def _net(self, handle: int, end: socket.socket) -> NetDevice:
        device = Device(f"port{handle}", lib.MFT_DEV_NET_BASIC, handle)
        spec = Descriptor(end.fileno(), mac=MAC)
        return net.attach(device, spec, self.cleanup, self.warnings.append)

    def put(self, name: str, at: int = ARGS, **fields: int) -> Any:
        """Write an argument block at a GPA; the block, in place."""
        layout = HYPERCALLS[NUMBERS[name]].layout
        value = ffi.new(layout.pointer, fields)
        raw = bytes(ffi.buffer(value))
        self.memory.view[at : at + len(raw)] = raw
        return self.memory.at(layout, at)

    def call(self, name: str, **fields: int) -> Any:
        """Make a hypercall with these fields; the block with the reply."""
        block = self.put(name, **fields)
        self.dispatch(name, ARGS)
        return block

    def dispatch(self, name: str, gpa: int) -> Halt | None:
        if self.has_engine and self.renew_engine().answer(NUMBERS[name], gpa):
            self.answered += 1
            return None
        return self._dispatcher.dispatch(IoOut(lib.HVT_HYPERCALL_PIO_BASE + NUMBERS[name], 4, gpa))

    def exit(self, exit: Any) -> Halt | None:
        return self._dispatcher.dispatch(exit)

    def close(self) -> None:
        self.cleanup.close()
