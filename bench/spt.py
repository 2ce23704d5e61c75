"""Guests for Solo5's spt target, beside the solo5-spt that SOLO5_SPT names.

All of them run the same image. Memory is PSS of the whole process, so the pages that the guest has
touched are in it. CPU time is that of all processes, a program's servers included.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench.memory import pss_kib, sleeping
from bench.results import Result, Target
from bench.rows import Row, in_turn
from bench.session import BINDINGS, Session
from bench.start import spawn_ms
from bench.tenders import Tender, environment, installed
from tender import Guest

REFERENCE, OURS = "solo5-spt", "ptender"
MEMORY_RATIO = 0.5
PROGRAM_MS = 6.0  # of CPU time
GUESTS = 50  # of a program, in a row
PAIRS = 3


def _tenders() -> list[Tender]:
    path = os.environ.get("SOLO5_SPT")
    found = [Tender(REFERENCE, (str(Path(path).resolve()),), None)] if path else []
    return [*found, Tender(OURS, (str(installed()),), "c")]


def image(session: Session, name: str) -> Path:
    """A guest of guest-bindings/ for spt, built once."""
    output = session.folder / f"{name}.spt"
    if not output.exists():
        folder = "samples" if (BINDINGS / "samples" / f"{name}.c").exists() else "tests"
        source = BINDINGS / folder / f"{name}.c"
        words = ["build", str(source), "--target", "spt", "-o", str(output)]
        subprocess.run([str(installed()), *words], check=True)
    return output


def measure_hello(session: Session) -> list[Result]:
    kernel = image(session, "hello")

    def one(tender: Tender) -> float:
        return spawn_ms(tender.command_line(kernel), environment())

    for tender in _tenders():
        one(tender)
    samples = in_turn(_tenders(), session.pairs * PAIRS, one)
    return [Result("spt-hello", "ms", samples, reference=REFERENCE)]


def measure_memory(count: int, session: Session) -> list[Result]:
    kernel = image(session, "sleep")
    count = min(count, 10) if session.quick else count

    def one(tender: Tender) -> float:
        with ExitStack() as stack:
            pids = [stack.enter_context(sleeping(tender, kernel)) for _ in range(count)]
            for pid in pids:
                _wait_until_asleep(pid)
            return sum(pss_kib(pid) for pid in pids) / count

    samples = in_turn(_tenders(), min(session.pairs, 3), one)
    targets = {OURS: Target(ratio=MEMORY_RATIO)}
    note = "per guest, the pages that it has touched included"
    name = f"spt-memory-{count}"
    return [Result(name, "KiB", samples, targets, note=note, reference=REFERENCE)]


def _wait_until_asleep(pid: int) -> None:
    stat = Path(f"/proc/{pid}/stat")
    while stat.read_text().rpartition(") ")[2][0] != "S":
        time.sleep(0.01)


def measure_program(session: Session) -> list[Result]:
    kernel = image(session, "hello")

    def run() -> None:
        with Guest(kernel, mem_mib=512) as guest:
            guest.wait(60)

    run()
    samples = []
    for _ in range(session.pairs):
        before = _cpu_ticks(os.getpid())
        for _ in range(GUESTS):
            run()
        ticks = _cpu_ticks(os.getpid()) - before
        samples.append(1000 * ticks / os.sysconf("SC_CLK_TCK") / GUESTS)
    note = "CPU time per guest from making a Guest to its outcome, all processes"
    return [
        Result("spt-program", "ms", {OURS: samples}, {OURS: Target(value=PROGRAM_MS)}, note=note)
    ]


def _cpu_ticks(pid: int) -> int:
    """CPU time of a process and of all its children, those that have ended included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").glob("*/children")
            for child in re.findall(r"\d+", task.read_text())
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(map(int, fields[11:15])) + sum(map(_cpu_ticks, children))


ROWS = [
    Row("spt-hello", "start to exit of an spt guest", measure_hello),
    Row("spt-memory-1", "memory of one spt guest", partial(measure_memory, 1)),
    Row("spt-memory-200", "memory of each of 200 spt guests", partial(measure_memory, 200)),
    Row("spt-program", "an spt guest of a program", measure_program),
]
