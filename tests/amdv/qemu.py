"""The machine: QEMU's command line, its process, and the pipes that lead out of it.

The rule here: nothing outlives `run_machine`. What QEMU reads or writes is a memfd or a pipe, never
a file, and the kernel kills QEMU when we are killed.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import shutil
import signal
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.amdv.initramfs import Missing

QEMU = "qemu-system-x86_64"
# nokaslr, mitigations and notests save time. tsc=reliable: with two CPUs the kernel finds their
# emulated TSCs out of step and stops trusting the clock that a guest is given.
KERNEL_WORDS = (
    "console=ttyS0 quiet panic=-1 tsc=reliable nowatchdog no_timer_check"
    " nokaslr mitigations=off cryptomgr.notests random.trust_cpu=on"
)
# Without AVX, because glibc would use it and QEMU emulates it slowly: Python is a quarter faster
# without. No Solo5 guest can use it (CR4.OSXSAVE is 0). Without SMAP: QEMU
# (7.2) reads the stack of an IRET in ring 3 as the kernel would, which SMAP forbids; the machine's
# kernel then kills the process, as it does the native CPU's. check=off: no list of what is missing.
CPU = "EPYC,+svm,+npt,-smap,-avx,-avx2,-f16c,-fma,check=off"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Machine:
    """What there is to choose about one; `share` is the folder that is not read-only."""

    kernel: bytes
    initramfs: bytes
    memory: str
    cpus: int
    share: Path | None


@dataclass(frozen=True)
class End:
    """How it went: no status if the machine failed, and then the console says why."""

    status: int | None
    console: bytes


def run_machine(machine: Machine, *, show_console: bool) -> End:
    """Run it to its end, copying the command's output to ours."""
    if shutil.which(QEMU) is None:
        raise Missing(f"no {QEMU}: install qemu-system-x86")
    ports = Ports(Port(copy_to=1), Port(copy_to=2), Port(), Port(2 if show_console else None))
    with ExitStack() as stack:
        kernel_fd = open_memfd(stack, machine.kernel)
        initramfs_fd = open_memfd(stack, machine.initramfs)
        ports.open(stack)
        arguments = qemu_arguments(machine, kernel_fd, initramfs_fd, ports)
        qemu = start_qemu(stack, arguments, [kernel_fd, initramfs_fd], ports)
        ports.pump(qemu)
    status = ports.status.received
    return End(int(status) if status else None, bytes(ports.console.received))


def open_memfd(stack: ExitStack, data: bytes) -> int:
    fd = os.memfd_create("amdv")
    stack.callback(os.close, fd)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return fd


# -- the process -----------------------------------------------------------------------------------


def qemu_arguments(machine: Machine, kernel_fd: int, initramfs_fd: int, ports: Ports) -> list[str]:
    words = ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-nic", "none"]
    words += ["-machine", "q35,hpet=off,smm=off,usb=off,vmport=off", "-cpu", CPU]
    words += ["-accel", "tcg,thread=multi,tb-size=1024"]
    words += ["-smp", str(machine.cpus), "-m", machine.memory, "-append", KERNEL_WORDS]
    words += ["-kernel", f"/dev/fd/{kernel_fd}", "-initrd", f"/dev/fd/{initramfs_fd}"]
    words += ["-serial", f"file:/dev/fd/{ports.console.write_fd}"]
    words += ["-device", "virtio-serial-pci"]
    for number, port in enumerate((ports.stdout, ports.stderr, ports.status), 1):
        words += ["-chardev", f"file,id=port{number},path=/dev/fd/{port.write_fd}"]
        words += ["-device", f"virtserialport,nr={number},chardev=port{number}"]
    words += shared_folder("root", Path("/"), "on")
    if machine.share:
        words += shared_folder("share", machine.share, "off")
    return [QEMU, *words]


def shared_folder(tag: str, path: Path, readonly: str) -> list[str]:
    escaped = str(path).replace(",", ",,")
    return [
        "-virtfs",
        f"local,mount_tag={tag},path={escaped},readonly={readonly}"
        ",security_model=none,multidevs=remap",
    ]


def start_qemu(
    stack: ExitStack, arguments: list[str], input_fds: list[int], ports: Ports
) -> subprocess.Popen[bytes]:
    """QEMU, gone when the stack unwinds or we die; a Ctrl-C at the terminal is for us alone."""
    prctl = ctypes.CDLL(None).prctl
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=ports.console.write_fd,
        stderr=ports.console.write_fd,
        pass_fds=[*input_fds, *(port.write_fd for port in ports.all)],
        start_new_session=True,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


# -- the ways out ----------------------------------------------------------------------------------


@dataclass
class Port:
    """A pipe out of the machine: its bytes are copied to a descriptor of ours, or kept."""

    copy_to: int | None = None
    received: bytearray = field(default_factory=bytearray)
    read_fd: int = -1
    write_fd: int = -1

    def take(self, data: bytes) -> None:
        if self.copy_to is None:
            self.received += data
            return
        while data:
            data = data[os.write(self.copy_to, data) :]


@dataclass
class Ports:
    """The command's output and status, and the console, on which QEMU itself speaks as well."""

    stdout: Port
    stderr: Port
    status: Port
    console: Port

    @property
    def all(self) -> list[Port]:
        return [self.stdout, self.stderr, self.status, self.console]

    def open(self, stack: ExitStack) -> None:
        for port in self.all:
            port.read_fd, port.write_fd = os.pipe()
            stack.callback(os.close, port.read_fd)

    def pump(self, qemu: subprocess.Popen[bytes]) -> None:
        """Copy until all have ended: QEMU did, or had to because the command's status is here."""
        for port in self.all:
            os.close(port.write_fd)  # QEMU has its own; ours would hide its end
        with selectors.DefaultSelector() as selector:
            for port in self.all:
                selector.register(port.read_fd, selectors.EVENT_READ, port)
            while selector.get_map():
                for key, _ in selector.select():
                    self._read(selector, key)
                if self.status.received.endswith(b"\n"):
                    qemu.kill()

    @staticmethod
    def _read(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        data = os.read(key.fd, 1 << 16)
        key.data.take(data)
        if not data:
            selector.unregister(key.fd)
