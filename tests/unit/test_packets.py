"""Packets of the test network, against bytes from RFCs and other sources."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tender.testing.net import icmp, packets
from tender.testing.net.describe import describe
from tender.testing.net.icmp import Echo
from tender.testing.net.packets import Arp, Datagram, Frame, Packet, Segment

MAC1, MAC2 = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")

# Written out field by field from RFC 826.
ARP_BYTES = bytes.fromhex(
    "ffffffffffff 020000000001 08060001 0800 06 04 0001 020000000001 0a000001 000000000000 0a000002"
)
# From RFC 1071's worked example.
RFC1071 = bytes.fromhex("0001f203f4f5f6f7")
# The header that Wikipedia's article on the IPv4 checksum works out: b861.
IPV4_HEADER = bytes.fromhex("45000073000040004011b861c0a80001c0a800c7")


def test_the_checksum_is_that_of_the_rfc() -> None:
    assert packets.checksum(RFC1071) == 0xFFFF ^ 0xDDF2
    assert packets.checksum(IPV4_HEADER) == 0
    assert packets.checksum(IPV4_HEADER[:10] + b"\0\0" + IPV4_HEADER[12:]) == 0xB861


def test_an_arp_request_has_the_bytes_of_the_rfc() -> None:
    asked = Arp(packets.ARP_REQUEST, MAC1, "10.0.0.1", bytes(6), "10.0.0.2")
    frame = Frame(packets.BROADCAST, MAC1, packets.ARP, packets.build_arp(asked))
    assert packets.build_frame(frame) == ARP_BYTES
    assert packets.parse_frame(ARP_BYTES) == frame
    assert packets.parse_arp(frame.payload) == asked
    assert "who has 10.0.0.2, tell 10.0.0.1" in describe(ARP_BYTES)


def test_what_was_built_is_parsed_again() -> None:
    echo = Echo(icmp.ECHO_REQUEST, 7, 3, b"abc")
    packet = icmp.build_echo(echo, "10.0.0.1", "10.0.0.2")
    assert icmp.parse_echo(packet) == echo
    built = packets.build_ipv4(packet, ident=9)
    assert packets.parse_ipv4(built + bytes(20)) == packet  # ethernet's padding is left out
    datagram = Datagram("10.0.0.1", 1000, "10.0.0.2", 7, b"hello")
    inside = Packet("10.0.0.1", "10.0.0.2", packets.UDP, packets.build_udp(datagram))
    assert packets.parse_udp(inside) == datagram
    segment = Segment(1000, 80, 5, 6, packets.SYN | packets.ACK, 1024, b"data")
    payload = packets.build_tcp("10.0.0.1", "10.0.0.2", segment)
    inside = Packet("10.0.0.1", "10.0.0.2", packets.TCP, payload)
    assert packets.parse_tcp(inside) == segment


def test_one_bit_of_damage_is_noticed() -> None:
    echo = Echo(icmp.ECHO_REQUEST, 7, 3, b"abcd")
    packet = packets.build_ipv4(icmp.build_echo(echo, "10.0.0.1", "10.0.0.2"))
    for at in range(len(packet)):
        broken = bytearray(packet)
        broken[at] ^= 4
        found = packets.parse_ipv4(bytes(broken))
        assert found is None or icmp.parse_echo(found) is None


@given(st.binary(max_size=200), st.sampled_from([packets.ARP, packets.IPV4, 0x86DD]))
def test_no_frame_is_an_error(payload: bytes, ethertype: int) -> None:
    frame = packets.build_frame(Frame(MAC2, MAC1, ethertype, payload))
    assert str(len(frame)) in describe(frame)
    describe(frame[:9])
    packets.parse_arp(payload)
    packet = packets.parse_ipv4(payload) or Packet("1.2.3.4", "5.6.7.8", packets.TCP, payload)
    icmp.parse_echo(packet)
    packets.parse_tcp(packet)
    packets.parse_udp(Packet("1.2.3.4", "5.6.7.8", packets.UDP, payload))
