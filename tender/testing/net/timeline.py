"""The time of a switch: the interface, and real time. Virtual time is in virtual.py.

The rule here: every thread uses the state of a switch with `lock` held; a wait releases it.
"""

from __future__ import annotations

import threading
from time import monotonic_ns, time_ns

from tender.embed.reactor import reactor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Timeline(Protocol):
        """A clock of nanoseconds since the switch was made, with timers and waiting."""

        virtual: bool
        start_ns: int  # since the epoch
        lock: threading.RLock

        def now_ns(self) -> int: ...
        def call_at(self, when_ns: int, function: Callable[[], object]) -> None: ...
        def notify(self) -> None: ...
        def wait(self, predicate: Callable[[], object], timeout_s: float) -> bool: ...
        def close(self) -> None: ...


class RealTime:
    """The host's clock; timers are called on the reactor's thread."""

    virtual = False

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._began_ns = monotonic_ns()
        self._closed = False
        self.start_ns = time_ns()

    def now_ns(self) -> int:
        return monotonic_ns() - self._began_ns

    def call_at(self, when_ns: int, function: Callable[[], object]) -> None:
        reactor().call_later((when_ns - self.now_ns()) / 1e9, lambda: self._call(function))

    def _call(self, function: Callable[[], object]) -> None:
        with self.lock:
            if not self._closed:
                function()

    def notify(self) -> None:
        """Let every wait evaluate its predicate again."""
        self._changed.notify_all()

    def wait(self, predicate: Callable[[], object], timeout_s: float) -> bool:
        """Wait until `predicate` is true; False after `timeout_s` seconds, or when it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: predicate() or self._closed, timeout_s)
            return bool(predicate())

    def close(self) -> None:
        with self.lock:
            self._closed = True
            self.notify()
