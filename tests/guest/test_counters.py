"""`ptender ps` and `ptender stats` beside guests that run."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tender import BlockFile, Guest
from tests.guest.conftest import PTENDER, Build, Run
from tests.guest.ordinary import ordinary
from tests.needs import needs

CAPACITY = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, CAPACITY)
    return path


@pytest.fixture
def held(guest: Build, cpu: str, image: Path) -> Iterator[subprocess.Popen[str]]:
    """A guest of this test that prints "held" and computes."""
    with subprocess.Popen(
        [PTENDER, "--mem=8", f"--name=held.{os.getpid()}", f"--block={image},ro", guest("hold")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        while "held" not in process.stdout.readline():
            assert process.poll() is None
        yield process
        process.kill()


def listed(ptender: Run) -> dict[int, dict[str, Any]]:
    return {each["pid"]: each for each in json.loads(ptender("ps", "--json").stdout)}


def test_a_guest_is_listed_while_it_runs(
    held: subprocess.Popen[str], ptender: Run, cpu: str
) -> None:
    name = f"held.{os.getpid()}"
    found = listed(ptender)[held.pid]
    assert (found["name"], found["cpu"], found["state"]) == (name, cpu, "running")
    assert (found["mem_bytes"], found["uid"]) == (8 << 20, os.geteuid())
    assert found["exits"] > 0
    assert found["guest_s"] > 0
    assert found["statistics"]["console"]["bytes"] >= len("held\n")
    assert found["statistics"]["block"] == {"storage": dict.fromkeys(
        ("calls", "bytes", "errors", "drops", "delays"), 0
    )}  # fmt: skip

    by_name = ptender("stats", name)
    assert by_name.returncode == 0
    assert f"{name}: PID {held.pid}, running for " in by_name.stdout
    for device in ("console", "poll", "block:storage"):
        assert f"\n{device} " in by_name.stdout
    one = json.loads(ptender("stats", str(held.pid), "--json").stdout)
    assert one["guest_s"] >= found["guest_s"], "it computes"

    held.send_signal(signal.SIGKILL)
    held.wait()
    assert held.pid not in listed(ptender)
    done = ptender("stats", name)
    assert (done.returncode, done.stderr) == (
        1, f"ptender: no guest '{name}' runs; see ptender ps\n"
    )  # fmt: skip


def test_a_terminal_of_80_columns(held: subprocess.Popen[str]) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: os.environ[name] for name in os.environ if name != "COLUMNS"}
    shown = b""
    with subprocess.Popen([PTENDER, "ps"], stdout=theirs, env=environment) as process:
        os.close(theirs)
        try:  # while it writes: hundreds of guests may be listed, and a terminal has little room
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # EIO: the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    lines = shown.decode().splitlines()
    assert lines[0].startswith("NAME ")
    assert [line for line in lines if f" {held.pid} " in line]
    assert max(map(len, lines)) <= 80


def test_guests_of_a_program(ptender: Run, guest: Build, cpu: str, image: Path) -> None:
    held, disk = guest("hold"), BlockFile(image, readonly=True)
    with (
        Guest(held, block={"storage": disk}, mem_mib=8, cpu=cpu, name="of-a-program") as one,  # type: ignore[arg-type]
        Guest(held, block={"storage": disk}, mem_mib=8, cpu=cpu) as other,  # type: ignore[arg-type]
    ):
        found = listed(ptender)
        assert one.pid
        assert other.pid
        assert found[one.pid]["name"] == "of-a-program"
        assert found[other.pid]["name"] == "hold.hvt"
    assert not {one.pid, other.pid} & listed(ptender).keys()


OF_A_USER = """
import subprocess, sys
from tender import BlockFile, Guest
disk = BlockFile(sys.argv[2], readonly=True)
with Guest(sys.argv[1], block={"storage": disk}, mem_mib=8, cpu=sys.argv[3]):
    print(subprocess.run([sys.argv[4], "ps"], capture_output=True, text=True).stdout)
"""


def test_guests_of_an_ordinary_users_program(
    guest: Build, cpu: str, image: Path, home: Path
) -> None:
    if cpu == "kvm" and os.stat("/dev/kvm").st_mode & 0o6 != 0o6:
        pytest.skip("/dev/kvm is not for every user")
    kernel, disk = shutil.copy(guest("hold"), home), shutil.copy(image, home)
    program = [sys.executable, "-c", OF_A_USER, kernel, disk, cpu, PTENDER]
    script = f'export XDG_RUNTIME_DIR={home}; exec "$@"'
    command = ordinary(home.parent / "mount", ["sh", "-c", script, "sh", *program])
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nhold.hvt " in done.stdout
    assert not list((home / "ptender").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("options", ["ro", "size=4k"], ids=["read-only", "full"])
def test_where_there_can_be_no_page_the_guest_runs(guest: Build, cpu: str, options: str) -> None:
    needs("unshare", "--mount")
    script = f'mount -t tmpfs -o {options} none /run && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", script, "sh", str(PTENDER), f"--cpu={cpu}"]
    done = subprocess.run([*words, str(guest("exit"))], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
