"""Run the vCPU until the guest halts.

Every exit is either a hypercall, which is dispatched, or the guest's end, in words that say where
it was. KVM's exits for one misdeed differ from host to host; the words are the same.
"""

from __future__ import annotations

from tender.cpu.vcpu import Failure, Interrupted, IoIn, IoOut, Mmio
from tender.errors import GuestFault, NotEmulated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Protocol

    from tender.cpu.vcpu import Exit, Vcpu
    from tender.hypercalls import Dispatcher, Halt
    from tender.memory import GuestMemory
    from tender.stop import Stop

    class ExitHook(Protocol):
        """Sees every exit before and after it is handled, as a trace or a debugger does."""

        def before(self, exit: Exit) -> None:
            """The vCPU came back with `exit`."""

        def after(self, error: BaseException | None) -> None:
            """It was answered, or `error` ends the guest."""


X86_INSTRUCTION_MAX = 15  # bytes


def run(
    vcpu: Vcpu[Any],
    memory: GuestMemory,
    dispatcher: Dispatcher,
    stop: Stop,
    hooks: Sequence[ExitHook] = (),
    pending: Exit | None = None,
) -> Halt:
    """Raises GuestFault, or Stopped after a stop request.

    `pending` is an exit that comes before the first run.
    """
    stop.check()
    while True:
        exit = pending or vcpu.run()
        pending = None
        if hooks:
            halt = _with_hooks(hooks, exit, vcpu, memory, dispatcher, stop)
        elif type(exit) is IoOut:  # a hypercall on x86_64, first of all because it is to be quick
            halt = dispatcher.dispatch(exit)
        else:
            halt = _handle(exit, vcpu, memory, dispatcher, stop)
        if halt is not None:
            return halt


def _handle(
    exit: Exit, vcpu: Vcpu[Any], memory: GuestMemory, dispatcher: Dispatcher, stop: Stop
) -> Halt | None:
    kind = type(exit)
    if kind is IoOut or kind is IoIn or (type(exit) is Mmio and exit.gpa >= dispatcher.mmio_base):
        return dispatcher.dispatch(exit)
    if kind is not Interrupted:
        raise _fault(exit, vcpu, memory)
    stop.check()
    return None


def _with_hooks(hooks: Sequence[ExitHook], exit: Exit, *context: Any) -> Halt | None:
    for hook in hooks:
        hook.before(exit)
    try:
        halt = _handle(exit, *context)
    except BaseException as error:
        for hook in hooks:
            hook.after(error)
        raise
    for hook in hooks:
        hook.after(None)
    return halt


def _fault(exit: Exit, vcpu: Vcpu[Any], memory: GuestMemory) -> GuestFault:
    rip = f"{vcpu.pc_name}={vcpu.instruction_pointer():#x}"
    if isinstance(exit, Failure):
        kind = NotEmulated if exit.emulation else GuestFault
        return kind(f"{exit.what}, {rip}{_instruction(vcpu, memory)}")
    if isinstance(exit, Mmio):
        # A software KVM reports a write to a read-only page of the host as MMIO, not as EFAULT.
        inside = exit.gpa < memory.size
        what = "host/guest translation fault" if inside else "Invalid guest access: no memory there"
        access = "write" if exit.is_write else "read"
        text = f"{what}: {rip}, {access} at gpa={exit.gpa:#x}, len={exit.size:#x}"
        return GuestFault(text, exit.gpa, exit.size)
    return GuestFault(f"host/guest translation fault: {rip}")


def _instruction(vcpu: Vcpu[Any], memory: GuestMemory) -> str:
    """The bytes at the instruction pointer, for the message of a CPU that gave up."""
    gpa = vcpu.instruction_pointer()
    size = min(X86_INSTRUCTION_MAX, memory.size - gpa)
    if size <= 0:
        return ""
    try:
        return f", instruction={bytes(memory.readable(gpa, size)).hex(' ')}"
    except GuestFault:
        return ""
