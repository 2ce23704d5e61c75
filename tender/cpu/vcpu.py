"""What every CPU has in common: its exits and its state, as values.

The rule here: a CPU's `run()` returns one of these exits and never acts on it; `get_state()` and
`set_state()` speak in these values. Names are KVM's and the architecture manual's.
"""

from __future__ import annotations

from tender.dataclass import dataclass
from tender.errors import HostError, option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, TypeVar

    State = TypeVar("State")  # of boot/x86_64.py or boot/aarch64.py

    class Engine(Protocol):
        """What a vCPU needs of engine.engine.Engine."""

        cell: Any  # struct engine

        def hand_over(self) -> None:
            """What it could not answer is for Python now."""

    class Ring(Protocol):
        """What a vCPU needs of engine.ring.Ring."""

        def start(self, filter: bytes) -> None: ...
        def report_error(self) -> None: ...

    class Vcpu(Protocol[State]):
        """A CPU that can run a guest, after `start`."""

        fds: dict[str, int]  # the descriptors that it runs with, by label; others may renumber them
        cpu_cycle_freq: int  # Hz, of the guest's counter
        pc_name: str  # what the architecture calls the instruction pointer

        def use_engine(self, engine: Engine | None, ring: Ring | None, /) -> None:
            """Let `engine` answer plain hypercalls, or none. After the descriptors have moved."""

        def start(self, filter: bytes, /) -> None:
            """Start what runs the guest beside this thread; once, before the limits of the sandbox.

            `filter` is for a thread of this process: struct sock_filter[], or empty. Raises
            HostError.
            """

        def end(self) -> None:
            """End another process that `start` has begun, and wait for it."""

        def run(self) -> Exit: ...
        def count_in(self, activity: Any) -> None:
            """Count its exits, and the time in the guest, in this struct activity."""

        def get_state(self) -> State:
            """All registers, behind the instruction whose exit came last.

            The first call imports what it needs, so it comes before lockdown. Raises HostError
            where the guest uses what a State does not hold.
            """

        def core_state(self) -> State:
            """As much of it as a core file has."""

        def set_state(self, state: State) -> None:
            """Raises HostError for a state that this CPU can't be in."""

        def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
            """EAX, EBX, ECX, EDX as CPUID shows them to the guest; zeros on aarch64."""

        def counter(self) -> int:
            """The guest's counter (TSC, CNTVCT_EL0) now."""

        def set_counter(self, value: int, hz: int) -> int:
            """Let the guest's counter go on from `value` with `hz`; returns what it reads then.

            That is less or much more than `value` where this CPU can't set it: it goes on as the
            machine's own. Raises HostError where it can't have this frequency. Before the guest
            runs.
            """

        def registers(self) -> dict[str, int]:
            """The general registers by their names, and the instruction pointer."""

        def instruction_pointer(self) -> int: ...

    class DebugCpu(Protocol):
        """What a debugger needs of a vCPU beside its own interface.

        `enable_debug` comes first, before the guest runs.
        """

        def enable_debug(self) -> None: ...
        def run(self) -> Exit: ...
        def pause(self) -> None:
            """Let the guest stand, which may still run when `run` was interrupted."""

        def set_state(self, state: Any) -> None: ...
        def set_stops(self, stops: Stops) -> None:
            """Replace what it stops at; the instruction at which it stands does not stop it.

            Raises NotSupported where this CPU can't, and then nothing has changed.
            """

        def debug_state(self) -> Any:
            """As much of the state as a debugger shows; set_state() takes it back."""

        def forget_code(self) -> None:
            """The debugger has changed memory that may hold code."""


HZ_TOLERANCE = 250e-6  # of a clock that is measured once, as Firecracker has it


def is_near(hz: int, own: int) -> bool:
    """Whether a guest that counts with `hz` can have a counter of `own`."""
    return abs(hz - own) <= own * HZ_TOLERANCE


def other_frequency(what: str, own: int, hz: int) -> HostError:
    """Why a CPU, `what`, can't go on with a guest whose counter had `hz`."""
    return HostError(
        f"{what}: the guest counts time in {hz} Hz, and this CPU in {own}: "
        f"use {option('cpu', 'soft')}"
    )


class NotSupported(Exception):
    """What a debugger asked for, this CPU has not; the text says what, in a few words."""


@dataclass
class Watchpoint:
    """`size` bytes at an address whose accesses stop the guest."""

    address: int
    size: int
    read: bool
    write: bool


@dataclass
class Stops:
    """What stops a guest that is debugged. `hardware` are breakpoints that change no memory."""

    breakpoints: tuple[int, ...] = ()
    hardware: tuple[int, ...] = ()
    watchpoints: tuple[Watchpoint, ...] = ()
    step: bool = False  # after one instruction


class IoOut:
    """The guest wrote `value` (`size` bytes) to an I/O port."""

    __slots__ = ("port", "size", "value")

    def __init__(self, port: int, size: int, value: int) -> None:
        self.port = port
        self.size = size
        self.value = value


@dataclass
class IoIn:
    """The guest read from an I/O port."""

    port: int
    size: int


class Mmio:
    """The guest touched memory that is not there, or wrote where it may only read."""

    __slots__ = ("gpa", "is_write", "size", "value")

    def __init__(self, gpa: int, size: int, is_write: bool, value: int) -> None:
        self.gpa = gpa
        self.size = size
        self.is_write = is_write
        self.value = value


@dataclass
class Fault:
    """The host's memory protection stopped an access of the guest."""


@dataclass
class Interrupted:
    """Somebody asked the CPU to come back."""


@dataclass
class Failure:
    """The CPU can't go on; `what` says why in words. `emulation`: another CPU could."""

    what: str
    emulation: bool = False


@dataclass
class Debug:
    """What a debugger asked for has happened: "step", "breakpoint", or "read" or "write" at the
    watched `address`."""

    reason: str
    address: int = 0


if TYPE_CHECKING:
    Exit = IoOut | IoIn | Mmio | Fault | Interrupted | Failure | Debug
