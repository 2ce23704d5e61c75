"""Frames as lines of text, for reports and errors."""

from __future__ import annotations

from tender.testing.net.icmp import (
    ECHO_REQUEST,
    SOLICITATION,
    Neighbour,
    parse_echo,
    parse_neighbour,
)
from tender.testing.net.packets import (
    ACK,
    ARP,
    ARP_REQUEST,
    FIN,
    ICMP,
    IPV4,
    IPV6,
    PSH,
    RST,
    SYN,
    TCP,
    UDP,
    Datagram,
    Packet,
    Segment,
    endpoint,
    mac_text,
    parse_arp,
    parse_frame,
    parse_packet,
    parse_tcp,
    parse_udp,
)


def describe(data: bytes) -> str:
    """A summary of a frame, in one line."""
    frame = parse_frame(data)
    if frame is None:
        return f"{len(data)} bytes, too short for a frame"
    ends = f"{mac_text(frame.sender)} > {mac_text(frame.to)}"
    text = None
    if frame.ethertype == ARP:
        text = _describe_arp(frame.payload)
    elif frame.ethertype in (IPV4, IPV6):
        version = "IPv4" if frame.ethertype == IPV4 else "IPv6"
        packet = parse_packet(frame)
        text = _describe_packet(packet) if packet else f"{version}, damaged or a fragment"
    return f"{ends}, {text or f'type {frame.ethertype:#06x}'}, {len(data)} bytes"


def _describe_arp(payload: bytes) -> str:
    arp = parse_arp(payload)
    if arp is None:
        return "ARP, damaged"
    if arp.operation == ARP_REQUEST:
        return f"ARP who has {arp.target}, tell {arp.sender}"
    return f"ARP {arp.sender} is at {mac_text(arp.sender_mac)}"


def _describe_packet(packet: Packet) -> str:
    if echo := parse_echo(packet):
        kind = "ping" if echo.kind == ECHO_REQUEST else "answer"
        return f"{packet.sender} > {packet.to} {kind} seq {echo.seq}"
    if message := parse_neighbour(packet):
        return _describe_neighbour(packet, message)
    if datagram := parse_udp(packet):
        return f"{_ends(packet, datagram)} UDP {len(datagram.data)} bytes"
    if segment := parse_tcp(packet):
        return (
            f"{_ends(packet, segment)} "
            f"TCP {flags_text(segment.flags)} seq {segment.seq} ack {segment.ack} "
            f"{len(segment.data)} bytes"
        )
    known = packet.protocol in (ICMP, UDP, TCP)
    return f"{packet.sender} > {packet.to} protocol {packet.protocol}{', damaged' * known}"


def _ends(packet: Packet, ports: Datagram | Segment) -> str:
    return f"{endpoint(packet.sender, ports.source)} > {endpoint(packet.to, ports.port)}"


def _describe_neighbour(packet: Packet, message: Neighbour) -> str:
    if message.kind == SOLICITATION:
        return f"ND who has {message.target}, tell {packet.sender}"
    return f"ND {message.target} is at {mac_text(message.mac or bytes(6))}"


def flags_text(flags: int) -> str:
    names = {SYN: "SYN", FIN: "FIN", RST: "RST", PSH: "PSH", ACK: "ACK"}
    return "+".join(name for bit, name in names.items() if flags & bit) or "none"
