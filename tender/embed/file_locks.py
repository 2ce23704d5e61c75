"""The locks that guests take on files which their program has open as well."""

from __future__ import annotations

import fcntl
import os
import threading
from io import FileIO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class FileLocks:
    """The locks that guests take on files which the program has open as well.

    A lock belongs to the open file (flock(2)), so it does not end with the guest's process. When
    the last guest on that file has ended, it is released, unless the program had one before.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By device and inode: the guests on it, each as its copy, and the copies to unlock.
        self._files: dict[tuple[int, int], tuple[set[FileIO], list[FileIO]]] = {}

    def begin(self, fd: int) -> Callable[[], object]:
        """Note that a guest is about to lock `fd`; returns what to call when it has ended."""
        copy = FileIO(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3))
        info = os.fstat(fd)
        key = info.st_dev, info.st_ino
        with self._lock:
            guests, files = self._files.setdefault(key, (set(), []))
            guests.add(copy)
            if not _is_locked(fd):
                files.append(copy)
        return lambda: self._end(key, copy)

    def _end(self, key: tuple[int, int], copy: FileIO) -> None:
        with self._lock:
            guests, files = self._files.get(key, (set(), []))
            guests.discard(copy)
            if copy not in files:
                copy.close()
            if not guests:
                for file in files:
                    _unlock(file)
                self._files.pop(key, None)


def _is_locked(fd: int) -> bool:
    """Whether the open file has a lock. Source: Linux, Documentation/filesystems/proc.rst."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
            return any(line.startswith("lock:") and " FLOCK " in line for line in lines)
    except OSError:
        return True  # not known: then it is not released


def _unlock(file: FileIO) -> None:
    if not file.closed:
        try:
            fcntl.flock(file, fcntl.LOCK_UN)
        except OSError:  # a file system without locks
            pass
        file.close()
