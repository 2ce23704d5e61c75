"""A record: what a guest was started with, and what came into it at each hypercall.

A header, the image, and then one event after the other until the guest's end. All numbers are
little-endian. Whoever reads a record trusts it as little as an image.
"""

from __future__ import annotations

import os
from struct import Struct

from tender import checks
from tender.boot import layout
from tender.config import VirtualTime
from tender.dataclass import dataclass, field, replace
from tender.errors import ConfigError, HostError, ImageError, UsageError
from tender.image.file import open_regular
from tender.image.manifest import MAX_SIZE
from tender.observe.touched import data_ranges

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tender.config import Config

MAGIC = b"ptender record 1"
_PREFIX = Struct("<16sIQ")  # MAGIC, bytes of JSON, bytes of the image; then both
EVENT = Struct("<BBHIQQI")
HEADER_MAX = 1 << 20
IMAGE_MAX = layout.MEM_MAX
BLOCK_MAX = 256  # bytes of an argument block
FAULT = 1  # a flag of an event: the hypercall was the guest's end
END = 0xFF  # in the place of a hypercall's number: how the run ended
STEP = 1 << 20  # bytes copied at a time
_U64 = (1 << 64) - 1


def _arguments(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(map(checks.plain_text, value)):
        raise UsageError(f"{name}: not a list of strings without NUL")
    return tuple(value)


def _manifest(name: str, value: Any) -> bytes:
    try:
        data = value if isinstance(value, bytes) else bytes.fromhex(value)
    except (TypeError, ValueError):
        data = b""
    if not 0 < len(data) <= MAX_SIZE:
        raise UsageError(f"{name}: not a manifest")
    return data


@dataclass
class Header:
    """What a run was started with, as far as its guest can see it.

    `kernel` is its path then, `manifest` what the guest found in its memory. Its clock begins at
    `start_ns` and goes on by `tick_ns` per reading; RDRAND begins with `random`.
    """

    kernel: str = field(checks.as_path)
    args: tuple[str, ...] = field(_arguments)
    mem_bytes: int = field(checks.whole(1, layout.MEM_MAX))
    exec_heap: bool = field(checks.as_flag)
    instructions: int | None = field(checks.optional(checks.whole(1, checks.INT64_MAX)))
    manifest: bytes = field(_manifest)
    start_ns: int = field(checks.whole(0, _U64))
    tick_ns: int = field(checks.whole(1, checks.INT64_MAX))
    random: int = field(checks.whole(0, _U64))


@dataclass
class Event:
    """A hypercall: its `number`, `flags`, the GPA of its argument block, the block as `asked` and
    as `answered`, the CRC-32 of what the guest passed out, the guest's time afterwards, and how
    many bytes were passed in: those follow it in the file."""

    number: int
    flags: int
    gpa: int
    asked: bytes
    answered: bytes
    crc: int
    now_ns: int
    data_size: int

    def encode(self) -> bytes:
        """As it is in the file, without the data."""
        head = EVENT.pack(
            self.number,
            self.flags,
            len(self.asked),
            self.crc,
            self.gpa,
            self.now_ns,
            self.data_size,
        )
        return head + self.asked + self.answered


def encode_header(header: Header, image_size: int) -> bytes:
    """What a record begins with; the image is to follow."""
    import json

    text = json.dumps({**header.__dict__, "manifest": header.manifest.hex()}).encode()
    return _PREFIX.pack(MAGIC, len(text), image_size) + text


class Record:
    """An open record: its `header`, `image` (a descriptor of a memfd), and its events in turn.

    Raises ConfigError for a file that is none, ImageError for one that can't be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.image = -1
        self.fd = open_regular(path)
        try:
            self.header, image_size = self._read_header()
            self.image = self._copy_image(image_size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close what is open of it."""
        for fd in (self.fd, self.image):
            if fd >= 0:
                os.close(fd)
        self.fd = self.image = -1

    def config(self, config: Config) -> Config:
        """`config`, as far as the guest can't see it, and what was recorded."""
        header = self.header
        return replace(
            config,
            kernel=header.kernel,
            kernel_fd=os.dup(self.image),
            args=header.args,
            mem_bytes=header.mem_bytes,
            exec_heap=header.exec_heap,
            instructions=header.instructions,
            clock=VirtualTime(header.start_ns, header.tick_ns),
        )

    def manifest(self, size: int) -> bytes:
        """What the guest found of its manifest, which has `size` bytes."""
        if len(self.header.manifest) != size:
            raise self._malformed("its manifest is not the image's")
        return self.header.manifest

    def _read_header(self) -> tuple[Header, int]:
        import json

        magic, size, image_size = _PREFIX.unpack(self._read(_PREFIX.size))
        if magic != MAGIC:
            raise self._malformed("it does not begin like one")
        if size > HEADER_MAX or image_size > IMAGE_MAX:
            raise self._malformed("its header names impossible sizes")
        try:
            fields = json.loads(self._read(size))
            if not isinstance(fields, dict) or fields.keys() != Header.__annotations__.keys():
                raise self._malformed("its header: not the fields of one")
            return Header(**fields), image_size
        except (ValueError, RecursionError, UsageError) as error:
            raise self._malformed(f"its header: {error}") from None

    def _copy_image(self, size: int) -> int:
        try:
            fd = os.memfd_create("ptender-image", os.MFD_CLOEXEC)
        except OSError as error:
            raise HostError("cannot copy the image", "memfd_create", error.errno or 0) from None
        try:
            self._copy(fd, size)
        except OSError as error:
            os.close(fd)
            raise HostError("cannot copy the image", None, error.errno or 0) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _copy(self, fd: int, size: int) -> None:
        """Copy with holes: those of the record take no memory."""
        first = os.lseek(self.fd, 0, os.SEEK_CUR)
        if os.fstat(self.fd).st_size < first + size:
            raise self._malformed("it ends too early")
        os.ftruncate(fd, size)
        for start, end in data_ranges(self.fd, first, first + size):
            data = os.pread(self.fd, end - start, start)
            os.pwrite(fd, data, start - first)
        os.lseek(self.fd, first + size, os.SEEK_SET)

    def _read(self, size: int) -> bytes:
        try:
            data = os.read(self.fd, size)
        except OSError as error:
            raise ImageError(f"{self.path}: {os.strerror(error.errno or 0)}") from None
        if len(data) != size:
            raise self._malformed("it ends too early")
        return data

    def _malformed(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: not a record that can be replayed: {what}")


class ReplayError(HostError):
    """The run differs from its record, or the record ends or can't be read."""


def read_into(fd: int, target: bytearray | memoryview) -> int:
    """Read what comes next in a record; how many bytes there were. Raises ReplayError."""
    try:
        return os.readv(fd, [target])
    except OSError as error:
        raise ReplayError("cannot read the record", "readv", error.errno or 0) from None


def read_bytes(fd: int, size: int) -> bytes:
    """The next `size` bytes of a record, or as many as there are. Raises ReplayError."""
    data = bytearray(size)
    return bytes(data[: read_into(fd, data)])


def read_event(fd: int) -> Event | None:
    """The next event; its data is to be read next. None: the record ends, or is malformed here.

    Raises ReplayError.
    """
    head = read_bytes(fd, EVENT.size)
    if len(head) != EVENT.size:
        return None
    number, flags, size, crc, gpa, now_ns, data_size = EVENT.unpack(head)
    if size > BLOCK_MAX:
        return None
    blocks = read_bytes(fd, 2 * size)
    if len(blocks) != 2 * size:
        return None
    return Event(number, flags, gpa, blocks[:size], blocks[size:], crc, now_ns, data_size)
