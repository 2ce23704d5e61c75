"""Words -> Config -> exit status.

The rule here: the only place that prints for people and ends the process. Options are Solo5's
(`--net:NAME=TAP`) and, beside them, friendlier ones (`--net TAP`); they end at the first word
without a leading dash, and everything after the kernel is the guest's.
"""

from __future__ import annotations

import gc
import os
import sys

from tender import __version__
from tender.cli import options
from tender.dataclass import replace
from tender.errors import EXIT_FAILURE, HostError, TenderError, UsageError, bug_text, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tender.cli.options import CommandLine
    from tender.config import Config
    from tender.outcome import Outcome
    from tender.sandbox.sandbox import Sandbox

SIGINT = 2


def main(argv: list[str] | None = None) -> int:
    """The command `ptender`, and `solo5-hvt` by another name; the exit status.

    After a guest has run, this process is confined: it can end by os._exit(), and do little else.
    """
    _fill_standard_descriptors()
    arguments = sys.argv if argv is None else argv
    program = os.path.basename(arguments[0])
    try:
        return _main(program, arguments[1:])
    except TenderError as error:
        _say(program, str(error))
        return _status(program, error, arguments[1:])
    except KeyboardInterrupt:
        _say(program, f"Exiting on signal {SIGINT}")
        return EXIT_FAILURE


def _main(program: str, arguments: list[str]) -> int:
    is_solo5 = options.is_solo5_name(program)  # then every first word is a kernel
    command = arguments[0] if arguments and not is_solo5 else ""
    if command in _COMMANDS:
        return _COMMANDS[command](program, arguments[1:])
    line = options.parse(arguments)
    if line.help:
        return _help(program)
    if line.version:
        return _version(program)
    if line.config and line.config.kernel == "demo" and not is_solo5:
        if line.config.args[:1] in (("--help",), ("-h",)):
            return show(options.DEMO_USAGE.format(program=program))
        line = replace(line, config=replace(line.config, kernel=demo_kernel()))
    return _run(program, line)


def _inspect(_: str, arguments: list[str]) -> int:
    from tender.cli import inspect

    return show(inspect.main(arguments))


def _policy(_: str, arguments: list[str]) -> int:
    from tender.cli import policy

    return show(policy.main(arguments))


def _build(_: str, arguments: list[str]) -> int:
    from tender.cli import build

    return build.main(arguments)


def _no_run(program: str, _: list[str]) -> int:
    raise UsageError(
        f"there is no command `run': type {program} [OPTIONS] KERNEL [ARGS] "
        "(a kernel of that name is ./run)"
    )


_COMMANDS: dict[str, Callable[[str, list[str]], int]] = {
    "inspect": _inspect,
    "policy": _policy,
    "build": _build,
    "help": lambda program, _: _help(program),
    "version": lambda program, _: _version(program),
    "run": _no_run,
}


def demo_kernel() -> str:
    """guest-bindings/samples/hello.c, built."""
    return os.path.join(os.path.dirname(os.path.dirname(__file__)), "guests", "hello-x86_64.hvt")


def _run(program: str, line: CommandLine) -> int:
    from tender import machine
    from tender.stop import Stop, default_signals, on_termination_signals

    if line.config is None:
        raise UsageError(f"Missing KERNEL operand; see {program} --help")
    on_termination_signals()
    sandbox = _sandbox(program, line.config)
    logged = sandbox if line.verbose else None
    try:
        outcome = machine.run(
            line.config,
            Stop(),
            lambda text: _say(program, text),
            sandbox,
            started=lambda: _started(program, logged),
        )
        return _report(program, line.verbose, outcome)
    except Exception as error:
        if isinstance(error, TenderError) or not (sandbox and sandbox.entered):
            raise
        for text in bug_text(error).split("\n"):
            _say(program, text)
        return EXIT_FAILURE
    finally:
        if not (sandbox and sandbox.entered):
            default_signals()


def _started(program: str, sandbox: Sandbox | None) -> None:
    """Log the layers of the sandbox, and keep the garbage collector off what exists by now."""
    if sandbox:
        for missing in sandbox.missing_layers:
            _say(program, f"sandbox: no {missing}")
        _say(program, f"sandbox: {', '.join(sandbox.layers)}")
    gc.freeze()
    gc.enable()


def _sandbox(program: str, config: Config) -> Sandbox | None:
    """The sandbox of this process; None: it is off, which prints a warning every time."""
    mode, user = config.sandbox, config.user
    if mode == "off":
        if user is not None:
            raise UsageError(f"--user={user}: no effect with --sandbox=off")
        _say(program, "sandbox: off: a guest that takes over the tender has all of its rights")
        return None
    from tender.sandbox.sandbox import Sandbox

    return Sandbox(mode, user, lambda text: _say(program, text))


def _report(program: str, verbose: bool, outcome: Outcome) -> int:
    if outcome.reason == "stopped":
        _say(program, f"Exiting on signal {outcome.signo}")
    elif outcome.error is not None:
        _say(program, str(outcome.error))
    if outcome.core is not None:
        _say(program, f"dumpcore: dumped guest core to: {outcome.core}")
    if verbose:
        _say(program, f"guest {outcome.reason}, status {outcome.status}")
        for device, counters in outcome.stats.rows():
            numbers = ", ".join(
                f"{value} {name}" for name, value in counters.__dict__.items() if value
            )
            _say(program, f"  {device}: {numbers or 'not used'}")
    return outcome.status


def _status(program: str, error: TenderError, arguments: list[str]) -> int:
    """Solo5's own spelling gets Solo5's own exit status: 1 for everything."""
    if options.is_solo5_name(program) or options.has_solo5_spelling(arguments):
        return EXIT_FAILURE
    return error.exit_status


def _version(program: str) -> int:
    # solo5-hvt prints it to standard error; albatross reads both.
    text = f"{program} tender, version {__version__}\nABI version 2"
    if options.is_solo5_name(program):
        print(text, file=sys.stderr)
        return 0
    return show(text)


def _help(program: str) -> int:
    if options.is_solo5_name(program):
        print(options.usage(program), file=sys.stderr)
        return EXIT_FAILURE
    return show(options.usage(program))


def show(output: str | bytes) -> int:
    """Write text and a newline, or bytes, to standard output; raises HostError."""
    data = output if isinstance(output, bytes) else f"{output}\n".encode(errors="backslashreplace")
    try:
        while data:
            data = data[os.write(1, data) :]
    except OSError as error:
        raise HostError("standard output", "write", error.errno or 0) from None
    return 0


def _fill_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed, put nothing there: a disk must not be opened as the console."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)


SAY_TRIES, SAY_WAIT_MS = 10, 10
SAY_MAX = 4000  # bytes that fit into a pipe that has room at all


def _say(program: str, text: str) -> None:
    """One line on standard error, within 100 ms: where nobody takes it, it is lost."""
    from tender._host import lib

    data = f"{program}: {one_line(text)}".encode(errors="surrogateescape")[:SAY_MAX] + b"\n"
    for _ in range(SAY_TRIES):
        if lib.host_events(2, lib.POLLOUT, SAY_WAIT_MS) > 0:
            lib.host_write(2, data, len(data))
            return


if __name__ == "__main__":
    os._exit(main())
