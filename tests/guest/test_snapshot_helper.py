"""The snapshot helper: what is said, and left, where it ends before its guest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tender.observe import counters
from tender.snapshot import helper
from tests.guest.conftest import PTENDER, Build, Run
from tests.guest.test_snapshot import Running, start
from tests.waiting import children, state_of, wait_until, wait_until_asleep

__all__ = ["start"]
pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="snapshots of x86_64 guests")


def path_of(running: Running) -> str:
    return helper.socket_path(counters.folder(), running.process.pid)


def helper_of(running: Running) -> int:
    """The child of the tender that has the socket."""
    table = Path("/proc/net/unix").read_text().splitlines()
    (inode,) = [line.split()[6] for line in table if line.endswith(f" {path_of(running)}")]
    (pid,) = [
        pid
        for pid in children(running.process.pid)
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(fd) == f"socket:[{inode}]"
    ]
    return pid


# In the place of the tender's loop, after lockdown.
TAKEN_OVER = """
import os, sys
from tender import loop
from tender.cli import main

def taken_over(vcpu, memory, dispatcher, stop, hooks, *_):
    fd = hooks[0]._requests.fds["snapshot-helper"]
    os.write(1, b"ready\\n")
    while True:
        {}

loop.run = taken_over
main.main(["ptender", *sys.argv[1:]])
"""
ANSWER = "os.read(fd, 1) == b'?' and os.write(fd, b'r') and os.read(fd, 1) and os.write(fd, {})"


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("os.write(fd, b'r')", ""),
        ("os.write(fd, b'+' * 500)", ""),
        (ANSWER.format("b'saved'"), "not saved, in the folder of --snapshots: saved"),
        (
            ANSWER.format(r"b'\x1b[2J\nptender: web: saved'"),
            r"not saved, in the folder of --snapshots: \x1b[2J\nptender: web: saved",
        ),
        (ANSWER.format("b'n' * 500"), f"not saved, in the folder of --snapshots: {'n' * 500}"),
    ],
)
def test_a_tender_that_was_taken_over(guest: Build, tmp_path: Path, attack: str, said: str) -> None:
    """A command ends with one line, whatever is sent, and the helper with its tender."""
    name = f"{os.getpid()}.{os.urandom(4).hex()}"
    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    words = ["--cpu=soft", "--mem=4", f"--name={name}", f"--snapshots={tmp_path}", guest("exit")]
    command = [sys.executable, "-c", TAKEN_OVER.format(attack), *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tender:
        try:
            assert tender.stdout
            assert tender.stdout.readline() == b"ready\n"
            before = children(tender.pid)
            done = subprocess.run(
                [PTENDER, "snapshot", name, tmp_path / "saved", "--timeout=2"],
                capture_output=True,
                text=True,
            )
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
            assert not said or done.stderr == f"ptender: {name}: {said}\n"
            assert tender.poll() is None
        finally:
            tender.kill()
    wait_until(lambda: not any(map(state_of, before)))
    assert not os.path.exists(helper.socket_path(counters.folder(), tender.pid))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def running(start: Callable[..., Running], cpu: str, tmp_path: Path) -> Running:
    running = start(f"--snapshots={tmp_path}", f"--dumpcore={tmp_path}")
    running.wait_until_ready()
    return running


def killed(running: Running) -> str:
    return (
        f"ptender: {running.name}: it can't be saved any more: its snapshot helper was killed "
        "(the guest runs on)\n"
    )


def test_a_helper_that_was_killed(running: Running, ptender: Run, tmp_path: Path) -> None:
    pid = helper_of(running)
    os.kill(pid, signal.SIGSTOP)
    words = list(map(str, [PTENDER, "snapshot", running.name, tmp_path / "saved"]))
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as command:
        wait_until_asleep(command.pid)
        os.kill(pid, signal.SIGKILL)
        _, said = command.communicate(timeout=100)
        assert (command.returncode, said) == (1, killed(running))
    done = ptender("snapshot", running.name, tmp_path / "saved")
    assert (done.returncode, done.stderr) == (1, killed(running))
    assert running.ask(1, 2) == (1, 3)
    assert running.end() == "1 frames, sum 3"
    assert running.said == ""
    assert os.listdir(tmp_path) == []
