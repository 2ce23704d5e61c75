"""`BlockMemory`: a disk in memory, which a program shares with its guest.

The rule here: it is a memfd that nobody can make shorter, so that who has its descriptor can read
and write within its size, and nothing else.
"""

from __future__ import annotations

import fcntl
import os
import threading
import weakref

from tender.config import SECTOR_SIZE, BlockDescriptor, BlockRemote
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
    """A block device in memory, which the program can look at and change while the guest runs.

    `content` is its size in bytes, or its first content. One guest has it at a time; what was
    written stays until it is closed, or collected.
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
        # Nobody who has the descriptor can make it shorter under somebody else's feet.
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)

    def __len__(self) -> int:
        return self.size

    @property
    def data(self) -> bytes:
        """All of it, as it is now."""
        return self.read(0, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; ValueError where they are not all inside."""
        self._check(offset, length)
        pieces = []
        while length:
            piece = os.pread(self._fd, length, offset)
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data` at `offset`, whether or not the guest may."""
        rest = memoryview(data).cast("B")
        self._check(offset, len(rest))
        while rest:
            done = os.pwrite(self._fd, rest, offset)
            offset, rest = offset + done, rest[done:]

    def attach(self) -> BlockDescriptor:
        """For a guest that starts."""
        taken = False
        try:
            with self._lock:
                if self._attached:
                    raise DeviceError("this memory is attached to another guest")
                taken = self._attached = True
            fd = fcntl.fcntl(self._fd, fcntl.F_DUPFD_CLOEXEC, 3)
            return BlockDescriptor(fd, self.readonly, self.sector_size)
        except BaseException:  # Ctrl-C too: no guest would come that lets go of it
            if taken:
                self.detach()
            raise

    def detach(self) -> None:
        """The guest has ended."""
        with self._lock:
            self._attached = False

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not inside [0, {self.size})")
