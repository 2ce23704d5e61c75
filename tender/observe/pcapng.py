"""The blocks of a pcapng file, for Wireshark and tcpdump.

Little-endian, Ethernet, nanoseconds. Source: draft-ietf-opsawg-pcapng (section header, interface
description, enhanced packet blocks).
"""

from __future__ import annotations

import struct

from tender._native import ffi, lib

INBOUND, OUTBOUND = lib.PCAP_INBOUND, lib.PCAP_OUTBOUND  # as the interface's owner sees it

_SECTION, _INTERFACE = 0x0A0D0D0A, 1
_BYTE_ORDER_MAGIC = 0x1A2B3C4D
_ETHERNET = 1  # LINKTYPE_ETHERNET
_END, _COMMENT = 0, 1
_SHB_USERAPPL = 4
_IF_NAME, _IF_TSRESOL = 2, 9


def section(comment: str = "") -> bytes:
    """The head of a file; `comment` is about the whole of it."""
    head = struct.pack("<IHHq", _BYTE_ORDER_MAGIC, 1, 0, -1)
    options = _options((_COMMENT, comment.encode()), (_SHB_USERAPPL, b"ptender"))
    return _block(_SECTION, head + options)


def interface(name: str) -> bytes:
    """An interface; packets name it by its number, from 0."""
    head = struct.pack("<HHI", _ETHERNET, 0, 0)
    return _block(_INTERFACE, head + _options((_IF_NAME, name.encode()), (_IF_TSRESOL, b"\x09")))


def packet(number: int, time_ns: int, direction: int, frame: bytes, comment: str = "") -> bytes:
    """A packet of interface `number`, at `time_ns` since the epoch."""
    data, text = ffi.from_buffer(frame), ffi.new("char[]", comment.encode())
    given = ffi.new("struct pcap_packet *", {
        "interface": number, "direction": direction, "time_ns": time_ns & (1 << 64) - 1,
        "length": len(frame), "frame": data, "comment": text,
    })  # fmt: skip
    block = ffi.new("char[]", lib.PCAP_ROOM)
    return bytes(ffi.buffer(block, lib.pcap_block(block, given)))


def _block(kind: int, body: bytes) -> bytes:
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _options(*options: tuple[int, bytes]) -> bytes:
    given = [(code, value) for code, value in options if value]
    parts = [struct.pack("<HH", code, len(value)) + _padded(value) for code, value in given]
    return b"".join(parts) + struct.pack("<HH", _END, 0)
