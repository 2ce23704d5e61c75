"""IPv6 between hosts of a switch, and its messages against scapy's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tender.errors import UsageError
from tender.testing.net import icmp, packets
from tender.testing.net.describe import describe
from tender.testing.net.host import Host
from tender.testing.net.icmp import ADVERTISEMENT, ECHO_REQUEST, SOLICITATION, Echo, Neighbour
from tender.testing.net.packets import Datagram, Frame, Packet, Segment
from tender.testing.net.switch import Switch

MAC = bytes.fromhex("020000000001")
ENDS = "fd00::1", "fd00::2"


@pytest.fixture
def hosts(switch: Switch) -> tuple[Host, Host]:
    return switch.host("fd00::1/64"), switch.host("fd00::2/64", mac="02:00:00:00:00:99")


def test_the_bytes_are_those_of_scapy() -> None:
    inet6: Any = pytest.importorskip("scapy.layers.inet6", reason="scapy is not installed")
    inet: Any = pytest.importorskip("scapy.layers.inet")
    mac = packets.mac_text(MAC)
    ip = inet6.IPv6(src=ENDS[0], dst=ENDS[1])
    discovery = inet6.IPv6(src=ENDS[0], dst=ENDS[1], hlim=255)
    echo = icmp.build_echo(Echo(ECHO_REQUEST, 7, 3, b"abc"), *ENDS)
    asks = icmp.build_neighbour(Neighbour(SOLICITATION, ENDS[1], MAC), *ENDS)
    flags = icmp.SOLICITED | icmp.OVERRIDE
    tells = icmp.build_neighbour(Neighbour(ADVERTISEMENT, ENDS[0], MAC, flags), *ENDS)
    udp = Packet(*ENDS, packets.UDP, packets.build_udp(Datagram(ENDS[0], 1000, ENDS[1], 7, b"hi")))
    segment = Segment(1000, 80, 5, 0, packets.SYN, 8192)
    tcp = Packet(*ENDS, packets.TCP, packets.build_tcp(*ENDS, segment))
    source, target = inet6.ICMPv6NDOptSrcLLAddr(lladdr=mac), inet6.ICMPv6NDOptDstLLAddr(lladdr=mac)
    expected = {
        echo: ip / inet6.ICMPv6EchoRequest(id=7, seq=3, data=b"abc"),
        asks: discovery / inet6.ICMPv6ND_NS(tgt=ENDS[1]) / source,
        tells: discovery / inet6.ICMPv6ND_NA(tgt=ENDS[0], R=0, S=1, O=1) / target,
        udp: ip / inet.UDP(sport=1000, dport=7) / b"hi",
        tcp: ip / inet.TCP(sport=1000, dport=80, seq=5, flags="S", window=8192),
    }
    for ours, theirs in expected.items():
        built = packets.build_ipv6(ours)
        theirs = theirs.copy()
        theirs.hlim = ours.ttl
        assert built == bytes(theirs), theirs.summary()
        assert packets.parse_ipv6(built + bytes(9)) == ours
    assert icmp.parse_echo(echo) == Echo(ECHO_REQUEST, 7, 3, b"abc")
    assert icmp.parse_neighbour(asks) == Neighbour(SOLICITATION, ENDS[1], MAC)
    assert packets.parse_udp(udp) == Datagram(ENDS[0], 1000, ENDS[1], 7, b"hi")
    assert packets.parse_tcp(tcp) == segment
    assert icmp.solicited_node("fd00::1234:5678") == "ff02::1:ff34:5678"


def test_hosts_find_and_ping_each_other(switch: Switch, hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    assert repr(near) == "<host fd00::1/64, 02:00:00:01:00:00>"
    assert near.ping("FD00:0::2", count=3).received == 3
    assert near.arp("fd00::2") == "02:00:00:00:00:99"
    assert far.arp("fd00::1") == packets.mac_text(near.mac)
    assert near.ping("fe80::ff:fe00:99").received == 1  # of the MAC above
    lines = "\n".join(switch.lines())
    assert "33:33:ff:00:00:02, ND who has fd00::2, tell fd00::1, 86 bytes" in lines
    assert "ND fd00::2 is at 02:00:00:00:00:99, 86 bytes" in lines
    assert "fd00::1 > fd00::2 ping seq 3" in lines
    assert near.ping("fd00::9", timeout=0.1).received == 0
    with pytest.raises(TimeoutError, match="nobody answered: who has fd00::9, tell fd00::1"):
        near.arp("fd00::9", timeout=0.1)


def test_tcp_and_udp(switch: Switch, hosts: tuple[Host, Host]) -> None:
    near, far = hosts
    for host in hosts:
        host.port.drop(every=4)
    with far.listen(80) as listener:
        here = near.tcp("fd00:0::2", 80)
        there = listener.accept()
        assert repr(here).startswith("<TCP [fd00::1]:")
        assert there.address == "fd00::1"
        here.send(bytes(5000))
        here.close()
        assert there.read() == bytes(5000)
    switch.clear_faults()
    for host in hosts:
        host.port.clear_faults()
    inbox, outbox = far.udp(7), near.udp()
    outbox.send("fd00::2", 7, b"hello")
    got = inbox.receive()
    inbox.send(got.sender, got.source, got.data.upper())
    assert outbox.receive().data == b"HELLO"
    with pytest.raises(TimeoutError, match=r"^\[fd00::2\]:81 did not answer"):
        near.tcp("fd00::2", 81, timeout=0.1)


def test_a_gateway_and_what_has_no_route(switch: Switch) -> None:
    host = switch.host("fd00::1/64", gateway="fd00::fe")
    gateway = switch.host("fd00::fe/64")
    host.udp_send("2001:db8::1", 7, b"far away")
    assert gateway.expect(b"far away")[:6] == gateway.mac
    old = switch.host("10.0.0.1/24", gateway="10.0.0.254")
    for alone, address in ((gateway, "2001:db8::1"), (host, "10.0.0.2"), (old, "fd00::1")):
        with pytest.raises(UsageError, match=r"is not in .*, and the host has no gateway to it"):
            alone.ping(address)
    with pytest.raises(UsageError, match="'fe80::1%eth0' is not an IP address, as in 10.0.0.1 or"):
        host.ping("fe80::1%eth0")
    with pytest.raises(UsageError, match="the switch has a host fd00::1 already"):
        switch.host("fd00:0::1/64")


def test_who_looks_for_duplicates_is_answered(switch: Switch, hosts: tuple[Host, Host]) -> None:
    near, far = hosts

    def solicit(hops: int) -> None:
        to = icmp.solicited_node("fd00::2")
        packet = icmp.build_neighbour(Neighbour(SOLICITATION, "fd00::2", None), "::", to)
        packet = Packet(packet.sender, packet.to, packet.protocol, packet.payload, hops)
        data = packets.build_ipv6(packet)
        near.send(packets.build_frame(Frame(packets.multicast_mac(to), MAC, packets.IPV6, data)))

    solicit(254)  # a router has forwarded it
    with pytest.raises(TimeoutError):
        near.expect(len, timeout=0.1)
    solicit(255)
    answer = near.expect(len)
    assert answer[:6] == bytes.fromhex("333300000001")
    assert "ND fd00::2 is at 02:00:00:00:00:99" in describe(answer)
    assert far._neighbours == {}


@given(st.binary(max_size=80), st.sampled_from([packets.ICMPV6, packets.UDP, packets.TCP]))
def test_no_packet_is_an_error(payload: bytes, protocol: int) -> None:
    for body in (payload, b"\x87" + payload, b"\x88\0" + payload):
        pseudo = packets.pseudo_header(*ENDS, protocol, len(body))
        total = packets.checksum(pseudo + body[:2] + bytes(2) + body[4:])
        sound = body[:2] + total.to_bytes(2, "big") + body[4:]  # of ICMPv6
        packet = Packet(*ENDS, protocol, sound, 255)
        icmp.parse_neighbour(packet)
        icmp.parse_echo(packet)
        packets.parse_udp(packet)
        packets.parse_tcp(packet)
        describe(packets.build_frame(Frame(MAC, MAC, packets.IPV6, packets.build_ipv6(packet))))
        assert packets.parse_ipv6(packets.build_ipv6(packet)[:-1]) is None or not sound
