"""KVM: its objects, one method per ioctl, and its exits as values.

The rule here: no policy. A refused ioctl is a HostError with the errno. Source: Linux,
Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import _struct as struct
import errno
import posix as os

from tender._native import ffi, lib
from tender.boot.x86_64 import CONTROL, CR4_OSXSAVE, REGISTERS, SEGMENTS, Segment, State, Table
from tender.cpu import cpuid
from tender.cpu.vcpu import (
    Failure,
    Fault,
    Interrupted,
    IoIn,
    IoOut,
    Mmio,
    is_near,
    other_frequency,
)
from tender.dataclass import replace
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.cleanup import Cleanup
    from tender.cpu.cpuid import Entry
    from tender.cpu.vcpu import Engine, Exit, Ring

DEVICE = "/dev/kvm"
API_VERSION = 12  # the only one there is since Linux 2.6.22
CPUID_ENTRIES = 256
_FOR_GROUP = 0o060  # of a mode: read and write
_UNKNOWN_GROUP = 65534  # user_namespaces(7): what a group that is not mapped is shown as
EINTR_TRIES = 10  # making a VM can be interrupted

_CAPABILITIES = ("KVM_CAP_USER_MEMORY", "KVM_CAP_GET_TSC_KHZ", "KVM_CAP_IMMEDIATE_EXIT")
_SEGMENT_FIELDS = tuple(Segment.__annotations__)
_ENTRY = struct.Struct("<7I12x")  # a struct kvm_cpuid_entry2


def limit() -> str:
    """Which limit of this process keeps a guest from KVM; empty: none does.

    From Linux 6.14 on, the first KVM_RUN starts a kernel thread.
    """
    is_reached = lib.native_limit(0) == lib.RLIMIT_NPROC
    return "a kernel thread exceeds the limit of processes (`ulimit -u`)" if is_reached else ""


def is_hardware() -> bool:
    """Whether the CPU runs guests by itself. Without that, KVM emulates their every instruction
    in kernel mode, a hundred times slower or more."""
    return bool(lib.kvm_is_hardware())


def _ioctl(fd: int, name: str, value: int = 0) -> int:
    for _ in range(EINTR_TRIES):
        result: int = lib.kvm_ioctl(fd, getattr(lib, name), value)
        if result >= 0 or ffi.errno != errno.EINTR:
            break
    if result < 0:
        raise HostError(f"KVM: ioctl ({name.removeprefix('KVM_')}) failed", "ioctl", ffi.errno)
    return result


def _ioctl_at(fd: int, name: str, argument: Any) -> None:
    if lib.kvm_ioctl_at(fd, getattr(lib, name), argument) < 0:
        raise HostError(f"KVM: ioctl ({name.removeprefix('KVM_')}) failed", "ioctl", ffi.errno)


class Kvm:
    """/dev/kvm, checked."""

    def __init__(self, cleanup: Cleanup, device: str = DEVICE) -> None:
        self.fd = _open(device)
        cleanup.callback(lambda: os.close(self.fd))
        version = _ioctl(self.fd, "KVM_GET_API_VERSION")
        if version != API_VERSION:
            raise HostError(f"KVM: API version is {version}, not {API_VERSION}")
        for name in _CAPABILITIES:
            if not _ioctl(self.fd, "KVM_CHECK_EXTENSION", getattr(lib, name)):
                raise HostError(f"KVM: host does not support {name}")

    def supported_cpuid(self) -> list[Entry]:
        """What the host supports in a guest."""
        table = ffi.new("struct kvm_cpuid2 *", {"entries": CPUID_ENTRIES})
        table.nent = CPUID_ENTRIES
        _ioctl_at(self.fd, "KVM_GET_SUPPORTED_CPUID", table)
        return list(_ENTRY.iter_unpack(ffi.buffer(table.entries, table.nent * _ENTRY.size)))


def _open(device: str) -> int:
    try:
        return os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"KVM: Could not open {device}: {_why(device, error)}") from None


def _why(device: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "this machine offers no KVM (is the module loaded, virtualisation on?)"
    if error.errno == errno.EACCES:
        return f"no permission: {_who_may(device)}"
    return os.strerror(error.errno or 0)


def _who_may(device: str) -> str:
    """What would give a user the right to open it."""
    try:
        found = os.stat(device)
    except OSError as error:
        return os.strerror(error.errno or 0)
    if os.access(device, os.R_OK | os.W_OK):
        return "not for want of a right to its file (a mount with nodev, a security module?)"
    if found.st_gid == _UNKNOWN_GROUP:
        return "its group is none of this user namespace: join it outside of the container"
    if found.st_gid and found.st_mode & _FOR_GROUP == _FOR_GROUP:
        return f"join the group {_group(found.st_gid)!r}"
    return (
        f"its file is root's alone: as root, chgrp kvm {device} && chmod 660 {device}, "
        "and join that group"
    )


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _create_vm(kvm_fd: int) -> int:
    try:
        return _ioctl(kvm_fd, "KVM_CREATE_VM")
    except HostError as error:
        hint = _NO_VM.get(error.errno)
        raise HostError(f"{error} ({hint})", "ioctl") if hint else error from None


# Linux, kvm_create_vm() and hardware_enable_all() in virt/kvm/kvm_main.c.
_NO_VM = {
    errno.EBUSY: "does another hypervisor, such as VirtualBox, have the CPU?",
    errno.ENOMEM: "the kernel has no memory for another virtual machine",
    errno.EINVAL: "does the machine above allow nested virtualisation?",
}


class Vm:
    """A virtual machine with one vCPU.

    `filters_msrs`: the guest has no MSR but those of cpuid.MSRS. Without that it has, beside them,
    what KVM takes for harmless.
    """

    def __init__(self, kvm: Kvm, cleanup: Cleanup) -> None:
        self.kvm = kvm
        self.fd = _create_vm(kvm.fd)
        cleanup.callback(lambda: os.close(self.fd))
        self.filters_msrs = self._filter_msrs()

    def _filter_msrs(self) -> bool:
        """Refuse all MSRs but those of cpuid.MSRS; False: this KVM can't (Linux before 5.10)."""
        if not _ioctl(self.kvm.fd, "KVM_CHECK_EXTENSION", lib.KVM_CAP_X86_MSR_FILTER):
            return False
        request = ffi.new("struct kvm_msr_filter *", {"flags": lib.KVM_MSR_FILTER_DEFAULT_DENY})
        allowed = ffi.new("uint8_t[]", b"\xff" * 8)  # a bit for each MSR of a range
        for index, (first, count, *_) in enumerate(cpuid.MSRS):
            request.ranges[index] = {
                "flags": lib.KVM_MSR_FILTER_READ | lib.KVM_MSR_FILTER_WRITE,
                "nmsrs": count,
                "base": first,
                "bitmap": allowed,
            }
        _ioctl_at(self.fd, "KVM_X86_SET_MSR_FILTER", request)
        return True

    def set_memory(self, address: Any, size: int) -> None:
        """Give the guest `size` bytes of this process's memory at GPA 0."""
        region = ffi.new(
            "struct kvm_userspace_memory_region *",
            {"memory_size": size, "userspace_addr": int(ffi.cast("uintptr_t", address))},
        )
        _ioctl_at(self.fd, "KVM_SET_USER_MEMORY_REGION", region)

    def signal_on_out(self, eventfd: int, port: int) -> None:
        """A 4-byte OUT to this port signals the eventfd, and the guest goes on at once."""
        request = ffi.new(
            "struct kvm_ioeventfd *",
            {"addr": port, "len": 4, "fd": eventfd, "flags": lib.KVM_IOEVENTFD_FLAG_PIO},
        )
        _ioctl_at(self.fd, "KVM_IOEVENTFD", request)


class Vcpu:
    """The CPU of a virtual machine; the interface is cpu.vcpu.Vcpu."""

    pc_name = "rip"

    def __init__(self, vm: Vm, cleanup: Cleanup) -> None:
        self.vm = vm
        self.activity = ffi.NULL  # struct activity
        self.fds = {"vcpu": _ioctl(vm.fd, "KVM_CREATE_VCPU")}
        cleanup.callback(lambda: os.close(self.fd))
        self.shared = self._map_run(_ioctl(vm.kvm.fd, "KVM_GET_VCPU_MMAP_SIZE"), cleanup)
        self._io = self.shared.io
        self._base = ffi.cast("char *", self.shared)
        self.immediate_exit = ffi.addressof(self.shared, "immediate_exit")
        self._engine: Engine | None = None
        self._ring: Ring | None = None
        self._cpuid = cpuid.shown(vm.kvm.supported_cpuid())
        _ioctl_at(self.fd, "KVM_SET_CPUID2", _cpuid2(self._cpuid))
        self.cpu_cycle_freq = self._tsc_khz() * 1000

    @property
    def fd(self) -> int:
        """Its descriptor."""
        return self.fds["vcpu"]

    def _map_run(self, size: int, cleanup: Cleanup) -> Any:
        """Its struct kvm_run."""
        run = lib.kvm_map_run(self.fd, size)
        if not run:
            raise HostError("KVM: cannot map the vCPU", "mmap", ffi.errno)
        cleanup.callback(lambda: lib.kvm_unmap_run(run, size))
        return run

    def use_engine(self, engine: Engine | None, ring: Ring | None) -> None:
        """As cpu.vcpu.Vcpu has it."""
        self._engine, self._ring = engine, ring
        if engine is None:
            return
        engine.cell.vcpu_fd = self.fd
        engine.cell.run = self.shared

    def start(self, filter: bytes) -> None:
        """Start the thread of the network ring, if there is one."""
        if self._ring:
            self._ring.start(filter)

    def end(self) -> None:
        """There is no other process."""

    def _tsc_khz(self) -> int:
        try:
            return _ioctl(self.fd, "KVM_GET_TSC_KHZ")
        except HostError as error:
            if error.errno == errno.EIO:
                raise HostError("KVM: host TSC is unstable, cannot continue") from None
            raise

    def count_in(self, activity: Any) -> None:
        """As cpu.vcpu.Vcpu has it."""
        self.activity = activity
        if self._engine is not None:
            self._engine.cell.activity = activity

    def run(self) -> Exit:
        """Let the guest run until something happens that the engine does not answer."""
        if self._engine is not None:
            return self._run_engine(self._engine)
        word = lib.kvm_run_once(self.fds["vcpu"], self.shared, self.activity)
        if word > 0:
            return IoOut(word >> 32, 4, word & 0xFFFFFFFF)
        return self._exit(-word)

    def _run_engine(self, engine: Engine) -> Exit:
        error = lib.engine_run(engine.cell)
        engine.hand_over()
        if self._ring:
            self._ring.report_error()
        return self._exit(error)

    def _exit(self, error: int) -> Exit:
        """What KVM_RUN came back with; `error` is its errno, 0 when there is an exit."""
        if error:
            return self._not_run(error)
        run = self.shared
        reason = run.exit_reason
        if reason == lib.KVM_EXIT_IO:
            return self._io_exit()
        if reason == lib.KVM_EXIT_MMIO:
            mmio = run.mmio
            size = min(mmio.len, 8)
            value = int.from_bytes(bytes(mmio.data)[:size], "little")
            return Mmio(mmio.phys_addr, size, bool(mmio.is_write), value)
        return self._failure(reason)

    def _not_run(self, error: int) -> Exit:
        if error == errno.EINTR:
            self.shared.immediate_exit = 0
            return Interrupted()
        if error == errno.EAGAIN:  # from Linux 6.14 on, the first KVM_RUN starts a kernel thread
            raise HostError(
                "KVM: cannot start a kernel thread for the guest: too many processes (raise "
                "`ulimit -u` or pids.max of the cgroup)"
            )
        if error == errno.EFAULT:
            return Fault()
        raise HostError("KVM: ioctl (RUN) failed", "ioctl", error)

    def _io_exit(self) -> Exit:
        io = self._io
        size, port = io.size, io.port
        if io.direction != lib.KVM_EXIT_IO_OUT:
            return IoIn(port, size)
        data = self._base + io.data_offset
        if io.count != 1:  # a string instruction: no hypercall has this shape
            return IoOut(port, size * io.count, 0)
        if size == 4:
            return IoOut(port, size, ffi.cast("uint32_t *", data)[0])
        return IoOut(port, size, 0)

    def _failure(self, reason: int) -> Failure:
        if reason == lib.KVM_EXIT_INTERNAL_ERROR:
            suberror = lib.kvm_suberror(self.shared)
            emulation = suberror == lib.KVM_INTERNAL_ERROR_EMULATION
            return Failure(f"KVM: internal error exit: suberror={suberror:#x}", emulation)
        if reason == lib.KVM_EXIT_FAIL_ENTRY:
            why = lib.kvm_entry_failure(self.shared)
            return Failure(f"KVM: entry failure: hw_entry_failure_reason={why:#x}")
        names = {lib.KVM_EXIT_HLT: " (HLT)", lib.KVM_EXIT_SHUTDOWN: " (triple fault)"}
        return Failure(f"KVM: unhandled exit: exit_reason={reason:#x}{names.get(reason, '')}")

    def registers(self) -> dict[str, int]:
        """The general registers; raises HostError."""
        regs = ffi.new("struct kvm_regs *")
        _ioctl_at(self.fd, "KVM_GET_REGS", regs)
        return {name: getattr(regs, name) for name in REGISTERS}

    def instruction_pointer(self) -> int:
        """RIP, for messages; raises HostError."""
        return self.registers()["rip"]

    def get_state(self) -> State:
        """All registers (KVM_RUN, KVM_GET_REGS, _SREGS, _XSAVE, _XCRS, _DEBUGREGS, _MSRS)."""
        from tender.cpu import kvm_state

        kvm_state.finish_io(self)
        return replace(self.core_state(), **kvm_state.get_rest(self))

    def core_state(self) -> State:
        """The general and the system registers, which a core file has; no FPU, no MSRs."""
        sregs = ffi.new("struct kvm_sregs *")
        _ioctl_at(self.fd, "KVM_GET_SREGS", sregs)
        return State(
            self.registers(),
            {name: _segment(getattr(sregs, name)) for name in SEGMENTS},
            {name: getattr(sregs, name) for name in CONTROL},
            Table(sregs.gdt.base, sregs.gdt.limit),
            Table(sregs.idt.base, sregs.idt.limit),
        )

    def set_guest_debug(self, control: int, debugreg: list[int]) -> None:
        """KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_* and DR0 to DR7; raises HostError."""
        argument = ffi.new("struct kvm_guest_debug *", {"control": control})
        argument.arch.debugreg = debugreg
        _ioctl_at(self.fd, "KVM_SET_GUEST_DEBUG", argument)

    def debug_exit(self) -> tuple[int, int, int] | None:
        """Of the last exit, if it was KVM_EXIT_DEBUG: the exception, RIP and DR6."""
        if self.shared.exit_reason != lib.KVM_EXIT_DEBUG:
            return None
        arch = self.shared.debug.arch
        return arch.exception, arch.pc, arch.dr6

    def set_state(self, state: State) -> None:
        """Set all registers; raises HostError where KVM refuses them."""
        # What the state does not name (the APIC base, pending interrupts) stays as it is.
        sregs = ffi.new("struct kvm_sregs *")
        _ioctl_at(self.fd, "KVM_GET_SREGS", sregs)
        for name in CONTROL:
            setattr(sregs, name, state.control[name])
        if state.xcr0 > 1 and not self.cpuid(0xD, 0)[0]:  # a CPU without XSAVE
            sregs.cr4 &= ~CR4_OSXSAVE
        for name in SEGMENTS:
            for field in _SEGMENT_FIELDS:
                setattr(getattr(sregs, name), field, getattr(state.segments[name], field))
        for name, table in (("gdt", state.gdt), ("idt", state.idt)):
            getattr(sregs, name).base, getattr(sregs, name).limit = table.base, table.limit
        _ioctl_at(self.fd, "KVM_SET_SREGS", sregs)
        _ioctl_at(self.fd, "KVM_SET_REGS", ffi.new("struct kvm_regs *", state.registers))
        if state.fpu is not None or state.msrs:
            from tender.cpu import kvm_state  # not by a guest that starts

            kvm_state.set_rest(self, state)

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """As cpu.vcpu.Vcpu has it."""
        found = (entry[3:] for entry in self._cpuid if entry[:2] == (leaf, subleaf))
        return next(found, (0, 0, 0, 0))

    def counter(self) -> int:
        """As cpu.vcpu.Vcpu has it (KVM_GET_MSRS)."""
        from tender.cpu import kvm_state

        return kvm_state.get_tsc(self)

    def set_counter(self, value: int, hz: int) -> int:
        """As cpu.vcpu.Vcpu has it (KVM_SET_TSC_KHZ, KVM_SET_DEVICE_ATTR, KVM_SET_MSRS)."""
        from tender.cpu import kvm_state

        is_scaled = not is_near(hz, self.cpu_cycle_freq)
        if is_scaled:
            self._scale_tsc(hz)
        kvm_state.set_tsc(self, value)
        reads = kvm_state.get_tsc(self)
        if is_scaled and not 0 <= reads - value < hz:
            raise other_frequency("KVM", self.cpu_cycle_freq, hz)
        return reads

    def _scale_tsc(self, hz: int) -> None:
        own = self.cpu_cycle_freq
        try:
            if _ioctl(self.vm.kvm.fd, "KVM_CHECK_EXTENSION", lib.KVM_CAP_TSC_CONTROL):
                _ioctl(self.fd, "KVM_SET_TSC_KHZ", hz // 1000)
                return
        except HostError:  # it may have changed what KVM_GET_TSC_KHZ says all the same
            _ioctl(self.fd, "KVM_SET_TSC_KHZ", own // 1000)
        raise other_frequency("KVM", own, hz)

    def ioctl(self, name: str, argument: Any) -> None:
        """An ioctl of the vCPU with an address; raises HostError."""
        _ioctl_at(self.fd, name, argument)


def _cpuid2(entries: list[Entry]) -> Any:
    """A struct kvm_cpuid2."""
    table = ffi.new("struct kvm_cpuid2 *", {"entries": len(entries)})
    table.nent = len(entries)
    packed = b"".join(_ENTRY.pack(*entry) for entry in entries)
    ffi.memmove(table.entries, packed, len(packed))
    return table


def _segment(segment: Any) -> Segment:
    return Segment(*(getattr(segment, field) for field in _SEGMENT_FIELDS))
