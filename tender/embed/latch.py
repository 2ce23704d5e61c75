"""A latch: set once, for good, and waited for by any number of threads.

The rule here: Ctrl-C may end a wait, and must break nothing by it. CPython raises
KeyboardInterrupt on the main thread whenever a call has returned or a function begins, so also
inside threading.Event and Condition, which are written in Python: between their taking an inner
lock and the `with` that would release it. From then on whoever sets them hangs. A lock is written
in C: `with lock:` has taken it and will release it, or neither. So a latch has a lock for each
waiter, and a waiter that is interrupted leaves nothing that anybody else needs.

A signal that arrives after the interpreter looked for signals and before the thread sleeps does
not end that sleep. So nobody sleeps longer than LOOK_EVERY_S at a time.
"""

from __future__ import annotations

import threading
from time import monotonic

LOOK_EVERY_S = 0.5


class Latch:
    """Not set, and from its `set` on set."""

    __slots__ = ("_sleepers", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._sleepers: list[threading.Lock] = []  # locked, until the latch is set

    def set(self) -> None:
        """Wake all who wait. Once more does nothing."""
        self.is_set = True
        while self._sleepers:
            self._sleepers.pop().release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set; False: it is not after `timeout_s` (None: wait without end)."""
        limit = None if timeout_s is None else monotonic() + timeout_s
        lock = threading.Lock()
        lock.acquire()
        self._sleepers.append(lock)
        while not self.is_set:
            left_s = LOOK_EVERY_S if limit is None else limit - monotonic()
            if left_s <= 0:
                break
            lock.acquire(timeout=min(left_s, LOOK_EVERY_S))
        try:
            self._sleepers.remove(lock)
        except ValueError:  # `set` has taken it out
            pass
        return self.is_set
