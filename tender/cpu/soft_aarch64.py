"""An aarch64 CPU in software: registers, exceptions, and what the emulator leaves to its user.

The rule here: a guest sees what a CPU of KVM shows it. The emulator executes instructions and walks
the guest's page tables; it does not deliver exceptions, and that is here. Sources: the Arm
Architecture Reference Manual for A-profile (DDI 0487), chapters D1 and D24; the emulator's public
interface (unicorn/arm64.h).
"""

from __future__ import annotations

import struct

from tender._soft import ffi, lib
from tender.boot.aarch64 import (
    GENERAL,
    PSTATE_DAIF,
    PSTATE_EL1H,
    PSTATE_MODE,
    REGISTERS,
    SYSTEM,
    VECTORS,
    State,
    stack_pointer,
)  # fmt: skip
from tender.boot.layout import MMIO_BASE
from tender.cpu.soft import SoftCpu, check, open_emulator
from tender.cpu.vcpu import Failure, Mmio
from tender.errors import GuestFault, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.cpu.vcpu import Exit

UC_MODE_ARM = 0
INS_MRS = 1  # UC_ARM64_INS_*

# UC_ARM64_REG_*; `sp` is the one in use, `system` any register of MRS and MSR.
NUMBERS = {
    **{name: 199 + index for index, name in enumerate(GENERAL[:29])},
    "x29": 1, "x30": 2, "sp": 4, "pc": 260, "pstate": 265, "sp_el0": 270, "sp_el1": 271,
    "v0": 228, "system": 290, "fpcr": 291, "fpsr": 292,
}  # fmt: skip

CNTFRQ_EL0 = (3, 3, 14, 0, 0)
# The levels above the guest's, as a hypervisor sets them: EL1 is 64-bit and not secure, and calls
# to what is above it (SMC, HVC) are undefined instructions.
ABOVE = (
    ((3, 6, 1, 1, 0), 1 << 10 | 1 << 7 | 1),  # SCR_EL3: RW, SMD, NS
    ((3, 4, 1, 1, 0), 1 << 31 | 1 << 29),  # HCR_EL2: RW, HCD
)

# The emulator's numbers of exceptions that have a syndrome; those with an address are aborts.
UNDEFINED, SVC, PREFETCH_ABORT, DATA_ABORT, BREAKPOINT = 1, 2, 3, 4, 7
SYNCHRONOUS = {UNDEFINED, SVC, PREFETCH_ABORT, DATA_ABORT, BREAKPOINT}
ABORTS = {PREFETCH_ABORT, DATA_ABORT}

INSTRUCTION = 4  # bytes
U64 = (1 << 64) - 1  # addresses wrap at 64 bits
INSTRUCTION_ABORT = 0x8600000F  # ESR_EL1: from EL1, permission fault, level 3 (D17.2.37)
# Stores of 4 bytes that a CPU describes to its hypervisor (D24.2.40, ISV): those without
# writeback. As (mask, value): STR with an offset, STUR, STR with an index register, STLR.
STORES = (
    (0xFFC00000, 0xB9000000),
    (0xFFE00C00, 0xB8000000),
    (0xFFE00C00, 0xB8200800),
    (0xFFFFFC00, 0x889FFC00),
)


class Arm64Vcpu(SoftCpu):
    """The interface is cpu.vcpu.Vcpu. Guests run in EL1, as those of the hvt target do."""

    arch = lib.UC_ARCH_ARM64
    mode = UC_MODE_ARM
    pc = NUMBERS["pc"]
    pc_name = "pc"
    stops_before_access = True

    def _hook(self) -> None:
        check(lib.soft_hook_arm64(self._soft, INS_MRS), "hook instructions")
        self._cell = ffi.new("uint64_t *")
        self._stores: set[int] = set()

    # The state, as a value.

    def _read(self, name: str) -> int:
        return self.read_register(NUMBERS[name])

    def _write(self, name: str, value: int) -> None:
        self.write_register(NUMBERS[name], value)

    def _system(self, encoding: tuple[int, int, int, int, int]) -> int:
        cell = _cp_reg(encoding)
        check(lib.soft_reg_read(self._soft, NUMBERS["system"], cell), "read a system register")
        return int(cell.val)

    def _set_system(self, encoding: tuple[int, int, int, int, int], value: int) -> None:
        cell = _cp_reg(encoding, value)
        check(lib.soft_reg_write(self._soft, NUMBERS["system"], cell), "write a system register")

    def get_state(self) -> State:
        """All registers, as boot/aarch64.py has them."""
        registers = {name: self._read(name) for name in REGISTERS}
        registers[stack_pointer(registers["pstate"])] = self._read("sp")
        # A hypercall is made when its exit has been answered.
        registers["pc"] = (registers["pc"] + self._soft.skip) & U64
        vectors = []
        cell = ffi.new("char[16]")
        for index in range(VECTORS):
            check(lib.soft_reg_read(self._soft, NUMBERS["v0"] + index, cell), "read a register")
            vectors.append(int.from_bytes(ffi.buffer(cell), "little"))
        return State(
            registers,
            {name: self._system(encoding) for name, encoding in SYSTEM.items()},
            tuple(vectors),
            self._read("fpcr"),
            self._read("fpsr"),
        )

    def set_state(self, state: State) -> None:
        """Raises HostError for a state that this CPU has no way to be in."""
        if state.registers["pstate"] & 1 << 4:
            raise HostError("software CPU: it runs 64-bit code only")
        if self._soft.inside:
            self._renew()
        for encoding, value in (*ABOVE, (CNTFRQ_EL0, self.cpu_cycle_freq)):
            self._set_system(encoding, value)
        for name in REGISTERS:
            self._write(name, state.registers[name])
        self._write("sp", state.registers[stack_pointer(state.registers["pstate"])])
        for index, value in enumerate(state.vectors):
            number = NUMBERS["v0"] + index
            check(lib.soft_reg_write(self._soft, number, value.to_bytes(16, "little")), "write")
        self._write("fpcr", state.fpcr)
        self._write("fpsr", state.fpsr)
        for name, encoding in SYSTEM.items():  # last: the emulator looks at the state anew
            self._set_system(encoding, state.system[name])

    def forget_code(self) -> None:
        """As SoftCpu has it."""
        self._stores.clear()
        super().forget_code()

    # Hypercalls: stores to where no memory is.

    def _on_memory(self) -> Exit | None:
        soft = self._soft
        gpa = soft.address
        if gpa < MMIO_BASE or soft.number != lib.UC_MEM_WRITE_UNMAPPED:
            return super()._on_memory()
        self._before_hypercall((gpa - MMIO_BASE) // 8)
        size = soft.size
        if size == 4:
            lib.soft_reg_read(soft, self.pc, self._cell)
            if self._cell[0] not in self._stores and not self._is_plain_store(self._cell[0]):
                return Failure("software CPU: not a store that a hypervisor can decode")
        soft.skip = INSTRUCTION
        return Mmio(gpa, size, True, soft.value & 0xFFFFFFFF)

    def _is_plain_store(self, pc: int) -> bool:
        try:
            code = int.from_bytes(self._memory.readable(pc, INSTRUCTION), "little")
        except GuestFault:  # not where it seems to be
            return False
        if not any(code & mask == value for mask, value in STORES):
            return False
        if not self._code_is_writable:
            self._stores.add(pc)
        return True

    # Exceptions.

    def _on_interrupt(self) -> Exit | None:
        number = self._soft.number
        if number not in SYNCHRONOUS:
            return Failure(f"software CPU: exception {number} of the emulator")
        syndrome, address = self._exception()
        return self._deliver(syndrome, address if number in ABORTS else None)

    def _on_fetch(self) -> Exit | None:
        return self._deliver(INSTRUCTION_ABORT, self.instruction_pointer())

    def _exception(self) -> tuple[int, int]:
        """The emulator's syndrome (as in ESR_EL1) and address (as in FAR_EL1)."""
        at = syndrome_offset()
        context = lib.soft_context(self._soft)
        try:
            record = _record(self._soft, context)
        finally:
            lib.soft_context_free(context)
        syndrome, _, address = struct.unpack_from("<IIQ", record, at)
        return syndrome, address

    def _deliver(self, syndrome: int, address: int | None) -> Exit | None:
        """Call the guest's handler (D1.3.2); None, or the exit where it has none."""
        pc, pstate = self._read("pc"), self._read("pstate")
        stack = stack_pointer(pstate)
        handler = (self._system(SYSTEM["vbar_el1"]) + vector(pstate)) & U64
        if address is not None and pc == address == handler:
            return Failure("software CPU: the exception's handler can't be executed")
        self._write(stack, self._read("sp"))
        self._write("pstate", PSTATE_DAIF | PSTATE_EL1H)
        self._write("sp", self._read("sp_el1"))
        if address is not None:
            self._set_system(SYSTEM["far_el1"], address)
        self._set_system(SYSTEM["esr_el1"], syndrome)
        self._set_system(SYSTEM["elr_el1"], pc)
        self._set_system(SYSTEM["spsr_el1"], pstate)
        self._write("pc", handler)
        self._soft.again = True  # in this emulation, the emulator would lose track of the PC
        return None


def vector(pstate: int) -> int:
    """The offset of a synchronous exception's handler (table D1-5): it depends on the origin."""
    if not pstate & 0xC:
        return 0x400  # EL0
    return 0x200 if pstate & PSTATE_MODE == PSTATE_EL1H else 0


def _cp_reg(encoding: tuple[int, int, int, int, int], value: int = 0) -> Any:
    op0, op1, crn, crm, op2 = encoding
    fields = {"op0": op0, "op1": op1, "crn": crn, "crm": crm, "op2": op2, "val": value}
    return ffi.new("struct uc_arm64_cp_reg *", fields)


def _record(soft: Any, context: Any) -> bytes:
    check(lib.soft_context_save(soft, context), "read the emulator's record")
    return bytes(ffi.buffer(context, lib.soft_context_size(soft)))


_offset: int | None = None


def syndrome_offset() -> int:
    """Where the emulator keeps an exception's syndrome in its record of the CPU: bytes.

    Found by experiment, once per process: the emulator's interface does not have it. Eight bytes
    behind it is the address of the access: here one that is past all that a CPU can address.
    """
    global _offset
    if _offset is None:
        address, fault = 0x5A3C7E1D9B2F, 0x96000000  # a data abort, address size, level 0
        record = _experiment(address)
        wanted = [
            at
            for at in range(0, len(record) - 16, 8)
            if struct.unpack_from("<IxxxxQ", record, at) == (fault, address)
        ]
        if len(wanted) != 1:
            raise HostError("software CPU: this version of Unicorn keeps exceptions elsewhere")
        (_offset,) = wanted
    return _offset


def _experiment(address: int) -> bytes:
    """The emulator's record after a load from an address where nothing can be; no translation."""
    page_size = 4096
    page = ffi.new("char[]", 2 * page_size)
    at = -int(ffi.cast("uintptr_t", page)) % page_size
    ffi.memmove(page + at, 0xF9400020.to_bytes(4, "little"), 4)  # ldr x0, [x1]
    soft = open_emulator(lib.UC_ARCH_ARM64, UC_MODE_ARM, NUMBERS["pc"])
    context = lib.soft_context(soft)
    try:
        check(lib.soft_map(soft, 0, page_size, 7, page + at), "map memory")
        for encoding, value in ABOVE:
            lib.soft_reg_write(soft, NUMBERS["system"], _cp_reg(encoding, value))
        lib.soft_reg_write(soft, NUMBERS["x1"], ffi.new("uint64_t *", address))
        lib.soft_run(soft)
        return _record(soft, context)
    finally:
        lib.soft_context_free(context)
        lib.soft_close(soft)
