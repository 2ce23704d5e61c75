"""A bridge: real sockets of this machine to a host on the switch."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tender.errors import UsageError
from tender.testing.net.bridge import Bridge
from tender.testing.net.host import Host
from tender.testing.net.switch import Switch
from tender.testing.net.tcp import Connection, Listener


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with Switch(patience=60) as switch:
        yield switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24")


def connect(bridge: Bridge) -> socket.socket:
    return socket.create_connection(("127.0.0.1", bridge.port), timeout=60)


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def pair(bridge: Bridge, listener: Listener) -> tuple[socket.socket, Connection]:
    """A real socket, and the other end on the switch."""
    return connect(bridge), listener.accept()


def test_both_directions_each_up_to_its_end(hosts: tuple[Host, Host]) -> None:
    client, server = hosts
    question, answer = os.urandom(50_000), os.urandom(50_000)
    with server.listen(80) as listener, client.bridge("10.0.0.2", 80) as bridge:
        assert bridge.url == f"http://127.0.0.1:{bridge.port}"
        other, far_other = pair(bridge, listener)
        sock, far = pair(bridge, listener)
        assert far.address == "10.0.0.1"
        with sock, other:
            sock.sendall(question)
            sock.shutdown(socket.SHUT_WR)
            assert far.read() == question
            far.send(answer)
            far_other.send(b"another connection")
            far.close()
            assert read_all(sock) == answer
            assert other.recv(100) == b"another connection"


def test_a_reset_on_either_side_is_one_on_the_other(hosts: tuple[Host, Host]) -> None:
    client, server = hosts
    with server.listen(80) as listener, client.bridge("10.0.0.2", 80) as bridge:
        sock, far = pair(bridge, listener)
        with sock:
            far.reset()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        sock, far = pair(bridge, listener)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        with pytest.raises(ConnectionResetError):
            far.read()


def test_nothing_is_left_of_a_bridge(hosts: tuple[Host, Host]) -> None:
    client, server = hosts
    with server.listen(80) as listener, client.bridge("10.0.0.2", 80) as bridge:
        sock, far = pair(bridge, listener)
        with sock:
            far.send(b"hello")
            assert sock.recv(5) == b"hello"
            serving = [each for each in threading.enumerate() if "_serve" in each.name]
            assert len(serving) == 1
            bridge.close()
            assert not serving[0].is_alive()
            assert sock.recv(1) == b""
        with pytest.raises(ConnectionResetError):
            far.read()
        with pytest.raises(ConnectionRefusedError):
            connect(bridge)


def test_a_port_that_does_not_answer(capfd: pytest.CaptureFixture[str]) -> None:
    with Switch(patience=0.3) as switch:
        bridge = switch.host("10.0.0.1/24").bridge("10.0.0.2", 80)
        with connect(bridge) as sock, pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert str(bridge) == f"<bridge from 127.0.0.1:{bridge.port} to 10.0.0.2:80>"
        assert f"{bridge}: nobody answered: who has 10.0.0.2" in capfd.readouterr().err


def test_impossible_bridges(hosts: tuple[Host, Host]) -> None:
    client, _ = hosts
    taken = client.bridge("10.0.0.2", 80).port
    with pytest.raises(UsageError, match=f"127.0.0.1:{taken}: .* in use; local_port=0 takes"):
        client.bridge("10.0.0.2", 80, local_port=taken)
    for number in (0, "80"):
        with pytest.raises(UsageError, match=f"port={number!r} is not a port number"):
            client.bridge("10.0.0.2", number)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the host has no gateway"):
        client.bridge("192.168.0.1", 80)
    with Switch(virtual=True) as switch, pytest.raises(UsageError, match="in virtual time"):
        switch.host("10.0.0.1/24").bridge("10.0.0.2", 80)
