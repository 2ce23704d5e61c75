"""A guest on a thread of this program, without a sandbox.

The rule here: it has the face of process.Process, as far as a thread can have it: it can be asked
to end, and not be killed.
"""

from __future__ import annotations

import os
import threading

from tender import machine
from tender.dataclass import replace
from tender.stop import Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tender.config import Config
    from tender.machine import Outcome
    from tender.modules import Warn

KICK_EVERY_S = 0.01


class InProcess:
    """One guest's thread."""

    def __init__(self, warn: Warn, on_end: Callable[[], None]) -> None:
        self.pid = os.getpid()
        self.started = False
        self.layers: tuple[str, ...] = ()  # it has no sandbox
        self.missing_layers: tuple[str, ...] = ()
        self._warn = warn
        self._on_end = on_end
        self._stop = Stop()
        self._begun = threading.Lock()  # held until it is known whether the guest can start
        self._thread = 0
        self._ended = self._overdue = False
        self._timer: threading.Timer | None = None
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None

    def start(self, config: Config, deadline_s: float | None) -> None:
        """Run on a thread of its own; returns when the guest is about to run, or has ended."""
        self._begun.acquire()
        # A daemon: a guest that nobody stops does not keep the program from ending.
        thread = threading.Thread(
            target=self.run, args=(config, deadline_s), name=f"guest {config.kernel}", daemon=True
        )
        thread.start()
        self._begun.acquire()

    def run(self, config: Config, deadline_s: float | None) -> None:
        """Run on this thread, to the end."""
        self._thread = threading.get_ident()
        if deadline_s is not None:
            self._timer = threading.Timer(deadline_s, self._too_late)
            self._timer.daemon = True
            self._timer.start()
        try:
            self._outcome = machine.run(config, self._stop, self._warn, started=self._has_started)
        except BaseException as error:
            self._error = error
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        if not self.started and self._begun.locked():
            self._begun.release()
        self._on_end()

    def is_here(self) -> bool:
        """Whether this is the guest's thread."""
        return threading.get_ident() == self._thread

    def ask_to_end(self) -> None:
        """Ask once; whoever waits for it repeats it."""
        self._stop.request()

    def kill(self) -> None:
        """Raises RuntimeError: a thread can't be killed."""
        raise RuntimeError("a guest in this process can't be killed: use stop()")

    def outcome(self) -> Outcome:
        """How it ended; raises what kept the guest from starting."""
        if self._error is not None:
            raise self._error
        if self._outcome is None:
            raise RuntimeError("this guest has no outcome")
        if self._overdue and self._outcome.reason == "stopped":
            return replace(self._outcome, reason="deadline")
        return self._outcome

    def _has_started(self) -> None:
        self.started = True
        if self._begun.locked():
            self._begun.release()

    def _too_late(self) -> None:
        self._overdue = True
        while not self._ended:
            self._stop.request()
            threading.Event().wait(KICK_EVERY_S)
