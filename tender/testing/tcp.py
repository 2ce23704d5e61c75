"""One TCP connection of a host, as a client: enough for a short exchange over a bad network.

The rule here: what is lost is sent again, what comes twice or out of order is left out and
acknowledged as it stands. No window of more than one piece, no options. Source: RFC 9293.
"""

from __future__ import annotations

from tender.testing import packets
from tender.testing.packets import ACK, FIN, PSH, RST, SYN, Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tender.testing.host import Host

AGAIN_EVERY_S = 0.5
PIECE = 1200  # bytes of data in a segment
WINDOW = 65535
_MASK = 0xFFFFFFFF
_FIRST = 1000  # our first sequence number: the same in every run


class Connection:
    """A connection from a host to a server; `received` is what the server has said so far."""

    def __init__(self, host: Host, address: str, port: int, timeout: float | None = None) -> None:
        self.received = bytearray()
        self.closed = False  # by the server
        self._host = host
        self._timeout = timeout
        self._address = address
        self._ports = host.free_port(), port
        self._established = self._reset = False
        self._next = self._acked = _FIRST
        self._expected = 0  # the server's next sequence number
        host.connections[address, port, self._ports[0]] = self
        self._deliver(SYN, b"")

    def send(self, data: bytes) -> None:
        """Send all of it, and wait until the server has it."""
        for start in range(0, len(data), PIECE):
            self._deliver(PSH | ACK, data[start : start + PIECE])

    def read(self) -> bytes:
        """All that the server says, up to its end of the connection."""
        self._wait(lambda: self.closed)
        return bytes(self.received)

    def close(self) -> None:
        """Say that this is all; the connection is forgotten."""
        if not self._reset:
            self._send(FIN | ACK, self._next, b"")
        self._host.connections.pop((self._address, self._ports[1], self._ports[0]), None)

    def _deliver(self, flags: int, data: bytes) -> None:
        """Send a segment until it is acknowledged."""
        first, self._next = self._next, self._next + len(data) + bool(flags & (SYN | FIN)) & _MASK
        self._wait(lambda: self._acked == self._next, lambda: self._send(flags, first, data))

    def _wait(
        self, predicate: Callable[[], object], send: Callable[[], None] | None = None
    ) -> None:
        def done() -> bool:
            return bool(self._reset or predicate())

        spent, limit = 0.0, self._host.patience if self._timeout is None else self._timeout
        while not done() and spent < limit:
            if send is not None:
                send()
            self._host.wait_quietly(done, AGAIN_EVERY_S)
            spent += AGAIN_EVERY_S
        server = f"{self._address}:{self._ports[1]}"
        if self._reset:
            raise ConnectionResetError(f"{server} has refused or reset the connection")
        if not done():
            raise TimeoutError(f"{server} did not answer within {limit:g} s")

    def _send(self, flags: int, seq: int, data: bytes) -> None:
        segment = Segment(*self._ports, seq, self._expected, flags, WINDOW, data)
        payload = packets.build_tcp(str(self._host.address), self._address, segment)
        self._host.send_ipv4(self._address, packets.TCP, payload)

    def on_segment(self, segment: Segment) -> None:
        """The server has sent something; called with the switch's lock held."""
        if segment.flags & RST:
            self._reset = True
            return
        if segment.flags & ACK and segment.ack == self._next:
            self._acked = segment.ack
        if segment.flags & SYN and not self._established:
            self._established = True
            self._expected = segment.seq + 1 & _MASK
        elif self._established and segment.seq == self._expected:
            self._take(segment)
        elif not (segment.data or segment.flags & (SYN | FIN)):
            return
        if segment.data or segment.flags & (SYN | FIN):
            self._send(ACK, self._next, b"")

    def _take(self, segment: Segment) -> None:
        if not self.closed:
            self.received += segment.data
            self.closed = bool(segment.flags & FIN)
            self._expected = segment.seq + len(segment.data) + self.closed & _MASK


def http_get(
    host: Host, address: str, path: str, port: int, timeout: float | None
) -> tuple[int, bytes]:
    """See Host.http_get."""
    connection = Connection(host, address, port, timeout)
    try:
        name = address if port == 80 else f"{address}:{port}"
        connection.send(f"GET {path} HTTP/1.0\r\nHost: {name}\r\n\r\n".encode())
        head, _, body = connection.read().partition(b"\r\n\r\n")
    finally:
        connection.close()
    words = head.split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        raise ValueError(f"{address}:{port} does not speak HTTP: {head[:60]!r}")
    return int(words[1]), body
