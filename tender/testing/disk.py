"""A disk for a test: in memory, with faults.

The rule here: the file or bytes that a test gave are never changed; `data` has what the guest has
written. A fault is an error or a delay, never a wrong byte.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from collections import deque

from tender.backends import SECTOR_SIZE
from tender.errors import DeviceError, InvalidValue
from tender.testing.net.faults import Chance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LOG_LINES = 10_000  # the last operations
COPY_BYTES = 1 << 20  # at a time


class DiskFault:
    """A fault of a disk, in force until `clear()` or the end of its `with` block.

    `hits` counts the operations that it changed.
    """

    def __init__(
        self, disk: DiskImage, operation: str, check: Callable[[DiskFault, int], None]
    ) -> None:
        self.hits = 0
        self.count = 0  # operations of its kind since it was made
        self.written = 0  # bytes since it was made
        self._disk = disk
        self._operation = operation
        self._check = check

    def apply(self, operation: str, length: int) -> None:
        """Apply it to an operation of the guest: may raise OSError, or sleep."""
        if operation == self._operation or self._operation == "any":
            self.count += 1
            self._check(self, length)

    def clear(self) -> None:
        """Remove the fault."""
        self._disk.remove(self)

    def __enter__(self) -> DiskFault:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


class DiskImage:
    """A block device for `block={"storage": disk}`.

    `content` is a size in bytes, the bytes, or the path of a file that is copied. `log` has the
    last operations as lines of text. Raises DeviceError if there can be no such disk.
    """

    def __init__(
        self,
        content: int | bytes | bytearray | str | os.PathLike[str],
        *,
        readonly: bool = False,
        sector_size: int = SECTOR_SIZE,
        seed: object = 0,
    ) -> None:
        self.readonly = readonly
        self.sector_size = sector_size
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self.reads = self.writes = 0
        self._map = _map(content)
        self._lock = threading.Lock()
        self._faults: list[DiskFault] = []
        self._rng = random.Random(f"{seed}/disk")
        self._closing = threading.Event()

    @property
    def capacity(self) -> int:
        """In bytes."""
        return len(self._map)

    @property
    def data(self) -> bytes:
        """The whole content, as it is now."""
        with self._lock:
            return self._map[:]

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        self._apply_faults("read", offset, length)
        with self._lock:
            return self._map[offset : offset + length]

    def write(self, offset: int, data: bytes) -> None:
        self.writes += 1
        self._apply_faults("write", offset, len(data))
        with self._lock:
            self._map[offset : offset + len(data)] = data

    def _apply_faults(self, operation: str, offset: int, length: int) -> None:
        what = f"{operation} {length} bytes at {offset}"
        try:
            for fault in list(self._faults):
                fault.apply(operation, length)
        except OSError as error:
            self.log.append(f"{what}: {error.strerror}")
            raise
        self.log.append(what)

    # ---- Faults ----

    def fail_read(
        self,
        nth: int | None = None,
        *,
        every: int | None = None,
        probability: float | None = None,
        error: int = errno.EIO,
    ) -> DiskFault:
        """Let reads fail: the nth from now on, every Nth, with a probability; by default all.

        `error` is an errno.
        """
        return self._fail("read", nth, Chance(every, probability), error)

    def fail_write(
        self,
        nth: int | None = None,
        *,
        every: int | None = None,
        probability: float | None = None,
        error: int = errno.EIO,
    ) -> DiskFault:
        """Let writes fail, as `fail_read` does reads; nothing of a failed one is written."""
        return self._fail("write", nth, Chance(every, probability), error)

    def _fail(self, operation: str, nth: int | None, chance: Chance, error: int) -> DiskFault:
        if nth is not None and nth < 1:
            raise InvalidValue("nth", nth, "the number of an operation; 1 is the next one")

        def check(fault: DiskFault, _length: int) -> None:
            hit = chance.hits(fault.count, self._rng) if nth is None else fault.count == nth
            if hit:
                fault.hits += 1
                raise OSError(error, os.strerror(error))

        return self._add(DiskFault(self, operation, check))

    def enospc(self, after: int = 0) -> DiskFault:
        """Let the disk be full after `after` more bytes were written."""

        def check(fault: DiskFault, length: int) -> None:
            if fault.written + length > after:
                fault.hits += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fault.written += length

        return self._add(DiskFault(self, "write", check))

    def slow(self, seconds: float) -> DiskFault:
        """Let each read and write take `seconds` longer, in real time."""

        def check(fault: DiskFault, _length: int) -> None:
            fault.hits += 1
            self._closing.wait(seconds)

        return self._add(DiskFault(self, "any", check))

    def clear_faults(self) -> None:
        """Remove all faults."""
        self._faults = []

    def _add(self, fault: DiskFault) -> DiskFault:
        self._faults = [*self._faults, fault]
        return fault

    def remove(self, fault: DiskFault) -> None:
        """Remove one fault."""
        self._faults = [each for each in self._faults if each is not fault]

    def close(self) -> None:
        """End all delays, at the end of the test. The content can still be read."""
        self._closing.set()


def _map(content: int | bytes | bytearray | str | os.PathLike[str]) -> mmap.mmap:
    """New memory with this content."""
    if isinstance(content, (str, os.PathLike)):
        try:
            return _copy(os.fspath(content))
        except OSError as error:
            raise DeviceError(f"{os.fspath(content)}: {os.strerror(error.errno or 0)}") from None
    size = content if isinstance(content, int) else len(content)
    if size <= 0:
        raise DeviceError(f"a disk has at least one sector, not {size} bytes")
    memory = _memory(size, "a disk")
    if not isinstance(content, int):
        memory[:] = bytes(content)
    return memory


def _memory(size: int, what: str) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size)
    except (OSError, OverflowError):
        raise DeviceError(f"{what}: no memory for {size} bytes") from None


def _copy(path: str) -> mmap.mmap:
    """A copy of a file. A mapping of it would show later changes by others, and end pytest with
    SIGBUS where they truncate it."""
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            raise DeviceError(f"{path}: the file is empty; a disk has at least one sector")
        memory = _memory(size, path)
        file.seek(0)
        offset = 0
        while offset < size:
            piece = file.read(min(COPY_BYTES, size - offset))
            if not piece:
                raise DeviceError(f"{path}: it was truncated while it was copied")
            if piece.count(0) < len(piece):  # a hole takes no memory
                memory[offset : offset + len(piece)] = piece
            offset += len(piece)
    return memory
