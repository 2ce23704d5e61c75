"""An x86_64 CPU in software: registers, exceptions, and what the emulator leaves to its user.

The rule here: a guest sees what a CPU of KVM shows it. The emulator executes instructions and walks
the guest's page tables; it does not deliver exceptions, invents values for MSRs it does not have
and does not end what it does not know: that is here. Sources: Intel SDM volume 3, chapters 3, 4
and 6; the emulator's public interface (unicorn/x86.h).
"""

from __future__ import annotations

import struct

from tender._soft import ffi, lib
from tender.boot.x86_64 import (
    CONTROL,
    EFER_LMA,
    MSR_TSC,
    MSRS,
    REGISTERS,
    SEGMENTS,
    UNUSABLE,
    DebugRegisters,
    Fpu,
    Segment,
    State,
    Table,
)
from tender.cpu import cpuid
from tender.cpu.exceptions import Exceptions
from tender.cpu.soft import SoftCpu, check, open_emulator
from tender.cpu.vcpu import Failure
from tender.cpu.x86_64 import (
    GP,
    PAGE,
    PF,
    PF_FETCH,
    PF_PRESENT,
    U64,
    UD,
    CpuException,
    is_canonical,
    is_undefined,
    skip_prefixes,
)
from tender.errors import HostError, option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.cpu.vcpu import Exit

UC_MODE_64 = 8

# UC_X86_INS_*
INS_IN, INS_OUT, INS_CPUID, INS_RDTSC, INS_RDTSCP = 218, 500, 113, 608, 609
INS_SYSCALL, INS_SYSENTER = 699, 700

# UC_X86_REG_*
NUMBERS = {
    "rax": 35, "rbp": 36, "rbx": 37, "rcx": 38, "rdi": 39, "rdx": 40, "rip": 41, "rsi": 43,
    "rsp": 44, "r8": 106, "r9": 107, "r10": 108, "r11": 109, "r12": 110, "r13": 111, "r14": 112,
    "r15": 113, "rflags": 253,
    "cs": 11, "ds": 17, "es": 28, "fs": 32, "gs": 33, "ss": 49,
    "cr0": 50, "cr2": 52, "cr3": 53, "cr4": 54, "dr0": 66, "dr6": 72, "dr7": 73,
    "idt": 242, "gdt": 243, "ldt": 244, "tr": 245,
    "fcw": 246, "fptag": 247, "msr": 248, "mxcsr": 249, "fs_base": 250, "gs_base": 251,
    "fsw": 31, "st0": 114, "xmm0": 122,
    "last_ip": 254, "last_dp": 256, "last_opcode": 258,
}  # fmt: skip

MSR_EFER, MSR_FS_BASE, MSR_GS_BASE = 0xC0000080, 0xC0000100, 0xC0000101
# What a guest on KVM has, and the emulator has a register for. All others trap.
_OF_THE_GUEST = frozenset(cpuid.msrs())
_ADDRESSES = {
    MSR_FS_BASE, MSR_GS_BASE, *(MSRS[name] for name in ("kernel_gs_base", "lstar", "cstar")),
}  # fmt: skip


class X86Vcpu(Exceptions, SoftCpu):
    """The interface is cpu.vcpu.Vcpu. Guests run in ring 0, as those of the hvt target do."""

    arch = lib.UC_ARCH_X86
    mode = UC_MODE_64
    pc = NUMBERS["rip"]
    pc_name = "rip"
    what = "software CPU"
    _xcr0 = 1  # kept for a CPU that has XSAVE

    def _hook(self) -> None:
        soft = self._soft
        check(lib.soft_hook_x86(soft, INS_OUT, INS_IN, INS_RDTSC, INS_RDTSCP), "hook instructions")
        self._insns = {number: ffi.new("struct soft_insn *") for number in _INSNS}
        for number, insn in self._insns.items():
            check(lib.soft_hook_insn(soft, insn, number), "hook instructions")
        check(lib.soft_watch_x86(soft), "hook instructions")
        self._set_fpu(Fpu())

    # The state, as a value.

    def _read(self, name: str) -> int:
        return self.read_register(NUMBERS[name])

    def _write(self, name: str, value: int) -> None:
        self.write_register(NUMBERS[name], value)

    def _msr(self, index: int) -> int:
        cell = ffi.new("struct uc_x86_msr *", {"rid": index})
        check(lib.soft_reg_read(self._soft, NUMBERS["msr"], cell), "read an MSR")
        return int(cell.value)

    def _set_msr(self, index: int, value: int) -> None:
        cell = ffi.new("struct uc_x86_msr *", {"rid": index, "value": value})
        check(lib.soft_reg_write(self._soft, NUMBERS["msr"], cell), "write an MSR")

    def _table(self, name: str) -> Any:
        cell = ffi.new("struct uc_x86_mmr *")
        check(lib.soft_reg_read(self._soft, NUMBERS[name], cell), f"read {name}")
        return cell

    def _set_table(self, name: str, **fields: int) -> None:
        cell = ffi.new("struct uc_x86_mmr *", fields)
        check(lib.soft_reg_write(self._soft, NUMBERS[name], cell), f"write {name}")

    def get_state(self) -> State:
        """All registers, as kvm.Vcpu gives them."""
        registers = {name: self._read(name) for name in REGISTERS}
        if self._soft.inside and self._soft.kind == lib.SOFT_OUT:
            after = registers["rip"] + self._length_of_out(registers["rip"])
            registers["rip"] = after & U64
        control = dict.fromkeys(CONTROL, 0) | {
            name: self._read(name) for name in ("cr0", "cr2", "cr3", "cr4")
        }
        control["efer"] = self._msr(MSR_EFER)
        msrs = {name: self._msr(index) for name, index in MSRS.items()}
        gdt, idt = self._table("gdt"), self._table("idt")
        return State(
            registers,
            {name: self._segment(name) for name in SEGMENTS},
            control,
            Table(gdt.base, gdt.limit),
            Table(idt.base, idt.limit),
            self._get_fpu(),
            msrs,
            self._xcr0,
            DebugRegisters(
                tuple(self.read_register(NUMBERS["dr0"] + index) for index in range(4)),
                self._read("dr6"),
                self._read("dr7"),
            ),
        )

    def _segment(self, name: str) -> Segment:
        if name in ("tr", "ldt"):
            table = self._table(name)
            return _from_flags(table.selector, table.base, table.limit, table.flags)
        base = self._read(f"{name}_base") if name in ("fs", "gs") else 0
        segment = _CODE if name == "cs" else _DATA
        return Segment(**{**segment.__dict__, "selector": self._read(name) & 0xFFFF, "base": base})

    def set_state(self, state: State) -> None:
        """Raises HostError for a state that this CPU has no way to be in."""
        code = state.segments["cs"]
        if not code.l or code.dpl or not state.control["efer"] & EFER_LMA:
            raise HostError("software CPU: it runs 64-bit code in ring 0 only")
        if state.fpu and state.fpu.extended:
            raise HostError(f"software CPU: it has no AVX: use {option('cpu', 'auto')}")
        self._xcr0 = state.xcr0 or 1
        if self._soft.inside:
            self._renew()
        self._set_msr(MSR_EFER, state.control["efer"])
        for name in ("cr2", "cr3", "cr4", "cr0"):
            self._write(name, state.control[name])
        for name, table in (("gdt", state.gdt), ("idt", state.idt)):
            self._set_table(name, base=table.base, limit=table.limit)
        self._set_segments(state.segments)
        if state.fpu is not None:
            self._set_fpu(state.fpu)
        for name, value in state.msrs.items():
            self._set_msr(MSRS[name], value)
        if state.debug is not None:
            for index, address in enumerate(state.debug.breakpoints):
                self.write_register(NUMBERS["dr0"] + index, address)
            self._write("dr6", state.debug.dr6)
            self._write("dr7", state.debug.dr7)
        for name in REGISTERS:
            self._write(name, state.registers[name])

    def _set_segments(self, segments: dict[str, Segment]) -> None:
        for name in ("cs", "ds", "es", "ss"):
            self._write(name, segments[name].selector)
        for name in ("fs", "gs"):
            # The emulator would read the descriptor, which need not be there any more.
            self._write(f"{name}_base", segments[name].base)
        for name in ("tr", "ldt"):
            each = segments[name]
            self._set_table(
                name,
                selector=each.selector,
                base=each.base,
                limit=each.limit,
                flags=_flags(each),
            )

    def _get_fpu(self) -> Fpu:
        tags = self._read("fptag")
        return Fpu(
            fcw=self._read("fcw"),
            fsw=self._read("fsw"),
            ftwx=sum((tags >> 2 * index & 3 != 3) << index for index in range(8)),
            last_opcode=self._read("last_opcode"),
            last_ip=self._read("last_ip"),
            last_dp=self._read("last_dp"),
            st=tuple(self._wide("st0", index, 10) for index in range(8)),
            xmm=tuple(self._wide("xmm0", index, 16) for index in range(16)),
            mxcsr=self._read("mxcsr"),
        )

    def _set_fpu(self, fpu: Fpu) -> None:
        tags = sum((0 if fpu.ftwx >> index & 1 else 3) << 2 * index for index in range(8))
        self._write("fptag", tags)
        for name in ("fcw", "fsw", "last_opcode", "last_ip", "last_dp", "mxcsr"):
            self._write(name, getattr(fpu, name))
        for first, values in (("st0", fpu.st), ("xmm0", fpu.xmm)):
            for index, value in enumerate(values):
                number = NUMBERS[first] + index
                check(lib.soft_reg_write(self._soft, number, value.ljust(16, b"\0")), "write")

    def _wide(self, first: str, index: int, size: int) -> bytes:
        cell = ffi.new("char[16]")
        check(lib.soft_reg_read(self._soft, NUMBERS[first] + index, cell), "read a register")
        return bytes(ffi.buffer(cell)[:size])

    def _length_of_out(self, rip: int) -> int:
        code = self._code_at(rip)
        at = skip_prefixes(code)
        return at + (2 if code[at : at + 1] in (b"\xe6", b"\xe7") else 1)

    # Exceptions.

    def _on_interrupt(self) -> Exit | None:
        number = self._soft.number
        error_code, by_instruction = self._take_exception()
        return self._deliver(CpuException(number, error_code), by_instruction)

    def _on_fetch(self) -> Exit | None:
        return self._deliver(CpuException(PF, PF_PRESENT | PF_FETCH, self.instruction_pointer()))

    def _take_exception(self) -> tuple[int, bool]:
        """The emulator's error code and whether an INT caused it; it forgets the exception."""
        fields = emulator_fields()
        context = lib.soft_context(self._soft)
        try:
            check(lib.soft_context_save(self._soft, context), "read the exception")
            record = ffi.buffer(context, lib.soft_context_size(self._soft))
            error_code = int.from_bytes(record[fields.error_code : fields.error_code + 4], "little")
            by_instruction = record[fields.is_int : fields.is_int + 4] != bytes(4)
            record[fields.in_flight : fields.in_flight + 4] = b"\xff" * 4
            check(lib.soft_context_restore(self._soft, context), "take the exception")
        finally:
            lib.soft_context_free(context)
        return error_code, by_instruction

    # Instructions.

    def _on_invalid(self) -> Exit | None:
        if is_undefined(self._code_at(self.instruction_pointer())):
            return self._deliver(CpuException(UD))
        return Failure("software CPU: it can't do this instruction")

    def _on_insn(self) -> Exit | None:
        return _INSNS[self._soft.number](self)

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """As cpu.vcpu.Vcpu has it."""
        return leaf_values(leaf, subleaf)

    def _cpuid(self) -> Exit | None:
        leaf, subleaf = self._read("rax") & 0xFFFFFFFF, self._read("rcx") & 0xFFFFFFFF
        values = leaf_values(leaf, subleaf)
        for name, value in zip(("rax", "rbx", "rcx", "rdx"), values, strict=True):
            self._write(name, value)
        self._soft.reply = 1
        return None

    def _system_call(self) -> Exit | None:
        return Failure("software CPU: it can't do this instruction")

    def _on_code(self) -> Exit | None:
        rip = self._soft.address
        code = self._code_at(rip)
        at = skip_prefixes(code)
        after = (rip + at + 2) & U64
        opcode = code[at : at + 2]
        if opcode == b"\x0f\x32":
            return self._rdmsr(after)
        if opcode == b"\x0f\x30":
            return self._wrmsr(after)
        if opcode[:1] in (b"\xc4", b"\xc5"):
            return Failure("software CPU: it can't do this instruction")
        return None

    def _rdmsr(self, after: int) -> Exit | None:
        index = self._read("rcx") & 0xFFFFFFFF
        if index not in _OF_THE_GUEST:
            return self._deliver(CpuException(GP))
        if index == MSR_TSC:
            value = lib.soft_counter(self._clock.cell)
            self._write("rax", value & 0xFFFFFFFF)
            self._write("rdx", value >> 32)
            self._write("rip", after)
        return None

    def _wrmsr(self, after: int) -> Exit | None:
        index = self._read("rcx") & 0xFFFFFFFF
        value = self._read("rax") & 0xFFFFFFFF | (self._read("rdx") & 0xFFFFFFFF) << 32
        if index not in _OF_THE_GUEST or (index in _ADDRESSES and not is_canonical(value)):
            return self._deliver(CpuException(GP))
        if index == MSR_TSC:
            lib.soft_set_counter(self._clock.cell, value, self.cpu_cycle_freq)
            self._write("rip", after)
        return None


_INSNS: dict[int, Callable[[X86Vcpu], Exit | None]] = {
    INS_CPUID: X86Vcpu._cpuid,
    INS_SYSCALL: X86Vcpu._system_call,
    INS_SYSENTER: X86Vcpu._system_call,
}
_CODE = Segment(limit=0xFFFFFFFF, type=11, present=1, s=1, l=1, g=1)
_DATA = Segment(limit=0xFFFFFFFF, type=3, present=1, s=1, db=1, g=1)


def _flags(segment: Segment) -> int:
    """The emulator's word for a segment's attributes: the descriptor's upper half."""
    if segment.unusable:
        return 0
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    return access << 8 | segment.avl << 20 | segment.l << 21 | segment.db << 22 | segment.g << 23


def _from_flags(selector: int, base: int, limit: int, flags: int) -> Segment:
    if not flags >> 15 & 1:
        return UNUSABLE
    return Segment(
        base, limit, selector, flags >> 8 & 0xF, 1, flags >> 13 & 3, flags >> 22 & 1,
        flags >> 12 & 1, flags >> 21 & 1, flags >> 23 & 1, flags >> 20 & 1,
    )  # fmt: skip


# CPUID: what the emulator can do of what a Haswell promises, and no more: nothing that cpuid.HIDDEN
# hides on KVM, no XSAVE (so no AVX), no SYSCALL, no FMA. Source: the emulator's own CPUID
# and its list of what it implements.
_BRAND = b"ptender software CPU".ljust(48, b"\0")
_VENDOR = struct.unpack("<3I", b"GenuineIntel")
_LEAVES = {
    0: (7, _VENDOR[0], _VENDOR[2], _VENDOR[1]),
    1: (0x306C4, 0x800, 0xC2D82203, 0x078BA17D),
    7: (0, 0x40389, 0, 0),
    cpuid.HYPERVISOR: cpuid.hypervisor(b"ptender soft"),
    0x80000000: (0x80000008, 0, 0, 0),
    0x80000001: (0, 0, 0x21, 0x28100000),
    0x80000008: (0x3028, 0, 0, 0),
}
for _index in range(3):
    _LEAVES[0x80000002 + _index] = struct.unpack_from("<4I", _BRAND, _index * 16)


def leaf_values(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX."""
    if leaf == 7 and subleaf:
        return 0, 0, 0, 0
    return _LEAVES.get(leaf, (0, 0, 0, 0))


class Fields:
    """Where the emulator keeps an exception in its record of the CPU: offsets in bytes."""

    def __init__(self, error_code: int, is_int: int, in_flight: int) -> None:
        self.error_code = error_code
        self.is_int = is_int
        self.in_flight = in_flight


_fields: Fields | None = None


def emulator_fields() -> Fields:
    """Found by experiment, once per process: the emulator's interface does not have them.

    A #GP with a known error code changes three words of the record in a way nothing else does.
    """
    global _fields
    if _fields is None:
        selector = 0x1238
        before, fault = _experiment(b"\x8e\xd8", selector)  # mov %eax, %ds
        _, by_int = _experiment(b"\xcd\x20", selector)  # int $0x20
        words = range(len(before))
        codes = [i for i in words if (before[i], fault[i], by_int[i]) == (0, selector, 0)]
        flights = [i for i in words if (before[i], fault[i], by_int[i]) == (-1, GP, -1)]
        if len(codes) != 1 or len(flights) != 1 or by_int[codes[0] + 1] != 1:
            raise HostError("software CPU: this version of Unicorn keeps exceptions elsewhere")
        _fields = Fields(codes[0] * 4, codes[0] * 4 + 4, flights[0] * 4)
    return _fields


def _experiment(code: bytes, rax: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The emulator's record before and after an instruction that causes an exception."""
    page = ffi.new("char[]", 2 * PAGE)
    at = -int(ffi.cast("uintptr_t", page)) % PAGE
    ffi.memmove(page + at, code, len(code))
    soft = open_emulator(lib.UC_ARCH_X86, UC_MODE_64, NUMBERS["rip"])
    context = lib.soft_context(soft)
    try:
        check(lib.soft_map(soft, 0, PAGE, 7, page + at), "map memory")
        lib.soft_reg_write(soft, NUMBERS["rax"], ffi.new("uint64_t *", rax))
        before = _words(soft, context)
        lib.soft_run(soft)
        return before, _words(soft, context)
    finally:
        lib.soft_context_free(context)
        lib.soft_close(soft)


def _words(soft: Any, context: Any) -> tuple[int, ...]:
    check(lib.soft_context_save(soft, context), "read the emulator's record")
    record = bytes(ffi.buffer(context, lib.soft_context_size(soft)))
    return struct.unpack(f"<{len(record) // 4}i", record[: len(record) // 4 * 4])
