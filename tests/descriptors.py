"""What a process has open, so that a test can say that nothing is left of what it did.

Compared by number and by what it is: an earlier test's descriptor may be closed in the meantime,
by a thread or by the garbage collector, and a count would miss what has taken its place.
"""

from __future__ import annotations

import os


def open_descriptors(pid: int | str = "self") -> set[tuple[int, str]]:
    """The process's descriptors, each with the target of its link (proc_pid_fd(5))."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.add((int(fd), os.readlink(f"/proc/{pid}/fd/{fd}")))
        except FileNotFoundError:
            pass  # that of the listing itself, or closed since
    return found
