"""What a vCPU of KVM has beside its general and system registers: FPU, debug registers, MSRs, TSC.

Source: Linux, Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import errno

from tender._native import ffi, lib
from tender.boot.x86_64 import EXTENDED, MSR_TSC, MSRS, X87_AND_SSE, DebugRegisters, Fpu, State
from tender.cpu import xsave
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Vcpu(Protocol):
        """What is needed of kvm.Vcpu."""

        fds: dict[str, int]
        shared: Any  # struct kvm_run

        def ioctl(self, name: str, argument: Any) -> None: ...
        def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]: ...


XCR0 = 0  # its number
XSAVE_SIZE = 4096  # bytes, without the parts that Linux gives to those who ask


def finish_io(vcpu: Vcpu) -> None:
    """End the instruction of the last exit, which KVM does in the next KVM_RUN.

    The guest's next run is Interrupted at once: a stop request that came meanwhile is not lost.
    """
    if vcpu.shared.exit_reason != lib.KVM_EXIT_IO:
        return
    vcpu.shared.immediate_exit = 1
    if lib.kvm_ioctl(vcpu.fds["vcpu"], lib.KVM_RUN, 0) < 0 and ffi.errno != errno.EINTR:
        raise HostError("KVM: ioctl (RUN) failed", "ioctl", ffi.errno)


def get_fpu(vcpu: Vcpu) -> Fpu:
    """x87, SSE, AVX and AVX-512; raises HostError where the guest uses more."""
    area = ffi.new("char[]", XSAVE_SIZE)
    vcpu.ioctl("KVM_GET_XSAVE", area)
    data = bytes(ffi.buffer(area))
    in_use = xsave.parts_in_use(data)
    if in_use & ~(X87_AND_SSE | sum(1 << part for part in EXTENDED)):
        raise HostError(f"KVM: the guest uses CPU state that is not saved (XSTATE_BV={in_use:#x})")
    return xsave.fpu(data)


def set_fpu(vcpu: Vcpu, fpu: Fpu) -> None:
    """Raises HostError where this CPU lacks a part, or the guest has not enabled it."""
    area = bytearray(XSAVE_SIZE)
    xsave.write(fpu, area, "KVM")
    vcpu.ioctl("KVM_SET_XSAVE", ffi.from_buffer(area))


def get_xcr0(vcpu: Vcpu) -> int:
    """1, which is x87 alone, where the CPU has no XSAVE."""
    xcrs = ffi.new("struct kvm_xcrs *")
    try:
        vcpu.ioctl("KVM_GET_XCRS", xcrs)
    except HostError as error:
        if error.errno != errno.EINVAL:
            raise
    return int(xcrs.xcrs[0].value) if xcrs.nr_xcrs else 1


def supported_xcr0(vcpu: Vcpu) -> int:
    """What XCR0 can have; 0 where the CPU has no XSAVE (SDM volume 2, CPUID leaf 0Dh)."""
    low, _, _, high = vcpu.cpuid(0xD, 0)
    return low | high << 32


def get_rest(vcpu: Vcpu) -> dict[str, Any]:
    """The fields of a State that KVM_GET_REGS and KVM_GET_SREGS do not give."""
    debug = ffi.new("struct kvm_debugregs *")
    vcpu.ioctl("KVM_GET_DEBUGREGS", debug)
    return {
        "fpu": get_fpu(vcpu),
        "msrs": {
            name: value
            for name, index in MSRS.items()
            if (value := _get_msr(vcpu, index)) is not None
        },
        "xcr0": get_xcr0(vcpu),
        "debug": DebugRegisters(tuple(debug.db), debug.dr6, debug.dr7),
    }


def set_rest(vcpu: Vcpu, state: State) -> None:
    """Set these, after the system registers; raises HostError where KVM refuses them."""
    xcr0 = state.xcr0 & supported_xcr0(vcpu)
    if xcr0 > 1:
        xcrs = ffi.new("struct kvm_xcrs *", {"nr_xcrs": 1, "xcrs": [(XCR0, xcr0)]})
        vcpu.ioctl("KVM_SET_XCRS", xcrs)
    if state.fpu is not None:
        if state.xcr0 and any(not xcr0 >> part & 1 for part in state.fpu.extended):
            raise HostError("KVM: the guest uses AVX or AVX-512, which this machine has not")
        set_fpu(vcpu, state.fpu)
    if state.debug is not None:
        debug = state.debug
        vcpu.ioctl(
            "KVM_SET_DEBUGREGS",
            ffi.new("struct kvm_debugregs *", (debug.breakpoints, debug.dr6, debug.dr7)),
        )
    for name, value in state.msrs.items():
        if not _set_msr(vcpu, MSRS[name], value) and value:
            raise HostError(f"KVM: it refuses {value:#x} in the guest's MSR {name.upper()}")


def _get_msr(vcpu: Vcpu, index: int) -> int | None:
    """None where the host's CPU has no such MSR."""
    msrs = ffi.new("struct kvm_msrs *", {"entries": [{"index": index}]})
    msrs.nmsrs = 1
    if lib.kvm_ioctl_at(vcpu.fds["vcpu"], lib.KVM_GET_MSRS, msrs) != 1:
        return None
    return int(msrs.entries[0].data)


def _set_msr(vcpu: Vcpu, index: int, value: int) -> bool:
    msrs = ffi.new("struct kvm_msrs *", {"entries": [{"index": index, "data": value}]})
    msrs.nmsrs = 1
    return lib.kvm_ioctl_at(vcpu.fds["vcpu"], lib.KVM_SET_MSRS, msrs) == 1


# The TSC.


def get_tsc(vcpu: Vcpu) -> int:
    """What the guest would read."""
    value = _get_msr(vcpu, MSR_TSC)
    if value is None:
        raise HostError("KVM: ioctl (GET_MSRS) failed", "ioctl", ffi.errno)
    return value


def set_tsc(vcpu: Vcpu, value: int) -> None:
    """Try to: some KVMs report success and change nothing.

    By its offset where there is one (Linux 5.16): what is written to the MSR, KVM may take for an
    attempt to put two TSCs in step, and bend.
    """
    offset = ffi.new("uint64_t *")
    attribute = ffi.new(
        "struct kvm_device_attr *",
        {
            "group": lib.KVM_VCPU_TSC_CTRL,
            "attr": lib.KVM_VCPU_TSC_OFFSET,
            "addr": int(ffi.cast("uintptr_t", offset)),
        },
    )
    try:
        vcpu.ioctl("KVM_GET_DEVICE_ATTR", attribute)
        offset[0] = (offset[0] + value - get_tsc(vcpu)) % (1 << 64)
        vcpu.ioctl("KVM_SET_DEVICE_ATTR", attribute)
    except HostError:
        _set_msr(vcpu, MSR_TSC, value)
