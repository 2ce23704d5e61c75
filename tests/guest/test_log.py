"""The tender's own messages: as JSON, and with levels for the journal."""

from __future__ import annotations

import json
import os
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import PTENDER, Build

pytestmark = pytest.mark.usefixtures("any_cpu")


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PTENDER, *map(str, words)], capture_output=True, text=True)


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_json(guest: Build) -> None:
    begun = datetime.now(timezone.utc)
    done = run("--log=json", "-v", "--mem=7", guest("exit"), 7)
    assert done.returncode == 7, done
    memory, *sandbox, ended, console, _ = lines(done)
    assert list(memory)[:5] == ["time", "level", "guest", "event", "message"]
    assert (memory["level"], memory["event"], memory["guest"]) == ("warning", "warning", "exit.hvt")
    assert sandbox[-1]["event"] == "sandbox"
    assert (ended["level"], ended["event"]) == ("info", "ended")
    assert (ended["reason"], ended["status"]) == ("halted", 7)
    assert (console["event"], console["device"]) == ("device", "console")
    assert console["bytes"] == len(done.stdout)
    for each in (memory, *sandbox, ended, console):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", each["time"])
        when = datetime.fromisoformat(each["time"].replace("Z", "+00:00"))
        assert begun <= when <= datetime.now(timezone.utc)


def test_json_of_errors(guest: Build, tmp_path: Path) -> None:
    done = run("--log", "json", "--mem=8", guest("badgpa"))
    (end,) = lines(done)
    assert (end["level"], end["event"], end["reason"], end["status"]) == (
        "error", "error", "fault", 1,
    )  # fmt: skip
    assert end["message"] == "Invalid guest access: gpa=0x800000, len=0x10"
    done = run("--log", "json", tmp_path / "none.hvt")
    (start,) = lines(done)
    assert (start["guest"], start["event"], start["status"]) == ("none.hvt", "error", 1)
    assert "No such file" in start["message"]


def test_a_long_message_is_one_whole_line(tmp_path: Path) -> None:
    name = "\N{SNOWMAN}" * 1000  # six letters each in JSON
    done = run("--log=json", tmp_path / name)
    (only,) = lines(done)
    assert len(done.stderr) <= 4001
    assert only["level"] == "error"


def test_the_journal_gets_levels(guest: Build, tmp_path: Path) -> None:
    file = tmp_path / "journal"

    def logged(stream: str, *words: object) -> list[str]:
        with file.open("w") as stderr:
            info = os.fstat(stderr.fileno())
            place = {"journal": f"{info.st_dev}:{info.st_ino}", "other": f"{info.st_dev}:1"}
            subprocess.run(
                [str(PTENDER), *map(str, words)],
                stdout=subprocess.DEVNULL, stderr=stderr,
                env={**os.environ, "JOURNAL_STREAM": place.get(stream, stream)},
            )  # fmt: skip
        return file.read_text().splitlines()

    words = ["--mem=9", "-v", guest("badgpa")]
    lines = logged("journal", *words)
    assert lines[0] == f"<4>ptender: adjusting memory to {8 << 20} bytes"
    error, ended = (line for line in lines if re.match("<.>ptender: (Invalid|guest) ", line))
    assert error == "<3>ptender: Invalid guest access: gpa=0x800000, len=0x10"
    assert ended == "<6>ptender: guest fault, status 1"
    for stream in ("other", "", "8:x"):
        assert error[3:] in logged(stream, *words)
    levels = [json.loads(line)["level"] for line in logged("journal", "--log=json", *words)]
    assert levels.count("error") == 1


def test_what_is_neither(guest: Build) -> None:
    done = run("--log=xml", guest("exit"))
    assert (done.returncode, done.stderr) == (2, "ptender: --log: 'xml' is neither text nor json\n")
