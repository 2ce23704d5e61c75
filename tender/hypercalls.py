"""Hypercalls: the table of them, and the way from a CPU's exit to the module that answers it.

A guest's mistake is a GuestFault; what a module does is in tender/modules/.
"""

from __future__ import annotations

from tender._native import ffi, lib
from tender.cpu.vcpu import IoIn, IoOut, Mmio
from tender.dataclass import dataclass
from tender.errors import GuestFault
from tender.image.elf import EM_AARCH64, EM_X86_64
from tender.memory import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Protocol

    from tender.cpu.vcpu import Exit
    from tender.memory import GuestMemory
    from tender.outcome import Outcome

    Handler = Callable[[GuestMemory, Any], None]

    class Module(Protocol):
        def hypercalls(self) -> dict[int, Handler]: ...


_PORT_BASE = lib.HVT_HYPERCALL_PIO_BASE
_PORT_END = _PORT_BASE + 16  # ports up to here have the shape of a hypercall
_MMIO_BASE = lib.HVT_HYPERCALL_MMIO_BASE
_MMIO_END = _MMIO_BASE + (16 << 3)
_TRAPS = {EM_X86_64: Layout("hvt_x86_trap"), EM_AARCH64: Layout("hvt_aarch64_trap")}


class Hypercall:
    """One hypercall of the interface: its argument block, and what is in it.

    `asks` and `answers` name the fields that the guest and the tender write. `data` says what is
    at the block's `data_gpa`: "text" or "out" leave the guest, "in" is written into it.
    """

    __slots__ = ("answers", "asks", "data", "layout", "name")

    def __init__(
        self, name: str, layout: str, asks: str, answers: str = "", data: str = ""
    ) -> None:
        self.name = name
        self.layout = Layout(layout)
        self.asks = tuple(asks.split())
        self.answers = tuple(answers.split())
        self.data = data


_BLOCK_IO = "hvt_block_io", "handle offset data_gpa len", "ret"
HYPERCALLS = {
    lib.HVT_HYPERCALL_WALLTIME: Hypercall("WALLTIME", "hvt_walltime", "", "nsecs"),
    lib.HVT_HYPERCALL_PUTS: Hypercall("PUTS", "hvt_puts", "data_gpa len", "", "text"),
    lib.HVT_HYPERCALL_POLL: Hypercall("POLL", "hvt_poll", "timeout_nsecs", "ready_set ret"),
    lib.HVT_HYPERCALL_BLOCK_WRITE: Hypercall("BLOCK_WRITE", *_BLOCK_IO, "out"),
    lib.HVT_HYPERCALL_BLOCK_READ: Hypercall("BLOCK_READ", *_BLOCK_IO, "in"),
    lib.HVT_HYPERCALL_NET_WRITE: Hypercall(
        "NET_WRITE", "hvt_net_io", "handle data_gpa len", "ret", "out"
    ),
    lib.HVT_HYPERCALL_NET_READ: Hypercall(
        "NET_READ", "hvt_net_io", "handle data_gpa len", "len ret", "in"
    ),
    lib.HVT_HYPERCALL_HALT: Hypercall("HALT", "hvt_halt", "exit_status cookie_gpa"),
}


@dataclass
class Halt:
    """The guest's own end: its exit status, and its registers where a trap handler passed them."""

    status: int  # 0..255
    trap: dict[str, int] | None = None


def decode(exit: Exit) -> tuple[int, int]:
    """The number and the argument's GPA of an exit that is a hypercall; else a GuestFault."""
    if type(exit) is IoOut:
        number = exit.port - _PORT_BASE
        if exit.size == 4 and 0 <= number < _PORT_END - _PORT_BASE:
            return number, exit.value
        raise GuestFault(f"Invalid guest port access: port={exit.port:#x}, size={exit.size}")
    if type(exit) is IoIn:
        raise GuestFault(
            f"Invalid guest port access: port={exit.port:#x}, size={exit.size}, reading"
        )
    if type(exit) is Mmio:
        return _decode_mmio(exit)
    raise GuestFault(f"unhandled exit: {exit}")


def _decode_mmio(exit: Mmio) -> tuple[int, int]:
    number, odd = divmod(exit.gpa - _MMIO_BASE, 1 << 3)
    if exit.is_write and exit.size == 4 and not odd and _MMIO_BASE <= exit.gpa < _MMIO_END:
        return number, exit.value
    reading = "" if exit.is_write else ", reading"
    raise GuestFault(f"Invalid guest mmio access: gpa={exit.gpa:#x}, size={exit.size}{reading}")


class Dispatcher:
    """The modules of one machine by the hypercalls they answer; `machine` as in elf.Image.

    From `mmio_base` on, a guest's access to memory that is not there is one that is dispatched.
    """

    def __init__(
        self, memory: GuestMemory, modules: Iterable[Module], machine: int = EM_X86_64
    ) -> None:
        self._memory = memory
        self._trap = _TRAPS[machine]
        self.mmio_base = _MMIO_BASE if machine == EM_AARCH64 else 1 << 64
        self._handlers: dict[int, tuple[Handler, Layout, bool]] = {}
        for module in modules:
            for number, handler in module.hypercalls().items():
                call = HYPERCALLS[number]
                self._handlers[number] = handler, call.layout, bool(call.answers)

    def dispatch(self, exit: Exit) -> Halt | None:
        """Answer one exit; a Halt ends the guest."""
        number, gpa = decode(exit)
        found = self._handlers.get(number)
        if found is None:
            if number == lib.HVT_HYPERCALL_HALT:
                return halt(self._memory, gpa, self._trap)
            raise GuestFault(f"Invalid guest hypercall: num={number}", hypercall=number)
        handler, layout, out = found
        try:
            handler(self._memory, self._memory.at(layout, gpa, out=out))
        except GuestFault as fault:
            fault.hypercall = number
            raise
        return None

    def end(self, outcome: Outcome) -> Outcome:
        """How the guest's run has ended, as far as hypercalls decide it."""
        return outcome


def halt(memory: GuestMemory, gpa: int, layout: Layout) -> Halt:
    """HALT: the status, and the trap registers behind the cookie of a guest that aborts."""
    block = memory.at(HYPERCALLS[lib.HVT_HYPERCALL_HALT].layout, gpa, out=False)
    cookie, status = block.cookie_gpa, block.exit_status & 0xFF
    if not cookie:
        return Halt(status)
    memory.readable(cookie, lib.HVT_HALT_COOKIE_SIZE)
    trap = memory.at(layout, cookie, out=False)
    names = [name for name, _ in ffi.typeof(trap[0]).fields]
    registers = {name: getattr(trap, name) for name in names if name != "x"}
    if "x" in names:
        registers.update((f"x{number}", value) for number, value in enumerate(trap.x))
    return Halt(status, registers)
