"""A PID file: the number of the tender's process, in a file that is locked as long as it runs.

The lock (flock(2)) ends with the process, however that ends, so it tells a file that is left
behind from one of a tender that runs. Source: pidfile(3) of FreeBSD.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from tender.errors import ConfigError, reason

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.cleanup import Cleanup

_TEXT_MAX = 32  # bytes


def hold(path: str, cleanup: Cleanup) -> int:
    """Write this process's PID to the file and lock it: the descriptor that has the lock.

    Raises ConfigError where another process has it, or where it is no PID file. `cleanup` removes
    the file.
    """
    where = f"Could not write PID file: {path}"
    try:
        while True:
            old = _lock_left_behind(path, where)
            try:
                fd = _write(path, old is not None)
            finally:
                if old is not None:
                    os.close(old)
            if fd is not None:
                break
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {reason(getattr(error, 'errno', 0) or 0)}") from None
    cleanup.callback(lambda: os.close(fd))
    cleanup.callback(lambda: _remove(path, fd))
    return fd


def _lock_left_behind(path: str, where: str) -> int | None:
    """Lock the file that is there, which no running process has; None: there is none."""
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{where}: not a regular file")
            text = os.pread(fd, _TEXT_MAX, 0).strip()
            if text and not text.isdigit():
                raise ConfigError(f"{where}: it has something else than a PID in it")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{where}: process {text.decode()} runs with it") from None
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was replaced in the meantime


def _write(path: str, replaces: bool) -> int | None:
    """Put a new file at `path`: its locked descriptor; None: somebody else has put one there."""
    new = f"{path}.{os.getpid()}.{os.urandom(4).hex()}"
    # For its owner only: who may open a file can lock it.
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(fd, b"%d\n" % os.getpid())
        if replaces:
            os.rename(new, path)
        else:
            os.link(new, path)
    except OSError as error:
        os.close(fd)
        os.unlink(new)
        if error.errno == errno.EEXIST:
            return None
        raise
    if not replaces:
        os.unlink(new)
    return fd


def _is_at(fd: int, path: str) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove(path: str, fd: int) -> None:
    if _is_at(fd, path):
        os.unlink(path)
