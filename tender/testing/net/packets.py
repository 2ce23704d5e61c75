"""Ethernet, ARP, IPv4, IPv6, UDP and TCP: as much as a host in a test needs.

The rule here: functions of bytes, no I/O. Parsing a truncated or malformed frame gives None, never
an exception. Sources: RFC 826 (ARP), 791 (IPv4), 8200 (IPv6), 768 (UDP), 9293 (TCP), 1071 (the
checksum).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD  # ethertypes
ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58  # protocols
ARP_REQUEST, ARP_REPLY = 1, 2
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10  # flags of TCP
BROADCAST = b"\xff" * 6
HEADER_SIZE = 14  # of Ethernet
_TTL = 64
_DONT_FRAGMENT = 0x4000

_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_UDP = struct.Struct("!HHHH")
_TCP = struct.Struct("!HHIIBBHHH")


@dataclass(frozen=True)
class Frame:
    """An Ethernet frame; `payload` is what follows its header of 14 bytes."""

    to: bytes
    sender: bytes
    ethertype: int
    payload: bytes


@dataclass(frozen=True)
class Arp:
    """A request for the MAC of an IPv4 address, or a reply."""

    operation: int  # ARP_REQUEST, ARP_REPLY
    sender_mac: bytes
    sender: str
    target_mac: bytes
    target: str


@dataclass(frozen=True)
class Packet:
    """An IPv4 packet that is no fragment, with a correct checksum, or one of IPv6."""

    sender: str
    to: str
    protocol: int
    payload: bytes
    ttl: int = _TTL  # IPv6's hop limit


@dataclass(frozen=True)
class Datagram:
    """A UDP datagram from `sender`:`source` to `to`:`port`."""

    sender: str
    source: int
    to: str
    port: int
    data: bytes


@dataclass(frozen=True)
class Segment:
    """A TCP segment, without its options."""

    source: int
    port: int
    seq: int
    ack: int
    flags: int
    window: int
    data: bytes = b""


def mac_text(mac: bytes) -> str:
    return mac.hex(":")


def checksum(data: bytes) -> int:
    """The internet checksum of `data` (RFC 1071); 0 if `data` includes a correct one."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def multicast_mac(address: str) -> bytes:
    """The MAC of an IPv6 multicast address (RFC 2464)."""
    return b"\x33\x33" + IPv6Address(address).packed[12:]


def endpoint(address: str, port: int) -> str:
    """`10.0.0.2:80`, `[fd00::2]:80`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _packed(address: str) -> bytes:
    return ip_address(address).packed


def pseudo_header(sender: str, to: str, protocol: int, length: int) -> bytes:
    """What a checksum covers beside the payload: RFC 768, and RFC 8200 for IPv6."""
    kind = "!I3xB" if ":" in to else "!HxB"
    rest = struct.pack(kind, length, protocol)
    return _packed(sender) + _packed(to) + rest


# ---- Building ----


def build_frame(frame: Frame) -> bytes:
    return _ETHERNET.pack(frame.to, frame.sender, frame.ethertype) + frame.payload


def build_arp(arp: Arp) -> bytes:
    """The payload of an ARP frame."""
    addresses = arp.sender_mac, _packed(arp.sender), arp.target_mac, _packed(arp.target)
    return _ARP.pack(1, IPV4, 6, 4, arp.operation, *addresses)


def build_ipv4(packet: Packet, ident: int = 0) -> bytes:
    length = _IPV4.size + len(packet.payload)
    ends = _packed(packet.sender), _packed(packet.to)
    fields = [0x45, 0, length, ident, _DONT_FRAGMENT, packet.ttl, packet.protocol, 0, *ends]
    fields[7] = checksum(_IPV4.pack(*fields))
    return _IPV4.pack(*fields) + packet.payload


def build_ipv6(packet: Packet) -> bytes:
    ends = _packed(packet.sender), _packed(packet.to)
    fields = 6 << 28, len(packet.payload), packet.protocol, packet.ttl
    return _IPV6.pack(*fields, *ends) + packet.payload


def build_udp(datagram: Datagram) -> bytes:
    length = _UDP.size + len(datagram.data)
    pseudo = pseudo_header(datagram.sender, datagram.to, UDP, length)
    ports = datagram.source, datagram.port
    total = checksum(pseudo + _UDP.pack(*ports, length, 0) + datagram.data) or 0xFFFF
    return _UDP.pack(*ports, length, total) + datagram.data


def build_tcp(sender: str, to: str, segment: Segment) -> bytes:
    head = segment.source, segment.port, segment.seq, segment.ack, 5 << 4, segment.flags
    pseudo = pseudo_header(sender, to, TCP, _TCP.size + len(segment.data))
    total = checksum(pseudo + _TCP.pack(*head, segment.window, 0, 0) + segment.data)
    return _TCP.pack(*head, segment.window, total, 0) + segment.data


# ---- Parsing ----


def parse_frame(data: bytes) -> Frame | None:
    if len(data) < HEADER_SIZE:
        return None
    to, sender, ethertype = _ETHERNET.unpack_from(data)
    return Frame(to, sender, ethertype, data[HEADER_SIZE:])


def parse_arp(payload: bytes) -> Arp | None:
    """An ARP message about IPv4 on Ethernet."""
    if len(payload) < _ARP.size:
        return None
    *kind, operation, sender_mac, sender, target_mac, target = _ARP.unpack_from(payload)
    if kind != [1, IPV4, 6, 4]:
        return None
    return Arp(
        operation, sender_mac, str(IPv4Address(sender)), target_mac, str(IPv4Address(target))
    )


def parse_ipv4(payload: bytes) -> Packet | None:
    """A packet that is not a fragment, without Ethernet's padding."""
    if len(payload) < _IPV4.size:
        return None
    version, _, length, _, fragment, ttl, protocol, _, sender, to = _IPV4.unpack_from(payload)
    header = (version & 15) * 4
    if version >> 4 != 4 or not _IPV4.size <= header <= length <= len(payload):
        return None
    if fragment & 0x3FFF or checksum(payload[:header]):
        return None
    ends = str(IPv4Address(sender)), str(IPv4Address(to))
    return Packet(*ends, protocol, payload[header:length], ttl)


def parse_ipv6(payload: bytes) -> Packet | None:
    """A packet without Ethernet's padding. Extension headers stay a part of its payload."""
    if len(payload) < _IPV6.size:
        return None
    word, length, protocol, hops, sender, to = _IPV6.unpack_from(payload)
    if word >> 28 != 6 or _IPV6.size + length > len(payload):
        return None
    ends = str(IPv6Address(sender)), str(IPv6Address(to))
    return Packet(*ends, protocol, payload[_IPV6.size : _IPV6.size + length], hops)


def parse_packet(frame: Frame) -> Packet | None:
    """The packet in a frame of IPv4 or IPv6."""
    parsers = {IPV4: parse_ipv4, IPV6: parse_ipv6}
    return parsers[frame.ethertype](frame.payload) if frame.ethertype in parsers else None


def parse_udp(packet: Packet) -> Datagram | None:
    payload = packet.payload
    if packet.protocol != UDP or len(payload) < _UDP.size:
        return None
    source, port, length, total = _UDP.unpack_from(payload)
    if not _UDP.size <= length <= len(payload):
        return None
    has_checksum = total or ":" in packet.to  # IPv6 has no other
    pseudo = pseudo_header(packet.sender, packet.to, UDP, length)
    if has_checksum and checksum(pseudo + payload[:length]):
        return None
    return Datagram(packet.sender, source, packet.to, port, payload[_UDP.size : length])


def parse_tcp(packet: Packet) -> Segment | None:
    payload = packet.payload
    if packet.protocol != TCP or len(payload) < _TCP.size:
        return None
    source, port, seq, ack, words, flags, window, _, _ = _TCP.unpack_from(payload)
    header = (words >> 4) * 4
    pseudo = pseudo_header(packet.sender, packet.to, TCP, len(payload))
    if not _TCP.size <= header <= len(payload) or checksum(pseudo + payload):
        return None
    return Segment(source, port, seq, ack, flags, window, payload[header:])
