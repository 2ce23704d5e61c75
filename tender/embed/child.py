"""The process of one guest: from a job to an outcome.

The rule here: after lockdown it reports by write(2) and exits by os._exit. The program's side is
tender/embed/process.py.
"""

from __future__ import annotations

import gc
import os
import resource
import sys

from tender import accel, machine
from tender.assemble import assemble
from tender.cleanup import Cleanup
from tender.config import Config
from tender.devices import open_inputs
from tender.embed import heap, protocol
from tender.errors import HostError, TenderError, bug_text, serve_program
from tender.host import set_guest_title, set_title
from tender.observe import counters
from tender.sandbox.fdtable import FdTable
from tender.stop import Stop, end_with, on_termination_signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from tender.sandbox.sandbox import Sandbox

WARM_UP_BYTES = 8 << 20  # of guest memory
WARNINGS_MAX = 200  # there are far fewer that differ
NULL_FD = 1  # a server's standard output


def run(sock: socket.socket, request: bytes, server_pid: int, namespaces: list[int]) -> None:
    """The whole life of a guest's process, which ends here: does not return.

    `sock` is its end of the socket pair. It ends with the process `server_pid`, and joins
    `namespaces` (confine.make_namespaces) when it enters its sandbox.
    """
    report = _Report(sock)
    status = 1
    try:
        end_with(server_pid)
        for cpu, warm in protocol.WARM.items():
            if request == warm:
                warm_up(cpu)
        created = _create_vm() if request == protocol.WARM["kvm"] else None
        if request != protocol.COLD:  # else it has a job at once
            set_title("ptender:ready", ["ptender", "ready"])
        on_termination_signals(interrupt=False)
        stop = Stop()
        if protocol.take_fresh(sock):
            _execute(sock, server_pid, namespaces)
        received = protocol.receive_job(sock)
        if received is not None:  # else the program has ended
            job, descriptors = received
            _take_context(job, descriptors)
            config = job.config
            name = ["--name", config.name] if config.name else []
            set_guest_title("ptender", config, [*name, config.kernel])
            if config.sandbox == "off":
                report.warn("sandbox: off: a guest that takes over its process has all its rights")
            else:
                from tender.sandbox.sandbox import Sandbox

                report.sandbox = Sandbox(
                    config.sandbox,
                    config.user,
                    report.warn,
                    report_fd=sock.fileno(),
                    parent_pid=server_pid,
                    namespaces=namespaces,
                    copies=heap.Copies(stop),
                )
            outcome = machine.run(
                config,
                stop,
                report.warn,
                report.sandbox,
                started=report.started,
                created=created,
                publish=True,
            )
            report.send(protocol.pack_outcome(outcome))
        status = 0
    except TenderError as error:
        report.send(protocol.pack("error", protocol.pack_error(error)))
    except BaseException as error:
        report.send(protocol.pack("bug", bug_text(error)))
    finally:
        os._exit(status)


CODE = (
    "import sys; sys.path[:] = {path!r}; from tender.embed import child; "
    "child.resume({fd}, {server_pid}, {namespaces})"
)


def _execute(sock: socket.socket, server_pid: int, namespaces: list[int]) -> None:
    """Begin anew as a Python of its own, with other addresses than the server and its children."""
    fd = sock.fileno()
    for each in (fd, *namespaces):
        os.set_inheritable(each, True)
    code = CODE.format(path=sys.path, fd=fd, server_pid=server_pid, namespaces=namespaces)
    try:
        os.execv(sys.executable, [sys.executable, "-IS", "-c", code])
    except OSError as error:
        text = "cannot start a process for the guest"
        raise HostError(text, "execve", error.errno or 0) from None


def resume(fd: int, server_pid: int, namespaces: list[int]) -> None:
    """`run`, in a process that was executed."""
    from socket import socket

    serve_program()
    gc.disable()
    for each in (fd, *namespaces):
        os.set_inheritable(each, False)
    run(socket(fileno=fd), protocol.COLD, server_pid, namespaces)


def descriptors_max() -> int:
    """How many descriptors a process of this program may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _take_context(job: protocol.Job, descriptors: list[int]) -> None:
    """Take what the program had when it sent the job, and number its descriptors."""
    *devices, folder = descriptors
    needed, limit = protocol.FIRST_FD + len(devices), descriptors_max()
    if needed > limit:
        raise HostError(
            f"the guest's process needs {needed} descriptors and its limit is {limit}: raise it "
            "(ulimit -n)"
        )
    for fd, number in protocol.numbers_in_child(devices).items():
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
    os.fchdir(folder)
    os.close(folder)
    os.environ[accel.ENVIRONMENT] = job.default_cpu
    if job.umask is not None:
        os.umask(job.umask)
    try:
        os.sched_setaffinity(0, job.cpus)
    except OSError as error:
        raise HostError("the program's CPUs", "sched_setaffinity", error.errno or 0) from None


class _Report:
    """What the process sends to the program. One message is one write(2)."""

    def __init__(self, sock: socket.socket) -> None:
        self.sandbox: Sandbox | None = None
        self._sock = sock
        self._warnings = 0

    def send(self, message: bytes) -> None:
        """Send a message, unless the program has ended."""
        moved_fd = self.sandbox.report_fd if self.sandbox else None
        try:
            os.write(self._sock.fileno() if moved_fd is None else moved_fd, message)
        except OSError:
            pass

    def started(self, notice: str) -> None:
        """The guest is about to run; `notice` is one on its CPU, if any."""
        sandbox = self.sandbox
        layers = [sandbox.layers, sandbox.missing_layers] if sandbox else [[], []]
        is_guest = sandbox is not None and sandbox.is_guest
        self.send(protocol.pack("started", [*layers, notice, is_guest, counters.own_name]))

    def warn(self, text: str) -> None:
        """Send a warning."""
        self._warnings += 1
        if self._warnings <= WARNINGS_MAX:
            self.send(protocol.pack("warning", text[: protocol.TEXT_MAX]))


def warm_up(cpu: str) -> None:
    """Start a guest that comes with the package, without devices; without KVM, run it as well.

    A page that is written to for the first time after a fork is copied, and a start writes to
    hundreds of pages: a child that has warmed up has its copies before it gets a job.
    """
    kernel = os.path.join(os.path.dirname(machine.__file__), "guests", "hello-x86_64.hvt")
    config = Config(kernel, mem_bytes=WARM_UP_BYTES, console_fd=NULL_FD, cpu=cpu)
    try:
        with Cleanup() as cleanup:
            inputs = open_inputs(config, cleanup)
            guest = assemble(inputs, Stop(), lambda _: None, cleanup)
            _prepare_filters(guest.fd_table)
        if cpu != "kvm":
            machine.run(config, Stop(), lambda _: None)
    except TenderError:
        pass  # this machine has no such CPU: a guest that needs it gets the error


def _create_vm() -> accel.KvmAccelerator | None:
    try:
        return accel.KvmAccelerator()
    except HostError:
        return None  # the guest that needs it gets the error


def _prepare_filters(table: FdTable) -> None:
    """Prepare the filters of guests with the descriptors of this one, and one network."""
    from tender.sandbox import seccomp

    fixed = (*(label for label in table.fixed if label != "stderr"), "stats", "report")
    for devices in ({}, {1: ("net",)}):
        seccomp.prepare(FdTable(table.cpu, fixed, devices, {}))
