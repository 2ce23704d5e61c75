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
# Version, mark, flags, numbers of devices and pieces, bytes of the state and of all records; then
# memory, counter and its frequency; POLL; virtual time; wall time; random; features of the CPU.
_HEADER = struct.Struct(f"<8s2I4IQ3Q2Q3QQQ{features.SIZE}s")
_MARK = 12  # where the header says whether the guest was restored: a u32
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
    time = virtual.time if virtual else VirtualTime()
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        0,
        *(flags, len(snapshot.attached), len(snapshot.pieces), len(snapshot.state)),
        *(_HEADER.size + len(rest), snapshot.mem_bytes, snapshot.counter, snapshot.hz),
        *(poll.gpa if poll else 0, poll.left_ns if poll else 0),
        *(time.start_ns, time.tick_ns),
        *(virtual.now_ns if virtual else 0, snapshot.wall_ns),
        virtual.random if virtual else 0,
        features.encode(snapshot.features),
    )
    return header + rest


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
        fields = _HEADER.unpack(header)
        records_size = _records_size(fields)
        length = os.fstat(fd).st_size
        rest = os.pread(fd, records_size - _HEADER.size, _HEADER.size)
    except OSError as error:
        raise SnapshotError(f"cannot read the snapshot: {os.strerror(error.errno or 0)}") from None
    snapshot = _decode(fields, rest)
    offset = memory_offset(records_size)
    if length < offset + snapshot.mem_bytes:
        raise _damaged("it is truncated")
    return snapshot, offset, bool(fields[2])


def _records_size(fields: tuple[Any, ...]) -> int:
    version, (devices, pieces), size = fields[1], fields[4:6], fields[7]
    if version != VERSION:
        raise SnapshotError(
            f"the snapshot is of version {version}, and this tender reads {VERSION}"
        )
    if not _HEADER.size <= size <= RECORDS_MAX:
        raise _damaged("the size of its records")
    if devices > MAX_DEVICES or pieces > PIECES_MAX:
        raise _damaged("the number of its records")
    return int(size)


def _decode(fields: tuple[Any, ...], rest: bytes) -> Snapshot:
    flags, devices, pieces, state_size = fields[3:7]
    records = _Records(rest)
    attached = {}
    for _ in range(devices):
        *values, handle = records.take(_DEVICE)
        if handle in attached:
            raise _damaged("its devices")
        attached[handle] = Attached(*values)
    state = records.bytes(state_size)
    kept = []
    for _ in range(pieces):
        offset, size = records.take(_PIECE)
        kept.append((offset, records.bytes(size)))
    if records.left:
        raise _damaged("the size of its records")
    mem_bytes, counter, hz = fields[8:11]
    poll_gpa, poll_ns, start_ns, tick_ns, now_ns, wall_ns, random, shown = fields[11:]
    if mem_bytes % layout.MEM_STEP or not layout.MEM_MIN <= mem_bytes <= layout.MEM_MAX:
        raise _damaged("the size of its memory")
    if not HZ_MIN <= hz <= HZ_MAX:
        raise _damaged("the frequency of its counter")
    if flags & ~(_EXEC_HEAP | _IN_POLL | _VIRTUAL):
        raise _damaged("its flags")
    virtual = None
    if flags & _VIRTUAL:
        try:
            virtual = VirtualNow(VirtualTime(start_ns, tick_ns), now_ns, random)
        except UsageError:
            raise _damaged("its clock") from None
    return Snapshot(
        mem_bytes,
        tuple(kept),
        state,
        counter,
        hz,
        wall_ns,
        attached,
        exec_heap=bool(flags & _EXEC_HEAP),
        poll=PendingPoll(poll_gpa, poll_ns) if flags & _IN_POLL else None,
        virtual=virtual,
        features=features.decode(shown),
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
