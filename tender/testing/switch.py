"""An Ethernet switch in the process of a test: ports for guests, hosts in Python, faults, packets.

The rule here: a frame goes owner -> port -> switch -> port -> owner. Faults act on a port, in one
direction of it ("to" its owner, or "from" it), and whatever happens to a frame is in the capture.
"""

from __future__ import annotations

import os
import socket
import sys
from ipaddress import IPv4Interface

from tender.config import MTU, Descriptor
from tender.errors import DeviceError
from tender.reactor import READ, reactor
from tender.testing import packets, pcapng
from tender.testing.faults import REORDER_HOLD_S, Chance, Delivery, Fault, apply
from tender.testing.host import Host
from tender.testing.timeline import RealTime
from tender.testing.virtual import VirtualTimeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tender.testing.timeline import Timeline
    from tender.testing.virtual import Participant

CAPTURE_BYTES = 16 << 20
LATENCY_S = 0.0001  # of a link in virtual time: an instant that is never the same instant
QUEUE_BYTES = 1 << 20  # of a guest's port; the kernel may give less
BURST = 256  # frames that are read from a port at a time
FRAME_MAX = 65536 + 18
_CUT = "dropped: the link is cut"


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

    def __init__(self, switch: Switch, name: str, index: int, mac: bytes | None, mtu: int) -> None:
        super().__init__(switch, name, index)
        self.mac = mac or bytes((2, 0, 0, 0, index >> 8, index & 255))
        self.mtu = mtu
        self.has_spoken = False  # the guest has sent a frame: it is up
        self.participant: Participant | None = None
        self._socket: socket.socket | None = None
        self._is_open = False  # the guest has not closed its end
        self._collected: list[bytes] = []  # in virtual time: not yet on the switch
        self._backlog: list[bytes] = []  # in virtual time: not yet at the guest

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


class Switch(Faulty):
    """A learning Ethernet switch with as many ports as asked for.

    With `virtual`, its guests run on the software CPU in virtual time, which goes on only while
    the test waits. `seed` is what all chance comes from. `latency` is that of every link, in
    seconds (100 µs in virtual time, else none). `patience` is how long a verb without a timeout
    waits, in seconds, and how long a guest may take to start. The last `capture_bytes` bytes of
    frames are kept.
    """

    def __init__(
        self,
        *,
        virtual: bool = False,
        seed: object = 0,
        latency: float | None = None,
        patience: float = 60.0,
        capture_bytes: int = CAPTURE_BYTES,
    ) -> None:
        self.timeline: Timeline = VirtualTimeline(patience) if virtual else RealTime()
        self.seed = str(seed)
        self.patience = patience
        self.capture = pcapng.Capture(capture_bytes)
        self.ports: list[Port] = []
        self.hosts: list[Host] = []
        self.faults = []
        self._lock = self.timeline.lock
        self._table: dict[bytes, Port] = {}  # where a MAC was seen
        self._latency_ns = round((LATENCY_S * virtual if latency is None else latency) * 1e9)
        self._closed = False

    def _seed(self) -> str:
        return self.seed

    @property
    def virtual(self) -> bool:
        return self.timeline.virtual

    @property
    def now(self) -> float:
        """Seconds since the switch was made, of its own time."""
        return self.timeline.now_ns() / 1e9

    def port(
        self, name: str | None = None, *, mac: str | bytes | None = None, mtu: int = MTU
    ) -> GuestPort:
        """A new port for a guest's network device. `mac` is the guest's address there."""
        with self._lock:
            index = len(self.ports)
            address = packets.parse_mac(mac) if isinstance(mac, str) else mac
            port = GuestPort(self, self._name(name, f"port{index}"), index, address, mtu)
            self.ports.append(port)
            return port

    def host(
        self,
        address: str,
        name: str | None = None,
        *,
        mac: str | bytes | None = None,
        gateway: str | None = None,
    ) -> Host:
        """A host in Python, with an address such as "10.0.0.1/24", on a port of its own.

        It answers ARP and ping by itself. `gateway` is where packets to other networks go.
        """
        with self._lock:
            index = len(self.ports)
            given = packets.parse_mac(mac) if isinstance(mac, str) else mac
            own = given or bytes((2, 0, 0, 1, index >> 8, index & 255))
            host = Host(self, IPv4Interface(address), own, gateway)
            port = HostPort(self, self._name(name, f"host{index}"), index, host.receive)
            host.port = port
            self.ports.append(port)
            self.hosts.append(host)
            return host

    def _name(self, given: str | None, otherwise: str) -> str:
        name = given or otherwise
        if any(port.name == name for port in self.ports):
            raise ValueError(f"the switch has a port {name!r} already")
        return name

    def cut(self) -> None:
        """Cut the links of all guests."""
        for port in self.guest_ports():
            port.cut()

    def restore(self) -> None:
        """Undo `cut()`, of single ports as well."""
        for port in self.ports:
            port.restore()

    def guest_ports(self) -> list[GuestPort]:
        return [port for port in self.ports if isinstance(port, GuestPort)]

    def awaits_guests(self) -> bool:
        """Whether a guest is attached that has not sent anything yet: it may be starting."""
        return any(port.may_speak and not port.has_spoken for port in self.guest_ports())

    # ---- The way of a frame ----

    def enter(self, port: Port, frame: bytes) -> None:
        """A frame comes from the owner of `port`."""
        if self._closed:
            return
        if port.is_cut:
            self._record(port, pcapng.INBOUND, frame, _CUT)
            return
        deliveries, why = apply(self._faults(port, "from"), f"from {port.name}", frame)
        if not deliveries:
            self._record(port, pcapng.INBOUND, frame, why)
        for each in deliveries:
            self._after(each.delay_ns, lambda each=each: self._entered(port, each))  # type: ignore[misc]

    def _entered(self, port: Port, delivery: Delivery) -> None:
        if delivery.done:
            return
        delivery.done = True
        frame = delivery.frame
        self._record(port, pcapng.INBOUND, frame, delivery.note)
        if len(frame) < packets.HEADER_SIZE:
            return
        to, sender = frame[:6], frame[6:12]
        if not sender[0] & 1:
            self._table[sender] = port
        known = None if to[0] & 1 else self._table.get(to)
        for other in self.ports if known is None else [known]:
            if other is not port:
                self._leave(other, frame)

    def _leave(self, port: Port, frame: bytes) -> None:
        """A frame goes to the owner of `port`."""
        if port.is_cut:
            self._record(port, pcapng.OUTBOUND, frame, _CUT)
            return
        deliveries, why = apply(self._faults(port, "to"), f"to {port.name}", frame)
        if not deliveries:
            self._record(port, pcapng.OUTBOUND, frame, why)
        for each in deliveries:
            self._after(
                each.delay_ns + self._latency_ns,
                lambda each=each: self._arrive(port, each),  # type: ignore[misc]
            )

    def _arrive(self, port: Port, delivery: Delivery) -> None:
        if delivery.done:
            return
        delivery.done = True
        # In the capture first: what the owner answers comes behind it.
        why = _CUT if port.is_cut else ""
        at = self._record(port, pcapng.OUTBOUND, delivery.frame, why or delivery.note)
        if not why:
            why = port.deliver(delivery.frame)
            if why:
                self._note(at, why)

    def _faults(self, port: Port, direction: str) -> list[Fault]:
        of_switch = self.faults if port.is_guest else []
        return [each for each in of_switch + port.faults if each.direction in (direction, "both")]

    def _after(self, delay_ns: int, function: Callable[[], object]) -> None:
        if delay_ns or self.timeline.virtual:
            self.timeline.call_at(self.timeline.now_ns() + delay_ns, function)
        else:
            function()

    # ---- The packets ----

    def _record(self, port: Port, direction: int, frame: bytes, note: str) -> pcapng.Record:
        time_ns = self.timeline.start_ns + self.timeline.now_ns()
        record = pcapng.Record(time_ns, port.index, direction, frame, note)
        self.capture.add(record)
        return record

    def _note(self, record: pcapng.Record, note: str) -> None:
        """Say what became of the newest record."""
        records = self.capture.records
        if records and records[-1] is record:
            records[-1] = pcapng.Record(
                record.time_ns, record.port, record.direction, record.frame, note
            )

    def packets(self) -> bytes:
        """The packets as a pcapng file: one interface per port, faults as comments."""
        with self._lock:
            lost = self.capture.forgotten
            comment = f"{lost} older frames are not in here" if lost else ""
            names = [port.name for port in self.ports]
            return pcapng.build(names, list(self.capture.records), comment)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the packets to a file for Wireshark or tcpdump."""
        data = self.packets()
        with open(path, "wb") as file:
            file.write(data)

    def lines(self, last: int | None = None) -> list[str]:
        """The packets for people: time, port, direction, what it is, and its faults."""
        with self._lock:
            records = list(self.capture.records)
            start_ns = self.timeline.start_ns
        return [self._line(record, start_ns) for record in records[-(last or len(records)) :]]

    def _line(self, record: pcapng.Record, start_ns: int) -> str:
        arrow = "<-" if record.direction == pcapng.INBOUND else "->"
        when = (record.time_ns - start_ns) / 1e9
        name = self.ports[record.port].name
        note = f"  [{record.note}]" if record.note else ""
        return f"{when:12.6f} {arrow} {name}: {packets.describe(record.frame)}{note}"

    # ---- The end ----

    def close(self) -> None:
        """Close all ports. A guest that is still there sees a link on which nothing comes."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for port in self.ports:
            port.close()
        self.timeline.close()

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
