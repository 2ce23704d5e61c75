"""The network stack of a host: Ethernet, and IPv4 with ARP or IPv6 with neighbour discovery.

The rule here: `receive` is called with the switch's lock held and never waits. The methods that a
test calls take the lock, and wait on the switch's timeline, in real or in virtual time.
"""

from __future__ import annotations

from collections import deque
from ipaddress import IPv6Interface, ip_address

from tender.errors import InvalidValue, UsageError
from tender.testing.net import icmp, packets
from tender.testing.net.icmp import ADVERTISEMENT, SOLICITATION, Neighbour
from tender.testing.net.packets import Arp, Datagram, Frame, Packet, mac_text
from tender.testing.net.port import HostPort

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv4Interface

    from tender.testing.net.port import Network

    Interface = IPv4Interface | IPv6Interface

INBOX_FRAMES = 10_000  # kept for `expect`
ASK_EVERY_S = 0.2  # for the MAC of a neighbour
EPHEMERAL = 49152  # the first dynamic port (RFC 6335)


def as_data(name: str, value: object) -> None:
    """Raise UsageError unless `value` is bytes."""
    if not isinstance(value, (bytes, bytearray)):
        raise InvalidValue(name, value, "bytes, as b'hello'")


def as_ip(name: str, value: object) -> str:
    """`10.0.0.1` or `fd00::1`, in its short form; raises UsageError for anything else."""
    try:
        if isinstance(value, str) and "%" not in value:  # a scope means nothing here
            return str(ip_address(value))
    except ValueError:
        pass
    raise InvalidValue(name, value, "an IP address, as in 10.0.0.1 or fd00::1")


class Stack:
    """The stack of one host. `mac` is 6 bytes; faults of its link are set on `port`."""

    def __init__(
        self,
        network: Network,
        name: str,
        index: int,
        interface: Interface,
        mac: bytes,
        gateway: str | None,
    ) -> None:
        self.address = interface.ip
        self.mac = mac
        self.port = HostPort(network, name, index, self.receive)
        self.timeline = network.timeline
        self._network = network
        self.interface = interface
        self._interfaces = [interface]
        if isinstance(interface, IPv6Interface) and not interface.is_link_local:
            self._interfaces.append(_link_local(mac))
        self._own = {str(each.ip) for each in self._interfaces}
        self.broadcasts = {"255.255.255.255", str(interface.network.broadcast_address)} - self._own
        self._gateway = gateway
        self._neighbours: dict[str, bytes] = {}
        self._inbox: deque[bytes] = deque(maxlen=INBOX_FRAMES)
        self._sent = 0
        self._ephemeral = EPHEMERAL

    def __repr__(self) -> str:
        return f"<host {self._interfaces[0]}, {mac_text(self.mac)}>"

    # ---- Neighbours ----

    def arp(self, address: str, timeout: float = 1.0) -> str:
        """The MAC of `address`, as 02:00:00:00:00:01; asks for it if it is not known.

        That is ARP, or neighbour discovery for an address of IPv6. Raises TimeoutError after
        `timeout` seconds without an answer. A guest that has just been started may take longer, up
        to the switch's patience.
        """
        return mac_text(self.resolve(address, timeout))

    def resolve(self, address: str, timeout: float = 1.0) -> bytes:
        """The same as 6 bytes; for an address of another network, the gateway's."""
        own, hop = self.route(address)
        spent = 0.0
        while hop not in self._neighbours:
            patience = self.patience if self._network.awaits_guests() else timeout
            if spent >= max(timeout, patience):
                raise TimeoutError(f"nobody answered: who has {hop}, tell {own}")
            self._ask(own, hop)
            self.timeline.wait(lambda: hop in self._neighbours, ASK_EVERY_S)
            spent += ASK_EVERY_S
        return self._neighbours[hop]

    def route(self, address: str) -> tuple[str, str]:
        """The own address from which packets for `address` go, and the neighbour to which.

        Raises UsageError if there is none.
        """
        to = ip_address(as_ip("address", address))
        for hop in (to, self._gateway and ip_address(self._gateway)):
            for interface in self._interfaces:
                if hop and hop in interface.network and hop.version == to.version:
                    return str(interface.ip), str(hop)
        subnet = self._interfaces[0].network
        raise UsageError(f"{to} is not in {subnet}, and the host has no gateway to it")

    def _ask(self, own: str, hop: str) -> None:
        if ":" in hop:
            message = Neighbour(SOLICITATION, hop, self.mac)
            to = icmp.solicited_node(hop)
            self.send_to(packets.multicast_mac(to), icmp.build_neighbour(message, own, to))
        else:
            request = packets.build_arp(Arp(packets.ARP_REQUEST, self.mac, own, bytes(6), hop))
            self._send_frame(packets.BROADCAST, packets.ARP, request)

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

    def send_packet(self, packet: Packet) -> None:
        """Send it; waits for ARP if the MAC of its next hop is not known."""
        self.send_to(self.resolve(packet.to), packet)

    def send_to(self, mac: bytes, packet: Packet) -> None:
        """Send a packet to a known MAC; never waits."""
        self._sent += 1
        if ":" in packet.to:
            self._send_frame(mac, packets.IPV6, packets.build_ipv6(packet))
        else:
            data = packets.build_ipv4(packet, self._sent & 0xFFFF)
            self._send_frame(mac, packets.IPV4, data)

    def send_datagram(self, mac: bytes, datagram: Datagram) -> None:
        """Send a UDP datagram to a known MAC; never waits."""
        payload = packets.build_udp(datagram)
        self.send_to(mac, Packet(datagram.sender, datagram.to, packets.UDP, payload))

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
        elif packet := packets.parse_packet(frame):
            if message := icmp.parse_neighbour(packet):
                self._on_neighbour(frame.sender, packet, message)
            elif packet.to in self._own or packet.to in self.broadcasts:
                self.on_packet(frame.sender, packet)
        self.timeline.notify()

    def _on_arp(self, frame: Frame) -> None:
        arp = packets.parse_arp(frame.payload)
        if arp is None or arp.sender in self._own:
            return
        if arp.sender != "0.0.0.0":
            self._neighbours[arp.sender] = arp.sender_mac
        if arp.operation == packets.ARP_REQUEST and arp.target in self._own:
            ours = self.mac, arp.target
            answer = Arp(packets.ARP_REPLY, *ours, arp.sender_mac, arp.sender)
            self._send_frame(arp.sender_mac, packets.ARP, packets.build_arp(answer))

    def _on_neighbour(self, mac: bytes, packet: Packet, message: Neighbour) -> None:
        if packet.sender in self._own:
            return
        known = packet.sender if message.kind == SOLICITATION else message.target
        if known != "::":
            self._neighbours[known] = message.mac or mac
        if message.kind == SOLICITATION and message.target in self._own:
            # Who looks for duplicates has no address to answer to.
            to, flags = packet.sender, icmp.SOLICITED | icmp.OVERRIDE
            if to == "::":
                to, flags = icmp.ALL_NODES, icmp.OVERRIDE
                mac = packets.multicast_mac(to)
            answer = Neighbour(ADVERTISEMENT, message.target, self.mac, flags)
            self.send_to(mac, icmp.build_neighbour(answer, message.target, to))

    def on_packet(self, mac: bytes, packet: Packet) -> None:
        """A packet for this host, from the neighbour with this MAC."""
        raise NotImplementedError


def _link_local(mac: bytes) -> IPv6Interface:
    """The link-local address of a MAC (RFC 4291, appendix A)."""
    ident = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return IPv6Interface((b"\xfe\x80" + bytes(6) + ident, 64))
