"""Small hvt images made in memory, for tests that need no compiler."""

from __future__ import annotations

import struct

from tender._native import lib
from tender.image import elf
from tender.image.manifest import Device, Manifest, encode

BASE = lib.HVT_GUEST_MIN_BASE
DATA_OFFSET = 0x1000  # of the first segment in the file


def note(kind: int, start: int, desc: bytes) -> bytes:
    padding = start - elf.NOTE_DESC_START
    head = elf.NHDR.pack(len(elf.NOTE_NAME), padding + len(desc), kind)
    return (head + elf.NOTE_NAME).ljust(elf.NOTE_DESC_START + padding, b"\0") + desc


def abi_note(target: int = 1, version: int = 2) -> bytes:
    return note(
        lib.ABI1_NOTE_TYPE, lib.ABI1_NOTE_DESC_OFFSET, struct.pack("<4I", target, version, 0, 0)
    )


def manifest_note(manifest: Manifest) -> bytes:
    return note(lib.MFT1_NOTE_TYPE, lib.MFT1_NOTE_DESC_OFFSET, encode(manifest))


def phdr(kind: int, offset: int, size: int, vaddr: int = 0, **changes: int) -> bytes:
    fields = {"flags": 4, "filesz": size, "memsz": size, "align": 0x1000} | changes
    return elf.PHDR.pack(
        kind,
        fields["flags"],
        offset,
        vaddr,
        vaddr,
        fields["filesz"],
        fields["memsz"],
        fields["align"],
    )


def image(
    *,
    code: bytes = b"\xf4",
    devices: tuple[Device, ...] = (),
    segments: list[bytes] | None = None,
    notes: list[bytes] | None = None,
    entry: int = BASE,
    **header: int,
) -> bytes:
    """An image of one code segment, or of the program headers given in `segments`."""
    if notes is None:
        notes = [abi_note(), manifest_note(Manifest(devices))]
    if segments is None:
        segments = [phdr(elf.PT_LOAD, DATA_OFFSET, len(code), BASE, flags=elf.PF_R | elf.PF_X)]
    body = code
    headers = list(segments)
    for item in notes:
        headers.append(phdr(elf.PT_NOTE, DATA_OFFSET + len(body), len(item)))
        body += item
    fields = {"type": 2, "machine": 62, "ehsize": 64, "phentsize": 56, "phoff": 64} | header
    ehdr = elf.EHDR.pack(
        elf.IDENT,
        fields["type"],
        fields["machine"],
        1,
        entry,
        fields["phoff"],
        0,
        0,
        fields["ehsize"],
        fields["phentsize"],
        fields.get("phnum", len(headers)),
    ).ljust(elf.EHDR_SIZE, b"\0")
    return (ehdr + b"".join(headers)).ljust(DATA_OFFSET, b"\0") + body


def parse(data: bytes) -> elf.Image:
    return elf.parse(lambda offset, size: data[offset : offset + size])
