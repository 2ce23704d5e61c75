"""Packet files, read by tcpdump, and by a reader that was written from the standard."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tender.testing.net import pcapng
from tender.testing.net.pcapng import INBOUND, OUTBOUND, Capture, Record

FRAME = bytes.fromhex("ffffffffffff0200000000010806") + bytes.fromhex(
    "00010800060400010200000000010a0000010000000000000a000002"
)
TIME_NS = 1_767_225_600_123_456_789


def read(data: bytes) -> list[tuple[int, bytes, dict[int, bytes]]]:
    """The blocks: kind, body before the options, options."""
    fixed = {0x0A0D0D0A: 16, 1: 8}
    blocks = []
    while data:
        kind, length = struct.unpack_from("<II", data)
        assert length % 4 == 0
        assert data[length - 4 : length] == data[4:8]
        body, data = data[8 : length - 4], data[length:]
        size = (
            20 + (struct.unpack_from("<I", body, 12)[0] + 3) // 4 * 4 if kind == 6 else fixed[kind]
        )
        rest, options = body[size:], {}
        while rest:
            code, count = struct.unpack_from("<HH", rest)
            options[code] = rest[4 : 4 + count]
            rest = rest[4 + (count + 3) // 4 * 4 :]
        blocks.append((kind, body[:size], options))
    return blocks


def example() -> bytes:
    records = [
        Record(TIME_NS, 0, INBOUND, FRAME),
        Record(TIME_NS + 1, 1, OUTBOUND, FRAME + b"x", "dropped by drop(every=3)"),
    ]
    return pcapng.build(["port0", "host1"], records, "2 older frames are not in here")


def test_the_blocks_are_those_of_the_standard() -> None:
    section, *interfaces, first, second = read(example())
    assert (section[0], section[2][1]) == (0x0A0D0D0A, b"2 older frames are not in here")
    assert section[1][:8] == bytes.fromhex("4d3c2b1a01000000")
    assert [(kind, options[2], options[9]) for kind, _, options in interfaces] == [
        (1, b"port0", b"\x09"),
        (1, b"host1", b"\x09"),
    ]
    port, high, low, captured, original = struct.unpack_from("<IIIII", first[1])
    assert (port, high << 32 | low, captured, original) == (0, TIME_NS, len(FRAME), len(FRAME))
    assert first[1][20 : 20 + len(FRAME)] == FRAME
    assert first[2] == {2: struct.pack("<I", 1), 0: b""}
    assert second[2] == {1: b"dropped by drop(every=3)", 2: struct.pack("<I", 2), 0: b""}


def test_tcpdump_reads_it(tmp_path: Path) -> None:
    if shutil.which("tcpdump") is None:
        pytest.skip("tcpdump is not installed")
    path = tmp_path / "x.pcapng"
    path.write_bytes(example())
    words = ["tcpdump", "-nn", "-tt", "--nano", "-r", str(path)]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    lines = output.splitlines()
    assert lines[0].startswith("1767225600.123456789 ARP, Request who-has 10.0.0.2 tell 10.0.0.1")
    assert len(lines) == 2


def test_the_oldest_frames_go_first() -> None:
    capture = Capture(limit=2 * (100 + pcapng.OVERHEAD))
    for number in range(10):
        capture.add(Record(number, 0, INBOUND, bytes(100)))
    assert [record.time_ns for record in capture.records] == [8, 9]
    assert capture.dropped == 8
    capture.add(Record(11, 0, INBOUND, bytes(1000)))  # larger than the limit: kept alone
    assert [record.time_ns for record in capture.records] == [11]
