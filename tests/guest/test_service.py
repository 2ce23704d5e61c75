"""A tender under a manager of services: sd_notify(3), and the unit file."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.guest.conftest import PTENDER, ROOT, Build, builder
from tests.waiting import wait_until

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


@contextmanager
def held(guest: Build, disk: Path, *options: object) -> Iterator[subprocess.Popen[str]]:
    """A tender whose guest runs until it is ended."""
    command = [PTENDER, "--mem=4", *options, f"--block={disk}", guest("hold")]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        try:
            if not any("held" in line for line in process.stdout):
                pytest.fail(f"it has ended: {process.communicate()}")
            yield process
        finally:
            process.kill()


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PTENDER), *map(str, words)], capture_output=True, text=True)


def is_locked(path: Path) -> bool:
    return subprocess.run(["flock", "--nonblock", str(path), "true"]).returncode == 1


@pytest.mark.parametrize("target", ["hvt", "spt"])
def test_a_pid_file(any_cpu: str, guest: Build, tmp_path: Path, target: str) -> None:
    if target == "spt":
        if any_cpu != "native":
            pytest.skip("an spt guest runs on no such CPU")
        guest = builder(tmp_path / "spt", "--target=spt")
    folder, disk = tmp_path / "run", tmp_path / "disk.img"
    folder.mkdir()
    disk.write_bytes(bytes(4096))
    path = folder / "web.pid"
    option = f"--pidfile={path}"
    for end in (signal.SIGTERM, signal.SIGKILL):
        with held(guest, disk, option) as process:
            assert path.read_text() == f"{process.pid}\n"
            assert path.stat().st_mode & 0o777 == 0o600
            assert is_locked(path)
            second = run("--mem=4", option, guest("exit"))
            assert (second.returncode, second.stderr) == (
                1,
                f"ptender: Could not write PID file: {path}: process {process.pid} runs with it\n",
            )
            process.send_signal(end)
            process.wait()
        assert not is_locked(path)
    assert [each.name for each in folder.iterdir()] == ["web.pid"]
    assert run("--mem=4", option, f"--block={disk}x", guest("hold")).returncode == 1
    assert not any(folder.iterdir()), "the guest could not start"


def test_many_tenders_for_one_pid_file(any_cpu: str, guest: Build, tmp_path: Path) -> None:
    """With a file left behind and without one, exactly one of them starts."""
    path = tmp_path / "web.pid"
    for _ in range(2):
        command = [str(PTENDER), "--mem=4", f"--pidfile={path}", str(guest("loop"))]
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(4)
        ]
        try:
            wait_until(lambda: sum(each.poll() is not None for each in processes) == 3)  # noqa: B023
            refused = [each for each in processes if each.poll() == 1]
            (one,) = set(processes) - set(refused)
            assert path.read_text() == f"{one.pid}\n"
            for each in refused:
                assert "runs with it" in each.communicate()[1]
        finally:
            for each in processes:
                each.kill()
                each.communicate()
    assert [each.name for each in tmp_path.iterdir() if "web" in each.name] == ["web.pid"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a number", "it has something else than a PID in it"),
        (None, "not a regular file"),
    ],
)
def test_what_is_no_pid_file(
    any_cpu: str, guest: Build, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "web.pid"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    for each, text in ((path, message), (tmp_path / "no" / "where", "No such file or directory")):
        done = run("--mem=4", f"--pidfile={each}", guest("exit"))
        assert (done.returncode, done.stderr) == (
            1, f"ptender: Could not write PID file: {each}: {text}\n"
        )  # fmt: skip
    assert content is None or path.read_bytes() == content


def test_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/ptender", str(PTENDER)))
    for command in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=50"]):
        done = subprocess.run([analyze, *command, str(unit)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
