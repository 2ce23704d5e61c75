"""Two builds of ptender beside each other: this one, and that of another revision (`--against`).

Each sample of a row is a run of this bench by the Python of one build, and builds take turns (A B
A B ...), so a row needs to know nothing of it, and those whose program is the bench work, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import Result, Skipped, Target
from bench.rows import Row

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build/against"  # an environment for each commit
SLOWER = 1.1  # the ratio that counts as a regression


def revision(name: str) -> str:
    """The commit of a revision; SystemExit where there is none."""
    words = ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench: --against: {name} is no revision of {ROOT}")
    return done.stdout.strip()


def build(commit: str) -> Path:
    """The Python of an environment with that commit, made once."""
    folder = KEPT / commit
    python, finished = folder / "bin/python", folder / "finished"
    if finished.exists():
        return python
    print(f"bench: building {commit[:12]} in {folder}", file=sys.stderr)
    _run(sys.executable, "-m", "venv", "--clear", folder)
    sources = folder / "sources"
    sources.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x"], cwd=sources, input=archive.stdout, check=True)
    _run(python, "-m", "pip", "install", "--quiet", f"{sources}[tap,soft]")
    finished.touch()
    return python


def _run(*words: object) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench: {words[0]}: {(done.stderr or done.stdout).strip()}")


def measure(rows: list[Row], commit: str, pairs: int, *options: str) -> Iterator[Result | Skipped]:
    """The results of each row, one for each tender of ptender's: this build and the other."""
    other = commit[:12]
    pythons = {other: build(commit), "this": Path(sys.executable)}
    for row in rows:
        turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in pythons}
        for _ in range(pairs):
            for name, python in pythons.items():
                turns[name].append(_sample(python, row, options))
        yield from joined(other, turns)


def _sample(python: Path, row: Row, options: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of one run of the bench, as JSON has them."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SOLO5_")}
    words = [python, "-m", "bench", "--only", row.name, "--pairs", "1", "--json", *options]
    results = KEPT / f"{os.getpid()}.json"
    try:
        done = subprocess.run(
            [*map(str, words), "--results", str(results)],
            cwd=ROOT,
            env=plain,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            why = (done.stderr or done.stdout).strip().splitlines()
            return [{"name": row.name, "skipped": why[-1] if why else "the bench has failed"}]
        found: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
        return found
    finally:
        for each in results.glob("*"):
            each.unlink()
        if results.exists():
            results.rmdir()


def joined(other: str, turns: dict[str, list[list[dict[str, Any]]]]) -> Iterator[Result | Skipped]:
    """The turns of one row, by build, as results: the n-th turns of two builds are a pair."""
    first = turns["this"][0]
    for each in first:
        name = each["name"]
        for tender in each.get("tenders", {}):
            samples = {
                build: [_value(turn, name, tender) for turn in found]
                for build, found in turns.items()
            }
            missing = [build for build, values in samples.items() if None in values]
            label = f"this: {tender.removeprefix('ptender ')}"
            if missing:
                yield Skipped(name, f"{tender}: {missing[0]} has no such row")
                continue
            yield Result(
                name,
                each["unit"],
                {other: samples[other], label: samples["this"]},  # type: ignore[dict-item]
                {label: Target(ratio=SLOWER)},
                more_is_better=each["more_is_better"],
                reference=other,
            )
        if "skipped" in each:
            yield Skipped(name, each["skipped"])


def _value(turn: list[dict[str, Any]], name: str, tender: str) -> float | None:
    for row in turn:
        if row["name"] == name and tender in row.get("tenders", {}):
            return float(median(row["tenders"][tender]["samples"]))
    return None
