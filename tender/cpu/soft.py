"""A CPU in software: the Unicorn emulator behind the interface of cpu.vcpu.Vcpu.

What all architectures have in common: the emulator's library, memory, exits, stop requests and the
clock. Registers and exceptions are in soft_x86_64.py and soft_aarch64.py. The emulator works in the
guest's own memory: nothing is copied, and the tender's protections hold.
"""

from __future__ import annotations

import errno
import os
import sys

from tender._native import ffi as native_ffi
from tender._native import lib as hvt
from tender._soft import ffi, lib
from tender.cpu.vcpu import Debug, Failure, Fault, Interrupted, IoIn, IoOut, Mmio
from tender.errors import HostError
from tender.memory import PROT_EXEC, PROT_WRITE, regions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from tender.cleanup import Cleanup
    from tender.clock import HostClock
    from tender.cpu.vcpu import Engine, Exit, Ring, Stops
    from tender.memory import GuestMemory
    from tender.stop import Stop

# Hypercalls with which the guest has the tender write data, which may be code.
_INTO_MEMORY = {hvt.HVT_HYPERCALL_BLOCK_READ, hvt.HVT_HYPERCALL_NET_READ}

NANOSECONDS = 1_000_000_000  # the guest's counter has this frequency unless it knows another
VERSION_MIN = (2, 1, 2)  # the first with RDTSC under the tender's control
INSTALL = "pip install 'ptender[soft]'"

_OUT = lib.SOFT_OUT
_DEBUG = {
    lib.SOFT_STEP: "step",
    lib.SOFT_BREAKPOINT: "breakpoint",
    lib.SOFT_READ: "read",
    lib.SOFT_WRITE: "write",
}
_run = lib.soft_run
_loaded = False


class NoEmulator(HostError):
    """The emulator is not installed, or is not one that can be used."""


def library() -> str:
    """The path of the emulator's library: of the Python package, else of the system."""
    # The package itself is not imported: that takes longer than running a short guest.
    name = "libunicorn.so.2"
    for folder in sys.path:
        path = os.path.join(folder, "unicorn", "lib", name)
        if os.path.exists(path):
            return path
    return name


def load() -> None:
    """Make the emulator usable; raises NoEmulator."""
    global _loaded
    if _loaded:
        return
    error = lib.soft_load(os.fsencode(library()))
    if error:
        reason = ffi.string(error).decode(errors="replace")
        raise NoEmulator(f"the software CPU needs the Unicorn emulator: {INSTALL} ({reason})")
    number = lib.soft_version()
    version = (number >> 16, number >> 8 & 0xFF, number & 0xFF)
    if version < VERSION_MIN or version[0] != VERSION_MIN[0]:
        found, wanted = (".".join(map(str, each)) for each in (version, VERSION_MIN))
        raise NoEmulator(f"the software CPU needs Unicorn {wanted}, not {found}: {INSTALL}")
    _loaded = True


def installed() -> bool:
    """Whether there is an emulator."""
    try:
        load()
    except NoEmulator:
        return False
    return True


def check_usable() -> None:
    """Raise HostError unless there is an emulator that can have its memory."""
    load()
    _check_memory(lib.soft_try_memory())


def _check_memory(error: int) -> None:
    if error == errno.ENOMEM:
        raise HostError(
            "software CPU: it needs 1 GiB of address space for translated code: raise `ulimit -v`",
            "mmap",
        )
    if error:
        raise HostError(
            "software CPU: it needs memory that is writable and executable, for translated code; "
            "here that is denied (MemoryDenyWriteExecute, PR_SET_MDWE, a seccomp filter, SELinux)",
            "mmap",
        )


def check(error: int, what: str) -> None:
    """Raise HostError for what the emulator calls an error."""
    if error:
        reason = ffi.string(lib.soft_strerror(error)).decode()
        raise HostError(f"software CPU: cannot {what}: {reason}")


def open_emulator(arch: int, mode: int, pc: int) -> Any:
    """A struct soft *, whose program counter is register `pc`; raises HostError."""
    error = ffi.new("int *")
    soft = lib.soft_open(arch, mode, pc, error)
    _check_memory(-error[0] if error[0] < 0 else 0)
    check(error[0], "start the emulator")
    return soft


class SoftCpu:
    """What the vCPUs of all architectures share.

    `executable` are the pages that can be executed, as (start, end): a jump anywhere else is an
    exception of the guest. `instructions` ends the guest after that many.
    """

    cpu_cycle_freq = NANOSECONDS
    arch: int
    mode: int
    pc: int  # the emulator's number of the program counter
    pc_name: str
    stops_before_access = False  # at a watchpoint, as the architecture has it

    def __init__(
        self,
        memory: GuestMemory,
        executable: Iterable[tuple[int, int]],
        clock: HostClock,
        cleanup: Cleanup,
        stop: Stop | None = None,
        instructions: int | None = None,
    ) -> None:
        load()
        self.fds: dict[str, int] = {}
        self._memory = memory
        self._executable = sorted(executable)
        self._clock = clock
        self._stop = stop
        self._instructions = instructions
        self._activity = ffi.NULL
        self._soft: Any = None
        self._debugged = False
        self._leave = {
            lib.SOFT_IN: self._on_in,
            lib.SOFT_STOPPED: Interrupted,
            lib.SOFT_HALTED: self._on_halted,
            lib.SOFT_MEMORY: self._on_memory,
            lib.SOFT_INTR: self._on_interrupt,
            lib.SOFT_INVALID: self._on_invalid,
            lib.SOFT_INSN: self._on_insn,
            lib.SOFT_CODE: self._on_code,
            lib.SOFT_LIMIT: self._on_limit,
            lib.SOFT_ERROR: self._on_error,
            lib.SOFT_DEBUG: self._on_debug,
        }
        lib.soft_set_counter(clock.cell, 0, NANOSECONDS)
        cleanup.callback(self.close)
        self._open()

    def count_in(self, activity: Any) -> None:
        """As cpu.vcpu.Vcpu has it."""
        self._activity = ffi.cast("struct activity *", int(native_ffi.cast("uintptr_t", activity)))
        self._soft.activity = self._activity

    def _open(self) -> None:
        soft = self._soft = open_emulator(self.arch, self.mode, self.pc)
        soft.clock = self._clock.cell
        soft.activity = self._activity
        mapped = 0
        pieces = regions(self._memory, self._executable)
        self._code_is_writable = any(prot & PROT_EXEC and prot & PROT_WRITE for *_, prot in pieces)
        for start, end, prot in pieces:
            address = ffi.cast("void *", self._memory.base + start)
            check(lib.soft_map(soft, start, end - start, prot, address), "map the guest's memory")
            if start > mapped:
                check(lib.soft_hook_unmapped(soft, mapped, start - 1), "map the guest's memory")
            mapped = end
        check(lib.soft_hook_unmapped(soft, mapped, (1 << 64) - 1), "map the guest's memory")
        self._hook()
        if self._instructions is not None:
            check(lib.soft_count(soft, self._instructions), "count instructions")
        if self._debugged:
            check(lib.soft_debug(soft, self.stops_before_access), "debug the guest")
        if self._stop is not None:
            of = int(ffi.cast("uintptr_t", soft))
            self._stop.watch_kick(lib.soft_kick_address(), of)

    def _renew(self) -> None:
        """An emulator in its first state, because this one is in the middle of an instruction."""
        if self._instructions is not None:
            self._instructions = int(self._soft.instructions)
        self.close()
        self._open()

    def close(self) -> None:
        """Free the emulator."""
        soft, self._soft = self._soft, None
        if soft is not None:
            if self._stop is not None:
                self._stop.watch_kick(0, 0)
            lib.soft_close(soft)

    def use_engine(self, engine: Engine | None, ring: Ring | None) -> None:
        """Python answers all hypercalls: cpu.vcpu.Vcpu has it for others."""

    def start(self, filter: bytes) -> None:
        """Nothing runs beside this thread."""

    def end(self) -> None:
        """There is no other process."""

    def run(self) -> Exit:
        """Let the guest run until something happens."""
        soft = self._soft
        while True:
            kind = _run(soft)
            if kind == _OUT:  # a hypercall: nothing else has to be quick
                if self._code_is_writable:  # rarely
                    self._before_hypercall(soft.number - hvt.HVT_HYPERCALL_PIO_BASE)
                return IoOut(soft.number, soft.size, soft.value)
            exit = self._leave[kind]()
            if exit is not None:
                return exit

    def kick(self) -> None:
        """Let `run` come back; from any thread, again and again until it has."""
        import ctypes

        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lib.soft_kick_address())
        function(int(ffi.cast("uintptr_t", self._soft)))

    # One of these for each way in which the emulator leaves off; None: it goes on.

    def _on_in(self) -> Exit | None:
        return IoIn(self._soft.number, self._soft.size)

    def _on_halted(self) -> Exit | None:
        return Failure("software CPU: unhandled exit (HLT)")

    def _on_memory(self) -> Exit | None:
        soft = self._soft
        if soft.number == lib.UC_MEM_FETCH_UNMAPPED:
            return Fault()
        return Mmio(soft.address, soft.size, bool(soft.is_write), soft.value)

    def _on_limit(self) -> Exit | None:
        return Failure("software CPU: the guest has had all its instructions (--instructions)")

    def _on_error(self) -> Exit | None:
        if self._soft.number == lib.UC_ERR_FETCH_PROT:
            return self._on_fetch()
        reason = ffi.string(lib.soft_strerror(self._soft.number)).decode()
        return Failure(f"software CPU: {reason}")

    def _before_hypercall(self, number: int) -> None:
        if number in _INTO_MEMORY:
            lib.soft_forget_code(self._soft)

    def _on_debug(self) -> Exit | None:
        return Debug(_DEBUG[self._soft.number], int(self._soft.address))

    # Debugging, as cpu.vcpu.DebugVcpu has it.

    def enable_debug(self) -> None:
        """Each instruction costs three times as much from here on."""
        self._debugged = True
        check(lib.soft_debug(self._soft, self.stops_before_access), "debug the guest")

    def set_stops(self, stops: Stops) -> None:
        """Any number of anything: this CPU looks at each instruction and each access."""
        addresses = {*stops.breakpoints, *stops.hardware}
        watches = [(each.address, each.size, each.read, each.write) for each in stops.watchpoints]
        error = lib.soft_set_debug(
            self._soft,
            ffi.new("uint64_t[]", sorted(addresses)),
            len(addresses),
            ffi.new("struct soft_watch[]", watches),
            len(watches),
            stops.step,
        )
        check(error, "set breakpoints")

    def pause(self) -> None:
        """It stands when `run` has come back."""

    def debug_state(self) -> Any:
        """All of it."""
        return self.get_state()

    def forget_code(self) -> None:
        """Translate it anew."""
        lib.soft_debug_forget_code(self._soft)

    # What an architecture makes of the rest.

    def get_state(self) -> Any:
        """As kvm.Vcpu has it."""
        raise NotImplementedError

    def core_state(self) -> Any:
        """As kvm.Vcpu has it."""
        return self.get_state()

    def set_state(self, state: Any) -> None:
        """As kvm.Vcpu has it."""
        raise NotImplementedError

    def cpuid(self, _leaf: int, _subleaf: int) -> tuple[int, int, int, int]:
        """As cpu.vcpu.Vcpu has it."""
        return 0, 0, 0, 0

    def counter(self) -> int:
        """As cpu.vcpu.Vcpu has it; virtual time does not take it for a reading of the guest's."""
        cell = self._clock.cell
        now_ns = cell.now_ns
        counter: int = lib.soft_counter(cell)
        cell.now_ns = now_ns
        return counter

    def set_counter(self, value: int, hz: int) -> int:
        """As cpu.vcpu.Vcpu has it."""
        self.cpu_cycle_freq = hz
        lib.soft_set_counter(self._clock.cell, value, hz)
        return self.counter()

    def _hook(self) -> None:
        raise NotImplementedError

    def _on_fetch(self) -> Exit | None:
        """The guest has jumped to data that its page tables let it execute."""
        raise NotImplementedError

    def _on_interrupt(self) -> Exit | None:
        raise NotImplementedError

    def _on_invalid(self) -> Exit | None:
        return Failure("software CPU: an instruction that it can't do")

    def _on_insn(self) -> Exit | None:
        raise NotImplementedError

    def _on_code(self) -> Exit | None:
        return None

    def read_register(self, number: int) -> int:
        """A register of up to 64 bits by the emulator's number."""
        value = ffi.new("uint64_t *")
        check(lib.soft_reg_read(self._soft, number, value), f"read register {number}")
        return int(value[0])

    def write_register(self, number: int, value: int) -> None:
        """Set one register of 64 bits; the emulator's number for it."""
        cell = ffi.new("uint64_t *", value)
        check(lib.soft_reg_write(self._soft, number, cell), f"write register {number}")

    def registers(self) -> dict[str, int]:
        """As kvm.Vcpu has it."""
        return dict(self.get_state().registers)

    def instruction_pointer(self) -> int:
        """As kvm.Vcpu has it."""
        return self.read_register(self.pc)
