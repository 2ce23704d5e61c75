"""The thread of a program that watches what its guests' processes say, and their ends.

The rule here: it never waits for anybody but the kernel. An event is only a hint: who is called
looks for himself whether there is something.
"""

from __future__ import annotations

import heapq
import os
import select
import sys
import threading
from itertools import count
from time import monotonic

from tender.reactor import Timer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Call = Callable[[], None]

LOOK_MAX_S = 3600.0  # epoll takes a limited number of milliseconds, and a deadline may be far


class Monitor:
    """Calls what watches a descriptor when it is readable, and timers when it is time."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Call] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self._ending = False
        self._lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self._wake_fd, self._woken)
        self._thread = threading.Thread(target=self._run, name="ptender guests", daemon=True)
        self._thread.start()

    def is_here(self) -> bool:
        """Whether this is its thread."""
        return threading.current_thread() is self._thread

    def watch(self, fd: int, call: Call) -> None:
        self._calls[fd] = call
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """To be called on this thread, while the descriptor is open."""
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, call: Call) -> Timer:
        """Call once, on this thread, unless it is cancelled before."""
        timer = Timer(monotonic() + seconds, call)
        with self._lock:
            heapq.heappush(self._timers, (timer.when, next(self._numbers), timer))
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
            for fd, _ in self._epoll.poll(self._next()):
                self._call(self._calls.get(fd))
            self._run_timers()

    def _run_timers(self) -> None:
        for timer in self._due():
            function, timer.function = timer.function, None
            self._call(function)

    def _call(self, call: Callable[[], object] | None) -> None:
        # No frame that stays holds what is called: a guest that has ended can be collected.
        try:
            if call is not None:
                call()
        except BaseException:  # sys.exit() of somebody's callback ends nobody here
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self._thread)))

    def _next(self) -> float | None:
        with self._lock:
            while self._timers and self._timers[0][2].function is None:
                heapq.heappop(self._timers)
            if not self._timers:
                return None
            return min(LOOK_MAX_S, max(0.0, self._timers[0][0] - monotonic()))

    def _due(self) -> list[Timer]:
        due = []
        with self._lock:
            while self._timers and self._timers[0][0] <= monotonic():
                due.append(heapq.heappop(self._timers)[2])
        return due
