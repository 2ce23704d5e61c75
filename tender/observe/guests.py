"""The guests that run, as their counters pages say: see tender/observe/counters.py.

The rule here: a page may be of a tender that its guest has taken over, and, for root, of a hostile
user. It is read once, in full, and everything in it is checked; a page that makes no sense is no
guest. Nothing is taken from the header that a file name says.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from datetime import datetime, timezone
from functools import cache
from glob import glob
from time import CLOCK_BOOTTIME, clock_gettime_ns, time

from tender._native import ffi, lib
from tender.dataclass import dataclass
from tender.errors import ConfigError
from tender.image.manifest import is_name
from tender.modules import counters_value
from tender.observe import counters
from tender.outcome import Counters, NetCounters, Statistics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

USERS = "/run/user/*/ptender"
_FILE_NAME = re.compile(r"([A-Za-z0-9._-]{1,64})\.([0-9]{1,9})\.([0-9]{1,20})")
_SIZE_MAX = 1 << 18  # bytes, with room for pages of 64 KiB
_CPUS = ("kvm", "native", "soft", "spt")
_STATES = {lib.STATS_STARTING: "starting", lib.STATS_RUNNING: "running"}


@dataclass
class RunningGuest:
    """A guest that runs, and what it has done until now.

    `guest_s` is the time in the guest and `tender_s` all other since the start, in seconds: in its
    tender, or waiting in POLL. `exits` is how often it was left. `started` is in seconds since the
    epoch. An spt guest has no tender that counts: its `cpu` is "spt", `guest_s` the CPU time of
    its process, and `exits`, `tender_s` and `statistics` are zero.
    """

    name: str
    pid: int
    uid: int
    cpu: str
    state: str
    started: float
    uptime_s: float
    mem_bytes: int
    exits: int
    guest_s: float
    tender_s: float
    statistics: Statistics

    @property
    def is_counted(self) -> bool:
        """Whether there are counters of what it did."""
        return self.cpu != "spt"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it; without what is not counted."""
        started = datetime.fromtimestamp(self.started, timezone.utc)
        found = {
            **self.__dict__,
            "started": started.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "statistics": self.statistics.as_dict(),
        }
        uncounted = () if self.is_counted else ("exits", "tender_s", "statistics")
        return {name: value for name, value in found.items() if name not in uncounted}


def running() -> list[RunningGuest]:
    """The guests of this user, or of all users for root; the oldest first.

    What a tender has left that was killed is removed on the way, in the caller's own folder.
    Raises ConfigError where guests of this user can't be found.
    """
    if unlisted := counters.unlisted():
        raise ConfigError(unlisted)
    folders = [counters.folder(), *([] if os.geteuid() else sorted(glob(USERS)))]
    found = [guest for path in folders if path for guest in _in_folder(path)]
    return sorted(found, key=lambda guest: (guest.started, guest.pid))


def _in_folder(path: str) -> Iterator[RunningGuest]:
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        info = os.fstat(folder)
        is_own = info.st_uid == os.geteuid() and not info.st_mode & counters.SHARED
        for name in os.listdir(folder):
            match = _FILE_NAME.fullmatch(name)
            read = match and _read(folder, name)
            if match and read:
                guest = _parse(match[1], int(match[2]), *read)
                if guest:
                    yield guest
            elif match and is_own:
                counters.remove_unlocked(folder, name)
    finally:
        os.close(folder)


def _read(folder: int, name: str) -> tuple[int, bytes] | None:
    """The owner and the contents of a page; None: it has no tender, or is no such file."""
    try:
        fd = os.open(name, counters.READ, dir_fd=folder)
    except OSError:
        return None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return info.st_uid, os.pread(fd, _SIZE_MAX, 0)
    except OSError:
        pass
    finally:
        os.close(fd)
    return None


def _parse(name: str, pid: int, uid: int, data: bytes) -> RunningGuest | None:
    header = _struct("struct stats_header", data)
    count, offset = header.device_count, header.offset
    if header.magic != lib.STATS_MAGIC or header.version != lib.STATS_VERSION:
        return None  # it is being made, or of another version
    if count > lib.STATS_DEVICES or len(data) < counters.header_size(count):
        return None
    if len(data) - offset < counters.stats_size(count):
        return None
    devices = header.devices[0:count]
    names = [_text(each.name) for each in devices]
    cpu = _text(header.cpu)
    if cpu not in _CPUS or not all(map(is_name, names)):
        return None
    stats = _struct("struct stats", data[offset:])
    now_ns = clock_gettime_ns(CLOCK_BOOTTIME)
    uptime_s = max(0, now_ns - header.started_ns) / 1e9
    if cpu == "spt":
        guest_s, tender_s = _process_seconds(pid), 0.0
    else:
        guest_s = min(_guest_seconds(stats.activity.guest_ticks), uptime_s)
        tender_s = uptime_s - guest_s
    return RunningGuest(
        name,
        pid,
        uid,
        cpu,
        _STATES.get(stats.state, "unknown"),
        time() - uptime_s,
        uptime_s,
        header.mem_bytes,
        stats.activity.exits,
        guest_s,
        tender_s,
        _statistics(stats, names, [each.type for each in devices]),
    )


def _process_seconds(pid: int) -> float:
    """The CPU time of a process; 0 where it has ended. Source: proc_pid_stat(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def _text(field: Any) -> str:
    """What a char[] has."""
    return bytes(ffi.string(field)).decode("ascii", errors="replace")


def _struct(name: str, data: bytes) -> Any:
    """The struct that `data` begins with; what is missing of it is zero."""
    value = ffi.new(f"{name} *")
    ffi.memmove(value, data, min(len(data), ffi.sizeof(name)))
    return value


def _statistics(stats: Any, names: list[str], kinds: list[int]) -> Statistics:
    block: dict[str, Counters] = {}
    net: dict[str, NetCounters] = {}
    for name, kind, pair in zip(names, kinds, stats.devices, strict=False):
        if kind == lib.MFT_DEV_NET_BASIC:
            net[name] = NetCounters(counters_value(pair[0]), counters_value(pair[1]))
        else:
            block[name] = counters_value(pair[0])
    return Statistics(counters_value(stats.console), counters_value(stats.poll), block, net)


def _guest_seconds(ticks: int) -> float:
    """struct activity has the meaning."""
    if ticks < 0:
        ticks += lib.host_ticks()
    return max(0, ticks) / (_ticks_hz() or 1)


@cache
def _ticks_hz() -> int:
    return lib.host_ticks_hz()
