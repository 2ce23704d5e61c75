"""`ptender-oci`: an OCI runtime's command line, which is runc's.

Containers that are no unikernel go to runc or crun with the same arguments: an engine has one
runtime for a pod, whose infrastructure container is an ordinary program.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from argparse import REMAINDER
from contextlib import suppress

from tender import __version__
from tender.cli.argparser import Parser
from tender.errors import ConfigError, HostError, TenderError, UsageError, one_line
from tender.oci import bundle as bundles
from tender.oci import runtime
from tender.oci.hooks import VERSION
from tender.oci.state import States

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import NoReturn

NO_PROCESSES = "a unikernel has no processes beside its own"
REFUSED = {
    "exec": NO_PROCESSES,
    "pause": "pausing is not supported",
    "resume": "pausing is not supported",
    "checkpoint": "checkpoints are not supported",
    "restore": "checkpoints are not supported",
    "update": "limits can't be changed while it runs",
    "events": "there are none: the cgroup has the numbers",
}
COMMANDS = "create start state kill delete run list ps features"
FEATURES = {
    "ociVersionMin": "1.0.0",
    "ociVersionMax": VERSION,
    "hooks": list(bundles.HOOKS),
    "linux": {
        "namespaces": ["network"],
        "capabilities": [],
        "cgroup": {"v1": True, "v2": True, "systemd": False},
        "seccomp": {"enabled": True},
    },
    "annotations": {"ptender.version": __version__},
}


def main(argv: list[str]) -> int:
    """The command; `argv` with its own path. Its exit status."""
    command, log, log_format = "", None, "text"
    try:
        options = _global_parser().parse_args(argv[1:])
        command, log, log_format = options.command, options.log, options.log_format
        if options.version:
            print(f"ptender-oci version {__version__}\nspec: {VERSION}")
            return 0
        return _Commands(argv, options).run()
    except TenderError as error:
        _report(f"{command}: {error}" if command else str(error), log, log_format)
    except KeyboardInterrupt:
        _report("Exiting on signal 2", log, log_format)
    return 1


def _global_parser() -> Parser:
    parser = Parser("ptender-oci", f"An OCI runtime for unikernels. Commands: {COMMANDS}")
    add = parser.add_argument
    add("--root", metavar="DIR", help="where the state of containers is kept")
    add("--log", metavar="FILE", help="errors are added to this file, too")
    add("--log-format", choices=("text", "json"), default="text")
    add("--debug", action="store_true", help="accepted, without effect")
    add("--systemd-cgroup", action="store_true", help="refused: cgroups are made as files")
    add("--cgroup-manager", choices=("cgroupfs", "systemd"), default="cgroupfs")
    add("--rootless", metavar="true|false|auto", help="accepted, without effect")
    add("-v", "--version", action="store_true")
    add("command", nargs="?", default="")
    add("rest", nargs=REMAINDER)
    return parser


class _Commands:
    """The commands: each a method by its name."""

    def __init__(self, argv: list[str], options: Namespace) -> None:
        self._argv = argv
        self._options = options
        self._states = States(options.root)

    def run(self) -> int:
        """Run the command that was given; the exit status."""
        name = self._options.command
        if name in REFUSED:
            if not set(self._options.rest) & set(self._states.ids()):
                _delegate(self._argv)
            raise ConfigError(REFUSED[name])
        if name not in COMMANDS.split():
            raise UsageError(f"{name!r} is not one of {COMMANDS}" if name else f"one of {COMMANDS}")
        status: int | None = getattr(self, f"_{name}")()
        return status or 0

    def _parser(self, about: str, *flags: str) -> Parser:
        parser = Parser(f"ptender-oci {self._options.command}", about)
        for flag in flags:
            parser.add_argument(*flag.split("|"), action="store_true")
        return parser

    def _parse(self, parser: Parser) -> Namespace:
        """The arguments of a command on one container; one that is not ours goes to runc."""
        given = parser.parse_args(self._options.rest)
        if not self._states.has(given.id) and not self._has_none(given.id) and _others_runtime():
            _delegate(self._argv)
        return given

    def _has_none(self, id: str) -> bool:
        """Whether nothing is there to delete: runc would delete what a `create` makes meanwhile."""
        is_shared = self._options.command == "delete" and self._options.root
        return bool(is_shared and self._states.is_free(id))

    def _create(self) -> None:
        self._create_container("--no-pivot", "--no-new-keyring")

    def _run(self) -> int:
        given, pid = self._create_container(
            "--no-pivot", "--no-new-keyring", "--detach|-d", "--keep"
        )
        ended = not given.detach and not given.keep
        try:
            runtime.start(self._states, given.id)
            if given.detach:
                return 0
            for signo in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signo, lambda signo, _: self._forward(given.id, signo))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except BaseException:
            ended = True
            raise
        finally:
            if ended:
                runtime.delete(self._states, given.id, force=True)
        return status if status >= 0 else 128 - status

    def _forward(self, id: str, signo: int) -> None:
        with suppress(ConfigError):  # it has ended by itself
            runtime.kill(self._states, id, signo, False)

    def _create_container(self, *flags: str) -> tuple[Namespace, int]:
        from tender.oci.create import create  # the other commands start quicker without it
        from tender.oci.guest import find_guest

        parser = self._parser("Create a container.", *flags)
        add = parser.add_argument
        add("--bundle", "-b", default=".", metavar="DIR")
        add("--pid-file", metavar="FILE")
        add("--console-socket", metavar="SOCKET")
        add("--preserve-fds", metavar="N")
        add("id")
        given = parser.parse_args(self._options.rest)
        self._states.path(given.id)  # which checks the ID
        bundle = bundles.load(given.bundle)
        guest = find_guest(bundle)
        if guest is None:
            _delegate(self._argv)
        if self._options.systemd_cgroup or self._options.cgroup_manager == "systemd":
            raise ConfigError("systemd's cgroups are not supported: use cgroupfs")
        tender = _tender(self._argv[0])
        pid = create(
            self._states, given.id, bundle, guest, tender, given.pid_file, given.console_socket
        )
        return given, pid

    def _start(self) -> None:
        parser = self._parser("Start a created container.")
        parser.add_argument("id")
        runtime.start(self._states, self._parse(parser).id)

    def _state(self) -> None:
        parser = self._parser("Print a container's state as JSON.")
        parser.add_argument("id")
        print(json.dumps(runtime.state(self._states, self._parse(parser).id), indent=2))

    def _kill(self) -> None:
        parser = self._parser("Send a signal to a container.", "--all|-a")
        parser.add_argument("id")
        parser.add_argument("signal", nargs="?", default="TERM")
        given = self._parse(parser)
        runtime.kill(self._states, given.id, _signal(given.signal), given.all)

    def _delete(self) -> None:
        parser = self._parser("Remove a container.", "--force|-f")
        parser.add_argument("id")
        given = self._parse(parser)
        runtime.delete(self._states, given.id, given.force)

    def _list(self) -> None:
        parser = self._parser("List the containers that are unikernels.", "--quiet|-q")
        parser.add_argument("--format", "-f", choices=("json", "table"), default="table")
        given = parser.parse_args(self._options.rest)
        rows = []
        for id in self._states.ids():
            with suppress(ConfigError):  # it was deleted meanwhile, or is damaged
                rows.append(runtime.state(self._states, id))
        if given.quiet:
            for row in rows:
                print(row["id"])
        elif given.format == "json":
            print(json.dumps(rows))
        else:
            print(f"{'ID':<24} {'PID':<8} {'STATUS':<8} BUNDLE")
            for row in rows:
                where = one_line(str(row["bundle"]))
                print(f"{row['id']:<24} {row['pid']:<8} {row['status']:<8} {where}")

    def _ps(self) -> None:
        parser = self._parser("List the processes of a container.")
        parser.add_argument("id")
        parser.add_argument("--format", "-f", choices=("json", "table"), default="table")
        given = self._parse(parser)
        pids = runtime.processes(self._states, given.id)
        if given.format == "json":
            print(json.dumps(pids))
        else:
            print("\n".join(["PID", *map(str, pids)]))

    def _features(self) -> None:
        self._parser("Print what this runtime supports, as JSON.").parse_args(self._options.rest)
        print(json.dumps(FEATURES, indent=2))


def _others_runtime() -> str | None:
    """The runtime of ordinary containers."""
    return shutil.which("runc") or shutil.which("crun")


def _delegate(argv: list[str]) -> NoReturn:
    """Become the runtime of ordinary containers."""
    path = _others_runtime()
    if path is None:
        raise ConfigError("not a unikernel's container, and neither runc nor crun is in PATH")
    try:
        os.execv(path, [path, *argv[1:]])
    except OSError as error:
        raise HostError(path, "execve", error.errno or 0) from None


def _tender(program: str) -> list[str]:
    """The command `ptender`, which lies beside this one."""
    beside = os.path.join(os.path.dirname(os.path.abspath(program)), "ptender")
    path = beside if os.path.exists(beside) else shutil.which("ptender")
    if path is None:
        raise ConfigError(f"ptender is neither beside {program} nor in PATH")
    return [path]


def _signal(text: str) -> int:
    try:
        if text.isdigit():
            return signal.Signals(int(text)).value
        return signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"].value
    except (KeyError, ValueError):
        raise UsageError(f"{text!r} is not a signal") from None


def _report(text: str, log: str | None, log_format: str) -> None:
    """One line of error: on standard error, and in the caller's log."""
    text = one_line(text)
    print(f"ptender-oci: {text}", file=sys.stderr)
    if not log:
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = f"time={now} level=error msg={json.dumps(text)}"
    if log_format == "json":
        line = json.dumps({"level": "error", "msg": text, "time": now})
    try:
        with open(log, "a") as file:
            print(line, file=file)
    except OSError as error:
        print(f"ptender-oci: {log}: {error.strerror}", file=sys.stderr)
