"""Config -> running guest: the order of things, on one screen.

The rule here: everything is opened before the guest runs its first instruction, one Cleanup owns
all of it, and what the guest ends with is an Outcome. An error before the start is raised.
"""

from __future__ import annotations

from errno import EINTR

from tender import loop
from tender._abi import lib
from tender.boot import bootinfo, layout
from tender.cleanup import Cleanup
from tender.clock import HostClock, VirtualClock
from tender.config import assign, check_all_attached, usable_memory
from tender.cpus import Cpus
from tender.elf import EM_AARCH64
from tender.errors import (
    EXIT_FAILURE,
    GuestFault,
    HostError,
    NotEmulated,
    TenderError,
)
from tender.hypercalls import Dispatcher
from tender.image import ImageFile
from tender.manifest import Attached, encode
from tender.memory import GuestMemory
from tender.modules import block, counters_dict, keep_descriptors, net
from tender.modules.block import Block
from tender.modules.console import Console
from tender.modules.net import Net
from tender.modules.poll import Poll
from tender.modules.time import Time
from tender.record import record, replace
from tender.stop import Stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.config import Config
    from tender.cpus import Warm
    from tender.dumpcore import Target
    from tender.hypercalls import Halt, Module
    from tender.kvm import Vcpu as KvmVcpu
    from tender.manifest import Manifest
    from tender.modules import Warn
    from tender.rendezvous import Rendezvous
    from tender.ring import Ring
    from tender.stop import Stop
    from tender.trace import Trace, Traced
    from tender.vcpu import Vcpu


@record
class Outcome:
    """How a guest ended.

    `reason` is "halted" (by itself, with `status`), "stopped" (asked to, by a program or by the
    signal `signo`), "fault" (it did what no guest may: `error` is a GuestFault) or "host" (the
    host could not go on: `error` is a HostError). `stats` counts what its devices did.
    """

    reason: str
    status: int
    signo: int = 0
    error: TenderError | None = None
    trap: dict[str, int] | None = None  # registers of a CPU exception, where the guest tells
    core: str | None = None  # the core file that was written
    stats: dict[str, dict[str, int]] = {}  # noqa: RUF012 - never written to


class Machine:
    """One guest, ready to run. Made, run and closed on one thread."""

    def __init__(self, config: Config, stop: Stop, warn: Warn, warm: Warm | None = None) -> None:
        self._cleanup = Cleanup()
        self._warm = warm
        self._config = config
        self._stop = stop
        self._warn = warn
        self._ring: Ring | None = None
        self._trace: Trace | None = None
        try:
            self._assemble()
        except BaseException:
            self._cleanup.close()
            raise

    def close(self) -> None:
        self._cleanup.close()

    def _assemble(self) -> None:
        config, cleanup = self._config, self._cleanup
        self._net_specs = keep_descriptors(config.net, "Could not attach interface", cleanup)
        self._block_specs = keep_descriptors(config.block, "Could not open block device", cleanup)
        file = ImageFile(config.kernel)
        cleanup.callback(file.close)
        image = self.image = file.image
        boot = self._boot = _boot(image.machine)
        cmdline = bootinfo.join_cmdline(config.args)
        mem_bytes = usable_memory(config.mem_bytes)
        if mem_bytes != config.mem_bytes:
            self._warn(f"adjusting memory to {mem_bytes} bytes")
        self._clock = VirtualClock(config.clock) if config.clock else HostClock()
        self._cpus = Cpus(config, image, self._clock, cleanup, self._stop, self._warm)
        self._cpus.choose(self._warn)
        self._attach(image.manifest, self._rendezvous())

        ring_bytes = self._ring_bytes(mem_bytes)
        memory = self.memory = GuestMemory(
            mem_bytes - ring_bytes, ring_bytes, huge=config.hugepages
        )
        cleanup.callback(memory.close)
        file.load(memory, self._stop.check)
        file.close()
        vcpu = self._vcpu = self._cpus.create(memory)
        vcpu.set_state(boot.initial_state(image.entry, memory.size))
        for gpa, table in boot.tables(mem_bytes):
            memory.put(gpa, table)
        boot_info = bootinfo.BootInfo(
            memory.size,
            image.kernel_end,
            vcpu.cpu_cycle_freq,
            cmdline,
            encode(image.manifest, self._attached()),
            net_ring_gpa=memory.size if ring_bytes else 0,
        )
        memory.put(layout.BOOT_INFO, bootinfo.build(boot_info))
        self._calls: Dispatcher | Traced = Dispatcher(memory, self._modules, image.machine)
        if config.trace is not None:
            self._calls = self._traced(self._calls, config.trace)
        if self._uses_engine():
            self._vcpu = self._with_engine(self._cpus.kvm_vcpu)

    def _uses_engine(self) -> bool:
        config = self._config
        return self._cpus.on_kvm and config.engine == "c" and config.trace is None

    def _traced(self, calls: Dispatcher, file: str | int) -> Traced:
        from tender import trace

        elapsed_ns = self._clock.elapsed_ns
        self._trace = trace.attach(file, self._cleanup, self._stop, self._warn, elapsed_ns)
        devices = {device.handle: device.name for device in self.image.manifest.devices}
        return trace.Traced(calls, self.memory, self._trace, devices)

    def _ring_bytes(self, mem_bytes: int) -> int:
        """How much of the guest's memory the network ring takes; 0: none is offered."""
        if not self.net.devices or not self._uses_engine():
            return 0
        from tender import kvm, ring

        if not ring.is_worth_it(self._config.net_ring, kvm.is_hardware()):
            return 0
        return ring.region(mem_bytes, self.image)

    def _with_engine(self, vcpu: KvmVcpu) -> Vcpu[Any]:
        from tender.engine import Engine, EngineVcpu

        engine = Engine(self.memory, self.console, self.poll, self.block, self.net)
        engine_vcpu = EngineVcpu(vcpu, engine)
        if self.memory.mapped > self.memory.size:
            from tender.ring import Ring

            engine_vcpu.ring = self._ring = Ring(
                vcpu.vm, self.memory, engine, self.net, self._stop, self._cleanup
            )
        return engine_vcpu

    def _rendezvous(self) -> Rendezvous | None:
        """Where this guest's virtual time is agreed on with others, if it is."""
        for _, spec in self._net_specs:
            sync_fd = getattr(spec, "sync_fd", None)
            if sync_fd is not None:
                from tender.rendezvous import open_rendezvous

                return open_rendezvous(sync_fd, self._clock, self._stop)
        return None

    def _attach(self, manifest: Manifest, rendezvous: Rendezvous | None) -> None:
        """Open the devices that the manifest declares, all of them."""
        config, cleanup, warn = self._config, self._cleanup, self._warn
        nets = assign(manifest, lib.MFT_DEV_NET_BASIC, self._net_specs)
        blocks = assign(manifest, lib.MFT_DEV_BLOCK_BASIC, self._block_specs)
        check_all_attached(manifest, [*nets, *blocks])
        by_handle = {device.handle: device for device in manifest.devices}
        self._target: Target | None = None
        if config.dumpcore is not None:
            from tender import dumpcore

            self._target = dumpcore.Target(config.dumpcore)
            cleanup.callback(self._target.close)
        self.block = Block({
            handle: block.attach(by_handle[handle], spec, cleanup, self._stop, warn)
            for handle, spec in blocks.items()
        })  # fmt: skip
        self.net = Net({
            handle: net.attach(by_handle[handle], spec, cleanup, warn)
            for handle, spec in nets.items()
        })  # fmt: skip
        self.console = Console(config.console_fd, self._stop, warn, config.console_limit)
        self.poll = Poll(self.net, self._stop, self._clock, rendezvous)
        if rendezvous is not None:
            for port in self.net.devices.values():
                port.wait_for_room = rendezvous.wait_for_room
        self._modules: list[Module] = [
            self.console,
            Time(self._clock),
            self.poll,
            self.block,
            self.net,
        ]

    def _attached(self) -> dict[int, Attached]:
        """What the guest is told of its devices, by handle."""
        told = {
            handle: Attached(capacity=device.capacity, block_size=device.sector_size)
            for handle, device in self.block.devices.items()
        }
        for handle, device in self.net.devices.items():
            told[handle] = Attached(mac=device.mac, mtu=device.mtu)
        return told

    def run(self) -> Outcome:
        """Run the guest to its end."""
        try:
            halt = self._run()
        except Stopped:
            outcome = self._stopped()
        except GuestFault as fault:
            outcome = Outcome("fault", EXIT_FAILURE, error=fault.with_traceback(None))
        except HostError as error:
            outcome = Outcome("host", EXIT_FAILURE, error=error.with_traceback(None))
        else:
            outcome = self._halted(halt)
        if self._trace is not None:
            self._trace.end(outcome)
        return replace(outcome, stats=self._stats())

    def _run(self) -> Halt:
        try:
            return loop.run(self._vcpu, self.memory, self._calls, self._stop)
        except NotEmulated as fault:
            # The software CPU has no ring: a guest that was offered one can't move.
            vcpu = None if self._ring else self._cpus.move(self._vcpu, self.memory)
            if vcpu is None:
                raise
            self._warn(f"{fault}; going on with the software CPU (--cpu=soft starts on it)")
            self._vcpu = vcpu
        return loop.run(self._vcpu, self.memory, self._calls, self._stop)

    def _halted(self, halt: Halt) -> Outcome:
        core = None
        if halt.status == lib.HVT_EXIT_ABORT and self._target is not None:
            try:
                core = self._dump(self._target, halt)
            except Stopped:
                return self._stopped()
        return Outcome("halted", halt.status, trap=halt.trap, core=core)

    def _stopped(self) -> Outcome:
        fault = self._ring.fault() if self._ring else None
        if fault:  # it was the ring's thread that asked for the end
            return Outcome("fault", EXIT_FAILURE, error=fault)
        return Outcome("stopped", EXIT_FAILURE, signo=self._stop.signo)

    def _dump(self, target: Target, halt: Halt) -> str | None:
        state = self._vcpu.get_state()
        if halt.trap:
            state = self._boot.with_trap(state, halt.trap)
        try:
            return target.write(self.memory, state, self._stop.check)
        except HostError as error:
            self._warn(str(error))
            return None

    def _stats(self) -> dict[str, dict[str, int]]:
        cells = {"console": self.console.counters, "poll": self.poll.counters}
        for device in self.block.devices.values():
            cells[f"block:{device.name}"] = device.counters
        for port in self.net.devices.values():
            cells[f"net:{port.name}:received"] = port.received
            cells[f"net:{port.name}:sent"] = port.sent
        return {name: counters_dict(cell) for name, cell in cells.items()}


def run(
    config: Config,
    stop: Stop,
    warn: Warn,
    *,
    started: Callable[[], None] | None = None,
    warm: Warm | None = None,
) -> Outcome:
    """Run a guest on this thread until it ends or `stop` is requested.

    Raises TenderError where it can't start. `warn` gets one line of text for each trouble on
    the way. `started` is called when all is open and the guest is about to run; `warm` is what
    was made for it in advance. Nothing is left behind, whatever happens.
    """
    stop.enter()
    try:
        machine = Machine(config, stop, warn, warm)
        try:
            if started is not None:
                started()
            return machine.run()
        finally:
            machine.close()
    except (Stopped, HostError) as error:
        if not stop.requested or (isinstance(error, HostError) and error.errno != EINTR):
            raise
        return Outcome("stopped", EXIT_FAILURE, signo=stop.signo)  # before it had begun
    finally:
        stop.leave()


def _boot(machine: int) -> Any:
    """How a guest of this machine wakes up: boot/x86_64.py or boot/aarch64.py."""
    if machine == EM_AARCH64:
        from tender.boot import aarch64

        return aarch64
    from tender.boot import x86_64

    return x86_64
