"""IPv6 of a test's hosts, with Linux as the neighbour."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender.testing.net.port import GuestPort
from tender.testing.net.switch import Switch
from tests.guest.conftest import Namespace, open_namespace
from tests.waiting import wait_until

# Carries frames between a port of the switch and a tap.
CARRY = """
import fcntl, os, select, struct, sys
port = int(sys.argv[1])
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x1002))  # TUNSETIFF, TAP | NO_PI
print("ready", flush=True)
while True:
    for source in select.select([port, tap], [], [])[0]:
        frame = os.read(source, 1 << 16)
        if not frame:
            sys.exit()
        os.write(tap if source == port else port, frame)
"""

ECHO = """
import socket
server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
server.bind(("fd00::9", 7))
print("ready", flush=True)
server.sendto(*server.recvfrom(2000))
"""


@pytest.fixture
def linux() -> Iterator[Namespace]:
    yield from open_namespace()


@pytest.fixture
def switch(linux: Namespace) -> Iterator[Switch]:
    """A switch with Linux on it, as fd00::9."""
    linux.tap("tap0", "fd00::9/64 nodad")
    with Switch(patience=60) as switch:
        port: GuestPort = switch.port("linux")
        fd = port.attach().fd
        carrier = linux.start(sys.executable, "-c", CARRY, fd, pass_fds=[fd])
        os.close(fd)
        assert carrier.stdout
        assert carrier.stdout.readline() == "ready\n"
        yield switch
        switch.close()
        carrier.wait(60)
        carrier.stdout.close()


def test_linux_is_a_neighbour(linux: Namespace, switch: Switch) -> None:
    host = switch.host("fd00::1/64")
    wait_until(lambda: host.ping("fd00::9").received)
    assert host.ping("fd00::9", count=3).received == 3
    assert f" {host.arp('fd00::9')} " in linux.ip("link show dev tap0")
    assert "2 received" in linux.run("ping", "-6", "-c2", "-i0.2", "fd00::1").stdout
    local = host._interfaces[1].ip
    assert "1 received" in linux.run("ping", "-6", "-c1", f"{local}%tap0").stdout

    echo = linux.start(sys.executable, "-c", ECHO)
    assert echo.stdout
    assert echo.stdout.readline() == "ready\n"
    port = host.udp()
    port.send("fd00::9", 7, b"hello")
    assert port.receive().data == b"hello"
    echo.wait(60)
    echo.stdout.close()


def test_linux_speaks_tcp(linux: Namespace, switch: Switch, tmp_path: Path) -> None:
    host = switch.host("fd00::1/64")
    (tmp_path / "large").write_bytes(bytes(100_000))
    server = linux.start(sys.executable, "-um", "http.server", "-b", "fd00::9", "-d", tmp_path)
    try:
        host.wait_for_port("fd00::9", 8000)
        assert host.http_get("fd00::9", "/large", port=8000) == (200, bytes(100_000))
    finally:
        server.terminate()
        server.communicate()

    def answer() -> None:
        with listener.accept() as connection:
            connection.read_until(b"\r\n\r\n")
            connection.send(b"HTTP/1.0 200 OK\r\n\r\n" + bytes(100_000))

    with host.listen(80) as listener:
        thread = threading.Thread(target=answer)
        thread.start()
        assert linux.run("curl", "-sg", "http://[fd00::1]/").stdout == "\0" * 100_000
        thread.join()
