#!/usr/bin/env python3
"""Run a command in an emulated AMD machine that has a true KVM, over this machine's own file tree.

The rule here: what the command would show and return here, it shows and returns there; statuses
from 124 on are ours, with the meanings they have for `timeout` and the shell.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

# We are started as a file and checked as a part of `tests`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.amdv.initramfs import Missing, build_initramfs, find_kernel, read_bootable
from tests.amdv.qemu import Machine, run_machine

PROJECT = Path(__file__).resolve().parents[2]
# Loading hypothesis takes 16 s in the machine, and a test takes twenty times what it takes outside.
FOR_SLOW_MACHINES = ("-p", "no:hypothesispytest", "-o", "timeout=900")
MACHINE_FAILED = 125
NO_SUCH_COMMAND = 127
STATUS_OF_SIGNAL = {
    signal.SIGALRM: 124,  # the timeout
    signal.SIGHUP: 128 + signal.SIGHUP,
    signal.SIGINT: 128 + signal.SIGINT,
    signal.SIGTERM: 128 + signal.SIGTERM,
}


class Stopped(Exception):
    """A signal asks us to end with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def main(argv: Sequence[str]) -> int:
    options = parse_arguments(argv)
    try:
        stop_on_signals(options.timeout)
        return run(options)
    except Stopped as stopped:
        return stopped.status
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except Missing as missing:
        return complain(str(missing), MACHINE_FAILED)


def complain(message: str, status: int) -> int:
    print(f"amdv: {message}", file=sys.stderr)
    return status


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/amdv/run.py")
    add = parser.add_argument
    add("--memory", default="2G", help="half of it is for what the command writes (default: 2G)")
    add("--cpus", type=int, default=1, help="see README.md before you ask for more (default: 1)")
    add("--timeout", type=float, default=0, metavar="SECONDS", help="then end with status 124")
    add("--workdir", type=Path, default=Path.cwd(), metavar="DIR", help="(default: this one)")
    add("--share", type=Path, metavar="DIR", help="a folder whose writes do reach the host")
    add("--verbose", action="store_true", help="show the machine's console and QEMU's words")
    add("command", nargs="*", help="after `--` (default: the guest tests, with this Python)")
    options = parser.parse_args(argv)
    if not options.command:
        guest_tests = str(PROJECT / "tests" / "guest")
        options.command = [sys.executable, "-m", "pytest", *FOR_SLOW_MACHINES, guest_tests]
    for folder in (options.workdir, options.share):
        if folder and not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    program = find_program(options.command[0])
    if program is None:
        parser.exit(NO_SUCH_COMMAND, f"amdv: {options.command[0]}: no such command\n")
    options.command[0] = program
    return options


def find_program(name: str) -> str | None:
    """Looked up here: there, every folder of PATH that does not have it costs a walk over 9p."""
    return name if "/" in name else shutil.which(name)


def stop_on_signals(timeout_s: float) -> None:
    """Turn each signal into `Stopped` wherever we are, even in a blocked write."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(STATUS_OF_SIGNAL[signal.Signals(number)])

    for number in STATUS_OF_SIGNAL:
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)


def run(options: argparse.Namespace) -> int:
    kernel = find_kernel()
    share = options.share.resolve() if options.share else None
    script = command_script(options.command, options.workdir.resolve(), os.environ)
    machine = Machine(
        kernel=read_bootable(kernel.image),
        initramfs=build_initramfs(kernel, script, share),
        memory=options.memory,
        cpus=options.cpus,
        share=share,
    )
    end = run_machine(machine, show_console=options.verbose)
    if end.status is not None:
        return end.status
    os.write(2, end.console)
    return complain("the machine ended before the command did", MACHINE_FAILED)


def command_script(command: Sequence[str], workdir: Path, environment: Mapping[str, str]) -> bytes:
    """The shell text that runs the command there as it would be run here."""
    words = [f"{name}={value}" for name, value in {**environment, "AMDV": "1"}.items()]
    go_there = shlex.join(["cd", str(workdir)])
    return os.fsencode(f"{go_there} && exec {shlex.join(['env', '-i', *words, *command])}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
