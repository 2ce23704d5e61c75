"""Opening a file that a tender writes: a trace, packets, a report, a record.

The rule here: such a file has what the guest knows, so it is for its owner only; it is never one
that the guest reads, and root's tender harms nobody by it.
"""

from __future__ import annotations

import errno
import os
import stat

from tender._native import ffi, lib
from tender.errors import ConfigError, HostError
from tender.modules import DeviceErrors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from tender.cleanup import Cleanup
    from tender.modules import Warn
    from tender.stop import Stop

_WAIT_MS = 1000


def open_output(path: str, what: str, inputs: Iterable[os.stat_result], cleanup: Cleanup) -> int:
    """Open the file that `what` is written to, which must be none of the guest's `inputs`.

    It becomes mode 0600, also where it was there. Root follows no symbolic link, and overwrites no
    file of another user, in a folder that others may write to. Raises ConfigError.
    """
    fd = _open(path, what)
    cleanup.callback(lambda: os.close(fd))
    info = os.fstat(fd)
    if any(os.path.samestat(info, each) for each in inputs):
        raise ConfigError(f"Could not open {what}: {path}: it is the guest's kernel or disk")
    if stat.S_ISREG(info.st_mode):
        if _is_shared(path) and info.st_uid:
            raise ConfigError(
                f"Could not open {what}: {path}: it is another user's file, in a folder that "
                "others may write to"
            )
        if info.st_mode & 0o077:
            _make_private(fd, f"Could not open {what}: {path}")
        os.ftruncate(fd, 0)
    os.set_blocking(fd, True)
    return fd


class Output:
    """What is written piece by piece to `fd`, as soon as there is something.

    Nothing is missing then, however the guest, or the tender, ends. An error of the file ends
    `what` with a warning, and not the guest.
    """

    def __init__(self, fd: int, what: str, stop: Stop, warn: Warn) -> None:
        self._fd = fd
        self._stop = stop
        self._errors = DeviceErrors(what, warn)
        self.ended = False

    def write(self, data: bytes) -> None:
        """Write it all, unless the output has ended."""
        while data and not self.ended:
            written = lib.host_write(self._fd, data, len(data))
            if written >= 0:
                data = data[written:]
            else:
                self.ended = not self._go_on(ffi.errno)

    def _go_on(self, error: int) -> bool:
        if error in (errno.EINTR, errno.EAGAIN):
            if self._stop.requested:
                return False  # nobody takes it, and the guest is to end
            if error == errno.EAGAIN:
                lib.host_events(self._fd, lib.POLLOUT, _WAIT_MS)
            return True
        self._errors.warn_once(f"it ends here: {HostError('write', 'write', error)}")
        return False


def _is_shared(path: str) -> bool:
    """Whether this process is root's and the folder of `path` one that others may write to."""
    if os.geteuid():
        return False
    try:
        info = os.stat(os.path.dirname(path) or ".")
    except (OSError, ValueError):
        return False  # opening the file says why
    return bool(info.st_uid or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _make_private(fd: int, where: str) -> None:
    try:
        os.fchmod(fd, 0o600)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(
            f"{where}: others may open it, and its mode can't be changed: {reason}: name a new "
            "file, in a file system that keeps modes"
        ) from None


def _open(path: str, what: str) -> int:
    # Not blocking while it is opened: a FIFO that nobody reads must not hang the command.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    is_shared = _is_shared(path)
    try:
        return os.open(path, flags | (os.O_NOFOLLOW if is_shared else 0), 0o600)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
        code = getattr(error, "errno", 0)
        hint = " (nobody reads it)" if code == errno.ENXIO else ""
        if is_shared and code == errno.ELOOP:
            reason = "it is a symbolic link, in a folder that others may write to"
        raise ConfigError(f"Could not open {what}: {path}: {reason}{hint}") from None
