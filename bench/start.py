"""Start to exit, as a command."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns

from bench import standin
from bench.results import Result, Target
from bench.rows import Row, in_turn
from bench.session import HELLO, Session, Unavailable
from bench.standin import Scenario
from bench.tenders import Tender, environment

RATIO = 2.0
PAIRS = 3  # times as many as for other rows: a start is short, and scheduling delays are not


def spawn_ms(command: list[str], env: dict[str, str]) -> float:
    """The time from starting a command to its end, its output to /dev/null."""
    null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    begin = perf_counter_ns()
    pid = os.posix_spawn(command[0], command, env, file_actions=null)
    _, status = os.waitpid(pid, 0)
    elapsed_ns = perf_counter_ns() - begin
    if status:
        raise Unavailable(f"{' '.join(command)}: status {os.waitstatus_to_exitcode(status)}")
    return elapsed_ns / 1e6


def _targets(session: Session) -> dict[str, Target]:
    return {tender.name: Target(ratio=RATIO) for tender in session.tenders if tender.engine}


def measure_hello(session: Session) -> list[Result]:
    def one(tender: Tender) -> float:
        return spawn_ms(tender.command_line(HELLO), environment())

    for tender in session.tenders:
        one(tender)  # files into the page cache
    samples = in_turn(session.tenders, session.pairs * PAIRS, one)
    return [Result("hello", "ms", samples, _targets(session))]


def measure_bare(session: Session) -> list[Result]:
    """The same with a guest that halts at its first exit: the tender's own part."""
    library, result = standin.build(session.folder), standin.new_result(session.folder)
    env = Scenario("HALT").environment(library, result)

    def one(tender: Tender) -> float:
        return spawn_ms(tender.command_line(HELLO), env)

    samples = in_turn(session.on_kvm, session.pairs * PAIRS, one)
    return [Result("hello-bare", "ms", samples)]


@dataclass(frozen=True)
class Imports:
    """What a plain run imports: modules with their own time in microseconds."""

    modules: dict[str, int]

    @property
    def total_ms(self) -> float:
        return sum(self.modules.values()) / 1000

    def slowest(self, count: int) -> list[tuple[str, int]]:
        return sorted(self.modules.items(), key=lambda item: -item[1])[:count]


def imports_of(tender: Tender) -> Imports:
    """`-X importtime` on a run of the hello guest."""
    command = tender.command_line(HELLO)
    with open(command[0]) as script:
        first = script.readline()
    if not first.startswith("#!") or "python" not in first:
        raise Unavailable(f"{command[0]}: not a script of Python")
    interpreter = first[2:].split()
    done = subprocess.run(
        [*interpreter, "-X", "importtime", *command],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    return Imports(dict(import_lines(done.stderr)))


def import_lines(text: str) -> list[tuple[str, int]]:
    """The modules in what `-X importtime` prints, with their own time in microseconds."""
    rows = [line.removeprefix("import time:").split("|") for line in text.splitlines()]
    return [
        (name.strip(), int(own)) for own, _, name in (r for r in rows if len(r) == 3)
        if own.strip().isdigit()
    ]  # fmt: skip


def report_imports(ptender: Path, tender: Tender) -> str:
    imports = imports_of(tender)
    lines = [
        f"{ptender} imports {len(imports.modules)} modules in {imports.total_ms:.1f} ms "
        "(measured, and so slowed, by -X importtime)"
    ]
    lines += [f"  {own / 1000:6.2f} ms  {name}" for name, own in imports.slowest(15)]
    return "\n".join(lines)


ROWS = [
    Row("hello", "start to exit of the hello guest", measure_hello),
    Row("hello-bare", "the same, with a guest that halts at once (stand-in)", measure_bare),
]
