"""The native CPU: a process of its own runs the guest's code, and what that traps comes here.

The rule here: a guest sees what a CPU of KVM shows it, as far as ring 3 allows. What lies in the
shared region is the guest's word (native.c checks it); what an instruction means is decided here.
Source: Intel SDM volumes 2 and 3.
"""

from __future__ import annotations

import errno
import os
import signal
import struct

from tender._native import ffi, lib
from tender.boot.layout import MIN_BASE
from tender.boot.x86_64 import (
    CONTROL,
    MSRS,
    READ_ONLY_FROM,
    REGISTERS,
    Fpu,
    State,
    Table,
)
from tender.cpu.exceptions import Exceptions
from tender.cpu.vcpu import Failure, Fault, Interrupted, IoIn, IoOut
from tender.cpu.x86_64 import (
    AC,
    GP,
    IF,
    PF,
    PF_FETCH,
    PF_PRESENT,
    U64,
    UD,
    CpuException,
    is_canonical,
    skip_prefixes,
)
from tender.dataclass import replace
from tender.errors import HostError
from tender.memory import PROT_EXEC, PROT_READ, PROT_WRITE, regions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.cleanup import Cleanup
    from tender.cpu.vcpu import Exit
    from tender.engine.engine import Engine
    from tender.memory import GuestMemory
    from tender.stop import Stop

PROGRAM = os.path.join(os.path.dirname(__file__), "native-guest")
SPIN_S = 30e-6  # about what it takes to sleep and to be woken
ALIGNMENT_CHECK = 1 << 18
USER_CODE = 0x33  # the selector of 64-bit code in ring 3
I386 = 0x40000003  # AUDIT_ARCH_I386

_MSR_NAMES = {number: name for name, number in MSRS.items()}
_FS_BASE, _GS_BASE, _EFER = 0xC0000100, 0xC0000101, 0xC0000080
_ADDRESSES = {MSRS[name] for name in ("kernel_gs_base", "lstar", "cstar")}
_NUMBERS = {name: index for index, name in enumerate(REGISTERS)}
_ORDER = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")


def missing() -> str:
    """Why the native CPU can't be here; empty: it can."""
    if os.uname().machine != "x86_64":
        return "it is for x86_64"
    what = lib.native_missing()
    if what:
        return (
            "",
            "the kernel or the CPU lacks FSGSBASE (Linux 5.9)",
            "a signal frame is too large",
        )[what]
    try:
        with open("/proc/sys/vm/mmap_min_addr", encoding="ascii") as file:
            if int(file.read()) > READ_ONLY_FROM:
                return "vm.mmap_min_addr is above 0x10000"
    except OSError:
        pass  # the start tells
    return "" if os.path.exists(PROGRAM) else f"it was installed without {PROGRAM}"


class NativeCpu(Exceptions):
    """The interface is cpu.vcpu.Vcpu. `start` begins the process; then the guest can run."""

    pc_name = "rip"
    what = "native CPU"

    def __init__(
        self, memory: GuestMemory, executable: list[tuple[int, int]], stop: Stop, cleanup: Cleanup
    ) -> None:
        self._memory = memory
        self._cell = ffi.new("struct native *", {"pidfd": -1})
        self._engine: Engine | None = None
        self.fds = {"guest-memory": memory.fd}
        self._shared: Any = ffi.NULL
        cleanup.callback(self._close)
        self.fds["guest-shared"] = _memfd("ptender-native", lib.NATIVE_SHARED_SIZE)
        self._shared = lib.native_map(ffi.NULL, lib.NATIVE_SHARED_SIZE, self.fds["guest-shared"])
        if not self._shared:
            raise HostError("native CPU: cannot map its shared memory", "mmap", ffi.errno)
        self._cell.shared = self._shared
        self._cell.memory = ffi.cast("uint8_t *", memory.base)
        self._text = self._set_ranges(memory, executable)
        self._cell.shared.turn = lib.NATIVE_TURN_GUEST
        self._cell.is_guests_turn = 1  # its first trap is the program's own
        lib.native_filter(self._cell.shared)
        self.fds["guest-program"] = _program()
        self._started = False
        self.cpu_cycle_freq = int(lib.tsc_hz())
        if len(os.sched_getaffinity(0)) > 1:
            self._cell.spin_cycles = int(SPIN_S * self.cpu_cycle_freq)
        stop.watch(ffi.addressof(self._cell, "immediate_exit"))
        cleanup.callback(lambda: stop.watch(0))

    def _close(self) -> None:
        lib.native_kill(self._cell)
        if self._shared:
            lib.native_unmap(self._shared, lib.NATIVE_SHARED_SIZE)
        for fd in self.fds.values():
            os.close(fd)

    def _set_ranges(self, memory: GuestMemory, executable: list[tuple[int, int]]) -> Any:
        """Describe the guest's memory to its process; the code among it, which must be kept."""
        shared = self._cell.shared
        pieces = []
        for start, end, prot in regions(memory, executable):
            for low, high, most in (
                (READ_ONLY_FROM, MIN_BASE, PROT_READ),
                (MIN_BASE, memory.size, PROT_READ | PROT_WRITE | PROT_EXEC),
            ):
                if max(start, low) < min(end, high):
                    pieces.append((max(start, low), min(end, high), prot & most))
        if len(pieces) > lib.NATIVE_RANGES:
            raise HostError("native CPU: the image has too many segments")
        shared.range_count = len(pieces)
        for index, piece in enumerate(pieces):
            shared.ranges[index] = piece
        text = [piece for piece in pieces if piece[2] & PROT_EXEC]
        kept = ffi.new("struct native_range[]", text)
        self._cell.text, self._cell.text_count = kept, len(text)
        return kept

    def use(self, engine: Engine) -> None:
        """Let `engine` answer plain hypercalls."""
        self._engine = engine
        self._cell.engine = engine.cell

    # Its process.

    def start(self, _: bytes = b"") -> None:
        """Start the guest's process, which ends with this thread. Raises HostError."""
        fds, cell = self.fds, self._cell
        cell.shared.parent = os.getpid()
        pidfd = lib.native_start(fds["guest-program"], fds["guest-shared"], fds["guest-memory"])
        if pidfd < 0:
            raise HostError("native CPU: cannot start the guest's process", "execve", ffi.errno)
        for fd in fds.values():
            os.close(fd)
        self.fds = {"guest-process": min(fds["guest-shared"], pidfd)}
        if pidfd != self.fds["guest-process"]:
            os.dup2(pidfd, self.fds["guest-process"], inheritable=False)
            os.close(pidfd)
        cell.pidfd = self.fds["guest-process"]
        error = lib.native_run(cell)
        while error == errno.EINTR:
            error = lib.native_run(cell)
        failed = cell.shared.failed
        if error or failed:
            reason = os.strerror(failed) if failed else "it has ended"
            raise HostError(f"native CPU: the guest's process could not start: {reason}")
        self._started = True
        self.set_state(self._state)

    # The state.

    def _read(self, name: str) -> int:
        if name == "rflags":
            return int(self._cell.registers[17]) & ~IF | self._if
        if name in _NUMBERS:
            return int(self._cell.registers[_NUMBERS[name]])
        if name in self._state.segments:
            return self._state.segments[name].selector
        return self._state.control[name]

    def _write(self, name: str, value: int) -> None:
        if name == "rflags":
            self._if = value & IF
            value |= IF
        if name in _NUMBERS:
            self._cell.registers[_NUMBERS[name]] = value & U64
        elif name in self._state.segments:
            segments = self._state.segments
            segments[name] = replace(segments[name], selector=value)
        else:
            self._state.control[name] = value

    def _table(self, name: str) -> Any:
        if name in ("gdt", "idt"):
            return getattr(self._state, name)
        return self._state.segments[name]

    def _translate(self, address: int, write: bool) -> int:
        if READ_ONLY_FROM <= address < self._memory.size - 7:
            if write and address < MIN_BASE:
                raise CpuException(PF, 3, address)
            return address
        return super()._translate(address, write)

    def instruction_pointer(self) -> int:
        """As kvm.Vcpu has it."""
        return int(self._cell.registers[_NUMBERS["rip"]])

    def core_state(self) -> State:
        """As kvm.Vcpu has it."""
        segments = dict(self._state.segments)
        for name in ("fs", "gs"):
            base = int(getattr(self._cell.shared, f"{name}_base"))
            segments[name] = replace(segments[name], base=base)
        registers = {name: self._read(name) for name in REGISTERS}
        return replace(
            self._state, registers=registers, segments=segments, control=dict(self._state.control)
        )

    def get_state(self) -> State:
        """As kvm.Vcpu has it."""
        if not self._started:
            return replace(self._state, fpu=self._state.fpu or Fpu())
        msrs = {**self._state.msrs, "tsc": int(lib.tsc_read())}
        return replace(self.core_state(), fpu=self._get_fpu(), msrs=msrs)

    def _get_fpu(self) -> Fpu | None:
        area = ffi.new("char[512]")
        if lib.native_fpu(self._cell, area, 0):
            return None
        data = bytes(ffi.buffer(area))
        fcw, fsw, ftw, _, fop, rip, rdp, mxcsr = struct.unpack_from("<HHBBHQQI", data)
        st = tuple(data[32 + 16 * index :][:10] for index in range(8))
        xmm = tuple(data[160 + 16 * index :][:16] for index in range(16))
        return Fpu(fcw, fsw, ftw, fop, rip, rdp, st, xmm, mxcsr)

    def set_state(self, state: State) -> None:
        """Raises HostError for a state that this CPU has no way to be in."""
        self._state = replace(
            state,
            segments=dict(state.segments),
            control=dict(state.control),
            msrs=dict.fromkeys(MSRS, 0) | state.msrs,
        )
        self._if = state.registers["rflags"] & IF
        if not self._started:
            return
        for name in REGISTERS:
            self._write(name, state.registers[name])
        self._cell.shared.fs_base = state.segments["fs"].base
        self._cell.shared.gs_base = state.segments["gs"].base
        lib.native_set_registers(self._cell)

    # Its exits.

    def run(self) -> Exit:
        """Let the guest run until something happens that is not its own."""
        cell = self._cell
        while True:
            error = lib.native_run(cell)
            if self._engine is not None:
                self._engine.hand_over()
            if error:
                return self._not_run(error)
            if cell.kind == lib.NATIVE_HYPERCALL:
                return IoOut(lib.HVT_HYPERCALL_PIO_BASE + cell.number, 4, cell.gpa)
            exit = self._on_trap()
            lib.native_set_registers(cell)
            if exit is not None:
                return exit

    def _not_run(self, error: int) -> Exit:
        if error == errno.EINTR:
            self._cell.immediate_exit = 0
            return Interrupted()
        if error == errno.ESRCH:
            return Failure("native CPU: the guest's process has ended")
        return Failure("native CPU: the guest has overwritten its signal frame")

    def _on_trap(self) -> Exit | None:
        cell = self._cell
        if cell.cs != USER_CODE:
            return Failure("native CPU: code that is not 64-bit", emulation=True)
        vector, code = int(cell.vector), int(cell.error_code) & 0xFFFF
        if cell.signo == signal.SIGSYS:
            return self._on_system_call()
        if vector == GP:
            return self._on_privileged(code)
        if vector == PF:
            return self._on_page_fault(code)
        if vector == AC:
            self._write("rflags", self._read("rflags") & ~ALIGNMENT_CHECK)
            return None  # ring 0 has no #AC
        if vector == UD and self._code_at(self._read("rip"))[:3] == b"\x0f\x01\xf8":
            self._swapgs()
            return None
        return self._deliver(CpuException(vector, code))

    def _on_page_fault(self, code: int) -> Exit | None:
        address, write = int(self._cell.cr2), code & 2
        is_fetch = code & PF_FETCH or address == self._read("rip")
        if is_fetch and READ_ONLY_FROM <= address < self._memory.size:
            return self._deliver(CpuException(PF, PF_PRESENT | PF_FETCH, address))
        if MIN_BASE <= address < self._memory.size:
            return Fault()  # what the image protects
        present = READ_ONLY_FROM <= address < MIN_BASE
        if present and not write:
            return Fault()
        return self._deliver(CpuException(PF, present | write, address))

    def _on_system_call(self) -> Exit | None:
        rip = self._read("rip")
        if self._cell.call != rip:  # a call of the vsyscall page, which is not the guest's
            self._write("rip", int(self._cell.call))
            self._write("rsp", (self._read("rsp") - 8) & U64)
            return self._deliver(CpuException(PF, 0, int(self._cell.call)))
        self._write("rip", (rip - 2) & U64)
        if self._cell.arch == I386:
            return self._deliver(CpuException(GP, 0x80 << 3 | 2))
        return self._deliver(CpuException(UD))

    def _swapgs(self) -> None:
        shared, msrs = self._cell.shared, self._state.msrs
        base = int(shared.gs_base)
        shared.gs_base, msrs["kernel_gs_base"] = msrs["kernel_gs_base"], base
        self._write("rip", self._read("rip") + 3)

    def _on_privileged(self, code: int) -> Exit | None:
        """An instruction of ring 0, or a fault that ring 0 would have had as well."""
        rip = self._read("rip")
        instruction = Instruction(self._code_at(rip))
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
            return Failure("native CPU: unhandled exit (HLT)")
        if opcode == 0xCD:
            vector = code.byte()
            self._write("rip", (self._read("rip") + code.at) & U64)
            return self._interrupt(vector, code.at)
        if opcode == 0x8E:
            register, value = code.operand(self, 2)
            name = _SEGMENTS[register & 7] if register & 7 < 6 else "cs"
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
                setattr(self._cell.shared, f"{name}_base", base)
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
        if opcode == 0x32:
            return self._rdmsr()
        if opcode in (0x20, 0x22):
            return self._control_register(code.byte(), opcode == 0x22, code)
        if opcode in (0x06, 0x08, 0x09):
            return True
        if opcode == 0x00:
            register, value = code.operand(self, 2)
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
            return Failure("native CPU: debug registers", emulation=True)
        return False

    def _group_7(self, code: Instruction) -> Exit | bool | None:
        if code.peek() == 0xF8:
            self._swapgs()
            return None
        if code.peek() >= 0xC0:
            return False  # xsetbv and others, which this CPU does not have for a guest
        register, _ = code.operand(self, 0)
        if register & 7 in (2, 3):
            limit, base = struct.unpack("<HQ", self._load(code.address, 10))
            name = "gdt" if register & 7 == 2 else "idt"
            self._state = replace(self._state, **{name: Table(base, limit)})
            return True
        if register & 7 == 7:  # invlpg
            return True
        return Failure("native CPU: it can't do this instruction", emulation=True)

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
        register = _ORDER[modrm & 7 | code.rex_b << 3]
        if name not in CONTROL:
            raise CpuException(UD)
        if not write:
            self._write(register, self._state.control[name])
            return True
        value = self._read(register)
        if name != "cr2" and value != self._state.control[name]:
            return Failure(f"native CPU: it can't change {name.upper()}", emulation=True)
        self._state.control[name] = value
        return True

    def _rdmsr(self) -> Exit | bool:
        index = self._read("rcx") & 0xFFFFFFFF
        if index in (_FS_BASE, _GS_BASE):
            shared = self._cell.shared
            value = int(shared.fs_base if index == _FS_BASE else shared.gs_base)
        elif index == _EFER:
            value = self._state.control["efer"]
        elif index == MSRS["tsc"]:
            value = int(lib.tsc_read())
        elif index in _MSR_NAMES:
            value = self._state.msrs[_MSR_NAMES[index]]
        else:
            return False
        self._write("rax", value & 0xFFFFFFFF)
        self._write("rdx", value >> 32)
        return True

    def _wrmsr(self) -> Exit | bool:
        index = self._read("rcx") & 0xFFFFFFFF
        value = self._read("rax") & 0xFFFFFFFF | (self._read("rdx") & 0xFFFFFFFF) << 32
        if index in (_FS_BASE, _GS_BASE):
            if not is_canonical(value):
                return False
            setattr(self._cell.shared, "fs_base" if index == _FS_BASE else "gs_base", value)
            return True
        if index == _EFER and value == self._state.control["efer"]:
            return True
        if index == _EFER or index == MSRS["tsc"]:
            return Failure("native CPU: it can't write this MSR", emulation=True)
        if index not in _MSR_NAMES or (index in _ADDRESSES and not is_canonical(value)):
            return False
        self._state.msrs[_MSR_NAMES[index]] = value
        return True


class Instruction:
    """A reader of an instruction's bytes; raises IndexError behind their end."""

    def __init__(self, code: bytes) -> None:
        self._code = code
        self.at = skip_prefixes(code)
        prefixes = code[: self.at]
        rex = prefixes[-1] if prefixes and prefixes[-1] & 0xF0 == 0x40 else 0
        self.is_16_bit = 0x66 in prefixes
        self.is_64_bit = bool(rex & 8)
        self.rex_r, self._rex_x, self.rex_b = rex >> 2 & 1, rex >> 1 & 1, rex & 1
        self.address = 0  # of the last operand in memory

    def peek(self) -> int:
        """The next byte."""
        return self._code[self.at]

    def byte(self) -> int:
        """The next byte, taken."""
        self.at += 1
        return self._code[self.at - 1]

    def word(self) -> int:
        """The next 16 bits, taken."""
        return self.byte() | self.byte() << 8

    def _signed(self, size: int) -> int:
        return int.from_bytes(bytes(self.byte() for _ in range(size)), "little", signed=True)

    def operand(self, cpu: NativeCpu, size: int) -> tuple[int, Any]:
        """The register of a ModRM byte, and a function that reads its other operand."""
        modrm = self.byte()
        mode, register, rm = modrm >> 6, modrm >> 3 & 7 | self.rex_r << 3, modrm & 7
        if mode == 3:
            name = _ORDER[rm | self.rex_b << 3]
            return register, lambda: cpu._read(name) & ((1 << 8 * size) - 1)
        address = 0
        relative = False
        if rm == 4:
            sib = self.byte()
            scale, index, base = sib >> 6, sib >> 3 & 7 | self._rex_x << 3, sib & 7
            if index != 4:
                address += cpu._read(_ORDER[index]) << scale
            if base != 5 or mode:
                address += cpu._read(_ORDER[base | self.rex_b << 3])
            else:
                address += self._signed(4)
        elif rm == 5 and not mode:
            address += self._signed(4)
            relative = True
        else:
            address += cpu._read(_ORDER[rm | self.rex_b << 3])
        if mode:
            address += self._signed(1 if mode == 1 else 4)
        if relative:
            address += cpu._read("rip") + self.at
        self.address = address & U64
        return register, lambda: int.from_bytes(cpu._load(self.address, size), "little")


def _memfd(name: str, size: int) -> int:
    fd: int = lib.native_memfd(name.encode(), size, 0)
    if fd < 0:
        raise HostError(
            "native CPU: cannot make memory that two processes share", "memfd_create", ffi.errno
        )
    return fd


def _program() -> int:
    """The program as a file that has no path: Landlock forbids to execute one that has."""
    fd: int = lib.native_memfd(b"ptender-guest", 0, 1)
    if fd < 0:
        raise HostError("native CPU: cannot make its program", "memfd_create", ffi.errno)
    with open(PROGRAM, "rb") as file:
        os.write(fd, file.read())
    return fd
