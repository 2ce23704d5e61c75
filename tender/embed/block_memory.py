"""`BlockMemory`: a disk in memory, which a program shares with its guest.

It is a memfd that is sealed against a change of its size.
"""

from __future__ import annotations

import fcntl
import os
import threading
import weakref

from tender.backends import SECTOR_SIZE, BlockDescriptor, BlockRemote
from tender.embed import validation
from tender.errors import DeviceError, HostError, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_MEMORY = "block device in memory"


def _memory_size(content: Any) -> int:
    try:
        is_size = isinstance(content, int) and not isinstance(content, bool)
        size = int(content) if is_size else memoryview(content).nbytes
    except TypeError:
        raise DeviceError(
            f"{_MEMORY}: {shown(content)} is neither a size in bytes nor bytes"
        ) from None
    if size >= 1 << 63:
        raise DeviceError(f"{_MEMORY}: no file can be that large")
    return size


class BlockMemory:
    """A block device in memory, which the program can read and write while the guest runs.

    It is attached to one guest at a time, and keeps its content from one to the next. The memory
    is freed with the object.

    Args:
        content: Its size in bytes, or its first content.
        sector_size: In bytes, a power of two from 512 on, of which the size is a multiple.
        readonly: Whether the guest may only read.

    Raises:
        DeviceError: an argument is wrong.
        HostError: the memory can't be had.
    """

    def __init__(
        self,
        content: int | bytes | bytearray | memoryview,
        *,
        sector_size: int = SECTOR_SIZE,
        readonly: bool = False,
    ) -> None:
        size = _memory_size(content)
        validation.make(_MEMORY, BlockRemote, 0, size, readonly, sector_size)
        self.size, self.sector_size, self.readonly = size, sector_size, readonly
        self._lock = threading.Lock()
        self._attached = False
        self._fd = os.memfd_create("ptender-block", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._fd)
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise HostError(
                f"a block device of {size} bytes in memory", "ftruncate", error.errno or 0
            ) from None
        if not isinstance(content, int):
            self.write(0, content)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)

    def __len__(self) -> int:
        return self.size

    @property
    def data(self) -> bytes:
        """Its present content."""
        return self.read(0, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset`; ValueError if they are not all inside."""
        self._check(offset, length)
        pieces = []
        while length:
            piece = os.pread(self._fd, length, offset)
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset`, also if it is read-only for the guest; ValueError if it does
        not fit."""
        rest = memoryview(data).cast("B")
        self._check(offset, len(rest))
        while rest:
            done = os.pwrite(self._fd, rest, offset)
            offset, rest = offset + done, rest[done:]

    def attach(self) -> BlockDescriptor:
        """Called when a guest starts; DeviceError if another one has it."""
        taken = False
        try:
            with self._lock:
                if self._attached:
                    raise DeviceError("this memory is attached to another guest")
                taken = self._attached = True
            fd = fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, 3)
            return BlockDescriptor(fd, self.readonly, self.sector_size)
        except BaseException:  # Ctrl-C too: no guest would detach it
            if taken:
                self.detach()
            raise

    def detach(self) -> None:
        """Called when the guest has ended."""
        with self._lock:
            self._attached = False

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not inside [0, {self.size})")
