"""`ptender snapshot`: a running guest to a file, from which it can go on."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from contextlib import suppress

from tender.boot import layout
from tender.cli.argparser import Parser
from tender.cli.stats import find
from tender.cli.units import amount
from tender.errors import ConfigError, HostError, UsageError, one_line
from tender.observe import counters
from tender.observe.core_helper import NamelessFile
from tender.observe.guests import USERS, RunningGuest, running
from tender.observe.touched import data_ranges
from tender.snapshot import helper
from tender.snapshot.file import size_max

TIMEOUT_S = 10.0
ABOUT = """Save a guest that was started with --snapshots to a file, at its next hypercall. FILE has
all that the guest knows, keys too, and is for its owner only. ptender --restore FILE lets it go on
from there."""


def main(argv: list[str]) -> str:
    """The command; returns what it prints."""
    parser = Parser("ptender snapshot", ABOUT)
    parser.add_argument("guest", metavar="NAME|PID", help="a guest, as ptender ps lists it")
    parser.add_argument("file", metavar="FILE", help="a new file")
    parser.add_argument("--stop", action="store_true", help="end the guest there")
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=float,
        default=TIMEOUT_S,
        help="how many seconds to wait for a hypercall (default: %(default)g)",
    )
    options = parser.parse_args(argv)
    if not 0 < options.timeout < 1 << 31:
        raise UsageError("--timeout: not a number of seconds above 0")
    guest = find(options.guest, running())
    if os.path.lexists(options.file):
        raise ConfigError(f"{options.file}: it exists already: name a new file")
    connection = _connect(guest)
    with connection:
        size = _save(connection, guest, options.file, options.timeout, stop=options.stop)
    ended = ", and ended" if options.stop else ""
    return f"{guest.name}: saved{ended}: {amount(size)} in {options.file}"


def _connect(guest: RunningGuest) -> socket.socket:
    is_own = guest.uid == os.geteuid()
    folder = counters.folder() if is_own else USERS.replace("*", str(guest.uid))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(helper.socket_path(folder, guest.pid))
    except OSError as error:
        connection.close()
        if error.errno == errno.ENOENT:
            raise ConfigError(
                f"{guest.name}: it can't be saved: start it with --snapshots DIR"
            ) from None
        if error.errno == errno.ECONNREFUSED:
            raise _helper_has_ended(guest) from None
        raise HostError(f"{guest.name}: cannot ask for it", "connect", error.errno or 0) from None
    # A user can put a symbolic link there, to the socket of another user's guest.
    uid = helper.peer_uid(connection)
    if uid != guest.uid:
        connection.close()
        raise ConfigError(
            f"{guest.name}: cannot ask for it: its socket is of another user (UID {uid})"
        )
    return connection


def _save(
    connection: socket.socket, guest: RunningGuest, path: str, timeout_s: float, *, stop: bool
) -> int:
    """Have the guest saved to `path`; the bytes that the file takes."""
    folder, name = os.path.split(os.path.abspath(path))
    try:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        target = NamelessFile(folder_fd, name)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(f"{path}: cannot make it: {reason}") from None
    try:
        source = _request(connection, guest, timeout_s, stop=stop)
        size = _copy(source, target.fd)
        target.publish_as(name)
    except OSError as error:
        raise HostError(f"{path}: cannot write it", "write", error.errno or 0) from None
    finally:
        target.discard()
    try:
        connection.send(helper.KEPT)
    except OSError:
        if stop and not _ends(guest.pid):
            raise HostError(
                f"{guest.name}: saved in {path}, but not ended: its snapshot helper was killed"
            ) from None
    return size


def _request(
    connection: socket.socket, guest: RunningGuest, timeout_s: float, *, stop: bool
) -> int:
    """The descriptor of the file that the guest was saved to."""
    connection.settimeout(timeout_s)
    try:
        connection.send(helper.SAVE_AND_STOP if stop else helper.SAVE)
        answer, files, _, _ = socket.recv_fds(connection, helper.TEXT_MAX, 1)
    except TimeoutError:
        raise ConfigError(
            f"{guest.name}: it made no hypercall within {timeout_s:g} s, so it is not saved"
        ) from None
    except ConnectionError:
        answer, files = b"", []
    connection.settimeout(None)
    if not answer:
        if _ends(guest.pid):
            raise ConfigError(f"{guest.name}: it ended before it was saved")
        raise _helper_has_ended(guest)
    if answer != helper.SAVED or len(files) != 1:
        reason = one_line(answer.decode(errors="replace"))
        raise HostError(f"{guest.name}: not saved, in the folder of --snapshots: {reason}")
    info = os.fstat(files[0])
    if not stat.S_ISREG(info.st_mode) or info.st_size > size_max(layout.MEM_MAX):
        raise HostError(f"{guest.name}: what it was saved to is not a snapshot")
    return files[0]


def _helper_has_ended(guest: RunningGuest) -> ConfigError:
    return ConfigError(
        f"{guest.name}: it can't be saved any more: its snapshot helper was killed (the guest runs "
        "on)"
    )


def _ends(pid: int) -> bool:
    """Whether a tender has ended, or does so within a second."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 1)[0])
    finally:
        os.close(fd)


def _copy(source: int, target: int) -> int:
    """Copy a file with its holes; the bytes that are none."""
    length, size = os.fstat(source).st_size, 0
    os.ftruncate(target, length)
    for start, end in data_ranges(source, 0, length):
        size += end - start
        while start < end:
            start += _copy_range(source, target, start, end - start)
    return size


def _copy_range(source: int, target: int, offset: int, count: int) -> int:
    with suppress(OSError):  # between some file systems it does not work
        done = os.copy_file_range(source, target, count, offset, offset)
        if done:
            return done
    data = os.pread(source, count, offset)
    if not data:
        raise OSError(errno.EIO, "")
    return os.pwrite(target, data, offset)
