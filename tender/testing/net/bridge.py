"""A bridge from this machine into the switch: programs with real sockets talk to a guest.

Each connection has two threads, one per direction: both sides may block.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
import sys
import threading

from tender.embed.reactor import READ, reactor
from tender.errors import TenderError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tender.testing.net.tcp import Connection

LOCALHOST = "127.0.0.1"
PIECE = 1 << 16  # bytes read from a socket at a time
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: no FIN


class Bridge:
    """A listening socket on 127.0.0.1 whose connections are those of a host; see Host.bridge.

    `port` is its number. It is closed, with its connections, by `close()`, its `with` block, or
    the end of the switch.
    """

    def __init__(self, connect: Callable[[], Connection], target: str, port: int) -> None:
        try:
            self._listener = socket.create_server((LOCALHOST, port))
        except OSError as error:
            remedy = "; local_port=0 takes a free one" if error.errno == errno.EADDRINUSE else ""
            why = os.strerror(error.errno or 0)
            raise UsageError(f"no bridge on {LOCALHOST}:{port}: {why}{remedy}") from None
        self.port: int = self._listener.getsockname()[1]
        self._connect = connect
        self._target = target
        self._lock = threading.Lock()
        self._open: dict[threading.Thread, tuple[socket.socket, Connection]] = {}
        self._closed = False
        self._listener.setblocking(False)
        reactor().register(self._listener.fileno(), READ, self._accept)

    @property
    def url(self) -> str:
        """For a web client: http://127.0.0.1:PORT, without a slash at its end."""
        return f"http://{LOCALHOST}:{self.port}"

    def __repr__(self) -> str:
        return f"<bridge from {LOCALHOST}:{self.port} to {self._target}>"

    def close(self) -> None:
        """Close it, and end its connections. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            still_open = dict(self._open)
        reactor().unregister(self._listener.fileno())
        self._listener.close()
        for sock, connection in still_open.values():
            _end(sock, connection, socket.SHUT_RDWR)
        for thread in still_open:
            thread.join()

    def __enter__(self) -> Bridge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone already, or no descriptor is left
            return
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            connection = self._connect()
        except (OSError, TenderError) as error:
            if not self._closed:
                print(f"{self!r}: {error}", file=sys.stderr)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            sock.close()
            return
        back = threading.Thread(
            target=self._copy, args=(_from_switch, sock, connection), daemon=True
        )
        with self._lock:
            if self._closed:
                _abort(sock, connection)
            self._open[threading.current_thread()] = sock, connection
        back.start()
        self._copy(_to_switch, sock, connection)
        back.join()
        with self._lock:
            del self._open[threading.current_thread()]
            sock.close()

    def _copy(
        self,
        function: Callable[[socket.socket, Connection], None],
        sock: socket.socket,
        connection: Connection,
    ) -> None:
        """Copy one direction; where either side fails, both are reset."""
        try:
            function(sock, connection)
        except OSError:  # the switch's side raises them as well
            if not self._closed:
                _abort(sock, connection)


def _to_switch(sock: socket.socket, connection: Connection) -> None:
    while data := sock.recv(PIECE):
        connection.send(data)
    connection.close()


def _from_switch(sock: socket.socket, connection: Connection) -> None:
    while data := connection.read_some(timeout=math.inf):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def _abort(sock: socket.socket, connection: Connection) -> None:
    """Reset both sides, and end whatever waits for them."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    _end(sock, connection, socket.SHUT_RD)  # which sends nothing


def _end(sock: socket.socket, connection: Connection, how: int) -> None:
    connection.reset()
    try:
        sock.shutdown(how)
    except OSError:  # its peer has reset it
        pass
