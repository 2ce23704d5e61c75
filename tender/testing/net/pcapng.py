"""The capture of a switch, and its form as a pcapng file, for Wireshark and tcpdump.

Little-endian, nanoseconds, one interface per port. Source:
draft-ietf-opsawg-pcapng (section header, interface description, enhanced packet, interface
statistics blocks).
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SECTION, INTERFACE, PACKET = 0x0A0D0D0A, 1, 6
_BYTE_ORDER_MAGIC = 0x1A2B3C4D
_ETHERNET = 1  # LINKTYPE_ETHERNET
_END, _COMMENT = 0, 1
_SHB_USERAPPL = 4
_IF_NAME, _IF_TSRESOL = 2, 9
_EPB_FLAGS = 2
OVERHEAD = 200  # bytes of memory of a record, besides its frame
INBOUND, OUTBOUND = 1, 2  # sent by the port's owner, sent to it


@dataclass(frozen=True)
class Record:
    """One frame on one port: `time_ns` since the epoch, and a `note` on what a fault did to it."""

    time_ns: int
    port: int
    direction: int
    frame: bytes
    note: str = ""


class Capture:
    """The last frames of a switch, in about `limit` bytes of memory; the oldest are dropped."""

    def __init__(self, limit: int) -> None:
        self.records: deque[Record] = deque()
        self.dropped = 0
        self._limit = limit
        self._size = 0

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._size += len(record.frame) + OVERHEAD
        while self._size > self._limit and len(self.records) > 1:
            self._size -= len(self.records.popleft().frame) + OVERHEAD
            self.dropped += 1


def build(ports: Sequence[str], records: Iterable[Record], comment: str = "") -> bytes:
    """A pcapng file. `ports` are the names of the interfaces, `comment` is the file's."""
    blocks = [_section(comment), *map(_interface, ports), *map(_packet, records)]
    return b"".join(blocks)


def _block(kind: int, body: bytes) -> bytes:
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _options(*options: tuple[int, bytes]) -> bytes:
    given = [(code, value) for code, value in options if value]
    if not given:
        return b""
    parts = [struct.pack("<HH", code, len(value)) + _padded(value) for code, value in given]
    return b"".join(parts) + struct.pack("<HH", _END, 0)


def _section(comment: str) -> bytes:
    head = struct.pack("<IHHq", _BYTE_ORDER_MAGIC, 1, 0, -1)
    options = _options((_COMMENT, comment.encode()), (_SHB_USERAPPL, b"ptender"))
    return _block(SECTION, head + options)


def _interface(name: str) -> bytes:
    head = struct.pack("<HHI", _ETHERNET, 0, 0)
    return _block(INTERFACE, head + _options((_IF_NAME, name.encode()), (_IF_TSRESOL, b"\x09")))


def _packet(record: Record) -> bytes:
    high, low = record.time_ns >> 32, record.time_ns & 0xFFFFFFFF
    size = len(record.frame)
    head = struct.pack("<IIIII", record.port, high & 0xFFFFFFFF, low, size, size)
    options = _options(
        (_COMMENT, record.note.encode()), (_EPB_FLAGS, struct.pack("<I", record.direction))
    )
    return _block(PACKET, head + _padded(record.frame) + options)
