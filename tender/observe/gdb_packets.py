"""The packets of gdb's remote protocol, as functions of bytes.

Source: gdb's manual, appendix E. What comes from a debugger is hostile: a packet has a maximum
length, and what does not have the shape of one is skipped.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PACKET_MAX = 0x4000  # bytes of a packet's data, as they are sent
WAITING_MAX = 1 << 18  # bytes that a debugger may send ahead
_ESCAPED = b"#$}*"
CTRL_C, DOLLAR, MINUS = b"\x03$-"


class ProtocolError(Exception):
    """This is no debugger, or one that has lost its way: its connection ends."""


class Packet:
    """The data of a packet; `intact`: its checksum is right."""

    __slots__ = ("data", "intact")

    def __init__(self, data: bytes, intact: bool = True) -> None:
        self.data = data
        self.intact = intact


class Interrupt:
    """Ctrl-C."""


class Again:
    """The last answer was damaged on its way."""


def encode(data: bytes) -> bytes:
    """A packet with this data."""
    if any(byte in data for byte in _ESCAPED):
        data = b"".join(
            bytes((0x7D, byte ^ 0x20)) if byte in _ESCAPED else bytes((byte,)) for byte in data
        )
    return b"$%b#%02x" % (data, sum(data) & 0xFF)


def _decode(data: bytes) -> bytes:
    first, *escaped = data.split(b"}")
    return first + b"".join(bytes((part[0] ^ 0x20,)) + part[1:] for part in escaped if part)


class Decoder:
    """What a debugger sends, cut into packets."""

    def __init__(self) -> None:
        self._waiting, self._at = b"", 0

    def feed(self, data: bytes) -> Iterator[Packet | Interrupt | Again]:
        """What is complete with `data`. Raises ProtocolError for a packet that is too long."""
        self._waiting = self._waiting[self._at :] + data
        self._at = 0
        while self._at < len(self._waiting):
            begin = self._waiting[self._at]
            if begin == DOLLAR:
                packet = self._packet()
                if packet is None:
                    return
                yield packet
                continue
            self._at += 1
            if begin == CTRL_C:
                yield Interrupt()
            elif begin == MINUS:
                yield Again()

    def _packet(self) -> Packet | None:
        """Take the packet at the beginning, if all of it is there."""
        end = self._waiting.find(b"#", self._at)
        # Data has no $: a packet was cut, and here is another one.
        self._at = self._waiting.rfind(b"$", self._at, end if end >= 0 else None)
        data = self._waiting[self._at + 1 : end if end >= 0 else None]
        if len(data) > PACKET_MAX:
            raise ProtocolError("a packet that is too long")
        if end < 0 or len(self._waiting) < end + 3:
            return None
        digits = self._waiting[end + 1 : end + 3]
        self._at = end + 3
        intact = digits.lower() == b"%02x" % (sum(data) & 0xFF)
        return Packet(_decode(data) if intact else b"", intact)


def number(text: bytes) -> int:
    """A number in hex of at most 64 bits; raises ValueError."""
    if not 0 < len(text) <= 16 or text.strip(b"0123456789abcdefABCDEF"):
        raise ValueError(text)
    return int(text, 16)


def numbers(text: bytes, count: int, separator: bytes = b",") -> list[int]:
    """So many of them; raises ValueError."""
    parts = text.split(separator)
    if len(parts) != count:
        raise ValueError(text)
    return [number(part) for part in parts]
