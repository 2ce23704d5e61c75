"""An Ethernet switch in the process of a test: it forwards frames, and captures them.

A frame goes owner -> port -> switch -> port -> owner. A fault acts on a port, in one direction
("to" its owner, or "from" it). The capture shows what happened to each frame.
"""

from __future__ import annotations

import itertools
import math
import os
from ipaddress import ip_interface

from tender.checks import MTU, as_address, as_mac, as_mtu
from tender.errors import InvalidValue, UsageError
from tender.testing.net import capture, packets
from tender.testing.net.describe import describe
from tender.testing.net.faults import Delivery, Fault, Faulty, apply
from tender.testing.net.host import Host
from tender.testing.net.neighbours import Neighbours
from tender.testing.net.port import GuestPort, Port
from tender.testing.net.stack import as_ip
from tender.testing.net.timeline import RealTime
from tender.testing.net.virtual import VirtualTimeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tender.testing.net.timeline import Timeline

CAPTURE_BYTES = 32 << 20
LATENCY_S = 0.0001  # of a link in virtual time, so that no answer comes at once
MACS_MAX = 8192  # learned; frames to others are flooded
_LINK_CUT = "dropped: the link is cut"


class Switch(Faulty):
    """A learning Ethernet switch; its ports are made one by one.

    With `virtual`, its guests run on the software CPU in virtual time, which passes only while
    the test waits. `seed` is the seed of all randomness. `latency` is that of every link, in
    seconds (default: 100 µs in virtual time, else 0). `patience` is how many seconds methods
    without a timeout wait, and how long a guest may take to start. The capture takes about
    `capture_bytes` bytes of memory and drops the oldest frames. With `neigh_suppress`, ARP and
    neighbour discovery are not flooded to all guests: one that is asked for its address hears
    that, and none hears what another one announces, nor that an address has moved. Switches that
    share `numbers` give no MAC twice; those that share a `timeline` share their time, and the one
    that made it ends it.
    """

    def __init__(
        self,
        *,
        virtual: bool = False,
        seed: object = 0,
        latency: float | None = None,
        patience: float = 60.0,
        capture_bytes: int = CAPTURE_BYTES,
        neigh_suppress: bool = False,
        numbers: Iterator[int] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        own: Timeline = VirtualTimeline(patience) if virtual else RealTime()
        self.timeline = own if timeline is None else timeline
        super().__init__(self.timeline.lock)
        self.others: list[Switch] = []  # of `another`
        self.seed = str(seed)
        self.patience = patience
        self.capture = capture.Capture(capture_bytes)
        self.neigh_suppress = neigh_suppress
        self.ports: list[Port] = []
        self.hosts: list[Host] = []
        self._numbers = itertools.count() if numbers is None else numbers
        self._number = next(self._numbers) & 255
        self._owns_timeline = timeline is None
        self._capture_bytes = capture_bytes
        self._table: dict[bytes, Port] = {}  # the port of each MAC
        self._neighbours = Neighbours()
        self._latency_ns = round((LATENCY_S * virtual if latency is None else latency) * 1e9)
        self._closed = False

    def another(self) -> Switch:
        """A further switch, for a second network: in the same time, and closed with this one.

        Nothing connects the two but guests that have a port on each.
        """
        other = Switch(
            seed=f"{self.seed}/switch{len(self.others) + 1}",
            latency=self._latency_ns / 1e9,
            patience=self.patience,
            capture_bytes=self._capture_bytes,
            neigh_suppress=self.neigh_suppress,
            numbers=self._numbers,
            timeline=self.timeline,
        )
        self.others.append(other)
        return other

    def __repr__(self) -> str:
        kind = "virtual switch" if self.virtual else "switch"
        return f"<{kind}: {', '.join(port.name for port in self.ports) or 'no ports'}>"

    def _seed(self) -> str:
        return self.seed

    @property
    def virtual(self) -> bool:
        return self.timeline.virtual

    @property
    def now(self) -> float:
        """Seconds since the switch was made, of its own time."""
        return self.timeline.now_ns() / 1e9

    def sleep(self, seconds: float) -> None:
        """Let this many seconds of the switch's time pass.

        In virtual time that is immediate; else the test really waits. Raises UsageError.
        """
        if not 0 <= seconds < math.inf:
            raise InvalidValue("seconds", seconds, "a number of seconds, as 60")
        self.timeline.wait(lambda: False, seconds)

    def port(
        self, name: str | None = None, *, mac: str | bytes | None = None, mtu: int = MTU
    ) -> GuestPort:
        """A new port for a guest's network device.

        `mac` is the guest's address there. Raises UsageError for impossible values.
        """
        as_mtu("mtu", mtu)
        with self._lock:
            index = len(self.ports)
            own = as_mac("mac", mac) or self._mac(0, index)
            port = GuestPort(self, self._name(name, f"port{index}"), index, own, mtu)
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
        """A new host in Python, with an address such as "10.0.0.1/24" or "fd00::1/64".

        It has a port of its own, and answers ARP or neighbour discovery, and ping. A host of IPv6
        has the link-local address of its MAC as well. `gateway` is the router for packets to other
        networks. Raises UsageError for impossible values.
        """
        interface = ip_interface(as_address("address", address))
        given = as_mac("mac", mac)
        router = None if gateway is None else as_ip("gateway", gateway)
        with self._lock:
            if any(host.address == interface.ip for host in self.hosts):
                raise UsageError(f"the switch has a host {interface.ip} already")
            index = len(self.ports)
            own = given or self._mac(1, index)
            host = Host(self, self._name(name, f"host{index}"), index, interface, own, router)
            self.ports.append(host.port)
            self.hosts.append(host)
            return host

    def _mac(self, kind: int, index: int) -> bytes:
        return bytes((2, 0, self._number, kind, index >> 8, index & 255))

    def _name(self, given: str | None, otherwise: str) -> str:
        name = given or otherwise
        if any(port.name == name for port in self.ports):
            raise UsageError(f"the switch has a port {name!r} already")
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
        """Whether a guest is attached that has sent nothing yet: it may be starting."""
        return any(port.is_attached and not port.has_sent for port in self.guest_ports())

    # ---- Forwarding ----

    def enter(self, port: Port, frame: bytes) -> None:
        """A frame comes from the owner of `port`."""
        if self._closed:
            return
        if port.is_cut:
            self._record(port, capture.INBOUND, frame, _LINK_CUT)
            return
        deliveries, why = apply(self._faults(port, "from"), f"from {port.name}", frame)
        if not deliveries:
            self._record(port, capture.INBOUND, frame, why)
        for each in deliveries:
            self._after(each.delay_ns, lambda each=each: self._entered(port, each))  # type: ignore[misc]

    def refuse(self, port: Port, frame: bytes, why: str) -> None:
        """What comes from the owner of `port` is no frame: it is in the capture only."""
        if not self._closed:
            self._record(port, capture.INBOUND, frame, why)

    def _entered(self, port: Port, delivery: Delivery) -> None:
        if delivery.done:
            return
        delivery.done = True
        frame = delivery.frame
        self._record(port, capture.INBOUND, frame, delivery.note)
        if len(frame) < packets.HEADER_SIZE:
            return
        to, sender = frame[:6], frame[6:12]
        if not sender[0] & 1 and (sender in self._table or len(self._table) < MACS_MAX):
            self._table[sender] = port
        known = None if to[0] & 1 else self._table.get(to)
        receivers = self.ports if known is None else [known]
        if self.neigh_suppress:
            receivers = self._neighbours.limit(port, frame, receivers)
        for other in receivers:
            if other is not port:
                self._leave(other, frame)

    def _leave(self, port: Port, frame: bytes) -> None:
        """A frame is sent to the owner of `port`."""
        if port.is_cut:
            self._record(port, capture.OUTBOUND, frame, _LINK_CUT)
            return
        deliveries, why = apply(self._faults(port, "to"), f"to {port.name}", frame)
        if not deliveries:
            self._record(port, capture.OUTBOUND, frame, why)
        for each in deliveries:
            self._after(
                each.delay_ns + self._latency_ns,
                lambda each=each: self._arrive(port, each),  # type: ignore[misc]
            )

    def _arrive(self, port: Port, delivery: Delivery) -> None:
        if delivery.done:
            return
        delivery.done = True
        # Captured first: an answer of the owner comes after it.
        why = _LINK_CUT if port.is_cut else ""
        at = self._record(port, capture.OUTBOUND, delivery.frame, why or delivery.note)
        if not why:
            why = port.deliver(delivery.frame)
            if why:
                self._note(at, why)

    def _faults(self, port: Port, direction: str) -> list[Fault]:
        of_switch = self.faults if isinstance(port, GuestPort) else []
        return [each for each in of_switch + port.faults if each.direction in (direction, "both")]

    def _after(self, delay_ns: int, function: Callable[[], object]) -> None:
        if delay_ns or self.virtual:
            self.timeline.call_at(self.timeline.now_ns() + delay_ns, function)
        else:
            function()

    # ---- The capture ----

    def _record(self, port: Port, direction: int, frame: bytes, note: str) -> capture.Record:
        time_ns = self.timeline.start_ns + self.timeline.now_ns()
        record = capture.Record(time_ns, port.index, direction, frame, note)
        self.capture.add(record)
        return record

    def _note(self, record: capture.Record, note: str) -> None:
        """Add a note to the newest record."""
        records = self.capture.records
        if records and records[-1] is record:
            records[-1] = capture.Record(
                record.time_ns, record.port, record.direction, record.frame, note
            )

    def packets(self) -> bytes:
        """The captured frames as a pcapng file: one interface per port, faults as comments."""
        with self._lock:
            dropped = self.capture.dropped
            comment = f"{dropped} older frames were dropped from this capture" if dropped else ""
            names = [port.name for port in self.ports]
            return capture.build(names, list(self.capture.records), comment)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the captured frames to a pcapng file, for Wireshark or tcpdump."""
        data = self.packets()
        with open(path, "wb") as file:
            file.write(data)

    def lines(self, last: int | None = None) -> list[str]:
        """The captured frames as text: time, direction, port, summary, faults.

        `last` limits them to the newest ones.
        """
        with self._lock:
            records = list(self.capture.records)
            start_ns = self.timeline.start_ns
        return [self._line(record, start_ns) for record in records[-(last or len(records)) :]]

    def _line(self, record: capture.Record, start_ns: int) -> str:
        arrow = "<-" if record.direction == capture.INBOUND else "->"
        when = (record.time_ns - start_ns) / 1e9
        name = self.ports[record.port].name
        note = f"  [{record.note}]" if record.note else ""
        return f"{when:12.6f} {arrow} {name}: {describe(record.frame)}{note}"

    def close(self) -> None:
        """Close all ports. A guest that still runs receives nothing more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for host in self.hosts:
            host.close()
        for port in self.ports:
            port.close()
        for other in self.others:
            other.close()
        if self._owns_timeline:
            self.timeline.close()

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
