"""Instructions of ring 0 and of I/O, done for a guest that runs in ring 3.

A mixin of the native CPU, which traps them. Source: Intel SDM volumes 2 and 3.
"""

from __future__ import annotations

import _struct as struct

from tender.boot.x86_64 import CONTROL, MSR_TSC, MSRS, State, Table
from tender.cpu.exceptions import Exceptions
from tender.cpu.instruction import ORDER, SEGMENTS, Instruction
from tender.cpu.vcpu import Failure, IoIn, IoOut
from tender.cpu.x86_64 import GP, IF, U64, UD, CpuException, is_canonical
from tender.dataclass import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.cpu.vcpu import Exit

_MSR_NAMES = {number: name for name, number in MSRS.items()}
_FS_BASE, _GS_BASE, _EFER = 0xC0000100, 0xC0000101, 0xC0000080
_ADDRESSES = {MSRS[name] for name in ("kernel_gs_base", "lstar", "cstar")}


class Privileged(Exceptions):
    """`_state` has the registers that the process of the guest has no place for, `_if` the flag of
    interrupts; `_get_base` and `_set_base` are of fs and gs."""

    _state: State
    _if: int

    def _get_base(self, name: str) -> int:
        raise NotImplementedError

    def _set_base(self, name: str, base: int) -> None:
        raise NotImplementedError

    def counter(self) -> int:
        """The guest's TSC."""
        raise NotImplementedError

    def _swapgs(self) -> None:
        msrs = self._state.msrs
        base = self._get_base("gs")
        self._set_base("gs", msrs["kernel_gs_base"])
        msrs["kernel_gs_base"] = base
        self._write("rip", self._read("rip") + 3)

    def _on_privileged(self, code: int) -> Exit | None:
        """An instruction of ring 0, or a fault that ring 0 would have had as well."""
        rip = self._read("rip")
        instruction = Instruction(self._code_at(rip), self._read, self._load)
        try:
            done = self._emulate(instruction)
        except CpuException as raised:
            return self._deliver(raised)
        except IndexError:
            done = False
        if done is False:
            return self._deliver(CpuException(GP, code))
        if done is True:
            self._write("rip", (rip + instruction.at) & U64)
            return None
        if isinstance(done, (IoIn, IoOut)):
            self._write("rip", (rip + instruction.at) & U64)
        return done

    def _emulate(self, code: Instruction) -> Exit | bool | None:
        """True: done, go on behind it; None: done, RIP is set; False: it is a #GP."""
        opcode = code.byte()
        if opcode == 0x0F:
            return self._emulate_0f(code)
        if opcode in (0xE6, 0xE7, 0xEE, 0xEF):
            port = code.byte() if opcode < 0xE8 else self._read("rdx") & 0xFFFF
            size = 1 if not opcode & 1 else 2 if code.is_16_bit else 4
            return IoOut(port, size, self._read("rax") & 0xFFFFFFFF if size == 4 else 0)
        if opcode in (0xE4, 0xE5, 0xEC, 0xED):
            port = code.byte() if opcode < 0xE8 else self._read("rdx") & 0xFFFF
            return IoIn(port, 1 if not opcode & 1 else 2 if code.is_16_bit else 4)
        if opcode in (0x6C, 0x6D, 0x6E, 0x6F):
            kind = IoIn if opcode < 0x6E else lambda port, size: IoOut(port, size, 0)
            return kind(self._read("rdx") & 0xFFFF, 1 if not opcode & 1 else 4)
        if opcode in (0xFA, 0xFB):
            self._if = IF if opcode == 0xFB else 0
            return True
        if opcode == 0xF4:
            return Failure(f"{self.what}: unhandled exit (HLT)")
        if opcode == 0xCD:
            vector = code.byte()
            self._write("rip", (self._read("rip") + code.at) & U64)
            return self._interrupt(vector, code.at)
        if opcode == 0x8E:
            register, value = code.operand(2)
            name = SEGMENTS[register & 7] if register & 7 < 6 else "cs"
            return False if name == "cs" else self._load_segment(name, value())
        if opcode in (0xCA, 0xCB, 0xCF) and code.is_64_bit:
            self._far_return(opcode, code)
            return None
        return False

    def _interrupt(self, vector: int, length: int) -> Exit | None:
        rip = self._read("rip")
        try:
            self._gate(vector, True)
        except CpuException as raised:  # a fault is reported at the instruction
            self._write("rip", (rip - length) & U64)
            return self._deliver(raised)
        return self._deliver(CpuException(vector), True)

    def _load_segment(self, name: str, selector: int) -> bool:
        if selector & 0xFFFC:
            gdt = self._state.gdt
            if selector & 4 or selector | 7 > gdt.limit:
                raise CpuException(GP, selector & 0xFFFC)
            low = int.from_bytes(self._load(gdt.base + (selector & 0xFFF8), 8), "little")
            if not low >> 47 & 1 or not low >> 44 & 1:
                raise CpuException(GP, selector & 0xFFFC)
            if name in ("fs", "gs"):
                base = low >> 16 & 0xFFFFFF | low >> 56 << 24
                self._set_base(name, base)
        self._write(name, selector)
        return True

    def _far_return(self, opcode: int, code: Instruction) -> None:
        rsp = self._read("rsp")
        more = code.word() if opcode == 0xCA else 0
        count = 5 if opcode == 0xCF else 2
        words = struct.unpack(f"<{count}Q", self._load(rsp, 8 * count))
        self._check_code(words[1] & 0xFFFF, 0)
        self._write("cs", words[1] & 0xFFFF)
        self._write("rip", words[0])
        self._write("rsp", rsp + 16 + more)
        if opcode == 0xCF:
            self._write("rflags", words[2])
            self._write("rsp", words[3])
            self._write("ss", words[4] & 0xFFFF)

    def _emulate_0f(self, code: Instruction) -> Exit | bool | None:
        opcode = code.byte()
        if opcode == 0x30:
            return self._wrmsr()
        if opcode == 0x31:  # where it traps
            return self._answer(self.counter())
        if opcode == 0x32:
            return self._rdmsr()
        if opcode in (0x20, 0x22):
            return self._control_register(code.byte(), opcode == 0x22, code)
        if opcode in (0x06, 0x08, 0x09):
            return True
        if opcode == 0x00:
            register, value = code.operand(2)
            if register & 7 not in (2, 3):
                return False
            return self._load_system_segment("ldt" if register & 7 == 2 else "tr", value())
        if opcode == 0x01:
            return self._group_7(code)
        if opcode in (0xA1, 0xA9):
            name = "fs" if opcode == 0xA1 else "gs"
            rsp = self._read("rsp")
            self._load_segment(name, int.from_bytes(self._load(rsp, 2), "little"))
            self._write("rsp", rsp + 8)
            return True
        if opcode in (0x21, 0x23):
            return Failure(f"{self.what}: debug registers", emulation=True)
        return False

    def _group_7(self, code: Instruction) -> Exit | bool | None:
        if code.peek() == 0xF8:
            self._swapgs()
            return None
        if code.peek() == 0xF9 and code.byte():  # rdtscp, where it traps
            self._write("rcx", self._state.msrs["tsc_aux"])
            return self._answer(self.counter())
        if code.peek() >= 0xC0:
            return False  # xsetbv and others, which this CPU does not have for a guest
        register, _ = code.operand(0)
        if register & 7 in (2, 3):
            limit, base = struct.unpack("<HQ", self._load(code.address, 10))
            name = "gdt" if register & 7 == 2 else "idt"
            self._state = replace(self._state, **{name: Table(base, limit)})
            return True
        if register & 7 == 7:  # invlpg
            return True
        return Failure(f"{self.what}: it can't do this instruction", emulation=True)

    def _load_system_segment(self, name: str, selector: int) -> bool:
        gdt, segments = self._state.gdt, self._state.segments
        if not selector & 0xFFFC and name == "ldt":
            segments[name] = replace(segments[name], selector=selector, unusable=1)
            return True
        if not selector & 0xFFFC or selector & 4 or (selector | 7) + 8 > gdt.limit:
            raise CpuException(GP, selector & 0xFFFC)
        low, high = struct.unpack("<QQ", self._load(gdt.base + (selector & 0xFFF8), 16))
        base = low >> 16 & 0xFFFFFF | (low >> 56) << 24 | (high & 0xFFFFFFFF) << 32
        limit = low & 0xFFFF | (low >> 48 & 0xF) << 16
        limit = limit << 12 | 0xFFF if low >> 55 & 1 else limit
        segments[name] = replace(
            segments[name], selector=selector, base=base, limit=limit, present=1, unusable=0
        )
        return True

    def _control_register(self, modrm: int, write: bool, code: Instruction) -> Exit | bool:
        name = f"cr{modrm >> 3 & 7 | code.rex_r << 3}"
        register = ORDER[modrm & 7 | code.rex_b << 3]
        if name not in CONTROL:
            raise CpuException(UD)
        if not write:
            self._write(register, self._state.control[name])
            return True
        value = self._read(register)
        if name != "cr2" and value != self._state.control[name]:
            return Failure(f"{self.what}: it can't change {name.upper()}", emulation=True)
        self._state.control[name] = value
        return True

    def _rdmsr(self) -> Exit | bool:
        index = self._read("rcx") & 0xFFFFFFFF
        if index in (_FS_BASE, _GS_BASE):
            value = self._get_base("fs" if index == _FS_BASE else "gs")
        elif index == _EFER:
            value = self._state.control["efer"]
        elif index == MSR_TSC:
            value = self.counter()
        elif index in _MSR_NAMES:
            value = self._state.msrs[_MSR_NAMES[index]]
        else:
            return False
        return self._answer(value)

    def _answer(self, value: int) -> bool:
        self._write("rax", value & 0xFFFFFFFF)
        self._write("rdx", value >> 32)
        return True

    def _wrmsr(self) -> Exit | bool:
        index = self._read("rcx") & 0xFFFFFFFF
        value = self._read("rax") & 0xFFFFFFFF | (self._read("rdx") & 0xFFFFFFFF) << 32
        if index in (_FS_BASE, _GS_BASE):
            if not is_canonical(value):
                return False
            self._set_base("fs" if index == _FS_BASE else "gs", value)
            return True
        if index == _EFER and value == self._state.control["efer"]:
            return True
        if index in (_EFER, MSR_TSC):
            return Failure(f"{self.what}: it can't write this MSR", emulation=True)
        if index not in _MSR_NAMES or (index in _ADDRESSES and not is_canonical(value)):
            return False
        self._state.msrs[_MSR_NAMES[index]] = value
        return True
