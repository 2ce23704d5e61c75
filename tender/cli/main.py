"""The command: arguments -> Config -> exit status.

The rule here: only this file prints for people and ends the process.
"""

from __future__ import annotations

import gc
import posix as os
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
from tender.host import environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from tender.cli.commandline import CommandLine
    from tender.cli.log import JsonLines
    from tender.config import Config
    from tender.outcome import Outcome
    from tender.sandbox.sandbox import Sandbox

SIGINT = 2
ERROR, WARNING, INFO = 3, 4, 6  # levels of a message, as syslog(3) numbers them


def command() -> NoReturn:
    """The process of a command: `main`, and its end."""
    try:
        status = main()
    except AttributeError as error:
        if "cffi library" not in str(error):
            raise
        sys.exit(f"ptender: {error}: it is compiled of older sources; run ./quickstart once more")
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    # Nothing is left to release; the interpreter's own clean-up takes longer than creating the VM.
    os._exit(status)


def main(argv: list[str] | None = None) -> int:
    """The command `ptender`, and by other names `solo5-hvt` and `solo5-spt`; the exit status.

    After a guest has run, this process is confined: it can end by os._exit(), and do little else.
    """
    _fill_standard_descriptors()
    arguments = sys.argv if argv is None else argv
    program = arguments[0].rpartition("/")[2]
    if program == "ptender-oci":
        from tender.cli import oci
        from tender.host import set_title

        set_title(program, arguments)
        return oci.main(arguments)
    log = Log(program)
    try:
        return _main(program, arguments[1:], log)
    except TenderError as error:
        status = _status(program, error, arguments[1:])
        log.write(ERROR, "error", str(error), status=status)
        return status
    except KeyboardInterrupt:
        log.write(INFO, "signal", f"Exiting on signal {SIGINT}", signal=SIGINT)
        return EXIT_FAILURE


def _main(program: str, arguments: list[str], log: Log) -> int:
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
    return _run(program, line, arguments, log)


_TOOLS = ("inspect", "policy", "build", "image", "trace", "ps", "stats", "snapshot", "metrics")


def _tool(name: str, arguments: list[str]) -> int:
    from importlib import import_module

    from tender.host import set_title

    set_title(f"ptender:{name}", ["ptender", name, *arguments])
    output = import_module(f"tender.cli.{name}").main(arguments)
    return 0 if output is None else show(output)


def _run(program: str, line: CommandLine, arguments: list[str], log: Log) -> int:
    from tender import machine
    from tender.host import set_guest_title
    from tender.stop import Stop, default_signals, on_termination_signals

    if line.config is None:
        raise UsageError(f"Missing KERNEL operand; see {program} --help")
    if line.log == "json":
        log.as_json(line.config)
    on_termination_signals(interrupt=True)
    set_guest_title(program, line.config, arguments)
    config = line.config
    notify = environment("NOTIFY_SOCKET")
    if notify is not None:
        config = replace(config, notify=notify)
    sandbox = _sandbox(config, log)
    logged = sandbox if line.verbose else None
    try:
        outcome = machine.run(
            config,
            Stop(),
            log.warn,
            sandbox,
            started=lambda notice: _started(log, logged, notice),
            publish=True,
        )
        return _report(log, line.verbose, outcome)
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
            log.write(ERROR, "bug", text)
        return EXIT_FAILURE
    finally:
        if not (sandbox and sandbox.entered):
            default_signals()


def _started(log: Log, sandbox: Sandbox | None, notice: str) -> None:
    """Log the notice on the CPU and the layers of the sandbox, and keep the garbage collector off
    what exists by now."""
    if notice:
        log.write(WARNING, "cpu", notice)
    if sandbox:
        for missing in sandbox.missing_layers:
            log.write(WARNING, "sandbox", f"sandbox: no {missing}", missing=missing)
        layers = sandbox.layers
        log.write(INFO, "sandbox", f"sandbox: {', '.join(layers)}", layers=layers)
    gc.freeze()
    gc.enable()


def _sandbox(config: Config, log: Log) -> Sandbox | None:
    """The sandbox of this process; None: it is off, which prints a warning every time."""
    mode, user = config.sandbox, config.user
    if mode == "off":
        if user is not None:
            raise UsageError(f"--user={user}: no effect with --sandbox=off")
        log.warn("sandbox: off: a guest that takes over the tender has all of its rights")
        return None
    from tender.sandbox.sandbox import Sandbox

    return Sandbox(mode, user, log.warn)


def _report(log: Log, verbose: bool, outcome: Outcome) -> int:
    how = {"reason": outcome.reason, "status": outcome.status}
    if outcome.reason == "stopped" and not outcome.signo:
        log.write(INFO, "saved", "the guest was saved, and ends here", **how)
    elif outcome.reason == "stopped":
        log.write(INFO, "signal", f"Exiting on signal {outcome.signo}", signal=outcome.signo, **how)
    elif outcome.error is not None:
        log.write(ERROR, "error", str(outcome.error), **how)
    if outcome.core is not None:
        path = outcome.core
        log.write(INFO, "core", f"dumpcore: dumped guest core to: {path}", path=path)
    if verbose:
        log.write(INFO, "ended", f"guest {outcome.reason}, status {outcome.status}", **how)
        for device, counters in outcome.stats.rows():
            done = {name: value for name, value in counters.__dict__.items() if value}
            numbers = ", ".join(f"{value} {name}" for name, value in done.items())
            log.write(INFO, "device", f"  {device}: {numbers or 'not used'}", device=device, **done)
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


class Log:
    """The messages of the command `program`, each a line of standard error.

    One is dropped where nobody reads it within 100 ms.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._is_journal = _is_journal()
        self._json: JsonLines | None = None

    def as_json(self, config: Config) -> None:
        """From here on, messages are lines of JSON about this guest."""
        from tender.cli.log import JsonLines
        from tender.config import guest_name

        self._json = JsonLines(guest_name(config), _LOG_MAX)

    def warn(self, text: str) -> None:
        """A warning of a device, or of what this machine lacks."""
        self.write(WARNING, "warning", text)

    def write(self, level: int, event: str, text: str, **fields: object) -> None:
        """Write one message; of `event` and `fields`, a text has what `text` says."""
        from tender._native import lib

        text = one_line(text)
        if self._json:
            data = self._json.line(level, event, text, fields)
        else:
            prefix = f"<{level}>" if self._is_journal else ""
            data = f"{prefix}{self._program}: {text}".encode(errors="surrogateescape")[:_LOG_MAX]
        data += b"\n"
        for _ in range(_LOG_TRIES):
            if lib.host_events(2, lib.POLLOUT, _LOG_WAIT_MS) > 0:
                lib.host_write(2, data, len(data))
                return


def _is_journal() -> bool:
    """Whether standard error is the journal, which reads levels (systemd.exec(5))."""
    stream = environment("JOURNAL_STREAM")
    if stream is None:
        return False
    info = os.fstat(2)
    return stream == f"{info.st_dev}:{info.st_ino}"
