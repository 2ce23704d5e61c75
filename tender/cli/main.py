"""The command: arguments -> Config -> exit status.

The rule here: only this file prints for people and ends the process.
"""

from __future__ import annotations

import gc
import os
import sys

from tender import __version__
from tender.cli import commandline
from tender.dataclass import replace
from tender.errors import (
    EXIT_FAILURE,
    DeviceError,
    HostError,
    TenderError,
    UsageError,
    bug_text,
    one_line,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.cli.commandline import CommandLine
    from tender.config import Config
    from tender.outcome import Outcome
    from tender.sandbox.sandbox import Sandbox

SIGINT = 2


def main(argv: list[str] | None = None) -> int:
    """The command `ptender`, and by other names `solo5-hvt` and `solo5-spt`; the exit status.

    After a guest has run, this process is confined: it can end by os._exit(), and do little else.
    """
    _fill_standard_descriptors()
    arguments = sys.argv if argv is None else argv
    program = os.path.basename(arguments[0])
    if program == "ptender-oci":
        from tender.cli import oci

        return oci.main(arguments)
    try:
        return _main(program, arguments[1:])
    except TenderError as error:
        _log(program, str(error))
        return _status(program, error, arguments[1:])
    except KeyboardInterrupt:
        _log(program, f"Exiting on signal {SIGINT}")
        return EXIT_FAILURE


def _main(program: str, arguments: list[str]) -> int:
    is_solo5 = commandline.is_solo5_name(
        program
    )  # which has no commands: `inspect` is a kernel there
    command = arguments[0] if arguments and not is_solo5 else ""
    if command in _TOOLS:
        return _tool(command, arguments[1:])
    if command == "run":
        raise UsageError(
            f"there is no command `run': type {program} [OPTIONS] KERNEL [ARGS] "
            "(a kernel of that name is ./run)"
        )
    line = commandline.parse(arguments)
    if is_solo5 and line.config:
        line = replace(line, config=replace(line.config, target=commandline.solo5_target(program)))
    if line.help or command == "help":
        return _help(program)
    if line.version or command == "version":
        return _version(program)
    if line.config and line.config.kernel == "demo" and not is_solo5:
        if line.config.args[:1] in (("--help",), ("-h",)):
            from tender.cli import usage

            return show(usage.DEMO_USAGE.format(program=program))
        line = commandline.with_demo(line)
    return _run(program, line, arguments)


_TOOLS = ("inspect", "policy", "build", "image", "trace", "ps", "stats", "metrics")


def _tool(name: str, arguments: list[str]) -> int:
    from importlib import import_module

    output = import_module(f"tender.cli.{name}").main(arguments)
    return 0 if output is None else show(output)


def _run(program: str, line: CommandLine, arguments: list[str]) -> int:
    from tender import machine
    from tender.host import set_guest_title
    from tender.stop import Stop, default_signals, on_termination_signals

    if line.config is None:
        raise UsageError(f"Missing KERNEL operand; see {program} --help")
    on_termination_signals(interrupt=True)
    set_guest_title(program, line.config, arguments)
    config = line.config
    if "NOTIFY_SOCKET" in os.environ:
        config = replace(config, notify=os.environ["NOTIFY_SOCKET"])
    sandbox = _sandbox(program, config)
    logged = sandbox if line.verbose else None
    try:
        outcome = machine.run(
            config,
            Stop(),
            lambda text: _log(program, text),
            sandbox,
            started=lambda notice: _started(program, logged, notice),
            publish=True,
        )
        return _report(program, line.verbose, outcome)
    except DeviceError as error:
        misplaced = commandline.first_option(line.config.args)
        if misplaced is None:
            raise
        raise DeviceError(
            f"{error} ({misplaced} comes after the kernel, so it is the guest's: put it before)"
        ) from None
    except Exception as error:
        if isinstance(error, TenderError) or not (sandbox and sandbox.entered):
            raise
        for text in bug_text(error).split("\n"):
            _log(program, text)
        return EXIT_FAILURE
    finally:
        if not (sandbox and sandbox.entered):
            default_signals()


def _started(program: str, sandbox: Sandbox | None, notice: str) -> None:
    """Log the notice on the CPU and the layers of the sandbox, and keep the garbage collector off
    what exists by now."""
    if notice:
        _log(program, notice)
    if sandbox:
        for missing in sandbox.missing_layers:
            _log(program, f"sandbox: no {missing}")
        _log(program, f"sandbox: {', '.join(sandbox.layers)}")
    gc.freeze()
    gc.enable()


def _sandbox(program: str, config: Config) -> Sandbox | None:
    """The sandbox of this process; None: it is off, which prints a warning every time."""
    mode, user = config.sandbox, config.user
    if mode == "off":
        if user is not None:
            raise UsageError(f"--user={user}: no effect with --sandbox=off")
        _log(program, "sandbox: off: a guest that takes over the tender has all of its rights")
        return None
    from tender.sandbox.sandbox import Sandbox

    return Sandbox(mode, user, lambda text: _log(program, text))


def _report(program: str, verbose: bool, outcome: Outcome) -> int:
    if outcome.reason == "stopped":
        _log(program, f"Exiting on signal {outcome.signo}")
    elif outcome.error is not None:
        _log(program, str(outcome.error))
    if outcome.core is not None:
        _log(program, f"dumpcore: dumped guest core to: {outcome.core}")
    if verbose:
        _log(program, f"guest {outcome.reason}, status {outcome.status}")
        for device, counters in outcome.stats.rows():
            numbers = ", ".join(
                f"{value} {name}" for name, value in counters.__dict__.items() if value
            )
            _log(program, f"  {device}: {numbers or 'not used'}")
    return outcome.status


def _status(program: str, error: TenderError, arguments: list[str]) -> int:
    """Solo5's own spelling gets Solo5's own exit status: 1 for everything."""
    if commandline.is_solo5_name(program) or commandline.has_solo5_spelling(arguments):
        return EXIT_FAILURE
    return error.exit_status


def _version(program: str) -> int:
    # solo5-hvt prints it to standard error; albatross reads both.
    text = f"{program} tender, version {__version__}\nABI version 2"
    if commandline.is_solo5_name(program):
        return show(text, fd=2)
    return show(text)


def _help(program: str) -> int:
    from tender.cli import usage

    if commandline.is_solo5_name(program):
        show(usage.text(program), fd=2)
        return EXIT_FAILURE
    return show(usage.text(program, usage.TOOLS))


def show(output: str | bytes, fd: int = 1) -> int:
    """Write text and a newline, or bytes, to standard output; 0. Raises HostError."""
    data = output if isinstance(output, bytes) else f"{output}\n".encode(errors="backslashreplace")
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError as error:
        raise HostError("standard output", "write", error.errno or 0) from None
    return 0


def _fill_standard_descriptors() -> None:
    """Open /dev/null where 0, 1 or 2 is closed: a disk must not become the console."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)


_LOG_TRIES, _LOG_WAIT_MS = 10, 10
_LOG_MAX = 4000  # bytes that fit into a pipe that has room at all


def _log(program: str, text: str) -> None:
    """Write one line to standard error; it is dropped where nobody reads it within 100 ms."""
    from tender._native import lib

    data = f"{program}: {one_line(text)}".encode(errors="surrogateescape")[:_LOG_MAX] + b"\n"
    for _ in range(_LOG_TRIES):
        if lib.host_events(2, lib.POLLOUT, _LOG_WAIT_MS) > 0:
            lib.host_write(2, data, len(data))
            return
