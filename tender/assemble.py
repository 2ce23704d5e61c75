"""Config -> Machine: a guest that is ready to run, and what runs it.

All that the guest can need is opened here, before its first instruction, and one Cleanup owns it.
"""

from __future__ import annotations

import os

from tender import accel
from tender.boot import bootinfo, layout
from tender.cleanup import Cleanup
from tender.clock import HostClock, VirtualClock
from tender.config import usable_memory
from tender.dataclass import dataclass
from tender.devices import attach_devices
from tender.hypercalls import Dispatcher
from tender.image.elf import EM_AARCH64
from tender.image.manifest import encode
from tender.memory import GuestMemory
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

    from tender.accel import Accelerator, Kind, KvmAccelerator, Ranges
    from tender.config import Config
    from tender.cpu.vcpu import Exit, Vcpu
    from tender.devices import Devices, Inputs
    from tender.engine.ring import Ring
    from tender.hypercalls import Module
    from tender.image.elf import Image
    from tender.modules import Warn
    from tender.observe.core import Target
    from tender.observe.counters import Page
    from tender.observe.gdb import GdbVcpu
    from tender.observe.pcap import Pcap
    from tender.observe.trace import Trace
    from tender.replay.file import Record
    from tender.sandbox.sandbox import Sandbox
    from tender.snapshot.helper import Requests
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
    fds, pcaps = open_observers(guest, inputs, warn, cleanup)
    for each in (guest.devices, *guest.holders()):
        fds |= each.fds
    page = publish_page(guest, cleanup) if publish else None
    fds |= {"stats": page.fd} if page else {}
    if inputs.restored:
        inputs.restored.mark(warn)
    inputs.file.close()
    if sandbox:
        fds = confine(sandbox, guest, fds, pcaps, cleanup)
    copies = sandbox is not None and sandbox.copies is not None
    return wire(guest, inputs, fds, pcaps, page, stop, warn, cleanup, copies=copies)


@dataclass
class Loaded:
    """A guest in its memory, with its devices, on a vCPU that has not run."""

    config: Config
    image: Image
    boot: Any  # the module of its architecture in tender/boot/
    accelerator: Accelerator
    clock: HostClock
    devices: Devices
    memory: GuestMemory
    whole: memoryview  # its memory, for a debugger, which may write to all of it
    core: Target | None
    requests: Requests | None  # for snapshots
    vcpu: Vcpu[Any]
    manifest: bytes  # as the guest finds it

    def holders(self) -> list[Any]:
        """What has descriptors beside the devices, in `fds`."""
        return [each for each in (self.vcpu, self.core, self.requests) if each]


def load(
    inputs: Inputs,
    stop: Stop,
    warn: Warn,
    cleanup: Cleanup,
    created: KvmAccelerator | None,
) -> Loaded:
    """Open the devices, and put the guest into memory and on a vCPU."""
    config, image, restored = inputs.config, inputs.file.image, inputs.restored
    boot = _boot(image.machine)
    mem_bytes = usable_memory(config.mem_bytes)
    if mem_bytes != config.mem_bytes:
        warn(f"adjusting memory to {mem_bytes} bytes")
    clock = _clock(config, inputs.record)
    accelerator = accel.choose(config, image, clock, cleanup, created)
    kind = accelerator.kind
    devices = attach_devices(inputs, stop, warn, cleanup)
    devices.limit(config, image.manifest, stop)
    memory = reserve_memory(config, image, mem_bytes, kind, devices.labels, cleanup)
    requests = None
    if config.snapshots is not None:
        from tender.snapshot import helper, save

        save.check(devices)
        requests = helper.open_requests(config.snapshots, memory.fd, stop, cleanup)
    inputs.file.load(memory, stop.check)
    whole = memory.alias() if config.gdb is not None and kind.name == "kvm" else memory.view
    core = _open_core(config, memory, cleanup)
    code = accel.executable(image, memory.size if config.exec_heap else 0)
    vcpu = accelerator.create_vcpu(memory, code, stop, cleanup)
    manifest = encode(image.manifest, devices.attached())
    if inputs.record:
        manifest = inputs.record.manifest(len(manifest))
    if restored:
        restored.set_cpu(config, kind, vcpu, clock, warn)
    else:
        if requests:
            save.use_machine_counter(vcpu, kind, image, clock)
        boot_guest(config, image, boot, memory, code if kind.has_nx else None, vcpu, manifest)
    return Loaded(
        config,
        image,
        boot,
        accelerator,
        clock,
        devices,
        memory,
        whole,
        core,
        requests,
        vcpu,
        manifest,
    )


def wire(
    guest: Loaded,
    inputs: Inputs,
    fds: Mapping[str, int],
    pcaps: Mapping[int, Pcap],
    page: Page | None,
    stop: Stop,
    warn: Warn,
    cleanup: Cleanup,
    *,
    copies: bool,
) -> Machine:
    """Make what answers and watches the guest, with the descriptors `fds` (by label).

    `copies`: this process has copies of pages to give back (tender/embed/heap.py).
    """
    config, image, memory, devices = guest.config, guest.image, guest.memory, guest.devices
    clock, vcpu, kind = guest.clock, guest.vcpu, guest.accelerator.kind
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
    restored, saver = inputs.restored, None
    if guest.requests:
        from tender.snapshot import save

        saver = save.Saver(
            guest.requests,
            guest.requests.fds,
            inputs.file.pieces,
            config,
            vcpu,
            engine,
            memory,
            poll,
            devices,
            clock,
            restored.snapshot.hz if restored else vcpu.cpu_cycle_freq,
            stop,
            trace,
            image,
            restored.snapshot.features if restored else frozenset(),
        )
    machine = Machine(
        image,
        guest.boot,
        memory,
        vcpu,
        console,
        poll,
        devices,
        dispatcher,
        _fd_table(kind, fds, devices, pcaps, file_sizes(config, memory.size)),
        guest.accelerator.notice,
        ring,
        trace,
        guest.core,
        page,
        gdb,
        fds.get("notify"),
        fds.get("report-file"),
        saver,
        restored.pending(poll) if restored else None,
    )
    if gdb:
        gdb.statistics = machine.statistics
        gdb.pending = machine.pending
    return machine


def reserve_memory(
    config: Config,
    image: Image,
    mem_bytes: int,
    kind: Kind,
    labels: Mapping[int, tuple[str, ...]],
    cleanup: Cleanup,
) -> GuestMemory:
    """The guest's memory, with the ring's region where the ring is offered."""
    ring_bytes = accel.ring_region(config, image, mem_bytes, kind, labels)
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
    return memory


def boot_guest(
    config: Config,
    image: Image,
    boot: Any,
    memory: GuestMemory,
    code: Ranges | None,
    vcpu: Vcpu[Any],
    manifest: bytes,
) -> None:
    """What a guest finds when it starts: its registers, tables and boot info.

    A CPU that executes nothing but `code` says so in the page tables: a jump elsewhere is the
    guest's own exception, and the software CPU writes faster where there is no code.
    """
    vcpu.set_state(boot.initial_state(image.entry, memory.size, nx=code is not None))
    for gpa, table in boot.tables(memory.mapped, code):
        memory.put(gpa, table)
    boot_info = bootinfo.BootInfo(
        memory.size,
        image.kernel_end,
        vcpu.cpu_cycle_freq,
        bootinfo.join_cmdline(config.args),
        manifest,
        memory.size if memory.mapped > memory.size else 0,
    )
    memory.put(layout.BOOT_INFO, bootinfo.build(boot_info))


def open_observers(
    guest: Loaded, inputs: Inputs, warn: Warn, cleanup: Cleanup
) -> tuple[dict[str, int], Mapping[int, Pcap]]:
    """The user's descriptors and those of what watches the guest, by label; its packet files."""
    config, devices, clock = guest.config, guest.devices, guest.clock
    fds = dict(inputs.fds)
    if not _is_observed(config):
        return fds, {}
    from tender.observe import observers

    files = [inputs.file.info, *(os.fstat(disk.fd) for disk in devices.block.devices.values())]
    fds |= observers.open_outputs(config, files, cleanup)
    fds |= observers.open_gdb(config, warn, cleanup)
    manifest = guest.image.manifest
    pcaps = observers.open_pcaps(config, manifest, devices.net, fds, files, clock, warn, cleanup)
    if "record" in fds:
        from tender.replay import record

        record.begin(fds["record"], config, clock, guest.manifest, inputs.file)
    return fds, pcaps


def publish_page(guest: Loaded, cleanup: Cleanup) -> Page | None:
    """The counters page by which others see the guest, where it can have one."""
    from tender.observe import counters

    config, manifest, devices = guest.config, guest.image.manifest, guest.devices.by_handle()
    mem_bytes = guest.memory.mapped
    return counters.publish(
        config, guest.accelerator.kind.name, mem_bytes, manifest, devices, cleanup
    )


def confine(
    sandbox: Sandbox,
    guest: Loaded,
    fds: Mapping[str, int],
    pcaps: Mapping[int, Pcap],
    cleanup: Cleanup,
) -> dict[str, int]:
    """Move all descriptors to their numbers: `fds` (by label), and those of the guest's parts."""
    for layer, reason in guest.accelerator.missing_layers().items():
        sandbox.report_missing(layer, reason)
    moved = sandbox.move_descriptors(fds, guest.devices.held(), pcaps)
    cleanup.forget()  # the numbers are others' now, and this process ends with its guest
    for each in guest.holders():
        each.fds = {label: moved[label] for label in each.fds}
    return moved


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
    saver: Saver | None
    pending: Exit | None  # a hypercall of a restored guest that is still to be answered

    def statistics(self) -> Statistics:
        """What the devices have done until now."""
        console, poll = counters_value(self.console.counters), counters_value(self.poll.counters)
        return Statistics(console, poll, *self.devices.statistics())


def _fd_table(
    kind: Kind,
    fds: Mapping[str, int],
    devices: Devices,
    pcaps: Mapping[int, Pcap],
    files: Mapping[str, int],
) -> FdTable:
    """What the tender holds while the guest runs."""
    labels = [label for label in fds if label not in START_LABELS]
    labels += [label for label in kind.labels if label not in labels]
    labels += ["gdb"] if "gdb-listen" in labels else []
    sizes = fdtable.sizes(devices.labels, devices.capacities(), files)
    return FdTable(kind.name, tuple(labels), devices.labels, sizes, pcaps=tuple(pcaps))


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


def _boot(machine: int) -> Any:
    """How a guest of this machine wakes up: boot/x86_64.py or boot/aarch64.py."""
    if machine == EM_AARCH64:
        from tender.boot import aarch64

        return aarch64
    from tender.boot import x86_64

    return x86_64


def _clock(config: Config, record: Record | None) -> HostClock:
    if config.clock:
        clock = VirtualClock(config.clock)
        clock.cell.random = record.header.random if record else clock.cell.random
        return clock
    if config.record is None:
        return HostClock()
    from tender.replay.record import RecordedClock

    return RecordedClock()


def _open_core(config: Config, memory: GuestMemory, cleanup: Cleanup) -> Target | None:
    if config.dumpcore is None:
        return None
    from tender.observe.core import Target

    target = Target(config.dumpcore, memory.fd)
    cleanup.callback(target.close)
    return target
