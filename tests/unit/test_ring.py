"""The network ring's thread, driven as a guest would: no KVM, real sockets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tender._native import ffi, lib
from tender.engine.ring import Ring, is_worth_it, open_kick, region
from tender.image import elf
from tests.unit import elves
from tests.unit.rig import DATA, PORT, SIZE, TEXT, U64, Rig

OK, AGAIN, EINVAL, _ = range(4)
MIB = 1 << 20


class Port:
    """What KVM does with the guest's kick."""

    def signal_on_out(self, eventfd: int, port: int) -> None:
        assert port == 0x600
        self.eventfd = eventfd

    def kick(self) -> None:
        os.eventfd_write(self.eventfd, 1)


class GuestSide:
    """The guest's half of the ring."""

    def __init__(self, folder: Path) -> None:
        self.rig = Rig(folder, "c", ring_bytes=lib.HVT_RING_REGION)
        self.port = Port()
        self.rig.stop.enter()
        self.ring = Ring(
            open_kick(self.port.signal_on_out, self.rig.cleanup),
            self.rig.memory,
            self.rig.renew_engine().cell,
            self.rig.net,
            self.rig.stop,
            self.rig.cleanup,
        )
        self.ring.start()
        self.shared = ffi.cast("struct hvt_ring *", self.rig.memory.base + self.rig.memory.size)

    def submit(self, op: int, handle: int = PORT, gpa: int = DATA, length: int = 1514) -> None:
        tail = self.shared.ent_tail
        self.shared.entries[tail % lib.HVT_RING_ENTRIES] = {
            "op": op,
            "handle": handle,
            "data_gpa": gpa,
            "len": length,
            "id": tail + 100,
        }
        self.publish(tail + 1)

    def publish(self, tail: int) -> None:
        self.shared.ent_tail = tail & 0xFFFFFFFF
        if self.shared.needs_kick:
            self.port.kick()

    def read(self, **fields: int) -> Any:
        """One read: its completion."""
        head = self.shared.com_tail
        self.submit(lib.HVT_RING_NET_READ, **fields)
        until(lambda: self.shared.com_tail != head)
        self.shared.com_head = self.shared.com_tail
        return self.shared.completions[head % lib.HVT_RING_ENTRIES]

    def close(self) -> None:
        self.rig.close()
        self.rig.stop.leave()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[GuestSide]:
    value = GuestSide(tmp_path)
    yield value
    value.close()


def test_frames_go_both_ways(guest: GuestSide) -> None:
    for size in (60, 1514):
        guest.rig.memory.view[DATA : DATA + size] = bytes([size & 0xFF]) * size
        guest.submit(lib.HVT_RING_NET_WRITE, length=size)
        guest.rig.wire.setblocking(True)
        assert guest.rig.wire.recv(2000) == bytes([size & 0xFF]) * size
    assert guest.read().ret == AGAIN
    guest.rig.wire.send(b"frame" * 20)
    completion = guest.read()
    assert (completion.ret, completion.len) == (OK, 100)
    assert completion.id == guest.shared.ent_tail - 1 + 100
    assert guest.rig.memory.readable(DATA, 100) == b"frame" * 20
    assert guest.rig.net.devices[PORT].sent.bytes == 60 + 1514
    assert guest.rig.net.devices[PORT].received.bytes == 100


def test_it_sleeps_and_a_kick_wakes_it(guest: GuestSide) -> None:
    for _ in range(5):
        until(lambda: bool(guest.shared.needs_kick))
        assert guest.read().ret == AGAIN


def test_a_whole_ring_at_once_and_more_than_once_around(guest: GuestSide) -> None:
    entries = lib.HVT_RING_ENTRIES
    for _ in range(3):
        tail = guest.shared.ent_tail
        for index in range(tail, tail + entries):
            guest.shared.entries[index % entries] = {"op": 1, "handle": PORT, "data_gpa": DATA}
        guest.publish(tail + entries)
        until(lambda: guest.shared.ent_head == guest.shared.ent_tail)
    assert guest.ring.fault() is None


@pytest.mark.parametrize("handle", [0, 1, 5, 63, 64, 0xFFFFFFFF])
def test_wrong_handles(guest: GuestSide, handle: int) -> None:
    completion = guest.read(handle=handle)
    assert (completion.ret, completion.len) == (EINVAL, 0)
    guest.submit(lib.HVT_RING_NET_WRITE, handle=handle)
    assert guest.read().ret == AGAIN
    assert guest.ring.fault() is None


def test_unknown_operations_are_skipped(guest: GuestSide) -> None:
    for op in (0, 3, 0xFFFFFFFF):
        guest.submit(op, gpa=U64 - 1)
    assert guest.read().ret == AGAIN


def test_a_frame_that_no_link_carries_is_dropped(guest: GuestSide) -> None:
    guest.submit(lib.HVT_RING_NET_WRITE, length=1519)
    assert guest.read().ret == AGAIN
    assert guest.rig.net.devices[PORT].sent.drops == 1


@pytest.mark.parametrize(
    ("op", "gpa", "length"),
    [
        (1, SIZE, 1),
        (1, SIZE - 59, 60),
        (1, U64 - 1, 60),
        (2, U64 - 60, 60),
        (2, SIZE - 1, 0xFFFFFFFF),
        (2, TEXT, 60),
        (2, TEXT + 4095, 2),
        (2, SIZE + 128, 60),
    ],
)
def test_a_wrong_address_ends_the_guest(guest: GuestSide, op: int, gpa: int, length: int) -> None:
    guest.submit(op, gpa=gpa, length=length)
    until(lambda: guest.rig.stop.requested)
    fault = guest.ring.fault()
    assert fault is not None
    assert str(fault) == f"Invalid guest access: ring gpa={gpa:#x}, len={length:#x}"


@pytest.mark.parametrize("ahead", [1025, 1 << 31, 0xFFFFFFFF])
def test_a_wrong_index_ends_the_guest(guest: GuestSide, ahead: int) -> None:
    guest.publish(ahead)
    until(lambda: guest.rig.stop.requested)
    assert f"ring index {ahead} entries ahead" in str(guest.ring.fault())


def test_the_tenders_indices_are_its_own(guest: GuestSide) -> None:
    assert guest.read().ret == AGAIN
    guest.shared.ent_head = 77
    guest.shared.com_tail = 99
    guest.submit(lib.HVT_RING_NET_READ)
    until(lambda: (guest.shared.ent_head, guest.shared.com_tail) == (2, 2))


def test_trouble_is_told_once(guest: GuestSide) -> None:
    guest.rig.wire.close()
    for _ in range(3):
        guest.submit(lib.HVT_RING_NET_WRITE)
    assert guest.read().ret == AGAIN
    until(lambda: bool(guest.ring.cell.host_errno))
    for _ in range(2):
        guest.ring.report_error()
    assert guest.rig.warnings == ["network device 'port3': Broken pipe; the guest goes on"]
    assert guest.rig.net.devices[PORT].sent.errors == 3


def test_where_a_ring_is_offered() -> None:
    assert is_worth_it(True, fast_cpu=False)
    assert not is_worth_it(False, fast_cpu=True)
    assert not is_worth_it(None, fast_cpu=False)
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert not is_worth_it(None, fast_cpu=True)
    finally:
        os.sched_setaffinity(0, everything)
    assert is_worth_it(None, fast_cpu=True) == (len(everything) > 1)


@pytest.mark.parametrize(
    ("mem_mib", "image_mib", "segments", "ring_mib"),
    [(2, 1, 3, 0), (4, 3, 3, 0), (4, 2, 3, 2), (4096, 2, 3, 2), (64, 2, 20, 0)],
)
def test_a_small_guest_keeps_its_memory(
    mem_mib: int, image_mib: int, segments: int, ring_mib: int
) -> None:
    loads = [
        elves.phdr(elf.PT_LOAD, 0x1000 + n, 1, elves.BASE + n * 0x1000, memsz=0x1000)
        for n in range(segments)
    ]
    bss = elves.phdr(elf.PT_LOAD, 0, 0, elves.BASE, memsz=(image_mib - 1) * MIB)
    image = elves.parse(elves.image(segments=[*loads, bss]))
    assert region(mem_mib * MIB, image) == ring_mib * MIB
