"""The frame filter between a guest and passt, with the test in the place of both."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender.host.passt import FILTER
from tests.waiting import PATIENCE_S, command_lines

GUEST, GATEWAY, OTHER = "10.0.0.2", "10.0.0.1", "192.0.2.9"
IPV4, ARP, IPV6, VLAN = b"\x08\x00", b"\x08\x06", b"\x86\xdd", b"\x81\x00"
TCP, UDP, ICMP = 6, 17, 1
SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10
LAST = bytes(12) + ARP + b"last"  # passes always


def framed(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def ipv4(
    source: str, target: str, protocol: int = ICMP, data: bytes = bytes(20), words: int = 5
) -> bytes:
    head = bytes([0x40 | words, 0]) + (words * 4 + len(data)).to_bytes(2, "big") + bytes(4)
    head += bytes([64, protocol, 0, 0]) + socket.inet_aton(source) + socket.inet_aton(target)
    return bytes(12) + IPV4 + head + bytes(words * 4 - 20) + data


def tcp(flags: int) -> bytes:
    return bytes(13) + bytes([flags]) + bytes(6)


def udp(source: int, target: int) -> bytes:
    return source.to_bytes(2, "big") + target.to_bytes(2, "big") + bytes(8)


class Filter:
    """The filter, the guest's end and passt's."""

    def __init__(self, *addresses: str) -> None:
        self.guest, filter_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.passt, stream = socket.socketpair()
        fds = [filter_end.fileno(), stream.fileno()]
        self.title = f"frame-filter-of-{os.getpid()}-{fds}"  # a name that no other has
        words = [self.title, *map(str, fds), *addresses]
        subprocess.run(words, executable=FILTER, pass_fds=fds, check=True)
        filter_end.close()
        stream.close()
        for each in (self.guest, self.passt):
            each.settimeout(PATIENCE_S)
        self.stream = self.passt.makefile("rb")

    def close(self) -> None:
        for each in (self.guest, self.stream, self.passt):
            each.close()

    def frame(self) -> bytes:
        """The next one that passt gets."""
        return self.stream.read(int.from_bytes(self.stream.read(4), "big"))

    def passes(self, frame: bytes) -> bool:
        self.guest.send(frame)
        self.guest.send(LAST)
        got = self.frame()
        if got == LAST:
            return False
        assert (got, self.frame()) == (frame, LAST)
        return True


@pytest.fixture
def plain() -> Iterator[Filter]:
    value = Filter()
    yield value
    value.close()


@pytest.fixture
def guarded() -> Iterator[Filter]:
    """As where the guest has a UDP port, and passt maps the gateway to 127.0.0.1."""
    value = Filter("4", GUEST, GATEWAY)
    yield value
    value.close()


def test_frames_that_pass(plain: Filter) -> None:
    for frame in [
        ipv4(GUEST, OTHER),
        ipv4(GUEST, OTHER, TCP, tcp(SYN)),
        ipv4(GUEST, GATEWAY, UDP, udp(4000, 53)),
        ipv4("10.0.0.77", OTHER),
        ipv4(GUEST, "128.0.0.1"),
        ipv4(GUEST, "126.255.255.255", words=15),
        ipv4(GUEST, "223.255.255.255"),
        ipv4("0.0.0.0", "255.255.255.255", UDP, udp(68, 67)),
        bytes(12) + ARP + bytes(28),
        bytes(12) + ARP,
        ipv4(GUEST, OTHER, data=bytes(65_000)),
    ]:
        assert plain.passes(frame), frame


def test_frames_that_do_not_pass(plain: Filter) -> None:
    ipv6 = b"\x60" + bytes(7) + bytes(15) + b"\1" + bytes(15) + b"\1"
    for frame in [
        *(
            ipv4(source, target, protocol, data)
            for source in (GUEST, "127.0.0.1", "0.0.0.0")
            for target in ("127.0.0.1", "127.0.0.2", "127.255.255.255", "0.0.0.0", "0.1.2.3")
            for protocol, data in ((TCP, tcp(SYN)), (UDP, udp(1, 53)), (ICMP, bytes(8)))
        ),
        ipv4(GUEST, "127.0.0.1", words=6),
        *(
            ipv4(GUEST, target, UDP, udp(5353, port))
            for target in ("224.0.0.251", "239.255.255.250", "240.0.0.1", "255.255.255.254")
            for port in (5353, 67)
        ),
        ipv4(GUEST, "255.255.255.255", UDP, udp(67, 68)),
        ipv4(GUEST, "255.255.255.255", TCP, tcp(SYN)),
        ipv4(GUEST, "224.0.0.1"),
        ipv4("127.0.0.1", OTHER),
        ipv4("0.0.0.1", OTHER),
        bytes(12) + IPV6 + ipv6,
        bytes(12) + VLAN + b"\0\1" + ipv4(GUEST, "127.0.0.1")[12:],
        b"\0" * 13,
        bytes(12) + IPV4,
        ipv4(GUEST, OTHER)[:33],
        ipv4(GUEST, OTHER).replace(b"\x45", b"\x44", 1),  # a header of 16 bytes
        ipv4(GUEST, OTHER).replace(b"\x45", b"\x4f", 1),  # ... longer than the frame
        ipv4(GUEST, OTHER).replace(b"\x45", b"\x65", 1),
        LAST + bytes(65_553),
    ]:
        assert not plain.passes(frame), frame


def test_only_answers_reach_the_gateway_where_it_is_the_hosts_loopback(guarded: Filter) -> None:
    for frame in [
        ipv4(GUEST, GATEWAY, TCP, tcp(SYN)),
        ipv4(GUEST, GATEWAY, TCP, tcp(SYN), words=8),
        ipv4(GUEST, GATEWAY, TCP, b"short"),
        ipv4(GUEST, GATEWAY, UDP, udp(7, 53)),
        ipv4(GUEST, GATEWAY, UDP, b"\0\7"),
        ipv4(GUEST, GATEWAY, ICMP),
        ipv4("0.0.0.0", GATEWAY, UDP, udp(7, 53)),
        ipv4("10.0.0.77", OTHER),  # passt would send to it what is for the guest
        ipv4(GUEST, "127.0.0.1", UDP, udp(7, 4000)),
    ]:
        assert not guarded.passes(frame), frame
    for frame in [
        ipv4(GUEST, GATEWAY, TCP, tcp(SYN_ACK)),
        ipv4(GUEST, GATEWAY, TCP, tcp(ACK)),
        ipv4(GUEST, GATEWAY, UDP, udp(68, 67)),
        ipv4(GUEST, OTHER, TCP, tcp(SYN)),
        ipv4(GUEST, OTHER, UDP, udp(7, 4000)),
    ]:
        assert guarded.passes(frame), frame
    for question in [
        ipv4(OTHER, GUEST, UDP, udp(4001, 7)),
        ipv4(GATEWAY, GUEST, TCP, udp(4002, 7)),
        ipv4(GATEWAY, GUEST, UDP, udp(4000, 7)),
    ]:
        guarded.passt.send(framed(question))
        assert guarded.guest.recv(2000) == question
    assert [guarded.passes(ipv4(GUEST, GATEWAY, UDP, udp(7, port))) for port in range(3999, 4003)]
    assert guarded.passes(ipv4(GUEST, GATEWAY, UDP, udp(7, 4000)))
    for port in (3999, 4001, 4002):
        assert not guarded.passes(ipv4(GUEST, GATEWAY, UDP, udp(7, port)))


GUEST6, GATEWAY6, OTHER6 = "fd00::2", "fe80::1", "2001:db8::9"
LINK6, SERVERS6 = "fe80::77", "ff02::1:2"
ICMP6, FRAGMENT, ROUTING, HOP_BY_HOP, TARGET = 58, 44, 43, 0, 60
ECHO, SOLICITATION, NEIGHBOUR = 128, 133, 135


@pytest.fixture
def with_ipv6() -> Iterator[Filter]:
    value = Filter("6", GUEST6, GATEWAY6)
    yield value
    value.close()


def ipv6(source: str, target: str, protocol: int, data: bytes) -> bytes:
    head = b"\x60\0\0\0" + len(data).to_bytes(2, "big") + bytes([protocol, 64])
    both = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return bytes(12) + IPV6 + head + both + data


def tcp6(flags: int) -> bytes:
    return tcp(flags)[:20].ljust(20, b"\0")


def icmp6(kind: int, size: int = 24) -> bytes:
    return bytes([kind]) + bytes(size - 1)


def test_ipv6_is_off_where_it_was_not_asked_for(plain: Filter, guarded: Filter) -> None:
    for each in (plain, guarded):
        assert not each.passes(ipv6(GUEST6, OTHER6, TCP, tcp6(SYN)))
        assert not each.passes(ipv6("::", "ff02::1", ICMP6, icmp6(NEIGHBOUR)))


def test_ipv6_frames_that_pass(with_ipv6: Filter) -> None:
    for frame in [
        *(
            ipv6(source, target, protocol, data)
            for source in (GUEST6, "fd00::abcd:1", LINK6)
            for target in (OTHER6, "64:ff9b::808:808", "fd00::1", "fec0::1", "1::")
            for protocol, data in (
                (TCP, tcp6(SYN)),
                (UDP, udp(1, 53)),
                (ICMP6, icmp6(ECHO, 8)),
            )
        ),
        *(
            ipv6(source, target, ICMP6, icmp6(kind))
            for source in ("::", GUEST6, LINK6)
            for target in ("ff02::2", "ff02::1:ff00:1", GATEWAY6)
            for kind in (SOLICITATION, 134, NEIGHBOUR, 136)
        ),
        ipv6(LINK6, SERVERS6, UDP, udp(546, 547)),
        ipv6(GUEST6, OTHER6, UDP, bytes(60_000)),
        ipv4(GUEST, OTHER),
    ]:
        assert with_ipv6.passes(frame), frame


def test_ipv6_frames_that_do_not_pass(with_ipv6: Filter) -> None:
    good = ipv6(GUEST6, OTHER6, TCP, tcp6(SYN))
    hosts_own = [
        "::1", "::", "::2", "::ffff:127.0.0.1", "::ffff:192.0.2.1", "::127.0.0.1",
        "::ffff:0:127.0.0.1", "0:0:1::", GATEWAY6, "fe80::2", "febf::1", "ff02::fb", "ff0e::1",
        "ff02::1", SERVERS6,
    ]  # fmt: skip
    for frame in [
        *(
            ipv6(source, target, protocol, data)
            for source in (GUEST6, LINK6)
            for target in hosts_own
            for protocol, data in (
                (TCP, tcp6(SYN)),
                (UDP, udp(547, 53)),
                (ICMP6, icmp6(ECHO)),
            )
        ),
        *(
            ipv6(source, OTHER6, TCP, tcp6(SYN))
            for source in (
                "::",
                "::1",
                "fd00:0:0:1::2",
                "2001:db8::1",
                "::ffff:10.0.0.2",
                "ff02::1",
            )
        ),
        ipv6("::1", "ff02::1", ICMP6, icmp6(NEIGHBOUR)),
        ipv6("::", OTHER6, ICMP6, icmp6(ECHO)),
        ipv6(LINK6, "ff02::1:3", UDP, udp(546, 547)),
        ipv6(LINK6, GATEWAY6, UDP, udp(546, 547)),
        *(ipv6(GUEST6, OTHER6, ICMP6, icmp6(kind)) for kind in (1, 2, 3, 4, 129, 130, 137, 143)),
        ipv6(GUEST6, "ff02::1", ICMP6, icmp6(NEIGHBOUR, 23)),
        *(
            ipv6(GUEST6, target, extension, bytes([protocol, *bytes(7)]) + tcp6(SYN))
            for target in (OTHER6, "::1")
            for extension in (HOP_BY_HOP, ROUTING, FRAGMENT, TARGET, 51, 135)
            for protocol in (TCP, UDP, ICMP6)
        ),
        *(
            ipv6(GUEST6, OTHER6, protocol, bytes(40))
            for protocol in (1, 4, 41, 47, 50, 59, 132, 255)
        ),
        ipv6(GUEST6, OTHER6, TCP, tcp6(SYN)[:19]),
        ipv6(GUEST6, OTHER6, UDP, bytes(7)),
        ipv6(GUEST6, OTHER6, ICMP6, icmp6(ECHO, 7)),
        good + b"more than its length",
        good[:-1],
        good[:53],
        good[:14],
        good.replace(b"\x60", b"\x40", 1),
        bytes(12) + IPV6 + ipv4(GUEST, "127.0.0.1")[14:],
        bytes(12) + VLAN + b"\0\1" + good[12:],
    ]:
        assert not with_ipv6.passes(frame), frame


def test_answers_reach_the_clients_on_the_hosts_ipv6_loopback(with_ipv6: Filter) -> None:
    for flags in (SYN_ACK, ACK, 0x04):
        assert with_ipv6.passes(ipv6(LINK6, GATEWAY6, TCP, tcp6(flags)))
    answer = ipv6(LINK6, GATEWAY6, UDP, udp(7, 40_000))
    assert not with_ipv6.passes(answer)
    asked4 = ipv4(GATEWAY, GUEST, UDP, udp(40_000, 7))
    with_ipv6.passt.sendall(framed(asked4))
    assert with_ipv6.guest.recv(1000) == asked4
    assert not with_ipv6.passes(answer), "that was a client of IPv4"
    asked = ipv6(GATEWAY6, LINK6, UDP, udp(40_000, 7))
    with_ipv6.passt.sendall(framed(ipv6(OTHER6, GUEST6, UDP, udp(40_001, 7)), asked))
    assert with_ipv6.guest.recv(1000)
    assert with_ipv6.guest.recv(1000) == asked
    assert with_ipv6.passes(answer)
    assert not with_ipv6.passes(ipv6(LINK6, GATEWAY6, UDP, udp(7, 40_001)))
    assert not with_ipv6.passes(ipv6(LINK6, "fe80::2", UDP, udp(7, 40_000)))


def test_the_ipv6_loopback_where_the_host_is_to_be_reached() -> None:
    value = Filter("6host", GUEST6, GATEWAY6)
    try:
        assert value.passes(ipv6(GUEST6, GATEWAY6, TCP, tcp6(SYN)))
        assert value.passes(ipv6(GUEST6, GATEWAY6, UDP, udp(7, 53)))
        for target in ("::1", "fe80::2", "::ffff:127.0.0.1"):
            assert not value.passes(ipv6(GUEST6, target, TCP, tcp6(SYN)))
    finally:
        value.close()


def test_frames_of_passt_in_pieces(plain: Filter) -> None:
    frames = [bytes([number]) * (14 + 97 * number) for number in range(1, 40)]
    data = framed(*frames, b"", b"short", LAST)
    for at in range(0, len(data), 701):
        plain.passt.sendall(data[at : at + 701])
    assert [plain.guest.recv(1 << 17) for _ in range(40)] == [*frames, LAST]


@pytest.mark.parametrize("size", [60, 1500, 60_000])
def test_a_slow_side_gets_all_in_order(plain: Filter, size: int) -> None:
    """Until its socket is full; the guest's device then drops frames itself."""
    frames = [bytes(12) + ARP + number.to_bytes(4, "big") * (size // 4) for number in range(2000)]
    plain.guest.setblocking(False)
    sent = []
    try:
        for frame in frames:
            plain.guest.send(frame)
            sent.append(frame)
    except BlockingIOError:
        pass
    assert [plain.frame() for _ in sent] == sent

    plain.guest.settimeout(PATIENCE_S)
    plain.passt.setblocking(False)
    data, done = framed(*frames), 0
    try:
        while done < len(data):
            done += plain.passt.send(data[done:])
    except BlockingIOError:
        pass
    whole = done // (4 + len(frames[0]))
    assert [plain.guest.recv(1 << 17) for _ in range(whole)] == frames[:whole]


def test_what_was_sent_is_delivered_before_the_end(plain: Filter) -> None:
    for _ in range(20):
        plain.guest.send(LAST)
    plain.guest.shutdown(socket.SHUT_WR)
    assert [plain.frame() for _ in range(20)] == [LAST] * 20
    assert plain.stream.read(1) == b""
    plain.guest.setblocking(False)
    with pytest.raises(BlockingIOError):
        plain.guest.recv(1)  # which ends when passt has
    plain.guest.settimeout(PATIENCE_S)
    plain.stream.close()
    plain.passt.close()
    assert plain.guest.recv(1) == b""


def test_the_frames_before_the_end_of_passt(plain: Filter) -> None:
    plain.passt.send(framed(LAST, LAST) + b"\0\0")
    plain.stream.close()
    plain.passt.close()
    assert [plain.guest.recv(2000) for _ in range(3)] == [LAST, LAST, b""]


def test_a_stream_that_has_no_lengths_ends_it(plain: Filter) -> None:
    plain.passt.send(b"HTTP/1.1 200 OK\r\n")
    assert plain.stream.read(1) == b""


def test_it_holds_two_sockets_and_is_nobody(plain: Filter) -> None:
    (pid,) = (pid for pid, line in command_lines() if line.startswith(plain.title))
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert status["Seccomp"] == "2"
    assert set(status["Uid"].split()) == {str(os.getuid() or 65534)}
    if os.getuid() == 0:  # it is not dumpable
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert [link.partition(":")[0] for link in links] == ["socket", "socket"]
