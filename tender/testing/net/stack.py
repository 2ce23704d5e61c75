"""The network stack of a host: Ethernet, ARP and IPv4, on a port of the switch.

The rule here: `receive` is called with the switch's lock held and never waits. The methods that a
test calls take the lock, and wait on the switch's timeline, in real or in virtual time.
"""

from __future__ import annotations

from collections import deque
from ipaddress import IPv4Address

from tender.checks import as_ipv4
from tender.errors import InvalidValue, UsageError
from tender.testing.net import packets
from tender.testing.net.packets import Arp, Frame, Packet
from tender.testing.net.port import HostPort

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Interface

    from tender.testing.net.port import Network

INBOX_FRAMES = 10_000  # kept for `expect`
ARP_EVERY_S = 0.2
EPHEMERAL = 49152  # the first dynamic port (RFC 6335)


def as_data(name: str, value: object) -> None:
    """Raise UsageError unless `value` is bytes."""
    if not isinstance(value, (bytes, bytearray)):
        raise InvalidValue(name, value, "bytes, as b'hello'")


class Stack:
    """The stack of one host. `mac` is 6 bytes; faults of its link are set on `port`."""

    def __init__(
        self,
        network: Network,
        name: str,
        index: int,
        interface: IPv4Interface,
        mac: bytes,
        gateway: str | None,
    ) -> None:
        self.address = interface.ip
        self.mac = mac
        self.port = HostPort(network, name, index, self.receive)
        self.timeline = network.timeline
        self._network = network
        self._subnet = interface.network
        self._gateway = gateway
        self._neighbours: dict[str, bytes] = {}
        self._inbox: deque[bytes] = deque(maxlen=INBOX_FRAMES)
        self._sent = 0
        self._ephemeral = EPHEMERAL

    def __repr__(self) -> str:
        return f"<host {self.address}/{self._subnet.prefixlen}, {packets.mac_text(self.mac)}>"

    # ---- Neighbours ----

    def arp(self, address: str, timeout: float = 1.0) -> str:
        """The MAC of `address`, as 02:00:00:00:00:01; sends ARP requests if it is not known.

        Raises TimeoutError after `timeout` seconds without an answer. A guest that has just
        been started may take longer, up to the switch's patience.
        """
        return packets.mac_text(self.resolve(address, timeout))

    def resolve(self, address: str, timeout: float = 1.0) -> bytes:
        """The same as 6 bytes; for an address of another network, the gateway's."""
        hop = self.next_hop(address)
        spent = 0.0
        while hop not in self._neighbours:
            patience = self.patience if self._network.awaits_guests() else timeout
            if spent >= max(timeout, patience):
                raise TimeoutError(f"nobody answered: who has {hop}, tell {self.address}")
            request = Arp(packets.ARP_REQUEST, self.mac, str(self.address), bytes(6), hop)
            self._send_frame(packets.BROADCAST, packets.ARP, packets.build_arp(request))
            self.timeline.wait(lambda: hop in self._neighbours, ARP_EVERY_S)
            spent += ARP_EVERY_S
        return self._neighbours[hop]

    def next_hop(self, address: str) -> str:
        """The neighbour to which packets for `address` go; UsageError if there is none."""
        if IPv4Address(as_ipv4("address", address)) in self._subnet:
            return address
        if self._gateway is None:
            raise UsageError(f"{address} is not in {self._subnet}, and the host has no gateway")
        return self._gateway

    # ---- Waiting ----

    @property
    def patience(self) -> float:
        """How long to wait where no timeout was given, in seconds."""
        return self._network.patience

    def wait(
        self,
        predicate: Callable[[], object],
        timeout: float | None,
        describe_failure: Callable[[], str],
    ) -> None:
        """Wait on the switch's time; raises TimeoutError with the text of `describe_failure`."""
        seconds = self.patience if timeout is None else timeout
        if not self.timeline.wait(predicate, seconds):
            raise TimeoutError(f"{describe_failure()} (after {seconds:g} s)")

    # ---- Sending ----

    def free_port(self) -> int:
        self._ephemeral += 1
        return self._ephemeral

    def send_ipv4(self, address: str, protocol: int, payload: bytes) -> None:
        """Send a packet; waits for ARP if the MAC of its next hop is not known."""
        self.send_to(self.resolve(address), address, protocol, payload)

    def send_to(self, mac: bytes, address: str, protocol: int, payload: bytes) -> None:
        """Send a packet to a known MAC; never waits."""
        self._sent += 1
        packet = Packet(str(self.address), address, protocol, payload)
        self._send_frame(mac, packets.IPV4, packets.build_ipv4(packet, self._sent & 0xFFFF))

    def _send_frame(self, to: bytes, ethertype: int, payload: bytes) -> None:
        self.port.sent(packets.build_frame(Frame(to, self.mac, ethertype, payload)))

    # ---- Receiving ----

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
                self.on_packet(frame.sender, packet)
        self.timeline.notify()

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

    def on_packet(self, mac: bytes, packet: Packet) -> None:
        """A packet for this host, from the neighbour with this MAC."""
        raise NotImplementedError
