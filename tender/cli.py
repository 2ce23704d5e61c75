"""Words -> Config -> exit status.

The rule here: the only place that prints for people and ends the process. Options are Solo5's
(`--net:NAME=TAP`) and, beside them, friendlier ones (`--net TAP`); they end at the first word
without a leading dash, and everything after the kernel is the guest's.
"""

from __future__ import annotations

import os
import sys

from tender import __version__, words
from tender.errors import EXIT_FAILURE, TenderError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.config import Config
    from tender.machine import Outcome

SIGINT = 2


def main(argv: list[str] | None = None) -> int:
    """The command `ptender`, and `solo5-hvt` by another name; the exit status."""
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
    tool = None if words.is_solo5_name(program) else _tool(arguments)
    if tool is not None:
        return tool
    if arguments[:1] == ["demo"] and not words.is_solo5_name(program):
        arguments = [demo_kernel(), *arguments[1:]]
    line = words.parse(arguments)
    if line.help:
        return _help(program)
    if line.version:
        return _version(program)
    if line.config is None:
        raise UsageError(f"Missing KERNEL operand; see {program} --help")
    return _report(program, line.verbose, _run(program, line.config))


def _tool(arguments: list[str]) -> int | None:
    """The commands beside running a guest; None: it is no such command."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name == "inspect":
        from tender import inspect

        return inspect.main(rest)
    if name == "build":
        from tender import build

        return build.main(rest)
    return None


def demo_kernel() -> str:
    """The guest that comes with the package: guest-bindings/samples/hello.c, built."""
    return os.path.join(os.path.dirname(__file__), "guests", "hello-x86_64.hvt")


def _run(program: str, config: Config) -> Outcome:
    from tender import machine
    from tender.stop import Stop, default_signals, on_termination_signals

    on_termination_signals()
    try:
        return machine.run(config, Stop(), lambda text: _say(program, text))
    finally:
        default_signals()


def _report(program: str, verbose: bool, outcome: Outcome) -> int:
    if outcome.reason == "stopped":
        _say(program, f"Exiting on signal {outcome.signo}")
    elif outcome.error is not None:
        _say(program, str(outcome.error))
    if outcome.core is not None:
        _say(program, f"dumpcore: dumped guest core to: {outcome.core}")
    if verbose:
        _say(program, f"guest {outcome.reason}, status {outcome.status}")
        for device, counters in outcome.stats.items():
            numbers = ", ".join(f"{value} {name}" for name, value in counters.items() if value)
            _say(program, f"  {device}: {numbers or 'not used'}")
    return outcome.status


def _status(program: str, error: TenderError, arguments: list[str]) -> int:
    """Solo5's own spelling gets Solo5's own exit status: 1 for everything."""
    if words.is_solo5_name(program) or words.has_solo5_spelling(arguments):
        return EXIT_FAILURE
    return error.exit_status


def _version(program: str) -> int:
    # solo5-hvt prints it to standard error; albatross reads both.
    stream = sys.stderr if words.is_solo5_name(program) else sys.stdout
    print(f"{program} tender, version {__version__}\nABI version 2", file=stream)
    return 0


def _help(program: str) -> int:
    if words.is_solo5_name(program):
        print(words.usage(program), file=sys.stderr)
        return EXIT_FAILURE
    print(words.usage(program))
    return 0


def _say(program: str, text: str) -> None:
    """One line on standard error; where nobody reads it, nothing is lost by going on."""
    try:
        sys.stderr.write(f"{program}: {text}\n")
        sys.stderr.flush()
    except (OSError, AttributeError):
        pass


if __name__ == "__main__":
    sys.exit(main())
