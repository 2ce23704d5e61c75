"""The file of a snapshot: what comes back, and what a hostile one can do, which is nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tender.config import VirtualTime
from tender.dataclass import replace
from tender.errors import SnapshotError
from tender.image.manifest import Attached
from tender.snapshot import file
from tender.snapshot.file import PendingPoll, Snapshot, VirtualNow

MIB = 1 << 20
DISK, PORT = 1, 2
PLAIN = Snapshot(
    mem_bytes=4 * MIB,
    pieces=((0, b"header"), (64, b"table"), (1 << 40, b"")),
    state=b"registers" * 100,
    counter=(1 << 64) - 5,
    hz=2_000_000_000,
    wall_ns=1_800_000_000 * 10**9,
    attached={
        DISK: Attached(capacity=1 << 40, block_size=4096),
        PORT: Attached(mac=b"\2\0\0\0\0\1", mtu=9000),
    },
)
FULL = replace(
    PLAIN,
    exec_heap=True,
    poll=PendingPoll(0x200000, (1 << 64) - 1),
    virtual=VirtualNow(VirtualTime(start_ns=5, tick_ns=7), 1234, (1 << 64) - 3),
    features=frozenset({"avx2", "sha_ni"}),
)
anything = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Written:
    """A file with these records and room for the memory."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def read(self, records: bytes, length: int | None = None) -> tuple[Snapshot, int, bool]:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, records, 0)
        whole = file.memory_offset(len(records)) + PLAIN.mem_bytes
        os.ftruncate(self.fd, whole if length is None else length)
        return file.read(self.fd)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path / "snapshot")


@pytest.mark.parametrize("snapshot", [PLAIN, FULL], ids=["plain", "full"])
def test_what_is_written_is_what_is_read(written: Written, snapshot: Snapshot) -> None:
    records = file.encode(snapshot)
    read, offset, restored = written.read(records)
    assert read == snapshot
    assert not restored
    assert offset % file.ALIGNMENT == 0
    assert offset >= len(records)
    assert offset + snapshot.mem_bytes <= file.size_max(snapshot.mem_bytes)


def test_the_mark_is_set_once(written: Written) -> None:
    records = file.encode(FULL)
    written.read(records)
    assert not file.mark(written.fd)
    assert file.mark(written.fd)
    read, _, restored = file.read(written.fd)
    assert (read, restored) == (FULL, True)


def test_a_file_that_ends_too_early_is_refused(written: Written) -> None:
    records = file.encode(FULL)
    for length in range(len(records)):
        with pytest.raises(SnapshotError):
            written.read(records, length)
    whole = file.memory_offset(len(records)) + FULL.mem_bytes
    with pytest.raises(SnapshotError, match="truncated"):
        written.read(records, whole - 1)


def test_other_files_are_no_snapshots(written: Written) -> None:
    for data in (b"", b"\x7fELF", bytes(1 << 16), os.urandom(1 << 16)):
        with pytest.raises(SnapshotError, match="not a snapshot"):
            written.read(data)
    with pytest.raises(SnapshotError, match="version 3"):
        written.read(b"PTENDSNP\3" + file.encode(PLAIN)[9:])


@anything
@given(st.data())
def test_no_flipped_bytes_do_more_than_be_refused(written: Written, data: st.DataObject) -> None:
    records = bytearray(file.encode(FULL))
    for _ in range(data.draw(st.integers(1, 4))):
        records[data.draw(st.integers(0, len(records) - 1))] = data.draw(st.integers(0, 255))
    try:
        read, offset, _ = written.read(bytes(records))
    except SnapshotError as error:
        assert "\n" not in str(error)
        return
    assert offset + read.mem_bytes <= os.fstat(written.fd).st_size
    assert len(file.encode(read)) == len(records)
    try:
        read.image()
    except SnapshotError as error:
        assert "\n" not in str(error)


@anything
@given(st.binary(max_size=600), st.integers(0, 120))
def test_no_header_makes_it_read_what_is_not_there(
    written: Written, noise: bytes, start: int
) -> None:
    """Every number of the header may be anything: none is taken for a length before a check."""
    records = bytearray(file.encode(FULL))
    start += len(file.MAGIC) + 4
    records[start : start + len(noise)] = noise
    try:
        written.read(bytes(records))
    except SnapshotError as error:
        assert "\n" not in str(error)
