"""A client of the Container Runtime Interface, as far as the test calls it.

Messages are lists of (field number, value), since there is no crictl here and no compiler for its
protocol. Sources: kubernetes/cri-api, pkg/apis/runtime/v1/api.proto; the encoding of protocol
buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

Message = Sequence[tuple[int, Any]]  # an integer, a text, or a Message
Fields = dict[int, list[Any]]  # an integer or bytes


def encode(message: Message) -> bytes:
    data = b""
    for number, value in message:
        if isinstance(value, int):
            data += varint(number << 3) + varint(value)
        else:
            body = value.encode() if isinstance(value, str) else encode(value)
            data += varint(number << 3 | 2) + varint(len(body)) + body
    return data


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(data) + bytes([value])


def decode(data: bytes) -> Fields:
    fields: Fields = {}
    octets = iter(data)
    for octet in octets:
        key = read_varint(octets, octet)
        value: Any = read_varint(octets, next(octets))
        if key & 7 == 2:
            value = bytes(next(octets) for _ in range(value))
        fields.setdefault(key >> 3, []).append(value)
    return fields


def read_varint(octets: Iterator[int], octet: int) -> int:
    value = octet & 0x7F
    shift = 0
    while octet & 0x80:
        octet = next(octets)
        shift += 7
        value |= (octet & 0x7F) << shift
    return value


class Runtime:
    """containerd's RuntimeService."""

    def __init__(self, socket: Path) -> None:
        grpc = pytest.importorskip("grpc", reason="./check --engines installs grpcio")
        self._channel = grpc.insecure_channel(f"unix://{socket}")

    def __call__(self, method: str, *fields: tuple[int, Any]) -> Fields:
        call = self._channel.unary_unary(f"/runtime.v1.RuntimeService/{method}", encode, decode)
        answer: Fields = call(fields, timeout=100, wait_for_ready=True)
        return answer

    def close(self) -> None:
        self._channel.close()
