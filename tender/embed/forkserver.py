"""The server that forks the processes of a program's guests, and what such a process does.

The rule here: the server has imported all that a guest can need, and holds nothing of any guest;
one child waits in advance for a job. Nobody outlives the program: the server watches it, and the
kernel ends the children with the server. The program's side is tender/embed/process.py.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import socket
from errno import EAGAIN

from tender import accel, machine
from tender.cleanup import Cleanup
from tender.config import Config
from tender.embed import protocol
from tender.embed.protocol import AT_ONCE, ENDED, FOR_KVM, NEW, send_descriptors
from tender.errors import HostError, TenderError, bug_text
from tender.sandbox.fdtable import FdTable
from tender.stop import Stop, end_with, on_termination_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.outcome import Outcome
    from tender.sandbox.sandbox import Sandbox

REHEARSAL_BYTES = 8 << 20
WARN_MAX = 200  # lines; there are far fewer kinds of trouble


class Server:
    """Forks a child for each request, and tells how each one ended."""

    def __init__(self, requests: socket.socket, ends: socket.socket, program: int) -> None:
        self._requests = requests
        self._ends = ends
        self._program = program  # a pidfd
        self._children: dict[int, int] = {}  # PID by pidfd
        self._epoll = select.epoll()
        for fd in (requests.fileno(), ends.fileno(), program):
            self._epoll.register(fd, select.EPOLLIN)

    def serve(self) -> None:
        """Until the program has ended, or wants no more and its guests have ended."""
        wanted = True
        while wanted or self._children:
            for fd, _ in self._epoll.poll():
                if fd in self._children:
                    self._reap(fd)
                elif fd == self._requests.fileno():
                    wanted = self._answer()
                else:
                    self._end_all()
                    return

    def _answer(self) -> bool:
        try:
            request = self._requests.recv(1)
        except OSError:
            request = b""
        if request:
            self._fork(request)
            return True
        self._epoll.unregister(self._requests.fileno())
        return False

    def _fork(self, request: bytes) -> None:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._requests.send(NEW.pack(0, error.errno or EAGAIN))
            return
        with ours, theirs:
            try:
                pid = os.fork()
            except OSError as error:
                self._requests.send(NEW.pack(0, error.errno or EAGAIN))
                return
            if not pid:
                self._forget()
                ours.close()
                child(theirs, request)
            try:
                pidfd = os.pidfd_open(pid)
            except OSError as error:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self._requests.send(NEW.pack(0, error.errno or EAGAIN))
                return
            self._children[pidfd] = pid
            self._epoll.register(pidfd, select.EPOLLIN)
            try:
                send_descriptors(self._requests, NEW.pack(pid, 0), [ours.fileno(), pidfd])
            except OSError as error:
                self._take_back(pidfd, error.errno or EAGAIN)

    def _take_back(self, pidfd: int, error: int) -> None:
        """Its child could not be handed over: the program has ended, or the kernel has no room."""
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        try:
            self._requests.send(NEW.pack(0, error))
        except OSError:
            pass

    def _forget(self) -> None:
        """In a child: close all that is the server's."""
        self._epoll.close()
        self._requests.close()
        self._ends.close()
        for fd in (self._program, *self._children):
            os.close(fd)

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        try:
            self._ends.send(ENDED.pack(pid, status))
        except OSError:
            pass

    def _end_all(self) -> None:
        for pidfd in self._children:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pid in self._children.values():
            os.waitpid(pid, 0)


def child(sock: socket.socket, request: bytes) -> None:
    """The whole life of a guest's process. Does not return."""
    status = 1
    try:
        process = _Child(sock)
        process.run(request)
        status = 0
    except BaseException as error:
        # Ours to mend: the program shows where it happened.
        process.say(protocol.pack("bug", bug_text(error)))
    finally:
        os._exit(status)


class _Child:
    """A process that waits for a job, is a guest's tender, and ends."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sandbox: Sandbox | None = None
        self._warnings = 0

    def _make_ready(self, request: bytes) -> None:
        end_with(_server_pid)
        if request != AT_ONCE:
            rehearse("kvm" if request == FOR_KVM else "soft", run=request != FOR_KVM)
        self._created = _create_vm() if request == FOR_KVM else None
        on_termination_signals()
        self._stop = Stop()

    def run(self, request: bytes) -> None:
        self._make_ready(request)
        job = protocol.receive_job(self._sock)
        if job is None:  # the program has ended, or has no use for this child
            return
        config, descriptors = job
        needed, room = protocol.FIRST_FD + len(descriptors), _descriptors_max()
        if needed > room:
            text = f"descriptors: it takes {needed} of them (ulimit -n), at most {room} here"
            self.say(protocol.pack("error", protocol.pack_error(HostError(text))))
            return
        os.fchdir(descriptors[0])
        for index, fd in enumerate(descriptors):
            os.dup2(fd, protocol.FIRST_FD + index, inheritable=False)
            os.close(fd)
        os.close(protocol.FIRST_FD)
        self._run(config)

    def _run(self, config: Config) -> None:
        try:
            sandbox = self._sandbox = self._make_sandbox(config)
            outcome = machine.run(
                config,
                self._stop,
                self._warn,
                sandbox,
                started=self._started,
                created=self._created,
            )
        except TenderError as error:
            self.say(protocol.pack("error", protocol.pack_error(error)))
        else:
            self._ended(outcome)

    def _make_sandbox(self, config: Config) -> Sandbox | None:
        """The sandbox of this process; None: it is off."""
        if config.sandbox == "off":
            self._warn("sandbox: off: a guest that takes over its process has all of its rights")
            return None
        from tender.sandbox.sandbox import Sandbox

        return Sandbox(
            config.sandbox,
            config.user,
            self._warn,
            report_fd=self._sock.fileno(),
            parent_pid=_server_pid,
            namespaces=_namespaces,
        )

    def _started(self) -> None:
        sandbox = self._sandbox
        layers = [sandbox.layers, sandbox.missing_layers] if sandbox else [[], []]
        self.say(protocol.pack("started", layers))

    def _ended(self, outcome: Outcome) -> None:
        self.say(protocol.pack_outcome(outcome))

    def _warn(self, text: str) -> None:
        self._warnings += 1
        if self._warnings <= WARN_MAX:
            self.say(protocol.pack("warn", text[: protocol.TEXT_MAX]))

    def say(self, message: bytes) -> None:
        """One message is one write(2): what the sandbox allows."""
        try:
            report_fd = self._sandbox.report_fd if self._sandbox else None
            os.write(self._sock.fileno() if report_fd is None else report_fd, message)
        except OSError:
            pass  # the program is gone, and this process in a moment


def rehearse(cpu: str, run: bool) -> None:
    """Start a guest that comes with the package, on nothing, up to its first instruction or on.

    What is written to for the first time after a fork is copied, page by page, and a start
    writes to hundreds of pages: this way they are copied before the job is there.
    """
    kernel = os.path.join(os.path.dirname(machine.__file__), "guests", "hello-x86_64.hvt")
    config = Config(kernel, mem_bytes=REHEARSAL_BYTES, console_fd=_NULL, cpu=cpu)
    try:
        with Cleanup() as cleanup:
            guest = machine.assemble(config, Stop(), lambda _: None, cleanup)
            _rehearse_filter(guest.fd_table)
        if run:
            machine.run(config, Stop(), lambda _: None)
    except TenderError:
        pass  # this machine has no such CPU: a guest that wants it will hear why


def _create_vm() -> accel.KvmAccelerator | None:
    try:
        return accel.KvmAccelerator()
    except HostError:
        return None  # the guest that wants it will say why


def _rehearse_filter(table: FdTable) -> None:
    from tender.sandbox import seccomp

    table = FdTable(table.cpu, (*table.fixed, "report"), table.devices)
    seccomp.compile(seccomp.build(table.policies(), table.by_label()), trap=True)


_NULL = 1  # standard output of a server
_server_pid = 0
_namespaces: list[int] = []


def main(requests: int, ends: int, program: int) -> None:
    """The server's process; the numbers are those of its descriptors."""
    global _server_pid
    _server_pid = os.getpid()
    # Those of the program's settings that an exec hands on, and that it may have for its own ends.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the program's
    most = _descriptors_max()
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for each child
    _import_all()
    for cpu in ("soft", "kvm"):
        rehearse(cpu, run=cpu == "soft")
    gc.collect()
    gc.freeze()  # what the children share stays shared
    gc.disable()
    with socket.socket(fileno=requests) as asked, socket.socket(fileno=ends) as told:
        Server(asked, told, program).serve()


def _descriptors_max() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _import_all() -> None:
    """Import what a guest can need before it is forked: after lockdown it cannot."""
    from tender.boot import aarch64  # noqa: F401
    from tender.cpu import soft
    from tender.host import (  # noqa: F401
        overlay,
        remote,
        tap,
    )

    soft.installed()
    try:
        from tender.sandbox import confine, sandbox, seccomp  # noqa: F401

        seccomp.load()
        _namespaces.extend(confine.make_namespaces())
    except (ImportError, TenderError, OSError):
        pass  # a guest that wants it will hear why
    try:
        from tender import kvm  # noqa: F401
        from tender.engine import engine  # noqa: F401
    except ImportError:
        pass  # not on this machine
