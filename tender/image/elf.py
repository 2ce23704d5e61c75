"""The image: an ELF file as bytes, parsed into a value.

The rule here: pure. `parse` either returns an Image whose every number is checked, or raises
ImageError; nothing after it needs to look at a header again. The facts are those of Solo5's
loader for hvt and spt (ABI version 2) and of the ELF64 specification.
"""

from __future__ import annotations

import _struct as struct
from itertools import pairwise

from tender._native import ffi, lib
from tender.boot.layout import PAGE_SIZE
from tender.dataclass import dataclass
from tender.errors import ImageError, ManifestError
from tender.image import manifest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Reader = Callable[[int, int], bytes]  # (offset, size) -> that many bytes, fewer at the end

EM_X86_64 = 62
EM_AARCH64 = 183
MACHINES = {EM_X86_64: "x86_64", EM_AARCH64: "aarch64"}
TARGETS = {1: "hvt", 2: "spt", 3: "virtio", 4: "muen", 5: "genode", 6: "xen"}

VERSIONS = {lib.ABI_TARGET_HVT: lib.HVT_ABI_VERSION, lib.ABI_TARGET_SPT: lib.SPT_ABI_VERSION}

ET_EXEC = 2
PT_LOAD, PT_NOTE = 1, 4
PF_X, PF_W, PF_R = 1, 2, 4

# e_ident[16], type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum
EHDR = struct.Struct("<16sHHIQQQIHHH")
EHDR_SIZE = 64
IDENT = b"\x7fELF\x02\x01\x01"  # 64-bit, little-endian, version 1
# type, flags, offset, vaddr, paddr, filesz, memsz, align
PHDR = struct.Struct("<IIQQQQQQ")
NHDR = struct.Struct("<III")  # namesz, descsz, type
NOTE_NAME = b"Solo5\0"
NOTE_DESC_START = 20  # after the header and the name, padded to 8
BINDINGS_NOTE = NHDR.pack(8, 0, 1) + b"ptender\0"  # of guest-bindings/
LIMIT = 1 << 64  # of an address
FILE_LIMIT = 1 << 63  # of an offset in a file
# Linkers make three to six PT_LOADs and a handful of others; each one costs time at the start.
LOAD_MAX = 64
PHDR_MAX = 256


@dataclass
class Segment:
    """What is loaded: `filesz` bytes of the file from `offset` at guest address `vaddr`.

    `start` and `end` are the page-aligned bounds that get the protection; the bytes from
    vaddr + filesz to vaddr + memsz are zero.
    """

    offset: int
    filesz: int
    vaddr: int
    memsz: int
    start: int
    end: int
    readable: bool
    writable: bool
    executable: bool

    @property
    def protection(self) -> str:
        """What the guest may do with it: p_flags as "r-x", "rw-", ... (ELF-64, figure 7)."""
        flags = ((self.readable, "r"), (self.writable, "w"), (self.executable, "x"))
        return "".join(letter if given else "-" for given, letter in flags)


@dataclass
class Image:
    """A checked image of a target that this tender runs."""

    machine: int  # EM_X86_64 or EM_AARCH64
    target: int
    abi_version: int
    entry: int  # GPA
    segments: tuple[Segment, ...]
    kernel_end: int  # GPA: the highest aligned end of a segment
    memory_end: int  # GPA: the same, with what the image only reserves (see _reserved_end)
    manifest: manifest.Manifest
    ptender_bindings: bool = False  # made by `ptender build`, by a note of its own


@dataclass
class _Phdr:
    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


def parse(read: Reader) -> Image:
    """Read and check an image; raises ImageError without the file's name."""
    machine, entry, headers = _parse_headers(read)
    target, version = _parse_abi(read, headers)
    if target not in VERSIONS:
        name = TARGETS.get(target, f"number {target}")
        raise ImageError(
            f"Executable is not for the solo5-hvt or solo5-spt target (it is for {name})"
        )
    if version != VERSIONS[target]:
        raise ImageError(
            f"Executable requests unsupported ABI version {version}, not {VERSIONS[target]}"
        )
    devices = _parse_manifest(read, headers)
    segments = tuple(_parse_segments(headers))
    if not segments:
        raise ImageError("image has nothing to load")
    if len(segments) > LOAD_MAX:
        raise ImageError(f"too many segments to load: {len(segments)}, maximum {LOAD_MAX}")
    _check_file_bytes(segments)
    if entry < lib.HVT_GUEST_MIN_BASE:
        raise ImageError(f"entry point {entry:#x} is below {lib.HVT_GUEST_MIN_BASE:#x}")
    kernel_end = max(segment.end for segment in segments)
    memory_end = max(kernel_end, _reserved_end(headers))
    bindings = any(
        header.type == PT_NOTE and read(header.offset, len(BINDINGS_NOTE)) == BINDINGS_NOTE
        for header in headers
    )
    return Image(
        machine, target, version, entry, segments, kernel_end, memory_end, devices, bindings
    )


def _reserved_end(headers: list[_Phdr]) -> int:
    """The end of the PT_LOADs that have nothing in the file.

    Solo5's linker script makes one of .bss. Solo5's tender does not look at them, and guests do
    not count on it: they find their heap by a symbol of their own.
    """
    ends = [header.vaddr + header.memsz for header in headers
            if header.type == PT_LOAD and not header.filesz and header.memsz]  # fmt: skip
    return max((end for end in ends if end < LIMIT), default=0)


def _parse_headers(read: Reader) -> tuple[int, int, list[_Phdr]]:
    header = read(0, EHDR_SIZE)
    if header[:4] != IDENT[:4]:
        raise ImageError("not an ELF executable")
    if len(header) < EHDR_SIZE:
        raise ImageError("truncated: shorter than an ELF header")
    if header[: len(IDENT)] != IDENT:
        raise ImageError("not a 64-bit little-endian ELF file")
    fields = EHDR.unpack_from(header)
    _, kind, machine, _, entry, phoff, _, _, ehsize, phentsize, phnum = fields
    if kind != ET_EXEC:
        raise ImageError(f"not a static executable: ELF type {kind}, not {ET_EXEC}")
    if machine not in MACHINES:
        raise ImageError(f"machine type {machine} is not one of {', '.join(MACHINES.values())}")
    if ehsize != EHDR_SIZE or phentsize != PHDR.size or not phnum:
        raise ImageError(f"invalid ELF header: {phnum} program headers of {phentsize} bytes")
    if phnum > PHDR_MAX:
        raise ImageError(f"too many program headers: {phnum}, maximum {PHDR_MAX}")
    return machine, entry, _parse_phdrs(read, phoff, phnum)


def _parse_phdrs(read: Reader, phoff: int, phnum: int) -> list[_Phdr]:
    table = read(phoff, phnum * PHDR.size)
    if len(table) < phnum * PHDR.size:
        raise ImageError(f"truncated: {phnum} program headers at {phoff:#x} pass its end")
    return [_Phdr(*fields) for fields in PHDR.iter_unpack(table)]


def _parse_abi(read: Reader, headers: list[_Phdr]) -> tuple[int, int]:
    size = ffi.sizeof("struct abi1_info")
    desc = _find_note(read, headers, lib.ABI1_NOTE_TYPE, lib.ABI1_NOTE_DESC_OFFSET, size)
    if desc is None:
        raise ImageError("No Solo5 ABI information found in executable")
    if len(desc) < size:
        raise ImageError(f"invalid ABI1 note: {len(desc)} bytes, not {size}")
    info = ffi.from_buffer("struct abi1_info *", desc)
    return info.abi_target, info.abi_version


def _parse_manifest(read: Reader, headers: list[_Phdr]) -> manifest.Manifest:
    start = lib.MFT1_NOTE_DESC_OFFSET
    desc = _find_note(read, headers, lib.MFT1_NOTE_TYPE, start, manifest.MAX_SIZE)
    if desc is None:
        raise ImageError("No Solo5 manifest found in executable")
    try:
        return manifest.parse(desc)
    except ManifestError as error:
        raise ManifestError(f"Solo5 manifest is invalid: {error}") from None


def _find_note(
    read: Reader, headers: list[_Phdr], note_type: int, start: int, max_size: int
) -> bytes | None:
    """The descriptor of the first Solo5 note of this type, from byte `start` of its header on."""
    for header in headers:
        if header.type != PT_NOTE:
            continue
        if header.filesz < NHDR.size:
            raise ImageError("invalid: a PT_NOTE is shorter than a note header")
        raw = read(header.offset, NOTE_DESC_START)
        if len(raw) < min(NOTE_DESC_START, header.filesz):
            raise ImageError(f"truncated: the note at {header.offset:#x} passes its end")
        namesz, descsz, kind = NHDR.unpack_from(raw)
        name = raw[NHDR.size : NHDR.size + len(NOTE_NAME)]
        if kind != note_type or namesz != len(NOTE_NAME) or name != NOTE_NAME:
            continue
        return _note_desc(read, header, descsz, start, max_size)
    return None


def _note_desc(read: Reader, header: _Phdr, descsz: int, start: int, max_size: int) -> bytes:
    # descsz counts the padding between the end of the name and `start`.
    padding = start - NOTE_DESC_START
    if not padding < descsz <= padding + max_size or NOTE_DESC_START + descsz > header.filesz:
        raise ImageError(f"invalid: note does not fall within valid size ({descsz} bytes)")
    desc = read(header.offset + start, descsz - padding)
    if len(desc) < descsz - padding:
        raise ImageError(f"truncated: the note at {header.offset:#x} passes its end")
    return desc


def _parse_segments(headers: list[_Phdr]) -> Iterator[Segment]:
    last_end = 0
    for header in headers:
        if header.type != PT_LOAD or not header.filesz:
            continue
        segment = _parse_segment(header)
        if segment.start < last_end:
            raise ImageError(f"invalid: segment at {segment.vaddr:#x} overlaps the one before")
        last_end = segment.end
        yield segment


def _check_file_bytes(segments: tuple[Segment, ...]) -> None:
    """Each byte of the file is loaded once, so an image costs no more than its size."""
    in_file = sorted(segments, key=lambda segment: segment.offset)
    for first, second in pairwise(in_file):
        if second.offset < first.offset + first.filesz:
            raise ImageError(
                f"invalid: segments at {first.vaddr:#x} and {second.vaddr:#x} "
                "share bytes of the file"
            )


def _parse_segment(header: _Phdr) -> Segment:
    where = f"segment at {header.vaddr:#x}"
    align = header.align or 1
    if align & (align - 1):
        raise ImageError(f"invalid: {where} has alignment {align:#x}, not a power of two")
    if header.memsz < header.filesz:
        raise ImageError(f"invalid: {where} is smaller in memory than in the file")
    end = header.vaddr + header.memsz
    start, aligned_end = header.vaddr & -align, -(-end // align) * align
    if aligned_end >= LIMIT or header.offset + header.filesz >= FILE_LIMIT:
        raise ImageError(f"invalid: {where} overflows")
    if header.vaddr < lib.HVT_GUEST_MIN_BASE or start < lib.HVT_GUEST_MIN_BASE:
        raise ImageError(f"invalid: {where} is below {lib.HVT_GUEST_MIN_BASE:#x}")
    if start % PAGE_SIZE or aligned_end % PAGE_SIZE:
        raise ImageError(f"invalid: {where} does not fill pages of {PAGE_SIZE} bytes")
    if header.flags & PF_W and header.flags & PF_X:
        raise ImageError(f"invalid: {where} is both writable and executable")
    readable, writable, executable = (bool(header.flags & flag) for flag in (PF_R, PF_W, PF_X))
    return Segment(
        header.offset, header.filesz, header.vaddr, header.memsz,
        start, aligned_end, readable, writable, executable,
    )  # fmt: skip
