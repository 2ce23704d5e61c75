"""The one event thread of a program: its guests' processes, consoles, switches and timers.

The rule here: a callback runs on this thread and must not block; what may block (a device that a
user has written) has a thread of its own. Source of how epoll and descriptors go together: Linux,
epoll(7).
"""

from __future__ import annotations

import heapq
import os
import select
import sys
import threading
from itertools import count
from time import monotonic

from tender.embed.latch import Latch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READ, WRITE = select.EPOLLIN, select.EPOLLOUT
GONE = select.EPOLLHUP | select.EPOLLERR  # reported without being asked for
EVENTS_MAX = 256  # of one epoll_wait(2); the others come with the next
WAIT_MAX_S = 3600.0  # epoll_wait(2) takes an int of milliseconds


class Timer:
    """A call that is due at `when` (time.monotonic()), unless it is cancelled."""

    __slots__ = ("function", "when")

    def __init__(self, when: float, function: Callable[[], object] | None) -> None:
        self.when = when
        self.function = function

    def cancel(self) -> None:
        """Do not call it, and release what it would have called at once."""
        self.function = None


class _Entry:
    """A registered descriptor."""

    __slots__ = ("callback", "since")

    def __init__(self, callback: Callable[[int], object], since: int) -> None:
        self.callback = callback
        self.since = since


class Reactor:
    """An epoll set and a thread that serves it, a daemon that starts at the first use.

    Every method may be called from any thread.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, READ)
        self._lock = threading.Lock()
        self._returned: Latch | None = None  # of the callback that runs, for `unregister`
        self._entries: dict[int, _Entry] = {}
        self._timers: list[tuple[float, int, Timer]] = []  # a heap
        self._numbers = count()  # of timers: those of one instant are called in order
        self._round = 0
        self._busy: _Entry | None = None
        self._thread: threading.Thread | None = None

    def register(self, fd: int, events: int, callback: Callable[[int], object]) -> None:
        """Call `callback(events)` whenever `fd` has any of `events` (READ, WRITE), or is GONE.

        The exception of a callback is shown, and its descriptor is unregistered.
        Raises OSError: EEXIST if `fd` is registered, EPERM for a plain file, EBADF.
        """
        with self._lock:
            # Before the first event can come: the thread must find the entry.
            if fd in self._entries:
                raise FileExistsError(f"descriptor {fd} is registered already")
            self._entries[fd] = _Entry(callback, self._round)
            try:
                self._epoll.register(fd, events)
            except BaseException:
                del self._entries[fd]
                raise
            self._start()

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events of a descriptor, if it is registered."""
        with self._lock:
            if fd in self._entries:
                self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Stop waiting for `fd`, if it is registered; it may be closed after this.

        On return its callback does not run any more, unless this is called by the callback. So
        the caller must not hold a lock that the callback takes.
        """
        with self._lock:
            entry = self._entries.get(fd)
            if entry is None:
                return
            self._drop(fd, entry)
            if self._busy is not entry or self.is_here():
                return
            if self._returned is None:
                self._returned = Latch()
            returned = self._returned
        returned.wait()

    def _drop(self, fd: int, entry: _Entry) -> None:
        if self._entries.get(fd) is entry:
            del self._entries[fd]
            try:
                self._epoll.unregister(fd)
            except OSError:  # closed already
                pass

    def call_soon(self, function: Callable[[], object]) -> Timer:
        """Call `function` on the thread, after what it is doing."""
        return self.call_later(0, function)

    def call_later(self, seconds: float, function: Callable[[], object]) -> Timer:
        """Call `function` on the thread after `seconds`; calls of one instant keep their order."""
        timer = Timer(monotonic() + max(0.0, seconds), function)
        with self._lock:
            is_first = not self._timers or timer.when < self._timers[0][0]
            heapq.heappush(self._timers, (timer.when, next(self._numbers), timer))
            self._start()
        if is_first and not self.is_here():
            self._wake()
        return timer

    def is_here(self) -> bool:
        """Whether this is the reactor's own thread, which must not wait for a callback."""
        return self._thread is threading.current_thread()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ptender I/O", daemon=True)
            self._thread.start()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        while True:
            self._round += 1
            ready = self._epoll.poll(self._wait_s(), EVENTS_MAX)
            for fd, events in ready:
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                else:
                    self._serve(fd, events)
            self._run_timers()

    def _wait_s(self) -> float | None:
        """How long the thread may sleep, in seconds; None: there is no timer."""
        with self._lock:
            while self._timers and self._timers[0][2].function is None:
                heapq.heappop(self._timers)
            if not self._timers:
                return None
            return min(max(0.0, self._timers[0][0] - monotonic()), WAIT_MAX_S)

    def _run_timers(self) -> None:
        now = monotonic()
        while True:
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                timer = heapq.heappop(self._timers)[2]
            function, timer.function = timer.function, None
            call(function)
            # No frame that stays refers to what was called: a guest that ended can be collected.
            del function, timer

    def _serve(self, fd: int, events: int) -> None:
        with self._lock:
            entry = self._entries.get(fd)
            # An event of this round may be of a descriptor that had the number before.
            if entry is None or entry.since >= self._round:
                return
            self._busy = entry
        try:
            entry.callback(events)
        except BaseException:
            with self._lock:
                self._drop(fd, entry)
            show_exception()
        finally:
            with self._lock:
                self._busy = None
                returned, self._returned = self._returned, None
            if returned is not None:
                returned.set()

    def _forget(self) -> None:
        """In a forked child: its copies of the descriptors are closed, the thread is not here."""
        self._epoll.close()
        os.close(self._wake_fd)


def call(function: Callable[[], object] | None) -> None:
    """Call `function`, if it is one; an exception is shown and goes no further."""
    try:
        if function is not None:
            function()
    except BaseException:  # sys.exit() in a user's callback too
        show_exception()


def show_exception() -> None:
    """Show the current exception as threading shows one that a thread did not catch."""
    kind, value, traceback = sys.exc_info()
    if kind is not None:
        thread = threading.current_thread()
        threading.excepthook(threading.ExceptHookArgs((kind, value, traceback, thread)))


_lock = threading.Lock()
_reactor: Reactor | None = None


def reactor() -> Reactor:
    """The program's reactor. A forked child gets one of its own when it asks."""
    global _reactor
    with _lock:
        if _reactor is None:
            _reactor = Reactor()
        return _reactor


def _after_fork() -> None:
    global _lock, _reactor
    _lock = threading.Lock()
    if _reactor is not None:
        _reactor._forget()
        _reactor = None


os.register_at_fork(after_in_child=_after_fork)
