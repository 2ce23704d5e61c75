"""The program's end of its fork server (tender/embed/forkserver.py).

The rule here: the process of a guest has the credentials and the namespaces that the program had
when its server started. A program that has changed them since gets an error: no guest runs with
rights that its program has given up.
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
from functools import partial
from time import monotonic

from tender.dataclass import dataclass
from tender.embed.protocol import COLD, EXITED, FORKED, receive_descriptors
from tender.embed.reactor import READ, reactor
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    OnExit = Callable[[int | None], object]

END_S = 5.0
NAMESPACES = ("net", "mnt", "user", "ipc", "uts", "cgroup", "pid_for_children", "time_for_children")
PYTHON = "PTENDER_PYTHON"  # of the environment: the interpreter that servers run
IS_SERVER = "PTENDER_SERVER"  # in the environment of a server
KEPT_VARIABLES = ("LD_", "LC_", "LANG", "XDG_RUNTIME_DIR")  # the rest may be secrets
CODE = "import sys; sys.path[:] = {path!r}; from tender.embed.forkserver import main; main({fds})"
_CAPABILITIES = re.compile(rb"^Cap(?:Prm|Eff|Bnd):\s*(\w+)", re.M)
_UMASK = re.compile(rb"^Umask:\s*(\w+)", re.M)


class Gone(Exception):
    """The server has ended, or is about to."""


@dataclass
class Child:
    """A process that waits for a job; its pidfd and its end of the socket pair are open."""

    pid: int
    pidfd: int
    sock: socket.socket

    def close(self) -> None:
        """Close both descriptors."""
        self.sock.close()
        os.close(self.pidfd)


class ForkServer:
    """A server process, and the children of it that this program knows."""

    def __init__(self) -> None:
        self.gone = False
        self._context = _inherited_context()
        self._lock = threading.Lock()  # of `gone` and of the two tables
        self._on_exit: dict[int, OnExit] = {}
        self._statuses: dict[int, int] = {}  # of children that nobody has asked about yet
        self._taking = threading.Lock()
        self._is_ready = False  # a child waits, or is being forked
        self._has_forked = False
        self._taken = 0.0  # when a child was taken last
        self._requests, requests = _socketpair()
        try:
            self._exits, exits = _socketpair()
        except HostError:
            self._requests.close()
            requests.close()
            raise
        with requests, exits:
            try:
                self._popen = _start(requests.fileno(), exits.fileno())
            except BaseException as error:
                self._requests.close()
                self._exits.close()
                if isinstance(error, OSError):
                    raise _no_process(error.errno or 0) from None
                raise
        reactor().register(self._exits.fileno(), READ, lambda _: self._read_exits())

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._popen.pid

    def check_interpreter(self) -> None:
        """Raise HostError if the server exited by itself before its first child."""
        if not self._has_forked and self._popen.wait() >= 0:
            raise _no_interpreter(f"{_interpreter()} has exited") from None

    def check_context(self) -> None:
        """Raise HostError if a child would not have what this thread has now."""
        now = _inherited_context()
        for name, value in self._context.items():
            if now[name] != value:
                raise HostError(
                    f"cannot start a process for the guest: the {name} of the program changed "
                    "after its first guest had started: change them before, or fork the program"
                )

    def take(self) -> Child:
        """A child for a job, the one that waits if there is one.

        Raises Gone, and HostError where the server can't fork.
        """
        with self._taking:
            try:
                if not self._is_ready:
                    self._requests.send(COLD)
                self._is_ready = False
                data, descriptors = receive_descriptors(self._requests, FORKED.size, 2)
            except OSError:
                data, descriptors = b"", []
            self._taken = monotonic()
        if len(data) != FORKED.size:
            self.gone = True
            raise Gone
        self._has_forked = True
        pid, error = FORKED.unpack(data)
        if not error and len(descriptors) != 2:  # the program has reached its limit
            for each in descriptors:
                os.close(each)
            error = EMFILE
        if error:
            raise _no_process(error)
        fd, pidfd = descriptors
        return Child(pid, pidfd, socket.socket(fileno=fd))

    def make_ready(self, request: bytes, quiet_s: float = 0) -> None:
        """Have a child ready for the next guest, unless one was taken in the last `quiet_s`.

        Warming up takes as much CPU time as the start of a guest, and would slow down one that
        starts at the same time.
        """
        if self._taking.acquire(blocking=False):
            try:
                if not self._is_ready and monotonic() - self._taken >= quiet_s:
                    self._requests.send(request)
                    self._is_ready = True
            except OSError:
                pass  # it is gone
            finally:
                self._taking.release()

    def on_exit(self, pid: int, call: OnExit) -> None:
        """Call `call`, on the reactor's thread, with the wait status of a child.

        With None where the server has ended; the kernel ends its children with it.
        """
        with self._lock:
            if not self.gone and pid not in self._statuses:
                self._on_exit[pid] = call
                return
            status = self._statuses.pop(pid, None)
        reactor().call_soon(partial(call, status))

    def _read_exits(self) -> None:
        while True:
            try:
                data = self._exits.recv(EXITED.size, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if len(data) != EXITED.size:
                self.close()
                return
            pid, status = EXITED.unpack(data)
            with self._lock:
                call = self._on_exit.pop(pid, None)
                if call is None:
                    self._statuses[pid] = status
            if call is not None:
                call(status)

    def close(self) -> None:
        """End the server with all its children, unless it has ended already."""
        reactor().unregister(self._exits.fileno())
        self._requests.close()
        self._exits.close()
        try:
            self._popen.wait(END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        with self._lock:
            self.gone = True
            calls, self._on_exit = list(self._on_exit.values()), {}
        for call in calls:
            reactor().call_soon(partial(call, None))

    def forget(self) -> None:
        """Close its descriptors in a forked child: it is the parent's server."""
        self._requests.close()
        self._exits.close()
        self._popen.returncode = 0


def _socketpair() -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise _no_process(error.errno or 0, "socketpair") from None


def _inherited_context() -> dict[str, Hashable]:
    """What a child has from its program by inheritance, and gets in no other way."""
    root = os.stat("/")
    return {
        "credentials": (
            os.getresuid(),
            os.getresgid(),
            tuple(os.getgroups()),
            tuple(_CAPABILITIES.findall(_thread_status())),
        ),
        "root directory": (root.st_dev, root.st_ino),
        "namespaces": tuple(map(_namespace, NAMESPACES)),
    }


def umask() -> int | None:
    """The umask, which no system call gives without setting it; None where /proc is missing."""
    found = _UMASK.search(_thread_status())
    return int(found[1], 8) if found else None


def _thread_status() -> bytes:
    """The status of this thread, proc(5); empty where /proc is missing."""
    try:
        fd = os.open("/proc/thread-self/status", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _no_process(error.errno or 0, "open") from None
    try:
        return os.read(fd, 1 << 14)
    finally:
        os.close(fd)


def _namespace(name: str) -> int:
    try:
        return os.stat(f"/proc/thread-self/ns/{name}").st_ino
    except OSError:
        return 0


def _start(requests: int, exits: int) -> subprocess.Popen[bytes]:
    if not _interpreter():
        raise _no_interpreter("this program has none of its own (sys.executable)")
    if IS_SERVER in os.environ:
        raise _no_interpreter("this program was started as one (sys.executable)")
    try:
        program = os.pidfd_open(os.getpid())
    except OSError as error:
        if error.errno == EMFILE:
            raise
        # Linux before 5.3, or a seccomp profile that does not know it.
        text = "cannot start a process for the guest: pidfd_open(2) must be allowed (Linux 5.3)"
        raise HostError(text, "pidfd_open", error.errno or 0) from None
    numbers: list[int] = []
    try:
        for fd in (requests, exits, program):  # not 0 to 2, if those were closed
            numbers.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
        code = CODE.format(path=_path(), fds=", ".join(map(str, numbers)))
        return subprocess.Popen(
            [_interpreter(), "-IS", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if _has_standard_error() else subprocess.DEVNULL,
            cwd="/",
            env={
                **{
                    name: os.environ[name] for name in os.environ if name.startswith(KEPT_VARIABLES)
                },
                IS_SERVER: "1",
            },
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
    """Where this program finds modules, so that the server finds the same.

    Folders with another `tender` are left out: pytest inserts the folder of a test, which may be a
    checkout.
    """
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = [os.path.abspath(each) for each in sys.path if each]
    path = [each for each in path if each == home or not _has_tender(each)]
    return path if home in path else [*path, home]


def _has_tender(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "tender", "__init__.py"))


def _interpreter() -> str:
    """The Python that runs a server; empty: it is not known."""
    own = "" if getattr(sys, "frozen", False) else sys.executable
    return os.environ.get(PYTHON) or own or ""


def _no_interpreter(why: str) -> HostError:
    return HostError(
        f"cannot start a process for the guest: a Python interpreter is needed, and {why}: "
        f"name one in {PYTHON}"
    )


def _no_process(error: int, syscall: str = "fork") -> HostError:
    return HostError("cannot start a process for the guest", syscall, error)
