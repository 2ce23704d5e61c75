"""TCP connections of a host, from both sides: enough for an exchange over a bad network.

The rule here: what is lost is sent again, what comes twice or out of order is left out and
acknowledged as it stands. No window of more than one piece, no options. What comes in is answered
with the switch's lock held and never waits. Source: RFC 9293.
"""

from __future__ import annotations

from collections import deque

from tender.testing.net import packets
from tender.testing.net.packets import ACK, FIN, PSH, RST, SYN, Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tender.testing.net.host import Host

AGAIN_EVERY_S = 0.5
TRIES = 20  # for what nobody waits for
PIECE = 1200  # bytes of data in a segment
WINDOW = 65535
_MASK = 0xFFFFFFFF
_HALF = 1 << 31  # of the sequence numbers: what is further ahead is behind
_FIRST = 1000  # our first sequence number: the same in every run


class Connection:
    """A connection of a host, from `host.tcp()` or from a listener; closed with its `with` block.

    `address` and `port` are the other side's. `received` has what it has said and nobody has read.
    Where a verb has no timeout, it is the connection's, else the switch's patience. What waits
    raises TimeoutError, or ConnectionResetError where the other side has broken it off.
    """

    def __init__(
        self,
        host: Host,
        mac: bytes,
        address: str,
        port: int,
        own_port: int,
        timeout: float | None = None,
    ) -> None:
        self.address = address
        self.port = port
        self.own_port = own_port
        self.received = bytearray()
        self._host = host
        self._mac = mac
        self._timeout = timeout
        self._heard = self._reset = False  # the other side's first word, and its last
        self._ended = False  # the other side says no more
        self._closed = False  # and neither do we
        self._next = self._acked = _FIRST
        self._expected = 0  # the other side's next sequence number
        self._listener: Listener | None = None
        host.connections[self._key] = self

    @property
    def _key(self) -> tuple[str, int, int]:
        return self.address, self.port, self.own_port

    @property
    def closed(self) -> bool:
        """Whether the other side has said all that it will."""
        return self._ended or self._reset

    def __repr__(self) -> str:
        how = "closed" if self.closed or self._closed else "open"
        return f"<TCP {self._host.address}:{self.own_port} - {self.address}:{self.port}, {how}>"

    # ---- What a test asks ----

    def send(self, data: bytes, timeout: float | None = None) -> None:
        """Send all of it, and wait until the other side has it."""
        packets.check("data", data, (bytes, bytearray), "bytes, as b'hello'")
        if self._closed:
            raise ValueError(f"{self!r}: the test has closed it")
        for start in range(0, len(data), PIECE):
            self._deliver(PSH | ACK, bytes(data[start : start + PIECE]), timeout)

    def read(self, n: int | None = None, timeout: float | None = None) -> bytes:
        """The next `n` bytes, or all up to where the other side ends the connection.

        Raises EOFError where it ends before `n` bytes.
        """
        if n is None:
            self._wait(lambda: self._ended, timeout)
            return self._take(len(self.received))
        self._wait(lambda: len(self.received) >= n or self._ended, timeout)
        if len(self.received) < n:
            raise EOFError(f"{self!r}: {n} bytes were waited for, and it ended{self._after()}")
        return self._take(n)

    def read_until(self, end: bytes, timeout: float | None = None) -> bytes:
        """All up to `end`, with it; EOFError where the connection ends before."""
        packets.check("end", end, (bytes, bytearray), "bytes, as b'\\r\\n'")
        self._wait(lambda: end in self.received or self._ended, timeout)
        if end not in self.received:
            raise EOFError(f"{self!r}: {end!r} was waited for, and it ended{self._after()}")
        return self._take(self.received.index(end) + len(end))

    def close(self) -> None:
        """Say that this is all, and go on: it is said again until the other side has heard it."""
        with self._host.lock:
            if self._closed or self._reset:
                return
            self._closed = True
            end, self._next = self._next, self._next + 1 & _MASK
            self._insist(FIN | ACK, end)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, n: int) -> bytes:
        with self._host.lock:
            taken = bytes(self.received[:n])
            del self.received[:n]
            return taken

    def _after(self) -> str:
        return f" after {bytes(self.received[-60:])!r}" if self.received else ""

    # ---- Sending ----

    def connect(self) -> Connection:
        """Ask for the connection, and wait until it is there."""
        self._deliver(SYN, b"", None)
        return self

    def _deliver(self, flags: int, data: bytes, timeout: float | None) -> None:
        """Send a segment until it is acknowledged."""
        first, self._next = self._next, self._next + len(data) + bool(flags & SYN) & _MASK
        self._wait(
            lambda: self._acked == self._next, timeout, lambda: self._send(flags, first, data)
        )

    def _wait(
        self,
        predicate: Callable[[], object],
        timeout: float | None,
        send: Callable[[], None] | None = None,
    ) -> None:
        def done() -> bool:
            return bool(predicate() or self._reset)

        given = self._timeout if timeout is None else timeout
        left = limit = self._host.patience if given is None else given
        while not done() and left > 0:
            if send is not None:
                send()
            self._host.wait_quietly(done, min(left, AGAIN_EVERY_S))
            left -= AGAIN_EVERY_S
        if predicate():
            return
        if self._reset:
            raise ConnectionResetError(
                f"{self.address}:{self.port} has refused or reset the connection"
            )
        raise TimeoutError(f"{self.address}:{self.port} did not answer within {limit:g} s")

    def _insist(self, flags: int, seq: int, tries: int = TRIES) -> None:
        """Send an end or an answer that nobody waits for, and again until it is acknowledged."""
        if seq - self._acked & _MASK < _HALF and tries and not self._reset:
            self._send(flags, seq, b"")
            self._host.call_later(AGAIN_EVERY_S, lambda: self._insist(flags, seq, tries - 1))

    def _send(self, flags: int, seq: int, data: bytes) -> None:
        ports = self.own_port, self.port
        segment = Segment(*ports, seq, self._expected, flags, WINDOW, data)
        payload = packets.build_tcp(str(self._host.address), self.address, segment)
        self._host.send_to(self._mac, self.address, packets.TCP, payload)

    # ---- What comes in, with the switch's lock held ----

    def accept(self, segment: Segment, listener: Listener) -> None:
        """The other side has asked for this connection."""
        self._listener = listener
        self._hear(segment)
        self._next = self._next + 1 & _MASK
        self._insist(SYN | ACK, _FIRST)

    def _hear(self, segment: Segment) -> None:
        self._heard = True
        self._expected = segment.seq + 1 & _MASK

    def on_segment(self, segment: Segment) -> None:
        if segment.flags & RST:
            self._reset = True
            return
        if segment.flags & ACK and segment.ack == self._next:
            self._acknowledged()
        if segment.flags & SYN and self._listener is not None:
            return  # it has not heard our answer, which is sent again
        if segment.flags & SYN and not self._heard:
            self._hear(segment)
        elif self._heard and segment.seq == self._expected:
            self._take_in(segment)
        if segment.data or segment.flags & (SYN | FIN):
            self._send(ACK, self._next, b"")

    def _acknowledged(self) -> None:
        self._acked = self._next
        if self._listener is not None:
            self._listener.put(self)
            self._listener = None

    def _take_in(self, segment: Segment) -> None:
        if not self._ended:
            self.received += segment.data
            self._ended = bool(segment.flags & FIN)
            self._expected = segment.seq + len(segment.data) + self._ended & _MASK

    @property
    def is_over(self) -> bool:
        """Whether its ports may have another one."""
        return self._reset or (self._ended and self._closed)


class Listener:
    """A TCP port of a host that others connect to, up to its `close()` or `with` block."""

    def __init__(self, host: Host, port: int) -> None:
        self.port = port
        self._host = host
        self._waiting: deque[Connection] = deque()

    def accept(self, timeout: float | None = None) -> Connection:
        """The next connection; TimeoutError if none comes. `timeout` is for this wait alone."""
        what = f"nobody connected to TCP port {self.port} of {self._host.address}"
        self._host.wait(lambda: self._waiting, timeout, lambda: what)
        return self._waiting.popleft()

    def close(self) -> None:
        """Take no more connections; those that were accepted go on."""
        self._host.unlisten(self)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TCP {self._host.address}:{self.port}, listening>"

    def put(self, connection: Connection) -> None:
        self._waiting.append(connection)

    def on_segment(self, mac: bytes, sender: str, segment: Segment) -> None:
        """A segment of a connection that is not there yet."""
        if segment.flags & (SYN | ACK) == SYN:
            connection = Connection(self._host, mac, sender, segment.source, self.port)
            connection.accept(segment, self)


def http_get(
    host: Host, address: str, path: str, port: int, timeout: float | None
) -> tuple[int, bytes]:
    """See Host.http_get."""
    packets.check("path", path, str, "text, as '/'")
    with host.tcp(address, port, timeout) as connection:
        name = address if port == 80 else f"{address}:{port}"
        connection.send(f"GET {path} HTTP/1.0\r\nHost: {name}\r\n\r\n".encode())
        head, _, body = connection.read().partition(b"\r\n\r\n")
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ValueError(f"{address}:{port} does not speak HTTP: {head[:60]!r}")
    return int(words[1]), body
