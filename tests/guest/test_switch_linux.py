"""Hosts of a switch with Linux as their neighbour: IPv6, DHCP, DNS."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender import Guest
from tender.testing.net import icmp, packets
from tender.testing.net.icmp import Echo, Neighbour
from tender.testing.net.packets import Frame
from tender.testing.net.port import GuestPort
from tender.testing.net.switch import Switch
from tests.guest.conftest import Build, Namespace, open_namespace
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


def test_linux_is_a_neighbour_of_ipv6(linux: Namespace, switch: Switch) -> None:
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


def test_tcp_over_ipv6(linux: Namespace, switch: Switch, tmp_path: Path) -> None:
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


def test_a_guest_of_ipv6(linux: Namespace, switch: Switch, guest: Build, any_cpu: str) -> None:
    port = switch.port(mac="02:00:00:00:00:42")
    with Guest(guest("ping6"), mem_mib=8, net={"service": port}):
        host = switch.host("fd00::1/64")
        assert host.ping("fd00::2", count=3).received == 3
        assert host.ping("fe80::ff:fe00:42").received == 1
        assert "2 received" in linux.run("ping", "-6", "-c2", "-i0.2", "fd00::2").stdout
        udp = host.udp()
        for size in (0, 1, 1400):
            udp.send("fd00::2", 7, bytes(size))
            assert udp.receive().data == bytes(size)

        echo = icmp.build_echo(Echo(icmp.ECHO_REQUEST, 1, 1, b"data"), "fd00::1", "fd00::2")
        message = Neighbour(icmp.SOLICITATION, "fd00::2", host.mac)
        for packet in (echo, icmp.build_neighbour(message, "fd00::1", "fd00::2")):
            data = packets.build_ipv6(packet)
            frame = packets.build_frame(Frame(port.mac, host.mac, packets.IPV6, data))
            for length in range(packets.HEADER_SIZE, len(frame)):  # none of them is answered
                host.send(frame[:length])
        assert host.ping("fd00::2").received == 1
        answers = [line for line in switch.lines() if "fd00::2 > fd00::1 answer" in line]
        assert len(answers) == 2 * (3 + 1)  # each at two ports


def test_linux_gets_an_address_and_names(linux: Namespace, switch: Switch, tmp_path: Path) -> None:
    pytest.importorskip("dns", reason="dnspython is not installed")
    if shutil.which("busybox") is None:
        pytest.skip("busybox, the DHCP and DNS client, is not installed")
    host = switch.host("10.0.0.1/24")
    dhcp = host.dhcp("10.0.0.100", "10.0.0.101", router="10.0.0.254", dns="10.0.0.1", lease=600)
    dns = host.dns({"db.test": ["10.0.0.5", "fd00::5"], "www.test": "CNAME db.test."})
    script = tmp_path / "lease"
    script.write_text(
        "#!/bin/sh\n"
        '[ "$1" = bound ] || exit 0\n'
        "echo bound $ip $subnet $router $dns $lease $serverid\n"
        "ip addr add $ip/$mask dev $interface\n"
    )
    script.chmod(0o755)
    client = ["busybox", "udhcpc", "-i", "tap0", "-nq", "-s", script]
    bound = linux.run(*client).stdout
    assert "bound 10.0.0.100 255.255.255.0 10.0.0.254 10.0.0.1 600 10.0.0.1\n" in bound
    (mac,) = dhcp.leases
    assert dhcp.wait_for(mac) == "10.0.0.100"
    assert host.ping("10.0.0.100").received == 1
    linux.run(*client[:4], "-nq", "-s", "/bin/true", "-r", "10.0.0.101")  # has 100 already
    assert dhcp.leases == {mac: "10.0.0.100"}

    def look_up(*words: str) -> str:
        return linux.run("busybox", "nslookup", *words, "10.0.0.1", check=False).stdout

    assert "Address: 10.0.0.5\n" in look_up("db.test")
    assert "Address: fd00::5\n" in look_up("db.test")
    assert "canonical name = db.test\n" in look_up("-type=a", "www.test")
    assert "NXDOMAIN" in look_up("none.test")
    assert {"A db.test", "AAAA db.test", "A www.test", "A none.test"} <= set(dns.queries)
