"""The host's side of devices: what each is attached to, opened and checked."""

from __future__ import annotations

import _stat as stat
import fcntl
import posix as os

from tender._native import ffi, lib
from tender.checks import decoded, encoded
from tender.config import guest_name
from tender.dataclass import replace
from tender.errors import DeviceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeVar

    from tender.cleanup import Cleanup
    from tender.config import Config

    Value = TypeVar("Value")
    Given = tuple[tuple["str | None", Value], ...]


def keep_descriptors(given: Given[Value], what: str, cleanup: Cleanup) -> Given[Value]:
    """The same values with descriptors of the tender's own in them.

    To be called before the tender opens anything: then a number that the user did not pass is
    not open, and can't name something of the tender's.
    """
    kept: dict[int, int] = {}
    for _, value in given:
        fd = getattr(value, "fd", None)
        if fd is not None:
            if fd in kept:
                raise DeviceError(f"@{fd}: {what}: it is given twice")
            kept[fd] = keep_descriptor(fd, f"@{fd}: {what}")
            cleanup.callback(lambda fd=kept[fd]: os.close(fd))  # type: ignore[misc]
    return tuple(
        (name, replace(value, fd=kept[value.fd]) if hasattr(value, "fd") else value)
        for name, value in given
    )


def keep_descriptor(fd: int, where: str) -> int:
    """A copy of a descriptor, which its owner may close."""
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except (OSError, OverflowError, ValueError):
        raise DeviceError(f"{where}: no such descriptor") from None


def write_all(fd: int, data: bytes) -> None:
    """Write all of it, however much the kernel takes at a time. Raises OSError."""
    while data:
        data = data[os.write(fd, data) :]


def set_title(name: str, words: Sequence[str]) -> None:
    """Show this process as `name` (15 bytes of it) in top(1), and as `words` in ps(1).

    The kernel reads the words where it put the process's own at its start, so there is room for as
    many bytes. Source: proc_pid_stat(5), arg_start and arg_end.
    """
    try:
        with open("/proc/self/comm", "wb", buffering=0) as file:
            file.write(encoded(name))
        with open("/proc/self/stat", "rb", buffering=0) as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:  # no /proc, which only shows it
        return
    start, end = map(int, fields[45:47])
    size = end - start
    if size > 0:
        title = b"\0".join(map(encoded, words))[: size - 1]
        ffi.buffer(ffi.cast("char *", start), size)[:] = title.ljust(size, b"\0")


def set_guest_title(program: str, config: Config, words: Sequence[str]) -> None:
    """Show this process as the tender of a guest: PROGRAM:NAME, and its words."""
    set_title(f"{program}:{guest_name(config).removesuffix('.hvt')}", [program, *words])


def environment(name: str) -> str | None:
    """A variable of the environment: os.environ.get(), without the import of `os`."""
    value = lib.getenv(name.encode())
    return None if value == ffi.NULL else decoded(ffi.string(value))


def process_name() -> bytes:
    """The name of this process; empty where /proc is missing."""
    try:
        with open("/proc/self/comm", "rb", buffering=0) as file:
            return file.read().rstrip(b"\n")
    except OSError:
        return b""


def random_mac() -> bytes:
    """A locally administered unicast address."""
    mac = bytearray(os.urandom(6))
    mac[0] = mac[0] & 0xFE | 0x02
    return bytes(mac)


def socket_type(fd: int) -> int | None:
    """SOCK_STREAM, SOCK_SEQPACKET, ...; None for a descriptor that is not a socket."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return None
    from _socket import socket

    copy = socket(fileno=os.dup(fd))
    try:
        return copy.type
    finally:
        copy.close()
