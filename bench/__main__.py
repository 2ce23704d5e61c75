"""`python -m bench`: measure, print a table, write a plot and JSON.

The exit status says whether the bench could run, not how fast anything was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

if find_spec("tender") is None:
    sys.exit("bench: ptender is not installed: pip install '.[bench]' in its checkout")

from bench import (
    against,
    container,
    cpus,
    datapath,
    disk,
    hypercalls,
    memory,
    network,
    program,
    report,
    snapshots,
    spt,
    start,
    tenders,
)
from bench.results import Result, Skipped
from bench.rows import Row
from bench.session import Session, Unavailable

PAIRS, QUICK_PAIRS = 7, 3
NO_REFERENCE = "No reference: set SOLO5_HVT to the path of a solo5-hvt to compare with."
ROWS = [
    *hypercalls.ROWS,
    *disk.ROWS,
    *start.ROWS,
    *program.ROWS,
    *snapshots.ROWS,
    *network.ROWS,
    *datapath.ROWS,
    *memory.ROWS,
    *cpus.ROWS,
    *spt.ROWS,
    *container.ROWS,
]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure ptender and, in turn with it, the tenders that the environment "
        "variables SOLO5_HVT and SOLO5_SPT name.",
    )
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument(
        "--only", default="*", metavar="ROW,...", help="only these rows; * and ? are wildcards"
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs and guests")
    parser.add_argument("--pairs", type=int, metavar="N", help=f"default {PAIRS}")
    parser.add_argument(
        "--engine",
        choices=tenders.ENGINES,
        help="only this engine of ptender, where it has more than one (default: each)",
    )
    parser.add_argument(
        "--against",
        metavar="REV",
        help="compare this build with that of another revision, in turn; the references are not "
        f"measured, and a ratio above {against.SLOWER} is `missed'",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument(
        "--markdown",
        metavar="FILE",
        help="put the table between the markers of FILE (- prints it) and the picture beside it, "
        "as of docs/performance.md",
    )
    parser.add_argument("--imports", action="store_true", help="show what a plain run imports")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).with_name("results"),
        metavar="DIR",
        help="where the plot and the JSON go (default: bench/results)",
    )
    parser.add_argument("--ptender", type=Path, default=tenders.installed(), metavar="PATH")
    return parser.parse_args(arguments)


def _chosen(patterns: str) -> list[Row]:
    chosen: list[Row] = []
    for pattern in patterns.split(","):
        matching = [row for row in ROWS if fnmatch(row.name, pattern)]
        if not matching:
            names = ", ".join(row.name for row in ROWS)
            raise SystemExit(f"bench: --only: there is no row {pattern!r}; rows: {names}")
        chosen += [row for row in matching if row not in chosen]
    return chosen


def _machine(found: list[tenders.Tender]) -> dict[str, str]:
    with open("/proc/cpuinfo") as lines:
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "CPU": f"{models[0] if models else platform.machine()}, {os.cpu_count()} of them",
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "load before": load,
        "tenders": "; ".join(map(tenders.describe, found)),
    }


def _measure(rows: list[Row], session: Session) -> Iterator[report.Found]:
    for row in rows:
        try:
            yield from row.measure(session)
        except (Unavailable, subprocess.TimeoutExpired) as reason:
            yield Skipped(row.name, str(reason))


def _print_imports(options: argparse.Namespace, found: list[tenders.Tender]) -> None:
    for tender in found:
        if tender.engine:
            try:
                print(start.report_imports(options.ptender, tender))
            except Unavailable as reason:
                print(f"{tender.name}: {reason}")


def _write_markdown(file: str, text: str) -> None:
    if file == "-":
        print(text)
        return
    path = Path(file)
    path.write_text(report.insert(path.read_text(), text))


def _draw(results: list[report.Found], path: Path) -> None:
    from bench import plot

    measured = [found for found in results if isinstance(found, Result)]
    if not measured:
        return
    try:
        plot.draw(measured, path)
    except ImportError:
        print("bench: no plot: pip install 'ptender[bench]'", file=sys.stderr)


def _run(options: argparse.Namespace, rows: list[Row], found: list[tenders.Tender]) -> None:
    pairs = options.pairs or (QUICK_PAIRS if options.quick else PAIRS)
    table = not options.json and options.markdown != "-"
    machine = _machine(found)
    results: list[report.Found] = []
    if table:
        print("\n".join([*(f"{name}: {value}" for name, value in machine.items()), ""]))
        print("\n".join(report.header()))
    for result in _results(options, rows, found, pairs):
        results.append(result)
        if table:
            print("\n".join(report.lines(result)), flush=True)
    _write(options, machine, results, table=table)


def _results(
    options: argparse.Namespace, rows: list[Row], found: list[tenders.Tender], pairs: int
) -> Iterator[report.Found]:
    if options.against:
        words = [*(["--quick"] if options.quick else [])]
        words += [f"--engine={options.engine}"] if options.engine else []
        yield from against.measure(rows, against.revision(options.against), pairs, *words)
        return
    session = Session(found, options.ptender, pairs, options.quick)
    try:
        yield from _measure(rows, session)
    finally:
        session.close()


def _command() -> str:
    references = {"SOLO5_HVT": "solo5-hvt", "SOLO5_SPT": "solo5-spt"}
    given = [f"{name}={path}" for name, path in references.items() if os.environ.get(name)]
    return " ".join([*given, shlex.join(["python", "-m", "bench", *sys.argv[1:]])])


def _write(
    options: argparse.Namespace,
    machine: dict[str, str],
    results: list[report.Found],
    *,
    table: bool,
) -> None:
    text = json.dumps(report.as_json(machine, _command(), results), indent=1)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "bench.json").write_text(text + "\n")
    picture = options.results / "bench.png"
    picture.unlink(missing_ok=True)
    _draw(results, picture)
    if options.markdown not in (None, "-") and picture.exists():
        shutil.copy(picture, Path(options.markdown).with_suffix(".png"))
    if options.json:
        print(text)
    if table:
        compared = options.against or os.environ.get("SOLO5_HVT")
        hint = report.LEGEND if compared else NO_REFERENCE
        print(f"\n{hint}\n{options.results}: bench.json, bench.png")
    if options.markdown:
        _write_markdown(options.markdown, report.markdown(machine, _command(), results))


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    rows = _chosen(options.only)
    if options.list:
        print("\n".join(f"{row.name:<16} {row.meaning}" for row in rows))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    engines = [options.engine] if options.engine else list(tenders.ENGINES)
    options.ptender = options.ptender.absolute()
    found = tenders.find_all(options.ptender, engines)
    if options.imports:
        _print_imports(options, found)
        return 0
    _run(options, rows, found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("bench: interrupted")
