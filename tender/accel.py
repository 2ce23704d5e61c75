"""The accelerators: what runs a guest's vCPU, KVM, the native or the software CPU, and how.

`auto` takes KVM where it can be had and runs guests in hardware, else the native CPU, else the
software CPU, with a notice of one line. A run loads only the CPU that it takes.
"""

from __future__ import annotations

import posix as os

from tender.cleanup import Cleanup
from tender.config import as_cpu
from tender.dataclass import dataclass
from tender.errors import HostError, UsageError, option, setting
from tender.host import environment
from tender.image.elf import EM_AARCH64, EM_X86_64, MACHINES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, Protocol, TypeAlias

    from tender.clock import HostClock
    from tender.config import Config
    from tender.cpu.soft import SoftCpu
    from tender.cpu.vcpu import Vcpu
    from tender.image.elf import Image
    from tender.memory import GuestMemory
    from tender.stop import Stop

    Ranges: TypeAlias = list[tuple[int, int]]  # pages, as (start, end)

    class Accelerator(Protocol):
        """What creates the vCPU of one guest."""

        kind: Kind
        notice: str  # why it is not KVM, where that was not asked for

        def create_vcpu(
            self, memory: GuestMemory, code: Ranges, stop: Stop, cleanup: Cleanup, /
        ) -> Vcpu[Any]:
            """A vCPU with `memory`, where `code` can be executed; KVM executes all of it.

            A stop request interrupts it until `cleanup`.
            """

        def missing_layers(self) -> dict[str, str]:
            """What it lacks to confine its guest, each with the reason."""


ENVIRONMENT = "PTENDER_CPU"  # what `auto` means, for test suites


@dataclass
class Kind:
    """What the rest of a machine depends on. `labels` are those of the descriptors that a vCPU
    holds while its guest runs."""

    name: str
    labels: tuple[str, ...]
    has_engine: bool = True  # engine.c can answer its hypercalls
    has_ring: bool = False  # the network ring can be offered
    has_nx: bool = False  # its guests' page tables say what is no code
    shares_memory: bool = False  # with another process, so guest memory is a file


KINDS = {
    kind.name: kind
    for kind in (
        Kind("kvm", ("vcpu",), has_ring=True),
        Kind("native", ("guest-process",), shares_memory=True),
        Kind("soft", (), has_engine=False, has_nx=True),
    )
}


class KvmAccelerator:
    """A virtual machine with its vCPU. It can be created before there is a guest.

    With `hardware`, a KVM that emulates what a guest executes is refused where the native or the
    software CPU can be had, which are faster. Raises HostError.
    """

    kind = KINDS["kvm"]

    def __init__(self, *, hardware: bool = False) -> None:
        self.notice = ""
        self._cleanup = Cleanup()
        try:
            from tender import kvm

            opened = kvm.Kvm(self._cleanup)
            if hardware and emulated() and (native_usable() or soft_usable()):
                raise HostError("KVM: this machine emulates what a guest executes (no VMX, no SVM)")
            if hardware and (reason := kvm.limit()):
                raise HostError(f"KVM: {reason}")
            self.vm = kvm.Vm(opened, self._cleanup)
            self._vcpu = kvm.Vcpu(self.vm, self._cleanup)
        except ImportError:
            raise HostError("KVM: this system has none") from None
        except BaseException:
            self.close()
            raise

    def create_vcpu(
        self, memory: GuestMemory, _code: Ranges, stop: Stop, cleanup: Cleanup
    ) -> Vcpu[Any]:
        """As Accelerator has it. Memory beyond the guest's own is for the network ring."""
        self.vm.set_memory(memory.pointer, memory.mapped)
        if memory.mapped > memory.size:
            from tender.engine import ring

            self._vcpu.fds["kick"] = ring.open_kick(self.vm.signal_on_out, cleanup)
        stop.watch(self._vcpu.immediate_exit)
        cleanup.callback(lambda: stop.watch(0))
        return self._vcpu

    def missing_layers(self) -> dict[str, str]:
        """As Accelerator has it."""
        if self.vm.filters_msrs:
            return {}
        return {"MSR filter": "this KVM has none (Linux 5.10 is needed)"}

    def close(self) -> None:
        """Close its descriptors and mappings."""
        self._cleanup.close()


class NativeAccelerator:
    """The guest's code in a process of its own, on this machine's CPU. Raises HostError."""

    kind = KINDS["native"]

    def __init__(self, image: Image, mem_bytes: int, notice: str = "") -> None:
        self.notice = notice
        reason = _not_native(image, mem_bytes)
        if reason:
            raise HostError(f"native CPU: {reason}: use {option('cpu', 'soft')}")

    def create_vcpu(
        self, memory: GuestMemory, code: Ranges, stop: Stop, cleanup: Cleanup
    ) -> Vcpu[Any]:
        """As Accelerator has it."""
        from tender.cpu.native import NativeCpu

        return NativeCpu(memory, code, stop, cleanup)

    def missing_layers(self) -> dict[str, str]:
        """As Accelerator has it."""
        return {}


class SoftAccelerator:
    """The CPU in software, for a guest of any architecture that it knows. Raises HostError."""

    kind = KINDS["soft"]

    def __init__(
        self, image: Image, clock: HostClock, instructions: int | None, notice: str = ""
    ) -> None:
        self.notice = notice  # why it is not KVM, where that was not asked for
        self._machine = image.machine
        self._clock = clock
        self._instructions = instructions

    def create_vcpu(
        self, memory: GuestMemory, code: Ranges, stop: Stop, cleanup: Cleanup
    ) -> Vcpu[Any]:
        """As Accelerator has it."""
        return _soft_class(self._machine)(
            memory, code, self._clock, cleanup, stop, self._instructions
        )

    def missing_layers(self) -> dict[str, str]:
        """As Accelerator has it."""
        return {}


def executable(image: Image, heap_end: int = 0) -> Ranges:
    """The pages of code, as (start, end); with `heap_end`, the heap up to there among them."""
    code = [(each.start, each.end) for each in image.segments if each.executable]
    return [*code, (image.kernel_end, heap_end)] if heap_end > image.kernel_end else code


def _soft_class(machine: int) -> type[SoftCpu]:
    if machine == EM_AARCH64:
        from tender.cpu.soft_aarch64 import Arm64Vcpu

        return Arm64Vcpu
    from tender.cpu.soft_x86_64 import X86Vcpu

    return X86Vcpu


def choose(
    config: Config,
    image: Image,
    clock: HostClock,
    cleanup: Cleanup,
    created: KvmAccelerator | None = None,
) -> Accelerator:
    """The accelerator that `config` asks for; `created` is one that was made in advance.

    Raises HostError where it can't be had, UsageError where the environment names none.
    """
    if created is not None:
        cleanup.callback(created.close)
    wanted = choice(config)
    if wanted == "native":
        return NativeAccelerator(image, config.mem_bytes)
    if wanted == "soft":
        return SoftAccelerator(image, clock, config.instructions)
    try:
        kvm = _kvm(image, created, wanted)
    except HostError as error:
        if wanted == "kvm":
            other = "soft" if _not_native(image, config.mem_bytes) else "native"
            raise HostError(f"{error}, or use {option('cpu', other)}", error.syscall, 0) from None
        return _without_kvm(error, image, config.mem_bytes, clock)
    cleanup.callback(kvm.close)
    return kvm


def _without_kvm(why: HostError, image: Image, mem_bytes: int, clock: HostClock) -> Accelerator:
    """What `auto` takes where there is no KVM for this image; its notice says why."""
    reason = _not_native(image, mem_bytes)
    if not reason:
        notice = f"{why}; taking the native CPU (to say nothing: {option('cpu', 'native')})"
        return NativeAccelerator(image, mem_bytes, notice)
    text = f"{why}; native CPU: {reason}" if image.machine == EM_X86_64 else str(why)
    _check_soft(text)
    quiet = option("cpu", "soft")
    notice = f"{text}; taking the software CPU (to say nothing: {quiet})"
    return SoftAccelerator(image, clock, None, notice)


def _not_native(image: Image, mem_bytes: int) -> str:
    """Why the native CPU can't run this image; empty: it can."""
    from tender.cpu import native

    here, guest = os.uname().machine, MACHINES[image.machine]
    if guest != here:
        return f"this guest is for {guest}, the machine {here}"
    return native.missing() or native.limit(mem_bytes)


def _kvm(image: Image, created: KvmAccelerator | None, wanted: str) -> KvmAccelerator:
    here, guest = os.uname().machine, MACHINES[image.machine]
    if not here == guest == "x86_64":
        raise HostError(
            f"KVM: it runs x86_64 guests on x86_64; this guest is for {guest}, the machine {here}"
        )
    return created or KvmAccelerator(hardware=wanted == "auto")


def _check_soft(why: str) -> None:
    from tender.cpu import soft

    try:
        soft.check_usable()
    except HostError as missing:
        raise HostError(f"{why}; and {missing}") from None


def from_environment(cpu: str) -> str:
    """What `cpu` means: PTENDER_CPU can replace "auto". Raises UsageError."""
    return as_cpu(ENVIRONMENT, environment(ENVIRONMENT) or cpu) if cpu == "auto" else cpu


def choice(config: Config) -> str:
    """auto, kvm, native or soft: as asked for, or as the environment says; raises UsageError."""
    wanted = from_environment(config.cpu)
    for name in ("record", "replay", "clock", "instructions"):
        given = getattr(config, name)
        if given is None:
            continue
        if config.cpu in ("kvm", "native"):
            raise UsageError(
                f"{setting(f'--{name}', name)} is for the software CPU: use {option('cpu', 'soft')}"
            )
        wanted = "soft"
    return wanted


def likely(cpu: str) -> str:
    """What will run most guests with this `cpu`, for what can be prepared: kvm, native or soft."""
    if cpu != "auto":
        return cpu
    if not emulated():
        return "kvm"
    return "native" if native_usable() else "soft"


def emulated() -> bool:
    """Whether this machine's KVM has no hardware to run guests on.

    The CPU says so (CPUID: VMX or SVM, which a hypervisor that lets us nest shows as well): a
    microsecond, where asking KVM itself would mean to run a guest.
    """
    from tender import kvm

    return not kvm.is_hardware()


def native_usable() -> bool:
    """Whether the native CPU can run an x86_64 guest here."""
    from tender.cpu import native

    return not native.missing()


def soft_usable() -> bool:
    """Whether the software CPU can run a guest here."""
    from tender.cpu import soft

    try:
        soft.check_usable()
    except HostError:
        return False
    return True


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

    The ring is ring.c's, so all networks must be. A guest that may be saved has none, nor has one
    with a limit to the rate of a network, by which the ring would pass.
    """
    networks = {name for names in labels.values() for name in names if name.startswith("net")}
    if config.restore or config.snapshots or networks != {"net"} or config.net_rate:
        return 0
    if not kind.has_ring or not uses_engine(config, kind):
        return 0
    from tender.engine import ring

    if not ring.is_worth_it(config.net_ring, not emulated()):
        return 0
    return ring.region(mem_bytes, image)
