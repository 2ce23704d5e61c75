"""The state of a service, sent to its manager. Source: sd_notify(3)."""

from __future__ import annotations

import os
from socket import AF_UNIX, SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK, socket

from tender._native import lib
from tender.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tender.cleanup import Cleanup


def open_socket(path: str, cleanup: Cleanup) -> int:
    """A descriptor of a socket that is connected to the manager's; `path` is NOTIFY_SOCKET.

    Raises HostError.
    """
    manager = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
    try:
        manager.connect(f"\0{path[1:]}" if path.startswith("@") else path)
    except (OSError, ValueError) as error:
        errno = error.errno if isinstance(error, OSError) else None
        raise HostError(f"NOTIFY_SOCKET={path}", "connect", errno or 0) from None
    fd = manager.detach()
    cleanup.callback(lambda: os.close(fd))
    return fd


def ready(fd: int, kernel: str) -> None:
    """The guest is about to run."""
    _send(fd, f"READY=1\nSTATUS=running {os.path.basename(kernel)}")


def stopping(fd: int, reason: str, status: int) -> None:
    """The guest has ended."""
    _send(fd, f"STOPPING=1\nSTATUS=guest {reason}, status {status}")


def _send(fd: int, text: str) -> None:
    data = text.encode(errors="replace")
    lib.host_write(fd, data, len(data))  # a manager that does not read is no error of the guest's
