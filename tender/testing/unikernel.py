"""A guest in a test: a `Guest` that may be in the virtual time of its switch.

The rule here: in virtual time, every method that waits lets that time advance, and every other
method is called while the guest waits, so that results are the same on every run.
"""

from __future__ import annotations

import os
import re
import threading
import time

from tender.config import VIRTUAL_START_NS, VirtualTime
from tender.dataclass import replace
from tender.embed.console import Console
from tender.embed.reactor import reactor
from tender.errors import DeviceError, GuestEnded
from tender.guest import GRACE_S, Guest
from tender.testing.net.port import GuestPort
from tender.testing.net.virtual import Stuck, VirtualTimeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from typing import Any, Protocol, TypeVar

    from typing_extensions import Unpack

    from tender.embed.interfaces import GuestOptions, NetSpec
    from tender.embed.snapshots import Snapshot
    from tender.outcome import Outcome
    from tender.testing.net.virtual import Participant

    T = TypeVar("T")

    class Session(Protocol):
        """What is needed of session.Session."""

        trace: bool

        def trace_file(self) -> Path: ...

        def add_guest(self, guest: Unikernel, net: Iterable[object], /) -> None: ...


LOOK_EVERY_S = 0.02
ROUNDS = 5  # of the reactor, which read all that a console's socket can hold
ABORTED = 255  # the status of solo5_abort()
BAD_ENDS = ("fault", "sandbox", "host")  # reasons of an outcome
END_S = 10.0  # of real time, for the process of a guest that has left virtual time to end


class _Console(Console):
    """The console of a test's guest: its default timeout is the guest's `patience`, and in virtual
    time a wait lets that time advance."""

    def __init__(self, guest: Unikernel) -> None:
        super().__init__()
        self._guest = guest

    def wait_for(
        self, pattern: str | re.Pattern[str], timeout: float | None = None
    ) -> re.Match[str]:
        """Console.wait_for; None is the guest's `patience`, in seconds of its own time."""
        try:
            return super().wait_for(pattern, self._guest.patience if timeout is None else timeout)
        except GuestEnded:
            self._guest.outcome_checked = True
            raise

    def _wait(self, is_done: Callable[[], bool], timeout_s: float | None) -> bool:
        participant = self._guest.participant
        if participant is None:
            return super()._wait(is_done, timeout_s)
        seconds = self._guest.patience if timeout_s is None else timeout_s
        if self._guest.wait_virtually(lambda: self._guest.read_output() and is_done(), seconds):
            return True
        return participant.gone and super()._wait(is_done, END_S)

    def _within(self, timeout_s: float | None) -> str:
        of_time = "" if self._guest.participant is None else " of virtual time"
        return super()._within(timeout_s) + of_time


class Unikernel(Guest):
    """A guest of a test, made by the fixture `unikernel` and ended with the test.

    `patience` is the timeout, in seconds, of methods that are given none. All else is Guest's.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str],
        *args: str,
        net: Mapping[str, NetSpec] | None = None,
        patience: float = 60.0,
        **options: Unpack[GuestOptions],
    ) -> None:
        self.patience = patience
        ports = {name: each for name, each in (net or {}).items() if isinstance(each, GuestPort)}
        self.switch_ports = list(ports.values())
        self._macs = {name: port.mac for name, port in ports.items()}
        self.participant: Participant | None = None
        self.warnings: list[str] = []  # of the host's errors with its devices
        self.session_of_test: Callable[[], Session] | None = None  # what clones end with
        self.can_debug = True
        self._template: Snapshot | None = None
        self._cpu = options.get("cpu", "auto")
        self.start_error_raised = False
        self.outcome_checked = False  # the test has been told how it ended
        self.kernel = str(kernel)
        self._timeline = _shared_time(self.switch_ports)
        if self._timeline is not None and options.get("cpu") not in (None, "auto", "soft"):
            raise DeviceError(
                f"a guest in virtual time runs on the software CPU, not on cpu={options['cpu']!r}"
            )
        options.setdefault("warn", self.warnings.append)
        super().__init__(kernel, *args, net=net, **options)

    def start(self) -> Unikernel:
        """Start it; see Guest.start."""
        if self._timeline is not None:
            self.participant = self._timeline.join(self.kernel, self.switch_ports)
            clock = VirtualTime(VIRTUAL_START_NS + self._timeline.now_ns())
            self.config = replace(self.config, cpu="soft", clock=self.config.clock or clock)
        try:
            super().start()
        except BaseException:
            self.start_error_raised = True
            if self._timeline is not None and self.participant is not None:
                self._timeline.leave(self.participant)
            raise
        return self

    # ---- Waiting ----

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for its end; TimeoutError if it still runs after `timeout` seconds."""
        seconds = self.patience if timeout is None else timeout
        if self.participant is None:
            return super().wait(seconds)
        participant = self.participant
        if not self.wait_virtually(lambda: participant.gone, seconds):
            raise TimeoutError(f"the guest still runs after {seconds:g} s of virtual time")
        return super().wait(END_S)

    def wait_until(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        """Wait until `predicate()` is true; returns its value.

        Raises TimeoutError after `timeout` seconds.
        """
        seconds = self.patience if timeout is None else timeout
        values: list[T] = []

        def look() -> T:
            values[:] = [predicate()]
            return values[0]

        if self.participant is not None:
            done = self.wait_virtually(lambda: self.read_output() and look(), seconds)
        else:
            done = _poll(look, seconds)
        if not done:
            name = getattr(predicate, "__name__", repr(predicate))
            raise TimeoutError(f"{name} was still not true after {seconds:g} s")
        return values[0]

    def wait_virtually(self, predicate: Callable[[], Any], seconds: float) -> bool:
        """Let virtual time advance until `predicate` is true, or this guest has ended."""
        if self._timeline is None or self.participant is None:
            raise RuntimeError("this guest has no virtual time")
        participant = self.participant
        return self._timeline.wait(lambda: predicate() or participant.gone, seconds) and bool(
            predicate()
        )

    def read_output(self) -> bool:
        """Have the console read all output up to where the guest waits now."""
        # The guest wrote it before it came to its rendezvous, so it is in the socket.
        empty = threading.Event()

        def again(rounds: int) -> None:
            if rounds:
                reactor().call_soon(lambda: again(rounds - 1))
            else:
                empty.set()

        again(ROUNDS)
        return empty.wait(END_S)

    # ---- Templates ----

    def ready(
        self, pattern: str | re.Pattern[str] | None = None, timeout: float | None = None
    ) -> Unikernel:
        """Make it a template: wait for its output, save it there, and end it.

        Args:
            pattern: As of console.wait_for; None: save it at its next hypercall.
            timeout: In seconds, of both waits.

        Raises:
            What console.wait_for and Guest.snapshot raise.
        """
        seconds = self.patience if timeout is None else timeout
        if pattern is not None:
            self.console.wait_for(pattern, seconds)
        self._template = self.snapshot(timeout=seconds, stop=True)
        self.wait()
        return self

    def clone(
        self,
        *,
        net: Mapping[str, NetSpec] | None = None,
        start: bool = True,
        **options: Unpack[GuestOptions],
    ) -> Unikernel:
        """Start a guest that goes on where this template was saved, and ends with the test.

        Its devices are its own; a port of a switch gets the MAC address of the template's port.
        `options` are those of Guest.restore; `cpu` is the template's unless it is given.

        Raises RuntimeError for a guest that is no template, and what `Guest.start` raises.
        """
        if self._template is None or self.session_of_test is None:
            raise RuntimeError("this guest is no template: call ready() first")
        session = self.session_of_test()
        options.setdefault("cpu", self._cpu)
        if session.trace:
            options.setdefault("trace", session.trace_file())
        for name, port in (net or {}).items():
            if isinstance(port, GuestPort):
                port.mac = self._macs.get(name, port.mac)
        guest = self.restore(self._template, net=net, clone=True, **options)
        guest.patience, guest.kernel = self.patience, self.kernel
        session.add_guest(guest, (net or {}).values())
        return guest.start() if start else guest

    def _new_console(self) -> Console:
        return _Console(self)

    def last_output(self) -> bytes:
        """The output that is kept; empty if it was not started."""
        return self._console.data

    # ---- The end ----

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None before that, and if it could not start."""
        self.outcome_checked = True
        return super().outcome

    def _get_result(self) -> Outcome:
        self.outcome_checked = True
        return super()._get_result()

    def bad_end(self) -> str:
        """How it ended, if it failed by itself; else an empty string."""
        outcome = super().outcome
        if outcome is None:
            return ""
        aborted = outcome.reason == "halted" and outcome.status == ABORTED
        if not aborted and outcome.reason not in BAD_ENDS:
            return ""
        why = f": {outcome.error}" if outcome.error else ""
        return f"{'aborted' if aborted else outcome.reason}, status {outcome.status}{why}"

    def __enter__(self) -> Unikernel:
        """Start it, unless it was started already."""
        return self if self.running or self._life.ended.is_set else self.start()

    def __exit__(self, exc_type: object, *error: object) -> None:
        checked = self.outcome_checked
        super().__exit__(exc_type, *error)
        self.outcome_checked = checked  # not by the test

    def stop(self, grace: float = GRACE_S) -> Outcome:
        """Guest.stop; in virtual time, while every guest waits."""
        self._settle_time()
        try:
            return super().stop(grace)
        finally:
            self._settle_time()

    def crash(self) -> Outcome:
        """End the guest at once, as a power cut does: Guest.kill, in virtual time as well."""
        self._settle_time()
        try:
            return self.kill()
        finally:
            self._settle_time()

    def _settle_time(self) -> None:
        """In virtual time, wait until every guest waits or has ended."""
        if self._timeline is not None:
            try:
                self._timeline.settle()
            except Stuck:
                pass  # it is about to end

    # ---- The network ----

    def block_link(self) -> None:
        """Cut the links of all its ports on switches."""
        for port in self.switch_ports:
            port.cut()

    def unblock_link(self) -> None:
        """Restore them."""
        for port in self.switch_ports:
            port.restore()

    def __repr__(self) -> str:
        return f"<{self.kernel}, {'running' if self.running else 'not running'}>"


def needs_software(net: Mapping[str, NetSpec], options: GuestOptions) -> bool:
    """Whether only the software CPU runs a guest with these devices and options."""
    ports = [each for each in net.values() if isinstance(each, GuestPort)]
    given = any(name in options for name in ("clock", "instructions", "record"))
    return given or _shared_time(ports) is not None


def _shared_time(ports: list[GuestPort]) -> VirtualTimeline | None:
    """The virtual time of a guest with these ports; None: real time."""
    timelines = {id(port.switch.timeline): port.switch.timeline for port in ports}
    virtual = [each for each in timelines.values() if isinstance(each, VirtualTimeline)]
    if virtual and len(timelines) > 1:
        raise DeviceError(
            "a guest cannot be on switches of different times; switch.another() makes one "
            "that shares the time of a switch"
        )
    return virtual[0] if virtual else None


def _poll(look: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_EVERY_S)
    return True
