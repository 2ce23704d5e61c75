"""What ./quickstart and ./check install, as its user finds it."""

from __future__ import annotations

import os
import re
import shutil
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
    code = "import tender, bench"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "No module named 'bench'" in done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a newcomer has after `git clone`: nothing is compiled."""
    for folder in ("tender", "bench"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / "clone" / folder, ignore=ignored)
    return tmp_path / "clone"


@pytest.fixture
def empty_python(tmp_path: Path) -> str:
    """A Python where nothing is installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    return str(tmp_path / "venv/bin/python")


def run_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


def test_the_bench_measures_what_is_installed(clone: Path, empty_python: str) -> None:
    """The commands of docs/performance.md: the clone's own package would hide the installed one."""
    text = (ROOT / "docs/performance.md").read_text()
    assert "\npip install '.[bench]'\nSOLO5_HVT=/path/to/solo5-hvt python -m bench " in text
    done = run_in(clone, sys.executable, "-m", "bench", "--list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "hello " in done.stdout
    done = run_in(clone, empty_python, "-m", "bench", "--list")
    assert (done.returncode, done.stderr) == (
        1,
        "bench: ptender is not installed: pip install '.[bench]' in its checkout\n",
    )


def test_a_clone_that_is_not_compiled_says_what_to_do(clone: Path, empty_python: str) -> None:
    for python in (sys.executable, empty_python):
        assert run_in(clone, python, "-c", "import tender").stderr == ""
        done = run_in(clone, python, "-c", "from tender import Guest")
        assert done.stderr.splitlines()[-1] == (
            f"ImportError: {clone}/tender is not compiled: run ./quickstart beside it and use "
            ".venv/bin/python; or, where ptender is installed, start Python in another folder: "
            "this one hides it"
        )


def test_the_command_is_found_without_site() -> None:
    """./quickstart's users do not wait for pip's finders of editable packages."""
    if not (ROOT / ".venv/checkout").exists() or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not installed by ./quickstart or ./check")
    code = (ROOT / "bin/start.py").read_text()
    words = [sys.executable, "-ISX", "importtime", "-c", code, "ptender", "--version"]
    done = subprocess.run(words, capture_output=True, text=True)
    imported = [line.rpartition("| ")[2].strip() for line in done.stderr.splitlines()]
    assert "tender.cli.main" in imported
    assert "site" not in imported
    assert not list(Path(sys.prefix).glob("lib/python3*/site-packages/__editable__*ptender*"))


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
