"""Locks of files: one that a guest writes to has one user at a time.

The lock ends with the open file, however its holder ends.
"""

from __future__ import annotations

import fcntl
import posix as os

from tender.errors import DeviceError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.modules import Warn

_COMMAND_MAX = 160  # letters of a command in a message


def lock(where: str, fd: int, readonly: bool, warn: Warn) -> None:
    """One writer, or any number of readers: a lock of the open file, which ends with it."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EACCES is SMB's answer to a conflict
        raise DeviceError(f"{where}: locked by {holder(fd)}") from None
    except OSError as error:
        # A file system without locks: Solo5's own tender never locks, so the guest runs.
        reason = HostError("cannot be locked", "flock", error.errno or 0)
        warn(f"{where}: {reason}; make sure that no other process writes to it")


def holder(fd: int) -> str:
    """Who holds the lock, from /proc/locks and /proc/PID/cmdline: best effort, for a message."""
    info = os.fstat(fd)
    inode = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    try:
        with open("/proc/locks") as locks:
            rows = [line.split() for line in locks]
        locks_of = {row[5]: row[4] for row in rows if row[1] == "FLOCK"}
        # On an overlay, fstat() and the lock name different devices with one inode number.
        alike = [pid for where, pid in locks_of.items() if where.endswith(f":{info.st_ino}")]
        pid = locks_of.get(inode) or alike[0]
    except (OSError, IndexError):
        return "another process"
    if pid == str(os.getpid()):
        return "this guest itself or another one of this program"
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            words = cmdline.read(4096).decode(errors="replace").rstrip("\0").replace("\0", " ")
    except OSError:
        return f"process {pid}"
    command = words if len(words) <= _COMMAND_MAX else f"{words[:_COMMAND_MAX]}..."
    return f"process {pid} ({command})"
