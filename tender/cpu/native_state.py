"""The registers of the native CPU: those of its guest's process, and those of ring 0.

What lies in the shared region is the guest's word (native.c checks it).
"""

from __future__ import annotations

from tender._native import ffi, lib
from tender.boot.layout import X86_PML4
from tender.boot.x86_64 import (
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_OSXSAVE,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EXTENDED,
    MSRS,
    PAT_AT_RESET,
    REGISTERS,
    X87_AND_SSE,
    DebugRegisters,
    Fpu,
    State,
)
from tender.cpu.privileged import Privileged
from tender.cpu.vcpu import is_near, other_frequency
from tender.cpu.x86_64 import IF, U64
from tender.dataclass import replace
from tender.errors import HostError, option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NUMBERS = {name: index for index, name in enumerate(REGISTERS)}
# The system registers of a process on the page tables that the tender makes: what they must be, and
# the bits that may be otherwise.
CR0_ET = 1 << 4
FIXED = {
    "cr0": (CR0_PE | CR0_NE | CR0_WP | CR0_PG, CR0_ET),
    "cr3": (X86_PML4, 0),
    "cr4": (CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT, CR4_OSXSAVE),
    "cr8": (0, 0),
    "efer": (EFER_LME, EFER_LMA | EFER_NXE),
}
LEAP_S = 0.1  # by which the guest's clock may leap
MSRS_AT_START = {**dict.fromkeys(MSRS, 0), "pat": PAT_AT_RESET}


def machine_cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX, EDX of this machine's CPUID."""
    registers = ffi.new("uint32_t[4]")
    lib.cpuid_leaf(leaf, subleaf, registers)
    eax, ebx, ecx, edx = registers
    return eax, ebx, ecx, edx


class NativeState(Privileged):
    """A mixin. `_cell` is the struct native; `_started`: there is a process, whose frame it has."""

    what = "native CPU"
    cpu_cycle_freq: int
    _machine_hz: int
    _cell: Any
    _started: bool

    def _read(self, name: str) -> int:
        if name == "rflags":
            return int(self._cell.registers[17]) & ~IF | self._if
        if name in NUMBERS:
            return int(self._cell.registers[NUMBERS[name]])
        if name in self._state.segments:
            return self._state.segments[name].selector
        return self._state.control[name]

    def _write(self, name: str, value: int) -> None:
        if name == "rflags":
            self._if = value & IF
            value |= IF
        if name in NUMBERS:
            self._cell.registers[NUMBERS[name]] = value & U64
        elif name in self._state.segments:
            segments = self._state.segments
            segments[name] = replace(segments[name], selector=value)
        else:
            self._state.control[name] = value

    def _get_base(self, name: str) -> int:
        return int(getattr(self._cell.shared, f"{name}_base"))

    def _set_base(self, name: str, base: int) -> None:
        setattr(self._cell.shared, f"{name}_base", base)

    def _table(self, name: str) -> Any:
        if name in ("gdt", "idt"):
            return getattr(self._state, name)
        return self._state.segments[name]

    def registers(self) -> dict[str, int]:
        """As kvm.Vcpu has it."""
        return {name: self._read(name) for name in REGISTERS}

    def instruction_pointer(self) -> int:
        """As kvm.Vcpu has it."""
        return int(self._cell.registers[NUMBERS["rip"]])

    def core_state(self) -> State:
        """As kvm.Vcpu has it."""
        segments = dict(self._state.segments)
        for name in ("fs", "gs"):
            segments[name] = replace(segments[name], base=self._get_base(name))
        return replace(
            self._state,
            registers=self.registers(),
            segments=segments,
            control=dict(self._state.control),
        )

    def get_state(self) -> State:
        """As kvm.Vcpu has it. `fpu` is None where the guest has forged its frame."""
        from tender.cpu import xsave

        if not self._started:
            return replace(self._state, fpu=self._state.fpu or Fpu())
        area = self._area(xsave.size())
        fpu = xsave.fpu(bytes(ffi.buffer(area))) if area else None
        xcr0 = lib.xsave_enabled() & (X87_AND_SSE | sum(1 << part for part in EXTENDED))
        state = self.core_state()
        if xcr0 > 1:  # what the guest could do here, it can do where it goes on
            state.control["cr4"] |= CR4_OSXSAVE
        return replace(state, fpu=fpu, msrs=dict(self._state.msrs), xcr0=xcr0)

    def _area(self, size: int) -> Any:
        """The XSAVE area of the frame; None: there is none."""
        area = ffi.new("char[]", size)
        return None if lib.native_fpu(self._cell, area, size, 0) else area

    def _set_fpu(self, fpu: Fpu) -> None:
        from tender.cpu import xsave

        area = self._area(xsave.size())
        if area:
            xsave.write(fpu, ffi.buffer(area), self.what)
            lib.native_fpu(self._cell, area, len(area), 1)

    def set_state(self, state: State) -> None:
        """As cpu.vcpu.Vcpu has it."""
        self._check(state)
        self._state = replace(
            state,
            segments=dict(state.segments),
            control=dict(state.control),
            msrs=MSRS_AT_START | state.msrs,
        )
        self._if = state.registers["rflags"] & IF
        if not self._started:
            if state.fpu is not None:
                from tender.cpu import xsave  # noqa: F401  # `start` can't after lockdown
            return
        for name in REGISTERS:
            self._write(name, state.registers[name])
        for name in ("fs", "gs"):
            self._set_base(name, state.segments[name].base)
        if state.fpu is not None:
            self._set_fpu(state.fpu)
        lib.native_set_registers(self._cell)

    def _check(self, state: State) -> None:
        """Raise HostError for what a process can't have."""
        for name, (value, free) in FIXED.items():
            if (state.control[name] ^ value) & ~free:
                raise HostError(
                    f"{self.what}: the guest has changed {name.upper()} "
                    f"({option('cpu', 'soft')} may run it)"
                )
        if state.debug not in (None, DebugRegisters()):
            raise HostError(
                f"{self.what}: the guest uses debug registers ({option('cpu', 'soft')} may run it)"
            )

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """The machine's own: CPUID does not trap in a process."""
        return machine_cpuid(leaf, subleaf)

    def counter(self) -> int:
        """The machine's own TSC, unless RDTSC traps."""
        return int(lib.native_counter(self._cell))

    def set_counter(self, value: int, hz: int) -> int:
        """As cpu.vcpu.Vcpu has it. Where the machine's own TSC will not do, RDTSC traps from the
        start of the process on, which makes it and hypercalls slower."""
        now = self.counter()
        is_own = is_near(hz, self._machine_hz) and 0 <= now - value < hz * LEAP_S
        if is_own or (self._started and is_near(hz, self._machine_hz)):
            return now
        if self._started:
            raise other_frequency(self.what, self._machine_hz, hz)
        cell = self._cell
        cell.tsc, cell.tsc_then = value, lib.tsc_read()
        cell.tsc_hz, cell.machine_hz = hz, self._machine_hz
        cell.traps_tsc = cell.shared.traps_tsc = 1
        self.cpu_cycle_freq = hz
        return self.counter()
