"""The process of one guest, seen from the program.

The rule here: a program never depends on what a guest's process does. It signals it by a pidfd,
which names it and no other; it checks what it sends; the kernel says when it has ended. Nothing
outlives the program, and a fork of the program has none of its guests.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from enum import Enum, auto
from functools import partial

from tender import accel
from tender.config import guest_name
from tender.dataclass import replace
from tender.embed import program, protocol, server
from tender.embed.latch import Latch
from tender.embed.protocol import MESSAGE_MAX, Job, Malformed, receive
from tender.embed.reactor import READ, reactor
from tender.errors import EXIT_FAILURE, GuestFault, HostError, SandboxViolation, TenderError
from tender.outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.config import Config
    from tender.embed.reactor import Timer
    from tender.embed.server import Child, ForkServer

    Warn = Callable[[str], None]

GRACE_S = 2.0  # from the request to a guest whose deadline has passed until it is killed
WARNINGS_MAX = 256  # of one guest; its process sends fewer
QUIET_S = 0.02  # after a start: where many guests are started, no child is warmed up between
EXCEPTIONS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
REQUESTS = (signal.SIGTERM, signal.SIGINT)


class State(Enum):
    """Where a guest's process is in its life."""

    NEW = auto()  # there is no process
    STARTING = auto()  # it has the job
    RUNNING = auto()  # it has reported that the guest is about to run
    REPORTED = auto()  # it has sent its last message, which decides the outcome; or was killed
    ENDED = auto()  # the kernel says so, and the outcome is known


_LAST = dict.fromkeys(
    ("outcome", "error", "bug", "violation", "exception", "malformed"), State.REPORTED
)

# By state: what may happen, messages of the process among it, and the state after that.
TRANSITIONS: dict[State, dict[str, State]] = {
    State.NEW: {"job": State.STARTING},
    State.STARTING: {
        "warning": State.STARTING,
        "started": State.RUNNING,
        **_LAST,
        "exit": State.ENDED,
    },
    State.RUNNING: {"warning": State.RUNNING, "core": State.RUNNING, **_LAST, "exit": State.ENDED},
    State.REPORTED: {"exit": State.ENDED},
    State.ENDED: {},
}


_noticed: set[str] = set()  # notices on CPUs: the program gets each once, not once per guest


class Process:
    """The process of one guest.

    `warn` is called with the text of each warning, and `on_end`, on the reactor's thread, when the
    process has ended and `outcome` can be asked for.
    """

    def __init__(self, warn: Warn, on_end: Callable[[], None]) -> None:
        self.pid: int | None = None
        self.started = False  # the guest runs, or has run
        self.layers: tuple[str, ...] = ()  # of its sandbox, as it reports when the guest starts
        self.missing_layers: tuple[str, ...] = ()
        self.ended = Latch()
        self._state = State.NEW
        self._warn = warn
        self._on_end: Callable[[], None] | None = on_end
        # Held while the pidfd is used, or closed. A signal handler of the program may stop a guest
        # while its thread holds it.
        self._lock = threading.RLock()
        self._child: Child | None = None  # while its descriptors are open
        self._server: ForkServer | None = None
        self._core_folder = ""
        self._name = ""  # of the guest
        self._counters = ""  # the name of its file of counters
        self._warm_request = protocol.COLD
        self._signals: list[int] = []  # that are sent as soon as there is a process
        self._is_stop_requested = self._is_overdue = False
        self._is_dead = False  # the kernel says so
        self._report: Outcome | TenderError | RuntimeError | Malformed | None = None
        self._violation: int | None = None
        self._is_guest = False  # an spt guest: how it ends is how the process ends
        self._exception = ""  # of its CPU
        self._core: str | None = None
        self._status: int | None = None  # as waitpid() gives it
        self._warnings = 0
        self._timers: list[Timer] = []

    def start(
        self,
        config: Config,
        descriptors: list[int],
        deadline_s: float | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        """Have a child run the guest; return when the guest is about to run, or can't.

        `config` has the numbers of protocol.numbers_in_child(`descriptors`), which the caller
        closes. With `fresh`, the child executes a Python of its own first. Raises HostError where
        no process can be had.
        """
        self._core_folder = config.dumpcore or ""
        self._name = guest_name(config)
        self._warm_request = _warm_request(config)
        cpus = tuple(os.sched_getaffinity(0))
        job = protocol.pack_job(
            Job(
                config,
                len(descriptors) + 1,
                cpus,
                server.umask(),
                os.environ.get(accel.ENVIRONMENT, ""),
            )
        )
        folder = _current_folder()
        try:
            self._server, child = program.program_here().take(self)
            with self._lock:
                self._state = TRANSITIONS[self._state]["job"]
                self.pid, self._child = child.pid, child
                for signo in self._signals:
                    self._signal(signo)
            if deadline_s is not None:
                self._call_later(deadline_s, self._pass_deadline)
            try:
                if fresh:
                    child.sock.send(protocol.FRESH)
                protocol.send_job(child.sock, job, [*descriptors, folder])
                while self._state is State.STARTING and self._receive():
                    pass
            except ConnectionError:
                pass  # it has died
            except OSError as error:
                self.kill()
                text = "cannot send the guest to its process"
                raise HostError(text, "sendmsg", error.errno or 0) from None
            finally:
                reactor().call_soon(partial(self._watch, child, self._server))
        finally:
            os.close(folder)

    def request_stop(self) -> None:
        """Ask the guest to end, once. A signal can be lost: the caller repeats it."""
        self._is_stop_requested = True
        self._signal(signal.SIGTERM)

    def interrupt(self) -> None:
        """Let the guest come back from where it is, once, without a request to end."""
        from tender._native import lib

        self._signal(lib.STOP_KICK)

    def kill(self) -> None:
        """Kill the process. May be called from any thread, at any time."""
        self._signal(signal.SIGKILL)

    def outcome(self) -> Outcome:
        """How the guest ended, once its process has; raises what kept it from starting."""
        report = self._report
        if isinstance(report, Outcome):
            if report.reason == "stopped" and self._is_overdue:
                return replace(report, reason="deadline", signo=0)
            if report.reason == "stopped" and self._is_stop_requested:
                return replace(report, status=0, signo=0)
            return report
        if isinstance(report, Malformed):
            return _host(HostError(f"the guest's process was killed: {report}"))
        if report is None:
            return self._outcome_of_status()
        if not self.started:
            raise report
        if isinstance(report, TenderError):
            return _host(report)
        error = HostError(f"the guest's process failed: {str(report).splitlines()[0]}")
        error.__cause__ = report
        return _host(error)

    def _outcome_of_status(self) -> Outcome:
        """The end of a process that did not report one."""
        status = signal.SIGKILL if self._status is None else self._status
        if not os.WIFSIGNALED(status):
            code = os.WEXITSTATUS(status)
            if self._is_guest:
                return Outcome("halted", code, core=self._core)
            text = f"the guest's process exited without a report (exit status {code})"
            return _host(HostError(text))
        signo = os.WTERMSIG(status)
        if signo == signal.SIGSYS:
            number = self._violation
            name = None if number is None else _syscall_name(number)
            return Outcome(
                "sandbox", EXIT_FAILURE, signo, SandboxViolation(name, number), core=self._core
            )
        if self._is_overdue:
            return Outcome("deadline", EXIT_FAILURE, signo)
        if self._is_guest and signo in EXCEPTIONS:
            text = self._exception or f"a CPU exception ({signal.Signals(signo).name})"
            return Outcome("fault", EXIT_FAILURE, signo, GuestFault(text), core=self._core)
        if self._is_guest and signo in REQUESTS and not self._is_stop_requested:
            return Outcome("stopped", EXIT_FAILURE, signo)
        if self._is_stop_requested and signo == signal.SIGTERM:  # it had no handler yet
            return Outcome("stopped", 0)
        return Outcome("killed", EXIT_FAILURE, signo)

    def _signal(self, signo: int) -> None:
        with self._lock:
            if self._state is State.NEW:
                self._signals.append(signo)
            elif self._child is not None:
                try:
                    signal.pidfd_send_signal(self._child.pidfd, signo)
                except ProcessLookupError:
                    pass

    def _call_later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it then, unless the process has ended."""
        self._timers.append(reactor().call_later(seconds, call))

    def _receive(self, flags: int = 0) -> bool:
        """Take one message; False: there is none."""
        try:
            data = receive(self._child.sock, MESSAGE_MAX + 1, flags) if self._child else None
        except OSError:
            data = None
        if data is not None:
            self._take(data)
        return data is not None

    def _take(self, data: bytes) -> None:
        """Take a message, unless the last one has come. What must not come ends the process."""
        if self._state is State.REPORTED:
            return
        kind: str
        value: Any
        try:
            kind, value = protocol.parse(data)
            if kind not in TRANSITIONS[self._state]:
                raise Malformed(f"{kind!r} in state {self._state.name}")
            self._warnings += kind == "warning"
            if self._warnings > WARNINGS_MAX:
                raise Malformed(f"more than {WARNINGS_MAX} warnings")
        except Exception as error:  # of the parser as well: a guest may have sent it
            kind = "malformed"
            value = error if isinstance(error, Malformed) else Malformed(type(error).__name__)
            self.kill()
        self._state = TRANSITIONS[self._state][kind]
        if kind == "warning":
            self._warn(value)
        elif kind == "started":
            self.started = True
            self.layers, self.missing_layers, notice, self._is_guest, counters = value
            name, _, begun = counters.rpartition(".")
            if name == f"{self._name}.{self.pid}" and begun.isdigit():
                self._counters = counters
            if self._is_guest:
                self._warm_request = protocol.COLD  # there is nothing to warm up for another one
            if notice and notice not in _noticed:
                _noticed.add(notice)
                self._warn(notice)
        elif kind == "violation":
            self._violation = value
        elif kind == "exception":
            self._exception = value
        elif kind == "core":
            self._core = self._own_core(os.path.join(self._core_folder, value))
        elif kind == "bug":
            self._report = RuntimeError(f"in the guest's process:\n{value}")
        elif kind == "outcome":
            self._report = replace(value, core=self._own_core(value.core))
        else:
            self._report = value
        if self._state is State.REPORTED:
            self._call_later(GRACE_S, self.kill)  # all that is left for it is to exit

    def _own_core(self, path: str | None) -> str | None:
        """The path of a core file, if this process can have written it."""
        path_of = re.escape(os.path.join(self._core_folder, "core.solo5-"))
        own = rf"{path_of}(hvt|spt)\.{self.pid}(\.[0-9]+)?"
        return path if path is not None and re.fullmatch(own, path) else None

    # On the reactor's thread.

    def _watch(self, child: Child, server: ForkServer) -> None:
        reactor().register(child.sock.fileno(), READ, lambda _: self._read(child))
        reactor().register(child.pidfd, READ, lambda _: self._die(child))
        server.on_exit(child.pid, self._exit)
        make_ready = partial(server.make_ready, self._warm_request, QUIET_S)
        reactor().call_later(QUIET_S, make_ready)

    def _read(self, child: Child) -> None:
        if not self._receive(socket.MSG_DONTWAIT) or self._state is State.REPORTED:
            reactor().unregister(child.sock.fileno())

    def _die(self, child: Child) -> None:
        """The kernel says that it is dead. Messages may still be in the socket."""
        reactor().unregister(child.pidfd)
        self._is_dead = True
        while self._state is not State.REPORTED and self._receive(socket.MSG_DONTWAIT):
            pass
        self._end_if_known()

    def _exit(self, status: int | None) -> None:
        """The server says how it exited; None: the server has ended."""
        if status is None:
            self.kill()
            status = signal.SIGKILL
        self._status = status
        self._end_if_known()

    def _end_if_known(self) -> None:
        if not self._is_dead or self._child is None or self._server is None:
            return
        if self._report is None and self._status is None:
            return
        reactor().unregister(self._child.sock.fileno())
        with self._lock:
            self._state = TRANSITIONS[self._state]["exit"]
            self.forget()
        if self._counters:
            from tender.observe import counters

            counters.remove(self._counters)
        for timer in self._timers:
            timer.cancel()
        self._server.make_ready(self._warm_request)
        here = program.program_here()
        here.remove(self)
        if not here.is_ending:
            self.report_end()
        self.ended.set()

    def report_end(self) -> None:
        """Call `on_end`, once."""
        with self._lock:
            on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def _pass_deadline(self) -> None:
        self._is_overdue = self._state is not State.REPORTED  # one that reported may not exit
        self._signal(signal.SIGTERM)
        self._call_later(GRACE_S, self.kill)

    def forget(self) -> None:
        """Close its descriptors; in a forked child, that is all."""
        child, self._child = self._child, None
        if child is not None:
            child.close()


def _host(error: TenderError) -> Outcome:
    return Outcome("host", EXIT_FAILURE, error=error)


def _current_folder() -> int:
    try:
        return os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError("the current directory", "open", error.errno or 0) from None


def _warm_request(config: Config) -> bytes:
    """The request for a child that is warmed up for a guest like this one."""
    virtual = config.clock is not None or config.instructions is not None
    return protocol.WARM["soft" if virtual else accel.likely(accel.from_environment(config.cpu))]


def _syscall_name(number: int) -> str:
    try:
        from tender.sandbox import seccomp

        return seccomp.syscall_name(number)
    except (ImportError, TenderError):
        return f"system call {number}"
