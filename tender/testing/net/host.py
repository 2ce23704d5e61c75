"""A host in Python on the switch: it answers ARP and ping, and asks what a test asks.

The rule here: `receive` is called with the switch's lock held and never waits; the verbs of a test
take the lock and wait on the switch's timeline, in real or in virtual time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import overload

from tender.testing.net import packets
from tender.testing.net.packets import Arp, Datagram, Echo, Frame, Packet, Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Interface
    from threading import RLock
    from typing import Any

    from tender.testing.net.port import HostPort
    from tender.testing.net.switch import Switch
    from tender.testing.net.tcp import Connection, Listener

INBOX_FRAMES = 10_000  # what a host keeps for `expect`
ARP_EVERY_S = 0.2
PING_DATA = bytes(range(56))
EPHEMERAL = 49152  # the first port that is nobody's in particular (RFC 6335)
TOLD = 5  # frames in an error


@dataclass
class Ping:
    """What became of some pings; `rtts` are the times to the answers, in seconds."""

    address: str
    sent: int = 0
    rtts: list[float] = field(default_factory=list)

    @property
    def received(self) -> int:
        return len(self.rtts)

    @property
    def lost(self) -> int:
        return self.sent - self.received


class UdpPort:
    """A UDP port of a host."""

    def __init__(self, host: Host, number: int) -> None:
        self.number = number
        self._host = host
        self._inbox: deque[Datagram] = deque(maxlen=INBOX_FRAMES)

    def send(self, address: str, port: int, data: bytes) -> None:
        host = self._host
        packets.check_port("port", port)
        packets.check("data", data, (bytes, bytearray), "bytes, as b'hello'")
        datagram = Datagram(str(host.address), self.number, address, port, data)
        host.send_ipv4(address, packets.UDP, packets.build_udp(datagram))

    def receive(self, timeout: float | None = None) -> Datagram:
        """The next datagram; TimeoutError if none comes."""
        what = f"no datagram came to UDP port {self.number} of {self._host.address}"
        self._host.wait(lambda: self._inbox, timeout, lambda: what)
        return self._inbox.popleft()

    def __repr__(self) -> str:
        return f"<UDP {self._host.address}:{self.number}>"

    def put(self, datagram: Datagram) -> None:
        self._inbox.append(datagram)


class Host:
    """One host. `mac` is 6 bytes; `port` is where its link's faults are."""

    port: HostPort

    def __init__(
        self, switch: Switch, interface: IPv4Interface, mac: bytes, gateway: str | None
    ) -> None:
        self.address = interface.ip
        self.mac = mac
        self._network = interface.network
        self._gateway = gateway
        self._switch = switch
        self._timeline = switch.timeline
        self._neighbours: dict[str, bytes] = {}
        self._inbox: deque[bytes] = deque(maxlen=INBOX_FRAMES)
        self._pings: dict[tuple[int, int], Callable[[], None]] = {}  # by ident and seq
        self._pinged = 0
        self._sent = 0
        self._udp: dict[int, UdpPort] = {}
        self.connections: dict[tuple[str, int, int], Connection] = {}
        self._listeners: dict[int, Listener] = {}
        self._ephemeral = EPHEMERAL

    def __repr__(self) -> str:
        return f"<host {self.address}/{self._network.prefixlen}, {packets.mac_text(self.mac)}>"

    # ---- What a test asks ----

    def ping(
        self,
        address: str,
        count: int = 1,
        timeout: float = 1.0,
        interval: float = 0.2,
        data: bytes = PING_DATA,
    ) -> Ping:
        """Ping `address` `count` times, one after the other.

        The next ping goes when the one before it was answered, or after `interval` seconds; an
        answer may come up to `timeout` seconds after the last one. Who does not answer ARP
        gets no ping, and all are lost.
        """
        result = Ping(address)
        self._pinged += 1
        ident = self._pinged & 0xFFFF
        try:
            self.arp(address, timeout)
        except TimeoutError:
            result.sent = count
            return result
        unanswered: dict[int, int] = {}  # seq -> when it was sent
        for seq in range(1, count + 1):
            self._ping_once(result, unanswered, ident, seq, data)
            self._timeline.wait(lambda seq=seq: seq not in unanswered, interval)  # type: ignore[misc]
        for seq in sorted(unanswered, reverse=True):
            late_s = (self._timeline.now_ns() - unanswered.get(seq, 0)) / 1e9
            if seq in unanswered and late_s < timeout:
                self._timeline.wait(
                    lambda seq=seq: seq not in unanswered,  # type: ignore[misc]
                    timeout - late_s,
                )
        with self._timeline.lock:
            self._pings = {key: each for key, each in self._pings.items() if key[0] != ident}
        return result

    def _ping_once(
        self, result: Ping, unanswered: dict[int, int], ident: int, seq: int, data: bytes
    ) -> None:
        def answered() -> None:
            result.rtts.append((self._timeline.now_ns() - unanswered.pop(seq)) / 1e9)

        with self._timeline.lock:
            unanswered[seq] = self._timeline.now_ns()
            self._pings[ident, seq & 0xFFFF] = answered
            result.sent += 1
            echo = Echo(packets.ECHO_REQUEST, ident, seq & 0xFFFF, data)
            self.send_ipv4(result.address, packets.ICMP, packets.build_echo(echo))

    def arp(self, address: str, timeout: float = 1.0) -> str:
        """The MAC of `address`, as 02:00:00:00:00:01; asked for where it is not known.

        Raises TimeoutError after `timeout` seconds without an answer. A guest that has just
        been started may take longer, up to the switch's patience.
        """
        hop = self._next_hop(address)
        spent = 0.0
        while hop not in self._neighbours:
            patience = self._switch.patience if self._switch.awaits_guests() else timeout
            if spent >= max(timeout, patience):
                raise TimeoutError(f"nobody answered: who has {hop}, tell {self.address}")
            self._ask(hop)
            self._timeline.wait(lambda: hop in self._neighbours, ARP_EVERY_S)
            spent += ARP_EVERY_S
        return packets.mac_text(self._neighbours[hop])

    def forget(self) -> None:
        """Forget all MACs that were learned by ARP."""
        self._neighbours.clear()

    def _next_hop(self, address: str) -> str:
        if not isinstance(address, str) or not packets.is_address(address):
            raise ValueError(f"{address!r} is not an IPv4 address, as in 10.0.0.2")
        from ipaddress import IPv4Address

        if IPv4Address(address) in self._network:
            return address
        if self._gateway is None:
            raise ValueError(f"{address} is not in {self._network}, and the host has no gateway")
        return self._gateway

    def _ask(self, address: str) -> None:
        asked = Arp(packets.ARP_REQUEST, self.mac, str(self.address), bytes(6), address)
        self._send_frame(packets.BROADCAST, packets.ARP, packets.build_arp(asked))

    def udp(self, number: int = 0) -> UdpPort:
        """A UDP port: that of this number, else a free one."""
        with self._timeline.lock:
            number = number or self.free_port()
            return self._udp.setdefault(number, UdpPort(self, number))

    def udp_send(self, address: str, port: int, data: bytes) -> None:
        """Send one datagram from a port of its own."""
        self.udp().send(address, port, data)

    def free_port(self) -> int:
        self._ephemeral += 1
        return self._ephemeral

    def tcp(self, address: str, port: int, timeout: float | None = None) -> Connection:
        """Connect to a TCP port: `with host.tcp("10.0.0.2", 80) as connection: ...`.

        `timeout` is that of connecting and of all verbs of the connection that have none. Raises
        TimeoutError, or ConnectionResetError where it is refused.
        """
        from tender.testing.net.tcp import Connection

        packets.check_port("port", port)
        mac = packets.parse_mac(self.arp(address))
        with self.lock:
            own_port = self.free_port()
        return Connection(self, mac, address, port, own_port, timeout).connect()

    def listen(self, port: int) -> Listener:
        """Let others connect to a TCP port: `host.listen(80).accept()` gives the next one.

        A port that nobody listens on answers nothing.
        """
        from tender.testing.net.tcp import Listener

        packets.check_port("port", port)
        with self.lock:
            if port in self._listeners:
                raise ValueError(f"{self.address} listens on TCP port {port} already")
            listener = self._listeners[port] = Listener(self, port)
            return listener

    def unlisten(self, listener: Listener) -> None:
        """Take a listener away."""
        with self.lock:
            if self._listeners.get(listener.port) is listener:
                del self._listeners[listener.port]

    def http_get(
        self, address: str, path: str = "/", port: int = 80, timeout: float | None = None
    ) -> tuple[int, bytes]:
        """What a web server answers: its status and the body. HTTP/1.0, one connection."""
        from tender.testing.net.tcp import http_get

        return http_get(self, address, path, port, timeout)

    def send(self, packet: Any) -> None:
        """Send a frame as it is: bytes, or a packet of scapy's.

        An Ether() of scapy's without `src` has the host's MAC.
        """
        if type(packet).__name__ == "Ether" and "src" not in packet.fields:
            packet = packet.copy()
            packet.src = packets.mac_text(self.mac)  # scapy would look for one on this machine
        elif not hasattr(packet, "fields_desc"):
            packets.check("packet", packet, (bytes, bytearray, memoryview), "bytes, or of scapy's")
        self.port.sent(bytes(packet))

    @overload
    def expect(self, what: type[Any], timeout: float | None = None) -> Any: ...
    @overload
    def expect(
        self, what: bytes | Callable[[bytes], object], timeout: float | None = None
    ) -> bytes: ...
    def expect(self, what: Any, timeout: float | None = None) -> Any:
        """Wait for a frame, from those that came since the last `expect` on.

        `what` is a function of the frame's bytes, or bytes that are in it, or a layer of
        scapy's (then the result is a packet of scapy's, else bytes). Frames before it are
        forgotten. Raises TimeoutError, which names the frames that came instead.
        """
        matches = matcher(what)
        skipped: list[bytes] = []
        found: list[Any] = []

        def look() -> bool:
            while self._inbox and not found:
                frame = self._inbox.popleft()
                match = matches(frame)
                found.append(match) if match is not None else skipped.append(frame)
            return bool(found)

        def complain() -> str:
            told = [f"\n  {packets.describe(frame)}" for frame in skipped[-TOLD:]]
            name = getattr(what, "__name__", repr(what))
            instead = f"instead, {len(skipped)} came, the last of them:" if told else "none came"
            return f"{self.address} did not get the frame {name}; {instead}{''.join(told)}"

        self.wait(look, timeout, complain)
        return found[0]

    def wait(
        self, predicate: Callable[[], object], timeout: float | None, complain: Callable[[], str]
    ) -> None:
        """Wait on the switch's time; TimeoutError with what `complain` says."""
        seconds = self.patience if timeout is None else timeout
        if not self._timeline.wait(predicate, seconds):
            raise TimeoutError(f"{complain()} (after {seconds:g} s)")

    def wait_quietly(self, predicate: Callable[[], object], seconds: float) -> bool:
        """Wait on the switch's time; whether it became true."""
        return self._timeline.wait(predicate, seconds)

    @property
    def patience(self) -> float:
        """How long to wait where no timeout was given, in seconds."""
        return self._switch.patience

    @property
    def lock(self) -> RLock:
        """The switch's."""
        return self._timeline.lock

    def call_later(self, seconds: float, function: Callable[[], object]) -> None:
        """Call it on the switch's time, with its lock held."""
        self._timeline.call_at(self._timeline.now_ns() + round(seconds * 1e9), function)

    # ---- Sending ----

    def send_ipv4(self, address: str, protocol: int, payload: bytes) -> None:
        """Send a packet; its receiver's MAC is asked for where it is not known."""
        self.send_to(packets.parse_mac(self.arp(address)), address, protocol, payload)

    def send_to(self, mac: bytes, address: str, protocol: int, payload: bytes) -> None:
        """The same to a MAC that is known: it never waits."""
        self._send_packet(mac, Packet(str(self.address), address, protocol, payload))

    def _send_packet(self, mac: bytes, packet: Packet) -> None:
        self._sent += 1
        self._send_frame(mac, packets.IPV4, packets.build_ipv4(packet, self._sent & 0xFFFF))

    def _send_frame(self, to: bytes, ethertype: int, payload: bytes) -> None:
        self.port.sent(packets.build_frame(Frame(to, self.mac, ethertype, payload)))

    # ---- What comes in ----

    def receive(self, data: bytes) -> None:
        """A frame from the switch."""
        frame = packets.parse_frame(data)
        if frame is None or not (frame.to == self.mac or frame.to[0] & 1):
            return
        self._inbox.append(data)
        if frame.ethertype == packets.ARP:
            self._on_arp(frame)
        elif frame.ethertype == packets.IPV4:
            packet = packets.parse_ipv4(frame.payload)
            if packet and packet.to == str(self.address):
                self._on_packet(frame.sender, packet)
        self._timeline.notify()

    def _on_arp(self, frame: Frame) -> None:
        arp = packets.parse_arp(frame.payload)
        if arp is None or arp.sender == str(self.address):
            return
        if arp.sender != "0.0.0.0":
            self._neighbours[arp.sender] = arp.sender_mac
        if arp.operation == packets.ARP_REQUEST and arp.target == str(self.address):
            ours = self.mac, str(self.address)
            answer = Arp(packets.ARP_REPLY, *ours, arp.sender_mac, arp.sender)
            self._send_frame(arp.sender_mac, packets.ARP, packets.build_arp(answer))

    def _on_packet(self, mac: bytes, packet: Packet) -> None:
        if packet.protocol == packets.ICMP:
            self._on_icmp(mac, packet)
        elif datagram := packets.parse_udp(packet):
            if datagram.port in self._udp:
                self._udp[datagram.port].put(datagram)
        elif segment := packets.parse_tcp(packet):
            self._on_tcp(mac, packet.sender, segment)

    def _on_tcp(self, mac: bytes, sender: str, segment: Segment) -> None:
        connection = self.connections.get((sender, segment.source, segment.port))
        asks = segment.flags & packets.SYN and segment.port in self._listeners
        if connection is not None and not (asks and connection.is_over):
            connection.on_segment(segment)
        elif segment.port in self._listeners:
            self._listeners[segment.port].on_segment(mac, sender, segment)

    def _on_icmp(self, mac: bytes, packet: Packet) -> None:
        echo = packets.parse_echo(packet.payload)
        if echo is None:
            return
        if echo.kind == packets.ECHO_REQUEST:
            answer = packets.build_echo(Echo(packets.ECHO_REPLY, echo.ident, echo.seq, echo.data))
            back = Packet(str(self.address), packet.sender, packets.ICMP, answer)
            self._send_packet(mac, back)
        elif answered := self._pings.pop((echo.ident, echo.seq), None):
            answered()


def matcher(what: Any) -> Callable[[bytes], Any]:
    """What `expect` takes -> a function that gives the match, or None."""
    if isinstance(what, (bytes, bytearray)):
        return lambda frame: frame if what in frame else None
    if isinstance(what, type) and hasattr(what, "fields_desc"):  # a layer of scapy's
        return _layer_matcher(what)
    if not callable(what):
        raise TypeError(f"{what!r} is none of bytes, a function of a frame, a layer of scapy's")
    return lambda frame: frame if what(frame) else None


def _layer_matcher(layer: Any) -> Callable[[bytes], Any]:
    from scapy.layers.l2 import Ether

    def match(frame: bytes) -> Any:
        packet = Ether(frame)
        return packet if packet.haslayer(layer) else None

    return match
