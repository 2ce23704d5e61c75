"""What others learn of an spt guest: ps, stats, a report, a manager of services."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tender import Guest, __version__
from tests.guest.conftest import PTENDER, Build, builder, shared_folder
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="spt guests run on x86_64")

REPORT_FD = 12


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return builder(shared_folder(tmp_path_factory, "spt"), "--target=spt")


def ptender(*words: object) -> subprocess.CompletedProcess[str]:
    command = [str(PTENDER), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def listed() -> dict[int, dict[str, Any]]:
    return {each["pid"]: each for each in json.loads(ptender("ps", "--json").stdout)}


def looping(guest: Build, *options: str) -> subprocess.Popen[str]:
    """A guest that computes."""
    command = [str(PTENDER), "--mem=4", *options, str(guest("loop"))]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout
    while "looping" not in process.stdout.readline():
        assert process.poll() is None
    return process


def test_it_is_listed_while_it_runs(guest: Build) -> None:
    name = f"spt.{os.getpid()}"
    with looping(guest, f"--name={name}") as process:
        first = listed()[process.pid]
        assert (first["name"], first["cpu"], first["state"]) == (name, "spt", "running")
        assert first["mem_bytes"] == 4 << 20
        assert not first.keys() & {"exits", "tender_s", "statistics"}, "nobody counts"
        while listed()[process.pid]["guest_s"] <= first["guest_s"]:
            assert process.poll() is None
        shown = ptender("stats", name).stdout
        assert f"{name}: PID {process.pid}, running for " in shown
        assert "s of CPU time" in shown
        assert process.stderr
        (line,) = [each for each in ptender("ps").stdout.splitlines() if each.startswith(name)]
        assert line.split()[-4:] == ["-"] * 4
        process.kill()
        process.wait()
        assert process.pid not in listed()


def test_a_guest_of_a_program_is_listed(guest: Build) -> None:
    with Guest(guest("sleep"), "100000", mem_mib=4, name="of-a-program") as running:
        assert running.pid
        assert listed()[running.pid]["name"] == "of-a-program"
    assert running.pid not in listed()


@pytest.fixture
def reported(guest: Build, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run a guest with --report: its process's status, and the report."""

    def run(name: str, *words: str, options: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
        path = tmp_path / "report.json"
        path.write_text("what was there before " * 100)
        done = ptender("--mem=4", f"--report={path}", *options, guest(name), *words)
        text = path.read_text()
        assert text.endswith("}\n")
        assert text.count("\n") == 1
        found: dict[str, Any] = json.loads(text)
        assert found.pop("versions")["ptender"] == __version__
        return done.returncode, found

    return run


Reported = Callable[..., tuple[int, dict[str, Any]]]


@pytest.mark.parametrize("status", [0, 7, 255])
def test_a_report_of_a_guest_that_halts(reported: Reported, status: int) -> None:
    assert reported("exit", str(status)) == (status, {"reason": "halted", "status": status})


def test_a_report_of_an_exception(reported: Reported, guest: Build) -> None:
    status, found = reported("exception", "gp")
    assert status == -signal.SIGSEGV
    assert (found["reason"], found["status"], found["signal"]) == ("fault", 1, signal.SIGSEGV)
    assert found["error"]["type"] == "GuestFault"
    rip = found["registers"]["rip"]
    assert found["error"]["text"] == f"general protection fault (SIGSEGV), rip={rip:#x}"
    with Guest(guest("exception"), "gp", mem_mib=4) as running:
        outcome = running.wait(PATIENCE_S).as_dict()
    assert outcome["error"] == found["error"]


def test_a_report_of_a_forbidden_call(reported: Reported, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    for call in ("39", f"1,{REPORT_FD},b,4097"):
        status, found = reported("syscall", call, options=(f"--block={disk}",))
        assert status == -signal.SIGSYS
        assert (found["reason"], found["error"]["number"]) == ("sandbox", int(call.split(",")[0]))


def test_a_report_names_the_core_file(reported: Reported, tmp_path: Path) -> None:
    status, found = reported("abort", options=(f"--dumpcore={tmp_path}",))
    assert (status, found["reason"], found["status"]) == (255, "halted", 255)
    assert (tmp_path / found["core"]).stat().st_size > 4 << 20


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT])
def test_a_report_of_a_guest_that_is_stopped(guest: Build, tmp_path: Path, signo: int) -> None:
    path = tmp_path / "report.json"
    with looping(guest, f"--report={path}", f"--dumpcore={tmp_path}") as process:
        process.send_signal(signo)
        _, messages = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, messages) == (128 + signo, f"ptender: Exiting on signal {signo}\n")
    found = json.loads(path.read_text())
    assert (found["reason"], found["signal"]) == ("stopped", signo)


def test_a_report_that_cannot_be_written(guest: Build) -> None:
    done = ptender("--mem=4", "--report=/dev/full", guest("exit"), "3")
    assert (done.returncode, done.stderr) == (3, "ptender: report: write: errno 28\n")


def test_a_manager_is_told_when_it_runs(guest: Build, tmp_path: Path) -> None:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(name)
        server.settimeout(PATIENCE_S)
        command = [str(PTENDER), "--mem=4", str(guest("exit")), "42"]
        environment = {**os.environ, "NOTIFY_SOCKET": name}
        done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
        assert done.returncode == 42
        assert server.recv(1000) == b"READY=1\nSTATUS=running exit.hvt"  # its file's name here
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(1000)


def test_the_policy_shows_what_a_report_needs(guest: Build, tmp_path: Path) -> None:
    shown = json.loads(ptender("policy", "--json", f"--report={tmp_path}/r", guest("exit")).stdout)
    assert {each["number"] for each in shown["descriptors"]} >= {REPORT_FD, 11}
    calls = {each["call"] for each in shown["calls"]}
    assert "exit" in calls
    assert "exit_group" not in calls, "which is how the handler learns of the end"
