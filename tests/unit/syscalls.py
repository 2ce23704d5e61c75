"""Run as a program: make system calls under a filter, each in a process of its own.

Reads JSON: {"filter": hex, "cases": [[number, argument, ...], ...]}; writes for each case "went"
(the call came back, or waited, or ended the process by itself), or the name of the signal that
killed it, which for a call that is not allowed is SIGSYS.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys

from tender._native import lib
from tender.sandbox import confine, seccomp

WAIT_S = 0.2  # for a call that is allowed and blocks


def attempt(compiled: bytes, number: int, arguments: list[int], came_back: mmap.mmap) -> str:
    came_back[0] = 0
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, WAIT_S)
        confine.no_new_privileges()
        five = [each & (1 << 64) - 1 for each in (*arguments, 0, 0, 0, 0, 0)][:5]
        seccomp.install(compiled)
        lib.sandbox_call(number, *five)
        came_back[0] = 1
        os._exit(0)  # which not every policy allows
    _, status = os.waitpid(pid, 0)
    if came_back[0] or os.WIFEXITED(status):
        return "went"
    signo = os.WTERMSIG(status)
    return "went" if signo == signal.SIGALRM else signal.Signals(signo).name


def main() -> None:
    task = json.load(sys.stdin)
    compiled = bytes.fromhex(task["filter"])
    came_back = mmap.mmap(-1, 4096)
    os.closerange(3, 100)  # what a policy calls a descriptor is none here: EBADF
    results = [attempt(compiled, case[0], case[1:], came_back) for case in task["cases"]]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
