"""What a guest can rely on: each test is one guest, and what it prints and ends with."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tender import open_image
from tests.guest.conftest import BINDINGS, Build, Run

ABORT = 255


def skip_where_not_emulated(done: subprocess.CompletedProcess[str], what: str) -> None:
    """Some KVMs emulate what the guest executes; what they can't, the tender must tell."""
    if "internal error exit" in done.stderr:
        assert done.returncode == 1
        assert re.search(r"suberror=0x1, rip=0x1[0-9a-f]+, instruction=[0-9a-f ]+", done.stderr)
        pytest.skip(f"this KVM emulates the guest and has no {what}")


def guests() -> list[str]:
    sources = sorted([*BINDINGS.glob("samples/*.c"), *BINDINGS.glob("tests/*.c")])
    return [path.stem for path in sources if "int solo5_app_main" in path.read_text()]


@pytest.mark.parametrize("name", guests())
def test_every_guest_builds(guest: Build, name: str) -> None:
    open_image(guest(name))


@pytest.mark.parametrize("name", ["globals", "tls", "time", "clib", "memory"])
def test_a_guest_succeeds(ptender: Run, guest: Build, name: str) -> None:
    done = ptender("--mem=8", guest(name))
    assert done.returncode == 0, done
    assert "SUCCESS" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("mem", [2, 16, 4096])
def test_all_of_memory_is_there(ptender: Run, guest: Build, mem: int) -> None:
    done = ptender(f"--mem={mem}", guest("memory"))
    if "gpa=0xfee00000" in done.stderr:
        # solo5-hvt ends the same way there; hardware shows RAM to a VM without an APIC.
        pytest.skip("this KVM keeps a local APIC at 0xfee00000, in the middle of the memory")
    assert done.returncode == 0, done
    assert f"mem_size {mem << 20} " in done.stdout


def test_floating_point(ptender: Run, guest: Build) -> None:
    done = ptender("--mem=8", guest("fp"))
    skip_where_not_emulated(done, "SSE arithmetic")
    assert done.returncode == 0, done
    assert "SUCCESS" in done.stdout


def test_the_command_line_arrives(ptender: Run, guest: Build) -> None:
    for words in (["a", "b c", "", "--net=x", "ä"], []):
        done = ptender("--mem=8", guest("cmdline"), *words)
        assert f"<{' '.join(words)}>" in done.stdout
    longest = "x" * 8191
    assert f"<{longest}>" in ptender("--mem=8", guest("cmdline"), longest).stdout
    done = ptender("--mem=8", guest("cmdline"), longest + "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert "8192 bytes, longer than the maximum 8191" in done.stderr


def test_a_quiet_guest_prints_only_its_own(ptender: Run, guest: Build) -> None:
    done = ptender("--mem=8", "--", guest("quiet"), "--solo5:quiet", "x")
    assert "Solo5:" not in done.stdout
    assert "<x>\nSUCCESS" in done.stdout


@pytest.mark.parametrize("status", [0, 1, 7, 60, 254])
def test_the_status_is_the_guests(ptender: Run, guest: Build, status: int) -> None:
    assert ptender("--mem=8", guest("exit"), status).returncode == status


def test_an_abort_is_255(ptender: Run, guest: Build) -> None:
    done = ptender("--mem=8", guest("abort"))
    assert done.returncode == ABORT
    assert "ABORT" in done.stdout


@pytest.mark.parametrize("how", ["ud2", "div", "int3", "gp", "stack"])
def test_an_exception_is_reported(ptender: Run, guest: Build, how: str) -> None:
    done = ptender("--mem=8", guest("exception"), how)
    if how == "int3":
        skip_where_not_emulated(done, how)
    assert done.returncode == ABORT, done
    assert re.search(r"rip=0x1[0-9a-f]+", done.stdout), done
    assert "ABORT" in done.stdout


@pytest.mark.parametrize("name", ["zeropage", "notls", "ssp"])
def test_a_broken_guest_aborts(ptender: Run, guest: Build, name: str) -> None:
    done = ptender("--mem=8", guest(name))
    assert done.returncode == ABORT, done
    assert "ABORT" in done.stdout
    assert "FAILURE" not in done.stdout


def test_code_cannot_be_written(ptender: Run, guest: Build) -> None:
    done = ptender("--mem=8", guest("textwrite"))
    assert done.returncode == 1
    assert re.search(r"^ptender: host/guest translation fault: rip=0x1", done.stderr), done
    assert "FAILURE" not in done.stdout


def test_a_sleep_takes_its_time(ptender: Run, guest: Build) -> None:
    start = time.monotonic()
    done = ptender("--mem=8", guest("sleep"), 300)
    assert done.returncode == 0, done
    assert time.monotonic() - start >= 0.3


def test_a_disk_is_written_and_read(ptender: Run, guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 * 4096))
    for words in (
        [f"--block:storage={image}"],
        [f"--block:storage={image}", "--block-sector-size:storage=4096"],
        ["--block", image],
        [f"--disk={image}"],
        [f"--block=storage={image},sector-size=4096"],
    ):
        done = ptender("--mem=8", *words, "--", guest("block"))
        assert done.returncode == 0, done
        assert "SUCCESS" in done.stdout
    assert image.stat().st_size == 64 * 4096
    assert image.read_bytes() != bytes(64 * 4096)


def test_a_disk_keeps_what_a_guest_wrote(ptender: Run, guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8 * 512))
    first = ptender("--mem=8", "--block", image, guest("disk"), "remember", "me")
    assert first.returncode == 0, first
    second = ptender("--mem=8", "--block", image, guest("disk"))
    assert "remember me" in second.stdout


def test_a_read_only_disk_stays_as_it_is(ptender: Run, guest: Build, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"r" * 4096)
    image.chmod(0o400)
    done = ptender("--mem=8", "--block", f"{image},ro", guest("readonlyblock"))
    assert done.returncode == 0, done
    assert image.read_bytes() == b"r" * 4096


def test_63_devices(ptender: Run, guest: Build, tmp_path: Path) -> None:
    words = []
    for number in range(63):
        image = tmp_path / f"{number}.img"
        image.write_bytes(bytes(4096))
        words.append(f"--block:storage{number}={image}")
    done = ptender("--mem=8", *words, "--", guest("maxdevices"))
    assert done.returncode == 0, done


# Misbehaviour: the guest ends with status 1, and one line says what it did.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("badport", "Invalid guest port access: port=0x400"),
        ("badport 1536", "Invalid guest port access: port=0x600"),
        ("badsize", "Invalid guest port access: port=0x502, size=1"),
        ("badsize 2", "Invalid guest port access: port=0x502, size=2"),
        ("inport", "Invalid guest port access: port=0x501"),
        ("badnumber", "Invalid guest hypercall: num=9"),
        ("badnumber 0", "Invalid guest hypercall: num=0"),
        ("badnumber 15", "Invalid guest hypercall: num=15"),
        ("badgpa", "Invalid guest access: gpa=0x800000"),
        ("badgpa high", "Invalid guest access: gpa=0xfffffff8"),
        ("badgpa partly", "Invalid guest access: gpa=0x7ffffc"),
        *((f"badgpa high {number}", "Invalid guest access") for number in range(1, 9)),
        ("overflow", "Invalid guest access"),
        ("overflow high", "Invalid guest access: gpa=0xfffffffffffffff8"),
        ("endofmemory beyond", "Invalid guest access: gpa=0x7fff"),
        ("textblock text", "Invalid guest access: protected"),
        ("textblock rodata", "Invalid guest access: protected"),
        ("hlt", "HLT"),
        ("triplefault", "triple fault"),
        ("triplefault top", "triple fault"),
    ],
)
def test_misbehaviour_ends_the_guest(
    ptender: Run, guest: Build, tmp_path: Path, words: str, message: str
) -> None:
    name, *args = words.split()
    devices = []
    if name == "textblock":
        devices = _textblock_devices(tmp_path)
    done = ptender("--mem=8", *devices, "--", guest(name), *args, pass_fds=_fds(devices))
    assert done.returncode == 1, done
    assert message in done.stderr
    assert re.fullmatch(r"ptender: [^\n]+\n", done.stderr), done
    assert "FAILURE" not in done.stdout


_KEPT: list[object] = []  # the other ends of networks: a device without one is disconnected


def _textblock_devices(tmp_path: Path) -> list[str]:
    import os
    import socket

    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(bytes(60))
    _KEPT.append(ours)
    os.set_inheritable(theirs.fileno(), True)
    return [f"--block:storage={image}", f"--net:service=@{theirs.detach()}"]


def _fds(words: list[str]) -> tuple[int, ...]:
    return tuple(int(word.partition("@")[2]) for word in words if "@" in word)


@pytest.mark.parametrize("how", ["blockread", "netread"])
def test_device_data_does_not_reach_code(
    ptender: Run, guest: Build, tmp_path: Path, how: str
) -> None:
    devices = _textblock_devices(tmp_path)
    done = ptender("--mem=8", *devices, "--", guest("textblock"), how, pass_fds=_fds(devices))
    assert done.returncode == 1, done
    assert "Invalid guest access: protected" in done.stderr


def test_a_buffer_may_end_where_memory_ends(ptender: Run, guest: Build) -> None:
    done = ptender("--mem=8", guest("endofmemory"))
    assert done.returncode == 0, done
    assert "the last bytes." in done.stdout


@pytest.mark.parametrize("name", ["badhandle", "outofrange"])
def test_wrong_calls_get_a_result_code(
    ptender: Run, guest: Build, tmp_path: Path, name: str
) -> None:
    devices = _textblock_devices(tmp_path)
    if name == "outofrange":
        devices = devices[:1]
    done = ptender("--mem=8", *devices, "--", guest(name), pass_fds=_fds(devices))
    assert done.returncode == 0, done
    assert "SUCCESS" in done.stdout
