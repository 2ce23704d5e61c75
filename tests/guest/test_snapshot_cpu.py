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
from tests.waiting import wait_until_asleep

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="CPUID is of x86_64")
FEATURES = 120  # where the header has them
NONE_HAS = {"3dnow", "3dnowext"}  # any more


def save(kernel: Path, ptender: Run, path: Path, last: str) -> str:
    """Save a guest that waits when it has printed `last`; the line with that."""
    command = [str(PTENDER), "--mem=4", f"--snapshots={path.parent}", str(kernel), "1500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = ""
        while last not in line:
            assert process.poll() is None
            line = process.stdout.readline()
        wait_until_asleep(process.pid)
        done = ptender("snapshot", process.pid, path, "--stop")
        assert done.returncode == 0, done
    return line


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
    said = save(guest("choose"), ptender, path, "copies by")
    seen = known(path)
    assert "cx16" in seen
    assert ("avx2" in said) <= ("avx2" in seen)
    assert not NONE_HAS & seen
    done = ptender(f"--restore={path}", "--clone")
    assert done.returncode == 0, done
    assert "the guest may use" not in done.stderr
    add(path, NONE_HAS)
    for other in filterfalse(missing, CPUS):
        done = ptender(f"--cpu={other}", f"--restore={path}", "--clone")
        if other == "soft":
            assert "guest may use what the software CPU has not, and ends there: " in done.stderr
            assert (done.returncode == 0) == ("avx2" not in said), done
        else:
            assert done.returncode == 1
            assert re.fullmatch(
                rf"ptender: {path}: the guest may use what this CPU has not: 3dnow, 3dnowext[^\n]*"
                r" \(--cpu=soft runs it until it does\)\n",
                done.stderr,
            )


def test_what_a_guest_has_seen_goes_with_it(
    guest: Build, ptender: Run, cpu: str, tmp_path: Path
) -> None:
    """A guest that was on another CPU meanwhile still knows what it saw on the first."""
    first, second = tmp_path / "first", tmp_path / "second"
    save(guest("choose"), ptender, first, "copies by")
    add(first, NONE_HAS)
    command = [str(PTENDER), "--cpu=soft", f"--restore={first}", f"--snapshots={tmp_path}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_until_asleep(process.pid)
        done = ptender("snapshot", process.pid, second, "--stop")
        assert done.returncode == 0, done
    assert known(first) <= known(second)


def test_a_guest_that_never_looks_at_cpuid_needs_nothing(
    guest: Build, ptender: Run, cpu: str, tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    save(guest("sleep"), ptender, path, "heap")
    assert known(path) == frozenset()
