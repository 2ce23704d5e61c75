"""A session with gdb or lldb: what each packet asks of a guest that stands still, and the answer.

It does no I/O: `receive` takes bytes and returns bytes. Source: gdb's manual, appendix E; what
lldb needs beside it was found by looking at what lldb 14 sends.
"""

from __future__ import annotations

from collections import deque

from tender.cpu.vcpu import NotSupported, Stops, Watchpoint
from tender.dataclass import replace
from tender.errors import TenderError
from tender.observe.gdb_packets import (
    PACKET_MAX,
    WAITING_MAX,
    Again,
    Decoder,
    Interrupt,
    Packet,
    ProtocolError,
    encode,
    number,
    numbers,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Target(Protocol):
        """A guest that stands still. Each method may raise TenderError or NotSupported."""

        path: str  # of the kernel
        joined: bool  # it was running already, and is to go on when the debugger leaves

        def xml(self) -> bytes: ...
        def memory_map(self) -> list[tuple[int, int]]:
            """The memory as (address, size)."""

        def read_registers(self) -> bytes: ...
        def write_registers(self, data: bytes) -> None: ...
        def read_register(self, number: int) -> bytes: ...
        def write_register(self, number: int, data: bytes) -> None: ...
        def read_memory(self, address: int, size: int) -> bytes:
            """As much as there is; empty: there is nothing."""

        def write_memory(self, address: int, data: bytes) -> None: ...
        def set_stops(self, stops: Stops) -> None: ...
        def monitor(self, words: str) -> str:
            """What a command that is not gdb's own prints."""


SIGINT, SIGILL, SIGTRAP, SIGABRT, SIGSEGV, SIGSYS = 2, 4, 5, 6, 11, 12  # gdb's own numbers
STOPS_MAX = 4096  # breakpoints and watchpoints
NO_MEMORY = b"E14"
_PACKET_BYTES = 100  # what a packet takes beside its data
OK = b"OK"
_DATA_MAX = PACKET_MAX // 2 - 16  # bytes of memory in one packet
_FEATURES = (
    b"PacketSize=%x;QStartNoAckMode+;vContSupported+;swbreak+;hwbreak+;qXfer:features:read+;"
    b"qXfer:memory-map:read+;qXfer:exec-file:read+;error-message+" % PACKET_MAX
)
_MAP = (
    '<?xml version="1.0"?><!DOCTYPE memory-map PUBLIC "+//IDN gnu.org//DTD GDB Memory Map V1.0//EN"'
    ' "http://sourceware.org/gdb/gdb-memory-map.dtd"><memory-map>{}</memory-map>'
)
# What x86 and aarch64 have in common: 0 and 1 break, 2 watches writes, 3 reads, 4 both.
_SOFTWARE, _HARDWARE, _WRITE, _READ, _ACCESS = range(5)


class Session:
    """One debugger, from its connection to its leaving.

    `action` is what it wants of the guest: None (it stands still), "continue", "step", "detach" or
    "kill"; `interrupted`: it wants a running guest to stop.
    """

    def __init__(self, target: Target) -> None:
        self.action: str | None = None
        self.interrupted = False
        self.stops = Stops()
        self._target = target
        self._decoder = Decoder()
        self._waiting: deque[Packet] = deque()
        self._waiting_bytes = 0
        self._acknowledges = True
        self._last = b""  # the last packet that was sent
        self._reason = b"T05thread:1;"
        self._agreed: frozenset[bytes] = frozenset()

    # Input and output.

    def receive(self, data: bytes) -> bytes:
        """Take what was received; what to send. Raises ProtocolError."""
        sent = b""
        for each in self._decoder.feed(data):
            if isinstance(each, Interrupt):
                self.interrupted = self.action is not None
            elif isinstance(each, Again):
                sent += self._last if self._acknowledges else b""
            else:
                sent += self._acknowledge(each)
                if each.intact:
                    self._waiting.append(each)
                    self._waiting_bytes += len(each.data) + _PACKET_BYTES
            if self._waiting_bytes > WAITING_MAX:
                raise ProtocolError("packets that do not wait for the guest to stop")
            sent += self._answers()
        return sent

    def _acknowledge(self, packet: Packet) -> bytes:
        if not self._acknowledges:
            return b""
        return b"+" if packet.intact else b"-"

    def _answers(self) -> bytes:
        sent = b""
        while self._waiting and self.action is None:
            data = self._waiting.popleft().data
            self._waiting_bytes -= len(data) + _PACKET_BYTES
            answer = self._answer(data)
            if answer is not None:
                self._last = encode(answer)
                sent += self._last
        return sent

    def _answer(self, data: bytes) -> bytes | None:
        for name, handler in _HANDLERS:
            if data.startswith(name):
                try:
                    return handler(self, data[len(name) :])
                except (ValueError, IndexError):
                    return b"E22"  # EINVAL
                except (TenderError, NotSupported) as error:
                    return b"E." + str(error).encode(errors="replace")
        return b""

    def stopped(self, signal: int, reason: str = "", address: int = 0, pc: int = 0) -> bytes:
        """The guest has stopped: by a signal, in gdb's numbers, and for a reason as in cpu.Debug.

        What to send.
        """
        self.action, self.interrupted = None, False
        self._reason = b"T%02xthread:1;" % signal + self._describe(reason, address, pc)
        self._last = encode(self._reason)
        return self._last + self._answers()

    def _describe(self, reason: str, address: int, pc: int) -> bytes:
        if reason == "breakpoint":
            name = b"hwbreak" if pc in self.stops.hardware else b"swbreak"
            return name + b":;" if name in self._agreed else b""
        for each in self.stops.watchpoints if reason in ("read", "write") else ():
            if each.address <= address < each.address + each.size and getattr(each, reason):
                kind = b"" if each.write else b"r"
                kind = b"a" if each.read and each.write else kind
                return b"%swatch:%x;" % (kind, address)
        return b""

    def exited(self, status: int) -> bytes:
        """The guest has ended by itself; what to send."""
        return encode(b"W%02x" % (status & 0xFF))

    def killed(self, signal: int) -> bytes:
        """The guest was ended; what to send."""
        return encode(b"X%02x" % signal)

    @staticmethod
    def say(text: str) -> bytes:
        """A line for whoever sits before the debugger, while the guest runs; what to send."""
        return encode(b"O" + text.encode(errors="replace").hex().encode())

    # What packets ask for. None: nothing is answered now.

    def _supported(self, rest: bytes) -> bytes:
        self._agreed = frozenset(
            word[:-1] for word in rest.lstrip(b":").split(b";") if word.endswith(b"+")
        )
        return _FEATURES

    def _no_acknowledgements(self, _: bytes) -> bytes:
        self._acknowledges = False
        return OK

    def _why(self, _: bytes) -> bytes:
        return self._reason

    def _attached(self, _: bytes) -> bytes:
        return b"1" if self._target.joined else b"0"

    def _transfer(self, rest: bytes) -> bytes:
        """`OBJECT:read:ANNEX:OFFSET,LENGTH`."""
        kind, verb, annex, place = rest.split(b":")
        offset, length = numbers(place, 2)
        if verb != b"read":
            return b""
        if kind == b"features" and annex == b"target.xml":
            whole = self._target.xml()
        elif kind == b"memory-map":
            whole = self._memory_map()
        elif kind == b"exec-file":
            whole = self._target.path.encode(errors="surrogateescape")
        else:
            return b"E00"
        part = whole[offset : offset + min(length, _DATA_MAX)]
        return (b"m" if offset + len(part) < len(whole) else b"l") + part

    def _memory_map(self) -> bytes:
        return _MAP.format(
            "".join(
                f'<memory type="ram" start="{start:#x}" length="{size:#x}"/>'
                for start, size in self._target.memory_map()
            )
        ).encode()

    def _read_registers(self, _: bytes) -> bytes:
        return self._target.read_registers().hex().encode()

    def _write_registers(self, rest: bytes) -> bytes:
        self._target.write_registers(_unhex(rest))
        return OK

    def _read_register(self, rest: bytes) -> bytes:
        return self._target.read_register(number(rest)).hex().encode()

    def _write_register(self, rest: bytes) -> bytes:
        which, _, value = rest.partition(b"=")
        self._target.write_register(number(which), _unhex(value))
        return OK

    def _read_memory(self, rest: bytes) -> bytes:
        address, size = numbers(rest, 2)
        data = self._target.read_memory(address, min(size, _DATA_MAX))
        return data.hex().encode() if data or not size else NO_MEMORY

    def _write_memory(self, rest: bytes) -> bytes:
        place, _, value = rest.partition(b":")
        return self._write(place, _unhex(value))

    def _write_binary(self, rest: bytes) -> bytes:
        place, _, value = rest.partition(b":")
        return self._write(place, value)

    def _write(self, place: bytes, data: bytes) -> bytes:
        address, size = numbers(place, 2)
        if size != len(data):
            raise ValueError(place)
        if data:
            self._target.write_memory(address, data)
        return OK

    def _insert(self, rest: bytes) -> bytes:
        return self._set_stop(rest, True)

    def _remove(self, rest: bytes) -> bytes:
        return self._set_stop(rest, False)

    def _set_stop(self, rest: bytes, insert: bool) -> bytes:
        """`TYPE,ADDRESS,KIND`."""
        kind, address, size = numbers(rest.partition(b";")[0], 3)
        stops = self.stops
        if kind == _SOFTWARE:
            stops = replace(stops, breakpoints=_changed(stops.breakpoints, address, insert))
        elif kind == _HARDWARE:
            stops = replace(stops, hardware=_changed(stops.hardware, address, insert))
        elif kind <= _ACCESS and size:
            watch = Watchpoint(address, size, kind in (_READ, _ACCESS), kind in (_WRITE, _ACCESS))
            stops = replace(stops, watchpoints=_changed(stops.watchpoints, watch, insert))
        else:
            return b""
        if len(stops.breakpoints) + len(stops.hardware) + len(stops.watchpoints) > STOPS_MAX:
            raise NotSupported(f"no more than {STOPS_MAX} breakpoints")
        self._target.set_stops(stops)
        self.stops = stops
        return OK

    def _resume(self, rest: bytes) -> bytes | None:
        """`vCont;ACTION[:THREAD]...`: the first action is that of the only thread."""
        action = rest[:1]
        if action in (b"c", b"C"):
            return self._go("continue")
        return self._go("step") if action in (b"s", b"S") else b""

    def _go(self, action: str) -> bytes | None:
        self.action = action
        return None

    def _continue(self, rest: bytes) -> bytes | None:
        return b"" if rest else self._go("continue")

    def _step(self, rest: bytes) -> bytes | None:
        return b"" if rest else self._go("step")

    def _detach(self, _: bytes) -> bytes:
        self.action = "detach"
        return OK

    def _kill(self, _: bytes) -> None:
        self.action = "kill"

    def _kill_answered(self, _: bytes) -> bytes:
        self.action = "kill"
        return OK

    def _monitor(self, rest: bytes) -> bytes:
        text = self._target.monitor(_unhex(rest).decode(errors="replace"))
        return text.encode()[:_DATA_MAX].hex().encode()


def _unhex(text: bytes) -> bytes:
    return bytes.fromhex(text.decode("ascii"))


def _changed(values: tuple, value: object, insert: bool) -> tuple:  # type: ignore[type-arg]
    """With or without `value`, once."""
    rest = tuple(each for each in values if each != value)
    return (*rest, value) if insert else rest


def _constant(answer: bytes) -> Callable[[Session, bytes], bytes]:
    return lambda _session, _rest: answer


# By what a packet begins with: the first that fits.
_HANDLERS: tuple[tuple[bytes, Callable[[Session, bytes], bytes | None]], ...] = (
    (b"qSupported", Session._supported),
    (b"QStartNoAckMode", Session._no_acknowledgements),
    (b"vMustReplyEmpty", _constant(b"")),
    (b"qXfer:", Session._transfer),
    (b"qAttached", Session._attached),
    (b"qOffsets", _constant(b"Text=0;Data=0;Bss=0")),  # lldb places no symbols without it
    (b"qfThreadInfo", _constant(b"m1")),
    (b"qsThreadInfo", _constant(b"l")),
    (b"qRcmd,", Session._monitor),
    (b"qC", lambda _session, rest: b"" if rest else b"QC1"),
    (b"vCont?", _constant(b"vCont;c;C;s;S")),
    (b"vCont;", Session._resume),
    (b"vKill", Session._kill_answered),
    (b"?", Session._why),
    (b"g", Session._read_registers),
    (b"G", Session._write_registers),
    (b"p", Session._read_register),
    (b"P", Session._write_register),
    (b"m", Session._read_memory),
    (b"M", Session._write_memory),
    (b"X", Session._write_binary),
    (b"Z", Session._insert),
    (b"z", Session._remove),
    (b"H", _constant(OK)),
    (b"T", _constant(OK)),
    (b"c", Session._continue),
    (b"s", Session._step),
    (b"D", Session._detach),
    (b"k", Session._kill),
)
