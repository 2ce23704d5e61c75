"""Packet files, read by tcpdump, and by a reader that was written from the standard."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender._native import ffi, lib
from tender.clock import VirtualClock
from tender.config import VirtualTime
from tender.observe.pcap import Pcap
from tender.testing.net import capture
from tender.testing.net.capture import INBOUND, OUTBOUND, Capture, Record

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
    return capture.build(["port0", "host1"], records, "2 older frames are not in here")


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
    kept = Capture(limit=2 * (100 + capture.OVERHEAD))
    for number in range(10):
        kept.add(Record(number, 0, INBOUND, bytes(100)))
    assert [record.time_ns for record in kept.records] == [8, 9]
    assert kept.dropped == 8
    kept.add(Record(11, 0, INBOUND, bytes(1000)))  # larger than the limit: kept alone
    assert [record.time_ns for record in kept.records] == [11]


# A file that is written while a guest runs.


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def opened(fd: int, warned: list[str]) -> Pcap:
    return Pcap(fd, "service", VirtualClock(VirtualTime(start_ns=TIME_NS)), warned.append)


def write(pcap: Pcap, frame: bytes = FRAME, flags: int = lib.PCAP_OUTBOUND) -> None:
    pcap.write(flags, memoryview(frame))


def test_a_packet_is_written_at_once(pipe: tuple[int, int]) -> None:
    pcap = opened(pipe[1], [])
    write(pcap)
    write(pcap, FRAME + b"x", lib.PCAP_INBOUND | lib.PCAP_DROPPED)
    first, second = read(os.read(pipe[0], 1 << 16))
    _, high, low, captured, original = struct.unpack_from("<5I", first[1])
    assert (high << 32 | low, captured, original) == (TIME_NS, len(FRAME), len(FRAME))
    assert first[1][20:] == FRAME + bytes(-len(FRAME) % 4)
    assert first[2] == {2: struct.pack("<I", 2), 0: b""}
    assert second[2] == {1: b"dropped", 2: struct.pack("<I", 1), 0: b""}


def test_a_full_fifo_loses_packets_and_says_how_many(pipe: tuple[int, int]) -> None:
    warned: list[str] = []
    pcap = opened(pipe[1], warned)
    frame = bytes(65000)  # more than PIPE_BUF: a part of it may fit
    for _ in range(10):
        write(pcap, frame)
    data = b""
    for _ in range(3):
        data += os.read(pipe[0], 1 << 20)
        write(pcap)
    data += os.read(pipe[0], 1 << 20)
    packets = read(data)
    lost = [int.from_bytes(options.get(4, b""), "little") for _, _, options in packets]
    assert len(packets) + sum(lost) == 13
    assert sum(lost) >= 8
    assert not warned


def test_the_end_of_its_reader_ends_it_with_one_line() -> None:
    warned: list[str] = []
    reader, writer = os.pipe()
    os.close(reader)
    pcap = opened(writer, warned)
    for _ in range(3):
        write(pcap)
    os.close(writer)
    assert warned == [
        "packets of network device 'service': they end here: write: Broken pipe; the guest goes on"
    ]


def test_a_long_frame_is_cut(pipe: tuple[int, int]) -> None:
    fd = os.memfd_create("packets")
    pcap = opened(fd, [])
    write(pcap, bytes(range(250)) * 300)
    ((_, body, _),) = read(os.pread(fd, 1 << 20, 0))
    captured, original = struct.unpack_from("<II", body, 12)
    assert (captured, original) == (lib.PCAP_SNAP, 75000)
    os.close(fd)


def test_threads_write_whole_packets(tmp_path: Path) -> None:
    with open(tmp_path / "packets", "wb") as file:
        pcap = opened(file.fileno(), [])

        def work(letter: bytes) -> None:
            frame = ffi.from_buffer(letter * 900)
            for _ in range(500):
                lib.pcap_write(pcap.cell, 1, lib.PCAP_INBOUND, frame, 900)

        threads = [threading.Thread(target=work, args=(letter,)) for letter in (b"a", b"b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    packets = read((tmp_path / "packets").read_bytes())
    assert len(packets) == 1000
    assert {body[20:] for _, body, _ in packets} == {b"a" * 900, b"b" * 900}
