"""The guests' processes of this program, and the fork server that they come from.

The rule here: nothing outlives the program, and a fork of the program has none of its guests.
"""

from __future__ import annotations

import atexit
import os
import select
import threading

from tender.embed.server import Child, ForkServer, Gone
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from tender.embed.latch import Latch

    class Process(Protocol):
        """The process of one guest."""

        ended: Latch

        def report_end(self) -> None:
            """Call who wants to know of its end."""

        def forget(self) -> None:
            """Close its descriptors."""


TRIES = 3  # to get a child from servers that are killed
DEATH_S = 5.0  # for a killed process to end


class Program:
    """The fork server of this program, and the processes of its guests."""

    def __init__(self) -> None:
        self.is_ending = False
        self._lock = threading.Lock()
        self._server: ForkServer | None = None
        self._processes: set[Process] = set()

    @property
    def server(self) -> ForkServer:
        """The server, which is started if there is none; HostError where it can't be used."""
        with self._lock:
            if self.is_ending:
                raise HostError("cannot start a process for the guest: the program is ending")
            if self._server is None or self._server.gone:
                self._server = ForkServer()
            return self._server

    def take(self, process: Process) -> tuple[ForkServer, Child]:
        """A child that waits for the job of `process`."""
        for _ in range(TRIES):
            server = self.server
            server.check_context()
            try:
                child = server.take()
            except Gone:
                if not self.is_ending:
                    server.check_interpreter()
                continue
            if not _is_dead(child.pidfd):
                with self._lock:
                    self._processes.add(process)
                return server, child
            server.on_exit(child.pid, lambda _: None)  # it was killed while it waited
            child.close()
        raise HostError(
            f"cannot start a process for the guest: its fork server was killed {TRIES} times"
        )

    def remove(self, process: Process) -> None:
        """The process has ended."""
        with self._lock:
            self._processes.discard(process)

    def close(self) -> None:
        """End the guests with the program. Who waits for one is woken."""
        with self._lock:
            self.is_ending = True
            server, processes = self._server, list(self._processes)
        if server is not None:
            server.close()
        for process in processes:
            if process.ended.wait(DEATH_S):
                process.report_end()

    def forget(self) -> None:
        """Close all descriptors in a forked child."""
        if self._server is not None:
            self._server.forget()
        for process in self._processes:
            process.forget()


def _is_dead(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


_lock = threading.Lock()
_program: Program | None = None


def program_here() -> Program:
    """This program's; a forked child gets one of its own when it asks."""
    global _program
    with _lock:
        if _program is None:
            _program = Program()
        return _program


def program_ends() -> bool:
    """Whether this program is about to end, and its guests with it."""
    return _program is not None and _program.is_ending


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
