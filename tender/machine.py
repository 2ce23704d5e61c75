"""Config -> running guest: the order of things, on one screen.

The rule here: everything is opened before the guest runs its first instruction, one Cleanup owns
all of it, and what the guest ends with is an Outcome. An error before the start is raised.
"""

from __future__ import annotations

from errno import EINTR

from tender import loop
from tender._abi import lib
from tender.accel import Cpus
from tender.boot import bootinfo, layout
from tender.cleanup import Cleanup
from tender.clock import HostClock, VirtualClock
from tender.config import Descriptor, assign, check_all_attached, usable_memory
from tender.dataclass import replace
from tender.errors import (
    EXIT_FAILURE,
    GuestFault,
    HostError,
    NotEmulated,
)
from tender.hypercalls import Dispatcher
from tender.image.elf import EM_AARCH64
from tender.image.file import ImageFile
from tender.image.manifest import Attached, encode
from tender.memory import GuestMemory
from tender.modules import block, counters_value, keep_descriptors, net
from tender.modules.block import Block
from tender.modules.console import Console
from tender.modules.net import Net
from tender.modules.poll import Poll
from tender.modules.time import Time
from tender.outcome import NetCounters, Outcome, Statistics
from tender.sandbox.fdtable import FdTable, device_labels
from tender.stop import Stopped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from tender.accel import Warm
    from tender.config import Config
    from tender.cpu.vcpu import Vcpu
    from tender.engine.ring import Ring
    from tender.hypercalls import Halt, Module
    from tender.image.elf import Image
    from tender.image.manifest import Manifest
    from tender.kvm import Vcpu as KvmVcpu
    from tender.modules import Warn
    from tender.observe.core import Target
    from tender.observe.trace import Trace, Traced
    from tender.rendezvous import Rendezvous
    from tender.sandbox.sandbox import Sandbox
    from tender.stop import Stop


class Machine:
    """One guest, ready to run. Made, run and closed on one thread.

    With a `sandbox`, this process is the guest's: it is confined before the guest runs, for good.
    """

    def __init__(
        self,
        config: Config,
        stop: Stop,
        warn: Warn,
        sandbox: Sandbox | None = None,
        warm: Warm | None = None,
    ) -> None:
        self._cleanup = Cleanup()
        self._warm = warm
        self._config = config
        self._stop = stop
        self._warn = warn
        self._sandbox = sandbox
        self._ring: Ring | None = None
        self._target: Target | None = None
        self._trace: Trace | None = None
        self._fds: dict[str, int] = {}  # by what the policies call them
        try:
            self._assemble()
        except BaseException:
            self._cleanup.close()
            raise

    def close(self) -> None:
        """Close everything; after lockdown, leave that to the end of the process."""
        if self._sandbox and self._sandbox.entered:
            self._cleanup.forget()
        self._cleanup.close()

    def _assemble(self) -> None:
        config, cleanup = self._config, self._cleanup
        self._net_specs = keep_descriptors(config.net, "Could not attach interface", cleanup)
        self._block_specs = keep_descriptors(config.block, "Could not open block device", cleanup)
        if isinstance(config.trace, int):
            from tender.observe import trace

            self._fds["trace"] = trace.keep(config.trace, cleanup)
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
        self._attach(image.manifest)

        ring_bytes = ring_region(config, image, mem_bytes, self._cpus.on_kvm, self._labels)
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
        self._fds = self._descriptors(ring_bytes)
        if self._sandbox:
            self._hand_over(self._sandbox)
        boot_info = bootinfo.BootInfo(
            memory.size,
            image.kernel_end,
            vcpu.cpu_cycle_freq,
            cmdline,
            encode(image.manifest, self._attached()),
            net_ring_gpa=memory.size if ring_bytes else 0,
        )
        memory.put(layout.BOOT_INFO, bootinfo.build(boot_info))
        calls = Dispatcher(memory, self._make_modules(), image.machine)
        self._calls = self._traced(calls) if "trace" in self._fds else calls
        if self._uses_engine():
            self._vcpu = self._with_engine(self._cpus.kvm_vcpu)

    def _uses_engine(self) -> bool:
        return uses_engine(self._config, self._cpus.on_kvm)

    def _traced(self, calls: Dispatcher) -> Traced:
        from tender.observe import trace

        self._trace = trace.Trace(
            self._fds["trace"], self._stop, self._warn, self._clock.elapsed_ns
        )
        devices = {device.handle: device.name for device in self.image.manifest.devices}
        return trace.Traced(calls, self.memory, self._trace, devices)

    def _with_engine(self, vcpu: KvmVcpu) -> Vcpu[Any]:
        from tender.engine.engine import Engine, EngineVcpu

        engine = Engine(self.memory, self.console, self.poll, self.block, self.net)
        engine_vcpu = EngineVcpu(vcpu, engine)
        if self.memory.mapped > self.memory.size:
            from tender.engine.ring import Ring

            engine_vcpu.ring = self._ring = Ring(
                self._fds["kick"], self.memory, engine, self.net, self._stop, self._cleanup
            )
        return engine_vcpu

    def _descriptors(self, ring_bytes: int) -> dict[str, int]:
        """What the tender needs beside the devices' descriptors while the guest runs, by name."""
        fds = {**self._fds, "console": self._config.console_fd, "stderr": 2}
        if self._cpus.on_kvm:
            fds["vcpu"] = self._cpus.kvm_vcpu.fd
        if ring_bytes:
            from tender.engine import ring

            fds["kick"] = ring.open_kick(self._cpus.kvm_vcpu.vm, self._cleanup)
        if isinstance(self._config.trace, str):
            from tender.observe import trace

            fds["trace"] = trace.open_file(self._config.trace, self._cleanup)
        if self._target is not None:
            fds |= self._target.fds
        for _, spec in self._net_specs:
            if isinstance(spec, Descriptor) and spec.sync_fd is not None:
                fds["sync"] = spec.sync_fd
        return fds

    def _hand_over(self, sandbox: Sandbox) -> None:
        """From here on, this process holds the descriptors of the sandbox, and no others."""
        fds = self._fds = sandbox.move_descriptors(
            self._fds, {**self.block.devices, **self.net.devices}
        )
        self._cleanup.forget()  # the numbers are others' now, and this process ends with its guest
        if self._cpus.on_kvm:
            self._cpus.kvm_vcpu.fd = fds["vcpu"]
        if self._target is not None:
            self._target.fds = {name: fds[name] for name in self._target.fds}
        self._cpus.stay()
        if self._cpus.on_kvm and not self._cpus.kvm_vcpu.vm.filters_msrs:
            sandbox.report_missing("MSR filter", "this KVM has none (it takes Linux 5.10)")

    def fd_table(self) -> FdTable:
        """What this process holds while the guest runs."""
        return FdTable("kvm" if self._cpus.on_kvm else "soft", tuple(self._fds), self._labels)

    def _attach(self, manifest: Manifest) -> None:
        """Open the devices that the manifest declares, all of them."""
        config, cleanup, warn = self._config, self._cleanup, self._warn
        nets = assign(manifest, lib.MFT_DEV_NET_BASIC, self._net_specs)
        blocks = assign(manifest, lib.MFT_DEV_BLOCK_BASIC, self._block_specs)
        check_all_attached(manifest, [*nets, *blocks])
        self._labels = {
            handle: device_labels(spec) for handle, spec in [*nets.items(), *blocks.items()]
        }
        by_handle = {device.handle: device for device in manifest.devices}
        if config.dumpcore is not None:
            from tender.observe import core

            self._target = core.Target(config.dumpcore)
            cleanup.callback(self._target.close)
        self.block = Block({
            handle: block.attach(by_handle[handle], spec, cleanup, self._stop, warn)
            for handle, spec in blocks.items()
        })  # fmt: skip
        self.net = Net({
            handle: net.attach(by_handle[handle], spec, cleanup, warn)
            for handle, spec in nets.items()
        })  # fmt: skip

    def _make_modules(self) -> list[Module]:
        self.console = Console(
            self._fds["console"], self._stop, self._warn, self._config.console_limit
        )
        self.poll = Poll(self.net, self._stop, self._clock, self._rendezvous())
        return [self.console, Time(self._clock), self.poll, self.block, self.net]

    def _rendezvous(self) -> Rendezvous | None:
        """Where this guest's virtual time is agreed on with others, if it is."""
        if "sync" not in self._fds:
            return None
        from tender.rendezvous import open_rendezvous

        rendezvous = open_rendezvous(self._fds["sync"], self._clock, self._stop)
        for port in self.net.devices.values():
            port.wait_for_room = rendezvous.wait_for_room
        return rendezvous

    def _attached(self) -> dict[int, Attached]:
        """What the guest is told of its devices, by handle."""
        told = {
            handle: Attached(capacity=device.capacity, block_size=device.sector_size)
            for handle, device in self.block.devices.items()
        }
        for handle, device in self.net.devices.items():
            told[handle] = Attached(mac=device.mac, mtu=device.mtu)
        return told

    def start(self) -> None:
        """Enter the sandbox, if there is one, and start what runs beside the guest."""
        if self._sandbox:
            start_ring = self._ring.start if self._ring else None
            self._sandbox.enter(self.fd_table(), self._file_bytes(), start_ring)
        elif self._ring:
            self._ring.start()

    def _file_bytes(self) -> int:
        """How long a file may be that the tender writes to."""
        core_bytes = self._target.size(self.memory) if self._target else 0
        return max([core_bytes, *(disk.capacity for disk in self.block.devices.values())])

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
                raise self._hint(fault) from None
            self._warn(f"{fault}; going on with the software CPU (--cpu=soft starts on it)")
            self._vcpu = vcpu
        return loop.run(self._vcpu, self.memory, self._calls, self._stop)

    def _hint(self, fault: NotEmulated) -> NotEmulated:
        """After lockdown no other CPU can be loaded; at the start, it can."""
        return NotEmulated(f"{fault} (--cpu=soft may run it)") if self._sandbox else fault

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
        state = self._vcpu.core_state()
        if halt.trap:
            state = self._boot.with_trap(state, halt.trap)
        try:
            return target.write(self.memory, state, self._stop.check)
        except HostError as error:
            self._warn(str(error))
            return None

    def _stats(self) -> Statistics:
        return Statistics(
            counters_value(self.console.counters),
            counters_value(self.poll.counters),
            {disk.name: counters_value(disk.counters) for disk in self.block.devices.values()},
            {
                port.name: NetCounters(counters_value(port.received), counters_value(port.sent))
                for port in self.net.devices.values()
            },
        )


def run(
    config: Config,
    stop: Stop,
    warn: Warn,
    sandbox: Sandbox | None = None,
    *,
    started: Callable[[], None] | None = None,
    warm: Warm | None = None,
) -> Outcome:
    """Run a guest on this thread until it ends or `stop` is requested.

    Raises TenderError where it can't start. `warn` gets one line of text for each trouble on
    the way. `started` is called when all is open and the guest is about to run; `warm` is what
    was made for it in advance. Nothing is left behind, whatever happens.

    With a `sandbox` (tender/sandbox/sandbox.py), this process is confined to the guest's devices
    before the
    guest runs, and stays so: all that is left for it to do is to say how the guest ended.
    """
    stop.enter()
    try:
        machine = Machine(config, stop, warn, sandbox, warm)
        try:
            machine.start()
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


def uses_engine(config: Config, on_kvm: bool) -> bool:
    """Whether engine.c answers what it can; else it is Python's handlers that answer all."""
    return on_kvm and config.engine == "c" and config.trace is None


def ring_region(
    config: Config,
    image: Image,
    mem_bytes: int,
    on_kvm: bool,
    devices: Mapping[int, tuple[str, ...]],
) -> int:
    """How much of the guest's memory the network ring takes; 0: none is offered.

    `devices`: as an FdTable has them. The ring is engine.c's, so all networks must be.
    """
    networks = {name for names in devices.values() for name in names if name.startswith("net")}
    if networks != {"net"} or not uses_engine(config, on_kvm):
        return 0
    from tender import kvm
    from tender.engine import ring

    if not ring.is_worth_it(config.net_ring, kvm.is_hardware()):
        return 0
    return ring.region(mem_bytes, image)


def _boot(machine: int) -> Any:
    """How a guest of this machine wakes up: boot/x86_64.py or boot/aarch64.py."""
    if machine == EM_AARCH64:
        from tender.boot import aarch64

        return aarch64
    from tender.boot import x86_64

    return x86_64
