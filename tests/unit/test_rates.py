"""Rate limits: the buckets, and what the handlers and the engine do when one is empty.

The buckets are asked about times that the test names. A handler is given a limit that is due in a
while, or not as long as the test runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic_ns

import pytest

from tender._native import lib
from tender.backends import Rate
from tender.config import ENGINES
from tender.modules.rate import NS, RateLimit
from tender.stop import Stop, Stopped
from tests.unit.rig import DATA, DISK, OTHER_PORT, PORT, READONLY, Rig

OK, AGAIN, EINVAL, EUNSPEC = range(4)
FRAME = bytes(range(60))
NEVER = 1 << 62  # ns
SOON = NS // 50
START = 10**15  # any time


@pytest.fixture(params=ENGINES)
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    value = Rig(tmp_path, request.param)
    yield value
    value.close()


def limit(rig: Rig, due_ns: int = 0) -> RateLimit:
    """A limit of one operation per second, of which the next one may be done at `due_ns`."""
    made = RateLimit(Rate(ops=1), rig.stop)
    made.cell.ops.empty_ns = max(0, due_ns - NS)
    return made


# The buckets.


def taken(bucket: RateLimit, now_ns: int, size: int) -> int:
    """Take it, and return how long the next one has to wait, in ns."""
    lib.rate_take(bucket.cell, now_ns, size)
    due_ns: int = lib.rate_due(bucket.cell, now_ns)
    return due_ns - now_ns if due_ns else 0


def test_a_burst_and_then_the_rate() -> None:
    bucket = RateLimit(Rate(bytes=1000, burst_bytes=500), Stop())
    assert [taken(bucket, START, 100) for _ in range(6)] == [0, 0, 0, 0, 0, NS // 10]
    assert lib.rate_due(bucket.cell, START + NS // 10 - 1) == START + NS // 10
    assert lib.rate_due(bucket.cell, START + NS // 10) == 0
    assert taken(bucket, START + NS // 10, 250) == NS // 4
    later = START + 100 * NS  # a pause saves up no more than a burst
    assert [taken(bucket, later, 250) for _ in range(3)] == [0, 0, NS // 4]


def test_the_default_burst_is_that_of_a_second() -> None:
    bucket = RateLimit(Rate(bytes=1000, ops=4), Stop())
    assert [taken(bucket, START, 1) for _ in range(4)] == [0, 0, 0, NS // 4]
    assert taken(bucket, START + NS // 4, 996) == NS // 4


def test_the_slower_of_the_two_decides() -> None:
    bucket = RateLimit(Rate(bytes=1000, ops=10, burst_bytes=1, burst_ops=1), Stop())
    assert taken(bucket, START, 1) == NS // 10
    assert taken(bucket, START + NS // 10, 1) == NS // 10
    assert taken(bucket, START + NS // 5, 500) == NS // 2 - NS // 1000


def test_an_operation_that_is_larger_than_its_bucket_passes_and_is_paid_for() -> None:
    bucket = RateLimit(Rate(bytes=1, burst_bytes=1), Stop())
    assert taken(bucket, START, 1 << 32) == ((1 << 32) - 1) * NS
    assert taken(bucket, START, 1 << 63) == (1 << 64) - 1 - START, "no overflow"
    fast = RateLimit(Rate(bytes=1 << 48, burst_bytes=1), Stop())
    assert taken(fast, START, 1) == 1, "what is left of a nanosecond is one"


def test_the_mean_rate_is_never_exceeded() -> None:
    bucket, now_ns, size = RateLimit(Rate(bytes=3_000_000, burst_bytes=1), Stop()), START, 0
    for each in range(1, 1000):
        now_ns += taken(bucket, now_ns, each)
        size += each
    assert size * NS // 3_000_000 <= now_ns - START <= size * NS // 3_000_000 + 1000


# Disks.


@pytest.mark.parametrize("name", ["BLOCK_READ", "BLOCK_WRITE"])
def test_a_disk_waits(rig: Rig, name: str) -> None:
    disk = rig.block.devices[DISK]
    soon_ns, calls = SOON, 0
    while not disk.counters.delays:  # on a busy machine it may be due before the call
        due_ns = monotonic_ns() + soon_ns
        rate = disk.rate = limit(rig, due_ns)
        assert rig.call(name, handle=DISK, data_gpa=DATA, len=512).ret == OK
        assert monotonic_ns() >= due_ns
        soon_ns, calls = soon_ns * 4, calls + 1
    assert (disk.counters.calls, disk.counters.bytes, disk.counters.delays) == (
        calls, calls * 512, 1,
    )  # fmt: skip
    assert rig.answered == 0
    assert rate.due_ns(), "it was taken"
    disk.rate = limit(rig)
    assert rig.call(name, handle=DISK, data_gpa=DATA, len=512).ret == OK
    assert disk.counters.delays == 1, "that one has not waited"
    assert disk.rate.due_ns(), "it was taken"


def test_what_a_disk_refuses_is_not_taken(rig: Rig) -> None:
    for handle, name, fields, result in (
        (DISK, "BLOCK_WRITE", {"offset": 1 << 40}, EINVAL),
        (READONLY, "BLOCK_WRITE", {}, EUNSPEC),
    ):
        rig.block.devices[handle].rate = limit(rig, NEVER)
        assert rig.call(name, handle=handle, data_gpa=DATA, len=512, **fields).ret == result


def test_a_stop_request_ends_the_wait_of_a_disk(rig: Rig) -> None:
    rig.block.devices[DISK].rate = limit(rig, NEVER)
    rig.stop.request()
    with pytest.raises(Stopped):
        rig.call("BLOCK_READ", handle=DISK, data_gpa=DATA, len=512)


# Networks.


def send(rig: Rig) -> int:
    rig.memory.writable(DATA, len(FRAME))[:] = FRAME
    result: int = rig.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=len(FRAME)).ret
    return result


def test_sending_waits_and_loses_nothing(rig: Rig) -> None:
    port = rig.net.devices[PORT]
    due_ns = monotonic_ns() + SOON
    port.rate_out = limit(rig, due_ns)
    assert send(rig) == OK
    assert monotonic_ns() >= due_ns
    assert rig.wire.recv(100) == FRAME
    assert (port.sent.bytes, port.sent.drops, port.sent.delays) == (60, 0, 1)
    assert port.rate_out.due_ns()
    short = rig.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=13)
    assert short.ret == EINVAL, "what is no frame does not wait"
    rig.stop.request()
    with pytest.raises(Stopped):
        send(rig)


def test_a_frame_that_may_not_be_read_yet_is_not_there(rig: Rig) -> None:
    port = rig.net.devices[PORT]
    port.rate_in = limit(rig, NEVER)
    rig.wire.send(FRAME)
    assert rig.call("POLL", timeout_nsecs=0).ret == 0
    assert rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=1514).ret == AGAIN
    rig.other_wire.send(FRAME)
    for timeout_ns in (0, NEVER):
        poll = rig.call("POLL", timeout_nsecs=timeout_ns)
        assert (poll.ret, poll.ready_set) == (1, 1 << OTHER_PORT)
    port.rate_in.cell.ops.empty_ns = 0
    poll = rig.call("POLL", timeout_nsecs=NEVER)
    assert (poll.ret, poll.ready_set) == (2, 1 << PORT | 1 << OTHER_PORT)
    for handle, delays in ((PORT, 1), (OTHER_PORT, 0)):
        read = rig.call("NET_READ", handle=handle, data_gpa=DATA, len=1514)
        assert (read.ret, read.len, bytes(rig.memory.readable(DATA, 60))) == (OK, 60, FRAME)
        received = rig.net.devices[handle].received
        assert (received.bytes, received.drops, received.delays) == (60, 0, delays)
    assert port.rate_in.due_ns(), "it was taken"


def test_a_read_without_a_frame_takes_nothing(rig: Rig) -> None:
    port = rig.net.devices[PORT]
    port.rate_in = limit(rig)
    assert rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=1514).ret == AGAIN
    assert not port.rate_in.due_ns()


def test_poll_ends_when_a_frame_may_be_read(rig: Rig) -> None:
    due_ns = monotonic_ns() + SOON
    rig.net.devices[PORT].rate_in = limit(rig, due_ns)
    rig.wire.send(FRAME)
    poll = rig.call("POLL", timeout_nsecs=NEVER)
    assert (poll.ret, poll.ready_set) == (1, 1 << PORT)
    assert monotonic_ns() >= due_ns


def test_poll_ends_at_its_timeout_before_that(rig: Rig) -> None:
    rig.net.devices[PORT].rate_in = limit(rig, NEVER)
    rig.wire.send(FRAME)
    begun_ns = monotonic_ns()
    assert rig.call("POLL", timeout_nsecs=SOON).ret == 0
    assert monotonic_ns() >= begun_ns + SOON
    rig.net.devices[PORT].rate_in = None
    assert rig.call("POLL", timeout_nsecs=SOON).ret == 1, "it is watched again"


def test_the_engine_answers_as_long_as_nothing_waits(rig: Rig) -> None:
    rate = Rate(bytes=1 << 40)
    rig.block.devices[DISK].rate = RateLimit(rate, rig.stop)
    port = rig.net.devices[PORT]
    port.rate_in = port.rate_out = RateLimit(rate, rig.stop)
    rig.wire.send(FRAME)
    assert rig.call("BLOCK_WRITE", handle=DISK, data_gpa=DATA, len=512).ret == OK
    assert send(rig) == OK
    assert rig.call("POLL", timeout_nsecs=0).ret == 1
    assert rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=1514).ret == OK
    assert rig.answered == (4 if rig.has_engine else 0)
    assert os.read(rig.wire.fileno(), 100) == FRAME
