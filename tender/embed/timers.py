"""Calls that are due at a time, for a thread that waits in epoll.

The rule here: any thread may add one, the thread itself calls them, in the order in which they are
due; what one raises is shown and ends nothing.
"""

from __future__ import annotations

import heapq
import sys
import threading
from itertools import count
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_S = 3600.0  # at most until the next look: epoll_wait(2) takes an int of milliseconds


class Timer:
    """A call that is due at `when` (time.monotonic()), unless it is cancelled."""

    __slots__ = ("function", "when")

    def __init__(self, when: float, function: Callable[[], object] | None) -> None:
        self.when = when
        self.function = function

    def cancel(self) -> None:
        """Call it no more; what it would have called is let go of at once."""
        self.function = None


class Timers:
    """The calls that one thread has to make."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = count()

    def add(self, seconds: float, function: Callable[[], object]) -> tuple[Timer, bool]:
        """Call `function` after `seconds`; and whether that is before all others.

        Calls of one instant come in the order of asking.
        """
        timer = Timer(monotonic() + max(0.0, seconds), function)
        with self._lock:
            is_first = not self._heap or timer.when < self._heap[0][0]
            heapq.heappush(self._heap, (timer.when, next(self._numbers), timer))
        return timer, is_first

    def wait_s(self) -> float | None:
        """How long the thread may wait, in seconds; None: there are none."""
        with self._lock:
            while self._heap and self._heap[0][2].function is None:
                heapq.heappop(self._heap)
            if not self._heap:
                return None
            return min(max(0.0, self._heap[0][0] - monotonic()), LOOK_S)

    def run(self) -> None:
        """Call those that are due by now."""
        now = monotonic()
        while True:
            with self._lock:
                if not self._heap or self._heap[0][0] > now:
                    return
                timer = heapq.heappop(self._heap)[2]
            function, timer.function = timer.function, None
            call(function)
            # No frame that stays holds what was called: a guest that has ended can be collected.
            del function, timer


def call(function: Callable[[], object] | None) -> None:
    """Call it, if there is one, and show what it raises."""
    try:
        if function is not None:
            function()
    except BaseException:  # sys.exit() in somebody's callback ends nobody here
        show_exception()


def show_exception() -> None:
    """As threading reports what a thread did not catch."""
    kind, value, traceback = sys.exc_info()
    if kind is not None:
        thread = threading.current_thread()
        threading.excepthook(threading.ExceptHookArgs((kind, value, traceback, thread)))
