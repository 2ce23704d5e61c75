"""Config -> Loaded: the devices opened, the guest in memory and on a vCPU that has not run."""

from __future__ import annotations

from tender import accel
from tender.boot import bootinfo, layout
from tender.clock import HostClock, VirtualClock
from tender.config import usable_memory
from tender.dataclass import dataclass
from tender.devices import attach_devices
from tender.image.elf import EM_AARCH64
from tender.image.manifest import encode
from tender.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tender.accel import Accelerator, Kind, KvmAccelerator, Ranges
    from tender.cleanup import Cleanup
    from tender.config import Config
    from tender.cpu.vcpu import Vcpu
    from tender.devices import Devices, Inputs
    from tender.image.elf import Image
    from tender.modules import Warn
    from tender.observe.core import Target
    from tender.replay.file import Record
    from tender.snapshot.helper import Requests
    from tender.stop import Stop


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
        config=config,
        image=image,
        boot=boot,
        accelerator=accelerator,
        clock=clock,
        devices=devices,
        memory=memory,
        whole=whole,
        core=core,
        requests=requests,
        vcpu=vcpu,
        manifest=manifest,
    )


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
