"""The manual page and the completions: of today's options, and taken by what reads them."""

from __future__ import annotations

import importlib.util
import os
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
        (["--gdb", "kern"], "kernel.hvt"),
        (["build", "--n"], ""),
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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--na", ["--name\tthe guest's name for ptender ps, stats and metrics"]),
        ("--sandbox=r", ["--sandbox=require"]),
        ("--gdb kern", ["kernel.hvt"]),
        ("build --n", []),
    ],
)
def test_fish_completes(tmp_path: Path, line: str, expected: list[str]) -> None:
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    (tmp_path / "kernel.hvt").touch()
    script = f"source {SHARE}/ptender.fish; complete -C 'ptender {line}'"
    done = subprocess.run(
        ["fish", "-c", script], cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = done.stdout.splitlines()
    assert len(found) == len(expected)
    for shown, wanted in zip(found, expected, strict=True):
        assert shown.startswith(wanted)


def test_zsh_reads_the_completion(tmp_path: Path) -> None:
    """It makes of it what _arguments gets: no word is cut at an apostrophe or a colon."""
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    script = f'_arguments() {{ print -rl -- "$@" }}; . {SHARE}/_ptender'
    done = subprocess.run(["zsh", "-fc", script], capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert (words[0], words[-1], done.stderr) == ("-S", "*::argument:_files", "")
    assert "*--name=[the guest's name for ptender ps, stats and metrics]:value:" in words
    shown = {word.partition("[")[0].strip("*=-") for word in words[1:-2]}
    assert shown == {option.name.strip("-") for option in pages._options()}
