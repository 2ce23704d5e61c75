"""How an x86_64 CPU delivers an exception: through the guest's IDT, GDT and task state.

A mixin of the CPUs that do that themselves: a guest runs in ring 0. Source: Intel SDM volume 3,
chapter 6.
"""

from __future__ import annotations

import _struct as struct

from tender.cpu.vcpu import Failure, Fault
from tender.cpu.x86_64 import (
    _INSTRUCTION_MAX,
    BP,
    DB,
    GP,
    HAS_ERROR_CODE,
    IF,
    INTERRUPT_GATE,
    NP,
    NT,
    PAGE,
    PF,
    PF_FETCH,
    RF,
    SS,
    TF,
    TRAP_GATE,
    TS,
    U64,
    VM,
    CpuException,
    combine,
    is_canonical,
    walk,
)
from tender.errors import GuestFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.cpu.vcpu import Exit
    from tender.memory import GuestMemory


class Exceptions:
    """`_read` and `_write` are of a register by its name, `_table` of gdt, idt, tr or ldt."""

    what: str  # the name of the CPU
    _memory: GuestMemory

    def _read(self, name: str) -> int:
        raise NotImplementedError

    def _write(self, name: str, value: int) -> None:
        raise NotImplementedError

    def _table(self, name: str) -> Any:
        raise NotImplementedError

    # Memory, as the guest addresses it.

    def _read_u64(self, gpa: int) -> int:
        return int.from_bytes(self._memory.readable(gpa, 8), "little")

    def _translate(self, address: int, write: bool) -> int:
        """The GPA behind an address; raises CpuException (#PF, #GP; #SS of a push)."""
        if not is_canonical(address):
            raise CpuException(SS if write else GP)
        page = walk(self._read_u64, self._read("cr3"), address)
        if page is None or (write and not page[1]):
            raise CpuException(PF, (0 if page is None else 1) | write << 1, address)
        return page[0]

    def _load(self, address: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            at = (address + len(data)) & U64
            count = min(size - len(data), PAGE - at % PAGE)
            data += bytes(self._memory.readable(self._translate(at, False), count))
        return data

    def _push(self, address: int, values: list[int]) -> int:
        """Put `values` below `address`; where the last one is."""
        for value in values:
            address = (address - 8) & U64
            gpa = self._translate(address, True)  # aligned: it is on one page
            self._memory.writable(gpa, 8)[:] = value.to_bytes(8, "little")
        return address

    def _code_at(self, address: int) -> bytes:
        """The bytes of an instruction, as far as they can be read."""
        code = b""
        try:
            while len(code) < _INSTRUCTION_MAX:
                code += self._load(address + len(code), 1)
        except (CpuException, GuestFault):
            pass
        return code

    def _deliver(self, raised: CpuException, by_instruction: bool = False) -> Exit | None:
        """Call the guest's handler; None, or the exit where it has none."""
        if self._read("cs") & 3:
            return Failure(f"{self.what}: an exception outside ring 0: it runs ring 0 only")
        try:
            while True:
                if raised.address is not None:
                    self._write("cr2", raised.address)
                try:
                    self._enter_handler(raised, by_instruction)
                    return self._check_handler(raised)
                except CpuException as second:
                    combined = combine(raised, second)
                    if combined is None:
                        return Failure(f"{self.what}: unhandled exit (triple fault)")
                    raised, by_instruction = combined, False
        except GuestFault:  # the handler's stack or the tables are where no memory is
            return Fault()

    def _check_handler(self, raised: CpuException) -> Exit | None:
        """Not to fault for ever, a handler of page faults must not be what can't be executed."""
        is_fetch = raised.vector == PF and raised.error_code & PF_FETCH
        if is_fetch and self._read("rip") == self._read("cr2"):
            return Failure(f"{self.what}: the exception's handler can't be executed")
        return None

    def _enter_handler(self, raised: CpuException, by_instruction: bool) -> None:
        vector = raised.vector
        target, selector, ist, kind = self._gate(vector, by_instruction)
        rsp, rflags = self._read("rsp"), self._read("rflags")
        fault = not by_instruction and vector not in (DB, BP)
        frame = [
            self._read("ss") & 0xFFFF,
            rsp,
            rflags | RF if fault else rflags,
            self._read("cs") & 0xFFFF,
            self._read("rip"),
        ]
        if vector in HAS_ERROR_CODE and not by_instruction:
            frame.append(raised.error_code)
        stack = (self._stack(ist) if ist else rsp) & ~0xF
        top = self._push(stack, frame)
        cleared = TF | NT | RF | VM | (IF if kind == INTERRUPT_GATE else 0)
        self._write("rflags", rflags & ~cleared)
        self._write("cs", selector)
        self._write("rsp", top)
        self._write("rip", target)

    def _gate(self, vector: int, by_instruction: bool) -> tuple[int, int, int, int]:
        """The handler's address, code selector, IST number and gate type (SDM figure 6-8)."""
        idt = self._table("idt")
        external = 0 if by_instruction else 1
        error_code = vector << 3 | 2 | external
        if vector * 16 + 15 > idt.limit:
            raise CpuException(GP, error_code)
        low, selector, ist, kind, middle, high, _ = struct.unpack(
            "<HHBBHII", self._load(idt.base + vector * 16, 16)
        )
        if kind & 0x1F not in (INTERRUPT_GATE, TRAP_GATE):
            raise CpuException(GP, error_code)
        if not kind & 0x80:
            raise CpuException(NP, error_code)
        self._check_code(selector, external)
        target = low | middle << 16 | high << 32
        if not is_canonical(target):
            raise CpuException(GP, external)
        return target, selector, ist & 7, kind & 0xF

    def _check_code(self, selector: int, external: int) -> None:
        """A handler's code segment is 64-bit code of ring 0 (SDM 6.12.1.3, 6.14.1)."""
        gdt = self._table("gdt")
        error_code = selector & 0xFFFC | external
        if not selector & 0xFFFC:
            raise CpuException(GP, external)
        if selector & 4 or (selector | 7) > gdt.limit:
            raise CpuException(GP, error_code)
        access, flags = self._load(gdt.base + (selector & 0xFFF8) + 5, 2)
        is_code = access & 0x18 == 0x18
        if not is_code or access & 0x60 or not flags & 0x20 or flags & 0x40:
            raise CpuException(GP, error_code)
        if not access & 0x80:
            raise CpuException(NP, error_code)

    def _stack(self, ist: int) -> int:
        """The stack that the task state names (SDM figure 8-11)."""
        task = self._table("tr")
        offset = 0x24 + (ist - 1) * 8
        if offset + 7 > task.limit:
            raise CpuException(TS, task.selector & 0xFFFC | 1)
        stack = int.from_bytes(self._load(task.base + offset, 8), "little")
        if not is_canonical(stack):
            raise CpuException(SS, 0)
        return stack
