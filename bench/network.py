"""Ping, through a tap in a network namespace: tender and guest together.

The guest's own time is in these figures, and on an emulating KVM it is most of them; the rows
net-read and net-write have what the tender alone spends on a frame.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from bench.results import Result
from bench.rows import Row, in_turn
from bench.session import Session, Unavailable, start
from bench.tenders import Tender

NOTE = "mostly the guest's time on this KVM, not the tender's"


@contextmanager
def answering(session: Session, tender: Tender, guest: str = "ping") -> Iterator[None]:
    """A guest that answers ping at 10.0.0.2, ready."""
    image = session.guest(guest, tender.target)
    command = [*session.namespace.enter, *tender.command_line(image, tap="talking")]
    process = start(command)
    assert process.stdout
    try:
        seen = ""
        while "listening" not in seen:
            line = process.stdout.readline()
            if not line:
                raise Unavailable(f"{tender.name}: the guest ended: {seen}")
            seen += line
        session.namespace.run("ping", "-c", "3", "-i", "0.02", "-q", "10.0.0.2")
        yield
    finally:
        process.terminate()
        process.communicate(timeout=30)


def round_trip_ms(session: Session) -> float:
    text = session.namespace.run("ping", "-c", "30", "-i", "0.02", "-q", "10.0.0.2")
    found = re.search(r"= [\d.]+/([\d.]+)/", text)
    if not found or " 0% packet loss" not in text:
        raise Unavailable(f"ping: {text.strip()}")
    return float(found[1])


def packets_per_s(session: Session) -> float:
    """Flooded: the next request is sent at the reply, or after 10 ms."""
    text = session.namespace.run("ping", "-f", "-c", "300", "-q", "10.0.0.2")
    found = re.search(r"(\d+) received.* time (\d+)ms", text)
    if not found:
        raise Unavailable(f"ping -f: {text.strip()}")
    return int(found[1]) / max(1, int(found[2])) * 1000


def _measure(
    name: str,
    unit: str,
    what: Callable[[Session], float],
    session: Session,
    *,
    more_is_better: bool,
) -> list[Result]:
    def one(tender: Tender) -> float:
        with answering(session, tender):
            return what(session)

    samples = in_turn(session.tenders, session.pairs, one)
    return [Result(name, unit, samples, more_is_better=more_is_better, note=NOTE)]


ROWS = [
    Row(
        "ping",
        "round trip of a ping to the ping guest, average of 30",
        partial(_measure, "ping", "ms", round_trip_ms, more_is_better=False),
    ),
    Row(
        "ping-flood",
        "pings answered per second, flooded",
        partial(_measure, "ping-flood", "1/s", packets_per_s, more_is_better=True),
    ),
]
