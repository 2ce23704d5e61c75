"""Virtual time for a switch and its guests: the same on every run.

A conservative simulation of discrete events, on the thread of the test (Chandy and Misra,
Distributed simulation, 1979). Time advances only while the test waits and every guest waits too:
at its POLL hypercall a guest reports its time and its deadline (tender/modules/poll.py is the
other side), and stays there until it is woken.

The rule here: guests are woken one at a time, in the order in which they joined, so that the result
does not depend on the speed of anything.
"""

from __future__ import annotations

import heapq
import os
import select
import socket
import struct
import threading
from itertools import count
from time import monotonic

from tender.config import VIRTUAL_START_NS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    class FramePort(Protocol):
        """A guest's port on the switch, as the simulation sees it."""

        participant: Participant | None

        def fileno(self) -> int: ...
        def collect(self) -> bool: ...
        def take(self) -> list[bytes]: ...
        def sent(self, frame: bytes) -> None: ...
        def flush(self) -> bool: ...
        def unplug(self) -> None: ...


FOREVER = (1 << 64) - 1  # no deadline
SYNC = struct.Struct("=QQ")  # from the tender: its time, and the deadline of its sleep
GO = struct.Struct("=Q")  # to the tender: the time


class Stuck(TimeoutError):
    """Virtual time can't advance."""


class Participant:
    """A guest in virtual time. `sync_fd` is its tender's end of the rendezvous socket."""

    def __init__(self, simulation: VirtualTimeline, name: str, ports: Sequence[FramePort]) -> None:
        self.name = name
        self.gone = False  # it has ended
        self.running = True  # it has not come to its next rendezvous yet
        self.now_ns = simulation.now_ns()  # of the switch's time
        self.deadline_ns = FOREVER
        self.due = False  # there are frames for it
        self._ports = list(ports)
        self._began_ns = self.now_ns  # the switch's time at 0 of the guest's
        self._simulation = simulation
        self._sync, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sync.setblocking(False)
        self.sync_fd: int | None = theirs.detach()
        for port in self._ports:
            port.participant = self

    def give_fd(self) -> int | None:
        """The tender's end, which the caller closes; None if it was taken already."""
        fd, self.sync_fd = self.sync_fd, None
        return fd

    def next_ns(self) -> int:
        """When to wake it if nothing happens before."""
        return self.now_ns if self.due else self.deadline_ns

    def settle(self, deadline_s: float) -> None:
        """Wait until it is at a rendezvous or has ended; `deadline_s` is of time.monotonic()."""
        poll = select.poll()
        poll.register(self._sync, select.POLLIN)
        for port in self._ports:
            if port.fileno() >= 0:
                poll.register(port.fileno(), select.POLLIN)
        while self.running:
            ready = poll.poll(max(0.0, deadline_s - monotonic()) * 1000)
            if not ready:
                raise Stuck(
                    f"guest {self.name} was busy for too long (real time) without waiting for its "
                    "network: virtual time can't advance"
                )
            # The rendezvous first: all frames that were sent before it are in the sockets then.
            self._receive()
            for port in self._ports:
                port.collect()
        self._forward()

    def _receive(self) -> None:
        try:
            message = self._sync.recv(SYNC.size)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = b""
        self.running = False
        if len(message) < SYNC.size:
            self.gone = True
            return
        now_ns, deadline_ns = SYNC.unpack(message)
        self.now_ns = max(self.now_ns, now_ns + self._began_ns)
        self.deadline_ns = min(FOREVER, deadline_ns + self._began_ns)
        if deadline_ns == FOREVER:
            self.deadline_ns = FOREVER

    def _forward(self) -> None:
        """Give its frames to the switch, at the guest's time."""
        for port in self._ports:
            for frame in port.take():
                self._simulation.call_at(
                    self.now_ns,
                    lambda port=port, frame=frame: port.sent(frame),  # type: ignore[misc]
                )

    def wake(self, now_ns: int) -> None:
        """Let it run: the time is `now_ns`, or later if its own clock is ahead."""
        self.now_ns = max(self.now_ns, now_ns)
        self.due = False
        for port in self._ports:
            if not port.flush():
                self.due = True  # its queue is full: the rest is sent when it waits again
        self.running = True
        try:
            self._sync.send(GO.pack(self.now_ns - self._began_ns))
        except (BrokenPipeError, ConnectionResetError):
            self.running, self.gone = False, True

    def close(self) -> None:
        """It has ended: close its links and the rendezvous socket."""
        self.gone, self.running = True, False
        for port in self._ports:
            port.unplug()
        fd = self.give_fd()
        if fd is not None:
            os.close(fd)
        self._sync.close()


class VirtualTimeline:
    """Virtual time and its guests."""

    virtual = True

    def __init__(self, patience_s: float) -> None:
        self.lock = threading.RLock()
        self.start_ns = VIRTUAL_START_NS
        self.patience_s = patience_s  # of real time: for one guest, and for one wait
        self._now_ns = 0
        self._events: list[tuple[int, int, Callable[[], object]]] = []
        self._numbers = count()
        self.participants: list[Participant] = []

    def now_ns(self) -> int:
        return self._now_ns

    def call_at(self, when_ns: int, function: Callable[[], object]) -> None:
        heapq.heappush(self._events, (max(when_ns, self._now_ns), next(self._numbers), function))

    def notify(self) -> None:
        """Nothing to do: a wait evaluates its predicate after each step."""

    def join(self, name: str, ports: Sequence[FramePort]) -> Participant:
        """Add a guest that is about to start."""
        self.settle()
        participant = Participant(self, name, ports)
        self.participants.append(participant)
        return participant

    def leave(self, participant: Participant) -> None:
        """Remove a guest that could not start."""
        participant.close()
        if participant in self.participants:
            self.participants.remove(participant)

    def settle(self) -> None:
        """Wait until every guest is at a rendezvous or has ended."""
        deadline_s = monotonic() + self.patience_s
        for participant in self.participants:
            if participant.running:
                participant.settle(deadline_s)
        for participant in [each for each in self.participants if each.gone]:
            self.participants.remove(participant)
            participant.close()

    def wait(self, predicate: Callable[[], object], timeout_s: float) -> bool:
        """Let time advance until `predicate` is true; False after `timeout_s` virtual seconds.

        Raises Stuck if that takes more than `patience_s` of real time.
        """
        with self.lock:
            began_ns, deadline_s = self._now_ns, monotonic() + self.patience_s
            deadline_ns = began_ns + round(timeout_s * 1e9)
            self.settle()
            while not predicate():
                if not self._step(deadline_ns):
                    return bool(predicate())
                if monotonic() > deadline_s and not predicate():
                    raise self._too_slow(began_ns)
            return True

    def _too_slow(self, began_ns: int) -> Stuck:
        names = ", ".join(participant.name for participant in self.participants)
        return Stuck(
            f"virtual time is too slow: {(self._now_ns - began_ns) / 1e9:.9f} s of it took "
            f"{self.patience_s:g} s of real time, the limit (--ptender-timeout); the usual cause "
            f"is a guest that polls its network without sleeping (guests: {names or 'none'})"
        )

    def _step(self, limit_ns: int) -> bool:
        """Advance to the next event; False if that is after `limit_ns`."""
        times = [participant.next_ns() for participant in self.participants]
        if self._events:
            times.append(self._events[0][0])
        next_ns = max(self._now_ns, min(times, default=FOREVER))
        if next_ns > limit_ns:
            self._now_ns = limit_ns
            return False
        self._now_ns = next_ns
        while self._events and self._events[0][0] <= next_ns:
            heapq.heappop(self._events)[2]()
        for participant in list(self.participants):
            if participant.next_ns() <= next_ns:
                participant.wake(next_ns)
                self.settle()
        return True

    def close(self) -> None:
        for participant in self.participants:
            participant.close()
        self.participants.clear()
        self._events.clear()
