"""Ten thousand forged argument blocks per hypercall, without a CPU: both engines, one outcome.

What comes of a call is a reply or a GuestFault, and what the engine in C leaves in memory, files
and counters is what the Python handlers leave. The seed is fixed: a failure can be looked at again.
"""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tender.errors import GuestFault
from tender.hypercalls import HYPERCALLS
from tests.unit.rig import (
    ARGS,
    CAPACITY,
    DATA,
    DISK,
    NUMBERS,
    OTHER_PORT,
    PORT,
    READONLY,
    SIZE,
    TEXT,
    U64,
    Rig,
)
from tests.unit.test_engine import NULL, cells, drain

COUNT = 10_000
COMPARE_EVERY = 500  # all of memory and of the file; the reply and the outcome each time
GROWTH_KB = 4096
HANDLES = [DISK, READONLY, PORT, OTHER_PORT, DISK, PORT, 0, 5, 63, 64, 1 << 32 | PORT, U64 - 1]
LENGTHS = [0, 1, 13, 14, 60, 512, 512, 1024, 1518, 1519, 4096, CAPACITY, SIZE, 1 << 32, 1 << 63,
           U64 - 1]  # fmt: skip
OFFSETS = [0, 0, 512, 1024, 513, CAPACITY - 512, CAPACITY, 1 << 32, (1 << 63) - 1, U64 - 512]
ADDRESSES = [DATA, DATA, DATA + 1, DATA + 4096, 0, 0x1000, TEXT, TEXT + 4096, SIZE, 1 << 32,
             1 << 63, U64 - 4096]  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Rig, Rig]]:
    rigs = []
    for engine in ("c", "python"):
        (tmp_path / engine).mkdir()
        rigs.append(Rig(tmp_path / engine, engine))
        rigs[-1].console.fd = NULL
    yield rigs[0], rigs[1]
    for rig in rigs:
        rig.close()


def near(chance: random.Random, values: list[int]) -> int:
    value = chance.choice(values) + chance.choice((0, 0, 0, 0, 1, -1))
    return value % U64


def forge(chance: random.Random, name: str) -> tuple[int, dict[str, int]]:
    """Where the block lies, and what is in it."""
    size = HYPERCALLS[NUMBERS[name]].layout.size
    gpa = chance.choice((
        ARGS, ARGS, ARGS, ARGS + chance.randrange(8192), DATA, SIZE - size, SIZE - size + 1,
        TEXT - size + chance.randrange(size), TEXT, 0, SIZE, 0xFFFFFFFF - chance.randrange(64),
    ))  # fmt: skip
    length = near(chance, LENGTHS)
    own = DISK if name.startswith("BLOCK") else PORT
    fields = {
        "handle": own if chance.randrange(4) else chance.choice(HANDLES),
        "offset": near(chance, OFFSETS),
        "data_gpa": chance.choice((
            near(chance, ADDRESSES), near(chance, ADDRESSES), gpa, (gpa + 16) % U64,
            (SIZE - length) % U64, (SIZE - length + 1) % U64, chance.randrange(U64),
        )),
        "len": length,
        "cookie_gpa": near(chance, [*ADDRESSES, SIZE - 512]),
        "timeout_nsecs": chance.choice((0, 1, 1000)),
    }  # fmt: skip
    call = HYPERCALLS[NUMBERS[name]]
    names = {*call.asks, *call.answers}
    return gpa, {key: value for key, value in fields.items() if key in names}


def writable_here(gpa: int, size: int) -> bool:
    return gpa + size <= SIZE and not (gpa < TEXT + 4096 and gpa + size > TEXT)


def outcome(rig: Rig, name: str, gpa: int, fields: dict[str, int], frame: bytes) -> object:
    size = HYPERCALLS[NUMBERS[name]].layout.size
    if writable_here(gpa, size):
        rig.put(name, gpa, **fields)
    if name == "NET_READ":
        rig.wire.send(frame)
    try:
        result: object = rig.dispatch(name, gpa)
    except GuestFault as fault:
        return str(fault)
    if name == "WALLTIME":
        rig.memory.put(gpa, bytes(size))  # the one answer that differs from call to call
    sent = drain(rig.wire), drain(rig.other_wire)
    return result, bytes(rig.memory.readable(gpa, size)), sent


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NUMBERS)
def test_both_engines_make_the_same_of_them(pair: tuple[Rig, Rig], name: str) -> None:
    chance = random.Random(name)
    kinds = set()
    before = 0
    for number in range(COUNT):
        gpa, fields = forge(chance, name)
        frame = chance.randbytes(chance.randrange(14, 99))
        replies = [outcome(rig, name, gpa, fields, frame) for rig in pair]
        assert replies[0] == replies[1], (number, gpa, fields)
        kinds.add(type(replies[0]))
        if name == "NET_READ":
            for rig in pair:
                while rig.net.devices[PORT].read(memoryview(bytearray(2000)))[1]:
                    pass
        if number % COMPARE_EVERY == 0:
            compare(pair, counters=name != "NET_READ")
        if number == COUNT // 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert kinds == {str, tuple}  # faults as well as replies
    compare(pair, counters=name != "NET_READ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KB
    assert (pair[0].answered > COUNT // 20) == (name != "HALT")


def compare(pair: tuple[Rig, Rig], counters: bool) -> None:
    with_engine, without = pair
    assert with_engine.memory.view == without.memory.view
    assert with_engine.disk.read_bytes() == without.disk.read_bytes()
    if counters:
        assert cells(with_engine) == cells(without)
