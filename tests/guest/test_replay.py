"""`--record` and `--replay`: a run of the software CPU once more, without its devices."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tender.cpu import soft
from tests.guest.conftest import PTENDER, Build, builder, shared_folder
from tests.guest.inner import run
from tests.waiting import wait_until_asleep

pytest_plugins = "pytester"
pytestmark = pytest.mark.skipif(not soft.installed(), reason="the emulator is not installed")

Done = subprocess.CompletedProcess[str]


def ptender(*words: object, **options: Any) -> Done:
    """Run the command, as `auto` finds its CPU."""
    environment = {name: value for name, value in os.environ.items() if name != "PTENDER_CPU"}
    return subprocess.run(
        [PTENDER, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        **options,
    )


@pytest.fixture
def rec(tmp_path: Path) -> Path:
    return tmp_path / "run.rec"


@pytest.fixture
def recorded(guest: Build, rec: Path) -> Callable[..., Done]:
    """Record a run of a guest."""

    def record(name: str, *words: object, options: tuple[object, ...] = (), **others: Any) -> Done:
        return ptender("--mem=8", *options, "--record", rec, guest(name), *words, **others)

    return record


@pytest.mark.parametrize("clock", [(), ("--clock=virtual",)], ids=["real", "virtual"])
@pytest.mark.parametrize(
    "words",
    ["hello one two", "time", "sleep 300", "fp", "tls", "exit 7", "abort", "exception", "badgpa",
     "badport", "triplefault", "instructions numbers"],
)  # fmt: skip
def test_the_same_console_and_end(
    recorded: Callable[..., Done], rec: Path, clock: tuple[str, ...], words: str
) -> None:
    first = recorded(*words.split(), options=clock)
    again = ptender("--replay", rec)
    assert first.stdout
    assert (again.returncode, again.stdout, again.stderr) == (
        first.returncode, first.stdout, first.stderr,
    )  # fmt: skip
    assert rec.stat().st_mode & 0o777 == 0o600


def test_frames_and_disks_are_in_the_record(
    recorded: Callable[..., Done], rec: Path, tmp_path: Path
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(bytes(range(60)))
    fd = theirs.fileno()
    first = recorded("frames", options=(f"--net=@{fd}",), pass_fds=[fd])
    ours.close()
    theirs.close()
    assert (first.returncode, ptender("--replay", rec).stdout) == (0, first.stdout)

    image, trace = tmp_path / "disk.img", tmp_path / "trace"
    image.write_bytes(b"of the disk".ljust(64 * 512, b"."))
    first = recorded("disk", "hello", options=(f"--block={image}",))
    image.unlink()
    again = ptender("--replay", rec, "--trace", trace)
    assert (again.returncode, again.stdout) == (first.returncode, first.stdout)
    assert b"of the disk".hex() in trace.read_text()


def test_random_numbers_are_the_recorded_ones(recorded: Callable[..., Done], rec: Path) -> None:
    first, second = (recorded("instructions", "numbers").stdout for _ in range(2))
    assert first != second
    assert ptender("--replay", rec).stdout == second


def test_a_run_that_was_stopped(guest: Build, rec: Path) -> None:
    words = [str(PTENDER), "--mem=8", f"--record={rec}", str(guest("sleep")), "3600000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tender:
        assert tender.stdout
        tender.stdout.readline()  # what the guest says of itself comes after its start
        wait_until_asleep(tender.pid)
        tender.send_signal(signal.SIGTERM)
        tender.wait(60)
    again = ptender("--replay", rec)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert again.stderr.startswith("ptender: the record ends before hypercall ")
    assert again.stderr.endswith(", POLL: stopped, status 1\n")


def test_the_first_difference_is_named(recorded: Callable[..., Done], rec: Path) -> None:
    recorded("hello", "one")
    rec.write_bytes(rec.read_bytes().replace(b'["one"]', b'["two"]'))
    done = ptender("--replay", rec)
    assert done.returncode == 1
    assert done.stderr.startswith("ptender: the replay differs from its record at hypercall ")
    assert done.stderr.endswith(": what it passes out is not what was recorded\n")


def test_a_debugger_sees_the_same_run(recorded: Callable[..., Done], rec: Path) -> None:
    if not shutil.which("gdb"):
        pytest.skip("gdb is not installed")
    first = recorded("time")
    stub = f"{PTENDER} --replay {rec} --gdb=-"
    commands = [f"target remote | {stub}", "stepi", "stepi", "info registers rip", "continue"]
    words = [word for command in commands for word in ("-ex", command)]
    done = subprocess.run(["gdb", "-nx", "-batch", *words], capture_output=True, text=True)
    assert "exited normally" in done.stdout, done
    assert first.stdout in done.stderr


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") or shutil.which("clang")),
    reason="no compiler for aarch64",
)
def test_aarch64(tmp_path_factory: pytest.TempPathFactory, rec: Path) -> None:
    build = builder(shared_folder(tmp_path_factory, "guests-aarch64"), "--target", "aarch64")
    first = ptender("--mem=8", "--record", rec, build("hello"), "far away")
    again = ptender("--replay", rec)
    assert "far away" in first.stdout
    assert (again.returncode, again.stdout) == (first.returncode, first.stdout)


@pytest.mark.parametrize("fixture", ["switch", "virtual_switch"])
def test_a_failed_test_leaves_its_record(
    pytester: pytest.Pytester, images: Path, no_other_plugins: None, fixture: str
) -> None:
    source = f"""
        def test_fails(unikernel, {fixture}):
            guest = unikernel("ping.hvt", net={{"service": {fixture}.port()}}, mem_mib=8)
            host = {fixture}.host("10.0.0.1/24")
            assert host.ping("10.0.0.2", count=3).received == 2
    """
    result = run(pytester, source, "--ptender-record", "--ptender-artifacts=left")
    result.assert_outcomes(failed=1)
    (record,) = (images / "left").glob("*/guest0-ping.rec")
    result.stdout.fnmatch_lines([f"once more: ptender --replay {record} --gdb"])
    again = ptender("--replay", record)
    assert again.stdout == record.with_suffix(".console.txt").read_text()
    assert again.stderr.endswith(": stopped, status 1\n")


def test_a_full_disk(guest: Build, rec: Path) -> None:
    """Before the guest runs it is an error; afterwards it ends the record and not the guest."""
    done = ptender("--mem=8", "--record=/dev/full", guest("exit"), 5)
    assert (done.returncode, done.stderr) == (
        1, "ptender: Could not write record: /dev/full: No space left on device\n",
    )  # fmt: skip
    kernel = guest("instructions")  # whose hypercalls take some KiB more
    blocks = kernel.stat().st_size // 1024 + 3
    words = f"ulimit -f {blocks}; exec {PTENDER} --mem=8 --record {rec} {kernel} numbers"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (
        0, "ptender: record: it ends here: write: File too large; the guest goes on\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--record {rec} --cpu=native {kernel}",
         "--record is for the software CPU: use --cpu=soft"),
        ("--replay {rec} --cpu=kvm", "--replay is for the software CPU: use --cpu=soft"),
        ("--record {kernel} {kernel}",
         "Could not open record: {kernel}: it is the guest's kernel or disk"),
        ("--record x --snapshots {folder} {kernel}", "--record: it does not go with --snapshots"),
        ("--replay {rec} {kernel}",
         "--replay: the record has all that its guest had: leave out '{kernel}'"),
        ("--replay {rec} --mem=8",
         "--replay: the record has all that its guest had: leave out --mem: '8'"),
        ("--replay {rec} --net tap0",
         "--replay: the record has all that its guest had: leave out --net"),
        ("--replay {rec} --record x",
         "--replay: the record has all that its guest had: leave out --record: 'x'"),
        ("--replay {kernel}",
         "{kernel}: not a record that can be replayed: it does not begin like one"),
        ("--replay {rec}.not", "{rec}.not: Could not open: No such file or directory"),
        ("--replay {folder}", "{folder}: not a regular file"),
    ],
)  # fmt: skip
def test_what_can_not_be(
    recorded: Callable[..., Done], guest: Build, rec: Path, words: str, text: str
) -> None:
    recorded("exit")
    names = {"rec": rec, "kernel": guest("exit"), "folder": rec.parent}
    done = ptender(*words.format(**names).split())
    assert (done.returncode in (1, 2), done.stdout) == (True, ""), done
    assert done.stderr == f"ptender: {text.format(**names)}\n"
