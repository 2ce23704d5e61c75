"""gdb's remote protocol without a socket: packets cut anywhere, nonsense, and a guest of bytes."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from tender.boot import aarch64, x86_64
from tender.cpu.vcpu import NotSupported, Stops
from tender.dataclass import replace
from tender.observe import gdb_registers
from tender.observe.gdb_packets import (
    PACKET_MAX,
    Decoder,
    Interrupt,
    Packet,
    ProtocolError,
    encode,
)
from tender.observe.gdb_session import Session

MEMORY = 1 << 20


class Guest:
    """A guest that stands still: a gdb_session.Target."""

    path = "/kernel.hvt"
    joined = False

    def __init__(self) -> None:
        self.memory = bytearray(MEMORY)
        self.state: Any = x86_64.initial_state(0x100000, MEMORY)
        self.architecture = gdb_registers.of("x86_64")
        self.stops = Stops()

    def xml(self) -> bytes:
        return self.architecture.xml()

    def memory_map(self) -> list[tuple[int, int]]:
        return [(0, MEMORY)]

    def read_registers(self) -> bytes:
        return self.architecture.read_all(self.state)

    def write_registers(self, data: bytes) -> None:
        self.state = self.architecture.write_all(self.state, data)

    def read_register(self, number: int) -> bytes:
        return self.architecture.read(self.state, number)

    def write_register(self, number: int, data: bytes) -> None:
        self.state = self.architecture.write(self.state, number, data)

    def read_memory(self, address: int, size: int) -> bytes:
        return bytes(self.memory[address : address + size])

    def write_memory(self, address: int, data: bytes) -> None:
        if address + len(data) > MEMORY:
            raise NotSupported("no memory there")
        self.memory[address : address + len(data)] = data

    def set_stops(self, stops: Stops) -> None:
        if any(each.size > 16 for each in stops.watchpoints):
            raise NotSupported("a watchpoint of more than 16 bytes")
        self.stops = stops

    def monitor(self, words: str) -> str:
        return f"<{words}>\n"


def packets(data: bytes) -> list[bytes]:
    """The data of the packets among these bytes."""
    return [each.data for each in Decoder().feed(data) if isinstance(each, Packet)]


def ask(session: Session, data: bytes) -> bytes:
    (answer,) = packets(session.receive(encode(data)))
    return answer


@pytest.fixture
def session() -> Session:
    return Session(Guest())


def test_packets_are_the_same_wherever_they_are_cut() -> None:
    data = bytes(range(256)) * 2
    stream = b"+" + encode(data) + b"\x03-" + encode(b"") + b"$broken" + encode(b"g")
    whole = list(Decoder().feed(stream))
    assert [type(each).__name__ for each in whole] == [
        "Packet", "Interrupt", "Again", "Packet", "Packet",
    ]  # fmt: skip
    assert packets(stream) == [data, b"", b"g"]
    for cut in range(len(stream)):
        decoder = Decoder()
        parts = [*decoder.feed(stream[:cut]), *decoder.feed(stream[cut:])]
        assert [vars_of(each) for each in parts] == [vars_of(each) for each in whole]


def vars_of(each: object) -> object:
    return (each.data, each.intact) if isinstance(each, Packet) else type(each)


def test_a_packet_has_a_maximum() -> None:
    list(Decoder().feed(encode(bytes(PACKET_MAX))))
    with pytest.raises(ProtocolError):
        list(Decoder().feed(b"$" + bytes(PACKET_MAX + 1)))


def test_acknowledgements(session: Session) -> None:
    assert session.receive(b"$g#00") == b"-"
    answer = session.receive(encode(b"qC"))
    assert answer == b"+" + encode(b"QC1")
    assert session.receive(b"-") == encode(b"QC1")
    assert session.receive(encode(b"QStartNoAckMode")) == b"+" + encode(b"OK")
    assert session.receive(b"-" + encode(b"qC")) == encode(b"QC1")


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
def test_registers_are_what_the_description_says(architecture: str) -> None:
    module: Any = x86_64 if architecture == "x86_64" else aarch64
    description = gdb_registers.of(architecture)
    state = module.initial_state(0x100000, MEMORY)
    if architecture == "x86_64":
        state = replace(state, fpu=x86_64.Fpu())
    sizes = [int(bits) // 8 for bits in re.findall(rb'bitsize="(\d+)"', description.xml())]
    assert sizes == [len(description.read(state, at)) for at in range(len(sizes))]
    assert len(description.read_all(state)) == sum(sizes)
    for number, register in enumerate(description.registers):
        if register.write is None or register.name in ("fop", "ftag", "cpsr"):
            continue
        mask = b"\xff\xff\0\0" if register.name in _HALVES else b"\xff" * register.size
        value = bytes(at * 7 & 0xFF & mask[at] for at in range(register.size))
        changed = description.write(state, number, value)
        assert description.read(changed, number) == value, register.name
        assert description.write_all(state, description.read_all(changed)) == changed


_HALVES = ("fctrl", "fstat", "fiseg", "foseg")


def test_the_x87_tag_word() -> None:
    one = b"\0\0\0\0\0\0\0\x80\xff\x3f"
    st = (one, bytes(10), b"\1" + bytes(9), *[bytes(10)] * 5)
    # Three values were pushed: the top is physical register 5.
    fpu = x86_64.Fpu(fsw=5 << 11, ftwx=0b11100000, st=st)
    assert gdb_registers.tag_word(fpu) == 0b10_01_00_1111111111


def test_what_a_debugger_may_not_set(session: Session) -> None:
    assert ask(session, b"P10=0010100000000000") == b"OK"
    assert ask(session, b"p10") == b"0010100000000000"
    assert ask(session, b"P12=00000000") == b"E.cs can be read only"
    for wrong in (b"Pff=00", b"P10=00", b"P10=", b"P=00", b"pff", b"G00", b"P10=zz", b"p"):
        assert ask(session, wrong) == b"E22", wrong


def test_memory(session: Session) -> None:
    assert ask(session, b"M1000,3:616263") == b"OK"
    assert ask(session, b"m1000,4") == b"61626300"
    assert ask(session, b"X1001,3:#$}") == b"OK"
    assert ask(session, b"m1000,4") == b"6123247d"
    assert ask(session, b"X1000,0:") == b"OK"
    assert ask(session, b"mfffff,10") == b"00"
    assert ask(session, b"m100000,1") == b"E14"
    assert ask(session, b"mffffffffffffffff,8") == b"E14"
    assert ask(session, b"M100000,1:00") == b"E.no memory there"
    assert len(ask(session, b"m0,100000")) < PACKET_MAX
    for wrong in (b"m", b"m1000", b"m1000,", b"m-1,1", b"m1,1,1", b"M0,2:61", b"X0,1:", b"m0x1,1"):
        assert ask(session, wrong) == b"E22", wrong


def test_breakpoints_and_watchpoints(session: Session) -> None:
    assert ask(session, b"qSupported:swbreak+;hwbreak-") == ask(session, b"qSupported:swbreak+")
    for _ in range(2):  # gdb sets and removes some twice
        assert ask(session, b"Z0,100000,1") == b"OK"
        assert ask(session, b"Z1,100010,1") == b"OK"
    assert ask(session, b"Z2,2000,8") == b"OK"
    assert ask(session, b"Z4,3000,4") == b"OK"
    assert (session.stops.breakpoints, session.stops.hardware) == ((0x100000,), (0x100010,))
    assert ask(session, b"Z3,4000,10") == b"OK"
    assert packets(session.stopped(5, "breakpoint", pc=0x100000)) == [b"T05thread:1;swbreak:;"]
    assert packets(session.stopped(5, "breakpoint", pc=0x100010)) == [b"T05thread:1;"]
    assert packets(session.stopped(5, "write", 0x2004)) == [b"T05thread:1;watch:2004;"]
    assert packets(session.stopped(5, "read", 0x3000)) == [b"T05thread:1;awatch:3000;"]
    assert packets(session.stopped(5, "read", 0x4008)) == [b"T05thread:1;rwatch:4008;"]
    assert ask(session, b"?") == b"T05thread:1;rwatch:4008;"
    for removed in (b"z0,100000,1", b"z0,100000,1", b"z1,100010,1", b"z2,2000,8", b"z4,3000,4"):
        assert ask(session, removed) == b"OK"
    assert ask(session, b"z3,4000,10") == b"OK"
    assert session.stops == Stops()
    assert ask(session, b"Z2,2000,11") == b"E.a watchpoint of more than 16 bytes"
    assert session.stops == Stops()
    assert ask(session, b"Z5,2000,9") == b""


def test_a_running_guest_takes_ctrl_c_and_nothing_else(session: Session) -> None:
    assert session.receive(b"\x03") == b""
    assert not session.interrupted  # it stood
    assert packets(session.receive(encode(b"vCont;c"))) == []
    assert session.action == "continue"
    assert session.receive(encode(b"qC") + b"\x03") == b"+"
    assert session.interrupted
    assert packets(session.stopped(2)) == [b"T02thread:1;", b"QC1"]
    assert session.action is None
    session.receive(encode(b"vCont;s:1;c"))
    assert session.action == "step"
    with pytest.raises(ProtocolError):
        session.receive(encode(b"g") * (1 << 16))


def test_transfers_in_parts(session: Session) -> None:
    whole, part = b"", b"m"
    while part.startswith(b"m"):
        part = ask(session, b"qXfer:features:read:target.xml:%x,100" % len(whole))
        whole += part[1:]
    assert part.startswith(b"l")
    assert whole == Guest().xml()
    assert ask(session, b"qXfer:exec-file:read:1:0,fff") == b"l/kernel.hvt"
    assert b'length="0x100000"' in ask(session, b"qXfer:memory-map:read::0,fff")
    assert ask(session, b"qXfer:auxv:read::0,fff") == b"E00"
    assert ask(session, b"qXfer:features:write:target.xml:0,1") == b""
    assert ask(session, b"qXfer:features:read:target.xml:ffffffffffffffff,1") == b"l"
    assert ask(session, b"qXfer:") == b"E22"


def test_the_rest(session: Session) -> None:
    assert bytes.fromhex(ask(session, b"qRcmd," + b"a b".hex().encode()).decode()) == b"<a b>\n"
    assert ask(session, b"qRcmd,zz") == b"E22"
    for unknown in (b"vMustReplyEmpty", b"", b"QThreadSuffixSupported", b"jThreadsInfo", b"vCtrlC"):
        assert ask(session, unknown) == b""
    assert ask(session, b"D;1") == b"OK"
    assert session.action == "detach"


WORDS = [
    b"qSupported:", b"QStartNoAckMode", b"qXfer:features:read:target.xml:", b"g", b"G", b"p", b"P",
    b"m", b"M", b"X", b"Z0,", b"Z2,", b"z0,", b"z4,", b"vCont;", b"qRcmd,", b"H", b"?", b"k", b"D",
    b"c", b"s", b"vKill", b"qXfer:exec-file:read::", b"T", b"-", b"+", b"\x03",
]  # fmt: skip
PIECES = [b"0", b"1", b"fff", b"100000", b",", b":", b";", b"=", b"}", b"$", b"#", b"*", b"ff" * 20]


def nonsense(source: random.Random, count: int) -> None:
    """Feed sessions packets that are wrong in some way: they answer, or end by ProtocolError."""
    session = Session(Guest())
    for _ in range(count):
        if source.random() < 0.1:
            data = source.randbytes(source.randrange(40))
        else:
            data = source.choice(WORDS)
            data += b"".join(source.choice(PIECES) for _ in range(source.randrange(6)))
        stream = encode(data) if source.random() < 0.8 else data
        cut = source.randrange(len(stream) + 1)
        try:
            sent = session.receive(stream[:cut])
            sent += session.receive(stream[cut:])
            if session.action is not None and source.random() < 0.9:
                sent += session.stopped(5, source.choice(["", "step", "breakpoint", "write"]))
        except ProtocolError:
            session = Session(Guest())
            continue
        assert all(len(each) <= 2 * PACKET_MAX for each in packets(sent))


def test_nonsense() -> None:
    nonsense(random.Random(1), 5000)


def test_an_interrupt_is_a_byte_outside_of_packets() -> None:
    events = list(Decoder().feed(b"\x03" + encode(b"\x03")))
    assert isinstance(events[0], Interrupt)
    assert packets(encode(b"\x03")) == [b"\x03"]
