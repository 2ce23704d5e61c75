"""Waiting for what a test needs: a condition, a process that sleeps, a pipe that is full.

The rule here: no test sleeps and then takes it that something has happened, and none looks at
processes that are not its own.
"""

from __future__ import annotations

import array
import fcntl
import os
import signal
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATIENCE_S = 300  # only what hangs takes that long, on any machine


def wait_until(condition: Callable[[], object]) -> None:
    """Return once the condition holds; fail where it never does."""
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit, "this has not happened"
        time.sleep(0.01)


def state_of(pid: int) -> str:
    """The state of a process's main thread, a letter of proc_pid_stat(5); "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def wait_until_asleep(pid: int) -> None:
    """Return once the process, and its children, wait for something in the kernel.

    While the native CPU's guest computes, its tender sleeps: so both have to, at one time.
    """

    def is_asleep() -> bool:
        sleep = _sleep_of(pid)
        return bool(sleep) and all(map(_sleep_of, children(pid))) and _sleep_of(pid) == sleep

    wait_until(lambda: is_asleep() or not state_of(pid))
    assert state_of(pid), "it has ended"


def _sleep_of(pid: int) -> str:
    """Which of its sleeps a process is in; "" where it is in none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    counts = [line for line in status.splitlines() if "ctxt_switches" in line]
    return f"{pid} {counts}" if state_of(pid) == "S" else ""


def unread(fd: int) -> int:
    """The bytes in a pipe or a stream socket that nobody has read yet."""
    size = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, size)
    return size[0]


def wait_until_blocked(pid: int, fd: int) -> None:
    """Return once the process has filled the pipe whose other end is `fd`, and waits for room."""
    room = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    wait_until(lambda: unread(fd) > room // 2 and state_of(pid) in ("S", ""))
    assert state_of(pid), "it has ended"


def children(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids = list(map(int, task.read_text().split()))
        except (FileNotFoundError, ProcessLookupError):
            continue
        for each in pids:
            found += [each, *children(each)]
    return found


def marked(variable: str, value: str) -> list[int]:
    """The processes that began with this variable in their environment, zombies among them."""
    wanted = f"{variable}={value}".encode()
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and wanted in Path(f"/proc/{entry}/environ").read_bytes():
                found.append(int(entry))
        except OSError:
            continue
    return found


def kill(pid: int) -> None:
    """SIGKILL, where there is such a process and it is ours."""
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def command_lines() -> Iterator[tuple[int, str]]:
    """The PID and the words of each process that runs; zombies have none."""
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit():
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                yield int(entry), os.fsdecode(b" ".join(words))
        except (FileNotFoundError, ProcessLookupError):
            continue
