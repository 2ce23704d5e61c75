"""A tender under a manager of services: sd_notify(3), and the unit file."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.conftest import PTENDER, ROOT, Build

UNIT = ROOT / "share/ptender@.service"


@pytest.fixture(params=["a path", "an abstract name"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The socket of a manager, and its name in NOTIFY_SOCKET."""
    abstract = request.param != "a path"
    name = f"ptender-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(f"\0{name}" if abstract else name)
        server.settimeout(100)
        yield server, f"@{name}" if abstract else name


def test_a_manager_is_notified(
    any_cpu: str, guest: Build, manager: tuple[socket.socket, str]
) -> None:
    server, name = manager
    environment = {**os.environ, "NOTIFY_SOCKET": name}
    command = [str(PTENDER), "--mem=4", str(guest("exit")), "42"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        ready = server.recv(1000).decode().split("\n")
        assert ready == ["READY=1", "STATUS=running exit.hvt"]
        stopping = server.recv(1000).decode().split("\n")
        assert stopping == ["STOPPING=1", "STATUS=guest halted, status 42"]
    assert process.returncode == 42


def test_no_manager(any_cpu: str, guest: Build) -> None:
    environment = {**os.environ, "NOTIFY_SOCKET": "/nowhere"}
    command = [str(PTENDER), "--mem=4", str(guest("exit"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "ptender: NOTIFY_SOCKET=/nowhere: No such file or directory\n"


def test_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/ptender", str(PTENDER)))
    for command in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=50"]):
        done = subprocess.run([analyze, *command, str(unit)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
