"""The manual page and the completions: of today's options, and taken by what reads them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SHARE = Path(__file__).parents[2] / "share"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("pages", SHARE / "pages.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pages = load()


@pytest.mark.parametrize("name", pages.PAGES)
def test_a_page_is_of_these_options(name: str) -> None:
    page = (SHARE / name).read_text()
    assert page == pages.PAGES[name](), "run: .venv/bin/python share/pages.py"


def test_man_reads_the_page() -> None:
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed")
    command = [groff, "-man", "-Tutf8", "-ww", "-z", str(SHARE / "ptender.1")]
    assert subprocess.run(command, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cp"], "--cpu"),
        (["--cpu", "k"], "kvm"),
        (["--cpu", "=", "s"], "soft"),
        (["ins"], "inspect"),
        (["--trace", "kernel"], "kernel.hvt"),
        (["kern"], "kernel.hvt"),
        (["--mem", ""], ""),
    ],
)
def test_bash_completes(tmp_path: Path, words: list[str], expected: str) -> None:
    (tmp_path / "kernel.hvt").touch()
    script = f"""
    . {SHARE}/ptender.bash
    COMP_WORDS=(ptender "$@") COMP_CWORD=$#
    _ptender
    echo "${{COMPREPLY[*]}}"
    """
    command = ["bash", "-c", script, "bash", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
