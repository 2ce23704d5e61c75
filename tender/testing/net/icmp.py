"""ICMP: echo of both versions, and IPv6's neighbour discovery.

The rule here is that of packets.py: functions of bytes, and None for what is malformed. Sources:
RFC 792 (ICMP), 4443 (ICMPv6), 4861 (neighbour discovery).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv6Address

from tender.testing.net.packets import ICMP, ICMPV6, Packet, checksum, pseudo_header

ECHO_REPLY, ECHO_REQUEST = 0, 8
SOLICITATION, ADVERTISEMENT = 135, 136
ALL_NODES = "ff02::1"
SOLICITED, OVERRIDE = 0x4000_0000, 0x2000_0000  # flags of an advertisement
_ECHO_V6 = {ECHO_REQUEST: 128, ECHO_REPLY: 129}
_HOPS = 255  # of neighbour discovery: what a router has forwarded has less
_LINK_ADDRESS = {SOLICITATION: 1, ADVERTISEMENT: 2}  # the option with the MAC

_ICMP = struct.Struct("!BBH")
_ECHO = struct.Struct("!HH")
_NEIGHBOUR = struct.Struct("!I16s")
_OPTION = struct.Struct("!BB6s")


@dataclass(frozen=True)
class Echo:
    """A ping or its answer, of either version."""

    kind: int  # ECHO_REQUEST, ECHO_REPLY
    ident: int
    seq: int
    data: bytes


@dataclass(frozen=True)
class Neighbour:
    """A solicitation of the MAC of an IPv6 address, or an advertisement of it."""

    kind: int  # SOLICITATION, ADVERTISEMENT
    target: str
    mac: bytes | None  # of the sender, or of the target
    flags: int = 0


def solicited_node(address: str) -> str:
    """The multicast address to which a solicitation of `address` goes (RFC 4291)."""
    return str(IPv6Address(b"\xff\x02" + bytes(9) + b"\x01\xff" + IPv6Address(address).packed[13:]))


# ---- Building ----


def build_echo(echo: Echo, sender: str, to: str) -> Packet:
    body = _ECHO.pack(echo.ident, echo.seq) + echo.data
    if ":" in to:
        return Packet(sender, to, ICMPV6, _build_v6(_ECHO_V6[echo.kind], body, sender, to))
    total = checksum(_ICMP.pack(echo.kind, 0, 0) + body)
    return Packet(sender, to, ICMP, _ICMP.pack(echo.kind, 0, total) + body)


def build_neighbour(message: Neighbour, sender: str, to: str) -> Packet:
    body = _NEIGHBOUR.pack(message.flags, IPv6Address(message.target).packed)
    if message.mac is not None:
        body += _OPTION.pack(_LINK_ADDRESS[message.kind], 1, message.mac)
    return Packet(sender, to, ICMPV6, _build_v6(message.kind, body, sender, to), _HOPS)


def _build_v6(kind: int, body: bytes, sender: str, to: str) -> bytes:
    pseudo = pseudo_header(sender, to, ICMPV6, _ICMP.size + len(body))
    total = checksum(pseudo + _ICMP.pack(kind, 0, 0) + body)
    return _ICMP.pack(kind, 0, total) + body


# ---- Parsing ----


def parse_echo(packet: Packet) -> Echo | None:
    found = _parse(packet)
    if found is None or len(found[1]) < _ECHO.size:
        return None
    kind, body = found
    kinds = {value: key for key, value in _ECHO_V6.items()} if packet.protocol == ICMPV6 else {}
    kind = kinds.get(kind, -1) if packet.protocol == ICMPV6 else kind
    if kind not in (ECHO_REQUEST, ECHO_REPLY):
        return None
    ident, seq = _ECHO.unpack_from(body)
    return Echo(kind, ident, seq, body[_ECHO.size :])


def parse_neighbour(packet: Packet) -> Neighbour | None:
    found = _parse(packet) if packet.protocol == ICMPV6 and packet.ttl == _HOPS else None
    if found is None or found[0] not in _LINK_ADDRESS or len(found[1]) < _NEIGHBOUR.size:
        return None
    kind, body = found
    flags, target = _NEIGHBOUR.unpack_from(body)
    return Neighbour(kind, str(IPv6Address(target)), _parse_mac(kind, body), flags)


def _parse(packet: Packet) -> tuple[int, bytes] | None:
    """Type and body of a message whose code is 0."""
    payload = packet.payload
    pseudo = b""
    if packet.protocol == ICMPV6:
        pseudo = pseudo_header(packet.sender, packet.to, ICMPV6, len(payload))
    elif packet.protocol != ICMP:
        return None
    if len(payload) < _ICMP.size or payload[1] or checksum(pseudo + payload):
        return None
    return payload[0], payload[_ICMP.size :]


def _parse_mac(kind: int, body: bytes) -> bytes | None:
    """The MAC in the options; None if there is none."""
    at = _NEIGHBOUR.size
    while at + _OPTION.size <= len(body):
        option, words, mac = _OPTION.unpack_from(body, at)
        if option == _LINK_ADDRESS[kind] and words == 1:
            return bytes(mac)
        if not words:
            return None
        at += 8 * words
    return None
