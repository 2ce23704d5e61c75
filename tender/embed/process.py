"""A guest in a child process of its own, seen from the program.

The rule here: a program is never at the mercy of a guest's process. It is signalled by a pidfd,
which names it and nothing else; what it says is checked; it has ended when the kernel says so.
Nothing outlives the program, and a fork of the program has none of its guests.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import threading

from tender.embed import protocol
from tender.embed.monitor import Monitor
from tender.embed.protocol import MESSAGE_MAX, Malformed
from tender.embed.server import Gone, Server, surroundings
from tender.errors import EXIT_FAILURE, HostError, SandboxViolation, TenderError
from tender.outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from typing import Any

    from tender.embed.timers import Timer

    Warn = Callable[[str], None]

GRACE_S = 2.0  # between asking a guest whose deadline has passed, and its death
WARN_MAX = 256  # lines of one guest; its process sends fewer
SERVERS_MAX = 4  # for surroundings that the program was in lately
QUIET_S = 0.02  # after a start: where many guests are started, none waits for a child made ready
TRIES = 3  # to get a child, where servers are killed
DEATH_S = 5.0  # for a killed process to be gone


class Process:
    """The process of one guest."""

    def __init__(self, warn: Warn, on_end: Callable[[], None]) -> None:
        self.pid: int | None = None
        self.started = False
        self.layers: tuple[str, ...] = ()  # of its sandbox, as it says when the guest starts
        self.missing_layers: tuple[str, ...] = ()
        self.dead = False  # and reaped, or about to be
        self._warn = warn
        self._on_end = on_end
        # Of the pidfd, against its being closed. A signal handler may come back to it.
        self._lock = threading.RLock()
        self._pidfd = -1
        self._sock: socket.socket | None = None
        self._signals: list[int] = []  # that came before there was a process
        self._asked = self._overdue = False
        self._result: dict[str, Any] | BaseException | None = None
        self._malformed: str | None = None
        self._violation: int | None = None
        self._status: int | None = None  # as waitpid() gives it
        self._warnings = 0
        self._make_ready: Callable[[float], None] = lambda _: None
        self._call_later: Callable[[float, Callable[[], None]], Timer | None] = lambda *_: None
        self._timers: list[Timer] = []

    def start(
        self, job: bytes, descriptors: list[int], request: bytes, deadline_s: float | None = None
    ) -> None:
        """Hand the job to a child; returns when the guest is about to run, or has ended already.

        Raises HostError where no process can be had. `descriptors` are the caller's still.
        """
        program = _program_here()
        server, pid, pidfd, sock = program.take()
        program.add(self)
        with self._lock:
            self.pid, self._pidfd, self._sock = pid, pidfd, sock
            signals, self._signals = self._signals, []
            for signo in signals:
                self._signal(signo)
        self._call_later = program.monitor.call_later
        if deadline_s is not None:
            self._in(deadline_s, self._deadline)
        try:
            protocol.send_job(sock, job, descriptors)
            while self._result is None and not self.started:
                data = sock.recv(MESSAGE_MAX + 1)
                if not data:
                    break
                self._take(data)
        except ConnectionError:
            pass  # it has died
        except BaseException:
            self.kill()
            raise
        finally:
            server.adopt(pid, self)
            program.watch(self)
            self._make_ready = lambda quiet_s: server.make_ready(request, quiet_s)
            self._call_later(QUIET_S, lambda: self._make_ready(QUIET_S))

    def _in(self, seconds: float, call: Callable[[], None]) -> None:
        """Call it then, unless all is over before."""
        timer = self._call_later(seconds, call)
        if timer is not None:
            self._timers.append(timer)

    def ask_to_end(self) -> None:
        """Ask once; whoever waits for it repeats it."""
        self._asked = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """From any thread, at any time."""
        self._signal(signal.SIGKILL)

    def outcome(self) -> Outcome:
        """How it ended, once it is dead; raises what kept the guest from starting."""
        result = self._result
        if self._malformed is not None:
            text = f"the guest's process sent {self._malformed}, and was killed"
            return Outcome("host", EXIT_FAILURE, error=HostError(text))
        if isinstance(result, BaseException):
            raise result
        if result is None:
            return self._unspoken()
        if result["reason"] == "stopped":
            if self._overdue:
                result = {**result, "reason": "deadline", "signo": 0}
            elif self._asked:
                result = {**result, "signo": 0}
        return Outcome(**result)

    def _unspoken(self) -> Outcome:
        """The end of a process that could not say how."""
        status = signal.SIGKILL if self._status is None else self._status
        if not os.WIFSIGNALED(status):
            code = os.WEXITSTATUS(status)
            text = f"the guest's process ended without a word (exit status {code})"
            return Outcome("host", EXIT_FAILURE, error=HostError(text))
        signo = os.WTERMSIG(status)
        if signo == signal.SIGSYS:
            number = self._violation
            name = None if number is None else _syscall_name(number)
            return Outcome("sandbox", EXIT_FAILURE, signo, SandboxViolation(name, number))
        if self._overdue:
            return Outcome("deadline", EXIT_FAILURE, signo)
        if self._asked and signo == signal.SIGTERM:  # it was not ready to take it well
            return Outcome("stopped", EXIT_FAILURE)
        return Outcome("killed", EXIT_FAILURE, signo)

    def _signal(self, signo: int) -> None:
        with self._lock:
            if self.dead:
                return
            if self._pidfd < 0:
                self._signals.append(signo)
                return
            try:
                signal.pidfd_send_signal(self._pidfd, signo)
            except ProcessLookupError:
                pass

    def _deadline(self) -> None:
        """Too late: on the monitor's thread."""
        if not self.dead:  # it may have told of an end, and go on all the same
            self._overdue = self._result is None
            self._signal(signal.SIGTERM)
            self._in(GRACE_S, self.kill)

    # What the monitor's thread calls.

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Those that are worth watching."""
        return (self._sock.fileno(), self._pidfd) if self._sock is not None else ()

    def listen(self) -> bool:
        """Take in one message; False: there is none."""
        try:
            data = self._sock.recv(MESSAGE_MAX + 1, socket.MSG_DONTWAIT) if self._sock else b""
        except OSError:
            data = b""
        if data:
            self._take(data)
        return bool(data)

    def _take(self, data: bytes) -> None:
        if self._result is not None or self._malformed is not None:
            return
        try:
            kind, value = protocol.parse(data)
            if kind == "warn":
                self._warnings += 1
                if self._warnings > WARN_MAX:
                    raise Malformed("more warnings than there are kinds of trouble")
            known = {"started": self.started, "violation": self._violation is not None}
            if known.get(kind):
                raise Malformed("a message once more")
        except Malformed as error:
            self._malformed = str(error)
            self.kill()
            return
        if kind == "warn":
            self._warn(value)
        elif kind == "started":
            self.started = True
            self.layers, self.missing_layers = value
        elif kind == "violation":
            self._violation = value
        elif kind == "bug":
            self._result = RuntimeError(f"in the guest's process:\n{value}")
        else:
            self._result = value  # an outcome, or an error
        if self._result is not None:
            self._in(GRACE_S, self.kill)  # it has nothing left to do but to end

    def died(self, timeout_s: float = 0) -> bool:
        """Whether the kernel says that it has."""
        if not self.dead and self._pidfd >= 0:
            self.dead = _is_dead(self._pidfd, timeout_s)
        return self.dead

    def reaped(self, status: int | None) -> None:
        """What the server says; None: it has ended itself, and the kernel ended its children."""
        if status is None:
            self._signal(signal.SIGKILL)
            status = signal.SIGKILL
        if self._status is None:
            self._status = status

    def conclude(self) -> bool:
        """Whether all is known of its end; then its descriptors are closed."""
        if not self.died():
            return False
        while self.listen():
            pass
        return (self._result, self._malformed, self._status) != (None, None, None)

    def close(self) -> None:
        """It is dead, and all is known: say so."""
        with self._lock:
            self.forget()
        for timer in self._timers:
            timer.cancel()
        self._on_end()
        self._make_ready(0)

    def forget(self) -> None:
        """Close its descriptors; in a forked child, that is all."""
        sock, self._sock = self._sock, None
        pidfd, self._pidfd = self._pidfd, -1
        if sock is not None:
            sock.close()
            os.close(pidfd)


def _is_dead(pidfd: int, timeout_s: float = 0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _syscall_name(number: int) -> str:
    try:
        from tender.sandbox import seccomp

        return seccomp.syscall_name(number)
    except (ImportError, TenderError):
        return f"system call {number}"


class Program:
    """What this program has of servers and guests' processes."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.monitor = Monitor()
        self._lock = threading.Lock()
        self._servers: dict[Hashable, Server] = {}  # the one that was used last is the last
        self._all_servers: list[Server] = []  # the retired ones too, while they run
        self._processes: set[Process] = set()
        self._closed = False

    def take(self) -> tuple[Server, int, int, socket.socket]:
        """A child that waits for a job: its server, PID, pidfd and socket."""
        here = surroundings()
        for _ in range(TRIES):
            server = self._server(here)
            try:
                pid, pidfd, sock = server.take()
            except Gone:
                with self._lock:
                    if self._servers.get(here) is server:
                        del self._servers[here]
                continue
            if not _is_dead(pidfd):
                return server, pid, pidfd, sock
            server.disown(pid)  # it was killed while it waited: no guest has had it
            os.close(pidfd)
            sock.close()
        raise HostError("cannot start a process for the guest: the server that forks it is killed")

    def _server(self, here: Hashable) -> Server:
        with self._lock:
            if self._closed:
                raise HostError("cannot start a process for the guest: the program is ending")
            server = self._servers.pop(here, None)
            if server is None or server.gone:
                server = Server()
                self._all_servers.append(server)
                self.monitor.watch(server.ends.fileno(), lambda: self._hear(server))
            self._servers[here] = server
            # Those of other users are not kept: they have rights that the program gave up.
            for other in list(self._servers):
                if other[:3] != here[:3] or len(self._servers) > SERVERS_MAX:  # type: ignore[index]
                    self._servers.pop(other).retire()
            return server

    def _hear(self, server: Server) -> None:
        if not server.hear(self._look):
            self.monitor.unwatch(server.ends.fileno())
            with self._lock:
                self._all_servers.remove(server)
            server.close()

    def add(self, process: Process) -> None:
        """A process that is now a guest of this program."""
        with self._lock:
            self._processes.add(process)

    def watch(self, process: Process) -> None:
        """From here on the monitor's thread takes in what it says."""
        self.monitor.call_later(0, lambda: self._watch(process))

    def _watch(self, process: Process) -> None:
        for fd in process.descriptors:
            self.monitor.watch(fd, lambda: self._event(process))
        self._look(process)

    def _event(self, process: Process) -> None:
        process.listen()
        self._look(process)

    def _look(self, process: Process) -> None:
        """See whether a process has ended."""
        if process.descriptors and process.conclude():
            for fd in process.descriptors:
                self.monitor.unwatch(fd)
            self._remove(process)

    def _remove(self, process: Process) -> None:
        with self._lock:
            self._processes.discard(process)
        process.close()

    def close(self) -> None:
        """The program ends: so do its guests, and whoever waits for one hears of it."""
        self.monitor.close()
        with self._lock:
            self._closed = True
            servers, self._servers = self._all_servers, {}
            processes = list(self._processes)
        for server in servers:
            server.close()
        for process in processes:
            process.reaped(None)
            if process.died(DEATH_S) and process.conclude():
                self._remove(process)

    @property
    def ending(self) -> bool:
        """Whether the program is: then nothing can be left to a thread."""
        return self._closed

    def forget(self) -> None:
        """In a forked child: nothing of it is the child's."""
        self.monitor.forget()
        for server in list(self._all_servers):
            server.forget()
        for process in list(self._processes):
            process.forget()


_lock = threading.Lock()
_program: Program | None = None


def _program_here() -> Program:
    """This program's; a forked child gets one of its own when it asks."""
    global _program
    with _lock:
        if _program is None:
            _program = Program()
        return _program


def on_monitor() -> bool:
    """Whether this is the thread that must not wait for a guest: it is who hears of the end."""
    return _program is not None and _program.monitor.is_here()


def program_ends() -> bool:
    """Whether this program is about to, and takes its guests with it."""
    return _program is not None and _program.ending


def _at_exit() -> None:
    if _program is not None:
        _program.close()


def _after_fork() -> None:
    global _lock, _program
    _lock = threading.Lock()
    if _program is not None:
        _program.forget()
        _program = None


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
