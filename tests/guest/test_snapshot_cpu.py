"""A saved guest that has chosen its code by CPUID, on CPUs that have more and less."""

from __future__ import annotations

import os
import re
import subprocess
from itertools import filterfalse
from pathlib import Path

import pytest

from tender.cpu import features
from tender.snapshot import file
from tests.guest.conftest import CPUS, PTENDER, Build, Run, missing

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="CPUID is of x86_64")
FEATURES = 120  # where the header has them
NONE_HAS = {"3dnow", "3dnowext"}  # any more


def save(kernel: Path, ptender: Run, path: Path) -> str:
    """Save a guest that goes on for ever; what it has printed last."""
    command = [str(PTENDER), "--mem=4", f"--snapshots={path.parent}", str(kernel), "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = ""
        while not re.match("copied|count", line):
            assert process.poll() is None
            line = process.stdout.readline()
        done = ptender("snapshot", process.pid, path, "--stop")
        assert done.returncode == 0, done
    return line


def go_on(path: Path, *words: str) -> tuple[str, str]:
    """What a clone prints next, and what its tender says."""
    command = [str(PTENDER), "--clone", f"--restore={path}", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        line = process.stdout.readline()
        process.terminate()
        _, said = process.communicate(timeout=100)
    return line, said.replace("ptender: Exiting on signal 15\n", "")


def known(path: Path) -> frozenset[str]:
    with open(path, "rb") as opened:
        return file.read(opened.fileno())[0].features


def add(path: Path, names: set[str]) -> None:
    """Let the guest have seen these, too."""
    with open(path, "r+b") as opened:
        opened.seek(FEATURES)
        opened.write(features.encode(known(path) | names))


def test_a_cpu_that_lacks_what_the_guest_may_use_is_refused_by_name(
    guest: Build, ptender: Run, cpu: str, tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    said = save(guest("choose"), ptender, path)
    seen = known(path)
    assert "cx16" in seen
    assert ("avx2" in said) <= ("avx2" in seen)
    assert not NONE_HAS & seen
    line, warning = go_on(path)
    assert line == said
    assert "lacks" not in warning
    add(path, NONE_HAS)
    for other in filterfalse(missing, CPUS):
        line, warning = go_on(path, f"--cpu={other}")
        if other == "soft":
            assert re.match("ptender: the software CPU ends the guest if it uses .*3dnow", warning)
            assert (line == said) == ("byte" in said)
            assert ("it can't do this instruction" in warning) == ("avx2" in said)
        else:
            assert re.fullmatch(
                rf"ptender: {path}: this CPU lacks features that the guest may use: "
                r"3dnow, 3dnowext[^\n]* \(--cpu=soft runs it until it uses one\)\n",
                warning,
            )


def test_a_guest_needs_what_it_has_seen_wherever_it_was(
    guest: Build, ptender: Run, cpu: str, tmp_path: Path
) -> None:
    """Nothing, if it never looks; what it saw on a first CPU, also when it is saved on a second."""
    pytest.importorskip("unicorn", reason="the software CPU needs unicorn")
    first, second = tmp_path / "first", tmp_path / "second"
    save(guest("count"), ptender, first)
    assert known(first) == frozenset()
    add(first, NONE_HAS)
    command = [str(PTENDER), "--cpu=soft", f"--restore={first}", f"--snapshots={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(b"count")
        done = ptender("snapshot", process.pid, second, "--stop")
        assert done.returncode == 0, done
    assert known(second) == NONE_HAS
