"""What ./quickstart and ./check install, as its user finds it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    "project", [False, True], ids=["a package", "what a project is built with"]
)
def test_a_package_index_that_is_not_reached_is_told(tmp_path: Path, project: bool) -> None:
    """pip's own last words would be that a subprocess exited with an error."""
    (tmp_path / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['no-such-package-here']\n"
    )
    wanted = "." if project else "no-such-package-here"
    pip = f"{sys.executable} -m pip install --target there {wanted}"
    script = f"program=quickstart; . {ROOT}/.ci/setup.sh; logged 'pip install' {pip}"
    no_index = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "1"}  # nobody listens there
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**plain, **no_index, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "quickstart: pip install failed: pip could not reach its package index "
    )
    assert "no-such-package-here (all of it: " in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_first_guest_of_quickstart_leaves_the_names_of_the_readme() -> None:
    """README's sessions begin with a new disk.img, in the same folder."""
    used = set(re.findall(r"[\w./-]+\.(?:img|hvt)", (ROOT / "quickstart").read_text()))
    assert used == {"build/first.img", "build/first.hvt"}
    assert not used & set(re.findall(r"[\w./-]+\.(?:img|hvt)", (ROOT / "README.md").read_text()))
