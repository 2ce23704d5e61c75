"""What a tender that its guest has taken over can do with the vCPU it still has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit import elves

needs_kvm = pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no access to /dev/kvm"
)
# Instead of the tender's loop: `vcpu` is confined by then. Offsets are those of struct kvm_run
# (linux/kvm.h): kvm_valid_regs, kvm_dirty_regs, and s.regs.regs, which begins with RAX.
LOOP = """
import os, sys
from tender import loop
from tender._native import ffi, lib
from tender.cli import main

def taken_over(vcpu, *_):
    page = ffi.buffer(ffi.cast("char *", vcpu.shared), 4096)
    first = vcpu.run()
    page[304:448] = bytes(ffi.buffer(ffi.addressof(vcpu_registers(vcpu)[0])))
    page[304:312] = (0xdead).to_bytes(8, "little")
    page[296:304] = (1).to_bytes(8, "little")
    second = vcpu.run()
    os.write(2, f"{first.value:#x} {second.value:#x}".encode())
    lib.kvm_ioctl_at(vcpu.fd, lib.KVM_SET_REGS, vcpu_registers(vcpu))

def vcpu_registers(vcpu):
    registers = ffi.new("struct kvm_regs *")
    assert not lib.kvm_ioctl_at(vcpu.fd, lib.KVM_GET_REGS, registers)
    return registers

loop.run = taken_over
main.main(["ptender", *sys.argv[1:]])
"""


@needs_kvm
def test_it_sets_registers_without_the_call_for_it(tmp_path: Path) -> None:
    """By kvm_dirty_regs in the page that it shares with KVM, as docs/threat-model.md says."""
    image = tmp_path / "out.hvt"
    # mov $0x500, %edx; mov $0xbeef, %eax; 1: out %eax, (%dx); jmp 1b
    image.write_bytes(elves.image(code=bytes.fromhex("ba00050000 b8efbe0000 ef ebfd")))
    words = ["--cpu=kvm", "--engine=python", "--mem=8", str(image)]
    done = subprocess.run([sys.executable, "-c", LOOP, *words], capture_output=True, text=True)
    assert done.stderr == "0xbeef 0xdead"
    assert done.returncode == -signal.SIGSYS, "KVM_SET_REGS itself is not allowed"
