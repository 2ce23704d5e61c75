"""The same guests, built for aarch64, on the software CPU of any machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from tender import Descriptor, Guest
from tender.cpu import soft
from tests.guest.conftest import PTENDER, Build, Run, builder, shared_folder
from tests.guest.test_exec_heap import disk

ABORT = 255

pytestmark = [
    pytest.mark.skipif(not soft.installed(), reason="the Unicorn emulator is not installed"),
    pytest.mark.skipif(
        not (shutil.which("aarch64-linux-gnu-gcc") or shutil.which("clang")),
        reason="no compiler for aarch64",
    ),
]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return builder(shared_folder(tmp_path_factory, "aarch64"), "--target=aarch64")


@pytest.fixture
def ptender() -> Run:
    """The command, with --cpu=soft: `ptender(path).stdout`."""

    def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [str(PTENDER), "--mem=8", "--cpu=soft", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)  # type: ignore[call-overload, no-any-return]

    return run


@pytest.fixture
def make(tmp_path: Path) -> Build:
    """Build a guest whose main function has this body."""

    def make(body: str) -> Path:
        source, output = tmp_path / "guest.c", tmp_path / "guest.hvt"
        source.write_text(
            "#include <abi.h>\n#include <solo5.h>\n#include <stdio.h>\n"
            "int solo5_app_main(const struct solo5_start_info *info) {\n"
            f"{body}\nreturn info == 0; }}\n"
        )
        words = ["build", "--target=aarch64", str(source), "-o", str(output)]
        subprocess.run([PTENDER, *words], check=True)
        return output

    return make


@pytest.mark.parametrize("name", ["globals", "tls", "time", "clib", "memory", "fp", "endofmemory"])
def test_a_guest_succeeds(ptender: Run, guest: Build, name: str) -> None:
    done = ptender(guest(name))
    assert done.returncode == 0, done
    assert "SUCCESS" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("mem", [2, 1024, 4096])
def test_all_of_memory_is_there(ptender: Run, guest: Build, mem: int) -> None:
    done = ptender(f"--mem={mem}", guest("memory"))
    assert done.returncode == 0, done
    assert f"mem_size {mem << 20} " in done.stdout


def test_the_machine_is_found_in_the_image(guest: Build) -> None:
    done = subprocess.run([PTENDER, guest("hello"), "a", "b"], capture_output=True, text=True)
    assert "a b" in done.stdout
    if os.uname().machine == "x86_64":
        assert re.fullmatch(r"ptender: KVM: [^\n]+ for aarch64[^\n]+\n", done.stderr)
        done = subprocess.run(
            [PTENDER, "--cpu=kvm", guest("hello")], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert re.fullmatch(r"ptender: KVM: [^\n]+, or use --cpu=soft\n", done.stderr)


def test_command_line_and_status(ptender: Run, guest: Build) -> None:
    assert "<a b c  ä>" in ptender(guest("cmdline"), "a", "b c", "", "ä").stdout
    for status in (0, 7, 254):
        assert ptender(guest("exit"), status).returncode == status


@pytest.mark.parametrize(
    ("words", "report"),
    [
        ("exception udf", r"undefined instruction: .* esr=0x2000000 elr=0x10"),
        ("exception brk", r"breakpoint instruction: .* esr=0xf2000001 elr=0x10"),
        ("exception svc", r"supervisor call: .* esr=0x56000001 elr=0x10"),
        ("exception jump", r"instruction abort: .* esr=0x86000007 elr=0x0 far=0x0"),
        ("exception stack", r"data abort: .* esr=0x96000047 elr=0x10.* far=0x7f0\n.* sp=0x800"),
        ("zeropage", r"data abort: .* esr=0x96000007 elr=0x10[0-9a-f]+ far=0x0"),
        ("notls", r"data abort: .* esr=0x96000047 elr=0x10[0-9a-f]+ far=0x10"),
        ("ssp", "Stack corruption detected"),
        ("abort", "solo5_abort"),
    ],
)  # fmt: skip
def test_a_broken_guest_aborts(ptender: Run, guest: Build, words: str, report: str) -> None:
    name, *args = words.split()
    done = ptender(guest(name), *args)
    assert (done.returncode, done.stderr) == (ABORT, ""), done
    assert re.search(report, done.stdout), done
    assert "ABORT" in done.stdout


def test_registers_survive_an_exception(ptender: Run, make: Build) -> None:
    """The handler of this guest goes on behind the instruction, with every register as it was."""
    body = """
    static uint64_t x[2];
    __asm__ volatile(
        "adr x0, 1f\\n msr vbar_el1, x0\\n isb\\n mov x1, #7\\n cmp x1, #7\\n udf #0\\n"
        "cset x2, eq\\n stp x1, x2, [%0]\\n b 2f\\n .balign 2048\\n 1: .skip 512\\n"
        "mrs x0, elr_el1\\n add x0, x0, #4\\n msr elr_el1, x0\\n eret\\n 2:"
        : : "r"(x) : "x0", "x1", "x2", "memory", "cc");
    printf("%lu %lu\\n", x[0], x[1]);"""
    assert "7 1\n" in ptender(make(body)).stdout


# Misbehaviour: the guest ends with status 1, and one line says what it did.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("badport", "Invalid guest mmio access: gpa=0x100000400, size=4"),
        ("badport 4294967300", "Invalid guest mmio access: gpa=0x100000004, size=4"),
        ("badport 4294967424", "Invalid guest mmio access: gpa=0x100000080, size=4"),
        ("badsize", "Invalid guest mmio access: gpa=0x100000010, size=1"),
        ("badsize 2", "Invalid guest mmio access: gpa=0x100000010, size=2"),
        ("inport", "Invalid guest mmio access: gpa=0x100000008, size=4, reading"),
        ("badnumber", "Invalid guest hypercall: num=9"),
        ("badnumber 0", "Invalid guest hypercall: num=0"),
        ("badgpa", "Invalid guest access: gpa=0x800000"),
        ("badgpa partly", "Invalid guest access: gpa=0x7ffffc"),
        *((f"badgpa high {number}", "Invalid guest access") for number in range(1, 9)),
        ("overflow", "Invalid guest access"),
        ("overflow high", "Invalid guest access: gpa=0xfffffffffffffff8"),
        ("textblock text", "Invalid guest access: protected"),
        ("textwrite", "host/guest translation fault: pc=0x1"),
        ("hlt", "HLT"),
        ("triplefault", "the exception's handler can't be executed, pc=0x200"),
        ("triplefault top", "the exception's handler can't be executed, pc="),
    ],
)
def test_misbehaviour_ends_the_guest(
    ptender: Run, guest: Build, tmp_path: Path, words: str, message: str
) -> None:
    name, *args = words.split()
    devices, fds = _devices(tmp_path) if name == "textblock" else ([], ())
    done = ptender(*devices, "--", guest(name), *args, pass_fds=fds)
    _close(fds)
    assert done.returncode == 1, done
    assert message in done.stderr
    assert re.fullmatch(r"ptender: [^\n]+\n", done.stderr), done
    assert "FAILURE" not in done.stdout


STORE = (
    '__asm__ volatile("{}" : : "r"((uint64_t)HVT_HYPERCALL_MMIO_BASE + 64), "r"(0l) : "memory");'
)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (STORE.format("str %1, [%0]"), "Invalid guest mmio access: gpa=0x100000040, size=8"),
        (STORE.format("mov x9, %0\\n str %w1, [x9], #8"), "not a store that a hypervisor can"),
        (STORE.format("stp %w1, %w1, [%0]"), "not a store that a hypervisor can"),
    ],
    ids=["size 8", "writeback", "pair"],
)
def test_what_no_guest_does(ptender: Run, make: Build, body: str, message: str) -> None:
    done = ptender(make(body))
    assert done.returncode == 1, done
    assert message in done.stderr


def test_code_in_the_heap(ptender: Run, guest: Build, tmp_path: Path) -> None:
    block = f"--block={disk(tmp_path, 'aarch64')}"
    done = ptender(block, guest("execheap"))
    assert done.returncode == 255, done
    trap = r"calling (0x\w+)\nSolo5: trap instruction abort: .* elr=\1 far=\1\n"
    assert re.search(trap, done.stdout), done
    done = ptender(block, "--x-exec-heap", guest("execheap"))
    assert (done.returncode, "SUCCESS" in done.stdout) == (0, True), done


@pytest.mark.parametrize("name", ["badhandle", "outofrange"])
def test_wrong_calls_get_a_result_code(
    ptender: Run, guest: Build, tmp_path: Path, name: str
) -> None:
    devices, fds = _devices(tmp_path)
    done = ptender(*devices[: 1 if name == "outofrange" else 2], "--", guest(name), pass_fds=fds)
    _close(fds)
    assert done.returncode == 0, done
    assert "SUCCESS" in done.stdout


def _devices(tmp_path: Path) -> tuple[list[str], tuple[int, ...]]:
    """Options for a disk and a port whose other end has sent a frame; the port's descriptor."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(bytes(60))
    ours.close()
    fd = theirs.detach()
    return [f"--block:storage={image}", f"--net:service=@{fd}"], (fd,)


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


# Devices, time, and the end.


def test_a_disk_is_written_and_read(ptender: Run, guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 * 4096))
    done = ptender(f"--block={image}", guest("block"))
    assert done.returncode == 0, done
    assert "SUCCESS" in done.stdout
    assert image.read_bytes() != bytes(64 * 4096)


def test_a_guest_answers_ping(guest: Build) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60)
    null = os.open("/dev/null", os.O_WRONLY)
    host, peer = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28, 0, 0, 64, 1, 0, host, peer)
    with Guest(
        guest("ping"), mem_mib=8, net={"service": Descriptor(theirs.fileno())}, console=null,
        warn=lambda _: None,
    ):  # fmt: skip
        guest_mac = ours.recv(2000)[6:12]  # its ARP announcement
        sum_ = _checksum(ip)
        echo = struct.pack("!BBHHH", 8, 0, 0, 0x1234, 1)
        echo = echo[:2] + struct.pack("!H", _checksum(echo)) + echo[4:]
        frame = guest_mac + b"\x02\0\0\0\0\x01" + b"\x08\0"
        for _ in range(3):
            ours.send((frame + ip[:10] + struct.pack("!H", sum_) + ip[12:] + echo).ljust(60, b"\0"))
            answer = ours.recv(2000)
            while answer[12:14] != b"\x08\0":
                answer = ours.recv(2000)
            assert answer[34:35] == b"\0"  # an echo reply
            assert answer[38:42] == echo[4:8]
    for each in (ours, theirs):
        each.close()
    os.close(null)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    return ~(total % 0xFFFF) & 0xFFFF


def test_virtual_time(ptender: Run, guest: Build) -> None:
    first, second = (ptender("--clock=virtual", guest("sleep"), 5_000_000) for _ in range(2))
    assert first.returncode == 0, first
    assert "slept 5000" in first.stdout
    assert first.stdout == second.stdout


def test_instructions_have_an_end(ptender: Run, guest: Build) -> None:
    done = ptender("--instructions=1000000", guest("loop"))
    assert done.returncode == 1
    assert "--instructions" in done.stderr


def test_a_signal_ends_a_loop(guest: Build) -> None:
    words = [str(PTENDER), "--cpu=soft", "--mem=8", str(guest("loop"))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        while b"looping" not in process.stdout.readline():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 1


@pytest.mark.parametrize("words", [[], ["trap"]])
def test_a_core_has_registers_and_memory(
    ptender: Run, guest: Build, tmp_path: Path, words: list[str]
) -> None:
    done = ptender(f"--dumpcore={tmp_path}", guest("dumpcore"), *words)
    assert done.returncode == ABORT, done
    (core,) = tmp_path.iterdir()
    data = core.read_bytes()
    machine, registers_at = struct.unpack_from("<H", data, 18), 64 + 2 * 56 + 20 + 112
    registers = struct.unpack_from("<34Q", data, registers_at)
    assert machine == (183,)
    marker = re.search(r"core_marker (0x[0-9a-f]+)", done.stdout)
    assert marker
    assert struct.unpack_from("<2Q", data, 4096 + int(marker[1], 16))[1] == 0xC0DEFACE00000002
    if words:
        assert (registers[0], registers[1], registers[28]) == (0x11110000, 0x22220000, 0x33330000)
        trap = re.search(r"elr=(0x[0-9a-f]+)", done.stdout)
        assert trap
        assert registers[32] == int(trap[1], 16)


def test_a_guest_is_saved_and_goes_on(guest: Build, tmp_path: Path) -> None:
    file = tmp_path / "saved"
    words = [str(PTENDER), "--mem=8", "--cpu=soft", f"--snapshots={tmp_path}", str(guest("count"))]
    with subprocess.Popen([*words, "100000", "10"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while not process.stdout.readline().startswith("count 2 "):
            assert process.poll() is None
        command = [str(PTENDER), "snapshot", str(process.pid), str(file), "--stop"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rest = [line for line in process.stdout if line.startswith("count")]
    last = int(rest[-1].split()[1]) if rest else 2
    command = [str(PTENDER), "--cpu=soft", f"--restore={file}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for number in range(last + 1, last + 4):
            assert process.stdout.readline().startswith(f"count {number} ")
        process.terminate()
    for cpu in ("kvm", "native"):
        command = [str(PTENDER), f"--cpu={cpu}", "--clone", f"--restore={file}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "this guest is for aarch64" in done.stderr
