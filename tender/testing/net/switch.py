"""An Ethernet switch in the process of a test: who gets which frame, and what is kept of it.

The rule here: a frame goes owner -> port -> switch -> port -> owner. Faults act on a port, in one
direction of it ("to" its owner, or "from" it), and whatever happens to a frame is in the capture.
"""

from __future__ import annotations

import itertools
import os
from ipaddress import IPv4Interface

from tender.config import MTU
from tender.testing.net import packets, pcapng
from tender.testing.net.faults import Delivery, Fault, apply
from tender.testing.net.host import Host
from tender.testing.net.port import Faulty, GuestPort, HostPort, Port
from tender.testing.net.timeline import RealTime
from tender.testing.net.virtual import VirtualTimeline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tender.testing.net.timeline import Timeline

CAPTURE_BYTES = 32 << 20
LATENCY_S = 0.0001  # of a link in virtual time: an instant that is never the same instant
_CUT = "dropped: the link is cut"


class Switch(Faulty):
    """A learning Ethernet switch with as many ports as asked for.

    With `virtual`, its guests run on the software CPU in virtual time, which goes on only while
    the test waits. `seed` is what all chance comes from. `latency` is that of every link, in
    seconds (100 µs in virtual time, else none). `patience` is how long a verb without a timeout
    waits, in seconds, and how long a guest may take to start. About `capture_bytes` bytes of
    memory are for the last frames. Switches that count with the same `numbers` give no MAC twice.
    """

    def __init__(
        self,
        *,
        virtual: bool = False,
        seed: object = 0,
        latency: float | None = None,
        patience: float = 60.0,
        capture_bytes: int = CAPTURE_BYTES,
        numbers: Iterator[int] | None = None,
    ) -> None:
        self.timeline: Timeline = VirtualTimeline(patience) if virtual else RealTime()
        self._numbers = itertools.count() if numbers is None else numbers
        self._number = next(self._numbers) & 255
        self.others: list[Switch] = []  # of `another`
        self.seed = str(seed)
        self.patience = patience
        self.capture = pcapng.Capture(capture_bytes)
        self.ports: list[Port] = []
        self.hosts: list[Host] = []
        self.faults = []
        self._own_time = True  # it ends with this switch
        self._capture_bytes = capture_bytes
        self._lock = self.timeline.lock
        self._table: dict[bytes, Port] = {}  # where a MAC was seen
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
            numbers=self._numbers,
        )
        other.timeline, other._lock, other._own_time = self.timeline, self._lock, False
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

    def port(
        self, name: str | None = None, *, mac: str | bytes | None = None, mtu: int = MTU
    ) -> GuestPort:
        """A new port for a guest's network device. `mac` is the guest's address there."""
        with self._lock:
            index = len(self.ports)
            address = packets.parse_mac(mac) if isinstance(mac, str) else mac
            own = address or self._mac(0, index)
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
        """A host in Python, with an address such as "10.0.0.1/24", on a port of its own.

        It answers ARP and ping by itself. `gateway` is where packets to other networks go.
        """
        interface = parse_interface(address)
        with self._lock:
            if any(host.address == interface.ip for host in self.hosts):
                raise ValueError(f"the switch has a host {interface.ip} already")
            index = len(self.ports)
            given = packets.parse_mac(mac) if isinstance(mac, str) else mac
            own = given or self._mac(1, index)
            host = Host(self, interface, own, gateway)
            port = HostPort(self, self._name(name, f"host{index}"), index, host.receive)
            host.port = port
            self.ports.append(port)
            self.hosts.append(host)
            return host

    def _mac(self, kind: int, index: int) -> bytes:
        return bytes((2, 0, self._number, kind, index >> 8, index & 255))

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
        for other in self.others:
            other.close()
        if self._own_time:
            self.timeline.close()

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_interface(text: str) -> IPv4Interface:
    """`10.0.0.1/24`; ValueError for anything else."""
    try:
        if isinstance(text, str) and "/" in text:
            return IPv4Interface(text)
    except ValueError:
        pass
    raise ValueError(
        f"{text!r} is not an IPv4 address with the length of its network's prefix, as 10.0.0.1/24"
    )
