"""A guest in a test: `Guest` with the verbs of a test.

The rule here: where the guest's network is in virtual time, every verb that waits lets that time go
on, and every other one finds the guest where it waits; what a verb sees is the same on every run.
"""

from __future__ import annotations

import os
import re
import threading
import time

from tender.config import VIRTUAL_START_NS, VirtualTime
from tender.dataclass import replace
from tender.embed.console import compile_pattern
from tender.embed.reactor import reactor
from tender.errors import DeviceError, GuestEnded
from tender.guest import GRACE_S, Guest
from tender.testing.net.port import GuestPort
from tender.testing.net.virtual import Stuck, VirtualTimeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypedDict, TypeVar

    from typing_extensions import Unpack

    from tender.embed.console import Console as Captured
    from tender.embed.interfaces import BlockSpec, NetSpec, Sink
    from tender.outcome import Outcome
    from tender.testing.net.virtual import Participant

    T = TypeVar("T")

    class GuestOptions(TypedDict, total=False):
        """What Guest takes, as it does, but for `net`."""

        block: Mapping[str, BlockSpec] | None
        mem_mib: int
        console: Sink
        console_limit: int | None
        dumpcore: str | os.PathLike[str] | None
        trace: str | os.PathLike[str] | None
        warn: Callable[[str], None]
        cpu: str
        clock: VirtualTime | None
        instructions: int | None
        deadline: float | None
        sandbox: str
        user: str | int | None


LOOK_EVERY_S = 0.02
ROUNDS = 5  # of the reactor, in which a console's queue is emptied
ABORTED = 255  # the status of solo5_abort()
BAD_ENDS = ("fault", "sandbox", "host")  # reasons of an outcome
END_S = 10.0  # of real time, for a guest that has left virtual time to be gone


class Console:
    """The guest's output: `text`, `data`, `lines()`, and `wait_for`."""

    def __init__(self, guest: Unikernel) -> None:
        self._guest = guest

    @property
    def data(self) -> bytes:
        """The last bytes that the guest has said: 4 MiB at most."""
        return self._guest.captured.data

    @property
    def text(self) -> str:
        """The same as text: UTF-8, with U+FFFD for what is none."""
        return self._guest.captured.text

    @property
    def lost(self) -> int:
        """How many bytes came before those that are kept."""
        return self._guest.captured.lost

    @property
    def ended(self) -> bool:
        """Whether nothing comes any more."""
        return self._guest.captured.ended

    def lines(self) -> list[str]:
        """The lines that are complete or at the end, without their ends."""
        return self._guest.captured.lines()

    def wait_for(
        self, pattern: str | re.Pattern[str], timeout: float | None = None
    ) -> re.Match[str]:
        """Wait until `pattern` is found in the output (re.search, `^` and `$` at every line).

        What was said before counts. Raises TimeoutError after `timeout` seconds (of virtual time,
        where the guest has that), and tender.errors.GuestEnded when the guest has ended without.
        """
        guest = self._guest
        try:
            return self._wait_for(pattern, guest.patience if timeout is None else timeout)
        except GuestEnded:
            guest.asked = True
            raise

    def _wait_for(self, pattern: str | re.Pattern[str], seconds: float) -> re.Match[str]:
        guest = self._guest
        if guest.participant is None:
            return guest.captured.wait_for(pattern, seconds)
        wanted = compile_pattern(pattern)
        guest.wait_virtually(lambda: wanted.search(guest.said()), seconds)
        try:
            return guest.captured.wait_for(wanted, END_S if guest.participant.gone else 0)
        except TimeoutError as error:
            text = str(error).replace("within 0 s", f"within {seconds:g} s of virtual time")
            raise TimeoutError(text) from None


class Unikernel(Guest):
    """A guest of a test: made and started by the fixture `unikernel`, ended with the test.

    `patience` is how long a verb without a timeout waits, in seconds. All else is Guest's.
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
        self.ports = [each for each in (net or {}).values() if isinstance(each, GuestPort)]
        self.participant: Participant | None = None
        self.trouble: list[str] = []  # what the host had with its devices
        self.told_error = False  # somebody knows that it could not start
        self.asked = False  # the test knows how it ended
        self.kernel = str(kernel)
        self._timeline = _shared_time(self.ports)
        if self._timeline is not None and options.get("cpu") not in (None, "auto", "soft"):
            raise DeviceError(
                f"a guest in virtual time runs on the software CPU, not on cpu={options['cpu']!r}"
            )
        options.setdefault("warn", self.trouble.append)
        super().__init__(kernel, *args, net=net, **options)

    def start(self) -> Unikernel:
        """Start it beside the test."""
        if self._timeline is not None:
            self.participant = self._timeline.join(self.kernel, self.ports)
            clock = VirtualTime(VIRTUAL_START_NS + self._timeline.now_ns())
            self.config = replace(self.config, cpu="soft", clock=self.config.clock or clock)
        try:
            super().start()
        except BaseException:
            self.told_error = True
            if self._timeline is not None and self.participant is not None:
                self._timeline.leave(self.participant)
            raise
        return self

    # ---- Waiting ----

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the guest's end; TimeoutError after `timeout` seconds, and it goes on."""
        seconds = self.patience if timeout is None else timeout
        if self.participant is None:
            return _as_test_sees(super().wait(seconds))
        participant = self.participant
        if not self.wait_virtually(lambda: participant.gone, seconds):
            raise TimeoutError(f"the guest still runs after {seconds:g} s of virtual time")
        return _as_test_sees(super().wait(END_S))

    def wait_until(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        """Wait until `predicate()` is true, and give what it gave; TimeoutError if it is not."""
        seconds = self.patience if timeout is None else timeout
        values: list[T] = []

        def look() -> T:
            values[:] = [predicate()]
            return values[0]

        if self.participant is not None:
            done = self.wait_virtually(lambda: self.said() is not None and look(), seconds)
        else:
            done = _poll(look, seconds)
        if not done:
            name = getattr(predicate, "__name__", repr(predicate))
            raise TimeoutError(f"{name} was still not true after {seconds:g} s")
        return values[0]

    def wait_virtually(self, predicate: Callable[[], Any], seconds: float) -> bool:
        """Let virtual time go on until `predicate` is true, or this guest has ended."""
        if self._timeline is None or self.participant is None:
            raise RuntimeError("this guest has no virtual time")
        participant = self.participant
        return self._timeline.wait(lambda: predicate() or participant.gone, seconds) and bool(
            predicate()
        )

    def said(self) -> str:
        """The output up to where the guest waits now."""
        # The guest has written it before it said that it waits: it is in the socket at least.
        empty = threading.Event()

        def again(rounds: int) -> None:
            if rounds:
                reactor().call_soon(lambda: again(rounds - 1))
            else:
                empty.set()

        again(ROUNDS)
        empty.wait(END_S)
        return self.captured.text

    def said_last(self) -> bytes | None:
        """What is kept of the output; None where it was never started."""
        try:
            return self.captured.data
        except RuntimeError:
            return None

    @property
    def captured(self) -> Captured:
        """The console as Guest has it."""
        return super().console

    @property
    def console(self) -> Console:  # type: ignore[override]
        """The guest's output, and waiting for it; RuntimeError where it has not started."""
        _ = self.captured
        return Console(self)

    # ---- The end ----

    @property
    def outcome(self) -> Outcome | None:
        """How it ended; None before that, and where it could not start."""
        self.asked = True
        return super().outcome

    def _result(self) -> Outcome:
        """What wait, stop, kill and their like give."""
        self.asked = True
        return super()._result()

    def died(self) -> str:
        """How it ended, if by itself and badly; else nothing."""
        outcome = super().outcome
        if outcome is None:
            return ""
        aborted = outcome.reason == "halted" and outcome.status == ABORTED
        if not aborted and outcome.reason not in BAD_ENDS:
            return ""
        why = f": {outcome.error}" if outcome.error else ""
        return f"{'aborted' if aborted else outcome.reason}, status {outcome.status}{why}"

    def __enter__(self) -> Unikernel:
        """Start it, if the fixture has not."""
        return self if self._begun else self.start()

    def __exit__(self, exc_type: object, *error: object) -> None:
        asked = self.asked
        super().__exit__(exc_type, *error)
        self.asked = asked  # the block ends it, and nobody has looked

    def stop(self, grace: float = GRACE_S) -> Outcome:
        """End the guest and say how it ended; status 0 if it was asked to and nothing else."""
        self._rest()
        try:
            return _as_test_sees(super().stop(grace))
        finally:
            self._rest()

    def crash(self) -> Outcome:
        """End the guest at once, as a power cut does: nothing in it or its tender is asked."""
        self._rest()
        try:
            return self.kill()
        finally:
            self._rest()

    def _rest(self) -> None:
        """In virtual time, let every guest come to where it waits, or be found to have ended."""
        if self._timeline is not None:
            try:
                self._timeline.settle()
            except Stuck:
                pass  # it is about to be ended

    # ---- The network ----

    def block_link(self) -> None:
        """Cut the cables of all its ports on switches."""
        for port in self.ports:
            port.cut()

    def unblock_link(self) -> None:
        """Put them in again."""
        for port in self.ports:
            port.restore()

    def __repr__(self) -> str:
        return f"<{self.kernel}, {'running' if self.running else 'not running'}>"


def _shared_time(ports: list[GuestPort]) -> VirtualTimeline | None:
    """The virtual time that the ports of one guest share, None: real time."""
    timelines = {id(port.switch.timeline): port.switch.timeline for port in ports}
    virtual = [each for each in timelines.values() if isinstance(each, VirtualTimeline)]
    if virtual and len(timelines) > 1:
        raise DeviceError(
            "a guest has one time: its ports are on a virtual switch and another; "
            "switch.another() makes one that shares its time"
        )
    return virtual[0] if virtual else None


def _as_test_sees(outcome: Outcome) -> Outcome:
    """A test that stops a guest has got what it wanted: that is no failure."""
    asked = outcome.reason == "stopped" and not outcome.signo
    return replace(outcome, status=0) if asked else outcome


def _poll(look: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_EVERY_S)
    return True
