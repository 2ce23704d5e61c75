"""What every CPU has in common: its exits and its state, as values.

The rule here: a CPU's `run()` returns one of these exits and never acts on it; `get_state()` and
`set_state()` speak in these values. Names are KVM's and the architecture manual's.
"""

from __future__ import annotations

from tender.record import record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from tender.boot.x86_64 import State

    class Vcpu(Protocol):
        """A CPU that can run a guest."""

        cpu_cycle_freq: int  # Hz, of the guest's TSC

        def run(self) -> Exit: ...
        def get_state(self) -> State: ...
        def set_state(self, state: State) -> None: ...
        def instruction_pointer(self) -> int: ...


class IoOut:
    """The guest wrote `value` (`size` bytes) to an I/O port."""

    __slots__ = ("port", "size", "value")

    def __init__(self, port: int, size: int, value: int) -> None:
        self.port = port
        self.size = size
        self.value = value


@record
class IoIn:
    """The guest read from an I/O port."""

    port: int
    size: int


@record
class Mmio:
    """The guest touched memory that is not there, or wrote where it may only read."""

    gpa: int
    size: int
    is_write: bool
    value: int


@record
class Fault:
    """The host's memory protection stopped an access of the guest."""


@record
class Interrupted:
    """Somebody asked the CPU to come back."""


@record
class Failure:
    """The CPU can't go on; `what` says why in words. `emulation`: another CPU could."""

    what: str
    emulation: bool = False


if TYPE_CHECKING:
    Exit = IoOut | IoIn | Mmio | Fault | Interrupted | Failure
