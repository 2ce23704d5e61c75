"""The thread of a program that watches what its guests' processes say, and their ends.

The rule here: it never waits for anybody but the kernel. An event is only a hint: who is called
looks for himself whether there is something.
"""

from __future__ import annotations

import os
import select
import threading

from tender.embed import timers
from tender.embed.timers import Timer, Timers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[[], None]


class Monitor:
    """Calls what watches a descriptor when it is readable, and timers when it is time."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Call] = {}
        self._timers = Timers()
        self._ending = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self._wake_fd, self._woken)
        self._thread = threading.Thread(target=self._run, name="ptender guests", daemon=True)
        self._thread.start()

    def is_here(self) -> bool:
        """Whether this is its thread."""
        return threading.current_thread() is self._thread

    def watch(self, fd: int, call: Call) -> None:
        """Call `call` on this thread whenever `fd` can be read."""
        self._calls[fd] = call
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """To be called on this thread, while the descriptor is open."""
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, call: Call) -> Timer:
        """Call once, on this thread, unless it is cancelled before."""
        timer, is_first = self._timers.add(seconds, call)
        if is_first:
            os.eventfd_write(self._wake_fd, 1)
        return timer

    def close(self) -> None:
        """End the thread; from any other one."""
        self._ending = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()

    def forget(self) -> None:
        """In a forked child, where the thread is not."""
        self._epoll.close()
        os.close(self._wake_fd)

    def _woken(self) -> None:
        os.eventfd_read(self._wake_fd)

    def _run(self) -> None:
        while not self._ending:
            for fd, _ in self._epoll.poll(self._timers.wait_s()):
                timers.call(self._calls.get(fd))
            self._timers.run()
