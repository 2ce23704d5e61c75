"""The DNS server of a host, with dnspython as its client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tender.errors import UsageError
from tender.testing.net.host import Host
from tender.testing.net.packets import Datagram
from tender.testing.net.switch import Switch

message: Any = pytest.importorskip("dns.message", reason="dnspython is not installed")

NAMES = {
    "db.test": ["10.0.0.5", "fd00::5", "MX 10 mail.test."],
    "www.test": "CNAME db.test.",
    "loop.test": "CNAME loop.test.",
    "many.test": [f"10.0.1.{number}" for number in range(100)],
}


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with Switch(virtual=True, patience=60) as switch:
        yield switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24")


def ask(client: Host, query: Any) -> Any:
    port = client.udp()
    port.send("10.0.0.2", 53, query.to_wire())
    answer = message.from_wire(port.receive(timeout=1).data)
    assert query.is_response(answer)
    return answer


def test_answers(hosts: tuple[Host, Host]) -> None:
    client, host = hosts
    server = host.dns(NAMES)

    def look_up(name: str, kind: str) -> tuple[str, list[str]]:
        answer = ask(client, message.make_query(name, kind))
        return answer.rcode().name, [each.to_text() for rrset in answer.answer for each in rrset]

    assert look_up("db.test", "A") == ("NOERROR", ["10.0.0.5"])
    assert look_up("DB.test", "AAAA") == ("NOERROR", ["fd00::5"])
    assert look_up("db.test", "MX") == ("NOERROR", ["10 mail.test."])
    assert look_up("db.test", "TXT") == ("NOERROR", [])
    assert look_up("www.test", "A") == ("NOERROR", ["db.test.", "10.0.0.5"])
    assert look_up("www.test", "CNAME") == ("NOERROR", ["db.test."])
    assert look_up("loop.test", "A")[0] == "NOERROR"
    assert look_up("none.test", "A") == ("NXDOMAIN", [])
    server.set("none.test", "10.0.0.7")
    server.set("db.test")
    assert look_up("none.test", "A") == ("NOERROR", ["10.0.0.7"])
    assert look_up("www.test", "A") == ("NXDOMAIN", ["db.test."])
    assert look_up("10.0.0.2", "A")[0] == "NXDOMAIN"
    assert server.queries[0] == "A db.test"
    assert server.queries[3] == "TXT db.test"


def test_what_is_too_long_and_what_it_does_not_do(hosts: tuple[Host, Host]) -> None:
    client, host = hosts
    host.dns(NAMES)
    flags: Any = pytest.importorskip("dns.flags")
    assert ask(client, message.make_query("many.test", "A")).flags & flags.TC
    query = message.make_query("many.test", "A", use_edns=0, payload=60000)
    assert ask(client, query).flags & flags.TC
    assert ask(client, message.make_query("db.test", "A", "CH")).rcode().name == "NOTIMP"
    port = client.udp()
    answer = message.make_response(message.make_query("db.test", "A"))
    port.send("10.0.0.2", 53, answer.to_wire())  # two servers would never stop
    with pytest.raises(TimeoutError):
        port.receive(timeout=1)


def test_impossible_names(hosts: tuple[Host, Host]) -> None:
    host: Any = hosts[1]
    for names, text in (
        ({"a.test": "nonsense"}, "value='nonsense' is not an address, or a type and its value"),
        ({"a.test": "A fd00::1"}, "value='A fd00::1' is not an address"),
        ({"a.test": [7]}, "value=7 is not an address"),
        ({"a..test": "10.0.0.1"}, r"name='a\.\.test' is not a name of DNS, as example.com"),
        ({7: "10.0.0.1"}, "name=7 is not a name of DNS"),
        ({"a.test": 7}, "value=7 is not an address"),
        (["a.test"], r"names=\['a\.test'\] is not a dict"),
    ):
        with pytest.raises(UsageError, match=f"^{text}"):
            host.dns(names)
    host.dns({})
    with pytest.raises(UsageError, match="^<DNS server 10.0.0.2: 0 names> has UDP port 53 already"):
        host.dns({})


def test_without_dnspython(hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tender.testing.net.nameserver", raising=False)
    monkeypatch.setitem(sys.modules, "dns", None)
    with pytest.raises(UsageError, match=r"^host.dns needs dnspython: pip install 'ptender\[test"):
        hosts[0].dns(NAMES)


@given(st.binary(max_size=60))
def test_no_message_is_an_error(data: bytes) -> None:
    with Switch(virtual=True) as switch:
        host = switch.host("10.0.0.2/24")
        server = host.dns(NAMES)
        for each in (data, b"\0\7\0\0\0\1\0\0\0\0\0\0" + data):
            server.put(host.mac, Datagram("10.0.0.1", 1000, "10.0.0.2", 53, each))
