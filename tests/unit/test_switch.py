"""The switch, its hosts and its faults, without guests: a test holds the socket of a port."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tender.errors import DeviceError, UsageError
from tender.testing.net import packets
from tender.testing.net.faults import Chance, Fault, apply
from tender.testing.net.packets import Arp, Frame
from tender.testing.net.port import GuestPort
from tender.testing.net.switch import Switch
from tender.testing.net.virtual import GO, SYNC, Stuck
from tests.descriptors import open_descriptors


@pytest.fixture
def switch() -> Iterator[Switch]:
    with Switch(seed="test", patience=60) as value:
        yield value


@pytest.fixture
def virtual_switch() -> Iterator[Switch]:
    """A switch whose timeouts do not depend on the speed of this machine."""
    with Switch(virtual=True, seed="test") as value:
        yield value


def plug(port: GuestPort) -> socket.socket:
    """The guest's end of a port."""
    spec = port.attach()
    end = socket.socket(fileno=spec.fd)
    end.settimeout(60)
    return end


def frame(to: bytes, sender: bytes, data: bytes = b"data") -> bytes:
    return packets.build_frame(Frame(to, sender, 0x1234, data))


# ---- Switching ----


@pytest.mark.parametrize("length", [0, 1, 13, 1519, 60_000])
def test_what_is_no_frame_is_dropped_and_the_next_one_is_not(switch: Switch, length: int) -> None:
    """As a guest that has taken over its process can send it."""
    port, other = switch.port("a"), switch.port("b")
    a, b = plug(port), plug(other)
    good = frame(other.mac, port.mac)
    a.send(bytes(length))
    a.send(good)
    assert b.recv(2000) == good
    assert [line for line in switch.lines() if "dropped: no frame of an MTU of 1500" in line]
    assert port.is_attached


def test_an_unknown_address_is_flooded_and_a_known_one_is_not(switch: Switch) -> None:
    ports = [switch.port() for _ in range(3)]
    a, b, c = map(plug, ports)
    first = frame(ports[1].mac, ports[0].mac)
    a.send(first)
    assert b.recv(2000) == c.recv(2000) == first  # nobody has heard of b yet
    b.send(frame(ports[0].mac, ports[1].mac))
    assert a.recv(2000)[6:12] == ports[1].mac
    a.send(first)
    last = frame(packets.BROADCAST, ports[0].mac)
    a.send(last)
    assert [b.recv(2000), b.recv(2000)] == [first, last]
    assert c.recv(2000) == last
    for end in (a, b, c):
        end.close()


def test_a_guest_with_many_addresses_does_not_fill_the_memory(
    switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tender.testing.net.switch.MACS_MAX", 3)
    a, b = switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24")
    for number in range(10):
        a.send(frame(packets.BROADCAST, bytes((2, 9, 9, 9, 9, number))))
    assert len(switch._table) == 3
    assert a.ping("10.0.0.2").received == 1  # frames to addresses that were not learned are flooded
    assert b.arp("10.0.0.1") == packets.mac_text(a.mac)


def test_a_guest_that_has_moved_is_found_again(switch: Switch) -> None:
    host, port = switch.host("10.0.0.1/24"), switch.port()
    end = plug(port)
    end.send(frame(packets.BROADCAST, b"\x02abcde"))
    host.expect(b"data")
    end.close()
    port.detach()
    other = switch.port()
    end = plug(other)
    end.send(frame(packets.BROADCAST, b"\x02abcde"))
    host.expect(b"data")
    host.send(frame(b"\x02abcde", host.mac, b"for you"))
    assert b"for you" in end.recv(2000)
    end.close()


def test_a_port_has_one_guest_at_a_time(switch: Switch) -> None:
    port = switch.port("web")
    end = plug(port)
    with pytest.raises(DeviceError, match="web of the switch is attached to a guest already"):
        port.attach()
    port.detach()
    port.detach()
    plug(port).close()
    end.close()
    with pytest.raises(UsageError, match="has a port 'web' already"):
        switch.port("web")


def test_what_a_guest_sends_last_is_not_lost(switch: Switch) -> None:
    host, port = switch.host("10.0.0.1/24"), switch.port()
    end = plug(port)
    for number in range(50):
        end.send(frame(packets.BROADCAST, port.mac, b"number %d." % number))
    end.close()
    port.detach()
    host.expect(b"number 49.", timeout=0)


def test_a_guest_that_does_not_read_loses_frames_and_nobody_waits(switch: Switch) -> None:
    host, port = switch.host("10.0.0.1/24"), switch.port()
    end = plug(port)
    for _ in range(5000):
        host.send(frame(port.mac, host.mac, bytes(1000)))
    assert any("queue is full" in line for line in switch.lines())
    end.close()


def test_nothing_is_left_of_a_switch() -> None:
    with Switch() as first:
        plug(first.port()).close()  # the reactor stays
    before = open_descriptors()
    for _ in range(3):
        with Switch() as switch:
            ends = [plug(switch.port()) for _ in range(20)]
        for end in ends:
            end.close()
    with Switch(virtual=True) as switch:
        spec = switch.port().attach()
        os.close(spec.fd)
        os.close(spec.sync_fd or 0)
    assert open_descriptors() <= before


# ---- Hosts ----


def test_hosts_ping_each_other(switch: Switch) -> None:
    a, b = switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24", mac="02:00:00:00:00:99")
    result = a.ping("10.0.0.2", count=5)
    assert (result.sent, result.received, result.lost, len(result.rtts)) == (5, 5, 0, 5)
    assert all(rtt >= 0 for rtt in result.rtts)
    assert a.arp("10.0.0.2") == "02:00:00:00:00:99"
    assert b.arp("10.0.0.1") == packets.mac_text(a.mac)


def test_an_address_that_does_not_answer(virtual_switch: Switch) -> None:
    host = virtual_switch.host("10.0.0.1/24")
    assert host.ping("10.0.0.9", count=3, timeout=0.2).received == 0
    with pytest.raises(TimeoutError, match=r"who has 10\.0\.0\.9, tell 10\.0\.0\.1"):
        host.arp("10.0.0.9", timeout=0.1)
    with pytest.raises(UsageError, match=r"192\.168\.0\.1 is not in 10\.0\.0\.0/24"):
        host.ping("192.168.0.1")
    with pytest.raises(UsageError, match="not an IP address, as in 10"):
        host.ping("example")


def test_a_gateway_takes_what_goes_elsewhere(switch: Switch) -> None:
    host = switch.host("10.0.0.1/24", gateway="10.0.0.254")
    gateway = switch.host("10.0.0.254/24", mac="02:00:00:00:00:fe")
    host.udp_send("192.168.0.1", 7, b"far away")
    assert packets.parse_frame(gateway.expect(b"far away")).to == gateway.mac  # type: ignore[union-attr]


def test_udp(switch: Switch) -> None:
    a, b = switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24")
    there = b.udp(7)
    here = a.udp()
    here.send("10.0.0.2", 7, b"hello")
    datagram = there.receive()
    assert (datagram.data, datagram.sender, datagram.source) == (b"hello", "10.0.0.1", here.number)
    there.send(datagram.sender, datagram.source, b"and back")
    assert here.receive().data == b"and back"
    with pytest.raises(TimeoutError, match="no datagram came to UDP port 7"):
        there.receive(timeout=0.05)


def test_expect_takes_bytes_functions_and_says_what_came(switch: Switch) -> None:
    host, port = switch.host("10.0.0.1/24"), switch.port()
    end = plug(port)
    end.send(frame(packets.BROADCAST, port.mac, b"one"))
    end.send(frame(packets.BROADCAST, port.mac, b"two"))
    assert host.expect(lambda data: len(data) == 17, timeout=60).endswith(b"one")
    assert host.expect(b"two").endswith(b"two")
    end.send(frame(packets.BROADCAST, port.mac, b"three"))
    assert switch.timeline.wait(lambda: host._inbox, 60)
    with pytest.raises(TimeoutError, match=r"instead, 1 came.*\n.*type 0x1234"):
        host.expect(b"four", timeout=0)
    with pytest.raises(UsageError, match="what=4 is not bytes, a function"):
        host.expect(4)  # type: ignore[call-overload]
    end.close()


def test_packets_of_scapy(switch: Switch) -> None:
    ether: Any = pytest.importorskip("scapy.layers.l2", reason="scapy is not installed").Ether
    inet: Any = pytest.importorskip("scapy.layers.inet")
    a, b = switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24", mac="02:00:00:00:00:02")
    a.send(ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01")
           / inet.IP(src="10.0.0.1", dst="10.0.0.2") / inet.UDP(dport=7) / b"hi")  # fmt: skip
    assert b.expect(inet.UDP)[inet.UDP].dport == 7


def test_a_packet_of_scapys_has_the_mac_of_its_host(switch: Switch) -> None:
    ether: Any = pytest.importorskip("scapy.layers.l2", reason="scapy is not installed").Ether
    a, b = switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24")
    packet = ether(dst=packets.mac_text(b.mac), type=0x1234) / b"mine"
    a.send(packet)
    assert b.expect(b"mine")[6:12] == a.mac
    assert "src" not in packet.fields
    packet.src = "02:00:00:00:00:77"
    a.send(packet)
    assert b.expect(b"mine")[6:12] == bytes.fromhex("020000000077")


def test_an_address_that_no_host_can_have(switch: Switch) -> None:
    switch.host("10.0.0.1/24")
    with pytest.raises(UsageError, match=r"^the switch has a host 10\.0\.0\.1 already$"):
        switch.host("10.0.0.1/16")
    for text in ("10.0.0.2", "10.0.0.300/24", "10.0.0.2/33", "example/24", "fd00::1", "", 7):
        with pytest.raises(UsageError, match="^address=.* is not an .*, as in 10.0.0.1/24$"):
            switch.host(text)  # type: ignore[arg-type]
    for wrong in ({"mac": "1:2"}, {"mac": "03:00:00:00:00:01"}, {"gateway": "example"}):
        with pytest.raises(UsageError, match="^(mac|gateway)=.* is not a"):
            switch.host("10.0.0.2/24", **wrong)
    with pytest.raises(UsageError, match="^mac=b'12345' is not a unicast MAC"):
        switch.port(mac=b"12345")
    with pytest.raises(UsageError, match="^mtu=9 is not a whole number from 68 to 65535"):
        switch.port(mtu=9)
    assert len(switch.hosts) == len(switch.ports) == 1


def test_wrong_types_are_one_line(switch: Switch) -> None:
    a, _ = switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24")
    wrong: Any = a
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: wrong.udp_send("10.0.0.2", 7, "text"), "data='text' is not bytes, as b'hello'"),
        (lambda: wrong.udp_send("10.0.0.2", "7", b""), "port='7' is not a port number"),
        (lambda: wrong.http_get("10.0.0.2", port="80"), "port='80' is not a port number"),
        (lambda: wrong.http_get("10.0.0.2", b"/"), "path=b'/' is not a string, as '/'"),
        (lambda: wrong.send("text"), "packet='text' is not bytes, or a packet of scapy"),
        (lambda: wrong.send(7), "packet=7 is not bytes"),
    ]
    for call, message in calls:
        with pytest.raises(UsageError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="167772162 is not an IP address"):
        wrong.http_get(0x0A000002)


def test_repr(switch: Switch) -> None:
    assert repr(switch) == "<switch: no ports>"
    host, port = switch.host("10.0.0.1/24"), switch.port("wire")
    assert repr(switch) == "<switch: host0, wire>"
    assert repr(host) == "<host 10.0.0.1/24, 02:00:00:01:00:00>"
    assert repr(port) == "<wire of a switch, 02:00:00:00:00:01: no guest>"
    end = plug(port)
    assert repr(port).endswith(": a guest is attached>")
    end.close()


# ---- Faults ----


def test_every_third_is_dropped_on_one_way_only(virtual_switch: Switch) -> None:
    a, b = virtual_switch.host("10.0.0.1/24"), virtual_switch.host("10.0.0.2/24")
    assert a.ping("10.0.0.2").received == 1
    with b.port.drop(every=3) as fault:
        assert a.ping("10.0.0.2", count=9, timeout=0.1, interval=0.05).received == 6
        assert (fault.seen, fault.hits) == (9, 3)
    assert a.ping("10.0.0.2", count=3).received == 3
    assert sum("dropped by drop(every=3)" in line for line in virtual_switch.lines()) == 3


def test_both_directions_count_for_themselves(virtual_switch: Switch) -> None:
    a, b = virtual_switch.host("10.0.0.1/24"), virtual_switch.host("10.0.0.2/24")
    assert a.ping("10.0.0.2").received == 1
    b.port.drop(every=3, direction="both")
    assert a.ping("10.0.0.2", count=9, timeout=0.1, interval=0.05).received == 4


def test_a_cut_link_and_its_repair(switch: Switch) -> None:
    a, b = switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24")
    a.arp("10.0.0.2")
    b.port.cut()
    assert a.ping("10.0.0.2", timeout=0.1).received == 0
    b.port.restore()
    assert a.ping("10.0.0.2").received == 1
    assert any("the link is cut" in line for line in switch.lines())


def test_delays_duplicates_damage_and_reordering_reach_the_receiver(switch: Switch) -> None:
    host, port = switch.host("10.0.0.1/24"), switch.port()
    end = plug(port)

    def send(*names: bytes) -> None:
        for name in names:
            host.send(frame(port.mac, host.mac, name))

    def received(n: int) -> list[bytes]:
        return [end.recv(2000)[packets.HEADER_SIZE :] for _ in range(n)]

    with switch.delay(0.05):
        send(b"late")
        assert received(1) == [b"late"]
    with switch.duplicate(every=2):
        send(b"1", b"2", b"3")
        assert received(4) == [b"1", b"2", b"2", b"3"]
    with switch.reorder(every=2):
        send(b"1", b"2", b"3", b"4")
        assert received(4) == [b"1", b"3", b"2", b"4"]
    with switch.corrupt():
        send(b"aaaa")
        (broken,) = received(1)
        assert broken != b"aaaa"
        assert bin(int.from_bytes(broken, "big") ^ int.from_bytes(b"aaaa", "big")).count("1") == 1
    send(b"fine")
    assert received(1) == [b"fine"]  # and nothing came before it
    end.close()


def outcomes(seed: str, kind: str = "drop", **options: Any) -> list[list[tuple[bytes, int]]]:
    """What one fault makes of 200 frames."""
    fault = Fault(kind, Chance(None, 0.3), seed, lambda _: None, **options)
    many = []
    for number in range(200):
        deliveries, _ = apply([fault], "to port0", frame(bytes(6), bytes(6), b"%d" % number))
        many.append([(each.frame, each.delay_ns) for each in deliveries])
    return many


@pytest.mark.parametrize("kind", ["drop", "delay", "duplicate", "corrupt", "reorder"])
def test_chance_is_the_same_for_the_same_seed(kind: str) -> None:
    options = {"seconds": 0.1, "jitter": 0.05} if kind == "delay" else {}
    assert outcomes("a", kind, **options) == outcomes("a", kind, **options)
    assert outcomes("a", kind, **options) != outcomes("b", kind, **options)


def test_two_faults_do_not_have_the_same_chance(switch: Switch) -> None:
    assert switch.drop(probability=0.5).seed != switch.drop(probability=0.5).seed
    assert switch.drop(probability=0.5, seed=7).seed == switch.drop(probability=0.5, seed=7).seed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0 is not a whole number of frames from 1$"),
        ({"every": 0.1}, "every=0.1 is not .*; for a share of them: probability=0.1$"),
        ({"every": 2.5}, "every=2.5 is not a whole number of frames from 1$"),
        ({"probability": 2.0}, "probability=2.0 is not a number from 0 to 1"),
        ({"every": 2, "probability": 0.5}, "not both"),
        ({"direction": "up"}, "direction='up' is not to, from or both"),
    ],
)
def test_impossible_faults(switch: Switch, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        switch.drop(**options)


# ---- Further switches ----


@pytest.mark.parametrize("virtual", [False, True])
def test_another_switch_is_another_network_in_the_same_time(virtual: bool) -> None:
    with Switch(virtual=virtual, seed="s") as first:
        second = first.another()
        a, b = first.host("10.0.0.1/24"), second.host("10.0.0.2/24")
        assert a.ping("10.0.0.2", timeout=0.1).received == 0
        assert second.host("10.0.0.1/24").ping("10.0.0.2").received == 1
        assert second.virtual == virtual
        assert second.timeline is first.timeline
        assert a.mac != b.mac
        assert first.port().mac != second.port().mac
        assert first.drop(probability=0.5).seed != second.drop(probability=0.5).seed
        third = second.another()
        second.close()  # the others go on
        assert a.ping("10.0.0.1", timeout=0.1).received == 0
        assert first.host("10.0.0.3/24").ping("10.0.0.1").received == 1
        end = plug(first.port()) if not virtual else None
    if end is not None:
        assert end.recv(100) == b""  # all are closed with the first
        end.close()
    third.host("10.0.0.1/24").send(b"to nobody")
    assert not third.lines()


# ---- Packets ----


def test_the_packets_are_kept(switch: Switch, tmp_path: Path) -> None:
    a, _ = switch.host("10.0.0.1/24", name="a"), switch.host("10.0.0.2/24", name="b")
    a.ping("10.0.0.2")
    switch.save(tmp_path / "x.pcapng")
    assert (tmp_path / "x.pcapng").read_bytes() == switch.packets()
    text = "\n".join(switch.lines())
    assert "<- a: " in text
    assert "-> b: " in text
    assert "10.0.0.1 > 10.0.0.2 ping seq 1" in text


# ---- Virtual time, with a simulated guest ----


class Player:
    """The tender's side of a rendezvous, by hand."""

    def __init__(self, port: GuestPort) -> None:
        spec = port.attach()
        self.wire = socket.socket(fileno=spec.fd)
        self.sync = socket.socket(fileno=spec.sync_fd)
        self.sync.settimeout(0.2)

    def sleeps(self, now_ns: int, until_ns: int) -> None:
        self.sync.send(SYNC.pack(now_ns, until_ns))

    def woken(self) -> int:
        return int(GO.unpack(self.sync.recv(100))[0])

    def close(self) -> None:
        self.wire.close()
        self.sync.close()


@pytest.mark.parametrize(("virtual", "seconds"), [(True, 3600), (False, 0.01)])
def test_sleep_lets_time_pass(virtual: bool, seconds: float) -> None:
    with Switch(virtual=virtual) as switch:
        before = switch.now
        switch.sleep(seconds)
        assert switch.now - before >= seconds
        for wrong in (-1, float("inf"), float("nan")):
            with pytest.raises(UsageError, match=f"seconds={wrong} is not a number of seconds"):
                switch.sleep(wrong)


def test_time_goes_to_the_next_thing_that_happens() -> None:
    with Switch(virtual=True) as switch:
        player = Player(switch.port())
        player.sleeps(5, 1000)
        assert not switch.timeline.wait(lambda: False, 500e-9)
        assert switch.timeline.now_ns() == 500
        player.wire.send(frame(packets.BROADCAST, b"\x02abcde"))
        with pytest.raises(TimeoutError):
            player.woken()
        player.close()


def test_a_guest_is_woken_at_its_deadline_and_for_a_frame() -> None:
    with Switch(virtual=True, latency=1e-6, patience=0.3) as switch:
        host = switch.host("10.0.0.1/24")
        port = switch.port()
        player = Player(port)
        player.sleeps(0, 10_000)
        host.send(frame(port.mac, host.mac, b"for you"))
        with pytest.raises(Stuck, match="busy for too long"):
            switch.timeline.wait(lambda: False, 1)  # it was woken, and does not come back
        assert player.woken() == 1000
        assert b"for you" in player.wire.recv(2000)
        player.sleeps(1500, 3000)
        with pytest.raises(Stuck):
            switch.timeline.wait(lambda: False, 1)
        assert player.woken() == 3000
        player.close()
        assert not switch.timeline.wait(lambda: False, 1)
        assert switch.now == pytest.approx(1 + 3e-6, abs=1e-6)


def test_a_guest_that_polls_without_sleeping_is_an_error_after_a_while() -> None:
    def play(player: Player) -> None:
        now_ns = 0
        try:
            while True:
                player.sleeps(now_ns, now_ns + 1)
                now_ns = player.woken()
        except (OSError, struct.error):
            pass  # the switch is closed

    with Switch(virtual=True, patience=0.5) as switch:
        player = Player(switch.port("poller"))
        player.sync.settimeout(None)
        thread = threading.Thread(target=play, args=(player,))
        thread.start()
        with pytest.raises(Stuck, match="took 0.5 s of real time, .* polls .*poller") as raised:
            switch.timeline.wait(lambda: False, 0.01)
        assert "\n" not in str(raised.value)
    thread.join()
    player.close()


def test_a_guest_that_ends_leaves_the_others_alone() -> None:
    with Switch(virtual=True) as switch:
        host, port = switch.host("10.0.0.1/24"), switch.port()
        player = Player(port)
        announcement = Arp(packets.ARP_REQUEST, port.mac, "10.0.0.2", bytes(6), "10.0.0.2")
        player.wire.send(
            packets.build_frame(
                Frame(packets.BROADCAST, port.mac, packets.ARP, packets.build_arp(announcement))
            )
        )
        player.close()
        assert host.arp("10.0.0.2") == packets.mac_text(port.mac)  # its last frame was delivered
        assert host.ping("10.0.0.2", count=2).received == 0
        assert any("no guest is attached" in line for line in switch.lines())
        Player(port).close()  # another guest may have the port


def test_a_guest_that_sends_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tender.testing.net.port.INSTANT_FRAMES_MAX", 50)
    with Switch(virtual=True) as switch:
        player = Player(switch.port())
        for _ in range(51):
            player.wire.send(frame(packets.BROADCAST, b"\x02abcde"))
        with pytest.raises(Stuck, match="has sent more than 50 frames without"):
            switch.timeline.wait(lambda: False, 1)
        player.close()


def test_a_malformed_message_removes_the_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    with Switch(virtual=True) as switch:
        player = Player(switch.port())
        player.sync.send(b"short")
        assert not switch.timeline.wait(lambda: False, 1)
        assert not switch.timeline.participants  # type: ignore[attr-defined]
        player.close()


def test_messages_have_the_layout_that_the_tender_writes() -> None:
    from tender.modules import rendezvous

    assert SYNC.format == rendezvous._SYNC.format
    assert GO.size == rendezvous._GO.size == struct.calcsize("=Q")
