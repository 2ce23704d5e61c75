"""A host in Python on the switch: it answers ARP and ping, and does what a test asks for.

The rule here is that of stack.py: what receives never waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import overload

from tender.checks import as_port
from tender.errors import InvalidValue, UsageError
from tender.testing.net import http, icmp, packets
from tender.testing.net.describe import describe
from tender.testing.net.icmp import Echo
from tender.testing.net.packets import Packet, endpoint
from tender.testing.net.stack import Stack
from tender.testing.net.tcp import RETRY_S, Tcp
from tender.testing.net.udp import UdpPort
from tender.testing.net.virtual import Stuck

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from tender.testing.net.bridge import Bridge
    from tender.testing.net.dhcp import DhcpServer
    from tender.testing.net.nameserver import NameServer
    from tender.testing.net.port import Network
    from tender.testing.net.stack import Interface
    from tender.testing.net.tcp import Connection, Listener
    from tender.testing.net.udp import UdpService

PING_DATA = bytes(range(56))
CONNECT_S = 1.0  # to one attempt of `wait_for_port`
ERROR_FRAMES = 5  # shown in an error


@dataclass
class Ping:
    """The result of `Host.ping`; `rtts` are the round-trip times, in seconds."""

    address: str
    sent: int = 0
    rtts: list[float] = field(default_factory=list)

    @property
    def received(self) -> int:
        return len(self.rtts)

    @property
    def lost(self) -> int:
        return self.sent - self.received


class Host(Stack):
    """A host of a test, from `switch.host()`. `mac` is 6 bytes; its link's faults are on `port`."""

    def __init__(
        self,
        network: Network,
        name: str,
        index: int,
        interface: Interface,
        mac: bytes,
        gateway: str | None,
    ) -> None:
        super().__init__(network, name, index, interface, mac, gateway)
        self._pings: dict[tuple[int, int], Callable[[], None]] = {}  # by ident and seq
        self._pinged = 0
        self._udp: dict[int, UdpPort] = {}
        self._services: dict[int, UdpService] = {}  # on UDP ports
        self._tcp = Tcp(self)
        self._bridges: list[Bridge] = []

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
            self.timeline.wait(lambda seq=seq: seq not in unanswered, interval)  # type: ignore[misc]
        for seq in sorted(unanswered, reverse=True):
            late_s = (self.timeline.now_ns() - unanswered.get(seq, 0)) / 1e9
            if seq in unanswered and late_s < timeout:
                self.timeline.wait(
                    lambda seq=seq: seq not in unanswered,  # type: ignore[misc]
                    timeout - late_s,
                )
        with self.timeline.lock:
            self._pings = {key: each for key, each in self._pings.items() if key[0] != ident}
        return result

    def _ping_once(
        self, result: Ping, unanswered: dict[int, int], ident: int, seq: int, data: bytes
    ) -> None:
        def answered() -> None:
            result.rtts.append((self.timeline.now_ns() - unanswered.pop(seq)) / 1e9)

        with self.timeline.lock:
            unanswered[seq] = self.timeline.now_ns()
            self._pings[ident, seq & 0xFFFF] = answered
            result.sent += 1
            echo = Echo(icmp.ECHO_REQUEST, ident, seq & 0xFFFF, data)
            own, _ = self.route(result.address)
            self.send_packet(icmp.build_echo(echo, own, result.address))

    def udp(self, number: int = 0) -> UdpPort:
        """The UDP port with this number; 0: a free one."""
        with self.timeline.lock:
            number = number or self.free_port()
            self._check_free(number)
            return self._udp.setdefault(number, UdpPort(self, number))

    def udp_send(self, address: str, port: int, data: bytes) -> None:
        """Send one datagram from a port of its own."""
        self.udp().send(address, port, data)

    def _check_free(self, number: int) -> None:
        if number in self._services:
            raise UsageError(f"{self._services[number]!r} has UDP port {number} already")

    def dns(self, names: Mapping[str, str | Sequence[str]]) -> NameServer:
        """Let the host be a DNS server, over UDP: `{"db.test": ["10.0.0.2", "fd00::2"]}`.

        A value is an address, or a type and what follows it in a zone file: "MX 10 mail.test.".
        Raises UsageError, also where dnspython is not installed.
        """
        try:
            from tender.testing.net.nameserver import PORT, NameServer
        except ModuleNotFoundError:
            text = "host.dns needs dnspython: pip install 'ptender[testing]'"
            raise UsageError(text) from None
        self._check_free(PORT)
        server = NameServer(self, names)
        self._services[PORT] = server
        return server

    def dhcp(
        self,
        first: str,
        last: str,
        *,
        router: str | None = None,
        dns: str | None = None,
        lease: float = 3600.0,
    ) -> DhcpServer:
        """Let the host be a DHCP server, with the addresses from `first` to `last`.

        `lease` is in seconds. Raises UsageError for addresses that are not in its network.
        """
        from tender.testing.net.dhcp import SERVER, DhcpServer

        self._check_free(SERVER)
        server = DhcpServer(self, self.interface, first, last, router, dns, lease)
        self._services[SERVER] = server
        return server

    def tcp(self, address: str, port: int, timeout: float | None = None) -> Connection:
        """Connect to a TCP port: `with host.tcp("10.0.0.2", 80) as connection: ...`.

        `timeout` is that of connecting and of all verbs of the connection that have none. Raises
        TimeoutError, or ConnectionResetError where it is refused.
        """
        return self._tcp.connect(address, port, timeout)

    def listen(self, port: int) -> Listener:
        """Let others connect to a TCP port: `host.listen(80).accept()` gives the next one.

        A port that nobody listens on answers nothing.
        """
        return self._tcp.listen(port)

    def bridge(self, address: str, port: int, local_port: int = 0) -> Bridge:
        """Let programs of this machine connect to a TCP port on the switch.

        Connections to `bridge.port` on 127.0.0.1 (`local_port`; 0: a free one) become connections
        of this host: `with host.bridge("10.0.0.2", 80) as bridge: requests.get(bridge.url)`. One
        that fails is reset, and why is on stderr. Raises UsageError, in virtual time as well: the
        other program would not wait for it.
        """
        from tender.testing.net.bridge import Bridge

        as_port("port", port)
        if local_port:
            as_port("local_port", local_port)
        self.route(address)
        if self.timeline.virtual:
            raise UsageError("there is no bridge in virtual time: use the fixture `switch`")
        target = endpoint(address, port)
        bridge = Bridge(lambda: self.tcp(address, port), target, local_port)
        self._bridges.append(bridge)
        return bridge

    def close(self) -> None:
        """Close its bridges."""
        for bridge in self._bridges:
            bridge.close()

    def wait_for_port(self, address: str, port: int, timeout: float | None = None) -> None:
        """Wait until a TCP port accepts a connection, which is closed at once.

        Raises TimeoutError after `timeout` seconds.
        """
        seconds = self.patience if timeout is None else timeout
        end_ns = self.timeline.now_ns() + round(seconds * 1e9)
        why: Exception | None = None
        while (left_s := (end_ns - self.timeline.now_ns()) / 1e9) > 0:
            try:
                return self.tcp(address, port, min(left_s, CONNECT_S)).close()
            except Stuck:
                raise
            except (TimeoutError, ConnectionResetError) as error:
                why = error
            self.timeline.wait(lambda: False, min(left_s, RETRY_S))
        raise TimeoutError(f"{why or f'{address}:{port} was not tried'} (for {seconds:g} s)")

    def http(
        self,
        method: str,
        address: str,
        path: str = "/",
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        port: int = 80,
        timeout: float | None = None,
    ) -> http.Response:
        """A request to a web server, on a connection of its own: HTTP/1.1, closed after it.

        `timeout` is that of each wait. Raises ValueError for an answer that is not HTTP.
        """
        http.check(path, body, headers)
        with self.tcp(address, port, timeout) as connection:
            return http.request(connection, method, path, body, headers or {})

    def http_get(
        self,
        address: str,
        path: str = "/",
        port: int = 80,
        timeout: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Status and body of a page; see `http`."""
        response = self.http("GET", address, path, None, headers, port, timeout)
        return response.status, response.body

    def http_post(
        self,
        address: str,
        path: str = "/",
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        port: int = 80,
        timeout: float | None = None,
    ) -> tuple[int, bytes]:
        """Post `body`; status and body of the answer. See `http`."""
        response = self.http("POST", address, path, body, headers, port, timeout)
        return response.status, response.body

    def send(self, packet: Any) -> None:
        """Send a frame as it is: bytes, or a packet of scapy's.

        An Ether() of scapy's without `src` has the host's MAC.
        """
        if type(packet).__name__ == "Ether" and "src" not in packet.fields:
            packet = packet.copy()
            packet.src = packets.mac_text(self.mac)  # scapy would look for one on this machine
        elif not isinstance(packet, (bytes, bytearray, memoryview)) and not hasattr(
            packet, "fields_desc"
        ):
            raise InvalidValue("packet", packet, "bytes, or a packet of scapy")
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

        def describe_failure() -> str:
            last = [f"\n  {describe(frame)}" for frame in skipped[-ERROR_FRAMES:]]
            name = getattr(what, "__name__", repr(what))
            instead = f"instead, {len(skipped)} came, the last of them:" if last else "none came"
            return f"{self.address} did not get the frame {name}; {instead}{''.join(last)}"

        self.wait(look, timeout, describe_failure)
        return found[0]

    # ---- Receiving ----

    def on_packet(self, mac: bytes, packet: Packet) -> None:
        if datagram := packets.parse_udp(packet):
            if to := self._services.get(datagram.port) or self._udp.get(datagram.port):
                to.put(mac, datagram)
        elif packet.to in self.broadcasts:
            pass  # of UDP alone
        elif echo := icmp.parse_echo(packet):
            self._on_echo(mac, packet, echo)
        elif segment := packets.parse_tcp(packet):
            self._tcp.receive(mac, packet, segment)

    def _on_echo(self, mac: bytes, packet: Packet, echo: Echo) -> None:
        if echo.kind == icmp.ECHO_REQUEST:
            answer = Echo(icmp.ECHO_REPLY, echo.ident, echo.seq, echo.data)
            self.send_to(mac, icmp.build_echo(answer, packet.to, packet.sender))
        elif answered := self._pings.pop((echo.ident, echo.seq), None):
            answered()


def matcher(what: Any) -> Callable[[bytes], Any]:
    """What `expect` takes -> a function that gives the match, or None."""
    if isinstance(what, (bytes, bytearray)):
        return lambda frame: frame if what in frame else None
    if isinstance(what, type) and hasattr(what, "fields_desc"):  # a layer of scapy's
        return _layer_matcher(what)
    if not callable(what):
        raise InvalidValue("what", what, "bytes, a function of a frame, or a layer of scapy")
    return lambda frame: frame if what(frame) else None


def _layer_matcher(layer: Any) -> Callable[[bytes], Any]:
    from scapy.layers.l2 import Ether

    def match(frame: bytes) -> Any:
        packet = Ether(frame)
        return packet if packet.haslayer(layer) else None

    return match
