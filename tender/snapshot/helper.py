"""The snapshot helper: the process that takes requests for snapshots to a tender.

A tender can't open a file or answer a stranger after lockdown. So this process, forked before,
listens at a socket that its user alone can reach. It asks the tender, which it interrupts until the
guest has made a hypercall, and passes the file that the tender has written to whoever asked for it.
It ends with the tender.

The guest may have taken over the tender: what comes from there is a message of a few bytes.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without the enums of `signal`
import os
import select
import struct
from _socket import (
    AF_UNIX,
    SCM_RIGHTS,
    SO_PEERCRED,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    socket,
    socketpair,
)
from errno import ENOENT
from functools import partial

from tender._native import lib
from tender.errors import ConfigError, one_line
from tender.observe import counters, touched
from tender.sandbox.confine import move_descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.cleanup import Cleanup
    from tender.stop import Stop

TEXT_MAX = 500  # bytes of a reason
REQUEST_S = 1.0  # for a command to say what it asks for
AGAIN_MS = 10  # between two interruptions of a guest that has made no hypercall
# What a command sends: a request, and that it has kept the file. What it gets: the file with SAVED,
# or why there is none.
SAVE, SAVE_AND_STOP, KEPT = b"save", b"stop", b"kept"
SAVED = b"saved"
# Between helper and tender: somebody asks; the guest is at a hypercall; is it to be saved; it is
# saved (a reason in its place: it is not); is it to end.
ASK, READY, YES, NO, DONE = b"?", b"r", b"y", b"n", b"+"
_TENDER, _LISTEN, _FILE, _PIDFD = 3, 4, 5, 6  # descriptors of the helper


def socket_path(folder: str, pid: int) -> str:
    """Where the helper of the tender `pid` listens, in a folder of counters pages."""
    return f"{folder}/{pid}.snapshot"


def peer_uid(connection: socket) -> int:
    """The user whose process is at the other end."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(SOL_SOCKET, SO_PEERCRED, 12))
    return int(uid)


def open_requests(
    place: str | tuple[int, int], memory_fd: int, stop: Stop, cleanup: Cleanup
) -> Requests:
    """Start the helper of this process, which writes to a file without a name in a folder.

    `place` is the folder; or the file and the socket to a program that is its own helper.
    `memory_fd` is the file of the guest's memory where it has one. Raises ConfigError.
    """
    fd, helper_fd = place if isinstance(place, tuple) else _start_in(place, cleanup)
    source = touched.open_source(memory_fd)
    for each in source.values():
        cleanup.callback(partial(os.close, each))
    return Requests({"snapshot": fd, "snapshot-helper": helper_fd, **source}, stop)


def _start_in(folder: str, cleanup: Cleanup) -> tuple[int, int]:
    if unlisted := counters.unlisted():
        raise ConfigError(f"--snapshots: {unlisted}")
    where = counters.folder()
    try:
        fd = _open_nameless(folder)
        cleanup.callback(lambda: os.close(fd))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(f"--snapshots={folder}: cannot make a file there: {reason}") from None
    try:
        ours, pid = _start(fd, socket_path(where, os.getpid()), where)
    except OSError as error:
        raise ConfigError(f"--snapshots: cannot listen in {where}: {error.strerror}") from None
    helper_fd = ours.detach()
    cleanup.callback(lambda: _end(helper_fd, pid))
    return fd, helper_fd


def _open_nameless(folder: str) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno == ENOENT:
            raise
    path = os.path.join(folder, f".snapshot.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    return fd


def _start(fd: int, path: str, folder: str) -> tuple[socket, int]:
    """Fork the helper; the tender's end of the socket to it, and its PID."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    os.close(counters.open_folder(folder))
    try:
        os.unlink(path)  # of a tender that had this PID
    except FileNotFoundError:
        pass
    listener = socket(AF_UNIX, SOCK_SEQPACKET)
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    listener.bind(path)
    os.chmod(path, 0o600)
    listener.listen(4)
    pidfd = os.pidfd_open(os.getpid())
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            for signo in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):  # the tender's
                _signal.signal(signo, _signal.SIG_IGN)
            places = {
                _TENDER: theirs.fileno(),
                _LISTEN: listener.fileno(),
                _FILE: reader,
                _PIDFD: pidfd,
            }
            move_descriptors(places, 8)
            _serve()
        finally:
            try:
                os.unlink(path)
            finally:  # it may be gone: what follows is the tender's
                os._exit(0)
    for each in (reader, pidfd):
        os.close(each)
    theirs.close()
    listener.close()
    return ours, pid


def _end(fd: int, pid: int) -> None:
    os.close(fd)
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass  # whoever started this process had it ignore SIGCHLD


class Requests:
    """The tender's side: who asks for snapshots.

    `fds` has the file to write to ("snapshot"), the socket to the helper, and what tells which
    memory is touched.
    """

    def __init__(self, fds: dict[str, int], stop: Stop) -> None:
        self.fds = fds
        self._stop = stop

    @property
    def _fd(self) -> int:
        return self.fds["snapshot-helper"]

    def waiting(self) -> bool:
        """Whether somebody asks for a snapshot; takes the request, and does not wait."""
        try:
            return self._is_readable(0) and os.read(self._fd, 1) == ASK
        except OSError:
            return False  # the helper has ended

    def begin(self) -> bool:
        """The guest can be saved: whether that is still wanted. The answer is immediate."""
        return self._asked(READY)

    def done(self, error: str) -> bool:
        """It is saved, or not, for a reason: whether the guest is to end. So it is when the file
        is kept."""
        return self._asked(one_line(error).encode()[:TEXT_MAX] or DONE)

    def _asked(self, what: bytes) -> bool:
        try:
            os.write(self._fd, what)
            while not self._is_readable(-1):
                self._stop.check_request()
            answer = os.read(self._fd, 1)
            while answer == ASK:  # of another request, which this snapshot answers as well
                answer = os.read(self._fd, 1)
            return answer == YES
        except OSError:
            return False  # the helper has ended

    def _is_readable(self, timeout_ms: int) -> bool:
        return lib.host_events(self._fd, lib.POLLIN, timeout_ms) > 0


# The helper's side.


class _Gone(Exception):
    """The tender has ended."""


def _serve() -> None:
    tender, listener = socket(fileno=_TENDER), socket(fileno=_LISTEN)
    try:
        while True:
            if _TENDER in _wait([_TENDER, _LISTEN]):
                _receive(tender)  # about a request that was given up
                _send(tender, NO)
                continue
            fd, _ = listener._accept()  # type: ignore[attr-defined]
            command = socket(fileno=fd)
            try:
                _answer(tender, command)
            except OSError:
                pass  # the command has ended
            finally:
                command.close()
    except _Gone:
        pass


def _wait(fds: list[int], timeout_ms: int | None = None) -> set[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(timeout_ms)}


def _receive(tender: socket) -> bytes:
    try:
        message = tender.recv(TEXT_MAX)
    except OSError:
        message = b""
    if not message:
        raise _Gone
    return message


def _send(tender: socket, message: bytes) -> None:
    try:
        tender.send(message)
    except OSError:
        raise _Gone from None


def _answer(tender: socket, command: socket) -> None:
    """Answer one request; raises OSError where the command has ended."""
    if peer_uid(command) not in (0, os.geteuid()):
        return
    command.settimeout(REQUEST_S)
    request = command.recv(len(SAVE))
    command.settimeout(None)
    if request not in (SAVE, SAVE_AND_STOP) or not _is_ready(tender, command):
        return
    _send(tender, YES)
    outcome, is_kept = _receive(tender), False
    try:
        if outcome == DONE:
            file = (SOL_SOCKET, SCM_RIGHTS, struct.pack("i", _FILE))
            command.sendmsg([SAVED], [file])
        else:
            command.send(outcome)
        is_kept = request == SAVE_AND_STOP and command.recv(len(KEPT)) == KEPT
    finally:
        _send(tender, YES if is_kept else NO)
    if request == SAVE:
        command.recv(len(KEPT))  # until then, nothing else is written to the file


def _is_ready(tender: socket, command: socket) -> bool:
    """Interrupt the guest until it can be saved; False: the command does not wait any longer."""
    _send(tender, ASK)
    while True:
        try:
            _signal.pidfd_send_signal(_PIDFD, lib.STOP_KICK)
        except ProcessLookupError:
            raise _Gone from None
        ready = _wait([_TENDER, command.fileno()], AGAIN_MS)
        if _TENDER in ready:
            _receive(tender)
            return True
        if ready:
            return False
