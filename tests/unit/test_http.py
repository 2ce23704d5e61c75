"""HTTP of a host, against a server of Python's on another host; waiting for a port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tender.errors import UsageError
from tender.testing.net.host import Host
from tender.testing.net.switch import Switch


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with Switch(patience=60) as switch:
        yield switch.host("10.0.0.1/24"), switch.host("10.0.0.2/24")


@contextmanager
def answering(server: Host, answer: bytes) -> Iterator[list[bytes]]:
    """A web server of one request, which the list has then."""
    requests: list[bytes] = []

    def serve() -> None:
        with listener.accept() as connection:
            head = connection.read_until(b"\r\n\r\n")
            _, _, length = head.partition(b"Content-Length: ")
            requests.append(head + connection.read(int(length.split()[0] if length else 0)))
            connection.send(answer)

    with server.listen(80) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield requests
        thread.join()


def test_a_request_and_its_answer(hosts: tuple[Host, Host]) -> None:
    client, server = hosts
    answer = (
        b"HTTP/1.1 201 Created\r\nX-Number: 7\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    )
    with answering(server, answer) as requests:
        headers = {"Content-Type": "application/json"}
        response = client.http("PUT", "10.0.0.2", "/a?b=1", b'{"c": 2}', headers)
    assert (response.status, response.headers["x-number"]) == (201, "7")
    assert response.body == b"hello world"
    assert requests[0].startswith(b"PUT /a?b=1 HTTP/1.1\r\nHost: 10.0.0.2\r\n")
    assert b"\r\nContent-Type: application/json\r\n" in requests[0]
    assert requests[0].endswith(b'\r\n\r\n{"c": 2}')

    with answering(server, b"HTTP/1.0 200 OK\r\n\r\nup to the end") as requests:
        assert client.http_post("10.0.0.2", "/", bytes(3000)) == (200, b"up to the end")
    assert requests[0].endswith(b"\r\n\r\n" + bytes(3000))

    with answering(server, b"HTTP/1.1 204 No Content\r\n\r\n") as requests:
        assert client.http_get("10.0.0.2", headers={"Accept": "text/html"}) == (204, b"")
    assert b"Accept: text/html" in requests[0]


def test_what_is_not_http(hosts: tuple[Host, Host]) -> None:
    client, server = hosts
    with (
        answering(server, b"SSH-2.0-x\r\n"),
        pytest.raises(ValueError, match=r"^10\.0\.0\.2:80 does not speak HTTP: Bad.* SSH-2\.0-x$"),
    ):
        client.http_get("10.0.0.2")
    with (
        answering(server, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"),
        pytest.raises(ValueError, match=r"IncompleteRead"),
    ):
        client.http_get("10.0.0.2")


def test_what_is_no_request(hosts: tuple[Host, Host]) -> None:
    client, server = hosts
    with pytest.raises(UsageError, match="body='text' is not bytes, as b'hello'"):
        client.http_post("10.0.0.2", "/", "text")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"headers=\[\] is not a dict"):
        client.http_post("10.0.0.2", "/", b"", [])  # type: ignore[arg-type]
    with server.listen(80):
        for path, headers in (("/a b", {}), ("/", {"X": "a\r\nb"})):
            with pytest.raises(UsageError, match="no HTTP request: "):
                client.http_get("10.0.0.2", path, headers=headers)


@pytest.mark.parametrize("virtual", [False, True])
def test_waiting_for_a_port(virtual: bool) -> None:
    with Switch(virtual=virtual, patience=60) as switch:
        client = switch.host("10.0.0.1/24")
        with pytest.raises(TimeoutError, match=r"^nobody answered: who has 10\.0\.0\.2.*0\.3 s\)$"):
            client.wait_for_port("10.0.0.2", 80, timeout=0.3)
        server = switch.host("10.0.0.2/24")
        with pytest.raises(TimeoutError, match=r"^10\.0\.0\.2:80 did not answer .*\(for 0\.3 s\)$"):
            client.wait_for_port("10.0.0.2", 80, timeout=0.3)
        at_ns = switch.timeline.now_ns() + 500_000_000
        switch.timeline.call_at(at_ns, lambda: server.listen(80))
        client.wait_for_port("10.0.0.2", 80)
        assert switch.timeline.now_ns() >= at_ns
