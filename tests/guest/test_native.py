"""The native CPU: the guest's process, its end, and what it may do."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender._native import lib
from tender.cpu import native
from tests.waiting import PATIENCE_S, children, wait_until_asleep

from .conftest import PTENDER, Build

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "-")
ROOT = os.geteuid() == 0
HEADER = Path(native.__file__).with_name("native.h")


@pytest.fixture
def looping(guest: Build) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A guest in an endless loop: its tender, and the pid of the guest's process."""
    words = [str(PTENDER), "--cpu=native", "--mem=8", str(guest("loop"))]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as tender:
        try:
            assert tender.stdout
            while "looping" not in tender.stdout.readline():
                assert tender.poll() is None
            children = Path(f"/proc/{tender.pid}/task/{tender.pid}/children").read_text().split()
            assert len(children) == 1
            yield tender, int(children[0])
        finally:
            tender.kill()


@pytest.mark.skipif(not ROOT, reason="only root can look at the process")
def test_the_guests_process_has_its_memory_and_nothing_else(
    looping: tuple[subprocess.Popen[str], int],
) -> None:
    _, pid = looping
    assert os.listdir(f"/proc/{pid}/fd") == []
    maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    names = {line[-2] if line[-1] == "(deleted)" else line[-1] for line in maps}
    assert names - {"[vsyscall]"} == {
        "/memfd:guest-memory",
        "/memfd:ptender-guest",
        "/memfd:ptender-native",
    }
    assert not any("w" in line[1] and "x" in line[1] for line in maps)
    status = Path(f"/proc/{pid}/status").read_text()
    assert "Seccomp:\t2" in status
    assert "NoNewPrivs:\t1" in status


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_it_starts_where_the_kernel_seals_what_it_maps(guest: Build, tmp_path: Path) -> None:
    """Linux 6.15 may seal the vDSO: what it is among can't be unmapped at once."""
    log = tmp_path / "log"
    words = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=munmap,execveat"]
    words += ["-e", "inject=munmap:error=EPERM:when=3"]  # of each process
    done = subprocess.run([*words, PTENDER, "--cpu=native", "--mem=8", guest("exit")])
    assert done.returncode == 0
    calls = log.read_text().partition("execveat(")[2]
    assert re.search(r"munmap\(0x500010010000, .* \(INJECTED\)", calls)


def test_it_ends_with_its_tender(looping: tuple[subprocess.Popen[str], int]) -> None:
    tender, pid = looping
    pidfd = os.pidfd_open(pid)
    try:
        tender.kill()
        assert select.select([pidfd], [], [], PATIENCE_S)[0]
    finally:
        os.close(pidfd)


@pytest.mark.skipif(not ROOT, reason="its user is another")
def test_its_end_is_the_guests(looping: tuple[subprocess.Popen[str], int]) -> None:
    tender, pid = looping
    os.kill(pid, signal.SIGKILL)
    assert tender.wait(PATIENCE_S) == 1
    assert tender.stderr
    assert "native CPU: the guest's process was killed by signal 9" in tender.stderr.read()


@pytest.mark.skipif(not ROOT, reason="its user is another")
def test_its_end_is_the_guests_that_waits(guest: Build) -> None:
    """In POLL, where the tender does not wait for the process."""
    words = [str(PTENDER), "--cpu=native", "--mem=8", str(guest("sleep")), "3600000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as tender:
        assert tender.stdout
        assert tender.stderr
        tender.stdout.readline()  # what the guest says of itself comes after its start
        (child,) = children(tender.pid)
        wait_until_asleep(tender.pid)
        os.kill(child, signal.SIGKILL)
        assert tender.wait(PATIENCE_S) == 1
        said = tender.stderr.read()
    assert said == b"ptender: native CPU: the guest's process was killed by signal 9\n"


def test_a_signal_ends_a_loop(looping: tuple[subprocess.Popen[str], int]) -> None:
    tender, pid = looping
    pidfd = os.pidfd_open(pid)
    tender.send_signal(signal.SIGTERM)
    assert tender.wait(PATIENCE_S) == 1
    try:
        assert select.select([pidfd], [], [], PATIENCE_S)[0]
    finally:
        os.close(pidfd)


GUEST = """
#include <solo5.h>
#include "{header}"
static void attack(void) {{ {body} }}
int solo5_app_main(const struct solo5_start_info *info)
{{ (void)info; solo5_console_write("attack\\n", 7); attack(); return 0; }}
"""
SHARED = "unsigned char *at = (unsigned char *)0x500010000000;"
ATTACKS = {
    "syscall": '__asm__ volatile("mov $39, %eax; syscall");',
    "int80": '__asm__ volatile("mov $20, %eax; int $0x80");',
    "write": '__asm__ volatile("mov $1, %eax; mov $2, %edi; mov $0x100000, %esi; mov $9, %edx;'
    ' syscall");',
    "vsyscall": "((void (*)(void))0xffffffffff600000)();",
    "hlt": '__asm__ volatile("hlt");',
    "ring-3 code of 32 bits": '__asm__ volatile("push $0x23; lea 1f(%rip), %rax; push %rax;'
    ' lretq; 1: out %eax, (%dx)");',
    "timeout": '__asm__ volatile("mov $202, %eax; movabs $0x500010000000, %rdi; xor %esi, %esi;'
    ' mov $1, %edx; mov %rsp, %r10; syscall");',
    "unmap": '__asm__ volatile("mov $0x500000001000, %rdi; mov $0x1000, %esi; mov $11, %eax;'
    ' syscall");',
    "no stack": '__asm__ volatile("movabs $0xdeadbeef000, %rsp; push %rax");',
    "stack on the shared region": '__asm__ volatile("movabs $0x500010000010, %rsp; ud2");',
    "forged return": '__asm__ volatile("mov $15, %eax; syscall");',
    "forged region": SHARED
    + " for (unsigned i = 0; i < 0x10000; i++) at[i] = 0xff;"
    + ' __asm__ volatile("ud2");',
    "forged frame": SHARED
    + " for (unsigned round = 0; round < 256; round++)"
    + " for (unsigned i = 24; i < 0x10000; i++) at[i] = (unsigned char)(i * round);"
    + ' __asm__ volatile("ud2");',
    "forged turn": SHARED + " *(volatile unsigned *)at = 1; for (;;) ;",
    "no turn": SHARED + " *(volatile unsigned *)at = 2; for (;;) ;",
    "one call for ever": "solo5_clock_wall();"
    + SHARED
    + " unsigned long *rip = (unsigned long *)(((struct native_shared *)at)->context + 168);"
    + " unsigned long call = *rip - 1;"
    + " for (;;) { *rip = call; *(volatile unsigned *)at = 1; }",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_the_guest_only(tmp_path: Path, name: str) -> None:
    source, image = tmp_path / "attack.c", tmp_path / "attack.hvt"
    source.write_text(GUEST.format(body=ATTACKS[name], header=HEADER))
    subprocess.run([PTENDER, "build", source, "-o", image], check=True)
    with subprocess.Popen(
        [PTENDER, "--cpu=native", "--mem=8", image],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as tender:
        assert tender.stdout
        assert "attack\n" in iter(tender.stdout.readline, "")
        try:
            _, stderr = tender.communicate(timeout=3)
        except subprocess.TimeoutExpired:  # a guest that hangs itself can be stopped
            tender.send_signal(signal.SIGTERM)
            _, stderr = tender.communicate(timeout=PATIENCE_S)
    assert tender.returncode in (1, 255), stderr
    assert "internal error" not in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("how", ["calls", "jump", "return", "stack", "shared"])
def test_a_guest_that_attacks_its_process(guest: Build, how: str) -> None:
    """What becomes of it is in guest-bindings/tests/attack.c; more seeds and counts by hand."""
    for seed in (1, 2, 3):
        done = subprocess.run(
            [PTENDER, "--cpu=native", "--mem=8", guest("attack"), how, str(seed), "100"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=100,
        )
        assert re.fullmatch(r"(ptender: [^\n]+\n)?", done.stderr), (seed, done)
        assert done.returncode == (1 if done.stderr else 0), (seed, done)
        assert ("SUCCESS" in done.stdout) == (done.returncode == 0), (seed, done)
        assert how not in ("calls", "shared") or done.returncode == 0, (seed, done)


@pytest.mark.skipif(not ROOT, reason="only root can look at the process")
def test_nothing_of_the_host_is_readable_beside_the_guests_memory(
    looping: tuple[subprocess.Popen[str], int],
) -> None:
    """The program is the one in the package; the rest has no address and no number of it."""
    tender, pid = looping
    with open(f"/proc/{pid}/mem", "rb") as memory:
        memory.seek(lib.NATIVE_PROGRAM)
        program = Path(native.PROGRAM).read_bytes()
        assert memory.read(len(program)) == program
        memory.seek(lib.NATIVE_SHARED)
        shared = memory.read(lib.NATIVE_SHARED_SIZE)
    assert str(tender.pid).encode() not in shared
    assert tender.pid not in memoryview(shared).cast("I") or tender.pid < 10_000
    for (value,) in struct.iter_unpack("<Q", shared):
        assert value >> 40 not in (0x55, 0x56, 0x7E, 0x7F), hex(value)
