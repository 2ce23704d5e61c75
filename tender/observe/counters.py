"""The counters page: a file in which others read what a guest does, without asking its tender.

The file is named `NAME.PID.START` and locked (flock) while its tender lives. A header says what the
counters are of; the tender counts in the pages behind it, which it has mapped. A guest that has
taken over its tender can write wrong numbers there, and no name: the header is not mapped, and no
system call of the sandbox takes the file's descriptor.
"""

from __future__ import annotations

import fcntl
import posix as os
from errno import EACCES, ENOENT, ENOSPC, ENXIO
from mmap import ALLOCATIONGRANULARITY
from time import CLOCK_BOOTTIME, clock_gettime_ns

from tender._native import ffi, lib
from tender.cleanup import Cleanup
from tender.config import guest_name
from tender.errors import one_line
from tender.host import environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tender.config import Config
    from tender.image.manifest import Manifest
    from tender.modules.block import BlockDevice
    from tender.modules.net import NetDevice

SYSTEM = "/run/ptender"  # of root's tenders
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
SHARED = 0o022  # a folder with one of these bits is for others to write to
LOOKS = 4  # at the files of others, for each one that is made

_REMEDY = (
    "guests of this user are found by it: log in (su sets none), or set it to a folder that is "
    "this user's own"
)
_are_removed = False  # files of the dead, by this process or the one that it was forked from
own_name = ""  # of the file that this process has made


class Page:
    """An open page; `fd` is its file, and holds the lock."""

    def __init__(self, fd: int, stats: Any) -> None:
        self.fd = fd
        self.stats = stats  # struct stats *
        self.activity, self.console, self.poll = (
            ffi.addressof(stats, name) for name in ("activity", "console", "poll")
        )


def folder() -> str:
    """Where the pages of this user's tenders are; empty: nowhere, without XDG_RUNTIME_DIR."""
    if not os.geteuid():
        return SYSTEM
    runtime = environment("XDG_RUNTIME_DIR") or ""
    return f"{runtime}/ptender" if runtime.startswith("/") else ""


def unlisted() -> str:
    """Why no guest of this user is listed, and what helps; empty: they are listed."""
    path = folder()
    if not os.geteuid():
        return ""
    if not path:
        return f"XDG_RUNTIME_DIR is not set: {_REMEDY}"
    runtime = path.rpartition("/")[0]
    try:
        os.close(open_folder(path))
        return ""
    except OSError as error:
        if error.errno == ENOENT and os.access(runtime, os.W_OK | os.X_OK):
            return ""  # the first guest makes it
        return f"XDG_RUNTIME_DIR={one_line(runtime)}: {error.strerror}: {_REMEDY}"


def publish(
    config: Config,
    cpu: str,
    mem_bytes: int,
    manifest: Manifest,
    devices: Mapping[int, BlockDevice | NetDevice],
    cleanup: Cleanup,
) -> Page | None:
    """Make the page of a guest, and have its `devices` (by handle) count in it.

    None where there can be none: a guest runs all the same.
    """
    present = [each for each in manifest.devices if each.handle in devices]
    header = _header(cpu, mem_bytes)
    header["device_count"] = len(present)
    header["devices"] = [{"type": each.type, "name": each.name.encode()} for each in present]
    mine = Cleanup()
    try:
        fd = _create(config, header, mine)
        stats = _fill(fd, header, mine)
    except OSError:
        mine.close()
        return None
    cleanup.callback(mine.close)
    for index, each in enumerate(present):
        devices[each.handle].count_in(stats.devices[index])
    return Page(fd, stats)


def announce(config: Config, mem_bytes: int, cleanup: Cleanup) -> int | None:
    """Have an spt guest listed: the descriptor of a page that nobody counts in.

    None where there can be none.
    """
    header = _header("spt", mem_bytes)
    header["offset"] = header_size(0)
    stats = ffi.new("struct stats *", {"state": lib.STATS_RUNNING})
    mine = Cleanup()
    try:
        fd = _create(config, header, mine)
        page = bytes(ffi.buffer(ffi.new("struct stats_header *", header), header_size(0)))
        os.pwrite(fd, page + bytes(ffi.buffer(stats, stats_size(0))), 0)
    except OSError:
        mine.close()
        return None
    cleanup.callback(mine.close)
    return fd


def _header(cpu: str, mem_bytes: int) -> dict[str, Any]:
    """The fields of a struct stats_header without devices."""
    return {
        "magic": lib.STATS_MAGIC,
        "version": lib.STATS_VERSION,
        "mem_bytes": mem_bytes,
        "started_ns": clock_gettime_ns(CLOCK_BOOTTIME),
        "cpu": cpu.encode(),
    }


def _create(config: Config, header: Mapping[str, Any], cleanup: Cleanup) -> int:
    """A new file, locked; removed by `cleanup`."""
    path, name = folder(), f"{guest_name(config)}.{os.getpid()}.{header['started_ns']}"
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    directory = open_folder(path)
    try:
        if not _are_removed:
            _remove_some(directory)
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=directory)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                break
            os.close(fd)  # it was removed before it was locked
    finally:
        os.close(directory)
    cleanup.callback(lambda: os.close(fd))
    cleanup.callback(lambda: os.unlink(f"{path}/{name}"))
    global own_name
    own_name = name
    return fd


def open_folder(path: str) -> int:
    """Open a folder of pages, which must be this user's own; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    info = os.fstat(fd)
    if info.st_uid != os.geteuid() or info.st_mode & SHARED:
        os.close(fd)
        raise OSError(EACCES, "it is for others to write to")
    return fd


def remove_dead() -> None:
    """Remove all files of processes that are gone; forks of this process leave that to others."""
    global _are_removed
    try:
        directory = open_folder(folder())
    except OSError:
        return  # nothing was made there
    try:
        _remove_dead(directory, os.listdir(directory))
    finally:
        os.close(directory)
    _are_removed = True


def _remove_some(directory: int) -> None:
    """Not all are looked at: where thousands of guests run, that would be most of a start."""
    names = os.listdir(directory)
    first = os.getpid() * LOOKS % max(1, len(names))
    _remove_dead(directory, [*names[first:], *names[:first]][:LOOKS])


def _remove_dead(directory: int, names: list[str]) -> None:
    """Remove files of processes that are gone; which are, the kernel says at little cost."""
    for name in names:
        pid = name.rpartition(".")[0].rpartition(".")[2]
        if pid.isdigit() and len(pid) < 10 and not os.access(f"/proc/{pid}", os.F_OK):
            remove_unlocked(directory, name)


def remove(name: str) -> None:
    """Remove the file of a tender of this user that has ended."""
    try:
        directory = open_folder(folder())
    except OSError:
        return  # nothing was made there
    try:
        remove_unlocked(directory, name)
    finally:
        os.close(directory)


def remove_unlocked(directory: int, name: str) -> bool:
    """Remove a file whose tender has ended; False: it lives, or can't be removed."""
    try:
        fd = os.open(name, READ, dir_fd=directory)
    except OSError as error:
        if error.errno == ENXIO:  # the socket of a snapshot helper, which was killed, too
            os.unlink(name, dir_fd=directory)
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=directory)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def header_size(devices: int) -> int:
    """Bytes of a struct stats_header with so many devices."""
    last = ffi.offsetof("struct stats_header", "devices")
    return int(last + devices * ffi.sizeof("struct stats_device"))


def stats_size(devices: int) -> int:
    """The same for a struct stats."""
    last = ffi.offsetof("struct stats", "devices")
    return int(last + devices * ffi.sizeof("struct counters[2]"))


def _fill(fd: int, fields: dict[str, Any], cleanup: Cleanup) -> Any:
    """Write the header and map the counters: a struct stats *."""
    devices = fields["device_count"]
    size = header_size(devices)
    offset = -(-size // ALLOCATIONGRANULARITY) * ALLOCATIONGRANULARITY
    header = ffi.new("struct stats_header *", {**fields, "offset": offset})
    # All is written, so that no page is missing later. To allocate it would do as well, but where
    # /run is a disk, the next tender would wait some milliseconds for the removal.
    content = bytes(ffi.buffer(header, size)).ljust(offset + stats_size(devices), b"\0")
    if os.pwrite(fd, content, 0) < len(content):
        raise OSError(ENOSPC, os.strerror(ENOSPC))
    stats = lib.host_map(fd, offset, stats_size(devices))
    if not stats:
        raise OSError(ffi.errno, os.strerror(ffi.errno))
    cleanup.callback(lambda: lib.host_unmap(stats, stats_size(devices)))
    return ffi.cast("struct stats *", stats)
