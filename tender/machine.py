"""Config -> Outcome: one guest from its image to its end, in the order in which things happen.

All that the guest can need is opened before its first instruction, and one Cleanup owns it. An
error before the start is raised; after it, everything is an Outcome.
"""

from __future__ import annotations

from errno import EINTR

from tender import loop
from tender._native import lib
from tender.assemble import assemble
from tender.cleanup import Cleanup
from tender.dataclass import replace
from tender.devices import open_devices, open_inputs
from tender.errors import (
    EXIT_FAILURE,
    GuestFault,
    HostError,
    NotEmulated,
    bug_text,
    option,
)
from tender.outcome import Outcome
from tender.stop import Stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from tender.accel import KvmAccelerator
    from tender.assemble import Machine
    from tender.config import Config
    from tender.devices import Inputs
    from tender.hypercalls import Halt
    from tender.modules import Warn
    from tender.sandbox.sandbox import Sandbox
    from tender.stop import Stop


def run(
    config: Config,
    stop: Stop,
    warn: Warn,
    sandbox: Sandbox | None = None,
    *,
    started: Callable[[str], None] | None = None,
    created: KvmAccelerator | None = None,
    publish: bool = False,
) -> Outcome:
    """Run a guest on this thread until it ends or `stop` is requested.

    Raises TenderError where it can't start. `warn` gets a line of text for what goes wrong and
    does not end the guest. `started` is called when all is open and the guest is about to run, with
    a notice on its CPU or an empty text; `created` is a VM that was made in advance.
    `publish` lets others see it (tender/observe/counters.py). Nothing is left behind, whatever
    happens.

    With a `sandbox`, this process is confined to the guest's devices before the guest runs, and
    stays so: all that is left for it to do is to report how the guest ended. An spt guest is this
    process from then on: this function does not return, unless it raises.
    """
    cleanup = Cleanup()
    stop.enter()
    try:
        inputs = open_inputs(config, cleanup, sandbox)
        config = inputs.config
        if inputs.file.image.target == lib.ABI_TARGET_SPT:
            _become(config, inputs, stop, warn, cleanup, sandbox, started, publish=publish)
        machine = assemble(inputs, stop, warn, cleanup, sandbox, created, publish=publish)
        if sandbox:
            sandbox.enter(machine.fd_table, machine.vcpu.start)
        else:
            machine.vcpu.start(b"")
        if "notify" in machine.fds:
            from tender.observe import notify

            notify.ready(machine.fds["notify"], config.kernel)
        if started:
            started(machine.guest.accelerator.notice)
        if machine.page:
            machine.page.stats.state = lib.STATS_RUNNING
        outcome = machine.dispatcher.end(_run_to_end(machine, stop, warn))
        machine.guest.devices.block.end()
        outcome = replace(outcome, stats=machine.statistics())
        machine.console.report_dropped()
        if machine.gdb:
            machine.gdb.ended(outcome)
        machine.vcpu.end()
        if machine.trace:
            machine.trace.end(outcome)
        if "report-file" in machine.fds:
            from tender.observe import report

            report.write_report(machine.fds["report-file"], outcome, warn)
        if "notify" in machine.fds:
            notify.stopping(machine.fds["notify"], outcome.reason, outcome.status)
        return outcome
    except (Stopped, HostError) as error:
        if not stop.requested or (isinstance(error, HostError) and error.errno != EINTR):
            raise
        return Outcome("stopped", EXIT_FAILURE, signo=stop.signo)  # before it had begun
    finally:
        if sandbox and sandbox.entered:
            cleanup.forget()  # after lockdown nothing can be given back: that is for the exit
        cleanup.close()
        stop.leave()


def _become(
    config: Config,
    inputs: Inputs,
    stop: Stop,
    warn: Warn,
    cleanup: Cleanup,
    sandbox: Sandbox | None,
    started: Callable[[str], None] | None,
    *,
    publish: bool,
) -> NoReturn:
    """Run an spt guest, which this process becomes."""
    from tender.spt import refusals

    image = inputs.file.image
    refusals.check(config, image.machine)
    from tender.spt import process  # which is for this machine

    process.check()
    sandbox = process.check_sandbox(sandbox)
    devices = open_devices(image.manifest, inputs.nets, inputs.blocks, stop, warn, cleanup)
    process.become(
        config,
        inputs.file,
        inputs.fds,
        devices,
        stop,
        warn,
        sandbox,
        started,
        cleanup,
        publish=publish,
    )


def _run_to_end(machine: Machine, stop: Stop, warn: Warn) -> Outcome:
    """The guest's run, and its end as an Outcome."""
    try:
        hooks = [each for each in (machine.trace, machine.saver) if each]
        pending = None if machine.gdb else machine.pending  # which has it
        memory = machine.guest.memory
        halt = loop.run(machine.vcpu, memory, machine.dispatcher, stop, hooks, pending)
        if machine.gdb and halt.status == lib.HVT_EXIT_ABORT:
            machine.gdb.aborted(halt, machine.guest.boot)
        core = _dump_core(machine, halt, stop, warn)
        return Outcome("halted", halt.status, trap=halt.trap, core=core)
    except Stopped:
        # A fault in the ring ends the guest by a stop request, from the ring's thread.
        fault = machine.ring.fault() if machine.ring else None
        if fault is None and machine.saver and machine.saver.has_ended:
            return Outcome("stopped", 0)
        if fault is None:
            return Outcome("stopped", EXIT_FAILURE, signo=stop.signo)
    except NotEmulated as error:
        fault = NotEmulated(f"{error} ({option('cpu', 'soft')} may run it)")
    except GuestFault as error:
        fault = error.with_traceback(None)
    except HostError as error:
        return Outcome("host", EXIT_FAILURE, error=error.with_traceback(None))
    except Exception as error:  # a bug of ours; whatever a guest does, a program gets an Outcome
        for line in bug_text(error).split("\n"):
            warn(line)
        text = f"internal error ({type(error).__name__}): this is a bug in ptender"
        return Outcome("host", EXIT_FAILURE, error=HostError(text))
    if machine.gdb:
        machine.gdb.failed(fault)
    return Outcome("fault", EXIT_FAILURE, error=fault, registers=_registers(machine))


def _registers(machine: Machine) -> dict[str, int] | None:
    try:
        return machine.vcpu.registers()
    except HostError:
        return None


def _dump_core(machine: Machine, halt: Halt, stop: Stop, warn: Warn) -> str | None:
    """The path of the core file of a guest that aborted."""
    guest = machine.guest
    if halt.status != lib.HVT_EXIT_ABORT or guest.core is None:
        return None
    state = machine.vcpu.core_state()
    if halt.trap:
        state = guest.boot.with_trap(state, halt.trap)
    try:
        return guest.core.write(guest.memory, state, stop.check)
    except HostError as error:
        warn(str(error))
        return None
