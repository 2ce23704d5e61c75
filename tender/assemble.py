"""Config -> Machine: a guest that is ready to run, and what runs it.

All that the guest can need is opened here, before its first instruction, and one Cleanup owns it.
"""

from __future__ import annotations

import posix as os

from tender import accel
from tender.boot.load import Loaded, load
from tender.cleanup import Cleanup
from tender.dataclass import dataclass, replace
from tender.hypercalls import Dispatcher
from tender.modules import counters_value
from tender.modules.console import Console
from tender.modules.poll import Poll
from tender.modules.time import Time
from tender.outcome import Statistics
from tender.sandbox import fdtable
from tender.sandbox.fdtable import START_LABELS, FdTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tender.accel import KvmAccelerator
    from tender.clock import HostClock
    from tender.config import Config
    from tender.cpu.vcpu import Engine, Exit, Vcpu
    from tender.devices import Inputs
    from tender.engine.ring import Ring
    from tender.hypercalls import Module
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.observe.counters import Page
    from tender.observe.gdb import GdbVcpu
    from tender.observe.pcap import Pcap
    from tender.observe.trace import Trace
    from tender.sandbox.sandbox import Sandbox
    from tender.snapshot.save import Saver
    from tender.stop import Stop


def assemble(
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
    guest = load(inputs, stop, warn, cleanup, created)
    opened = open_observers(guest, inputs, warn, cleanup, publish=publish)
    if inputs.restored:
        inputs.restored.mark(warn)
    inputs.file.close()
    if sandbox:
        opened = confine(sandbox, guest, opened, cleanup)
    copies = sandbox is not None and sandbox.copies is not None
    return wire(guest, inputs, opened, stop, warn, cleanup, copies=copies)


@dataclass
class Opened:
    """What the guest's process holds beside its devices."""

    fds: Mapping[str, int]  # by label
    pcaps: Mapping[int, Pcap]  # the packet files, by handle
    page: Page | None  # the counters page


def open_observers(
    guest: Loaded, inputs: Inputs, warn: Warn, cleanup: Cleanup, *, publish: bool
) -> Opened:
    """The user's descriptors, those of what watches the guest, and those of the guest's parts."""
    config = guest.config
    fds, pcaps, page = dict(inputs.fds), {}, None
    if _is_observed(config):
        from tender.observe import observers

        disks = guest.devices.block.devices.values()
        files = [inputs.file.info, *(os.fstat(disk.fd) for disk in disks)]
        fds |= observers.open_outputs(config, files, cleanup)
        fds |= observers.open_gdb(config, guest.image.machine, warn, cleanup)
        net, manifest = guest.devices.net, guest.image.manifest
        pcaps = observers.open_pcaps(config, manifest, net, fds, files, guest.clock, warn, cleanup)
        if "record" in fds:
            from tender.replay import record

            record.begin(fds["record"], config, guest.clock, guest.manifest, inputs.file)
    for each in (guest.devices, *guest.holders()):
        fds |= each.fds
    if publish and (page := publish_page(guest, cleanup)):
        fds["stats"] = page.fd
    return Opened(fds, pcaps, page)


def publish_page(guest: Loaded, cleanup: Cleanup) -> Page | None:
    """The counters page by which others see the guest, where it can have one."""
    from tender.observe import counters

    config, manifest, devices = guest.config, guest.image.manifest, guest.devices.by_handle()
    mem_bytes = guest.memory.mapped
    return counters.publish(
        config, guest.accelerator.kind.name, mem_bytes, manifest, devices, cleanup
    )


def confine(sandbox: Sandbox, guest: Loaded, opened: Opened, cleanup: Cleanup) -> Opened:
    """Move all descriptors to their numbers, also those of the guest's parts."""
    for layer, reason in guest.accelerator.missing_layers().items():
        sandbox.report_missing(layer, reason)
    moved = sandbox.move_descriptors(opened.fds, guest.devices.held(), opened.pcaps)
    cleanup.forget()  # the numbers are others' now, and this process ends with its guest
    for each in guest.holders():
        each.fds = {label: moved[label] for label in each.fds}
    return replace(opened, fds=moved)


def wire(
    guest: Loaded,
    inputs: Inputs,
    opened: Opened,
    stop: Stop,
    warn: Warn,
    cleanup: Cleanup,
    *,
    copies: bool,
) -> Machine:
    """Make what answers and watches the guest, with the descriptors that are open.

    `copies`: this process has copies of pages to give back (tender/embed/heap.py).
    """
    config, image, memory, devices = guest.config, guest.image, guest.memory, guest.devices
    clock, vcpu, kind = guest.clock, guest.vcpu, guest.accelerator.kind
    fds, page, restored = opened.fds, opened.page, inputs.restored
    console = Console(fds["console"], stop, warn, config.console_limit)
    poll = Poll(devices.net, stop, clock, devices.rendezvous(fds, clock, stop))
    if page:
        console.counters, poll.counters = page.console, page.poll
    modules: list[Module] = [console, Time(clock), poll, devices.block, devices.net]
    dispatcher = make_dispatcher(fds, memory, modules, image.machine, clock, stop, warn)
    engine = ring = None
    if accel.uses_engine(config, kind):
        from tender.engine import engine as engines

        engine, ring = engines.start(
            fds, memory, console, poll, devices, vcpu, stop, cleanup, copies=copies
        )
    if page:
        vcpu.count_in(page.activity)
    trace = gdb = None
    if "trace" in fds or config.gdb is not None:
        from tender.observe import observers
    if "trace" in fds:
        trace = observers.make_trace(config, fds, memory, image.manifest, clock, stop, warn)
    if config.gdb is not None:
        vcpu = gdb = observers.make_gdb(config, kind, fds, vcpu, guest.whole, stop)
    machine = Machine(
        guest=guest,
        vcpu=vcpu,
        console=console,
        poll=poll,
        dispatcher=dispatcher,
        fd_table=_fd_table(guest, opened),
        fds=fds,
        ring=ring,
        page=page,
        trace=trace,
        gdb=gdb,
        saver=make_saver(guest, inputs, vcpu, engine, poll, stop),
        pending=restored.pending(poll) if restored else None,
    )
    if gdb:
        gdb.statistics = machine.statistics
        gdb.pending = machine.pending
    return machine


def make_dispatcher(
    fds: Mapping[str, int],
    memory: GuestMemory,
    modules: list[Module],
    machine: int,
    clock: HostClock,
    stop: Stop,
    warn: Warn,
) -> Dispatcher:
    """What answers hypercalls; beside the modules, a record that is made or replayed."""
    if "record" in fds:
        from tender.replay.record import Recorder

        return Recorder(fds["record"], memory, modules, machine, clock, stop, warn)
    if "replay" in fds:
        from tender.replay.replay import Replay

        return Replay(fds["replay"], memory, modules, machine, clock, stop)
    return Dispatcher(memory, modules, machine)


def make_saver(
    guest: Loaded,
    inputs: Inputs,
    vcpu: Vcpu[Any],
    engine: Engine | None,
    poll: Poll,
    stop: Stop,
) -> Saver | None:
    """What saves the guest, where it may be saved."""
    if guest.requests is None:
        return None
    from tender.snapshot import save

    if inputs.restored:
        snapshot = inputs.restored.snapshot
    else:
        pieces, attached = inputs.file.pieces, guest.devices.attached()
        hz = vcpu.cpu_cycle_freq
        snapshot = save.template(guest.config, pieces, guest.memory.size, attached, hz)
    clock = guest.clock
    return save.Saver(guest.requests, snapshot, vcpu, engine, guest.memory, poll, clock, stop)


@dataclass
class Machine:
    """A guest that is ready to run, and what runs it."""

    guest: Loaded
    vcpu: Vcpu[Any]  # the guest's, or a debugger's between
    console: Console
    poll: Poll
    dispatcher: Dispatcher
    fd_table: FdTable
    fds: Mapping[str, int]  # by label
    ring: Ring | None
    page: Page | None
    trace: Trace | None
    gdb: GdbVcpu | None
    saver: Saver | None
    pending: Exit | None  # a hypercall of a restored guest that is still to be answered

    def statistics(self) -> Statistics:
        """What the devices have done until now."""
        console, poll = counters_value(self.console.counters), counters_value(self.poll.counters)
        return Statistics(console, poll, *self.guest.devices.statistics())


def _fd_table(guest: Loaded, opened: Opened) -> FdTable:
    """What the tender holds while the guest runs."""
    kind, devices = guest.accelerator.kind, guest.devices
    labels = [label for label in opened.fds if label not in START_LABELS]
    labels += [label for label in kind.labels if label not in labels]
    labels += ["gdb"] if "gdb-listen" in labels else []
    files = file_sizes(guest.config, guest.memory.size)
    sizes = fdtable.sizes(devices.labels, devices.capacities(), files)
    return FdTable(kind.name, tuple(labels), devices.labels, sizes, pcaps=tuple(opened.pcaps))


def file_sizes(config: Config, mem_bytes: int) -> dict[str, int]:
    """The maximum length of the core file and the snapshot, by label."""
    sizes = {}
    if config.dumpcore is not None:
        from tender.observe import core

        sizes["core"] = core.Target.size(mem_bytes)
    if config.snapshots is not None:
        from tender.snapshot import file

        sizes["snapshot"] = file.size_max(mem_bytes)
    return sizes


def _is_observed(config: Config) -> bool:
    outputs = (config.trace, config.report, config.record, config.notify, config.gdb)
    return bool(config.pcap) or any(each is not None for each in outputs)
