"""Each hypercall, good and bad: a result code, or a guest fault. Real files, real sockets."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tender.config import ENGINES
from tender.cpu.vcpu import IoIn, IoOut, Mmio
from tender.errors import GuestFault, HostError
from tender.hypercalls import Dispatcher, Halt, decode
from tender.image.elf import EM_AARCH64
from tender.stop import Stopped
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

OK, AGAIN, EINVAL, EUNSPEC = range(4)
FRAME = bytes(range(60))
MMIO = 1 << 32


@pytest.fixture(params=ENGINES)
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    value = Rig(tmp_path, request.param)
    yield value
    value.close()


# Decoding.


def test_an_aarch64_hypercall_is_a_store(rig: Rig) -> None:
    assert decode(Mmio(MMIO + 16, 4, True, 0xFFFFFFFF)) == (2, 0xFFFFFFFF)
    assert Dispatcher(rig.memory, [], EM_AARCH64).mmio_base == MMIO
    assert Dispatcher(rig.memory, []).mmio_base >= U64  # on x86_64 there are none


@pytest.mark.parametrize(
    "exit",
    [
        Mmio(MMIO - 8, 4, True, ARGS),
        Mmio(MMIO + 128, 4, True, ARGS),
        Mmio(MMIO + 20, 4, True, ARGS),
        Mmio(MMIO + 16, 1, True, ARGS),
        Mmio(MMIO + 16, 8, True, ARGS),
        Mmio(MMIO + 16, 4, False, 0),
        Mmio(U64 - 8, 4, True, ARGS),
    ],
)
def test_other_stores_end_the_guest(exit: Mmio) -> None:
    with pytest.raises(GuestFault, match=f"Invalid guest mmio access: gpa={exit.gpa:#x}, size="):
        decode(exit)


@pytest.mark.parametrize(
    "exit",
    [
        IoOut(0x400, 4, ARGS),
        IoOut(0x4FF, 4, ARGS),
        IoOut(0x510, 4, ARGS),
        IoOut(0x600, 4, ARGS),
        IoOut(0x502, 1, 0),
        IoOut(0x502, 2, 0),
        IoOut(0x502, 8, 0),
        IoIn(0x501, 4),
    ],
)
def test_other_ports_end_the_guest(rig: Rig, exit: object) -> None:
    with pytest.raises(GuestFault, match="Invalid guest port access: port=0x"):
        rig.exit(exit)


@pytest.mark.parametrize("number", [0, 9, 15])
def test_other_numbers_end_the_guest(rig: Rig, number: int) -> None:
    with pytest.raises(GuestFault, match=f"Invalid guest hypercall: num={number}"):
        rig.exit(IoOut(0x500 + number, 4, ARGS))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("gpa", [SIZE, SIZE - 1, 0xFFFFFFFF, 0xFFFFFFF8])
def test_an_argument_block_outside_of_memory(rig: Rig, name: str, gpa: int) -> None:
    with pytest.raises(GuestFault, match="Invalid guest access") as raised:
        rig.dispatch(name, gpa)
    if name != "HALT":
        assert raised.value.hypercall == NUMBERS[name]


@pytest.mark.parametrize("name", ["WALLTIME", "POLL", "BLOCK_READ", "NET_READ", "NET_WRITE"])
def test_a_reply_into_read_only_memory_ends_the_guest(rig: Rig, name: str) -> None:
    with pytest.raises(GuestFault, match="protected"):
        rig.dispatch(name, TEXT)


BAD_BUFFERS = [
    (SIZE, 1),
    (SIZE - 511, 512),
    (U64 - 1, 1),
    (DATA, U64 - 1),
    (DATA, U64 - DATA),
    (U64 - 512, 512),
    (1 << 32, 512),
]


@pytest.mark.parametrize(("data_gpa", "length"), BAD_BUFFERS)
@pytest.mark.parametrize("name", ["PUTS", "NET_WRITE", "NET_READ"])
def test_a_buffer_outside_of_memory(rig: Rig, name: str, data_gpa: int, length: int) -> None:
    fields = {"data_gpa": data_gpa, "len": length} | ({} if name == "PUTS" else {"handle": PORT})
    with pytest.raises(GuestFault, match="Invalid guest access"):
        rig.call(name, **fields)


@pytest.mark.parametrize("odd", range(1, 8))
def test_argument_blocks_at_any_address(rig: Rig, odd: int) -> None:
    """C reads and writes their fields without a misaligned access (UBSan: ./check --sanitize)."""
    rig.memory.writable(DATA, 5)[:] = b"words"
    for name, fields in (
        ("BLOCK_WRITE", {"handle": DISK, "data_gpa": DATA + odd, "len": 512}),
        ("BLOCK_READ", {"handle": DISK, "data_gpa": DATA + odd, "len": 512}),
        ("NET_WRITE", {"handle": PORT, "data_gpa": DATA + odd, "len": 60}),
        ("NET_READ", {"handle": PORT, "data_gpa": DATA + odd, "len": 2048}),
        ("WALLTIME", {}),
        ("POLL", {"timeout_nsecs": 1}),
        ("PUTS", {"data_gpa": DATA, "len": 5}),
    ):
        block = rig.put(name, ARGS + odd, **fields)
        rig.dispatch(name, ARGS + odd)
        expected = {"NET_READ": AGAIN, "BLOCK_READ": OK, "BLOCK_WRITE": OK, "NET_WRITE": OK}
        assert name not in expected or block.ret == expected[name], name


# WALLTIME, HALT.


def test_walltime_is_now(rig: Rig) -> None:
    before = time.time_ns()
    assert before <= rig.call("WALLTIME").nsecs <= time.time_ns()


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (7, 7), (255, 255), (-1, 255), (256, 0)])
def test_halt_gives_the_status(rig: Rig, status: int, expected: int) -> None:
    rig.put("HALT", exit_status=status)
    assert rig.dispatch("HALT", ARGS) == Halt(expected)


def test_halt_gives_the_trap_registers(rig: Rig) -> None:
    words = [n.to_bytes(8, "little") for n in range(10, 17)]
    rig.memory.view[DATA : DATA + 56] = b"".join(words)
    rig.put("HALT", cookie_gpa=DATA, exit_status=255)
    halt = rig.dispatch("HALT", ARGS)
    assert halt is not None
    names = ["cr2", "error_code", "rip", "cs", "rflags", "rsp", "ss"]
    assert halt.trap == dict(zip(names, range(10, 17), strict=True))


def test_halt_gives_the_trap_registers_of_aarch64(rig: Rig) -> None:
    names = ["far", "esr", "elr", "spsr", "sp", *(f"x{number}" for number in range(31))]
    rig.put("HALT", cookie_gpa=DATA, exit_status=255)
    rig.memory.view[DATA : DATA + 288] = b"".join(n.to_bytes(8, "little") for n in range(10, 46))
    dispatcher = Dispatcher(rig.memory, [], EM_AARCH64)
    halt = dispatcher.dispatch(Mmio(MMIO + (NUMBERS["HALT"] << 3), 4, True, ARGS))
    assert halt == Halt(255, dict(zip(names, range(10, 46), strict=True)))


@pytest.mark.parametrize("cookie", [SIZE, SIZE - 511, U64 - 1])
def test_a_halt_cookie_outside_of_memory(rig: Rig, cookie: int) -> None:
    rig.put("HALT", cookie_gpa=cookie)
    with pytest.raises(GuestFault, match="Invalid guest access"):
        rig.dispatch("HALT", ARGS)


# PUTS.


def test_puts_writes_bytes(rig: Rig) -> None:
    rig.memory.view[DATA : DATA + 5] = b"a\0\xff\n!"
    rig.call("PUTS", data_gpa=DATA, len=5)
    rig.call("PUTS", data_gpa=DATA, len=0)
    assert os.read(rig.output, 100) == b"a\0\xff\n!"
    assert rig.console.counters.bytes == 5


def test_puts_may_end_at_the_end_of_memory(rig: Rig) -> None:
    rig.memory.view[SIZE - 3 :] = b"end"
    rig.call("PUTS", data_gpa=SIZE - 3, len=3)
    assert os.read(rig.output, 100) == b"end"


def test_puts_waits_for_a_slow_reader(rig: Rig) -> None:
    """More than a pipe holds, on a descriptor that somebody made non-blocking."""
    os.set_blocking(rig.console.fd, False)
    rig.memory.view[DATA : DATA + 200_000] = b"x" * 200_000
    received = bytearray()

    def reader() -> None:
        while len(received) < 200_000:
            received.extend(os.read(rig.output, 65536))

    thread = threading.Thread(target=reader)
    thread.start()
    rig.call("PUTS", data_gpa=DATA, len=200_000)
    thread.join()
    assert received == b"x" * 200_000


def test_output_that_the_host_cannot_store_is_counted(rig: Rig) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        rig.console.fd = full.fileno()
        for _ in range(3):
            rig.call("PUTS", data_gpa=DATA, len=10)
    assert rig.console.counters.drops == 3
    assert len(rig.warnings) == 1
    assert "No space left" in rig.warnings[0]


def test_a_console_that_nobody_reads_ends_the_guest(rig: Rig) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    rig.console.fd = writer
    with pytest.raises(HostError, match="nobody reads it"):
        rig.call("PUTS", data_gpa=DATA, len=10)
    os.close(writer)


# POLL.


def test_poll_returns_at_its_timeout(rig: Rig) -> None:
    start = time.monotonic_ns()
    reply = rig.call("POLL", timeout_nsecs=20_000_000, ready_set=99, ret=99)
    assert time.monotonic_ns() - start >= 20_000_000
    assert (reply.ready_set, reply.ret) == (0, 0)


def test_poll_tells_what_is_ready(rig: Rig) -> None:
    rig.other_wire.send(FRAME)
    reply = rig.call("POLL", timeout_nsecs=U64 - 1)
    assert (reply.ready_set, reply.ret) == (1 << OTHER_PORT, 1)
    rig.wire.send(FRAME)
    reply = rig.call("POLL", timeout_nsecs=0)
    assert (reply.ready_set, reply.ret) == (1 << OTHER_PORT | 1 << PORT, 2)


def test_a_port_whose_peer_is_gone_is_not_ready_for_ever(rig: Rig) -> None:
    rig.wire.send(FRAME)
    rig.wire.close()
    rig.other_wire.send(FRAME)
    assert rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=2000).ret == OK
    assert rig.call("POLL", timeout_nsecs=0).ready_set == 1 << OTHER_PORT
    assert rig.call("NET_READ", handle=OTHER_PORT, data_gpa=DATA, len=2000).ret == OK
    reply = rig.call("POLL", timeout_nsecs=1_000_000)
    assert (reply.ready_set, reply.ret) == (0, 0)
    assert rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=2000).ret == AGAIN
    assert rig.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=60).ret == EUNSPEC
    assert "network device 'port3': disconnected; the guest goes on" in rig.warnings


def test_frames_that_came_before_their_sender_went_are_read(rig: Rig) -> None:
    frames = [FRAME, FRAME[:-1], FRAME[:-2]]
    for frame in frames:
        rig.wire.send(frame)
    rig.wire.close()
    for frame in frames:
        for _ in range(2):  # also for a guest that polls twice
            assert rig.call("POLL", timeout_nsecs=U64 - 1).ready_set == 1 << PORT
        reply = rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=2000)
        assert (reply.ret, reply.len) == (OK, len(frame))
    assert rig.call("POLL", timeout_nsecs=1_000_000).ready_set == 0


def test_an_empty_message_is_no_frame_and_no_end(rig: Rig) -> None:
    rig.wire.send(b"")
    rig.wire.send(FRAME)
    results = [rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=2000).ret for _ in range(2)]
    assert results == [AGAIN, OK]
    assert rig.warnings == []


@pytest.mark.parametrize("length", [0, 1, 13])
def test_less_than_a_header_is_no_frame(rig: Rig, length: int) -> None:
    assert rig.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=length).ret == EINVAL
    with pytest.raises(BlockingIOError):
        rig.wire.recv(100)


def test_a_datagram_link_survives_that_nobody_listens_for_a_while(rig: Rig) -> None:
    """UDP: the error of an earlier frame comes back, and the link works on."""
    here, there = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    there.bind(("127.0.0.1", 0))
    address = there.getsockname()
    here.connect(address)
    here.setblocking(False)
    rig.net.devices[PORT].fd = here.fileno()
    rig.poll.watch()
    there.close()
    for _ in range(3):
        rig.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=60)
        assert rig.call("POLL", timeout_nsecs=1_000_000).ready_set & 1 << PORT == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(address)
        again.connect(here.getsockname())
        again.send(FRAME)
        assert rig.call("POLL", timeout_nsecs=U64 - 1).ready_set & 1 << PORT
    assert rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=2000).ret == OK
    here.close()


def test_a_stop_request_ends_a_poll(rig: Rig) -> None:
    ended = threading.Event()

    def guest() -> None:
        rig.stop.enter()
        with pytest.raises(Stopped):
            rig.call("POLL", timeout_nsecs=U64 - 1)
        rig.stop.leave()
        ended.set()

    thread = threading.Thread(target=guest)
    thread.start()
    while not ended.wait(0.01):
        rig.stop.request()
    thread.join()


# BLOCK_READ, BLOCK_WRITE.


def test_blocks_are_written_and_read(rig: Rig) -> None:
    rig.memory.view[DATA : DATA + 1024] = b"ab" * 512
    write = rig.call("BLOCK_WRITE", handle=DISK, offset=512, data_gpa=DATA, len=1024, ret=9)
    assert write.ret == OK
    assert rig.disk.read_bytes()[:2048] == bytes(512) + b"ab" * 512 + bytes(512)
    read = rig.call("BLOCK_READ", handle=DISK, offset=1024, data_gpa=DATA + 4096, len=512, ret=9)
    assert read.ret == OK
    assert rig.memory.readable(DATA + 4096, 512) == b"ab" * 256
    assert rig.block.devices[DISK].counters.bytes == 1536


RANGES = [
    (CAPACITY - 512, 512, OK),
    (0, CAPACITY, OK),
    (CAPACITY, 0, EINVAL),
    (CAPACITY, 512, EINVAL),
    (CAPACITY - 512, 513, EINVAL),
    (CAPACITY + 512, 512, EINVAL),
    (U64 - 512, 512, EINVAL),
    (U64 - 1, 1, EINVAL),
    (512, U64 - 512, EINVAL),
    (1, U64 - 1, EINVAL),
    (0, U64 - 1, EINVAL),
    (0, 0, OK),
]


@pytest.mark.parametrize(("offset", "length", "result"), RANGES)
@pytest.mark.parametrize("name", ["BLOCK_READ", "BLOCK_WRITE"])
def test_block_ranges(rig: Rig, name: str, offset: int, length: int, result: int) -> None:
    reply = rig.call(name, handle=DISK, offset=offset, data_gpa=DATA, len=length, ret=9)
    assert reply.ret == result
    assert rig.disk.stat().st_size == CAPACITY


@pytest.mark.parametrize("handle", [0, PORT, 5, 63, 64, 1 << 32 | DISK, U64 - 1])
@pytest.mark.parametrize("name", ["BLOCK_READ", "BLOCK_WRITE"])
def test_block_handles(rig: Rig, name: str, handle: int) -> None:
    assert rig.call(name, handle=handle, data_gpa=DATA, len=512).ret == EINVAL


@pytest.mark.parametrize(("data_gpa", "length"), [(SIZE - 511, 512), (U64 - 512, 512), (SIZE, 1)])
@pytest.mark.parametrize("name", ["BLOCK_READ", "BLOCK_WRITE"])
def test_block_buffers(rig: Rig, name: str, data_gpa: int, length: int) -> None:
    with pytest.raises(GuestFault, match="Invalid guest access"):
        rig.call(name, handle=DISK, data_gpa=data_gpa, len=length)


def test_a_block_is_not_read_into_read_only_memory(rig: Rig) -> None:
    with pytest.raises(GuestFault, match="protected"):
        rig.call("BLOCK_READ", handle=DISK, data_gpa=TEXT, len=512)
    assert rig.call("BLOCK_WRITE", handle=DISK, data_gpa=TEXT, len=512).ret == OK


def test_a_read_only_disk_is_not_written(rig: Rig) -> None:
    assert rig.call("BLOCK_WRITE", handle=READONLY, data_gpa=DATA, len=512).ret == EUNSPEC
    assert rig.call("BLOCK_READ", handle=READONLY, data_gpa=DATA, len=512).ret == OK
    assert rig.memory.readable(DATA, 512) == b"r" * 512
    assert rig.readonly.read_bytes() == b"r" * CAPACITY


def test_a_disk_that_became_shorter_is_a_result_code(rig: Rig) -> None:
    os.truncate(rig.disk, 512)
    for _ in range(2):
        reply = rig.call("BLOCK_READ", handle=DISK, offset=512, data_gpa=DATA, len=512)
        assert reply.ret == EUNSPEC
    assert rig.warnings == ["block device 'disk1': the file became shorter; the guest goes on"]
    assert rig.block.devices[DISK].counters.errors == 2


def test_a_full_disk_is_a_result_code(rig: Rig) -> None:
    with open("/dev/full", "r+b", buffering=0) as full:
        rig.block.devices[DISK].fd = full.fileno()
        for _ in range(2):
            assert rig.call("BLOCK_WRITE", handle=DISK, data_gpa=DATA, len=512).ret == EUNSPEC
    assert rig.warnings == ["block device 'disk1': No space left on device; the guest goes on"]


# NET_READ, NET_WRITE.


def test_frames_go_both_ways(rig: Rig) -> None:
    rig.memory.view[DATA : DATA + 60] = FRAME
    assert rig.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=60, ret=9).ret == OK
    assert rig.wire.recv(2000) == FRAME
    rig.wire.send(b"x" * 99)
    reply = rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=1514, ret=9)
    assert (reply.ret, reply.len) == (OK, 99)
    assert rig.memory.readable(DATA, 99) == b"x" * 99
    assert rig.call("NET_READ", handle=PORT, data_gpa=DATA, len=1514).ret == AGAIN


@pytest.mark.parametrize("handle", [0, DISK, 5, 63, 64, 1 << 32 | PORT, U64 - 1])
@pytest.mark.parametrize("name", ["NET_READ", "NET_WRITE"])
def test_net_handles(rig: Rig, name: str, handle: int) -> None:
    assert rig.call(name, handle=handle, data_gpa=DATA, len=60).ret == EINVAL


def test_a_frame_that_no_link_carries_is_refused(rig: Rig) -> None:
    assert rig.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=1519).ret == EINVAL
    assert rig.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=1514).ret == OK
    assert rig.net.devices[PORT].sent.drops == 1


def test_a_full_queue_drops_as_a_wire_does(rig: Rig) -> None:
    for _ in range(2000):
        assert rig.call("NET_WRITE", handle=PORT, data_gpa=DATA, len=1514).ret == OK
    assert rig.net.devices[PORT].sent.drops > 0
    assert rig.warnings == []


def test_a_frame_is_not_read_into_read_only_memory(rig: Rig) -> None:
    rig.wire.send(FRAME)
    with pytest.raises(GuestFault, match="protected"):
        rig.call("NET_READ", handle=PORT, data_gpa=TEXT, len=1514)


def test_a_datagram_socket_carries_frames_too() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    from tender.backends import Descriptor
    from tender.cleanup import Cleanup
    from tender.host import net
    from tender.image.manifest import Device

    with Cleanup() as cleanup, ours, theirs:
        port = net.attach(Device("n", 2, 1), Descriptor(theirs.fileno()), cleanup, print)
        assert port.mtu == 1500
        assert port.mac[0] & 3 == 2
        ours.send(FRAME)
        data = bytearray(1514)
        assert port.read(memoryview(data)) == (OK, 60)
        assert port.read(memoryview(data)) == (AGAIN, 0)


# Anything at all.

U64S = st.one_of(
    st.integers(0, U64 - 1),
    st.integers(0, 70),
    st.sampled_from([b[0] for b in BAD_BUFFERS] + [DATA, TEXT, SIZE, SIZE - 1, ARGS]),
    st.sampled_from([r[0] for r in RANGES]),
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(set(NUMBERS) - {"POLL", "HALT"})), st.lists(U64S, min_size=5, max_size=5)
)
def test_random_blocks_get_a_result_or_end_the_guest(
    rig: Rig, name: str, fields: list[int]
) -> None:
    with open("/dev/null", "wb") as null:
        rig.console.fd = null.fileno()
        raw = b"".join(field.to_bytes(8, "little") for field in fields)
        rig.memory.view[ARGS : ARGS + len(raw)] = raw
        try:
            assert rig.dispatch(name, ARGS) is None
        except GuestFault as fault:
            assert "Invalid guest access" in str(fault)
    assert rig.disk.stat().st_size == CAPACITY
    assert rig.readonly.read_bytes() == b"r" * CAPACITY
