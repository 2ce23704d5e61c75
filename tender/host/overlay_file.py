"""A block device that keeps what is written in a sparse file, and leaves its image unchanged.

The file has a header page, a map with a bit for each page of the disk, and the pages, each at its
own place: it takes room only for what was written. Data is written before its bits, so a page is
the image's until all of it is there. The file is hostile, as an image is: it is only read and
written at offsets that follow from the size of the image.
"""

from __future__ import annotations

import errno
import mmap
import os
import shlex
import stat
import struct

from tender._native import lib
from tender.dataclass import dataclass
from tender.errors import DeviceError, reason
from tender.host import write_all
from tender.host.lock import lock
from tender.memory import MAP_NORESERVE
from tender.modules import STEP
from tender.modules.block import BlockDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from tender.backends import BlockFile
    from tender.cleanup import Cleanup
    from tender.modules import Warn
    from tender.stop import Stop

PAGE = 4096  # bytes
CAPACITY_MAX = 1 << 44  # bytes of an image; the map of such a one has 512 MiB
MAGIC, VERSION = b"PTENDOVL", 1
# Magic, version, PAGE, the image's size and its time of modification (ns; 0 for a block device).
HEADER = struct.Struct("<8sIIQq")


@dataclass
class Layout:
    """Where the parts of an overlay of an image of `capacity` bytes are, in bytes."""

    capacity: int

    @property
    def map_bytes(self) -> int:
        return -(-self.pages // 8)

    @property
    def pages(self) -> int:
        return -(-self.capacity // PAGE)

    @property
    def data(self) -> int:
        return PAGE + -(-self.map_bytes // PAGE) * PAGE

    @property
    def size(self) -> int:
        return self.data + self.pages * PAGE


class OverlayFile:
    """An open overlay: its descriptor, and its map in memory."""

    def __init__(self, fd: int, layout: Layout) -> None:
        self.fd = fd
        self.capacity = layout.size  # the maximum length of the file
        self.layout = layout
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self._map = mmap.mmap(-1, layout.map_bytes, flags)
        for start, end in _data(fd, PAGE, PAGE + layout.map_bytes):
            with memoryview(self._map)[start - PAGE : end - PAGE] as piece:
                os.preadv(fd, [piece], start)

    def has(self, page: int) -> bool:
        """Whether it has this page of the disk."""
        return bool(self._map[page // 8] >> page % 8 & 1)

    def add(self, first: int, after: int) -> bytes:
        """Note that it has these pages; the bytes of the map that are to be written."""
        for page in range(first, after):
            self._map[page // 8] |= 1 << page % 8
        return self._map[first // 8 : (after - 1) // 8 + 1]

    def remove(self, pages: list[int]) -> None:
        """Note that it has none of these pages."""
        for page in pages:
            self._map[page // 8] &= ~(1 << page % 8)


class OverlayFileBlock(BlockDevice):
    """`fd` is the image, open for reading; `overlay_file` has what the guest wrote."""

    in_engine = False
    overlay_file: OverlayFile

    def __init__(
        self,
        name: str,
        fd: int,
        capacity: int,
        disk: BlockFile,
        overlay_file: OverlayFile,
        stop: Stop,
        warn: Warn,
    ) -> None:
        super().__init__(name, fd, capacity, disk.sector_size, False, stop, warn)
        self.overlay_file = overlay_file

    def read(self, offset: int, data: memoryview) -> int:
        """As BlockDevice.read: from the overlay where it has the page, else from the image."""
        for start, end, is_written in self._runs(offset, offset + len(data)):
            piece = data[start - offset : end - offset]
            fd, at = self._place(start) if is_written else (self.fd, start)
            if self._all(lib.host_pread, piece, at, fd) != lib.HVT_R_OK:
                return lib.HVT_R_EUNSPEC
        return lib.HVT_R_OK

    def write(self, offset: int, data: memoryview) -> int:
        """As BlockDevice.write, into the overlay."""
        for at in range(0, len(data), STEP):
            self._stop.check()
            result = self._write(offset + at, data[at : at + STEP])
            if result != lib.HVT_R_OK:
                return result
        return lib.HVT_R_OK

    def _write(self, offset: int, data: memoryview) -> int:
        overlay, end = self.overlay_file, offset + len(data)
        first, after = offset // PAGE, -(-end // PAGE)
        edges = {at // PAGE for at in (offset, end) if at % PAGE and at < self.capacity}
        if not all(overlay.has(page) or self._copy(page) for page in edges):
            return lib.HVT_R_EUNSPEC
        fd, at = self._place(offset)
        if self._all(lib.host_pwrite, data, at, fd) != lib.HVT_R_OK:
            return lib.HVT_R_EUNSPEC
        new = [page for page in range(first, after) if not overlay.has(page)]
        if new and not self._quietly(overlay.add(first, after), PAGE + first // 8):
            overlay.remove(new)
            return lib.HVT_R_EUNSPEC
        return lib.HVT_R_OK

    def _place(self, offset: int) -> tuple[int, int]:
        """The overlay's descriptor, and where in it this byte of the disk is."""
        return self.overlay_file.fd, self.overlay_file.layout.data + offset

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """The parts of [offset, end) that lie together: start, end, whether in the overlay."""
        has = self.overlay_file.has
        start = offset
        while start < end:
            page = start // PAGE
            is_written, page = has(page), page + 1
            while page * PAGE < end and has(page) == is_written:
                page += 1
            yield start, min(end, page * PAGE), is_written
            start = page * PAGE

    def _copy(self, page: int) -> bool:
        """Copy a page of the image that will be written in part; whether that succeeded."""
        start = page * PAGE
        piece = bytearray(min(PAGE, self.capacity - start))
        before = self.counters.bytes
        done: bool = self._all(lib.host_pread, memoryview(piece), start, self.fd) == lib.HVT_R_OK
        self.counters.bytes = before
        return done and self._quietly(bytes(piece), self._place(start)[1])

    def _quietly(self, data: bytes, at: int) -> bool:
        """Write to the overlay's file what is not the guest's; whether that succeeded."""
        before = self.counters.bytes
        result = self._all(lib.host_pwrite, memoryview(data), at, self.overlay_file.fd)
        self.counters.bytes = before
        return result == lib.HVT_R_OK


def open_overlay(
    disk: BlockFile, image_fd: int, capacity: int, where: str, warn: Warn, cleanup: Cleanup
) -> OverlayFile:
    """Open and lock the file of a disk's overlay, or make it; raises DeviceError."""
    path = str(disk.overlay)
    where = f"{where}: overlay {path}"
    if capacity > CAPACITY_MAX:
        raise DeviceError(f"{where}: its image has more than {CAPACITY_MAX >> 40} TiB")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags | (os.O_DSYNC if disk.sync == "always" else 0), 0o600)
    except OSError as error:
        raise DeviceError(f"{where}: {reason(error.errno or 0)}") from None
    cleanup.callback(lambda: os.close(fd))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise DeviceError(f"{where}: not a regular file")
    lock(where, fd, False, warn)
    image = os.fstat(image_fd)
    modified_ns = image.st_mtime_ns if stat.S_ISREG(image.st_mode) else 0
    layout = Layout(capacity)
    try:
        if not os.fstat(fd).st_size:
            _make(fd, HEADER.pack(MAGIC, VERSION, PAGE, capacity, modified_ns))
        _check(os.pread(fd, HEADER.size, 0), capacity, modified_ns, disk.path, where)
        size = os.fstat(fd).st_size
        if size == PAGE:  # new, or its making was interrupted
            os.ftruncate(fd, layout.size)
        elif size != layout.size:
            raise DeviceError(f"{where}: damaged: its length is {size}, and not {layout.size}")
        return OverlayFile(fd, layout)
    except OSError as error:
        raise DeviceError(f"{where}: {reason(error.errno or 0)}") from None


def _make(fd: int, header: bytes) -> None:
    try:
        write_all(fd, header.ljust(PAGE, b"\0"))
    except OSError:
        os.ftruncate(fd, 0)
        raise


def _check(header: bytes, capacity: int, modified_ns: int, image: str, where: str) -> None:
    """Raise DeviceError unless this is the header of an overlay of this image."""
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DeviceError(f"{where}: not an overlay of ptender; a file that does not exist is made")
    _, version, page, of_capacity, of_modified_ns = HEADER.unpack(header)
    if (version, page) != (VERSION, PAGE):
        raise DeviceError(f"{where}: made by another version of ptender (format {version})")
    if of_capacity != capacity:
        raise DeviceError(
            f"{where}: made for an image of {of_capacity} bytes, and this one has {capacity}"
        )
    if of_modified_ns != modified_ns:
        seconds, ns = divmod(of_modified_ns, 10**9)
        touch = f"touch -d @{seconds}.{ns:09} {shlex.quote(image)}"
        raise DeviceError(
            f"{where}: the image has been modified since it was made, so they do not fit together "
            f"(if only the time is another: {touch})"
        )


def _data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, end) of a file that are no holes, in pieces."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only holes follow
                return
            raise
        hole = min(end, os.lseek(fd, start, os.SEEK_HOLE)) if start < end else end
        for at in range(start, hole, STEP):
            yield at, min(hole, at + STEP)
        start = max(start, hole)
