"""An image is accepted, or it is an ImageError: nothing else can come out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tender._native import lib
from tender.errors import ImageError
from tender.image import elf
from tender.image.manifest import Device, Manifest
from tests.unit import elves

NET = Device("service", lib.MFT_DEV_NET_BASIC, 1)
BLOCK = Device("storage", lib.MFT_DEV_BLOCK_BASIC, 2)


def test_an_image_says_what_it_is() -> None:
    image = elves.parse(elves.image(devices=(NET, BLOCK)))
    assert (image.machine, image.target, image.abi_version) == (elf.EM_X86_64, 1, 2)
    assert image.entry == elves.BASE
    assert image.manifest == Manifest((NET, BLOCK))
    (segment,) = image.segments
    assert (segment.start, segment.end) == (0x100000, 0x101000)
    assert segment.protection == "r-x"
    assert image.kernel_end == 0x101000


def load(offset: int = 0x1000, size: int = 1, vaddr: int = elves.BASE, **changes: int) -> bytes:
    return elves.phdr(elf.PT_LOAD, offset, size, vaddr, **changes)


def test_what_has_nothing_in_the_file_is_not_loaded() -> None:
    bss = load(0, 0, 0x200000, memsz=0x5000)
    odd = load(0x270, 0, 0, memsz=0)
    image = elves.parse(elves.image(segments=[load(), odd, bss]))
    assert len(image.segments) == 1
    assert image.kernel_end == 0x101000
    assert image.memory_end == 0x205000


def test_bytes_past_the_file_size_count_as_memory() -> None:
    image = elves.parse(elves.image(segments=[load(memsz=0x3001)]))
    assert image.kernel_end == 0x104000


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([load(vaddr=0xFF000)], "below 0x100000"),
        ([load(vaddr=0x100800, align=0x100000)], None),
        ([load(vaddr=0x180000, align=0x200000)], "below 0x100000"),
        ([load(align=0x1800)], "not a power of two"),
        ([load(vaddr=0x100010, align=0x10)], "does not fill pages"),
        ([load(size=2, memsz=1)], "smaller in memory"),
        ([load(memsz=(1 << 64) - 1)], "overflows"),
        ([load(vaddr=(1 << 64) - 0x1000, memsz=0x2000)], "overflows"),
        ([load(offset=(1 << 63) - 1)], "overflows"),
        ([load(flags=7)], "both writable and executable"),
        ([load(), load(vaddr=0x100800)], "overlaps"),
        ([load(vaddr=0x102000), load()], "overlaps"),
        ([load(size=0)], "nothing to load"),
    ],
)
def test_segments_are_checked(segments: list[bytes], message: str | None) -> None:
    data = elves.image(segments=segments)
    if message is None:
        elves.parse(data)
        return
    with pytest.raises(ImageError, match=message):
        elves.parse(data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"type": 3}, "not a static executable"),
        ({"machine": 3}, "machine type 3"),
        ({"entry": 0xFFFFF}, "entry point"),
        ({"phnum": 0}, "program headers"),
        ({"phentsize": 32}, "program headers"),
        ({"phoff": 1 << 63}, "truncated"),
        ({"phnum": 65535}, "too many program headers"),
    ],
)
def test_headers_are_checked(header: dict[str, int], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        elves.parse(elves.image(**header))  # type: ignore[arg-type]


MANIFEST = elves.manifest_note(Manifest((NET,)))


def with_descsz(note: bytes, descsz: int) -> bytes:
    return note[:4] + descsz.to_bytes(4, "little") + note[8:]


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ([elves.abi_note(target=3), MANIFEST], "not for the solo5-hvt or solo5-spt .*virtio"),
        ([elves.abi_note(target=77), MANIFEST], "not for the solo5-hvt or solo5-spt target"),
        ([elves.abi_note(target=2, version=1), MANIFEST], "unsupported ABI version 1"),
        ([elves.abi_note(version=3), MANIFEST], "unsupported ABI version 3"),
        ([MANIFEST], "No Solo5 ABI information found"),
        ([elves.abi_note()], "No Solo5 manifest found in executable"),
        ([elves.abi_note(), MANIFEST[:11]], "shorter than a note header"),
        ([elves.abi_note(), with_descsz(MANIFEST, 0)], "note does not fall within valid size"),
        ([elves.abi_note(), with_descsz(MANIFEST, 3)], "note does not fall within valid size"),
        ([elves.abi_note(), with_descsz(MANIFEST, 1 << 31)], "note does not fall within valid"),
        ([elves.abi_note(), with_descsz(MANIFEST, 9000)], "note does not fall within valid size"),
        ([elves.abi_note(), MANIFEST[:-1]], "note does not fall within valid size"),
        ([with_descsz(elves.abi_note(), 17), MANIFEST], "note does not fall within valid size"),
        ([elves.abi_note(), with_descsz(MANIFEST, 4 + 8 + 104)], "manifest is invalid"),
    ],
)
def test_notes_are_checked(notes: list[bytes], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        elves.parse(elves.image(notes=notes))


def test_notes_of_others_are_skipped() -> None:
    other = bytearray(elves.abi_note(target=9))
    other[12:16] = b"Solo"[::-1]
    elves.parse(elves.image(notes=[bytes(other), elves.abi_note(), MANIFEST]))


def test_63_devices_fit_and_their_handles_are_their_places() -> None:
    devices = tuple(Device(f"d{n}", lib.MFT_DEV_BLOCK_BASIC, n) for n in range(1, 64))
    manifest = elves.parse(elves.image(devices=devices)).manifest
    assert [device.handle for device in manifest.devices] == list(range(1, 64))


def of_segments(count: int) -> bytes:
    return elves.image(
        segments=[
            elves.phdr(elf.PT_LOAD, 0x10000 + n * 0x1000, 0x1000, elves.BASE + n * 0x2000)
            for n in range(count)
        ]
    )


def test_the_number_of_segments_is_bounded() -> None:
    assert len(elves.parse(of_segments(64)).segments) == 64
    with pytest.raises(ImageError, match="too many segments to load: 65, maximum 64"):
        elves.parse(of_segments(65))
    with pytest.raises(ImageError, match="too many program headers: 257, maximum 256"):
        elves.parse(elves.image(phnum=257))


@pytest.mark.parametrize("offset", [0x1000, 0x1001, 0x1FFF])
def test_segments_do_not_share_bytes_of_the_file(offset: int) -> None:
    """Else a small file could fill the guest's memory, and cost as much as a large one."""
    first = elves.phdr(elf.PT_LOAD, 0x1000, 0x1000, elves.BASE + 0x2000)
    second = elves.phdr(elf.PT_LOAD, offset, 0x1000, elves.BASE + 0x4000)
    with pytest.raises(ImageError, match="segments at 0x10[24]000 and 0x10[24]000 share bytes"):
        elves.parse(elves.image(segments=[first, second]))


@pytest.mark.parametrize("data", [b"", b"\x7f", b"\x7fELF", b"#!/bin/sh\n", b"\0" * 4096])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"not an ELF|truncated"):
        elves.parse(data)


GOOD = elves.image(devices=(NET, BLOCK))


def test_every_truncation_is_refused_or_harmless() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(ImageError):
            elves.parse(GOOD[:length])


def test_every_flipped_byte_is_accepted_or_refused() -> None:
    headers = range(64 + 3 * 56)
    for at in [*headers, *range(elves.DATA_OFFSET, len(GOOD))]:
        for flip in (0x01, 0x80, 0xFF):
            data = bytearray(GOOD)
            data[at] ^= flip
            accepts_or_refuses(bytes(data))


def accepts_or_refuses(data: bytes) -> None:
    try:
        image = elves.parse(data)
    except ImageError as error:
        assert "\n" not in str(error)
        return
    for segment in image.segments:
        assert elves.BASE <= segment.start <= segment.vaddr
        assert segment.vaddr + segment.memsz <= segment.end < 1 << 64
        assert segment.start % 4096 == segment.end % 4096 == 0
        assert not (segment.writable and segment.executable)


@given(st.binary(max_size=400))
def test_any_bytes(data: bytes) -> None:
    accepts_or_refuses(elf.IDENT + data)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 64 + 3 * 56 - 1), st.integers(0, 255)), max_size=8))
def test_any_headers(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    accepts_or_refuses(bytes(data))
