"""The engine means what Python's handlers mean: the same calls, the same replies, on both."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tender.errors import GuestFault
from tender.stop import Stopped
from tests.unit.rig import ARGS, CAPACITY, DATA, DISK, NUMBERS, PORT, READONLY, SIZE, TEXT, U64, Rig

GOOD_CALLS = {
    "WALLTIME": {},
    "PUTS": {"data_gpa": DATA, "len": 5},
    "POLL": {"timeout_nsecs": 1000},
    "BLOCK_WRITE": {"handle": DISK, "offset": 512, "data_gpa": DATA, "len": 1024},
    "BLOCK_READ": {"handle": READONLY, "data_gpa": DATA, "len": 512},
    "NET_WRITE": {"handle": PORT, "data_gpa": DATA, "len": 60},
    "NET_READ": {"handle": PORT, "data_gpa": DATA, "len": 1514},
}


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Rig, Rig]]:
    """The same machine twice: with the engine, and without."""
    rigs = []
    for engine in ("c", "python"):
        (tmp_path / engine).mkdir()
        rigs.append(Rig(tmp_path / engine, engine))
    yield rigs[0], rigs[1]
    for rig in rigs:
        rig.close()


@pytest.mark.parametrize("name", GOOD_CALLS)
def test_a_good_call_never_reaches_python(pair: tuple[Rig, Rig], name: str) -> None:
    rig, _ = pair
    rig.call(name, **GOOD_CALLS[name])
    assert rig.answered == 1


def test_counters_are_the_same_ones(pair: tuple[Rig, Rig]) -> None:
    for rig in pair:
        for name, fields in GOOD_CALLS.items():
            rig.call(name, **fields)
        rig.wire.send(b"x" * 99)
        rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=1514)
    for with_engine, without in zip(*map(cells, pair), strict=True):
        assert with_engine == without


def cells(rig: Rig) -> list[tuple[int, ...]]:
    ports = rig.net.devices.values()
    counters = [rig.console.counters, rig.poll.counters]
    counters += [disk.counters for disk in rig.block.devices.values()]
    counters += [cell for port in ports for cell in (port.received, port.sent)]
    return [(cell.calls, cell.bytes, cell.errors, cell.drops) for cell in counters]


def test_output_that_a_full_pipe_cuts_is_written_once(pair: tuple[Rig, Rig]) -> None:
    """The engine begins the call, Python ends it."""
    rig, _ = pair
    os.set_blocking(rig.console.fd, False)
    filler = b"." * 60_000
    os.write(rig.console.fd, filler)
    text = bytes(range(256)) * 40
    rig.memory.view[DATA : DATA + len(text)] = text
    received = bytearray()
    engine = rig.renew_engine()
    block = rig.put("PUTS", data_gpa=DATA, len=len(text))
    assert not engine.answer(NUMBERS["PUTS"], ARGS)
    assert 0 < rig.console.begun < len(text)
    received += os.read(rig.output, 1 << 20)
    rig.console.puts(rig.memory, block)
    while len(received) < len(filler) + len(text):
        received += os.read(rig.output, 1 << 20)
    assert received == filler + text
    assert rig.console.begun == 0


def test_a_poll_that_python_ends_keeps_its_deadline(pair: tuple[Rig, Rig]) -> None:
    rig, _ = pair
    rig.poll.begun = 1  # a deadline long past, as after an interruption
    reply = rig.put("POLL", timeout_nsecs=U64 - 1)
    rig.poll.poll(rig.memory, reply)
    assert (reply.ret, rig.poll.begun) == (0, 0)


def test_a_poll_that_a_stop_request_has_interrupted_does_not_wait_again(
    pair: tuple[Rig, Rig],
) -> None:
    rig, _ = pair
    rig.poll.begun = U64 - 1
    rig.stop.request()
    with pytest.raises(Stopped):
        rig.poll.poll(rig.memory, rig.put("POLL", timeout_nsecs=U64 - 1))


def test_memory_with_very_many_protections_is_left_to_python(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "c")
    for page in range(40):
        start = 0x110000 + page * 0x2000
        rig.memory.protect(start, start + 0x1000, readable=True, writable=False)
    with pytest.raises(GuestFault, match="protected"):
        rig.dispatch("WALLTIME", 0x110000)
    rig.dispatch("WALLTIME", 0x111000)
    assert rig.answered == 0
    rig.dispatch("WALLTIME", ARGS)
    assert rig.answered == 1
    rig.close()


def interesting(*values: int) -> st.SearchStrategy[int]:
    near = [value + delta & U64 - 1 for value in values for delta in (-1, 0, 1)]
    return st.one_of(st.sampled_from(near), st.integers(0, 70), st.integers(0, U64 - 1))


WORDS = interesting(0, DATA, TEXT, TEXT + 4096, SIZE, CAPACITY, 1514, 1518, 1 << 32, 1 << 63)
BLOCKS = st.lists(WORDS, min_size=5, max_size=5)
CALLS = st.sampled_from(sorted(set(NUMBERS) - {"HALT"}))


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=CALLS, gpa=interesting(ARGS, TEXT, SIZE - 40), words=BLOCKS, frame=st.binary(max_size=99)
)
def test_random_blocks_get_the_same_reply(
    pair: tuple[Rig, Rig], name: str, gpa: int, words: list[int], frame: bytes
) -> None:
    if name == "POLL":
        words[0] %= 1000
    gpa &= 0xFFFFFFFF
    replies = [make_call(rig, name, gpa, words, frame) for rig in pair]
    assert replies[0] == replies[1]


def make_call(rig: Rig, name: str, gpa: int, words: list[int], frame: bytes) -> object:
    """Everything that can be seen of one call: its end, memory, files, frames."""
    for start, end in ((0, TEXT), (TEXT + 4096, SIZE)):
        rig.memory.view[start:end] = bytes(end - start)
    raw = b"".join(word.to_bytes(8, "little") for word in words)
    if gpa <= SIZE - len(raw) and not TEXT - len(raw) < gpa < TEXT + 4096:
        rig.memory.view[gpa : gpa + len(raw)] = raw
    while drain(rig.wire):
        pass
    if frame:
        rig.wire.send(frame)
    rig.console.fd = NULL
    try:
        outcome: object = rig.dispatch(name, gpa)
    except GuestFault as fault:
        outcome = str(fault)
    reply = b"" if name == "WALLTIME" else bytes(rig.memory.view)
    sent = drain(rig.wire)
    drain_guest(rig)
    return outcome, hash(reply), sent, rig.disk.read_bytes(), cells(rig)


def drain(wire: socket.socket) -> bytes:
    try:
        return wire.recv(1 << 17)
    except BlockingIOError:
        return b""


def drain_guest(rig: Rig) -> None:
    """What the guest did not read is not there for the next call."""
    data = bytearray(2000)
    while rig.net.devices[PORT].read(memoryview(data))[1]:
        pass
    port = rig.net.devices[PORT]
    for cell in (port.received, port.sent, rig.console.counters, rig.poll.counters):
        cell.calls = cell.bytes = cell.errors = cell.drops = 0


NULL = os.open("/dev/null", os.O_WRONLY)
