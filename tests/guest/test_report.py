"""`--report FILE`, and the same object in a program: how a guest ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tender import Guest, __version__
from tests.guest.conftest import PTENDER, Build, Run


def read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    assert text.endswith("}\n")
    assert text.count("\n") == 1
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_guest_that_halts(ptender: Run, guest: Build, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("what was there before, and is longer than a report " * 100)
    done = ptender("--mem=8", f"--report={path}", guest("exit"))
    found = read(path)
    assert (found["reason"], found["status"]) == ("halted", done.returncode)
    assert found["versions"]["ptender"] == __version__
    assert found["statistics"]["console"]["bytes"] == len(done.stdout)
    assert not found.keys() & {"signal", "error", "trap", "registers", "core"}


def test_a_fault_in_a_command_and_in_a_program(
    ptender: Run, guest: Build, cpu: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    assert ptender("--mem=8", f"--report={path}", guest("badgpa")).returncode == 1
    assert path.stat().st_mode & 0o777 == 0o600
    found = read(path)
    assert found["reason"] == "fault"
    error = found["error"]
    assert error["type"] == "GuestFault"
    assert error["gpa"] >= 8 << 20
    assert f"gpa={error['gpa']:#x}" in error["text"]
    assert 0x100000 <= found["registers"]["rip"] < 8 << 20
    assert found["registers"]["rsp"] > 0
    outcome = Guest(guest("badgpa"), mem_mib=8, cpu=cpu).run()  # type: ignore[arg-type]
    assert outcome.as_dict() == found
    json.dumps(outcome.as_dict())


def test_a_cpu_exception_has_its_registers(ptender: Run, guest: Build, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert ptender("--mem=8", f"--report={path}", guest("zeropage")).returncode == 255
    found = read(path)
    assert (found["reason"], found["status"]) == ("halted", 255)
    assert {"cr2", "rip", "rsp"} <= found["trap"].keys()


def test_a_guest_that_is_stopped(guest: Build, cpu: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with subprocess.Popen(
        [PTENDER, f"--cpu={cpu}", "--mem=8", f"--report={path}", guest("loop")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout
        while "looping" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    found = read(path)
    assert (found["reason"], found["signal"]) == ("stopped", signal.SIGTERM)


def test_a_full_disk_costs_a_line_and_no_guest(ptender: Run, guest: Build) -> None:
    done = ptender("--mem=8", "--report=/dev/full", guest("exit"))
    assert done.stderr == "ptender: report: write: No space left on device\n"
    assert done.returncode == ptender("--mem=8", guest("exit")).returncode


def test_files_that_it_does_not_overwrite(ptender: Run, guest: Build, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.hvt"
    kernel.write_bytes(guest("exit").read_bytes())
    done = ptender(f"--report={kernel}", kernel)
    assert done.stderr == (
        f"ptender: Could not open report: {kernel}: it is the guest's kernel or disk\n"
    )
    assert kernel.read_bytes() == guest("exit").read_bytes()
    done = ptender("--report=/nowhere/report", kernel)
    assert done.stderr == (
        "ptender: Could not open report: /nowhere/report: No such file or directory\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is careful")
def test_root_follows_no_link_in_a_shared_folder(
    ptender: Run, guest: Build, tmp_path: Path
) -> None:
    victim, shared = tmp_path / "victim", tmp_path / "shared"
    victim.write_text("precious")
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "report").symlink_to(victim)
    done = ptender(f"--report={shared}/report", guest("exit"))
    assert "it is a symbolic link, in a folder that others may write to" in done.stderr
    assert victim.read_text() == "precious"
