"""The program's side of the fork server (tender/embed/forkserver.py).

The rule here: a child has what its program has at that moment, its namespaces, its user, its CPUs.
A server forks what it is itself, so there is one for each such surrounding.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
from errno import EMFILE
from time import monotonic

from tender.embed.protocol import AT_ONCE, ENDED, NEW, receive_descriptors
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from tender.embed.process import Process

END_S = 5.0
NAMESPACES = ("net", "mnt", "user", "ipc", "uts", "cgroup", "pid_for_children", "time_for_children")
_INHERITED = re.compile(rb"^(?:Umask|CapPrm|CapEff|CapBnd):\s*(\w+)", re.M)
KEPT_VARIABLES = ("LD_", "LC_", "LANG")  # of the environment: it may hold secrets
CODE = "import sys; sys.path[:] = {path!r}; from tender.embed.forkserver import main; main({fds})"


class Gone(Exception):
    """The server has ended, or is about to."""


def surroundings() -> Hashable:
    """What the children of this thread have from it, besides its descriptors and limits."""
    root = os.stat("/")
    return (
        os.getresuid(),
        os.getresgid(),
        tuple(os.getgroups()),
        (root.st_dev, root.st_ino),
        tuple(map(_namespace, NAMESPACES)),
        frozenset(os.sched_getaffinity(0)),
        _status(),
    )


def _status() -> tuple[bytes, ...]:
    """The umask and the capabilities; proc(5). The umask can't be asked for without setting it."""
    try:
        fd = os.open("/proc/thread-self/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ()
    try:
        return tuple(_INHERITED.findall(os.read(fd, 1 << 14)))
    finally:
        os.close(fd)


def _namespace(name: str) -> int:
    try:
        return os.stat(f"/proc/thread-self/ns/{name}").st_ino
    except OSError:
        return 0


class Server:
    """A server process, and the children of it that this program knows."""

    def __init__(self) -> None:
        self.gone = False
        self._lock = threading.Lock()  # of the two tables
        self._processes: dict[int, Process] = {}
        self._statuses: dict[int, int] = {}  # of children that nobody has asked about yet
        self._disowned: set[int] = set()  # children that nobody will ask about
        self._taking = threading.Lock()
        self._ready = False  # a child waits, or is on its way
        self._taken = 0.0  # when a child was taken last
        self._requests, asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ends, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with asked, told:
            try:
                self._popen = _start(asked.fileno(), told.fileno())
            except BaseException as error:
                self._requests.close()
                self.ends.close()
                if isinstance(error, OSError):
                    raise _no_process(error.errno or 0) from None
                raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self._popen.pid

    @property
    def idle(self) -> bool:
        """Whether none of its guests runs."""
        return not self._processes

    def take(self) -> tuple[int, int, socket.socket]:
        """A child for a job, the one that waits if there is one: PID, pidfd and its socket.

        Raises Gone, and HostError where the server can't fork.
        """
        with self._taking:
            try:
                if not self._ready:
                    self._requests.send(AT_ONCE)
                self._ready = False
                data, descriptors = receive_descriptors(self._requests, NEW.size, 2)
            except OSError:
                raise Gone from None
            self._taken = monotonic()
        if len(data) != NEW.size:
            raise Gone
        pid, error = NEW.unpack(data)
        if not error and len(descriptors) != 2:  # the program has no room for them
            for each in descriptors:
                os.close(each)
            error = EMFILE
        if error:
            raise _no_process(error)
        fd, pidfd = descriptors
        return pid, pidfd, socket.socket(fileno=fd)

    def make_ready(self, request: bytes, quiet_s: float = 0) -> None:
        """Have a child ready for the next guest, unless one was taken in the last `quiet_s`.

        It takes as much of a CPU as a guest's start does: not beside one.
        """
        if self._taking.acquire(blocking=False):
            try:
                if not self._ready and monotonic() - self._taken >= quiet_s:
                    self._requests.send(request)
                    self._ready = True
            except OSError:
                pass  # it is gone, or retired
            finally:
                self._taking.release()

    def adopt(self, pid: int, process: Process) -> None:
        """`process` is to hear of the wait status."""
        with self._lock:
            known = self._statuses.pop(pid, None)
            if known is None and not self.gone:
                self._processes[pid] = process
                return
        process.reaped(known)

    def disown(self, pid: int) -> None:
        """Nobody is to hear of it."""
        with self._lock:
            if self._statuses.pop(pid, None) is None:
                self._disowned.add(pid)

    def hear(self, tell: Callable[[Process], None]) -> bool:
        """Take in what the server says of ends; False: it has ended itself."""
        while True:
            try:
                data = self.ends.recv(ENDED.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                data = b""
            if len(data) != ENDED.size:
                self._lose(tell)
                return False
            pid, status = ENDED.unpack(data)
            with self._lock:
                process = self._processes.pop(pid, None)
                if pid in self._disowned:
                    self._disowned.remove(pid)
                elif process is None:
                    self._statuses[pid] = status
            if process is not None:
                process.reaped(status)
                tell(process)

    def _lose(self, tell: Callable[[Process], None]) -> None:
        with self._lock:
            self.gone = True
            lost, self._processes = list(self._processes.values()), {}
        for process in lost:
            process.reaped(None)
            tell(process)

    def retire(self) -> None:
        """No more guests: it ends with the last one."""
        self._requests.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """The server is gone, or is to go with all its children."""
        self._requests.close()
        self.ends.close()
        try:
            self._popen.wait(END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def forget(self) -> None:
        """In a forked child: it is the parent's server."""
        self._requests.close()
        self.ends.close()
        self._popen.returncode = 0


def _start(asked: int, told: int) -> subprocess.Popen[bytes]:
    if not sys.executable or getattr(sys, "frozen", False):
        raise HostError(
            "cannot start a process for the guest: this program has no Python interpreter of its "
            "own"
        )
    try:
        program = os.pidfd_open(os.getpid())
    except OSError as error:  # Linux before 5.3, or a seccomp profile that does not know it
        text = "cannot start a process for the guest: pidfd_open(2) must be allowed (Linux 5.3)"
        raise HostError(text, "pidfd_open", error.errno or 0) from None
    numbers: list[int] = []
    try:
        for fd in (asked, told, program):  # not those that are standard, where they were closed
            numbers.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
        code = CODE.format(path=_path(), fds=", ".join(map(str, numbers)))
        return subprocess.Popen(
            [sys.executable, "-IS", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if _has_standard_error() else subprocess.DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in os.environ if name.startswith(KEPT_VARIABLES)},
            pass_fds=numbers,
            start_new_session=True,  # Ctrl-C and the end of a terminal are the program's
        )
    finally:
        for fd in (program, *numbers):
            os.close(fd)


def _has_standard_error() -> bool:
    """False where it is closed, or the number is one of this module's descriptors."""
    try:
        return os.get_inheritable(2)
    except OSError:
        return False


def _path() -> list[str]:
    """Where this program finds modules, so that the server finds the same."""
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = [os.path.abspath(each) for each in sys.path if each]
    return path if home in path else [*path, home]


def _no_process(error: int) -> HostError:
    return HostError("cannot start a process for the guest", "fork", error)
