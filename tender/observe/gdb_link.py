"""The connection of a debugger: a port of 127.0.0.1, a Unix socket, or standard input and output.

The rule here: everything is opened before lockdown but the connections themselves, which accept4(2)
makes. One debugger at a time; further ones are turned away.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # without the enums of `signal`
import errno
import os
import select
import stat

from tender._native import ffi, lib
from tender.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from tender.cleanup import Cleanup
    from tender.stop import Stop

LOCALHOST = "127.0.0.1"
STDIO = "-"
_READ_MAX = 1 << 16
_WAIT_MS = 1000  # a signal ends a wait
_TURN_AWAY_MAX = 16  # at a time
_BACKLOG = 4
_GONE = lib.POLLHUP | lib.POLLERR | lib.POLLNVAL


class Link:
    """`fds` has its descriptors by label: "gdb-listen", or "gdb-in" and "gdb-out"."""

    def __init__(self, fds: Mapping[str, int], stop: Stop) -> None:
        self._listen = fds.get("gdb-listen", -1)
        self._in, self._out = fds.get("gdb-in", -1), fds.get("gdb-out", -1)
        self.is_pipe = self._listen < 0
        self._stop = stop

    @property
    def connected(self) -> bool:
        """Whether there is a debugger."""
        return self._in >= 0

    def accept(self) -> bool:
        """Take one that waits, if there is none yet; True: there is a new one."""
        if self.is_pipe:
            return False
        if self.connected:
            self._turn_away()
            return False
        self._in = self._out = self._accept()
        return self.connected

    def _accept(self) -> int:
        return int(lib.host_accept(self._listen))

    def _turn_away(self) -> None:
        for _ in range(_TURN_AWAY_MAX):
            other = self._accept()
            if other < 0:
                return
            os.close(other)

    def wait(self) -> None:
        """Return when something may have come, or after a second; raises Stopped."""
        fd = self._in if self.connected else self._listen
        lib.host_events(fd, lib.POLLIN, _WAIT_MS)
        self._stop.check_request()

    def read(self) -> bytes | None:
        """What has come; None: the debugger is gone."""
        events = lib.host_events(self._in, lib.POLLIN, 0)
        if events <= 0:
            return b""
        try:
            data = os.read(self._in, _READ_MAX) if events & (lib.POLLIN | lib.POLLHUP) else b""
        except BlockingIOError:
            return b""
        except OSError:
            return None
        return data or None

    def write(self, data: bytes) -> bool:
        """Send it; False: the debugger is gone. Raises Stopped."""
        while data:
            written = lib.host_write(self._out, data, len(data))
            if written >= 0:
                data = data[written:]
            elif ffi.errno == errno.EAGAIN:
                lib.host_events(self._out, lib.POLLOUT, _WAIT_MS)
                self._stop.check_request()
            elif ffi.errno != errno.EINTR:
                return False
        return True

    def disconnect(self) -> None:
        """Let go of the debugger."""
        if self._in >= 0 and not self.is_pipe:
            os.close(self._in)
        self._in = self._out = -1


def open_link(address: int | str, cleanup: Cleanup) -> dict[str, int]:
    """Open what Link needs: a port number, the path of a socket, or `-`. Raises ConfigError."""
    if address == STDIO:
        fds = {"gdb-in": os.dup(0), "gdb-out": os.dup(1)}
    else:
        fds = {"gdb-listen": _listen(address, cleanup)}
    for fd in fds.values():
        cleanup.callback(lambda fd=fd: os.close(fd))  # type: ignore[misc]
    return fds


def command(address: int | str, kernel: str, gdb: str = "gdb") -> str:
    """What to type in another terminal."""
    from shlex import join

    at = f":{address}" if isinstance(address, int) else address
    return join([gdb, kernel, "-ex", f"target remote {at}"])


def _listen(address: int | str, cleanup: Cleanup) -> int:
    import socket

    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if isinstance(address, int):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((LOCALHOST, address))
        else:
            _bind(sock, address, cleanup)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        where = f"port {address}" if isinstance(address, int) else address
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"gdb: cannot listen on {where}: {reason}") from None
    return sock.detach()


def _bind(sock: socket.socket, path: str, cleanup: Cleanup) -> None:
    """Make the socket, for its owner alone; it is gone when this process has ended."""
    before = os.umask(0o177)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_left_over(path):
                raise
            os.unlink(path)
            sock.bind(path)
    finally:
        os.umask(before)
    _remove_at_the_end(path, cleanup)


def _is_left_over(path: str) -> bool:
    """Whether it is a socket on which nobody listens."""
    import socket

    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        return sock.connect_ex(path) == errno.ECONNREFUSED


def _remove_at_the_end(path: str, cleanup: Cleanup) -> None:
    """By a process that waits for the end of this one, which can remove nothing after lockdown."""
    info = os.lstat(path)
    parent = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid == 0:
        try:
            for signo in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):
                _signal.signal(signo, _signal.SIG_IGN)
            folder = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY)
            _wait_and_remove(parent, folder, os.path.basename(path), info)
        finally:
            os._exit(0)
    os.close(parent)
    cleanup.callback(lambda: _remove(path, info))


def _wait_and_remove(parent: int, folder: int, name: str, info: os.stat_result) -> None:
    from tender.sandbox.confine import move_descriptors

    move_descriptors({3: parent, 4: folder}, 8)
    poll = select.poll()
    poll.register(3, select.POLLIN)
    poll.poll()
    _remove(name, info, 4)


def _remove(path: str, info: os.stat_result, folder: int | None = None) -> None:
    try:
        if os.path.samestat(os.stat(path, dir_fd=folder, follow_symlinks=False), info):
            os.unlink(path, dir_fd=folder)
    except OSError:
        pass  # it is gone, or another process's by now
