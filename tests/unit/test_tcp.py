"""TCP between hosts of a switch: data arrives once and in order, also over a bad network."""

from __future__ import annotations

import pytest

from tender.errors import UsageError
from tender.testing.net import packets
from tender.testing.net.host import Host
from tender.testing.net.packets import Packet, Segment
from tender.testing.net.switch import Switch
from tender.testing.net.tcp import Connection


@pytest.fixture
def hosts(switch: Switch) -> tuple[Host, Host]:
    return switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24")


def pair(hosts: tuple[Host, Host]) -> tuple[Connection, Connection]:
    """The two ends of a connection."""
    client, server = hosts
    with server.listen(80) as listener:
        return client.tcp("10.0.0.2", 80), listener.accept()


def test_an_exchange(hosts: tuple[Host, Host]) -> None:
    near, far = pair(hosts)
    assert (far.address, far.port) == ("10.0.0.1", near.own_port)
    with far:
        near.send(b"one\r\ntwo\r\nthree")
        assert far.read_until(b"\r\n") == b"one\r\n"
        assert far.read(3) == b"two"
        assert far.received == b"\r\nthree"
        far.send(bytes(5000) + b"end")
        assert near.read(5000) == bytes(5000)
        assert not near.closed
    assert near.read(timeout=60) == b"end"
    assert near.closed
    near.send(b" and four")  # the other direction goes on
    near.close()
    assert far.read() == b"\r\nthree and four"


def test_a_bad_network_changes_nothing(switch: Switch, hosts: tuple[Host, Host]) -> None:
    hosts[0].arp("10.0.0.2")
    for host in hosts:
        host.port.drop(every=4)
        host.port.duplicate(every=3)
        host.port.corrupt(every=5)
    near, far = pair(hosts)
    text = b"".join(b"line %d\n" % number for number in range(1000))
    near.send(text)
    near.close()
    assert far.read() == text
    far.close()
    assert near.read() == b""


def test_a_server_that_sends_first_over_a_lossy_link(hosts: tuple[Host, Host]) -> None:
    client, server = hosts
    client.port.drop(every=3, direction="from")  # ARP, SYN, and then the ACK
    with server.listen(25) as listener:
        near = client.tcp("10.0.0.2", 25)
        with listener.accept() as far:
            far.send(b"220 hello")
        assert near.read() == b"220 hello"


def test_a_connection_that_ends_too_early(hosts: tuple[Host, Host]) -> None:
    near, far = pair(hosts)
    near.send(b"half a li")
    near.close()
    with pytest.raises(EOFError, match=r"it ended before b'\\n' came; unread: b'half a li'"):
        far.read_until(b"\n")
    with pytest.raises(EOFError, match="ended before 10 bytes came"):
        far.read(10)
    assert far.read(9) == b"half a li"
    with pytest.raises(UsageError, match="it is closed for sending"):
        near.send(b"more")


def test_a_peer_that_does_not_answer(hosts: tuple[Host, Host]) -> None:
    near, far = pair(hosts)
    with pytest.raises(TimeoutError, match=r"10\.0\.0\.1:.* did not answer within 0\.1 s"):
        far.read(1, timeout=0.1)
    with pytest.raises(TimeoutError, match=r"10\.0\.0\.2:81 did not answer within 0\.1 s"):
        hosts[0].tcp("10.0.0.2", 81, timeout=0.1)
    with hosts[1].listen(82) as listener, pytest.raises(TimeoutError, match="to TCP port 82 of"):
        listener.accept(timeout=0.1)
    segment = Segment(80, near.own_port, 0, 0, packets.RST, 0)
    payload = packets.build_tcp("10.0.0.2", "10.0.0.1", segment)
    packet = packets.build_ipv4(Packet("10.0.0.2", "10.0.0.1", packets.TCP, payload))
    hosts[1].send(
        packets.build_frame(packets.Frame(hosts[0].mac, hosts[1].mac, packets.IPV4, packet))
    )
    with pytest.raises(ConnectionResetError, match="refused or reset"):
        near.read()
    assert near.closed


def test_the_same_ports_once_more(hosts: tuple[Host, Host]) -> None:
    client, server = hosts
    with server.listen(80) as listener:
        for word in (b"first", b"second"):
            client._ephemeral = 4000
            near = client.tcp("10.0.0.2", 80)
            assert near.own_port == 4001
            near.send(word)
            near.close()
            with listener.accept() as far:
                assert far.read() == word
            assert near.read() == b""
    with server.listen(80), pytest.raises(UsageError, match="listens on TCP port 80 already"):
        server.listen(80)


def test_impossible_arguments(hosts: tuple[Host, Host]) -> None:
    host = hosts[0]
    for port in (0, 65536):
        with pytest.raises(UsageError, match=f"port={port} is not a port number from 1 to 65535"):
            host.listen(port)
    with pytest.raises(UsageError, match="port='80' is not a port number from 1 to 65535"):
        host.tcp("10.0.0.2", "80")  # type: ignore[arg-type]
    near, _ = pair(hosts)
    with pytest.raises(UsageError, match="data='text' is not bytes, as b'hello'"):
        near.send("text")  # type: ignore[arg-type]
