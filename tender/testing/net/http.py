"""HTTP of a host, as a client: the standard library's, over a connection on the switch."""

from __future__ import annotations

import io
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, InvalidURL

from tender.errors import InvalidValue, UsageError
from tender.testing.net.packets import endpoint
from tender.testing.net.stack import as_data

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from email.message import Message
    from typing import Any

    from tender.testing.net.tcp import Connection


@dataclass(frozen=True)
class Response:
    """The answer of a web server; the names of `headers` are found in upper and lower case."""

    status: int
    headers: Message
    body: bytes


def check(path: object, body: object, headers: object) -> None:
    """Raise UsageError for what is no request."""
    if not isinstance(path, str):
        raise InvalidValue("path", path, "a string, as '/'")
    if body is not None:
        as_data("body", body)
    if headers is not None and not isinstance(headers, dict):
        raise InvalidValue("headers", headers, "a dict, as {'Accept': 'text/html'}")


def request(
    connection: Connection,
    method: str,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
) -> Response:
    """Send a request and read its answer. Raises ValueError for an answer that is not HTTP."""
    server = endpoint(connection.address, connection.port)
    client = HTTPConnection(connection.address, connection.port)
    client.sock = _Socket(connection)
    try:
        client.request(method, path, body, {"Connection": "close", **headers})
    except (InvalidURL, ValueError) as error:
        raise UsageError(f"no HTTP request: {error}") from None
    try:
        answer: HTTPResponse = client.getresponse()
        return Response(answer.status, answer.headers, answer.read())
    except HTTPException as error:
        why = f"{type(error).__name__} {error}".strip()
        raise ValueError(f"{server} does not speak HTTP: {why}") from None


class _Socket:
    """As much of a socket as http.client uses."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def sendall(self, data: bytes) -> None:
        self._connection.send(data)

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._connection))

    def close(self) -> None:
        """The connection is closed by who has opened it."""


class _Reader(io.RawIOBase):
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._connection.read_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)
