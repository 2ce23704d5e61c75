"""The capture of a switch, which becomes a pcapng file for Wireshark and tcpdump."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tender.observe import pcapng

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OVERHEAD = 200  # bytes of memory of a record, besides its frame
INBOUND, OUTBOUND = pcapng.INBOUND, pcapng.OUTBOUND  # sent by the port's owner, sent to it


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
    packets = (
        pcapng.packet(each.port, each.time_ns, each.direction, each.frame, each.note)
        for each in records
    )
    return b"".join([pcapng.section(comment), *map(pcapng.interface, ports), *packets])
