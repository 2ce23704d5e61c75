"""A saved guest of a program, in memory, and how it is asked for.

The program is to a guest's process what the snapshot helper is to the command's. What the process
has written is copied, because a guest that has taken it over goes on writing.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import threading
from time import monotonic

from tender.checks import as_path
from tender.errors import GuestEnded, HostError, SnapshotError, UsageError, one_line, reason
from tender.observe.touched import data_ranges
from tender.snapshot import file
from tender.snapshot.helper import AGAIN_MS, ASK, DONE, NO, READY, TEXT_MAX, YES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

WRITE_S = 60  # for a guest's process to write its memory to a file that is in memory itself
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Snapshot:
    """A saved guest in memory, which `Guest.snapshot` gives and guests are restored from.

    It holds everything that the guest knew, keys too. Its memory is given back with the object, or
    by `close`; guests that run have what they need of it.
    """

    def __init__(self, fd: int, name: str) -> None:
        """Copy it from a file that somebody else may go on writing to; `name` is the guest's."""
        self.name = name
        self.restored = False  # a guest was made from it
        self.fd = os.memfd_create("ptender-snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            snapshot, offset, _ = file.read(fd)
            _copy(fd, self.fd, offset + snapshot.mem_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            self.close()
            raise

    def take(self, *, clone: bool) -> None:
        """A guest is made from it; raises UsageError for a second one that is no clone."""
        if self.fd < 0:
            raise UsageError("this snapshot is closed")
        if self.restored and not clone:
            raise UsageError(
                "this snapshot was restored before, and two guests with the same secrets are no "
                "longer safe from each other: to have one all the same, clone=True"
            )
        self.restored = True

    @property
    def size(self) -> int:
        """The memory that it takes, in bytes."""
        return os.fstat(self.fd).st_blocks * 512

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which only its user can read, and which replaces one of this name.

        Raises:
            HostError: it can't be written.
        """
        name = as_path("path", path)
        hidden = f"{name}.{os.urandom(4).hex()}"
        try:
            fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _copy(self.fd, fd, os.fstat(self.fd).st_size)
                os.rename(hidden, name)
            except BaseException:
                os.unlink(hidden)
                raise
            finally:
                os.close(fd)
        except OSError as error:
            raise HostError(f"cannot write {name}", None, error.errno or 0) from None

    def close(self) -> None:
        """Give its memory back. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


def _copy(source: int, target: int, size: int) -> None:
    """Copy the first `size` bytes of a file; what is a hole there is one in the copy."""
    os.ftruncate(target, size)
    for start, end in data_ranges(source, 0, size):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            count = os.sendfile(target, source, start, end - start)
            if not count:
                raise SnapshotError("the snapshot has become shorter")
            start += count


class Requester:
    """Asks the process of a guest for snapshots: what it writes them to, and the socket to it.

    `descriptors` are its ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of one request at a time
        try:
            self._file = os.memfd_create("ptender-saved", os.MFD_CLOEXEC)
            try:
                self._sock, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            except OSError:
                os.close(self._file)
                raise
        except OSError as error:
            raise HostError("cannot make a file for snapshots", None, error.errno or 0) from None

    @property
    def descriptors(self) -> tuple[int, int]:
        return self._file, self._theirs.fileno()

    @property
    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """Both ends, which a fork of the program must not keep: it would hide the guest's end."""
        return self._sock, self._theirs

    def handed_over(self) -> None:
        """The child has its end of the socket."""
        self._theirs.close()

    def close(self) -> None:
        """Once its process has ended: then no request goes on."""
        with self._lock:
            self._theirs.close()
            self._sock.close()
            os.close(self._file)

    def save(
        self, name: str, interrupt: Callable[[], None], timeout_s: float, *, stop: bool
    ) -> Snapshot:
        """Have the guest saved at its next hypercall; then it goes on, or ends with `stop`.

        `interrupt` interrupts it. Raises TimeoutError, GuestEnded, HostError.
        """
        with self._lock:
            return self._save(name, interrupt, timeout_s, stop)

    def _save(
        self, name: str, interrupt: Callable[[], None], timeout_s: float, stop: bool
    ) -> Snapshot:
        self._send(ASK)
        try:
            self._wait_until_ready(interrupt, monotonic() + timeout_s, timeout_s)
        except BaseException:
            self._send(NO)  # it waits for that, when it comes to its hypercall
            raise
        self._send(YES)
        try:
            answer = self._wait_until_written(monotonic() + WRITE_S)
            if answer != DONE:
                text = one_line(answer.decode(errors="replace"))
                raise HostError(f"the guest was not saved: {text}")
            return Snapshot(self._file, name)
        except BaseException:
            stop = False
            raise
        finally:
            self._send(YES if stop else NO)

    def _wait_until_ready(
        self, interrupt: Callable[[], None], deadline: float, timeout_s: float
    ) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while True:
            interrupt()
            if poll.poll(AGAIN_MS) and self._receive() == READY:
                return
            if monotonic() >= deadline:
                raise TimeoutError(f"the guest made no hypercall within {timeout_s:g} s")

    def _wait_until_written(self, deadline: float) -> bytes:
        """What its process answers, which may send anything without end, or nothing."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        while (left_s := deadline - monotonic()) > 0:
            if poll.poll(left_s * 1000):
                answer = self._receive()
                if answer != READY:  # of a request that was given up
                    return answer
        raise HostError(f"the guest was not saved: its process did not answer within {WRITE_S} s")

    def _send(self, message: bytes) -> None:
        try:
            self._sock.send(message, socket.MSG_DONTWAIT)
        except OSError:
            pass  # it has ended, which the next `_receive` says, or reads nothing

    def _receive(self) -> bytes:
        try:
            message = self._sock.recv(TEXT_MAX)
        except OSError as error:
            raise HostError(f"the guest was not saved: {reason(error.errno or 0)}") from None
        if not message:
            raise GuestEnded("the guest has ended and was not saved")
        return message
