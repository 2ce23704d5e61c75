"""The image as a file: opened, checked, and loaded into guest memory.

The file is never read as a whole. Its headers are checked by tender/image/elf.py before a byte of
it is loaded.
"""

from __future__ import annotations

import _stat as stat
import posix as os

from tender.boot import layout
from tender.errors import ImageError, setting
from tender.image import elf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from os import PathLike

    from tender.image.elf import Image
    from tender.memory import GuestMemory

STEP = 1 << 20  # bytes read at a time


class ImageFile:
    """An open image: its descriptor, its `info` of fstat(2), its parsed headers, and what they
    were parsed from (`pieces`, by offset).

    `fd` is its descriptor where it is open already; then `path` is what messages call it.
    """

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path = path
        self._fd = open_regular(path) if fd is None else check_regular(path, fd)
        self.info = os.fstat(self._fd)
        self.pieces: dict[int, bytes] = {}
        try:
            self.image: Image = elf.parse(self._read)
        except ImageError as error:
            self.close()
            raise type(error)(f"{path}: {error}") from None
        except OSError as error:
            self.close()
            raise ImageError(f"{path}: {os.strerror(error.errno or 0)}") from None

    def _read(self, offset: int, size: int) -> bytes:
        data = _pread(self._fd, offset, size)
        self.pieces[offset] = max(data, self.pieces.get(offset, b""), key=len)
        return data

    def close(self) -> None:
        """Close the file; its headers stay in `image`."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def contents(self) -> Iterator[bytes]:
        """The file as it is: `info.st_size` bytes, piece by piece."""
        for at in range(0, self.info.st_size, STEP):
            size = min(STEP, self.info.st_size - at)
            data = _pread(self._fd, at, size)
            if len(data) != size:
                raise ImageError(f"{self.path}: it became shorter")
            yield data

    def load(self, memory: GuestMemory, check: Callable[[], None]) -> None:
        """Copy the segments into guest memory and protect them as their flags say.

        `check` is called after each piece that is read, and may raise.
        """
        self.copy(memory, check)
        for segment in self.image.segments:
            # The host reads what the guest executes, and never executes it.
            readable = segment.readable or segment.executable
            memory.protect(segment.start, segment.end, readable=readable, writable=segment.writable)

    def copy(self, memory: GuestMemory, check: Callable[[], None]) -> None:
        """Copy the segments into guest memory; `check` as for `load`."""
        image = self.image
        if image.entry >= memory.size:
            raise self._too_large(f"its entry point is at {image.entry:#x}", memory)
        for segment in image.segments:
            if segment.end > memory.size:
                raise self._too_large(f"it ends at {image.kernel_end:#x}", memory)
            target = memory.writable(segment.vaddr, segment.filesz)
            self._read_into(target, segment.offset, check)

    def _read_into(self, target: memoryview, offset: int, check: Callable[[], None]) -> None:
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._fd, [target[done : done + STEP]], offset + done)
            except OSError as error:
                raise ImageError(f"{self.path}: {os.strerror(error.errno or 0)}") from None
            check()
            if not count:
                raise ImageError(f"{self.path}: truncated: a segment passes its end")
            done += count

    def _too_large(self, reason: str, memory: GuestMemory) -> ImageError:
        need = max(self.image.kernel_end, self.image.entry) + layout.MIB
        mem_mib = -(-need // layout.MEM_STEP) * layout.MEM_STEP // layout.MIB
        if mem_mib * layout.MIB > layout.MEM_MAX:
            return ImageError(f"{self.path}: does not fit into the memory of any guest: {reason}")
        more = setting(f"--mem={mem_mib}", f"mem_mib={mem_mib}")
        return ImageError(
            f"{self.path}: does not fit into {memory.size // layout.MIB} MiB of guest memory: "
            f"{reason}; give it more: {more}"
        )


def open_image(path: str | PathLike[str]) -> Image:
    """The headers and the manifest of the image at `path`.

    Raises ImageError for a file that is not an image that a tender can run.
    """
    file = ImageFile(os.fspath(path))
    file.close()
    return file.image


def open_regular(path: str) -> int:
    """A descriptor of a regular file, to read it. Raises ImageError."""
    # Not blocking: a FIFO in the place of an image must not hang the command.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        raise ImageError(f"{path}: Could not open: {reason}") from None
    return check_regular(path, fd)


def check_regular(path: str, fd: int) -> int:
    """The descriptor, unless it is not of a regular file: then it is closed. Raises ImageError."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{path}: not a regular file")
    return fd


def _pread(fd: int, offset: int, size: int) -> bytes:
    # A header can name any 64-bit offset; the kernel takes 63 bits.
    return os.pread(fd, size, offset) if offset < 1 << 63 else b""
