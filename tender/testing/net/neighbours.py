"""Who has which address: ARP and neighbour discovery need not be flooded where that is known.

It is what `neigh_suppress` of Linux's bridge does (bridge(8), RFC 9161), but nothing is answered
in a guest's place: the one that is asked for gets the request, so its own answer is tested.
"""

from __future__ import annotations

from tender.testing.net import packets
from tender.testing.net.icmp import SOLICITATION, parse_neighbour
from tender.testing.net.port import GuestPort, Port

ADDRESSES_MAX = 8192  # learned; requests for others are flooded
NONE = ("0.0.0.0", "::")  # the sender of a probe, which has no address yet (RFC 5227, 4862)


class Neighbours:
    """The port of each address, learned from ARP and neighbour discovery."""

    def __init__(self) -> None:
        self._ports: dict[str, Port] = {}

    def limit(self, sender: Port, frame: bytes, flooded: list[Port]) -> list[Port]:
        """Those of `flooded` that a frame from the owner of `sender` is given to.

        Hosts hear all. Of the guests, only the one that has the address hears a request for it,
        and none an announcement or a probe of one that is new.
        """
        parsed = _parse(frame)
        if parsed is None:
            return flooded
        own, target = parsed
        holder = self._holder(target)
        if own not in NONE and (own in self._ports or len(self._ports) < ADDRESSES_MAX):
            self._ports[own] = sender
        is_request = own not in (target, *NONE)
        if not frame[0] & 1 or (holder is None and is_request):
            return flooded
        return [port for port in flooded if port is holder or not isinstance(port, GuestPort)]

    def _holder(self, address: str) -> Port | None:
        port = self._ports.get(address)
        return None if isinstance(port, GuestPort) and not port.is_attached else port


def _parse(data: bytes) -> tuple[str, str] | None:
    """The sender's address and the one that it is about; None for any other frame."""
    frame = packets.parse_frame(data)
    if frame is None:
        return None
    if frame.ethertype == packets.ARP:
        arp = packets.parse_arp(frame.payload)
        return (arp.sender, arp.target) if arp else None
    packet = packets.parse_ipv6(frame.payload) if frame.ethertype == packets.IPV6 else None
    message = parse_neighbour(packet) if packet else None
    if packet is None or message is None:
        return None
    return packet.sender if message.kind == SOLICITATION else message.target, message.target
