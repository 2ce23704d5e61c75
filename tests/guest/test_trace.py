"""`--trace`: what a guest asked for, and what it got."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import PTENDER, Build, Run
from tests.guest.ordinary import ordinary
from tests.waiting import PATIENCE_S, wait_until_blocked

Line = dict[str, Any]


def lines(file: Path) -> list[Line]:
    text = file.read_text()
    assert text.endswith("\n")
    head, *rest = [json.loads(line) for line in text.splitlines()]
    assert head["trace"] == 1
    return rest


def test_all_that_a_guest_does_with_a_disk(ptender: Run, guest: Build, tmp_path: Path) -> None:
    image, trace = tmp_path / "disk.img", tmp_path / "trace"
    image.write_bytes(bytes(64 * 512))
    done = ptender("--mem=8", "--trace", trace, "--block", image, guest("disk"), "hello")
    assert done.returncode == 0, done
    *calls, end = lines(trace)
    assert "".join(line["text"] for line in calls if line["call"] == "PUTS") == done.stdout
    io = [line for line in calls if line["call"].startswith("BLOCK_")]
    assert [line["call"] for line in io] == ["BLOCK_READ", "BLOCK_WRITE", "BLOCK_READ"]
    for line in io:
        assert (line["device"], line["handle"], line["offset"], line["len"], line["ret"]) == (
            "storage", 1, 0, 512, 0,
        )  # fmt: skip
    assert io[0]["data"] == bytes(64).hex()  # as it was; then what is in the file now
    assert io[1]["data"] == io[2]["data"] == image.read_bytes()[:64].hex()
    walltime = next(line["nsecs"] for line in calls if line["call"] == "WALLTIME")
    assert abs(walltime / 1e9 - time.time()) < 100
    assert calls[-1]["call"] == "HALT"
    assert calls[-1]["exit_status"] == 0
    assert {"end": "halted", "status": 0}.items() <= end.items()
    times = [line["t"] for line in (*calls, end)]
    assert times == sorted(times)


def test_the_keys_are_in_the_order_in_which_one_reads(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    ptender("--mem=8", "--trace", trace, guest("exit"), 7)
    head, first, *_, last, _ = trace.read_text().splitlines()
    assert head == '{"trace": 1, "guest": "exit.hvt"}'
    assert re.fullmatch(
        r'\{"t": \d+\.\d{6}, "took": \d\.\d{6}, "call": "PUTS", "data_gpa": \d+, "len": \d+, '
        r'"text": "Solo5: [^"]*\\n"\}',
        first,
    )
    assert last.endswith('"call": "HALT", "exit_status": 7, "cookie_gpa": 0}')


def test_frames(ptender: Run, guest: Build, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(bytes(range(60)))
    fd = theirs.fileno()
    done = ptender("--mem=8", "--trace", trace, f"--net=@{fd}", guest("frames"), pass_fds=[fd])
    assert done.returncode == 0, done
    reads = [line for line in lines(trace) if line.get("call") == "NET_READ"]
    sent = [line for line in lines(trace) if line.get("call") == "NET_WRITE"]
    polls = [line for line in lines(trace) if line.get("call") == "POLL"]
    assert [(line["received"], line["ret"]) for line in reads] == [(60, 0), (0, 1)]
    assert reads[0]["data"] == bytes(range(60)).hex()
    assert "data" not in reads[1]
    assert sent[0]["data"] == ours.recv(2000).hex()[:128]
    assert (sent[0]["len"], sent[0]["ret"]) == (60, 0)
    assert (polls[0]["ready_set"], polls[0]["ret"]) == (2, 1)
    ours.close()
    theirs.close()


def test_what_ends_a_guest_is_the_end_of_its_trace(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    assert ptender("--mem=8", "--trace", trace, guest("badgpa")).returncode == 1
    call, end = lines(trace)[-2:]
    assert (call["call"], call["fault"]) == (
        "PUTS",
        "Invalid guest access: gpa=0x800000, len=0x10",
    )
    assert (end["end"], end["status"], end["error"]) == ("fault", 1, call["fault"])
    assert ptender("--mem=8", "--trace", trace, guest("badport")).returncode == 1
    assert lines(trace)[-2]["fault"] == "Invalid guest port access: port=0x400, size=4"
    assert ptender("--mem=8", "--trace", trace, guest("textwrite")).returncode == 1
    assert lines(trace)[-1]["error"].startswith("host/guest translation fault: rip=0x1")


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGKILL])
def test_a_trace_is_complete_when_a_signal_ends_the_guest(
    guest: Build, tmp_path: Path, cpu: str, signo: int
) -> None:
    trace = tmp_path / "trace"
    with subprocess.Popen(
        [PTENDER, "--mem=8", "--trace", trace, guest("flood")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout
        wait_until_blocked(process.pid, process.stdout.fileno())
        process.send_signal(signo)
        output = process.stdout.read()
        process.wait(timeout=PATIENCE_S)
    texts = [line["text"].encode() for line in lines(trace) if line.get("call") == "PUTS"]
    assert len(texts) > 50
    assert output.startswith(b"".join(texts[:-1]))  # of the last one, what the pipe could hold
    if signo == signal.SIGTERM:
        assert lines(trace)[-1]["end"] == "stopped"
        assert lines(trace)[-1]["signal"] == signo


def test_a_full_disk_is_told_once_and_does_not_end_the_guest(ptender: Run, guest: Build) -> None:
    done = ptender("--mem=8", "--trace=/dev/full", guest("exit"), 5)
    assert done.returncode == 5
    assert done.stderr == (
        "ptender: trace: it ends here: write: No space left on device; the guest goes on\n"
    )


def test_standard_error_and_descriptors(ptender: Run, guest: Build, tmp_path: Path) -> None:
    done = ptender("--mem=8", "--trace", "-", guest("exit"), 5)
    assert json.loads(done.stderr.splitlines()[-1])["status"] == 5
    with (tmp_path / "trace").open("w") as file:
        fd = file.fileno()
        ptender("--mem=8", f"--trace=@{fd}", guest("exit"), 5, pass_fds=[fd])
    assert lines(tmp_path / "trace")[-1]["status"] == 5


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("/nonexistent/trace", "Could not open trace: /nonexistent/trace: No such file"),
        ("@77", "Could not open trace: 77: no such descriptor"),
        ("@3", "Could not open trace: 3: no such descriptor"),  # a number that the tender uses
        ("@x", "--trace: '@x': 'x' is not the number of an open descriptor"),
        ("{fifo}", "Device or resource busy|No such device or address \\(nobody reads it\\)"),
    ],
)
def test_a_trace_that_cannot_be(
    ptender: Run, guest: Build, tmp_path: Path, word: str, message: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    done = ptender("--mem=8", "--trace", word.format(fifo=tmp_path / "fifo"), guest("exit"))
    assert done.returncode in (1, 2)
    assert re.fullmatch(rf"ptender: [^\n]*({message})[^\n]*\n", done.stderr), done


def test_virtual_time_makes_one_trace_of_two(guest: Build, tmp_path: Path) -> None:
    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    traces = []
    for name in ("first", "second"):
        words: list[object] = ["--cpu=soft", "--clock=virtual", "--mem=8"]
        words += ["--trace", tmp_path / name, guest("sleep"), "3000"]
        subprocess.run([PTENDER, *map(str, words)], check=True, capture_output=True)
        traces.append((tmp_path / name).read_text())
    assert traces[0] == traces[1]
    assert lines(tmp_path / "first")[-1]["t"] >= 3


def test_the_engine_is_not_asked(ptender: Run, guest: Build, tmp_path: Path, cpu: str) -> None:
    """All calls are seen, whatever was said of the engine and the ring."""
    trace = tmp_path / "trace"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(bytes(range(60)))
    words = ["--mem=8", "--engine=c", "--net-ring", f"--net=@{theirs.fileno()}"]
    done = ptender(*words, "--trace", trace, guest("frames"), pass_fds=[theirs.fileno()])
    assert done.returncode == 0, done
    assert [line["call"] for line in lines(trace)[:-1] if "NET" in line["call"]] == [
        "NET_READ", "NET_READ", "NET_WRITE",
    ]  # fmt: skip
    ours.close()
    theirs.close()


# What it is written to.

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root's files in a folder of others")


@pytest.mark.parametrize("option", ["trace", "pcap", "report", "record"])
def test_it_is_for_its_owner_only(guest: Build, tmp_path: Path, option: str) -> None:
    """A new file, and one that others could read."""
    files = tmp_path / "new", tmp_path / "old"
    files[1].write_text("what was there before")
    files[1].chmod(0o644)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for file in files:
            ours.send(bytes(60))
            words = [PTENDER, "--cpu=soft", "--mem=8", f"--net=@{theirs.fileno()}"]
            words += [f"--{option}={file}", guest("frames")]
            subprocess.run(list(map(str, words)), check=True, pass_fds=[theirs.fileno()])
            assert b"before" not in file.read_bytes()
            assert file.stat().st_mode & 0o777 == 0o600
            if option == "trace":
                events = tmp_path / f"{file.name}.events"
                subprocess.run([PTENDER, "trace", file, "-o", events], check=True)
                assert events.stat().st_mode & 0o777 == 0o600


@as_root
def test_a_file_that_others_may_read_and_keep(guest: Build, tmp_path: Path) -> None:
    """Another user's file that this one may write to: its mode is the other's to change."""
    folder = Path(tempfile.mkdtemp(prefix="ptender-"))
    folder.chmod(0o755)
    file = folder / "trace"
    file.write_text("another's")
    file.chmod(0o666)
    words = [PTENDER, "--mem=8", "--trace", file, shutil.copy(guest("exit"), folder)]
    command = ordinary(tmp_path / "mount", words)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr == (
        f"ptender: Could not open trace: {file}: others may open it, and its mode can't be "
        "changed: Operation not permitted: name a new file, in a file system that keeps modes\n"
    )
    assert file.read_text() == "another's"
    shutil.rmtree(folder)


@pytest.mark.parametrize("through", ["its name", "a link", "a hard link"])
def test_never_the_guests_disk_or_kernel(
    ptender: Run, guest: Build, tmp_path: Path, through: str
) -> None:
    image, kernel = tmp_path / "disk.img", tmp_path / "disk.hvt"
    image.write_bytes(bytes(4096))
    kernel.write_bytes(guest("disk").read_bytes())
    for target in (image, kernel):
        before, trace = target.read_bytes(), tmp_path / f"{target.name}.trace"
        if through == "a link":
            trace.symlink_to(target)
        elif through == "a hard link":
            trace.hardlink_to(target)
        else:
            trace = target
        done = ptender("--mem=8", "--trace", trace, f"--block={image}", kernel)
        assert (done.returncode, done.stdout) == (1, ""), done
        assert done.stderr == (
            f"ptender: Could not open trace: {trace}: it is the guest's kernel or disk\n"
        )
        assert target.read_bytes() == before


@as_root
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o775])
def test_no_link_and_no_file_of_others_in_a_folder_of_others(
    ptender: Run, guest: Build, tmp_path: Path, mode: int
) -> None:
    folder, victim = tmp_path / "shared", tmp_path / "victim"
    folder.mkdir()
    folder.chmod(mode)
    victim.write_text("root's")
    link, other = folder / "link", folder / "other"
    link.symlink_to(victim)
    other.write_text("another's")
    os.chown(other, 4321, 4321)
    for path, why in (
        (link, "it is a symbolic link, in"),
        (other, "it is another user's file, in"),
    ):
        done = ptender("--mem=8", "--trace", path, guest("exit"))
        assert (done.returncode, done.stdout) == (1, ""), done
        assert f"{path}: " in done.stderr
        # In a sticky folder the kernel refuses some of it by itself (fs.protected_regular).
        assert why in done.stderr or "Permission denied" in done.stderr
        assert done.stderr.count("\n") == 1
    assert (victim.read_text(), other.read_text()) == ("root's", "another's")
    done = ptender("--mem=8", "--trace", folder / "own", guest("exit"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_an_open_descriptor_by_its_name(ptender: Run, guest: Build, name: str) -> None:
    done = ptender("--mem=8", "--trace", f"/dev/{name}", guest("exit"))
    assert done.returncode == 0, done
    assert '"call": "HALT"' in getattr(done, name)


def test_a_device_stays_one(ptender: Run, guest: Build) -> None:
    assert ptender("--mem=8", "--trace", "/dev/null", guest("exit")).returncode == 0
    assert Path("/dev/null").is_char_device()
