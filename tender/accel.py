"""Which CPU runs a guest, and how it moves from one to another.

The rule here: `auto` takes KVM where it can be had and runs guests in hardware, else the CPU in
software, and says so in one line; who names a CPU gets that one or an error that says what to do.
The engine of the software CPU is not touched by a run on KVM.
"""

from __future__ import annotations

import os

from tender.cleanup import Cleanup
from tender.errors import HostError, UsageError
from tender.image.elf import EM_AARCH64, MACHINES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.clock import HostClock
    from tender.config import Config
    from tender.cpu.soft import SoftCpu
    from tender.cpu.vcpu import Vcpu
    from tender.image.elf import Image
    from tender.kvm import Kvm, Vm
    from tender.kvm import Vcpu as KvmVcpu
    from tender.memory import GuestMemory
    from tender.modules import Warn
    from tender.stop import Stop

ENVIRONMENT = "PTENDER_CPU"  # what `auto` means, for test suites


class Warm:
    """What of KVM can be made before there is a guest; nothing of it where something fails."""

    def __init__(self) -> None:
        self.made: tuple[Kvm, Vm, KvmVcpu] | None = None
        self._cleanup = Cleanup()
        try:
            from tender import kvm

            opened = kvm.Kvm(self._cleanup)
            vm = kvm.Vm(opened, self._cleanup)
            self.made = opened, vm, kvm.Vcpu(vm, self._cleanup)
        except (ImportError, HostError):
            self.close()  # whoever needs it will hear why it can't be had

    def close(self) -> None:
        """Give back what no guest has taken."""
        self._cleanup.close()


class Cpus:
    """The CPUs that one guest can have; `warm` is what there is of KVM already."""

    def __init__(
        self,
        config: Config,
        image: Image,
        clock: HostClock,
        cleanup: Cleanup,
        stop: Stop,
        warm: Warm | None = None,
    ) -> None:
        self._config = config
        self._image = image
        self._clock = clock
        self._cleanup = cleanup
        self._stop = stop
        self._kvm: Kvm | None = None
        self._made = warm.made if warm else None
        if warm:
            cleanup.callback(warm.close)
        self._movable = False

    def choose(self, warn: Warn) -> None:
        """Decide on which CPU the guest starts, and open KVM if that is it."""
        wanted = choice(self._config)
        if wanted == "soft":
            return
        foreign = self._foreign()
        if foreign is not None:
            if wanted == "kvm":
                raise HostError(f"{foreign}: use --cpu=soft")
            self._instead(warn, HostError(foreign))
            return
        if wanted == "kvm":
            self._kvm = self._open()
            return
        try:
            self._kvm = self._open()
        except HostError as error:
            self._instead(warn, error)
            return
        if emulated() and _engine():
            self._kvm = None
            warn(
                "KVM: this machine emulates what a guest executes (no VMX, no SVM): taking the "
                "software CPU, which is faster (to say nothing: --cpu=soft or --cpu=kvm)"
            )
        self._movable = self._kvm is not None

    @property
    def on_kvm(self) -> bool:
        """Whether the guest starts on KVM."""
        return self._kvm is not None

    def create(self, memory: GuestMemory) -> Vcpu[Any]:
        """The CPU that the guest starts on; its state is still to be set."""
        if self._kvm is None:
            return self._soft(memory)
        self.kvm_vcpu = self._on_kvm(self._kvm, memory)
        return self.kvm_vcpu

    def move(self, old: Vcpu[Any], memory: GuestMemory) -> Vcpu[Any] | None:
        """The software CPU in the state of `old`, which can't go on; None: the guest ends."""
        if not self._movable or not _engine():
            return None
        vcpu = self._soft(memory, old.cpu_cycle_freq)
        vcpu.set_state(old.get_state())
        self._movable = False
        return vcpu

    def stay(self) -> None:
        """The guest ends on the CPU it starts on: nothing can be loaded any more."""
        self._movable = False

    def _foreign(self) -> str | None:
        """Why no KVM could run the guest, where it is for another machine than this one."""
        here, guest = os.uname().machine, MACHINES[self._image.machine]
        if here == guest == "x86_64":
            return None
        return (
            f"KVM: it runs x86_64 guests on x86_64; this guest is for {guest}, the machine {here}"
        )

    def _open(self) -> Kvm:
        try:
            from tender import kvm
        except ImportError:
            raise HostError("KVM: there is none on this system: use --cpu=soft") from None
        try:
            return self._made[0] if self._made else kvm.Kvm(self._cleanup)
        except HostError as error:
            text = f"{error}, or use --cpu=soft" if "Could not open" in str(error) else str(error)
            raise HostError(text, error.syscall, 0) from None

    def _instead(self, warn: Warn, error: HostError) -> None:
        from tender.cpu import soft

        reason = str(error).removesuffix(", or use --cpu=soft")
        try:
            soft.load()
        except soft.NoEngine as missing:
            raise HostError(f"{reason}; and {missing}") from None
        warn(f"{reason}; taking the software CPU (to say nothing: --cpu=soft)")

    def _on_kvm(self, opened: Kvm, memory: GuestMemory) -> KvmVcpu:
        from tender import kvm

        vm = self._made[1] if self._made else kvm.Vm(opened, self._cleanup)
        vm.set_memory(memory.pointer, memory.mapped)
        vcpu = self._made[2] if self._made else kvm.Vcpu(vm, self._cleanup)
        self._stop.watch(vcpu.immediate_exit)
        self._cleanup.callback(lambda: self._stop.watch(0))
        return vcpu

    def _soft(self, memory: GuestMemory, cpu_cycle_freq: int | None = None) -> SoftCpu:
        from tender.cpu import soft

        executable = [(each.start, each.end) for each in self._image.segments if each.executable]
        return _soft_class(self._image.machine)(
            memory,
            executable,
            self._clock,
            self._cleanup,
            self._stop,
            self._config.instructions,
            cpu_cycle_freq or soft.NANOSECONDS,
        )


def _soft_class(machine: int) -> type[SoftCpu]:
    if machine == EM_AARCH64:
        from tender.cpu.soft_aarch64 import Arm64Vcpu

        return Arm64Vcpu
    from tender.cpu.soft_x86_64 import X86Vcpu

    return X86Vcpu


def choice(config: Config) -> str:
    """auto, kvm or soft: as asked for, or as the environment says; raises UsageError."""
    wanted = config.cpu
    if wanted == "auto":
        wanted = os.environ.get(ENVIRONMENT) or wanted
        if wanted not in ("auto", "kvm", "soft"):
            raise UsageError(f"{ENVIRONMENT}={wanted} is none of auto, kvm, soft")
    for option, given in (("clock=virtual", config.clock), ("instructions", config.instructions)):
        if given is None:
            continue
        if config.cpu == "kvm":
            raise UsageError(f"--{option} is for the software CPU: use --cpu=soft")
        wanted = "soft"
    return wanted


def emulated() -> bool:
    """Whether this machine's KVM has no hardware to run guests on.

    The CPU says so (CPUID: VMX or SVM, which a hypervisor that lets us nest shows as well): a
    microsecond, where asking KVM itself would mean to run a guest.
    """
    from tender import kvm

    return not kvm.is_hardware()


def _engine() -> bool:
    from tender.cpu import soft

    return soft.installed()
