"""A snapshot as a file: fixed-size records, and behind them the guest's memory.

Pages that the guest has not touched are holes. The headers of its image are kept, because they say
what the guest may write and execute. The file is not trusted, as no image is.
"""

from __future__ import annotations

import fcntl
import os
import struct

from tender.boot import layout
from tender.config import VirtualTime
from tender.cpu import features
from tender.dataclass import dataclass
from tender.errors import ImageError, SnapshotError, UsageError
from tender.image import elf
from tender.image.manifest import MAX_DEVICES, Attached

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TypeAlias

    from tender.image.elf import Image

    Pieces: TypeAlias = tuple[tuple[int, bytes], ...]  # of a file: offset, bytes

MAGIC, VERSION = b"PTENDSNP", 2
# The header, field by field. `mark`: whether the guest was restored. Sizes are in bytes; `records`
# is that of all that comes before the memory.
_FIELDS = {
    "magic": "8s", "version": "I", "mark": "I", "flags": "I", "devices": "I", "pieces": "I",
    "state": "I", "records": "Q", "mem_bytes": "Q", "counter": "Q", "hz": "Q", "poll_gpa": "Q",
    "poll_ns": "Q", "start_ns": "Q", "tick_ns": "Q", "now_ns": "Q", "wall_ns": "Q", "random": "Q",
    "features": f"{features.SIZE}s",
}  # fmt: skip
_HEADER = struct.Struct("<" + "".join(_FIELDS.values()))
_MARK = 12  # its offset
_DEVICE = struct.Struct("<QQ6sHI")  # a struct Attached
_PIECE = struct.Struct("<QQ")
ALIGNMENT = 1 << 16  # of the memory in the file: the largest page of any machine
RECORDS_MAX = 1 << 20  # bytes before the memory
PIECES_MAX = 1024
HZ_MIN, HZ_MAX = 10**6, 10**12
U64 = (1 << 64) - 1

_EXEC_HEAP, _IN_POLL, _VIRTUAL = 1, 2, 4  # flags


@dataclass
class PendingPoll:
    """A POLL that was not answered: its argument's GPA, and what was left of its timeout."""

    gpa: int
    left_ns: int


@dataclass
class VirtualNow:
    """A guest's virtual time: how it began, and where it is."""

    time: VirtualTime
    now_ns: int
    random: int  # what RDRAND goes on from


@dataclass
class Snapshot:
    """A saved guest, but for its memory. Raises SnapshotError where a field is out of bounds.

    Attributes:
        mem_bytes: The size of its memory.
        pieces: The headers of its image, as elf.parse reads them.
        state: Its registers, as cpu/saved.py encodes them.
        counter: Its counter (TSC, CNTVCT_EL0) when it was saved, with `hz`.
        wall_ns: When it was saved, in nanoseconds since the epoch.
        attached: What it was told of its devices, by handle.
        exec_heap: Whether it may execute its heap.
        poll: The POLL that it waits in, if it does.
        virtual: Its virtual time; None: it has the host's.
        features: What it was shown of the CPU and may use, by the names of cpu/features.py.
    """

    mem_bytes: int
    pieces: Pieces
    state: bytes
    counter: int
    hz: int
    wall_ns: int
    attached: Mapping[int, Attached]
    exec_heap: bool = False
    poll: PendingPoll | None = None
    virtual: VirtualNow | None = None
    features: frozenset[str] = frozenset()

    def image(self) -> Image:
        """The headers of its image; raises SnapshotError."""
        by_offset = dict(self.pieces)
        try:
            image = elf.parse(lambda offset, size: by_offset.get(offset, b"")[:size])
        except ImageError as error:
            raise _damaged(f"its image: {error}") from None
        handles = {device.handle for device in image.manifest.devices}
        if handles != set(self.attached):
            raise _damaged("its devices are not those of its image")
        return image


def _damaged(what: str) -> SnapshotError:
    return SnapshotError(f"the snapshot is damaged: {what}")


def memory_offset(records: int) -> int:
    """Where memory begins behind records of so many bytes."""
    return -(-records // ALIGNMENT) * ALIGNMENT


def size_max(mem_bytes: int) -> int:
    """The maximum length of a snapshot of a guest with this memory, in bytes."""
    return RECORDS_MAX + mem_bytes


def encode(snapshot: Snapshot) -> bytes:
    """All of the file that comes before the guest's memory, but for what fills it up."""
    poll, virtual = snapshot.poll, snapshot.virtual
    flags = _EXEC_HEAP * snapshot.exec_heap
    flags |= _IN_POLL * (poll is not None) | _VIRTUAL * (virtual is not None)
    devices = b"".join(
        _DEVICE.pack(each.capacity, each.block_size, each.mac, each.mtu, handle)
        for handle, each in sorted(snapshot.attached.items())
    )
    pieces = b"".join(_PIECE.pack(offset, len(data)) + data for offset, data in snapshot.pieces)
    rest = devices + snapshot.state + pieces
    header = {
        "magic": MAGIC,
        "version": VERSION,
        "mark": 0,
        "flags": flags,
        "devices": len(snapshot.attached),
        "pieces": len(snapshot.pieces),
        "state": len(snapshot.state),
        "records": _HEADER.size + len(rest),
        "mem_bytes": snapshot.mem_bytes,
        "counter": snapshot.counter,
        "hz": snapshot.hz,
        "poll_gpa": poll.gpa if poll else 0,
        "poll_ns": poll.left_ns if poll else 0,
        "start_ns": virtual.time.start_ns if virtual else 0,
        "tick_ns": virtual.time.tick_ns if virtual else 0,
        "now_ns": virtual.now_ns if virtual else 0,
        "wall_ns": snapshot.wall_ns,
        "random": virtual.random if virtual else 0,
        "features": features.encode(snapshot.features),
    }
    return _HEADER.pack(*(header[name] for name in _FIELDS)) + rest


def read(fd: int) -> tuple[Snapshot, int, bool]:
    """The snapshot in a file: it, where its memory begins there, and whether it was restored.

    Raises SnapshotError for a file that is none.
    """
    try:
        header = os.pread(fd, _HEADER.size, 0)
        if header[: len(MAGIC)] != MAGIC:
            raise SnapshotError("it is not a snapshot of ptender's")
        if len(header) < _HEADER.size:
            raise _damaged("it is truncated")
        fields = dict(zip(_FIELDS, _HEADER.unpack(header), strict=True))
        _check(fields)
        length = os.fstat(fd).st_size
        rest = os.pread(fd, fields["records"] - _HEADER.size, _HEADER.size)
    except OSError as error:
        raise SnapshotError(f"cannot read the snapshot: {os.strerror(error.errno or 0)}") from None
    snapshot = _decode(fields, _Records(rest))
    offset = memory_offset(fields["records"])
    if length < offset + snapshot.mem_bytes:
        raise _damaged("it is truncated")
    return snapshot, offset, bool(fields["mark"])


def _check(fields: dict[str, Any]) -> None:
    """Raise SnapshotError for a number that is out of bounds."""
    if fields["version"] != VERSION:
        raise SnapshotError(
            f"the snapshot is of version {fields['version']}, and this tender reads {VERSION}"
        )
    if not _HEADER.size <= fields["records"] <= RECORDS_MAX:
        raise _damaged("the size of its records")
    if fields["devices"] > MAX_DEVICES or fields["pieces"] > PIECES_MAX:
        raise _damaged("the number of its records")
    mem_bytes = fields["mem_bytes"]
    if mem_bytes % layout.MEM_STEP or not layout.MEM_MIN <= mem_bytes <= layout.MEM_MAX:
        raise _damaged("the size of its memory")
    if not HZ_MIN <= fields["hz"] <= HZ_MAX:
        raise _damaged("the frequency of its counter")
    if fields["flags"] & ~(_EXEC_HEAP | _IN_POLL | _VIRTUAL):
        raise _damaged("its flags")


def _decode(fields: dict[str, Any], records: _Records) -> Snapshot:
    flags, virtual = fields["flags"], None
    if flags & _VIRTUAL:
        try:
            time = VirtualTime(fields["start_ns"], fields["tick_ns"])
        except UsageError:
            raise _damaged("its clock") from None
        virtual = VirtualNow(time, fields["now_ns"], fields["random"])
    attached = {}
    for _ in range(fields["devices"]):
        *values, handle = records.take(_DEVICE)
        if handle in attached:
            raise _damaged("its devices")
        attached[handle] = Attached(*values)
    state = records.bytes(fields["state"])
    pieces = []
    for _ in range(fields["pieces"]):
        offset, size = records.take(_PIECE)
        pieces.append((offset, records.bytes(size)))
    if records.left:
        raise _damaged("the size of its records")
    return Snapshot(
        mem_bytes=fields["mem_bytes"],
        pieces=tuple(pieces),
        state=state,
        counter=fields["counter"],
        hz=fields["hz"],
        wall_ns=fields["wall_ns"],
        attached=attached,
        exec_heap=bool(flags & _EXEC_HEAP),
        poll=PendingPoll(fields["poll_gpa"], fields["poll_ns"]) if flags & _IN_POLL else None,
        virtual=virtual,
        features=features.decode(fields["features"]),
    )


class _Records:
    """What is left of the records to read; each read is within them, or a SnapshotError."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def bytes(self, size: int) -> bytes:
        if size > self.left:
            raise _damaged("it is truncated")
        self._at += size
        return self._data[self._at - size : self._at]

    def take(self, record: struct.Struct) -> tuple[Any, ...]:
        return record.unpack(self.bytes(record.size))


def mark(fd: int) -> bool:
    """Write into the file that its guest was restored; whether somebody had written so before.

    Of several that do so at once, one is the first. Raises OSError where it can't be written to.
    """
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        before = os.pread(fd, 4, _MARK)
        os.pwrite(fd, b"\1\0\0\0", _MARK)
        return before != bytes(4)
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
