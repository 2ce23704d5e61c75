"""The TCP of a host, as client and as server: enough for an exchange over a bad network.

A lost segment is sent again; one that comes twice or out of order is dropped, and what was received
so far is acknowledged. One segment at a time is under way, without options. Source: RFC 9293.

The rule here is that of stack.py: what receives never waits.
"""

from __future__ import annotations

from collections import deque

from tender.checks import as_port
from tender.errors import UsageError
from tender.testing.net import packets
from tender.testing.net.packets import ACK, FIN, PSH, RST, SYN, Packet, Segment, endpoint
from tender.testing.net.stack import as_data, as_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tender.testing.net.stack import Stack

RETRY_S = 0.2
TRIES = 50  # for segments that no method waits for
PIECE = 1200  # bytes of data in a segment
WINDOW = 65535
_MASK = 0xFFFFFFFF
_HALF = 1 << 31  # half of the sequence numbers: a larger distance means "behind"
_FIRST = 1000  # our first sequence number: the same in every run


class Connection:
    """A connection of a host, from `host.tcp()` or from a listener; its `with` block closes it.

    `address` and `port` are the peer's. `received` has the bytes that were not read yet. Methods
    without a timeout have the connection's, else the switch's patience. Those that wait raise
    TimeoutError, or ConnectionResetError where the peer has refused or reset the connection.
    """

    def __init__(
        self,
        stack: Stack,
        mac: bytes,
        own_address: str,
        address: str,
        port: int,
        own_port: int,
        timeout: float | None = None,
    ) -> None:
        self.address = address
        self.port = port
        self.own_address = own_address
        self.own_port = own_port
        self.received = bytearray()
        self._stack = stack
        self._mac = mac
        self._timeout = timeout
        self._synchronized = False  # the peer's SYN has come
        self._reset = False
        self._ended = False  # the peer's FIN has come
        self._closed = False  # our FIN was sent
        self._next = self._acked = _FIRST
        self._expected = 0  # the peer's next sequence number
        self._listener: Listener | None = None

    @property
    def closed(self) -> bool:
        """Whether the peer sends nothing more: it has closed or reset the connection."""
        return self._ended or self._reset

    def __repr__(self) -> str:
        how = "closed" if self.closed or self._closed else "open"
        own = endpoint(self.own_address, self.own_port)
        return f"<TCP {own} - {endpoint(self.address, self.port)}, {how}>"

    def send(self, data: bytes, timeout: float | None = None) -> None:
        """Send `data`, and wait until the peer has acknowledged all of it."""
        as_data("data", data)
        if self._closed:
            raise UsageError(f"{self!r}: it is closed for sending")
        for start in range(0, len(data), PIECE):
            self._deliver(PSH | ACK, bytes(data[start : start + PIECE]), timeout)

    def read(self, n: int | None = None, timeout: float | None = None) -> bytes:
        """The next `n` bytes; None: all bytes until the peer closes the connection.

        Raises EOFError if it is closed before `n` bytes have come.
        """
        if n is None:
            self._wait(lambda: self._ended, timeout)
            return self._take(len(self.received))
        self._wait(lambda: len(self.received) >= n or self._ended, timeout)
        if len(self.received) < n:
            raise EOFError(f"{self!r}: it ended before {n} bytes came{self._unread()}")
        return self._take(n)

    def read_until(self, end: bytes, timeout: float | None = None) -> bytes:
        """All bytes up to `end` and with it; raises EOFError if the connection ends before."""
        as_data("end", end)
        self._wait(lambda: end in self.received or self._ended, timeout)
        if end not in self.received:
            raise EOFError(f"{self!r}: it ended before {end!r} came{self._unread()}")
        return self._take(self.received.index(end) + len(end))

    def read_some(self, n: int = 1 << 16, timeout: float | None = None) -> bytes:
        """Up to `n` bytes, as soon as some have come; empty where the peer has closed."""
        self._wait(lambda: self.received or self._ended, timeout)
        return self._take(n)

    def reset(self) -> None:
        """Reset the connection (RST): the peer gets an error, and no byte that is under way."""
        with self._stack.timeline.lock:
            if not self._reset:
                self._reset = True
                self._send(RST | ACK, self._next, b"")
                self._stack.timeline.notify()

    def close(self) -> None:
        """Send FIN, again until it is acknowledged; does not wait for that."""
        with self._stack.timeline.lock:
            if self._closed or self._reset:
                return
            self._closed = True
            end, self._next = self._next, self._next + 1 & _MASK
            self._send_until_acked(FIN | ACK, end)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, n: int) -> bytes:
        with self._stack.timeline.lock:
            taken = bytes(self.received[:n])
            del self.received[:n]
            return taken

    def _unread(self) -> str:
        return f"; unread: {bytes(self.received[-60:])!r}" if self.received else ""

    # ---- Sending ----

    def connect(self) -> Connection:
        """Send SYN, and wait until the connection is established."""
        try:
            self._deliver(SYN, b"", None)
        except TimeoutError:
            self.reset()  # an answer that comes later is to nobody
            raise
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
        left = limit = self._stack.patience if given is None else given
        while not done() and left > 0:
            if send is not None:
                send()
            self._stack.timeline.wait(done, min(left, RETRY_S))
            left -= RETRY_S
        if predicate():
            return
        if self._reset:
            raise ConnectionResetError(
                f"{endpoint(self.address, self.port)} has refused or reset the connection"
            )
        raise TimeoutError(f"{endpoint(self.address, self.port)} did not answer within {limit:g} s")

    def _send_until_acked(self, flags: int, seq: int, tries: int = TRIES) -> None:
        """Send a FIN or a SYN+ACK without waiting, and again until it is acknowledged."""
        if seq - self._acked & _MASK < _HALF and tries and not self._reset:
            self._send(flags, seq, b"")
            timeline = self._stack.timeline
            again_ns = timeline.now_ns() + round(RETRY_S * 1e9)
            timeline.call_at(again_ns, lambda: self._send_until_acked(flags, seq, tries - 1))

    def _send(self, flags: int, seq: int, data: bytes) -> None:
        ports = self.own_port, self.port
        segment = Segment(*ports, seq, self._expected, flags, WINDOW, data)
        payload = packets.build_tcp(self.own_address, self.address, segment)
        packet = Packet(self.own_address, self.address, packets.TCP, payload)
        self._stack.send_to(self._mac, packet)

    # ---- Receiving, with the switch's lock held ----

    def accept(self, segment: Segment, listener: Listener) -> None:
        """The peer has asked `listener` for this connection."""
        self._listener = listener
        self._synchronize(segment)
        self._next = self._next + 1 & _MASK
        self._send_until_acked(SYN | ACK, _FIRST)

    def _synchronize(self, segment: Segment) -> None:
        self._synchronized = True
        self._expected = segment.seq + 1 & _MASK

    def on_segment(self, segment: Segment) -> None:
        if segment.flags & RST:
            self._reset = True
            return
        if segment.flags & ACK and segment.ack == self._next:
            self._acknowledged()
        if segment.flags & SYN and self._listener is not None:
            return  # our SYN+ACK was lost, and is sent again
        if segment.flags & SYN and not self._synchronized:
            self._synchronize(segment)
        elif self._synchronized and segment.seq == self._expected:
            self._receive(segment)
        if segment.data or segment.flags & (SYN | FIN):
            self._send(ACK, self._next, b"")

    def _acknowledged(self) -> None:
        self._acked = self._next
        if self._listener is not None:
            self._listener.put(self)
            self._listener = None

    def _receive(self, segment: Segment) -> None:
        if not self._ended:
            self.received += segment.data
            self._ended = bool(segment.flags & FIN)
            self._expected = segment.seq + len(segment.data) + self._ended & _MASK

    @property
    def is_over(self) -> bool:
        """Whether a new connection may have its ports."""
        return self._reset or (self._ended and self._closed)


class Listener:
    """A listening TCP port of a host, until `close()` or the end of its `with` block."""

    def __init__(self, tcp: Tcp, port: int) -> None:
        self.port = port
        self._tcp = tcp
        self._stack = tcp.stack
        self._waiting: deque[Connection] = deque()

    def accept(self, timeout: float | None = None) -> Connection:
        """The next connection; TimeoutError if none comes. `timeout` is for this wait alone."""
        failure = f"nobody connected to TCP port {self.port} of {self._stack.address}"
        self._stack.wait(lambda: self._waiting, timeout, lambda: failure)
        return self._waiting.popleft()

    def close(self) -> None:
        """Accept no more connections; those that were accepted go on."""
        with self._stack.timeline.lock:
            if self._tcp.listeners.get(self.port) is self:
                del self._tcp.listeners[self.port]

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TCP {endpoint(str(self._stack.address), self.port)}, listening>"

    def put(self, connection: Connection) -> None:
        self._waiting.append(connection)


class Tcp:
    """The connections and listening ports of one host."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.listeners: dict[int, Listener] = {}
        self._connections: dict[tuple[str, int, int], Connection] = {}  # by peer and own port

    def connect(self, address: str, port: int, timeout: float | None) -> Connection:
        """See Host.tcp."""
        as_port("port", port)
        own, _ = self.stack.route(address)
        address = as_ip("address", address)
        mac = self.stack.resolve(address)
        with self.stack.timeline.lock:
            ends = own, address, port, self.stack.free_port()
            connection = self._add(Connection(self.stack, mac, *ends, timeout))
        return connection.connect()

    def listen(self, port: int) -> Listener:
        """See Host.listen."""
        as_port("port", port)
        with self.stack.timeline.lock:
            if port in self.listeners:
                raise UsageError(f"{self.stack.address} listens on TCP port {port} already")
            listener = self.listeners[port] = Listener(self, port)
            return listener

    def receive(self, mac: bytes, packet: Packet, segment: Segment) -> None:
        connection = self._connections.get((packet.sender, segment.source, segment.port))
        listener = self.listeners.get(segment.port)
        is_request = listener is not None and segment.flags & (SYN | ACK) == SYN
        if connection is not None and not (is_request and connection.is_over):
            connection.on_segment(segment)
        elif listener is not None and is_request:
            ends = packet.to, packet.sender, segment.source, segment.port
            connection = Connection(self.stack, mac, *ends)
            self._add(connection).accept(segment, listener)

    def _add(self, connection: Connection) -> Connection:
        self._connections[connection.address, connection.port, connection.own_port] = connection
        return connection
