"""A software CPU with memory and tables, and a few instructions to run: no image, no devices."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tender.boot import layout, x86_64
from tender.cleanup import Cleanup
from tender.clock import HostClock, VirtualClock
from tender.cpu.soft_x86_64 import X86Vcpu
from tender.cpu.vcpu import IoOut
from tender.memory import GuestMemory
from tender.stop import Stop

if TYPE_CHECKING:
    from tender.boot.x86_64 import State
    from tender.config import VirtualTime
    from tender.cpu.vcpu import Exit

SIZE = 4 << 20
CODE = 0x100000  # four pages, read-only
CODE_END = CODE + 0x4000
RODATA = 0x110000  # one page, read-only, not executable
HIDDEN = 0x111000  # one page, not even readable
IDT = 0x200000
GDT = 0x201000  # null, code, data, task (two entries)
TASK = 0x202000
DATA = 0x210000
STACKS = (0x220000, 0x230000)  # IST 1 and 2 start here, downwards
HANDLERS = CODE + 0x2000  # 32 bytes each: out 0x500 + vector, then iretq

PROLOGUE = """
    .code64
    .globl _start
    .set DATA, {DATA}
    .set RODATA, {RODATA}
    .set HIDDEN, {HIDDEN}
_start:
"""


def assemble(text: str) -> bytes:
    """Instructions, as they are at CODE."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "code")
        subprocess.run(
            ["gcc", "-nostdlib", "-static", f"-Wl,-Ttext={CODE:#x},--oformat=binary"]
            + ["-Wl,--build-id=none", "-x", "assembler", "-", "-o", str(output)],
            input=PROLOGUE.format(DATA=DATA, RODATA=RODATA, HIDDEN=HIDDEN) + text + "\n",
            text=True,
            check=True,
        )
        return output.read_bytes()


class CpuRig:
    """A CPU that starts at the first instruction of `text`."""

    def __init__(
        self,
        text: str,
        *,
        clock: VirtualTime | None = None,
        instructions: int | None = None,
        handlers: bool = False,
        rodata: bytes = b"",
    ) -> None:
        self.cleanup = Cleanup()
        self.memory = GuestMemory(SIZE)
        self.cleanup.callback(self.memory.close)
        self.put(CODE, assemble(text))
        self.put(RODATA, rodata)
        self.put(layout.X86_GDT, x86_64.gdt())
        self.put(layout.X86_PML4, x86_64.page_tables(SIZE))
        self.state = x86_64.initial_state(CODE, SIZE)
        if handlers:
            self.put_handlers()
        for start, end, readable in (
            (CODE, CODE_END, True),
            (RODATA, RODATA + 4096, True),
            (HIDDEN, HIDDEN + 4096, False),
        ):
            self.memory.protect(start, end, readable=readable, writable=False)
        self.clock = VirtualClock(clock) if clock else HostClock()
        self.stop = Stop()
        self.cpu = X86Vcpu(
            self.memory, [(CODE, CODE_END)], self.clock, self.cleanup, self.stop, instructions
        )
        self.cpu.set_state(self.state)

    def put(self, gpa: int, data: bytes) -> None:
        self.memory.view[gpa : gpa + len(data)] = data

    def u64(self, gpa: int) -> int:
        return int(struct.unpack_from("<Q", self.memory.view, gpa)[0])

    def put_handlers(self) -> None:
        """An IDT whose handlers report, run on IST 1 (the double fault's on IST 2)."""
        code = b""
        for vector in range(32):
            code = code.ljust(vector * 32, b"\x90") + self._handler(vector)
        self.put(HANDLERS, code)
        for vector in range(32):
            self.put_gate(vector, HANDLERS + vector * 32, ist=2 if vector == 8 else 1)
        self.put(GDT, x86_64.gdt())
        self.put(TASK + 0x24, struct.pack("<2Q", *STACKS))
        self.state = self._with_tables()

    @staticmethod
    def _handler(vector: int) -> bytes:
        # push rax, rdx; mov 0x500 + vector, edx; lea 16(rsp), eax; out; pop; iretq
        pops = vector in (8, 10, 11, 12, 13, 14, 17)  # add 8, rsp: the error code
        head = b"\x50\x52\xba" + (0x500 + vector).to_bytes(4, "little") + b"\x8d\x44\x24\x10\xef"
        return head + b"\x5a\x58" + (b"\x48\x83\xc4\x08" if pops else b"") + b"\x48\xcf"

    def put_gate(
        self, vector: int, target: int, *, ist: int = 0, kind: int = 0x8E, selector: int = 8
    ) -> None:
        low, middle, high = target & 0xFFFF, target >> 16 & 0xFFFF, target >> 32
        gate = struct.pack("<HHBBHII", low, selector, ist, kind, middle, high, 0)
        self.put(IDT + vector * 16, gate)

    def _with_tables(self) -> State:
        task = x86_64.Segment(base=TASK, limit=103, selector=0x18, type=11, present=1)
        return x86_64.State(
            self.state.registers,
            {**self.state.segments, "tr": task},
            self.state.control,
            x86_64.Table(GDT, 23),
            x86_64.Table(IDT, 16 * 32 - 1),
        )

    def run(self) -> Exit:
        return self.cpu.run()

    def out(self) -> tuple[int, int]:
        """Run to the next OUT: its port and value."""
        exit = self.run()
        assert isinstance(exit, IoOut), (exit, hex(self.cpu.instruction_pointer()))
        return exit.port, exit.value

    def trap(self) -> tuple[int, list[int]]:
        """Run to the next exception: its vector and its frame, from the error code or RIP on."""
        port, stack = self.out()
        return port - 0x500, [self.u64(stack + 8 * index) for index in range(6)]

    def register(self, name: str) -> int:
        return self.cpu.get_state().registers[name]

    def close(self) -> None:
        self.cleanup.close()
