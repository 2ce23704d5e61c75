"""The layers of the sandbox other than the system call filter, each a function raising OSError.

Sources: unshare(2), pivot_root(2), user_namespaces(7), capabilities(7), landlock(7),
close_range(2) and prctl(2) of Linux's manual.
"""

from __future__ import annotations

import fcntl
import posix as os
from errno import EMFILE, EPERM
from time import process_time

from tender._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeVar

    T = TypeVar("T")

CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
MOUNT_POINT = b"/proc"  # a folder that exists everywhere; only this process sees the mount

# linux/landlock.h: what each version can handle of files, of TCP and of other processes.
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_FS = (0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF)
LANDLOCK_NET, LANDLOCK_NET_SINCE = 0x3, 4
LANDLOCK_SCOPED, LANDLOCK_SCOPED_SINCE = 0x3, 6


def call(number: int, *arguments: int) -> int:
    """A system call by its number."""
    result: int = lib.sandbox_call(number, *(*arguments, 0, 0, 0, 0, 0)[:5])
    if result < 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno))
    return result


def _address(cdata: object) -> int:
    return int(ffi.cast("uintptr_t", cdata))


def move_descriptors(places: Mapping[int, int], end: int) -> None:
    """Put the descriptor `places[number]` to each `number` below `end`, and close all others."""
    _raise_limit(end + len(places))
    aside = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, end) for number, fd in places.items()}
    for number, fd in aside.items():
        os.dup2(fd, number, inheritable=False)
    before = 0
    for number in sorted(places):
        if before < number:
            os.closerange(before, number)
        before = number + 1
    _close_from(before)


def _close_from(first: int) -> None:
    try:
        call(lib.SYS_close_range, first, 0xFFFFFFFF)
    except OSError:  # Linux before 5.9, or a seccomp profile of a container
        for name in os.listdir("/proc/self/fd"):
            if int(name) >= first:
                os.closerange(int(name), int(name) + 1)


def _raise_limit(descriptors: int) -> None:
    soft, hard = _get_limit(lib.RLIMIT_NOFILE)
    if hard < descriptors:
        raise OSError(EMFILE, f"{descriptors} are needed, but the limit is {hard} (ulimit -n)")
    if soft < descriptors:
        _set_limit(lib.RLIMIT_NOFILE, descriptors, hard)


def _get_limit(resource: int) -> tuple[int, int]:
    """The soft and the hard limit."""
    both = ffi.new("uint64_t[2]")
    call(lib.SYS_prlimit64, 0, resource, 0, _address(both))
    return both[0], both[1]


def _set_limit(resource: int, soft: int, hard: int) -> None:
    both = ffi.new("uint64_t[2]", [soft, hard])
    call(lib.SYS_prlimit64, 0, resource, _address(both))


def unshare() -> None:
    """New namespaces: no network interface, mounts, IPC objects or host name of others.

    An ordinary user gets them in a new user namespace, which maps only that user.
    """
    own = lib.CLONE_NEWNS | lib.CLONE_NEWNET | lib.CLONE_NEWIPC | lib.CLONE_NEWUTS
    own |= lib.CLONE_NEWCGROUP
    if os.geteuid() == 0:
        call(lib.SYS_unshare, own)
        return
    uid, gid = os.geteuid(), os.getegid()
    call(lib.SYS_unshare, own | lib.CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


NAMESPACES = ("user", "mnt", "net", "ipc", "uts", "cgroup")  # in the order in which to join them


def make_namespaces() -> list[int]:
    """The namespaces of `unshare` with the root of `empty_root`, for other processes to join.

    To make them and to take them apart takes the kernel longer than a short guest runs. They are
    empty, so many guests can share them. Returns descriptors in the order of NAMESPACES.
    """
    made, report = os.pipe()
    wait, hold = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(hold)
            unshare()
            empty_root()
            os.write(report, b"!")
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(report)
    os.close(wait)
    try:
        if not os.read(made, 1):
            raise OSError(EPERM, os.strerror(EPERM))
        names = NAMESPACES if os.geteuid() else NAMESPACES[1:]
        flags = os.O_RDONLY | os.O_CLOEXEC
        return [os.open(f"/proc/{pid}/ns/{name}", flags) for name in names]
    finally:
        os.close(made)
        os.close(hold)
        os.waitpid(pid, 0)


def join_namespaces(fds: list[int]) -> None:
    """Join the namespaces of `make_namespaces`, and close their descriptors."""
    try:
        for fd in fds:
            call(lib.SYS_setns, fd, 0)
    finally:
        for fd in fds:
            os.close(fd)


def empty_root() -> None:
    """Make the root directory an empty, read-only tmpfs."""
    flags = lib.MS_NOSUID | lib.MS_NODEV | lib.MS_NOEXEC
    _mount(b"none", b"/", lib.MS_REC | lib.MS_PRIVATE)
    _mount(b"tmpfs", MOUNT_POINT, flags, b"tmpfs", b"size=4k,nr_inodes=1,mode=555")
    os.chdir(MOUNT_POINT)
    here = ffi.new("char[]", b".")
    call(lib.SYS_pivot_root, _address(here), _address(here))
    call(lib.SYS_umount2, _address(here), lib.MNT_DETACH)
    os.chdir("/")
    _mount(b"none", b"/", flags | lib.MS_REMOUNT | lib.MS_BIND | lib.MS_RDONLY)


def _mount(source: bytes, target: bytes, flags: int, kind: bytes = b"", data: bytes = b"") -> None:
    words = [ffi.new("char[]", word) for word in (source, target, kind, data)]
    source_, target_, kind_, data_ = map(_address, words)
    call(lib.SYS_mount, source_, target_, kind_, flags, data_)


def empty_bounding_set() -> None:
    """No program that this process executes can gain a capability.

    It takes CAP_SETPCAP for each capability that is still in the set.
    """
    if lib.sandbox_empty_bounding_set():
        raise OSError(ffi.errno, os.strerror(ffi.errno))


def become_user(uid: int, gid: int) -> None:
    """An ordinary user without other groups; root's capabilities go with root."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def drop_capabilities() -> None:
    """Empty the capability sets of this thread."""
    lib.sandbox_call(lib.SYS_prctl, lib.PR_CAP_AMBIENT, lib.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, none = _capabilities()
    call(lib.SYS_capset, _address(header), _address(none))


def no_new_privileges() -> None:
    """execve(2) grants no privileges; without CAP_SYS_ADMIN, seccomp(2) requires this."""
    call(lib.SYS_prctl, lib.PR_SET_NO_NEW_PRIVS, 1)


def not_dumpable() -> None:
    """No process of the same user can trace this one or read its memory."""
    call(lib.SYS_prctl, lib.PR_SET_DUMPABLE, 0)


def _capabilities() -> tuple[Any, Any]:
    """A header for this thread, and its sets: effective, permitted, inheritable, twice 32 bits."""
    return ffi.new("uint32_t[2]", [CAPABILITY_VERSION_3, 0]), ffi.new("uint32_t[6]")


def open_as_anyone(path: str) -> int:
    """Open for reading without root's capabilities: /proc/self/pagemap shows more with them."""
    header, sets = _capabilities()
    call(lib.SYS_capget, _address(header), _address(sets))
    before = list(sets)
    sets[0] = sets[3] = 0
    call(lib.SYS_capset, _address(header), _address(sets))
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        sets[0], sets[3] = before[0], before[3]
        call(lib.SYS_capset, _address(header), _address(sets))


def landlock() -> None:
    """Deny all that Landlock handles: paths, TCP ports, abstract sockets and signals to others."""
    version = call(lib.SYS_landlock_create_ruleset, 0, 0, LANDLOCK_CREATE_RULESET_VERSION)
    handled = [LANDLOCK_FS[min(version, len(LANDLOCK_FS)) - 1]]
    handled += [LANDLOCK_NET] if version >= LANDLOCK_NET_SINCE else []
    handled += [LANDLOCK_SCOPED] if version >= LANDLOCK_SCOPED_SINCE else []
    attribute = ffi.new("uint64_t[]", handled)
    ruleset = call(lib.SYS_landlock_create_ruleset, _address(attribute), ffi.sizeof(attribute))
    try:
        call(lib.SYS_landlock_restrict_self, ruleset)
    finally:
        os.close(ruleset)


def memory_bytes() -> int:
    """The size of the address space of this process."""
    fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(fd, 100).split()[0]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        os.close(fd)


def limited(step: Callable[[], T], memory: int, seconds: int) -> T:
    """Call `step`, which may take `memory` bytes and `seconds` of CPU time more than was taken.

    Beyond that it gets a MemoryError, and SIGXCPU ends the process.
    """
    wanted = {lib.RLIMIT_CPU: int(process_time()) + seconds}
    try:
        wanted[lib.RLIMIT_AS] = memory_bytes() + memory
    except OSError:  # no /proc: which is reported where the sandbox is entered
        pass
    before = {resource: _get_limit(resource) for resource in wanted}
    try:
        for resource, most in wanted.items():
            soft, hard = before[resource]
            _set_limit(resource, min(most, soft), hard)
        return step()
    finally:
        for resource, (soft, hard) in before.items():
            _set_limit(resource, soft, hard)


def limit(descriptors: int, address_space: int | None, file_bytes: int | None) -> None:
    """Limit descriptors, address space and file length; None: no limit. Lower limits stay.

    No core file, which would have the guest's memory. Not RLIMIT_NPROC: from Linux 6.14 on, the
    first KVM_RUN starts a kernel thread, and fails with EAGAIN where that limit is 0.
    """
    limits = {
        lib.RLIMIT_CORE: 0,
        lib.RLIMIT_MSGQUEUE: 0,
        lib.RLIMIT_NOFILE: descriptors,
    }
    if address_space is not None:
        limits[lib.RLIMIT_AS] = address_space
    if file_bytes is not None:
        limits[lib.RLIMIT_FSIZE] = file_bytes
    for resource, most in limits.items():
        soft, hard = _get_limit(resource)
        _set_limit(resource, min(most, soft), min(most, hard))
