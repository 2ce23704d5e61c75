"""The DHCP server of a host, with the messages of scapy as its client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tender.errors import UsageError
from tender.testing.net import dhcp
from tender.testing.net.dhcp import DhcpServer
from tender.testing.net.host import Host
from tender.testing.net.packets import mac_text
from tender.testing.net.switch import Switch

EVERYONE = "ff:ff:ff:ff:ff:ff"
MACS = [bytes([2, 0, 0, 0, 9, number]) for number in range(4)]


@pytest.fixture
def switch() -> Iterator[Switch]:
    with Switch(virtual=True, patience=60) as value:
        yield value


@pytest.fixture
def server(switch: Switch) -> DhcpServer:
    return switch.host("10.0.0.1/24").dhcp("10.0.0.1", "10.0.0.3", router="10.0.0.254", lease=60)


class Client:
    """A raw client on the switch, of many MACs."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._l2: Any = pytest.importorskip("scapy.layers.l2", reason="scapy is not installed")
        self._inet: Any = pytest.importorskip("scapy.layers.inet")
        self._dhcp: Any = pytest.importorskip("scapy.layers.dhcp")

    def send(self, kind: str, mac: bytes, *options: tuple[str, Any], **fields: Any) -> None:
        bootp = self._dhcp.BOOTP(**{"chaddr": mac, "xid": 7, "flags": 0x8000, **fields})
        body = self._dhcp.DHCP(options=[("message-type", kind), *options, "end"])
        ports = self._inet.UDP(sport=68, dport=67)
        ip = self._inet.IP(src="0.0.0.0", dst="255.255.255.255")
        self._host.send(self._l2.Ether(dst=EVERYONE) / ip / ports / bootp / body)

    def ask(self, kind: str, mac: bytes, *options: tuple[str, Any], **fields: Any) -> Any:
        """The answer's fields, and its options as a dict."""
        self.send(kind, mac, *options, **fields)
        answer = self._host.expect(self._dhcp.DHCP, timeout=1)
        found = answer[self._dhcp.DHCP].options
        return answer, {each[0]: each[1] for each in found if isinstance(each, tuple)}


@pytest.fixture
def client(switch: Switch) -> Client:
    return Client(switch.host("10.0.0.99/24"))


def test_a_lease(client: Client, server: DhcpServer) -> None:
    offer, options = client.ask("discover", MACS[0])
    assert offer.yiaddr == "10.0.0.2"  # 10.0.0.1 is the server's own
    assert (options["message-type"], options["server_id"], options["lease_time"]) == (
        2,
        "10.0.0.1",
        60,
    )
    assert (options["subnet_mask"], options["router"]) == ("255.255.255.0", "10.0.0.254")
    assert server.leases == {}
    words = ("server_id", "10.0.0.1"), ("requested_addr", "10.0.0.2")
    answer, options = client.ask("request", MACS[0], *words)
    assert (options["message-type"], answer.yiaddr, answer.xid) == (5, "10.0.0.2", 7)
    assert server.wait_for(MACS[0]) == "10.0.0.2"
    assert server.leases == {mac_text(MACS[0]): "10.0.0.2"}
    answer, options = client.ask("request", MACS[0], ciaddr="10.0.0.2")  # it renews
    assert options["message-type"] == 5
    answer, options = client.ask("inform", MACS[1], ciaddr="10.0.0.50")
    assert (options["message-type"], answer.yiaddr) == (5, "0.0.0.0")
    assert "lease_time" not in options


def test_what_it_refuses_and_what_it_gets_back(client: Client, server: DhcpServer) -> None:
    assert client.ask("discover", MACS[0], ("requested_addr", "10.0.0.3"))[0].yiaddr == "10.0.0.3"
    assert client.ask("discover", MACS[1], ("requested_addr", "10.0.0.3"))[0].yiaddr == "10.0.0.2"
    with pytest.raises(TimeoutError):
        client.ask("discover", MACS[2])  # none is left
    _, options = client.ask("request", MACS[1], ("requested_addr", "10.0.0.3"))
    assert options["message-type"] == 6
    with pytest.raises(TimeoutError):
        client.ask("request", MACS[1], ("server_id", "10.0.0.8"), ("requested_addr", "10.0.0.2"))
    assert server.leases == {}
    client.ask("request", MACS[1], ("requested_addr", "10.0.0.2"))
    client.send("release", MACS[1], ("server_id", "10.0.0.1"), ciaddr="10.0.0.2")
    assert client.ask("discover", MACS[2])[0].yiaddr == "10.0.0.2"
    assert server.leases == {}
    with pytest.raises(TimeoutError, match="02:00:00:00:09:01 has no address from DHCP"):
        server.wait_for(MACS[1], timeout=0.1)


def test_impossible_servers(switch: Switch) -> None:
    host: Any = switch.host("10.0.0.1/24")
    for words, options, message in (
        (("10.0.0.9", "10.0.0.8"), {}, "10.0.0.9 to 10.0.0.8 are not 1 to 65536 addresses"),
        (("10.0.1.2", "10.0.1.3"), {}, "10.0.1.2 is not in 10.0.0.0/24"),
        (("10.0.0.2", 7), {}, "last=7 is not an IPv4 address"),
        (("10.0.0.2", "10.0.0.3"), {"router": "fd00::1"}, "router='fd00::1' is not an IPv4"),
        (("10.0.0.2", "10.0.0.3"), {"lease": 0}, "lease=0 is not a number of seconds, as 3600"),
    ):
        with pytest.raises(UsageError, match=f"^{message}"):
            host.dhcp(*words, **options)
    host.dhcp("10.0.0.2", "10.0.0.3")
    with pytest.raises(UsageError, match=r"^<DHCP server 10.0.0.1: 0 .*> has UDP port 67 already$"):
        host.udp(67)
    with pytest.raises(UsageError, match="DHCP is for IPv4, and the host has the address fd00::1"):
        switch.host("fd00::1/64").dhcp("10.0.0.2", "10.0.0.3")


@given(st.binary(max_size=60))
def test_no_message_is_an_error(options: bytes) -> None:
    head = bytes([1, 1, 6]) + bytes(233) + bytes.fromhex("63825363")
    assert len(head) == 240
    for data in (options, head + options, head + b"\x35\1\1" + options):
        message = dhcp.parse(data)
        assert message is None or data.startswith(head)
    dhcp.parse(head[: len(options)])
