"""Config -> Outcome: one guest from its image to its end, in the order in which things happen.

All that the guest can need is opened before its first instruction, and one Cleanup owns it. An
error before the start is raised; after it, everything is an Outcome.
"""

from __future__ import annotations

import os
from errno import EINTR

from tender import accel, loop
from tender._native import lib
from tender.boot import bootinfo, layout
from tender.cleanup import Cleanup
from tender.clock import HostClock, VirtualClock
from tender.config import usable_memory
from tender.dataclass import dataclass, replace
from tender.devices import open_devices
from tender.errors import (
    EXIT_FAILURE,
    GuestFault,
    HostError,
    ImageError,
    NotEmulated,
    bug_text,
    option,
)
from tender.host import keep_descriptors
from tender.hypercalls import Dispatcher
from tender.image.elf import EM_AARCH64, TARGETS
from tender.image.file import ImageFile
from tender.image.manifest import encode
from tender.memory import GuestMemory
from tender.modules import counters_value
from tender.modules.console import Console
from tender.modules.poll import Poll
from tender.modules.time import Time
from tender.outcome import NetCounters, Outcome, Statistics
from tender.sandbox import fdtable
from tender.sandbox.fdtable import START_LABELS, FdTable
from tender.stop import Stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, NoReturn

    from tender.accel import Kind, KvmAccelerator
    from tender.config import Config
    from tender.cpu.vcpu import Vcpu
    from tender.devices import Devices, Given
    from tender.engine.ring import Ring
    from tender.hypercalls import Halt, Module
    from tender.image.elf import Image
    from tender.modules import Warn
    from tender.observe.core import Target
    from tender.observe.counters import Page
    from tender.observe.gdb import GdbVcpu
    from tender.observe.pcap import Pcap
    from tender.observe.trace import Trace
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
        if inputs.file.image.target == lib.ABI_TARGET_SPT:
            _become(config, inputs, stop, warn, cleanup, sandbox, started, publish=publish)
        machine = assemble(config, inputs, stop, warn, cleanup, sandbox, created, publish=publish)
        if sandbox:
            sandbox.enter(machine.fd_table, machine.vcpu.start)
        else:
            machine.vcpu.start(b"")
        if machine.notify is not None:
            from tender.observe import notify

            notify.ready(machine.notify, config.kernel)
        if started:
            started(machine.notice)
        if machine.page:
            machine.page.stats.state = lib.STATS_RUNNING
        outcome = _run_to_end(machine, stop, warn)
        machine.devices.block.end()
        outcome = replace(outcome, stats=machine.statistics())
        machine.console.report_dropped()
        if machine.gdb:
            machine.gdb.ended(outcome)
        machine.vcpu.end()
        if machine.trace:
            machine.trace.end(outcome)
        if machine.report is not None:
            from tender.observe import report

            report.write_report(machine.report, outcome, warn)
        if machine.notify is not None:
            notify.stopping(machine.notify, outcome.reason, outcome.status)
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


def open_inputs(config: Config, cleanup: Cleanup, sandbox: Sandbox | None = None) -> Inputs:
    """Keep the user's descriptors, then open and check the image; raises TenderError."""
    # First of all the descriptors: a number that was not passed must not be open by then.
    nets = keep_descriptors(config.net, "Could not attach interface", cleanup)
    blocks = keep_descriptors(config.block, "Could not open block device", cleanup)
    fds = {"console": config.console_fd, "stderr": 2}
    if isinstance(config.trace, int):
        from tender.observe import trace

        fds["trace"] = trace.keep(config.trace, cleanup)
    if config.pidfile is not None:
        from tender.observe import pidfile

        fds["pidfile"] = pidfile.hold(config.pidfile, cleanup)
    path = config.kernel
    file = sandbox.read_image(ImageFile, path) if sandbox else ImageFile(path)
    cleanup.callback(file.close)
    target = TARGETS[file.image.target]
    if config.target not in (None, target):
        raise ImageError(
            f"{config.kernel}: Executable is not for the solo5-{config.target} target "
            f"(it is for {target})"
        )
    return Inputs(nets, blocks, fds, file)


@dataclass
class Inputs:
    """What a user passes, opened: descriptors of devices, others by label, and the image."""

    nets: Given
    blocks: Given
    fds: Mapping[str, int]
    file: ImageFile


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
        devices.block,
        devices.net,
        stop,
        warn,
        sandbox,
        started,
        cleanup,
        publish=publish,
    )


def assemble(
    config: Config,
    inputs: Inputs,
    stop: Stop,
    warn: Warn,
    cleanup: Cleanup,
    sandbox: Sandbox | None = None,
    created: KvmAccelerator | None = None,
    *,
    publish: bool = False,
) -> Machine:
    """Open, check and load everything, up to the guest's first instruction; raises TenderError."""
    file, fds = inputs.file, dict(inputs.fds)
    image = file.image
    boot = _boot(image.machine)
    cmdline = bootinfo.join_cmdline(config.args)
    mem_bytes = usable_memory(config.mem_bytes)
    if mem_bytes != config.mem_bytes:
        warn(f"adjusting memory to {mem_bytes} bytes")
    clock = VirtualClock(config.clock) if config.clock else HostClock()

    accelerator = accel.choose(config, image, clock, cleanup, created)
    devices = open_devices(image.manifest, inputs.nets, inputs.blocks, stop, warn, cleanup)
    fds |= devices.fds

    kind = accelerator.kind
    ring_bytes = ring_region(config, image, mem_bytes, kind, devices.labels)
    # Where the host keeps the guest from writing to code, it keeps a debugger from it, too.
    is_protected = kind.name == "kvm"
    memory = GuestMemory(
        mem_bytes - ring_bytes,
        ring_bytes,
        huge=config.hugepages,
        shared=kind.shares_memory or (is_protected and config.gdb is not None),
        host_protected=is_protected or config.gdb is None,
    )
    cleanup.callback(memory.close)
    whole = memory.alias() if is_protected and config.gdb is not None else memory.view
    core = _open_core(config, memory, cleanup)
    file.load(memory, stop.check)
    file.close()
    code = accel.executable(image, memory.size if config.exec_heap else 0)
    vcpu = accelerator.create_vcpu(memory, code, stop, cleanup)
    # A CPU that executes nothing but code says so in the page tables: a jump elsewhere is the
    # guest's own exception, and the software CPU writes faster where there is no code.
    vcpu.set_state(boot.initial_state(image.entry, memory.size, nx=kind.has_nx))
    for gpa, table in boot.tables(mem_bytes, code if kind.has_nx else None):
        memory.put(gpa, table)
    manifest = encode(image.manifest, devices.attached())
    ring_gpa = memory.size if ring_bytes else 0
    boot_info = bootinfo.BootInfo(
        memory.size, image.kernel_end, vcpu.cpu_cycle_freq, cmdline, manifest, ring_gpa
    )
    memory.put(layout.BOOT_INFO, bootinfo.build(boot_info))

    fds |= vcpu.fds | (core.fds if core else {})
    pcaps: Mapping[int, Pcap] = {}
    if _is_observed(config):
        from tender.observe import observers

        files = [file.info, *(os.fstat(disk.fd) for disk in devices.block.devices.values())]
        fds |= observers.open_outputs(config, files, cleanup)
        fds |= observers.open_gdb(config, warn, cleanup)
        pcaps = observers.open_pcaps(
            config, image.manifest, devices.net, fds, files, clock, warn, cleanup
        )
    page = None
    if publish:
        from tender.observe import counters

        page = counters.publish(
            config, kind.name, mem_bytes, image.manifest, devices.by_handle(), cleanup
        )
        fds |= {"stats": page.fd} if page else {}
    if sandbox:
        fds = sandbox.move_descriptors(fds, devices.held(), pcaps)
        cleanup.forget()  # the numbers are others' now, and this process ends with its guest
        for each in (vcpu, core) if core else (vcpu,):
            each.fds = {label: fds[label] for label in each.fds}
        for layer, reason in accelerator.missing_layers().items():
            sandbox.report_missing(layer, reason)

    console = Console(fds["console"], stop, warn, config.console_limit)
    poll = Poll(devices.net, stop, clock, devices.rendezvous(fds, clock, stop))
    modules: list[Module] = [console, Time(clock), poll, devices.block, devices.net]
    if page:
        console.counters, poll.counters = page.console, page.poll
    dispatcher = Dispatcher(memory, modules, image.machine)
    trace = None
    if "trace" in fds:
        trace = observers.make_trace(config, fds, memory, image.manifest, clock, stop, warn)
    ring_ = None
    if uses_engine(config, kind):
        from tender.engine.engine import Engine

        engine = Engine(memory, console, poll, devices.block, devices.net)
        if "kick" in fds:
            from tender.engine.ring import Ring

            ring_ = Ring(fds["kick"], memory, engine.cell, devices.net, stop, cleanup)
        vcpu.use_engine(engine, ring_)
    if page:
        vcpu.count_in(page.activity)
    gdb = None
    if config.gdb is not None:
        vcpu = gdb = observers.make_gdb(config, kind, fds, vcpu, whole, stop)
    core_bytes = core.size(memory.size) if core else None
    fd_table = _fd_table(kind, fds, devices, pcaps, core_bytes)
    machine = Machine(
        image,
        boot,
        memory,
        vcpu,
        console,
        poll,
        devices,
        dispatcher,
        fd_table,
        accelerator.notice,
        ring_,
        trace,
        core,
        page,
        gdb,
        fds.get("notify"),
        fds.get("report-file"),
    )
    if gdb:
        gdb.statistics = machine.statistics
    return machine


@dataclass
class Machine:
    """A guest that is ready to run, and what runs it."""

    image: Image
    boot: Any  # the module of its architecture in tender/boot/
    memory: GuestMemory
    vcpu: Vcpu[Any]
    console: Console
    poll: Poll
    devices: Devices
    dispatcher: Dispatcher
    fd_table: FdTable
    notice: str  # why it is not on KVM, where that was not asked for
    ring: Ring | None
    trace: Trace | None
    core: Target | None
    page: Page | None
    gdb: GdbVcpu | None
    notify: int | None  # the descriptor to the manager of services
    report: int | None  # the descriptor that --report is written to

    def statistics(self) -> Statistics:
        """What the devices have done until now."""
        return Statistics(
            counters_value(self.console.counters),
            counters_value(self.poll.counters),
            {
                disk.name: counters_value(disk.counters)
                for disk in self.devices.block.devices.values()
            },
            {
                port.name: NetCounters(counters_value(port.received), counters_value(port.sent))
                for port in self.devices.net.devices.values()
            },
        )


def _fd_table(
    kind: Kind,
    fds: Mapping[str, int],
    devices: Devices,
    pcaps: Mapping[int, Pcap],
    core_bytes: int | None,
) -> FdTable:
    """What the tender holds while the guest runs."""
    labels = [label for label in fds if label not in START_LABELS]
    labels += [label for label in kind.labels if label not in labels]
    labels += ["gdb"] if "gdb-listen" in labels else []
    sizes = fdtable.sizes(devices.labels, devices.capacities(), core_bytes)
    return FdTable(kind.name, tuple(labels), devices.labels, sizes, pcaps=tuple(pcaps))


def _is_observed(config: Config) -> bool:
    outputs = (config.trace, config.report, config.notify, config.gdb)
    return bool(config.pcap) or any(each is not None for each in outputs)


def uses_engine(config: Config, kind: Kind) -> bool:
    """Whether engine.c answers what it can; else Python's handlers answer everything."""
    observed = config.trace is not None or config.gdb is not None
    return kind.has_engine and config.engine == "c" and not observed


def ring_region(
    config: Config,
    image: Image,
    mem_bytes: int,
    kind: Kind,
    labels: Mapping[int, tuple[str, ...]],
) -> int:
    """How much of the guest's memory the network ring takes; 0: none is offered.

    The ring is engine.c's, so all networks must be.
    """
    networks = {name for names in labels.values() for name in names if name.startswith("net")}
    if networks != {"net"} or not kind.has_ring or not uses_engine(config, kind):
        return 0
    from tender.engine import ring

    if not ring.is_worth_it(config.net_ring, not accel.emulated()):
        return 0
    return ring.region(mem_bytes, image)


def _boot(machine: int) -> Any:
    """How a guest of this machine wakes up: boot/x86_64.py or boot/aarch64.py."""
    if machine == EM_AARCH64:
        from tender.boot import aarch64

        return aarch64
    from tender.boot import x86_64

    return x86_64


def _open_core(config: Config, memory: GuestMemory, cleanup: Cleanup) -> Target | None:
    if config.dumpcore is None:
        return None
    from tender.observe.core import Target

    target = Target(config.dumpcore, memory.fd)
    cleanup.callback(target.close)
    return target


def _run_to_end(machine: Machine, stop: Stop, warn: Warn) -> Outcome:
    """The guest's run, and its end as an Outcome."""
    try:
        halt = loop.run(machine.vcpu, machine.memory, machine.dispatcher, stop, machine.trace)
        if machine.gdb and halt.status == lib.HVT_EXIT_ABORT:
            machine.gdb.aborted(halt, machine.boot)
        core = _dump_core(machine, halt, stop, warn)
        return Outcome("halted", halt.status, trap=halt.trap, core=core)
    except Stopped:
        # A fault in the ring ends the guest by a stop request, from the ring's thread.
        fault = machine.ring.fault() if machine.ring else None
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
    if halt.status != lib.HVT_EXIT_ABORT or machine.core is None:
        return None
    state = machine.vcpu.core_state()
    if halt.trap:
        state = machine.boot.with_trap(state, halt.trap)
    try:
        return machine.core.write(machine.memory, state, stop.check)
    except HostError as error:
        warn(str(error))
        return None
