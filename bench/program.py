"""How long a program waits for its guests: one from start to exit, and many at once.

The program is this bench. Its first guest starts the fork server, and is not measured. The
reference is started by posix_spawn, as a program would start it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

from bench import memory
from bench.results import REFERENCE, Result, Target
from bench.rows import Row
from bench.session import HELLO, Session, Unavailable
from bench.start import spawn_ms
from bench.tenders import MEM_MIB, environment
from tender import Descriptor, Guest
from tender.errors import TenderError

RATIO = 0.8
PAIRS = 3  # as for `hello`
MANY, QUICK_MANY = 200, 20
STARTERS = 4  # threads that start guests
NAME = "Guest"
QUIET_S = 0.05  # before each sample, for the work that the one before left behind
# fmt: off
ARP = bytes.fromhex(
    "ffffffffffff" "020000000001" "0806" "0001080006040001"
    "020000000001" "0a000001" "000000000000" "0a000002"
)
# fmt: on


def guest_ms(**options: object) -> float:
    """The time from making a Guest to its Outcome."""
    begin = perf_counter_ns()
    guest = Guest(HELLO, mem_mib=MEM_MIB, warn=lambda _: None, **options)  # type: ignore[arg-type]
    outcome = guest.run()
    elapsed_ns = perf_counter_ns() - begin
    if (outcome.reason, outcome.status) != ("halted", 0):
        raise Unavailable(f"the guest ended: {outcome}")
    return elapsed_ns / 1e6


WAYS: dict[str, dict[str, object]] = {
    "guest": {},
    "guest-kvm": {"cpu": "kvm"},
    "guest-open": {"sandbox": "off"},
}


def measure_guest(session: Session) -> list[Result]:
    """Each way beside the reference: the server prepares a child for a guest like the last one."""
    return [_measure_way(session, name, options) for name, options in WAYS.items()]


def _measure_way(session: Session, row: str, options: dict[str, object]) -> Result:
    ways: dict[str, Callable[[], float]] = {}
    reference = [tender.command_line(HELLO) for tender in session.tenders if tender.engine is None]
    if reference:
        ways[REFERENCE] = lambda: spawn_ms(reference[0], environment())
    ways[NAME] = lambda: guest_ms(**options)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    try:
        guest_ms(**options)
    except TenderError as error:
        raise Unavailable(f"{row}: {error}") from None
    for _ in range(session.pairs * PAIRS):
        for name, measure in ways.items():
            time.sleep(QUIET_S)
            samples[name].append(measure())
    return Result(row, "ms", samples, {NAME: Target(ratio=RATIO)} if row == "guest" else {})


def measure_many(session: Session) -> list[Result]:
    count = QUICK_MANY if session.quick else MANY
    kernel = session.guest("ping")
    begin = perf_counter_ns()
    guests = start_many(kernel, count)
    for guest, wire in guests:
        ask(guest, wire)
    answered_ns = perf_counter_ns() - begin
    pss_kib = [memory.pss_kib(guest.pid) for guest, _ in guests if guest.pid]
    begin = perf_counter_ns()
    for guest, wire in guests:
        guest.stop()
        wire.close()
    ended_ns = perf_counter_ns() - begin
    note = f"{count} guests of 8 MiB at once, each with a network"
    return [
        Result(
            "guests-start", "ms", {NAME: [answered_ns / 1e6]}, note=f"{note}: all have answered"
        ),
        Result(
            "guests-pss", "KiB", {NAME: list(map(float, pss_kib))}, note="of one, its memory too"
        ),
        Result("guests-stop", "ms", {NAME: [ended_ns / 1e6]}, note="until all have ended"),
    ]


def start_many(kernel: Path, count: int) -> list[tuple[Guest, socket.socket]]:
    """Guests that answer ARP for 10.0.0.2, started by a few threads."""
    guests: list[tuple[Guest, socket.socket]] = []
    left = iter(range(count))

    def start() -> None:
        for _ in left:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.settimeout(100)
            net = {"service": Descriptor(theirs.fileno())}
            guests.append((Guest(kernel, mem_mib=8, net=net, warn=lambda _: None).start(), ours))
            theirs.close()

    threads = [threading.Thread(target=start) for _ in range(STARTERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(guests) != count:
        raise Unavailable(f"only {len(guests)} of {count} guests could be started")
    return guests


def ask(guest: Guest, wire: socket.socket) -> None:
    """Have the guest answer who has 10.0.0.2."""
    wire.send(ARP)
    while frame := wire.recv(2000):
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2":
            return
    raise Unavailable(f"a guest did not answer: {guest.stop()}")


ROWS = [
    Row(
        "guest",
        "start to exit of the hello guest, by a program; on KVM; without sandbox",
        measure_guest,
    ),
    Row("guests", "200 guests at once from one program: time and memory", measure_many),
]
