"""The process that `create` leaves behind.

It has joined the container's cgroup and network namespace, holds the descriptors of its devices,
and waits for `start`; then it becomes the tender, which confines itself as ever. Whatever `create`
was given wrong is its own error: the process reports to it before it waits.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import termios
import time
from contextlib import suppress

from tender.config import NAME_MAX
from tender.dataclass import replace
from tender.errors import ConfigError, HostError, TenderError
from tender.oci import cgroups, hooks, network
from tender.oci.guest import memory, tender_command
from tender.oci.state import FIFO, Container, started

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from tender.oci.bundle import Bundle
    from tender.oci.guest import Guest
    from tender.oci.state import States


def create(
    states: States,
    id: str,
    bundle: Bundle,
    guest: Guest,
    tender: Sequence[str],
    pid_file: str | None,
    console_socket: str | None,
) -> int:
    """Create the container: the PID of its process. Raises TenderError, and leaves nothing then.

    `tender` is the command that runs a guest. `pid_file` gets the PID, `console_socket` the
    terminal, where the container has one.
    """
    memory(bundle, guest)  # its process would be killed in a group that is too small for it
    if bundle.terminal and not console_socket:
        raise ConfigError("process.terminal takes --console-socket")
    groups = cgroups.find(bundle.cgroup) if bundle.cgroup is not None else ()
    folders = tuple(each.folder for each in groups)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    container = Container(id, bundle.folder, now, folders)
    name = id.replace("+", "_")[:NAME_MAX]
    command = [*tender, f"--name={name}"]
    folder = states.make(id)
    process = None
    try:
        # Before there is anything that outlives this process: `delete` then finds all of it.
        states.save(folder, container)
        cgroups.make(groups, bundle.limits)
        process = _Process(
            lambda report: _become_tender(
                report, container, folder, bundle, guest, command, console_socket
            )
        )
        process.wait()  # until it is in the namespaces, which these hooks find by its PID
        hooks.run(bundle, "prestart", id, "creating", process.pid)
        hooks.run(bundle, "createRuntime", id, "creating", process.pid)
        process.go_on()
        process.wait()  # until it can become the tender
        made = replace(container, pid=process.pid, pid_started=started(process.pid) or "")
        states.save(folder, made)
        if pid_file:
            _write_pid(pid_file, process.pid)
        process.go_on()
        return process.pid
    except BaseException as error:
        if process:
            process.kill()
        cgroups.remove(folders)
        states.give_up(folder, id)
        if isinstance(error, OSError):
            raise HostError(f"create {id}", None, error.errno or 0) from None
        raise
    finally:
        os.close(folder)


def _write_pid(path: str, pid: int) -> None:
    hidden = f"{path}.{os.urandom(4).hex()}"
    try:
        with open(hidden, "x") as file:
            file.write(str(pid))
        os.replace(hidden, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(hidden)
        raise HostError(f"--pid-file {path}", "open", error.errno or 0) from None


class _Process:
    """The process that `create` leaves behind. It goes on step by step, and ends with `create`."""

    def __init__(self, run: Callable[[socket.socket], NoReturn]) -> None:
        self._report, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            self._report.close()
            run(theirs)
        theirs.close()
        self._lines = self._report.makefile("rb")

    def wait(self) -> None:
        """Wait until it has done a step. Raises ConfigError with what it could not do."""
        answer = self._lines.readline()
        if not answer:
            raise HostError("the container's process ended before it was ready")
        if error := json.loads(answer):
            raise ConfigError(error)

    def go_on(self) -> None:
        """Let it do the next step; the last is to wait for `start`."""
        self._report.send(b"!")

    def kill(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _become_tender(
    report: socket.socket,
    container: Container,
    folder: int,
    bundle: Bundle,
    guest: Guest,
    tender: Sequence[str],
    console_socket: str | None,
) -> NoReturn:
    """Prepare step by step, wait for `start`, and execute the tender."""
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        if bundle.oom_score_adj is not None:
            _set_oom_score(bundle.oom_score_adj)
        cgroups.join(container.cgroups)
        if bundle.terminal:
            _take_terminal(console_socket or "")
        if bundle.network is not None:
            network.enter(bundle.network)
        _end_step(report)
        hooks.run(bundle, "createContainer", container.id, "creating", os.getpid())
        command = tender_command(bundle, guest, tender)
        # For reading and writing: to open it and to read from it then need no writer.
        wait = os.open(FIFO, os.O_RDWR | os.O_CLOEXEC, dir_fd=folder)
        _end_step(report)
        report.close()
        os.read(wait, 1)
        os.execv(command[0], command)
    except BaseException as error:
        text = str(error) if isinstance(error, TenderError) else f"{type(error).__name__}: {error}"
        try:
            report.send(json.dumps(text).encode() + b"\n")
        except OSError:
            os.write(2, f"ptender-oci: {text}\n".encode())
    os._exit(1)


def _end_step(report: socket.socket) -> None:
    report.send(json.dumps("").encode() + b"\n")
    if not report.recv(1):
        os._exit(1)  # `create` has failed or was killed


def _set_oom_score(value: int) -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(value))
    except OSError as error:
        raise HostError(f"process.oomScoreAdj {value}", "write", error.errno or 0) from None


def _take_terminal(path: str) -> None:
    """Make a terminal of our own, and send the other end of it to the engine."""
    master, slave = os.openpty()
    try:
        with socket.socket(socket.AF_UNIX) as engine:
            engine.connect(path)
            socket.send_fds(engine, [b"/dev/ptmx"], [master])
    except OSError as error:
        raise HostError(f"--console-socket {path}", "connect", error.errno or 0) from None
    os.close(master)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)
    os.close(slave)
