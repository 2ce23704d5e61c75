"""The native CPU: a process of its own runs the guest's code, and what that traps comes here.

The rule here: a guest sees what a CPU of KVM shows it, as far as ring 3 allows. What lies in the
shared region is the guest's word (native.c checks it); what an instruction means is decided here.
Source: Intel SDM volumes 2 and 3.
"""

from __future__ import annotations

import errno
import posix as os
from _signal import SIGSYS, SIGTRAP  # type: ignore[import-not-found]  # without the enums of `signal`

from tender._native import ffi, lib
from tender.boot.layout import MIN_BASE
from tender.boot.x86_64 import (
    CONTROL,
    READ_ONLY_FROM,
    REGISTERS,
    SEGMENTS,
    Segment,
    State,
    Table,
)
from tender.cpu.native_state import MSRS_AT_START, NativeState
from tender.cpu.vcpu import Debug, Failure, Fault, Interrupted, IoOut
from tender.cpu.x86_64 import (
    AC,
    BP,
    DB,
    GP,
    PF,
    PF_FETCH,
    PF_PRESENT,
    TF,
    U64,
    UD,
    CpuException,
)
from tender.errors import GuestFault, HostError, option
from tender.host import process_name
from tender.memory import PROT_EXEC, PROT_READ, PROT_WRITE, regions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.cleanup import Cleanup
    from tender.cpu.vcpu import Engine, Exit, Ring
    from tender.memory import GuestMemory
    from tender.stop import Stop

PROGRAM = f"{__file__.rpartition('/')[0]}/native-guest"
SPIN_S = 30e-6  # about what it takes to sleep and to be woken
ALIGNMENT_CHECK = 1 << 18
USER_CODE = 0x33  # the selector of 64-bit code in ring 3
I386 = 0x40000003  # AUDIT_ARCH_I386


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
    if _sysctl("vm/mmap_min_addr") > READ_ONLY_FROM:
        return "vm.mmap_min_addr is above 65536"
    if _sysctl("vm/memfd_noexec") > 1:
        return "vm.memfd_noexec is 2: it forbids to execute a memfd"
    is_there = os.access(PROGRAM, os.R_OK, effective_ids=True)
    return "" if is_there else f"it was installed without {PROGRAM}"


def limit(mem_bytes: int) -> str:
    """Which limit of this process keeps a guest with so much memory from it; empty: none does."""
    resource = lib.native_limit(mem_bytes)
    if resource == lib.RLIMIT_FSIZE:
        return f"{mem_bytes >> 20} MiB of guest memory exceed the limit of files (`ulimit -f`)"
    if resource == lib.RLIMIT_NPROC:
        return "another process exceeds the limit of processes (`ulimit -u`)"
    return ""


def _sysctl(name: str) -> int:
    """0 where there is no such setting, or no /proc: then the start says what is wrong."""
    try:
        fd = os.open(f"/proc/sys/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return int(os.read(fd, 100))
    finally:
        os.close(fd)


class NativeCpu(NativeState):
    """The interface is cpu.vcpu.Vcpu. `start` begins the process; then the guest can run."""

    pc_name = "rip"

    def __init__(
        self, memory: GuestMemory, executable: list[tuple[int, int]], stop: Stop, cleanup: Cleanup
    ) -> None:
        self._memory, self._stop = memory, stop
        self._state = State(
            registers=dict.fromkeys(REGISTERS, 0),
            segments=dict.fromkeys(SEGMENTS, Segment()),
            control=dict.fromkeys(CONTROL, 0),
            gdt=Table(),
            idt=Table(),
            msrs=MSRS_AT_START,
        )
        self._if = 0
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
        self._cell.shared.comm = process_name()[: lib.NATIVE_COMM - 1]
        self._cell.shared.turn = lib.NATIVE_TURN_GUEST
        self._cell.is_guests_turn = 1  # its first trap is the program's own
        lib.native_filter(self._cell.shared)
        self.fds["guest-program"] = _program()
        self._started = False
        # For a debugger, which has put int3 at `traps`.
        self.debugged = self.single_step = False
        self.traps: frozenset[int] = frozenset()
        self.cpu_cycle_freq = self._machine_hz = int(lib.tsc_hz())
        if len(os.sched_getaffinity(0)) > 1:
            self._cell.spin_cycles = int(SPIN_S * self.cpu_cycle_freq)
        stop.watch(ffi.addressof(self._cell, "immediate_exit"))
        cleanup.callback(lambda: stop.watch(0))

    def _close(self) -> None:
        lib.native_kill(self._cell)
        if self._cell.pidfd >= 0:
            lib.stop_tick(0)  # which that end has begun
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

    def use_engine(self, engine: Engine | None, _ring: Ring | None) -> None:
        """As cpu.vcpu.Vcpu has it; there is no ring."""
        self._engine = engine
        self._cell.engine = ffi.NULL if engine is None else engine.cell

    def count_in(self, activity: Any) -> None:
        """As cpu.vcpu.Vcpu has it."""
        self._cell.activity = activity

    # Its process.

    def start(self, _filter: bytes) -> None:
        """Start the guest's process, which ends with this thread. Raises HostError."""
        fds, cell = self.fds, self._cell
        cell.shared.parent = os.getpid()
        if lib.stop_on_child():
            raise HostError("cannot handle signals", "sigaction", ffi.errno)
        pidfd = lib.native_start(fds["guest-program"], fds["guest-shared"], fds["guest-memory"])
        if pidfd < 0:
            raise HostError("native CPU: cannot start the guest's process", "execve", ffi.errno)
        cell.pidfd = fds.pop("guest-shared")  # a number that the policies know
        os.dup2(pidfd, cell.pidfd, inheritable=False)
        os.close(pidfd)
        for fd in fds.values():
            os.close(fd)
        self.fds = {"guest-process": cell.pidfd}
        error = lib.native_run(cell)
        while error == errno.EINTR and not lib.native_has_ended(cell):
            cell.immediate_exit = 0  # a stop request is looked at before the guest runs
            error = lib.native_run(cell)
        failed = cell.shared.failed
        if error or failed:
            reason = os.strerror(failed) if failed else "it has ended"
            raise HostError(
                f"native CPU: the guest's process could not start: {reason} "
                f"({option('cpu', 'soft')} may run it)"
            )
        cell.shared.parent, cell.shared.comm = 0, b""  # nothing of the host is the guest's to read
        self._stop.check_cpu = self._check_process
        self._started = True
        self.set_state(self._state)

    def _check_process(self) -> None:
        """For a hypercall that waits: nobody is left to wait for its answer."""
        if lib.native_has_ended(self._cell):
            raise GuestFault(self._how_it_ended())

    def _how_it_ended(self) -> str:
        signo = lib.native_has_ended(self._cell)
        how = f"was killed by signal {signo}" if signo > 0 else "has ended"
        return f"native CPU: the guest's process {how}"

    def end(self) -> None:
        """Kill the guest's process: if its tender ended first, init would have to reap it."""
        lib.native_kill(self._cell)

    def _translate(self, address: int, write: bool) -> int:
        if READ_ONLY_FROM <= address < self._memory.size - 7:
            if write and address < MIN_BASE:
                raise CpuException(PF, 3, address)
            return address
        return super()._translate(address, write)

    # Its exits.

    def run(self) -> Exit:
        """Let the guest run until something happens that is not its own."""
        cell = self._cell
        while True:
            if self.single_step and not cell.is_guests_turn:
                self._set_trap_flag(TF)
            error = lib.native_run(cell)
            if self._engine is not None:
                self._engine.hand_over()
            if error:
                return self._not_run(error)
            if self.single_step:
                self._set_trap_flag(0)
            if cell.kind == lib.NATIVE_HYPERCALL:
                return IoOut(lib.HVT_HYPERCALL_PIO_BASE + cell.number, 4, cell.gpa)
            exit = self._on_trap()
            if exit is None and self.single_step:
                exit = Debug("step")
            lib.native_set_registers(cell)
            if exit is not None:
                return exit

    def _set_trap_flag(self, flag: int) -> None:
        self._cell.registers[17] = self._cell.registers[17] & ~TF | flag
        lib.native_set_registers(self._cell)

    @property
    def is_running(self) -> bool:
        """Whether the guest executes now, after `run` was interrupted."""
        return bool(self._cell.is_guests_turn)

    def pause(self) -> None:
        """Let it come back, by Debug("pause") or by what it does first."""
        lib.native_pause(self._cell)

    def _on_debugger(self) -> Exit | None:
        """What a debugger has caused; None: it is the guest's own."""
        cell, rip = self._cell, self._read("rip")
        if cell.code == 0:
            return Debug("pause")
        if cell.vector == DB and self.single_step:
            return Debug("step")
        if cell.vector == BP and rip - 1 in self.traps:
            self._write("rip", rip - 1)
            return Debug("breakpoint")
        return None

    def _not_run(self, error: int) -> Exit:
        if error == errno.EINTR:
            self._cell.immediate_exit = 0
            return Interrupted()
        if error == errno.ESRCH:
            return Failure(self._how_it_ended())
        return Failure("native CPU: the guest has forged what its process shares with the tender")

    def _on_trap(self) -> Exit | None:
        cell = self._cell
        if cell.cs != USER_CODE:
            return Failure("native CPU: code that is not 64-bit", emulation=True)
        vector, code = int(cell.vector), int(cell.error_code) & 0xFFFF
        if cell.signo == SIGSYS:
            return self._on_system_call()
        if cell.signo == SIGTRAP and self.debugged:
            exit = self._on_debugger()
            if exit is not None:
                return exit
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


def _memfd(name: str, size: int) -> int:
    fd: int = lib.native_memfd(name.encode(), size, 0)
    if fd < 0:
        raise HostError(
            "native CPU: cannot make memory that two processes share", "memfd_create", ffi.errno
        )
    return fd


_kept_program: list[int] = []  # the descriptor that `keep_program` has opened


def keep_program() -> None:
    """Have this process and its forks share one copy of the guest's program. Raises HostError."""
    _kept_program.append(_program())


def _program() -> int:
    """The program as a file that has no path: Landlock forbids to execute one that has."""
    if _kept_program:
        return os.dup(_kept_program[0])
    fd: int = lib.native_memfd(b"ptender-guest", 0, 1)
    if fd < 0:
        raise HostError("native CPU: cannot make its program", "memfd_create", ffi.errno)
    with open(PROGRAM, "rb") as file:
        os.write(fd, file.read())
    return fd
