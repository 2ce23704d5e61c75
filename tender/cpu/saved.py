"""The state of a CPU as bytes of a fixed length, and the check of what others say is one.

A state that is read is one that a guest can have made: 64-bit, in ring 0 or EL1, without a reserved
bit. What a CPU can't have beside that, its `set_state` refuses. Source: Intel SDM volume 3,
chapters 2, 3 and 17, and Arm DDI 0487, C5.2.
"""

from __future__ import annotations

import struct

from tender.boot import aarch64, x86_64
from tender.boot.x86_64 import EXTENDED, MSRS, DebugRegisters, Fpu, Segment, Table
from tender.cpu.x86_64 import U64, is_canonical
from tender.errors import HostError, SnapshotError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_CONTROL = tuple(name for name in x86_64.CONTROL if name != "apic_base")  # that is KVM's own
_SEGMENT = struct.Struct("<QIH9B")
_X86 = struct.Struct(
    f"<{len(x86_64.REGISTERS)}Q{len(_CONTROL)}Q2Q2H6Q{len(MSRS)}QQ"
    f"HHBHQQI80s256sB{''.join(f'{size}s' for size in EXTENDED.values())}H"
)
_AARCH64 = struct.Struct(f"<{len(aarch64.REGISTERS) + len(aarch64.SYSTEM)}Q512s2Q")
X86_SIZE = len(x86_64.SEGMENTS) * _SEGMENT.size + _X86.size
AARCH64_SIZE = _AARCH64.size

# What a guest may set: other bits are reserved, or of what it does not have (VMX, SMX, CET, ...).
_RFLAGS = 0x3D7FD7  # no VM: there is no virtual-8086 mode in 64-bit mode
_CR0 = 0xE005003F
_CR0_MUST = x86_64.CR0_PE | x86_64.CR0_PG
_CR0_CD, _CR0_NW = 1 << 30, 1 << 29
_CR4 = 0x770FFF  # up to OSXMMEXCPT, UMIP; FSGSBASE, PCIDE, OSXSAVE; SMEP, SMAP, PKE
_EFER_SCE = 1 << 0
_EFER_MUST = x86_64.EFER_LME | x86_64.EFER_LMA
_EFER = _EFER_MUST | _EFER_SCE | x86_64.EFER_NXE
_XCR0 = (0b1, 0b11, 0b111, 0b11100111)  # with AVX, with AVX-512 (SDM volume 1, 13.3)
_MXCSR = 0xFFFF | x86_64.MXCSR_MM
_CR3_MAX = (1 << 52) - 1  # bits of a physical address
_CR8_MAX = 15
_U32 = (1 << 32) - 1
_PAT_TYPES = (0, 1, 4, 5, 6, 7)
_MOST = {"type": 15, "dpl": 3}  # of a segment's fields; 1 of the other bytes
_CODE = 8  # of a segment's type
_ADDRESSES = ("lstar", "cstar", "sysenter_esp", "sysenter_eip", "kernel_gs_base")
_EL1T = 4
_PSTATE = 0xF << 28 | 0xF << 22 | 0xF << 6 | 0xF  # NZCV, PAN and others, DAIF, EL and SP


def encode(state: Any) -> bytes:
    """The state, of boot/x86_64.py or boot/aarch64.py, as X86_SIZE or AARCH64_SIZE bytes.

    Raises HostError where it is not whole: the guest has forged its frame on the native CPU.
    """
    if not isinstance(state, x86_64.State):
        vectors = b"".join(value.to_bytes(16, "little") for value in state.vectors)
        numbers = (*state.registers.values(), *state.system.values())
        return _AARCH64.pack(*numbers, vectors, state.fpcr, state.fpsr)
    fpu, debug = state.fpu, state.debug or DebugRegisters()
    if fpu is None:
        raise HostError("the guest's registers can't be read")
    named = sum(1 << index for index, name in enumerate(MSRS) if name in state.msrs)
    segments = b"".join(
        _SEGMENT.pack(*state.segments[name].__dict__.values()) for name in x86_64.SEGMENTS
    )
    return segments + _X86.pack(
        *(state.registers[name] for name in x86_64.REGISTERS),
        *(state.control[name] for name in _CONTROL),
        *(state.gdt.base, state.idt.base, state.gdt.limit, state.idt.limit),
        *(*debug.breakpoints, debug.dr6, debug.dr7),
        *(state.msrs.get(name, 0) for name in MSRS),
        state.xcr0,
        *(fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode, fpu.last_ip, fpu.last_dp, fpu.mxcsr),
        *(b"".join(fpu.st), b"".join(fpu.xmm)),
        sum(1 << part for part in fpu.extended),
        *(fpu.extended.get(part, b"") for part in EXTENDED),
        named,
    )


def decode(data: bytes, *, is_aarch64: bool) -> Any:
    """The state that encode() gave; raises SnapshotError where `data` is not a state of a guest."""
    if len(data) != (AARCH64_SIZE if is_aarch64 else X86_SIZE):
        raise _error("its size")
    if is_aarch64:
        return _decode_aarch64(data)
    values = iter(_X86.unpack_from(data, len(x86_64.SEGMENTS) * _SEGMENT.size))
    segments = {
        name: Segment(*fields)
        for name, fields in zip(
            x86_64.SEGMENTS, _SEGMENT.iter_unpack(data[: -_X86.size]), strict=True
        )
    }
    registers = {name: next(values) for name in x86_64.REGISTERS}
    control = {"apic_base": 0} | {name: next(values) for name in _CONTROL}
    gdt, idt, gdt_limit, idt_limit = (next(values) for _ in range(4))
    debug = DebugRegisters(tuple(next(values) for _ in range(4)), next(values), next(values))
    msrs = {name: next(values) for name in MSRS}
    xcr0 = next(values)
    fpu, named = _decode_fpu(values)
    msrs = {name: msrs[name] for index, name in enumerate(MSRS) if named >> index & 1}
    tables = Table(gdt, gdt_limit), Table(idt, idt_limit)
    state = x86_64.State(registers, segments, control, *tables, fpu, msrs, xcr0, debug)
    for what, is_right in _x86_checks(state):
        if not is_right:
            raise _error(what)
    return state


def _decode_fpu(values: Iterator[Any]) -> tuple[Fpu, int]:
    fcw, fsw, ftwx, opcode, ip, dp, mxcsr, st, xmm, in_use = (next(values) for _ in range(10))
    parts = {part: next(values) for part in EXTENDED}
    fpu = Fpu(
        *(fcw, fsw, ftwx, opcode, ip, dp),
        st=tuple(st[at : at + 10] for at in range(0, len(st), 10)),
        xmm=tuple(xmm[at : at + 16] for at in range(0, len(xmm), 16)),
        mxcsr=mxcsr,
        extended={part: value for part, value in parts.items() if in_use >> part & 1},
    )
    return fpu, next(values)


def _x86_checks(state: x86_64.State) -> Iterator[tuple[str, bool]]:
    """What is checked, and whether it is right."""
    registers, control, segments = state.registers, state.control, state.segments
    cr0, efer, code = control["cr0"], control["efer"], segments["cs"]
    yield "RIP", is_canonical(registers["rip"])
    yield "RFLAGS", registers["rflags"] & (U64 ^ _RFLAGS) == 0 and bool(registers["rflags"] & 2)
    yield "CR0", cr0 & ~_CR0 == 0 and cr0 & _CR0_MUST == _CR0_MUST
    yield "CR0", bool(cr0 & _CR0_CD) or not cr0 & _CR0_NW
    yield "CR3", control["cr3"] <= _CR3_MAX
    yield "CR4", control["cr4"] & ~_CR4 == 0 and bool(control["cr4"] & x86_64.CR4_PAE)
    yield "CR8", control["cr8"] <= _CR8_MAX
    yield "EFER: it is not in long mode", efer & _EFER_MUST == _EFER_MUST and efer & ~_EFER == 0
    yield "CS: it is not in ring 0", code.dpl == 0 and segments["ss"].dpl == 0
    yield "CS", bool(code.l and code.present and code.s and code.type & _CODE) and not code.db
    for name, segment in segments.items():
        yield (
            name.upper(),
            is_canonical(segment.base)
            and all(
                value <= _MOST.get(field, 1)
                for field, value in segment.__dict__.items()
                if field not in ("base", "limit", "selector")
            ),
        )
    yield "GDTR, IDTR", is_canonical(state.gdt.base) and is_canonical(state.idt.base)
    yield "MSRs", all(is_canonical(state.msrs.get(name, 0)) for name in _ADDRESSES)
    pat = state.msrs.get("pat", 0).to_bytes(8, "little")
    yield "PAT", all(kind in _PAT_TYPES for kind in pat)
    yield "XCR0", state.xcr0 in _XCR0
    if state.debug is not None:
        yield "DR0 to DR3", all(map(is_canonical, state.debug.breakpoints))
        yield "DR6, DR7", max(state.debug.dr6, state.debug.dr7) <= _U32
    if state.fpu is not None:
        yield "MXCSR", not state.fpu.mxcsr & ~_MXCSR


def _decode_aarch64(data: bytes) -> aarch64.State:
    *numbers, vectors, fpcr, fpsr = _AARCH64.unpack(data)
    registers = dict(zip(aarch64.REGISTERS, numbers, strict=False))
    system = dict(zip(aarch64.SYSTEM, numbers[len(registers) :], strict=True))
    pstate = registers["pstate"]
    if pstate & ~_PSTATE or pstate & aarch64.PSTATE_MODE not in (_EL1T, aarch64.PSTATE_EL1H):
        raise _error("PSTATE: it is not in EL1")
    values = (int.from_bytes(vectors[at : at + 16], "little") for at in range(0, len(vectors), 16))
    return aarch64.State(registers, system, tuple(values), fpcr, fpsr)


def _error(what: str) -> SnapshotError:
    return SnapshotError(f"the snapshot is damaged: CPU state, {what}")
