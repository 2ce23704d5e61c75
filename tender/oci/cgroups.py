"""Control groups: a container's limits, written and joined before its memory is touched.

Version 1 where its controllers are mounted, else version 2. The controller of devices is left
alone: after lockdown a tender opens nothing. Sources: Linux, Documentation/admin-guide/
cgroup-v2.rst and cgroup-v1/; for the weight of shares, the runtime specification's config-linux.md.
"""

from __future__ import annotations

import os
import time
from errno import EBUSY

from tender.dataclass import dataclass
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeAlias

    Limits: TypeAlias = Mapping[str, int | str]

V1: Mapping[str, Mapping[str, str]] = {
    "memory": {
        "memory.limit": "memory.limit_in_bytes",
        "memory.swap": "memory.memsw.limit_in_bytes",
        "memory.reservation": "memory.soft_limit_in_bytes",
    },
    "cpu": {
        "cpu.shares": "cpu.shares",
        "cpu.period": "cpu.cfs_period_us",
        "cpu.quota": "cpu.cfs_quota_us",
    },
    "cpuset": {"cpu.cpus": "cpuset.cpus", "cpu.mems": "cpuset.mems"},
    "pids": {"pids.limit": "pids.max"},
    "cpuacct": {},
    "freezer": {},
}
MOUNTS = "/proc/self/mountinfo"
LEAVE_S = 10  # for a killed process to leave its groups, on a busy machine
OPTIONAL = ("memory.memsw.limit_in_bytes", "memory.swap.max")  # a kernel without swap accounting


@dataclass
class Group:
    """A control group in one hierarchy."""

    mount: str  # of the hierarchy
    folder: str
    controllers: tuple[str, ...]  # of version 1; none in version 2


def find(path: str) -> tuple[Group, ...]:
    """Where the group `path` is, or is to be, in each hierarchy. Raises HostError."""
    if path.count(":") == 2:
        raise HostError(f"cgroup {path}: systemd's groups are not supported: use cgroupfs")
    groups = []
    for mount, controllers in _hierarchies():
        folder = os.path.normpath(os.path.join(mount, path.strip("/")))
        if not folder.startswith(f"{mount.rstrip('/')}/"):
            raise HostError(f"cgroup {path}: not below {mount}")
        groups.append(Group(mount, folder, controllers))
    return tuple(groups)


def make(groups: tuple[Group, ...], limits: Limits) -> None:
    """Make the groups, with these limits of bundle.LIMITS. Raises HostError."""
    for group in groups:
        try:
            os.makedirs(group.folder, exist_ok=True)
            if not group.controllers:
                _pass_controllers_on(group.mount, group.folder)
            if "cpuset" in group.controllers:
                _inherit_cpus(group.mount, group.folder)
        except OSError as error:
            raise HostError(f"cgroup {group.folder}", "mkdir", error.errno or 0) from None
        version_1 = group.controllers
        files = _files_v1(version_1, limits) if version_1 else _files_v2(limits)
        for name, value in files.items():
            _write(os.path.join(group.folder, name), value)


def join(folders: tuple[str, ...]) -> None:
    """Move this process to the groups. Raises HostError."""
    for folder in folders:
        _write(os.path.join(folder, "cgroup.procs"), str(os.getpid()))


def remove(folders: tuple[str, ...]) -> None:
    """Remove the groups; one that is gone, or has other processes, stays as it is.

    A process that was killed leaves its groups a moment after it can be seen no more, even after
    wait(2), and so does its child, the guest's process: they have LEAVE_S, together.
    """
    deadline = time.monotonic() + LEAVE_S
    for folder in folders:
        while not _removed(folder) and time.monotonic() < deadline:
            time.sleep(0.001)


def _removed(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except OSError as error:
        return error.errno != EBUSY
    return True


def processes(folders: tuple[str, ...]) -> list[int]:
    """The processes of a container's group."""
    for folder in folders:
        try:
            with open(os.path.join(folder, "cgroup.procs")) as file:
                return [int(line) for line in file]
        except OSError:
            pass
    return []


def _hierarchies() -> list[tuple[str, tuple[str, ...]]]:
    """Where each is mounted, with its controllers of version 1; version 2 has none here."""
    found: list[tuple[str, tuple[str, ...]]] = []
    with open(MOUNTS) as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _, options = after.split()[:3]
            mount = before.split()[4]
            controllers = tuple(each for each in options.split(",") if each in V1)
            if kind == "cgroup2" or (kind == "cgroup" and controllers):
                found.append((mount, controllers if kind == "cgroup" else ()))
    version_1 = [each for each in found if each[1]]
    return version_1 or found[:1]


def _files_v1(controllers: tuple[str, ...], limits: Limits) -> dict[str, str]:
    return {
        file: _or_max(limits[name]) if file == "pids.max" else str(limits[name])
        for controller in controllers
        for name, file in V1[controller].items()
        if limits.get(name)
    }


def _files_v2(limits: Limits) -> dict[str, str]:
    files = {
        file: _or_max(limits[name])
        for name, file in (
            ("memory.limit", "memory.max"),
            ("memory.reservation", "memory.low"),
            ("pids.limit", "pids.max"),
            ("cpu.cpus", "cpuset.cpus"),
            ("cpu.mems", "cpuset.mems"),
        )
        if limits.get(name)
    }
    memory, both = limits.get("memory.limit", 0), limits.get("memory.swap")
    if isinstance(both, int) and isinstance(memory, int) and both:
        if 0 < both < memory:
            raise HostError(f"memory.swap {both}: less than memory.limit {memory}")
        files["memory.swap.max"] = _or_max(both - memory if both > 0 else both)
    if limits.get("cpu.quota"):
        files["cpu.max"] = f"{_or_max(limits['cpu.quota'])} {limits.get('cpu.period', 100_000)}"
    shares = limits.get("cpu.shares")
    if isinstance(shares, int) and shares:
        files["cpu.weight"] = str(1 + (max(2, min(shares, 262144)) - 2) * 9999 // 262142)
    return files


def _or_max(value: int | str) -> str:
    return "max" if isinstance(value, int) and value < 0 else str(value)


def _pass_controllers_on(mount: str, folder: str) -> None:
    """Let each ancestor pass on the controllers that it has.

    One that can't is no error: the file of a limit is missing then, and says so.
    """
    parent = mount
    for part in os.path.relpath(folder, mount).split("/"):
        with open(os.path.join(parent, "cgroup.controllers")) as file:
            there = file.read().split()
        for controller in ("memory", "cpu", "cpuset", "pids"):
            if controller in there:
                try:
                    _write(os.path.join(parent, "cgroup.subtree_control"), f"+{controller}")
                except HostError:
                    pass
        parent = os.path.join(parent, part)


def _inherit_cpus(mount: str, folder: str) -> None:
    """A new group of version 1 has no CPU and no memory node, and takes no process until it has."""
    parent = mount
    for part in os.path.relpath(folder, mount).split("/"):
        child = os.path.join(parent, part)
        for name in ("cpuset.cpus", "cpuset.mems"):
            with open(os.path.join(child, name)) as file:
                if file.read().strip():
                    continue
            with open(os.path.join(parent, name)) as file:
                _write(os.path.join(child, name), file.read())
        parent = child


def _write(path: str, value: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as error:
        if os.path.basename(path) not in OPTIONAL:
            raise HostError(f"{path}: {value.strip()}", "write", error.errno or 0) from None
