"""The snapshot helper: what is said, and left, where it ends before its guest."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tender.observe import counters
from tender.snapshot import helper
from tests.guest.conftest import PTENDER, Run
from tests.guest.test_snapshot import Running, start
from tests.waiting import children, wait_until_asleep

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
