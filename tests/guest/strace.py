"""What a sandboxed tender asks of the kernel, as strace sees it.

The rule here: only what a thread does after lockdown counts, from the moment its filter is in
place to its end; names are strace's, arguments are the numbers in the registers.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tender.cli.policy import Shown
from tender.sandbox.policy import Entry, Rule
from tests.waiting import PATIENCE_S, children

STRACE = ["strace", "-f", "-qq", "-X", "raw", "-e", "raw=all"]
# The length of an int is unsigned to strace, and a filter takes its low half anyway.
CALL = re.compile(r"^(\d+) +(\w+)\(([^)]*?)(?:\)| <unfinished)")
INSTALL, SET_FILTER = "seccomp", 1

Call = tuple[str, tuple[int, ...]]
Until = Callable[[subprocess.Popen[str]], None]


def parse(trace: str) -> dict[str, list[Call]]:
    """The calls of each thread after it took on its filter, in order."""
    behind: dict[str, list[Call]] = {}
    for line in trace.splitlines():
        match = CALL.match(line)
        if match is None:
            continue
        thread, name, text = match.groups()
        arguments = tuple(int(word, 0) for word in text.split(", ") if word)
        if thread in behind:
            behind[thread].append((name, arguments))
        elif name == INSTALL and arguments[0] == SET_FILTER and arguments[2]:  # no trial of its
            behind[thread] = []
    return behind


def traced(
    folder: Path, words: list[str], until: Until | None = None, **options: object
) -> tuple[subprocess.CompletedProcess[str], dict[str, list[Call]]]:
    """Run a command to its end under strace: how it ended, and the calls of its threads.

    With `until` it gets SIGTERM once that has returned.
    """
    output = folder / "strace"
    output.unlink(missing_ok=True)
    command = [*STRACE, "-o", str(output), *words]
    settings: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **(settings | options)) as process:  # type: ignore[call-overload]
        try:
            if until is not None:
                until(process)
                os.kill(children(process.pid)[0], signal.SIGTERM)
            texts = process.communicate(timeout=PATIENCE_S)
        finally:  # strace alone would leave them to run on
            for pid in children(process.pid) if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
    done = subprocess.CompletedProcess(command, process.returncode, *texts)
    return done, parse(output.read_text())


def says(text: str) -> Until:
    """Until the command has printed this."""

    def until(process: subprocess.Popen[str]) -> None:
        assert process.stdout
        assert any(text in line for line in process.stdout), "it has ended"

    return until


def used(shown: Shown, threads: dict[str, list[Call]]) -> tuple[set[Entry], list[Call]]:
    """The entries of a policy that were used, and the calls that are in no entry."""
    entries: set[Entry] = set()
    strange = []
    for calls in threads.values():
        rules: list[Rule] = shown.ring if shown.ring and is_ring(calls) else shown.main
        for name, given in calls:
            arguments = (os.getpid(), *given[1:]) if name == "tgkill" else given  # as PID is here
            found = [rule.entry for rule in rules if rule.allows(name, (*arguments, *[0] * 6))]
            entries.update(found[:1])
            if not found:
                strange.append((name, arguments))
    return entries, strange


def is_ring(calls: list[Call]) -> bool:
    """Whether these are of the ring's thread, which runs no guest."""
    return not any(name in ("ioctl", "exit_group") for name, _ in calls)
