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

from tender.config import NAME_MAX
from tender.errors import ConfigError, HostError, TenderError
from tender.oci import cgroups, hooks, network
from tender.oci.guest import memory, tender_command
from tender.oci.state import FIFO, Container, started

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
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
    mem_mib = memory(guest.unikernel.mem_mib, bundle.limits.get("memory.limit"))
    if bundle.terminal and not console_socket:
        raise ConfigError("process.terminal takes --console-socket")
    states.make(id)
    process = None
    try:
        hooks.run(bundle, "prestart", id, "creating")
        hooks.run(bundle, "createRuntime", id, "creating")
        named = [*tender, f"--name={id.replace('+', '_')[:NAME_MAX]}"]
        process = _Process(states.path(id, FIFO), bundle, guest, named, mem_mib, console_socket)
        container = Container(
            id,
            bundle.folder,
            process.pid,
            started(process.pid) or "",
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            process.cgroups,
        )
        states.save(container)
        if pid_file:
            with open(f"{pid_file}.new", "w") as file:
                file.write(str(process.pid))
            os.replace(f"{pid_file}.new", pid_file)
        process.release()
        return process.pid
    except BaseException as error:
        if process:
            process.kill()
        states.remove(id)
        if isinstance(error, OSError):
            raise HostError(f"create {id}", None, error.errno or 0) from None
        raise


class _Process:
    """The process that `create` leaves behind, which waits until it may become the tender."""

    def __init__(
        self,
        fifo: str,
        bundle: Bundle,
        guest: Guest,
        tender: Sequence[str],
        mem_mib: int,
        console_socket: str | None,
    ) -> None:
        self.cgroups: tuple[str, ...] = ()
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            ours.close()
            _become_tender(theirs, fifo, bundle, guest, tender, mem_mib, console_socket)
        theirs.close()
        self._report = ours
        with ours.makefile("rb") as file:
            answer = file.readline()
        if not answer:
            self.kill()
            raise HostError("the container's process ended before it was ready")
        value = json.loads(answer)
        self.cgroups = tuple(value.get("cgroups", ()))
        if "error" in value:
            self.kill()
            raise ConfigError(value["error"])

    def release(self) -> None:
        """Let it wait for `start`; until then it ends with this process."""
        self._report.send(b"!")
        self._report.close()

    def kill(self) -> None:
        """End it, and its cgroup with it."""
        self._report.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        cgroups.remove(self.cgroups)


def _become_tender(
    report: socket.socket,
    fifo: str,
    bundle: Bundle,
    guest: Guest,
    tender: Sequence[str],
    mem_mib: int,
    console_socket: str | None,
) -> NoReturn:
    """Prepare, report, wait for `start`, and execute the tender."""
    joined: tuple[str, ...] = ()
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        if bundle.oom_score_adj is not None:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(str(bundle.oom_score_adj))
        if bundle.cgroup is not None:
            joined = cgroups.join(bundle.cgroup, bundle.limits)
        if bundle.terminal:
            _take_terminal(console_socket or "")
        if bundle.network is not None:
            network.enter(bundle.network)
        command = tender_command(bundle, guest, tender, mem_mib)
        # For reading and writing: to open it and to read from it then need no writer.
        wait = os.open(fifo, os.O_RDWR | os.O_CLOEXEC)
        report.send(json.dumps({"cgroups": joined}).encode() + b"\n")
        if not report.recv(1):
            os._exit(1)  # `create` has failed or was killed
        report.close()
        os.read(wait, 1)
        os.execv(command[0], command)
    except BaseException as error:
        text = str(error) if isinstance(error, TenderError) else f"{type(error).__name__}: {error}"
        try:
            report.send(json.dumps({"cgroups": joined, "error": text}).encode() + b"\n")
        except OSError:
            os.write(2, f"ptender-oci: {text}\n".encode())
    os._exit(1)


def _take_terminal(path: str) -> None:
    """Make a terminal of our own, and send the other end of it to the engine."""
    master, slave = os.openpty()
    with socket.socket(socket.AF_UNIX) as engine:
        engine.connect(path)
        socket.send_fds(engine, [b"/dev/ptmx"], [master])
    os.close(master)
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)
    os.close(slave)
