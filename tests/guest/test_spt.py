"""Guests for Solo5's spt target: the tender's process becomes the guest."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import BINDINGS, PTENDER, Build, Run, builder, shared_folder
from tests.needs import needs
from tests.waiting import children, wait_until_blocked

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="spt guests run on x86_64")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
ABORT = 255
EFAULT, EINVAL, ENOSPC = 14, 22, 28
DISK_FD = 17  # the first device
PAGE_FD = 11  # the counters page


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return builder(shared_folder(tmp_path_factory, "spt"), "--target=spt")


@pytest.fixture
def ptender() -> Run:
    """Run the command to its end: `ptender("--mem=4", path).stdout`."""

    def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [str(PTENDER), "--mem=4", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)

    return run


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 16))
    return path


# What works as for hvt.


def test_a_guest_runs_and_ends(ptender: Run, guest: Build) -> None:
    done = ptender(guest("hello"), "some", "words")
    assert done.returncode == 0, done.stderr
    assert "spt ABI 2, 4 MiB" in done.stdout
    assert "My command line: some words\n" in done.stdout
    assert done.stdout.endswith("solo5_exit(0) called\n")
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["globals", "tls", "ssp", "time", "sleep", "fp", "memory", "clib"])
def test_what_guests_check_themselves(ptender: Run, guest: Build, name: str) -> None:
    done = ptender(guest(name))
    if name == "ssp":
        assert "ABORT: Stack corruption detected" in done.stdout
        assert done.returncode == ABORT
    else:
        assert "SUCCESS" in done.stdout, done.stdout
        assert done.returncode == 0


@pytest.mark.parametrize("status", [0, 1, 7, 254])
def test_the_guests_status(ptender: Run, guest: Build, status: int) -> None:
    assert ptender(guest("exit"), status).returncode == status


def test_an_abort(ptender: Run, guest: Build) -> None:
    done = ptender(guest("abort"))
    assert done.returncode == ABORT
    assert "ABORT: solo5_abort() called" in done.stdout


def test_memory_is_not_rounded(ptender: Run, guest: Build) -> None:
    assert "spt ABI 2, 3 MiB" in ptender("--mem=3", guest("hello")).stdout


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_disk(ptender: Run, guest: Build, disk: Path, sector_size: int) -> None:
    done = ptender("--block", f"{disk},sector-size={sector_size}", guest("block"))
    assert "SUCCESS" in done.stdout, done.stdout + done.stderr
    assert disk.read_bytes() != bytes(1 << 16)
    assert disk.stat().st_size == 1 << 16


def test_a_write_to_a_read_only_disk_is_a_result_code(
    ptender: Run, guest: Build, disk: Path
) -> None:
    before = disk.read_bytes()
    done = ptender("--block", f"{disk},ro", guest("readonlyblock"))
    assert "SUCCESS" in done.stdout, done.stdout + done.stderr
    assert disk.read_bytes() == before


def test_a_descriptor_that_could_write_is_read_only_as_well(
    ptender: Run, guest: Build, disk: Path
) -> None:
    with open(disk, "r+b") as file:
        words = ("--block", f"@{file.fileno()},ro", guest("readonlyblock"))
        done = ptender(*words, pass_fds=[file.fileno()])
    assert "SUCCESS" in done.stdout, done.stdout + done.stderr
    assert disk.read_bytes() == bytes(1 << 16)


def test_a_disk_is_locked_while_its_guest_runs(ptender: Run, guest: Build, disk: Path) -> None:
    with running(guest("hold"), "--block", str(disk)) as process:
        done = ptender("--block", disk, guest("block"))
        assert done.returncode == 1
        assert f"locked by process {process.pid}" in done.stderr
    assert "SUCCESS" in ptender("--block", disk, guest("block")).stdout


def test_frames(guest: Build) -> None:
    """Two guests at the ends of a seqpacket socket pair hear each other."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    addresses = ["10.0.0.2", "10.0.0.3"]
    processes = []
    for end, own, peer in zip(ends, addresses, reversed(addresses), strict=True):
        words = [str(PTENDER), "--net", f"@{end.fileno()}", str(guest("talk"))]
        words += [f"--ipv4={own}/24", f"--peer={peer}", "--count=5"]
        processes.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, text=True, pass_fds=[end.fileno()])
        )
    for end in ends:
        end.close()
    for process in processes:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output
        assert output.count("heard ") == 5, output


@needs_root
def test_a_tap(ptender: Run, guest: Build) -> None:
    script = (
        "ip link set lo up; ip tuntap add spt0 mode tap; ip addr add 10.0.0.1/24 dev spt0; "
        'ip link set spt0 up; "$@" > out & until ping -c 1 -W 1 10.0.0.2; do :; done; '
        "for n in 1 2 3 4 5; do ping -c 1 -W 60 10.0.0.2 || break; done; kill $!"
    )
    words = [PTENDER, "--net", "spt0", guest("ping")]
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script, "sh", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=guest("ping").parent,
    )
    assert done.stdout.count("1 received, 0% packet loss") == 6, done.stdout + done.stderr


def test_an_overlay_keeps_what_is_written_in_memory(ptender: Run, guest: Build, disk: Path) -> None:
    for sector_size in (512, 4096):
        done = ptender("--block", f"{disk},overlay,sector-size={sector_size}", guest("block"))
        assert "SUCCESS" in done.stdout, done.stdout + done.stderr
    assert disk.read_bytes() == bytes(1 << 16)


def test_an_overlay_is_as_large_as_it_may_be(ptender: Run, guest: Build, disk: Path) -> None:
    """The file in memory has room for 16 blocks, whatever the guest calls."""
    write = [f"18,{0x1001},b,512,{block * 512}" for block in range(17)]
    beyond = f"18,{80 + 1},b,512,{8192 - 512}"
    done = ptender(
        "--block", f"{disk},overlay=8K", guest("syscall"), *write, write[3], beyond, "39"
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("result")]
    assert results == ["result 512"] * 16 + [f"result {-ENOSPC}"] + ["result 512"] * 2
    past = f"18,{80 + 1},b,512,8192"
    done = ptender("--block", f"{disk},overlay=8K", guest("syscall"), past)
    assert done.returncode == -signal.SIGSYS


@pytest.mark.parametrize(
    "call", ["1024,0", "512,1", "512,65536", "512,-512", "0,0"], ids=lambda call: call
)
def test_a_call_of_an_overlay_that_makes_no_sense(
    ptender: Run, guest: Build, disk: Path, call: str
) -> None:
    done = ptender("--block", f"{disk},overlay", guest("syscall"), f"17,{0x1001},b,{call}")
    assert f"result {-EINVAL}" in done.stdout, done.stderr
    done = ptender("--block", f"{disk},overlay", guest("syscall"), f"17,{0x1002},b,512,0")
    assert done.returncode == -signal.SIGSYS


# Core files and debuggers.


def with_debug_information(folder: Path, name: str) -> Path:
    source, output = BINDINGS / "tests" / f"{name}.c", folder / f"{name}.spt"
    manifest = source.with_suffix(".json")
    devices = ["--manifest", manifest] if manifest.exists() else []
    words = ["build", "--target=spt", "-g", source, "-o", output, *devices]
    subprocess.run([str(PTENDER), *map(str, words)], check=True)
    return output


def gdb(*words: object) -> str:
    if not shutil.which("gdb"):
        pytest.skip("needs gdb")
    command = ["gdb", "-nx", "-batch", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100).stdout


def test_a_core_file_of_an_abort(ptender: Run, tmp_path: Path) -> None:
    kernel = with_debug_information(tmp_path, "dumpcore")
    done = ptender("--dumpcore", tmp_path, kernel)
    assert done.returncode == ABORT, done.stderr
    (core,) = tmp_path.glob("core.solo5-spt.*")
    assert done.stderr == f"ptender: dumpcore: dumped guest core to: {core.name}\n"
    assert core.stat().st_size == 4096 + (4 << 20)
    assert core.stat().st_blocks * 512 < 1 << 20, "sparse"
    shown = gdb("-ex", "backtrace", kernel, core)
    assert "solo5_abort" in shown
    assert "solo5_app_main" in shown


def test_a_core_file_of_an_exception(ptender: Run, guest: Build, tmp_path: Path) -> None:
    done = ptender("--dumpcore", tmp_path, guest("exception"), "gp")
    assert done.returncode == -signal.SIGSEGV
    (core,) = tmp_path.glob("core.solo5-spt.*")
    rip = done.stderr.partition("rip=")[2].split()[0]
    shown = gdb("-ex", "print/x $pc", guest("exception"), core)
    assert f" = {rip}\n" in shown


def test_no_core_file_of_a_guest_that_ends_well(ptender: Run, guest: Build, tmp_path: Path) -> None:
    for status in (0, 1, 254):
        assert ptender("--dumpcore", tmp_path, guest("exit"), status).returncode == status
    assert not list(tmp_path.iterdir())


@needs_root
def test_gdb_attaches_to_a_guest(disk: Path, tmp_path: Path) -> None:
    kernel = with_debug_information(tmp_path, "hold")
    with running(kernel, "--block", str(disk)) as process:
        shown = gdb("-p", process.pid, kernel, "-ex", "backtrace", "-ex", "print info->heap_start")
        assert "solo5_app_main" in shown
        assert "hvt_start" in shown


# How a guest dies.


@pytest.mark.parametrize(
    ("word", "signo", "message"),
    [
        ("ud2", signal.SIGILL, "invalid opcode (SIGILL), rip=0x10"),
        ("div", signal.SIGFPE, "divide error (SIGFPE), rip=0x10"),
        ("int3", signal.SIGTRAP, "breakpoint (SIGTRAP), rip=0x10"),
        ("gp", signal.SIGSEGV, "general protection fault (SIGSEGV), rip=0x10"),
        ("stack", signal.SIGSEGV, "page fault (SIGSEGV), write at address=0x7f8, rip=0x10"),
    ],
)
def test_a_cpu_exception(ptender: Run, guest: Build, word: str, signo: int, message: str) -> None:
    done = ptender(guest("exception"), word)
    assert done.returncode == -signo  # 128 + signo for a shell, as of the original
    assert done.stderr.startswith(f"ptender: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zeropage", "page fault (SIGSEGV), "),
        ("notls", "page fault (SIGSEGV), "),
        ("textwrite", "page fault (SIGSEGV), write at address=0x10"),
        ("overflow", " fault (SIGSEGV), "),
    ],
)
def test_what_the_memory_forbids(ptender: Run, guest: Build, name: str, message: str) -> None:
    done = ptender(guest(name))
    assert done.returncode == -signal.SIGSEGV, done.stdout
    assert message in done.stderr
    assert "rip=0x10" in done.stderr


FORBIDDEN = {
    "getpid": "39",
    "open": "2,b",
    "mmap": "9,0,4096,3,34",
    "mprotect": f"10,{0x100000},4096,7",
    "mremap": "25",
    "execve": "59,b",
    "fork": "57",
    "kill": "62,1,0",
    "socket": "41,1,1",
    "ptrace": "101",
    "rt_sigreturn": "15",
    "read the console": "0,1,b,1",
    "write to the timer": "1,4,b,8",
    "read the disk without an offset": f"0,{DISK_FD},b,512",
    "write to the disk without an offset": f"1,{DISK_FD},b,512",
    "two blocks": f"17,{DISK_FD},b,1024,0",
    "half a block": f"18,{DISK_FD},b,256,0",
    "behind the disk": f"18,{DISK_FD},b,512,{1 << 16}",
    "across its end": f"17,{DISK_FD},b,512,{(1 << 16) - 511}",
    "a negative offset": f"18,{DISK_FD},b,512,-512",
    "another descriptor": "17,18,b,512,0",
    "ARCH_GET_FS": f"158,{0x1003},b",
    "ARCH_SET_GS": f"158,{0x1001},b",
    "a process's clock": "228,2,b",
    "a timer that is relative": "286,4,0,b",
    "a signal mask": "281,3,b,1,0,b",
    "a longer message": "1,2,b,129",
    "the counters page": f"18,{PAGE_FD},b,8,0",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_forbidden_call(ptender: Run, guest: Build, disk: Path, what: str) -> None:
    call = FORBIDDEN[what]
    done = ptender("--block", disk, guest("syscall"), call)
    assert done.returncode == -signal.SIGSYS, done.stdout
    number = call.partition(",")[0]
    assert done.stderr.startswith(
        f"ptender: the guest made a system call that is not allowed: {number}, rip=0x10"
    )
    assert done.stderr.count("\n") == 1


def test_calls_that_are_allowed(ptender: Run, guest: Build, disk: Path) -> None:
    calls = [
        f"17,{DISK_FD},b,512,0",
        f"18,{DISK_FD},b,512,{(1 << 16) - 512}",
        "228,1,b",
        f"17,{DISK_FD},0,512,0",  # the kernel checks the address
        "281,3,b,65,0",
    ]
    done = ptender("--block", disk, guest("syscall"), *calls)
    assert [line for line in done.stdout.splitlines() if line.startswith("result")] == [
        "result 512", "result 512", "result 0", f"result {-EFAULT}", "result 0",
    ]  # fmt: skip
    assert done.returncode == 0, done.stderr


# What there is beside the guest.


class running:
    """A guest of the command that prints "held" and does not end."""

    def __init__(self, kernel: Path, *words: str, before: Sequence[str] = ()) -> None:
        command = [*before, str(PTENDER), "--mem=4", *words, str(kernel)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)

    def __enter__(self) -> subprocess.Popen[str]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        while line and not line.startswith("held"):
            line = self._process.stdout.readline()
        assert line, self._process.communicate()
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@needs_root
def test_nothing_of_the_tender_is_mapped(guest: Build, disk: Path) -> None:
    with running(guest("hold"), "--block", str(disk)) as process:
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        parts = [line.split() for line in lines if "[vsyscall]" not in line]
        ranges = [tuple(int(each, 16) for each in part[0].split("-")) for part in parts]
        assert ranges[0][0] == 0x10000
        inside = [each for each in ranges if each[1] <= 4 << 20]
        assert inside[-1][1] == 4 << 20
        beside = ranges[len(inside) :]
        assert sum(end - start for start, end in beside) <= 128 << 10, lines
        assert beside[-1][1] - beside[0][0] <= 128 << 10, "one region"
        assert all(len(part) == 5 for part in parts), "no file, stack, heap or vDSO"
        assert not any("w" in part[1] and "x" in part[1] for part in parts)
        assert Path(f"/proc/{process.pid}/environ").read_bytes() == b""
        assert Path(f"/proc/{process.pid}/comm").read_text().startswith("ptender:hold")


@needs_root
def test_what_it_holds_and_may(guest: Build, disk: Path) -> None:
    with running(guest("hold"), "--block", str(disk)) as process:
        proc = Path(f"/proc/{process.pid}")
        names = {int(fd.name): os.readlink(fd) for fd in (proc / "fd").iterdir()}
        assert sorted(names) == [1, 2, 3, 4, PAGE_FD, DISK_FD]
        assert names[3] == "anon_inode:[eventpoll]"
        assert names[4] == "anon_inode:[timerfd]"
        status = dict(
            line.split(":\t")
            for line in (proc / "status").read_text().splitlines()
            if ":\t" in line
        )
        assert status["Seccomp"] == "2"
        assert status["NoNewPrivs"] == "1"
        assert status["CapEff"].strip("0") == status["CapBnd"].strip("0") == ""
        assert status["Uid"].split()[0] != "0"
        assert status["Threads"] == "1"
        assert os.listdir(proc / "root") == []
        limits = (proc / "limits").read_text()
        assert "Max core file size        0 " in limits


def test_no_output_is_lost_in_a_pipe_that_does_not_block(guest: Build) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen([str(PTENDER), str(guest("flood"))], stdout=writer) as process:
        try:
            wait_until_blocked(process.pid, reader)
            assert not os.get_blocking(writer), "others still have it as it was"
            with open(reader) as file:
                lines = [file.readline() for _ in range(50000)]
        finally:
            process.kill()
            os.close(writer)
    assert lines[2:] == [f"flood {number}\n" for number in range(len(lines) - 2)]


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_by_a_signal(guest: Build, disk: Path, signo: int) -> None:
    with running(guest("hold"), "--block", str(disk)) as process:
        process.send_signal(signo)
        process.communicate(timeout=100)
        assert process.returncode == -signo


def test_it_ends_by_sigterm_as_pid_1(guest: Build, disk: Path) -> None:
    """The kernel does not end PID 1 of a container by a signal that it does not handle."""
    needs("unshare", "--user", "--map-root-user", "--pid", "--fork")
    words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    with running(guest("hold"), "--block", str(disk), before=words) as process:
        (child,) = children(process.pid)
        os.kill(child, signal.SIGTERM)
        _, messages = process.communicate(timeout=100)
        assert process.returncode == 128 + signal.SIGTERM
        assert "Exiting on signal 15\n" in messages


def test_the_policy_is_what_the_guest_runs_behind(ptender: Run, guest: Build, disk: Path) -> None:
    words = ("policy", "--json", "--block", str(disk), str(guest("block")))
    done = subprocess.run([str(PTENDER), *words], capture_output=True, text=True, check=True)
    shown = json.loads(done.stdout)
    assert shown["cpu"] == "spt"
    assert [each["number"] for each in shown["descriptors"]] == [1, 2, 3, 4, PAGE_FD, DISK_FD]
    assert {each["call"] for each in shown["calls"]} == {
        "pread64", "pwrite64", "epoll_pwait", "timerfd_settime", "clock_gettime", "write",
        "arch_prctl", "exit_group",
    }  # fmt: skip


def test_inspect(guest: Build) -> None:
    words = [str(PTENDER), "inspect", "--json", str(guest("block"))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert (facts["target"], facts["abi_version"], facts["machine"]) == ("spt", 2, "x86_64")


# What it can't have, and its other name.


@pytest.mark.parametrize(
    "words",
    [
        ["--trace=-"],
        ["--console-limit=1K"],
        ["--clock=virtual"],
        ["--cpu=soft"],
        ["--cpu=kvm"],
        ["--instructions=5"],
        ["--engine=python"],
        ["--sandbox=off"],
    ],
    ids=" ".join,
)
def test_what_is_refused(ptender: Run, guest: Build, words: list[str]) -> None:
    done = ptender(*words, guest("hello"))
    assert done.returncode == 2
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert words[0].partition("=")[0] in line
    assert "spt guest" in line


@pytest.fixture
def named(tmp_path: Path) -> str:
    link = tmp_path / "solo5-spt"
    link.symlink_to(PTENDER)
    return str(link)


def test_by_the_originals_name(named: str, guest: Build) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([named, *words], capture_output=True, text=True, timeout=100)

    assert run("--mem=2", str(guest("exit")), "3").returncode == 3
    version = run("--version")
    assert version.stdout == ""
    assert version.stderr.startswith("solo5-spt tender, version ")
    assert "ABI version 2" in version.stderr
    assert run("--help").returncode == 1
    assert run("--nonsense").returncode == 1
    done = run(str(guest("exception")))
    assert done.stderr.startswith("solo5-spt: invalid opcode (SIGILL), rip=")


def test_each_name_takes_its_target_only(
    named: str, guest: Build, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hvt = tmp_path / "solo5-hvt"
    hvt.symlink_to(PTENDER)
    for_hvt = builder(shared_folder(tmp_path_factory, "guests"))("hello")
    for name, image in ((named, for_hvt), (str(hvt), guest("hello"))):
        done = subprocess.run([name, str(image)], capture_output=True, text=True, timeout=100)
        assert done.returncode == 1
        target = Path(name).name
        assert f"Executable is not for the {target} target" in done.stderr
