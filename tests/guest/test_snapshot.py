"""Guests that are saved and go on: `ptender snapshot` and `ptender --restore`, as operators have
them, in the sandbox."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tender.cpu import native
from tests.guest.conftest import CPUS, PTENDER, Build, Run
from tests.waiting import wait_until_asleep

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="snapshots of x86_64 guests")
MAC = "02:00:00:00:00:07"
HOST = b"\2\0\0\0\0\1"
ONE_LINE = r"ptender: [^\n]+\n"


class Running:
    """A guest that answers frames: `answer` of guest-bindings/tests, or what it goes on as."""

    def __init__(self, disk: Path, *words: object, mac: str | None = MAC) -> None:
        self.name = f"{os.getpid()}.{os.urandom(4).hex()}"
        self.wire, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.wire.settimeout(100)
        net = f"--net=@{theirs.fileno()}" + (f",mac={mac}" if mac else "")
        self.process = subprocess.Popen(
            [PTENDER, f"--name={self.name}", net, f"--block={disk}", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def wait_until_ready(self) -> None:
        assert self.process.stdout
        while "ready" not in self.process.stdout.readline():
            assert self.process.poll() is None
        wait_until_asleep(self.process.pid)

    def ask(self, *payload: int) -> tuple[int, int]:
        """How many frames it has got and their sum, with one of these bytes."""
        self.wire.send(b"\xff" * 6 + HOST + b"\x08\x00" + bytes(payload))
        answer = self.wire.recv(2048)
        assert answer[:12] == HOST + bytes.fromhex(MAC.replace(":", ""))
        count, total = struct.unpack_from("<2Q", answer, 14)
        return count, total

    def end(self) -> str:
        """Have it end; the first line that it prints then. What the tender says is in `said`."""
        self.wire.send(b"\xff" * 6 + HOST + b"\x88\x00")
        out, self.said = self.process.communicate(timeout=100)
        assert (self.process.returncode, "SUCCESS" in out) == (0, True), (out, self.said)
        return out.partition("\n")[0]


@pytest.fixture
def start(guest: Build, cpu: str, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start a guest of this test; with `restore`, from there."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 16))
    running: list[Running] = []

    def start(*words: object, kernel: bool = True, mac: str | None = MAC) -> Running:
        more = ["--mem=8", guest("answer")] if kernel else []
        running.append(Running(disk, *words, *more, mac=mac))
        return running[-1]

    yield start
    for each in running:
        each.process.kill()
        each.process.communicate()
        each.wire.close()


def restore(start: Callable[..., Running], file: Path, *words: object, **options: Any) -> Running:
    return start(f"--restore={file}", *words, kernel=False, **options)


def usable(cpu: str) -> bool:
    return cpu != "native" or not native.missing()


def test_a_guest_goes_on_and_so_does_its_snapshot(
    start: Callable[..., Running], ptender: Run, tmp_path: Path, cpu: str
) -> None:
    file = tmp_path / "saved"
    first = start(f"--snapshots={tmp_path}")
    first.wait_until_ready()
    assert first.ask(1, 2) == (1, 3)
    done = ptender("snapshot", first.name, file)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{first.name}: saved: \d+K in {file}\n", done.stdout)
    assert first.ask(3) == (2, 6)
    assert first.end() == "2 frames, sum 6"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_blocks * 512 < 1 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.img", "saved"]
    # From here on every CPU has the same guest.
    for number, other in enumerate(filter(usable, CPUS)):
        clone = restore(start, file, f"--cpu={other}", *(["--clone"] if number else []), mac=None)
        assert clone.ask(5) == (2, 8), other
        assert clone.end() == "2 frames, sum 8", other
