"""What ./quickstart and ./check install, as its user finds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_a_program_elsewhere_is_type_checked_with_ours(tmp_path: Path) -> None:
    """mypy finds the package where nothing of it is run, as editors do."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    program = tmp_path / "program.py"
    program.write_text(
        "from tender import Guest\n"
        "def status(path: str) -> int:\n"
        "    with Guest(path) as guest:\n"
        "        return guest.wait().status\n"
    )
    words = [sys.executable, "-m", "mypy", "--strict", program.name]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "Success: no issues found in 1 source file\n"
    program.write_text("from tender import Guest\nGuest('k', mem_mib='much')\n")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert 'Argument "mem_mib" to "Guest" has incompatible type' in done.stdout


def test_the_other_folders_of_a_checkout_are_not_importable_elsewhere(tmp_path: Path) -> None:
    code = "import tender, tender.seccomp, tender.guest_bindings, bench"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "No module named 'bench'" in done.stderr
