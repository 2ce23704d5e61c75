"""The ports of a switch.

The rule here: the state of a port is used with the switch's lock held. The reactor's callbacks
take that lock, so whatever waits for the reactor does not hold it.
"""

from __future__ import annotations

import os
import socket
import sys

from tender.backends import Descriptor
from tender.embed.protocol import receive
from tender.embed.reactor import READ, reactor
from tender.errors import DeviceError
from tender.testing.net.faults import Faulty
from tender.testing.net.packets import HEADER_SIZE, mac_text
from tender.testing.net.virtual import Stuck, VirtualTimeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from tender.testing.net.timeline import Timeline
    from tender.testing.net.virtual import Participant

    class Network(Protocol):
        """The switch, as its ports and hosts see it."""

        timeline: Timeline
        seed: str
        patience: float

        def enter(self, port: Port, frame: bytes) -> None: ...
        def refuse(self, port: Port, frame: bytes, why: str) -> None: ...
        def awaits_guests(self) -> bool: ...


QUEUE_BYTES = 1 << 20  # of a guest's port; the kernel may give less
INSTANT_FRAMES_MAX = 100_000  # of a guest in virtual time, in one instant
BURST_FRAMES = 256  # read from a port at a time, in real time
TAGGED_HEADER = 14 + 4  # bytes: IEEE 802.3, 802.1Q


class Port(Faulty):
    """One port of a switch, with the link to its owner."""

    def __init__(self, network: Network, name: str, index: int) -> None:
        super().__init__(network.timeline.lock)
        self.switch = network
        self.name = name
        self.index = index
        self.is_cut = False

    def _seed(self) -> str:
        return f"{self.switch.seed}/{self.name}"

    def cut(self) -> None:
        """Cut the link: no frame passes in either direction."""
        self.is_cut = True

    def restore(self) -> None:
        """Undo `cut()`."""
        self.is_cut = False

    def sent(self, frame: bytes) -> None:
        """The owner has sent a frame."""
        with self._lock:
            self.switch.enter(self, frame)

    def deliver(self, frame: bytes) -> str:
        """Give the owner a frame; returns what went wrong, or an empty string."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more is sent or delivered."""


class HostPort(Port):
    """The port of a host in Python."""

    def __init__(
        self, network: Network, name: str, index: int, receive: Callable[[bytes], None]
    ) -> None:
        super().__init__(network, name, index)
        self._receive = receive

    def deliver(self, frame: bytes) -> str:
        self._receive(frame)
        return ""


class GuestPort(Port):
    """A port for a guest's network device: `net={"service": switch.port()}`.

    It takes one guest at a time, and another one when that has ended.
    """

    def __init__(self, network: Network, name: str, index: int, mac: bytes, mtu: int) -> None:
        super().__init__(network, name, index)
        self.mac = mac
        self.mtu = mtu
        self.has_sent = False  # the attached guest has sent a frame
        self.participant: Participant | None = None
        self._socket: socket.socket | None = None
        self._is_open = False  # the guest has not closed its end
        self._collected: list[bytes] = []  # frames that were not given to the switch yet
        self._backlog: list[bytes] = []  # in virtual time: frames that the guest did not get yet

    def __repr__(self) -> str:
        how = "cut" if self.is_cut else "a guest is attached" if self.is_attached else "no guest"
        return f"<{self.name} of a switch, {mac_text(self.mac)}: {how}>"

    @property
    def is_attached(self) -> bool:
        """Whether a guest is attached that has not ended."""
        gone = self.participant is not None and self.participant.gone
        return self._socket is not None and self._is_open and not gone

    def fileno(self) -> int:
        return self._socket.fileno() if self._socket is not None else -1

    def attach(self) -> Descriptor:
        """Make a link, and return the guest's end of it, which the caller closes.

        Raises DeviceError if a guest is attached already.
        """
        timeline = self.switch.timeline
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
            self.has_sent = False
        sync_fd = None
        if isinstance(timeline, VirtualTimeline):
            participant = self.participant or timeline.join(self.name, [self])
            sync_fd = participant.give_fd()
        else:
            reactor().register(ours.fileno(), READ, self._readable)
        return Descriptor(theirs.detach(), mtu=self.mtu, mac=self.mac, sync_fd=sync_fd)

    def detach(self) -> None:
        """The guest has ended: forward the frames that it has sent, and close the link. Idempotent.

        In virtual time this is left to the simulation, which notices the guest's end by itself.
        """
        if not self.switch.timeline.virtual:
            self.unplug()

    def unplug(self) -> None:
        """Close the link."""
        with self._lock:
            ours = self._socket
        if ours is None:
            return
        if not self.switch.timeline.virtual:
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
            self.switch.timeline.notify()

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
        """Read the frames in the socket; returns whether the guest's end is still open."""
        if self._socket is None:
            return False
        # In virtual time all of them belong to one instant.
        for _ in range(sys.maxsize if self.switch.timeline.virtual else BURST_FRAMES):
            try:
                frame = receive(self._socket, self.mtu + TAGGED_HEADER + 1)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if frame is None:
                return False
            self._collected.append(frame)
            if len(self._collected) > INSTANT_FRAMES_MAX:
                raise Stuck(
                    f"{self.name}: the guest has sent more than {INSTANT_FRAMES_MAX} frames "
                    "without waiting for its network: virtual time can't advance"
                )
        return True

    def take(self) -> list[bytes]:
        """The collected frames, which the caller forwards."""
        taken, self._collected = self._collected, []
        return taken

    def sent(self, frame: bytes) -> None:
        with self._lock:
            self.has_sent = True
            if HEADER_SIZE <= len(frame) <= self.mtu + TAGGED_HEADER:
                self.switch.enter(self, frame)
            else:
                self.switch.refuse(self, frame, f"dropped: no frame of an MTU of {self.mtu}")

    def deliver(self, frame: bytes) -> str:
        if self._socket is None:
            return "dropped: no guest is attached"
        if self.switch.timeline.virtual:
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
        """In virtual time: send the guest its frames; False if its queue was full."""
        while self._backlog:
            if "full" in self._put(self._backlog[0]):
                return False
            self._backlog.pop(0)
        return True
