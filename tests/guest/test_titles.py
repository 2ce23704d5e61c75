"""What ps, top and pgrep show of the processes of guests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tender import Guest
from tests.guest.conftest import PTENDER, Build
from tests.waiting import children


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")


def words_of(pid: int) -> list[str]:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0")
    return [os.fsdecode(word) for word in words.split(b"\0")]


@pytest.mark.parametrize("program", ["ptender", "solo5-hvt"])
def test_a_command_is_shown_as_it_was_typed(
    guest: Build, tmp_path: Path, cpu: str, program: str
) -> None:
    (tmp_path / program).symlink_to(PTENDER)
    line = ["--mem=8", str(guest("loop")), "some", "words"]
    with subprocess.Popen(
        [tmp_path / program, *line], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        while "looping" not in process.stdout.readline():
            assert process.poll() is None
        name = f"{program}:loop"
        helpers = {name} if cpu == "native" else set()
        assert (name_of(process.pid), words_of(process.pid)) == (name, [program, *line])
        assert {name_of(pid) for pid in children(process.pid)} == helpers
        process.terminate()


def test_a_program_has_a_process_for_each_guest(guest: Build, cpu: str) -> None:
    looping = Guest(guest("loop"), "secret", mem_mib=8, name="front")
    with looping as first, Guest(guest("sleep"), "100000", mem_mib=8) as second:
        assert first.pid
        assert second.pid
        assert name_of(first.pid) == "ptender:front"
        assert words_of(first.pid) == ["ptender", "--name", "front", str(guest("loop"))]
        assert name_of(second.pid) == "ptender:sleep"
        assert words_of(second.pid) == ["ptender", str(guest("sleep"))]
        stat = Path(f"/proc/{first.pid}/stat").read_text()
        parent = int(stat.rpartition(")")[2].split()[1])
        assert name_of(parent) == "ptender:server"
        assert words_of(parent) == ["ptender", "server", "of", str(os.getpid())]
