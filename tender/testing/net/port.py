"""The ports of a switch, and the faults that a link can have.

The rule here: what a port has is touched with the switch's lock held; what waits for the reactor,
whose callbacks take that lock, is done without it.
"""

from __future__ import annotations

import os
import socket
import sys

from tender.config import Descriptor
from tender.embed.reactor import READ, reactor
from tender.errors import DeviceError
from tender.testing.net.faults import REORDER_HOLD_S, Chance, Fault
from tender.testing.net.packets import mac_text
from tender.testing.net.virtual import Stuck, VirtualTimeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.testing.net.switch import Switch
    from tender.testing.net.virtual import Participant

QUEUE_BYTES = 1 << 20  # of a guest's port; the kernel may give less
FRAMES_AT_ONCE = 100_000  # of a guest in virtual time, in one instant
BURST = 256  # frames that are read from a port at a time
FRAME_MAX = 65536 + 18


class Faulty:
    """What can have faults: a switch (on the ports of its guests), or one port.

    `direction` is seen from the port's owner: frames "to" it, "from" it or "both". A fault
    without `every` (the Nth, 2Nth, ... frame) or `probability` hits every frame. Counting and
    chance are separate for each direction of each port. All of these give a Fault: `clear()` it,
    or use it in a `with` block.
    """

    faults: list[Fault]
    _lock: Any
    _made = 0  # faults so far: each has a chance of its own

    def _seed(self) -> str:
        raise NotImplementedError

    def drop(
        self,
        every: int | None = None,
        probability: float | None = None,
        *,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Lose frames."""
        return self._add("drop", every, probability, seed, direction=direction)

    def delay(
        self,
        seconds: float,
        jitter: float = 0.0,
        every: int | None = None,
        probability: float | None = None,
        *,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Let frames come `seconds` later, or between `seconds - jitter` and `seconds + jitter`."""
        return self._add(
            "delay", every, probability, seed, seconds=seconds, jitter=jitter, direction=direction
        )

    def duplicate(
        self,
        every: int | None = None,
        probability: float | None = None,
        *,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Let frames come twice."""
        return self._add("duplicate", every, probability, seed, direction=direction)

    def reorder(
        self,
        every: int | None = None,
        probability: float | None = None,
        *,
        hold: float = REORDER_HOLD_S,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Let frames come after the next one, or after `hold` seconds where none follows."""
        return self._add("reorder", every, probability, seed, seconds=hold, direction=direction)

    def corrupt(
        self,
        every: int | None = None,
        probability: float | None = None,
        *,
        direction: str = "to",
        seed: object = None,
    ) -> Fault:
        """Flip one bit behind the Ethernet header."""
        return self._add("corrupt", every, probability, seed, direction=direction)

    def clear_faults(self) -> None:
        """Take all faults of this one away; a cut link stays cut."""
        with self._lock:
            self.faults.clear()

    def _add(
        self,
        kind: str,
        every: int | None,
        probability: float | None,
        seed: object,
        **more: Any,
    ) -> Fault:
        with self._lock:
            self._made += 1
            text = f"{self._seed()}/{kind}{self._made}" if seed is None else str(seed)
            fault = Fault(kind, Chance(every, probability), text, self._remove, **more)
            self.faults.append(fault)
            return fault

    def _remove(self, fault: Fault) -> None:
        with self._lock:
            if fault in self.faults:
                self.faults.remove(fault)


class Port(Faulty):
    """One port. `cut()` is a cable that is pulled out: nothing passes in either direction."""

    is_guest = False

    def __init__(self, switch: Switch, name: str, index: int) -> None:
        self.name = name
        self.index = index
        self.is_cut = False
        self.faults = []
        self._switch = switch
        self._lock = switch.timeline.lock

    def _seed(self) -> str:
        return f"{self._switch.seed}/{self.name}"

    def cut(self) -> None:
        self.is_cut = True

    def restore(self) -> None:
        self.is_cut = False

    def sent(self, frame: bytes) -> None:
        """The owner has sent a frame."""
        with self._lock:
            self._switch.enter(self, frame)

    def deliver(self, frame: bytes) -> str:
        """Give the owner a frame; what went wrong, or nothing."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more is sent or delivered."""


class HostPort(Port):
    """The port of a host in Python."""

    def __init__(
        self, switch: Switch, name: str, index: int, receive: Callable[[bytes], None]
    ) -> None:
        super().__init__(switch, name, index)
        self._receive = receive

    def deliver(self, frame: bytes) -> str:
        self._receive(frame)
        return ""


class GuestPort(Port):
    """A port that a guest's network device can be attached to: `net={"service": switch.port()}`.

    One guest at a time; when it has ended, another one may have it.
    """

    is_guest = True

    def __init__(self, switch: Switch, name: str, index: int, mac: bytes, mtu: int) -> None:
        super().__init__(switch, name, index)
        self.mac = mac
        self.mtu = mtu
        self.has_spoken = False  # the guest has sent a frame: it is up
        self.participant: Participant | None = None
        self._socket: socket.socket | None = None
        self._is_open = False  # the guest has not closed its end
        self._collected: list[bytes] = []  # in virtual time: not yet on the switch
        self._backlog: list[bytes] = []  # in virtual time: not yet at the guest

    def __repr__(self) -> str:
        how = "cut" if self.is_cut else "a guest is attached" if self.may_speak else "no guest"
        return f"<{self.name} of a switch, {mac_text(self.mac)}: {how}>"

    @property
    def switch(self) -> Switch:
        return self._switch

    @property
    def may_speak(self) -> bool:
        """Whether a guest is attached that has not ended."""
        gone = self.participant is not None and self.participant.gone
        return self._socket is not None and self._is_open and not gone

    def fileno(self) -> int:
        return self._socket.fileno() if self._socket is not None else -1

    def attach(self) -> Descriptor:
        """The guest's end of a new link; whoever gets it closes it."""
        timeline = self._switch.timeline
        if self.participant is not None and self.participant.gone:
            self.unplug()
        if self._socket is not None:
            raise DeviceError(f"{self.name} of the switch is attached to a guest already")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, QUEUE_BYTES)
        ours.setblocking(False)
        with self._lock:
            self._socket = ours
            self._is_open = True
            self.has_spoken = False
        sync_fd = None
        if isinstance(timeline, VirtualTimeline):
            if self.participant is None:
                timeline.join(self.name, [self])
            sync_fd = self._participant().give_fd()
        else:
            reactor().register(ours.fileno(), READ, self._readable)
        return Descriptor(theirs.detach(), mtu=self.mtu, mac=self.mac, sync_fd=sync_fd)

    def _participant(self) -> Participant:
        if self.participant is None:
            raise RuntimeError(f"{self.name} has no guest in virtual time")
        return self.participant

    def detach(self) -> None:
        """The guest has ended: take in what it has sent, and close the link. Idempotent.

        In virtual time it is the simulation that finds out: nothing happens between two verbs.
        """
        if not self._switch.virtual:
            self.unplug()

    def unplug(self) -> None:
        """Close the link."""
        with self._lock:
            ours = self._socket
        if ours is None:
            return
        if not self._switch.virtual:
            reactor().unregister(ours.fileno())  # without the lock: the callback takes it
        with self._lock:
            if self._socket is None:
                return
            self.collect()
            for frame in self.take():
                self.sent(frame)
            self._backlog.clear()
            self._socket = self.participant = None
            ours.close()
            self._switch.timeline.notify()

    close = unplug

    def _readable(self, _events: int) -> None:
        with self._lock:
            ours = self._socket
            if ours is None:
                return
            self._is_open = self.collect()
            for frame in self.take():
                self.sent(frame)
        if not self._is_open:
            reactor().unregister(ours.fileno())

    def collect(self) -> bool:
        """Take in the frames that wait; whether there may be more one day."""
        if self._socket is None:
            return False
        # In virtual time all of them are part of one instant.
        for _ in range(sys.maxsize if self._switch.virtual else BURST):
            try:
                frame = self._socket.recv(FRAME_MAX)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not frame:
                return False
            self._collected.append(frame)
            if len(self._collected) > FRAMES_AT_ONCE:
                raise Stuck(f"{self.name}: the guest sends without end and never waits")
        return True

    def take(self) -> list[bytes]:
        """The frames that were collected."""
        taken, self._collected = self._collected, []
        return taken

    def sent(self, frame: bytes) -> None:
        self.has_spoken = True
        super().sent(frame)

    def deliver(self, frame: bytes) -> str:
        if self._socket is None:
            return "dropped: no guest is attached"
        if self._switch.timeline.virtual:
            if self.participant is None or self.participant.gone:
                return "dropped: no guest is attached"
            self._backlog.append(frame)
            self.participant.due = True
            return ""
        return self._put(frame)

    def _put(self, frame: bytes) -> str:
        try:
            if self._socket is not None:
                self._socket.send(frame)
        except BlockingIOError:
            return "dropped: the guest's queue is full"
        except OSError as error:
            return f"dropped: {os.strerror(error.errno or 0)}"
        return ""

    def flush(self) -> bool:
        """In virtual time: give the guest its frames; False if its queue did not take them all."""
        while self._backlog:
            if "full" in self._put(self._backlog[0]):
                return False
            self._backlog.pop(0)
        return True
