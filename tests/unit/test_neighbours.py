"""Which guests hear ARP and neighbour discovery on a switch with `neigh_suppress`."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tender.testing.net import icmp, neighbours, packets
from tender.testing.net.icmp import ADVERTISEMENT, SOLICITATION, Neighbour
from tender.testing.net.packets import ARP_REQUEST, Arp, Frame
from tender.testing.net.switch import Switch

About = Callable[[bytes, str, str], bytes]  # MAC of the sender, its address or "", the one asked
ADDRESSES = {"arp": [f"10.0.0.{each}" for each in range(5)], "nd": [f"fd00::{i}" for i in range(5)]}


def arp(mac: bytes, own: str, target: str) -> bytes:
    """A request, a probe or an announcement."""
    payload = packets.build_arp(Arp(ARP_REQUEST, mac, own or "0.0.0.0", bytes(6), target))
    return packets.build_frame(Frame(packets.BROADCAST, mac, packets.ARP, payload))


def solicitation(mac: bytes, own: str, target: str) -> bytes:
    """The same as neighbour discovery has them; an announcement is an advertisement to all."""
    kind, to = SOLICITATION, icmp.solicited_node(target)
    if own == target:
        kind, to = ADVERTISEMENT, icmp.ALL_NODES
    message = icmp.build_neighbour(Neighbour(kind, target, mac if own else None), own or "::", to)
    return ethernet(packets.multicast_mac(to), mac, message)


def ethernet(to: bytes, mac: bytes, packet: packets.Packet) -> bytes:
    return packets.build_frame(Frame(to, mac, packets.IPV6, packets.build_ipv6(packet)))


ABOUT: dict[str, About] = {"arp": arp, "nd": solicitation}


class Guests:
    """Four guests, whose addresses are 1 to 4, and a host, which hears all."""

    def __init__(self, switch: Switch, kind: str) -> None:
        self.address = ADDRESSES[kind]
        self.host = switch.host("10.0.0.9/24" if kind == "arp" else "fd00::9/64")
        self._ports = [switch.port() for _ in range(4)]
        self._ends = [socket.socket(fileno=port.attach().fd) for port in self._ports]
        self._about = ABOUT[kind]

    def close(self) -> None:
        for end in self._ends:
            end.close()

    def end(self, guest: int) -> None:
        self._ends[guest - 1].close()
        self._ports[guest - 1].detach()

    def hear(self, guest: int, own: int, target: int) -> list[int]:
        """Let a guest send: which others hear it."""
        port = self._ports[guest - 1]
        own_address = self.address[own] if own else ""
        return self.hear_frame(guest, self._about(port.mac, own_address, self.address[target]))

    def hear_frame(self, guest: int, frame: bytes) -> list[int]:
        self._ports[guest - 1].sent(frame)
        self.host.expect(frame, timeout=0)
        return [number for number in range(1, 5) if self._heard(number, frame)]

    def _heard(self, guest: int, frame: bytes) -> bool:
        try:
            assert self._ends[guest - 1].recv(2000, socket.MSG_DONTWAIT) == frame
        except OSError:  # nothing waits, or it has ended
            return False
        return True


@pytest.fixture
def switch() -> Iterator[Switch]:
    with Switch(neigh_suppress=True) as value:
        yield value


@pytest.fixture(params=list(ABOUT))
def guests(switch: Switch, request: pytest.FixtureRequest) -> Iterator[Guests]:
    value = Guests(switch, request.param)
    yield value
    value.close()


def test_a_request_goes_to_the_one_that_has_the_address(guests: Guests) -> None:
    assert guests.hear(1, own=1, target=2) == [2, 3, 4], "nobody has heard of 2 yet"
    assert guests.hear(2, own=2, target=1) == [1]
    assert guests.hear(3, own=3, target=2) == [2]
    guests.end(2)
    assert guests.hear(3, own=3, target=2) == [1, 4], "another guest may have it now"


def test_an_announcement_is_for_hosts_and_for_who_has_the_address(guests: Guests) -> None:
    assert guests.hear(1, own=1, target=1) == []
    assert guests.hear(1, own=1, target=1) == []
    assert guests.hear(2, own=0, target=1) == [1], "a probe, for an address that is taken"
    assert guests.hear(2, own=0, target=2) == []
    assert guests.hear(3, own=1, target=1) == [1], "a conflict, or the address has moved"
    assert guests.hear(4, own=4, target=1) == [3]


def test_other_frames_are_flooded(guests: Guests) -> None:
    mac = b"\x02\0\0\0\0\1"
    assert guests.hear_frame(1, packets.build_frame(Frame(b"\xff" * 6, mac, 0x1234, b"data")))
    udp = packets.build_udp(packets.Datagram("fd00::1", 1, "ff02::1", 2, b"data"))
    packet = packets.Packet("fd00::1", "ff02::1", packets.UDP, udp)
    whole = ethernet(packets.multicast_mac("ff02::1"), mac, packet)
    for frame in (whole, whole[:30], arp(mac, "10.0.0.1", "10.0.0.1")[:40]):
        assert guests.hear_frame(1, frame) == [2, 3, 4]


def test_a_guest_with_many_addresses_does_not_fill_the_memory(
    switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "ADDRESSES_MAX", 2)
    guests = Guests(switch, "arp")
    claim = partial(guests.hear, 1)
    assert [claim(own, own) for own in (1, 2, 3)] == [[], [], []]
    assert guests.hear(2, own=4, target=2) == [1]
    assert guests.hear(2, own=4, target=3) == [1, 3, 4]
    guests.close()


def test_it_is_off_unless_it_is_asked_for() -> None:
    with Switch() as plain, plain.another() as other:
        for switch in (plain, other):
            guests = Guests(switch, "arp")
            assert guests.hear(1, own=1, target=1) == [2, 3, 4]
            guests.close()
        plain.neigh_suppress = True
        assert plain.another().neigh_suppress
