"""The process that forks the processes of a program's guests.

The rule here: it has imported all that a guest can need, and has nothing of any guest. Nobody
outlives the program: the server watches it, and the kernel ends the children with the server. The
program's side is tender/embed/server.py.
"""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import select
import signal
import socket
from errno import EAGAIN, EMFILE

from tender.embed import child, heap
from tender.embed.protocol import EXITED, FORKED, WARM
from tender.errors import HostError, TenderError, serve_program
from tender.host import set_title

FIRST_PIDFD = 64  # of the children; all that a child has from its server is below


class Forker:
    """Forks a child for each request, and reports how each one exited."""

    def __init__(
        self, requests: socket.socket, exits: socket.socket, program: int, namespaces: list[int]
    ) -> None:
        self._requests = requests
        self._exits = exits
        self._program = program  # a pidfd
        self._namespaces = namespaces
        self._pid = os.getpid()
        self._children: dict[int, int] = {}  # PID by pidfd
        self._epoll = select.epoll()
        for fd in (requests.fileno(), exits.fileno(), program):
            self._epoll.register(fd, select.EPOLLIN)

    def serve(self) -> None:
        """Serve until the program has ended or has closed its sockets; then end all children."""
        while True:
            for fd, _ in self._epoll.poll():
                if fd in self._children:
                    self._reap(fd)
                    continue
                request = self._request() if fd == self._requests.fileno() else b""
                if not request:
                    self._end_all()
                    return
                try:
                    self._fork(request)
                except OSError as error:
                    self._refuse(error)

    def _request(self) -> bytes:
        try:
            return self._requests.recv(1)
        except OSError:
            return b""

    def _fork(self, request: bytes) -> None:
        """Fork a child and send its PID, its pidfd and the program's end of its socket pair."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            pid = os.fork()
            if not pid:
                self._forget()
                ours.close()
                child.run(theirs, request, self._pid, self._namespaces)
            try:
                pidfd = _pidfd(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
            self._children[pidfd] = pid
            self._epoll.register(pidfd, select.EPOLLIN)
            try:
                socket.send_fds(self._requests, [FORKED.pack(pid, 0)], [ours.fileno(), pidfd])
            except OSError:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                raise

    def _refuse(self, error: OSError) -> None:
        try:
            self._requests.send(FORKED.pack(0, error.errno or EAGAIN))
        except OSError:
            pass  # the program has ended

    def _forget(self) -> None:
        """Close in a child what is the server's."""
        self._epoll.close()
        self._requests.close()
        self._exits.close()
        os.close(self._program)
        if self._children:
            os.closerange(FIRST_PIDFD, max(self._children) + 1)

    def _reap(self, pidfd: int) -> None:
        pid = self._children.pop(pidfd)
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        try:
            self._exits.send(EXITED.pack(pid, status))
        except OSError:
            pass

    def _end_all(self) -> None:
        for pidfd in self._children:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for pid in self._children.values():
            os.waitpid(pid, 0)


def _pidfd(pid: int) -> int:
    """A pidfd whose number is among those that a child closes at once."""
    low = os.pidfd_open(pid)
    try:
        return fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, FIRST_PIDFD)
    except OSError:  # EINVAL where the limit is below that
        raise OSError(EMFILE, os.strerror(EMFILE)) from None
    finally:
        os.close(low)


def main(requests: int, exits: int, program: int) -> None:
    """The server's process; the arguments are the numbers of its descriptors."""
    serve_program()
    set_title("ptender:server", ["ptender", "server", "of", str(os.getppid())])
    # Settings of the program that an exec hands on.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the program's
    limit = child.descriptors_max()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # one for each child
    namespaces = _import_all()
    for cpu in WARM:
        child.warm_up(cpu)
    gc.collect()
    gc.freeze()  # what the children share stays shared
    gc.disable()
    try:
        heap.keep()
    except OSError:
        pass  # the children keep their copies
    with socket.socket(fileno=requests) as request, socket.socket(fileno=exits) as exit_:
        Forker(request, exit_, program, namespaces).serve()


def _import_all() -> list[int]:
    """Import what a guest can need, which a child can't after lockdown; the namespaces for it."""
    from tender.boot import aarch64  # noqa: F401
    from tender.cpu import soft
    from tender.host import (  # noqa: F401
        block,
        net,
        overlay,
        remote,
        tap,
    )
    from tender.observe import counters
    from tender.snapshot import helper, restore, save  # noqa: F401

    namespaces: list[int] = []
    counters.remove_dead()
    soft.installed()
    try:
        from tender.sandbox import confine, sandbox, seccomp  # noqa: F401

        seccomp.load()
        for policy in ("spt", "spt-exit"):  # whose children are not warmed up
            seccomp.entries(policy)
        namespaces = confine.make_namespaces()
    except (ImportError, TenderError, OSError):
        pass  # a guest that needs it gets the error
    try:
        from tender import kvm  # noqa: F401
        from tender.cpu import kvm_state, native, xsave  # noqa: F401
        from tender.engine import engine  # noqa: F401
        from tender.spt import process, refusals  # noqa: F401

        native.keep_program()
    except (ImportError, HostError):
        pass  # not on this machine
    return namespaces
