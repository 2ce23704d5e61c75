"""How long a program waits for its guests: one from start to exit, and many at once.

The program is this bench. Its first guest starts the fork server, and is not measured. The
reference is started by posix_spawn, as a program would start it.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
MANY, THOUSAND = 200, 1000
START_MS, STOP_MS, PSS_KIB = 5000, 2000, 2048
STARTERS = 4  # threads that start and stop guests
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


def measure_many(count: int, session: Session) -> list[Result]:
    """`count` guests at once: until all have answered, the memory of each, until all have ended."""
    row = "guests" if count == MANY else f"guests-{count}"
    if session.quick:
        count //= 10
    kernel = session.guest("ping")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    guest_ms()  # which starts the server
    begin = perf_counter_ns()
    try:
        guests = start_many(kernel, count)
    except TenderError as error:
        raise Unavailable(f"{row}: {error}") from None
    for guest, wire in guests:
        ask(guest, wire)
    answered_ns = perf_counter_ns() - begin
    pids = [guest.pid for guest, _ in guests if guest.pid]
    memory.wait_until_idle(pids[-1])
    pss_kib = [float(memory.tender_pss_kib(pid)) for pid in pids]
    begin = perf_counter_ns()
    stop_many(guests)
    ended_ns = perf_counter_ns() - begin
    start, stop = (Target(value=each) for each in (START_MS, STOP_MS))
    note = f"{count} guests at once, each with a network"
    return [
        Result(
            f"{row}-start",
            "ms",
            {NAME: [answered_ns / 1e6]},
            {NAME: start} if count == THOUSAND else {},
            note=f"{note}: all have answered",
        ),
        Result(
            f"{row}-pss",
            "KiB",
            {NAME: pss_kib},
            {NAME: Target(value=PSS_KIB)},
            note="of one, without its own memory",
        ),
        Result(
            f"{row}-stop",
            "ms",
            {NAME: [ended_ns / 1e6]},
            {NAME: stop} if count == THOUSAND else {},
            note="until all have ended",
        ),
    ]


def start_many(kernel: Path, count: int) -> list[tuple[Guest, socket.socket]]:
    """Guests that answer ARP for 10.0.0.2, started by a few threads. Raises TenderError."""
    guests: list[tuple[Guest, socket.socket]] = []

    def start(_: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(100)
        net = {"service": Descriptor(theirs.fileno())}
        guest = Guest(kernel, mem_mib=MEM_MIB, net=net, warn=lambda _: None)
        guests.append((guest.start(), ours))
        theirs.close()

    with ThreadPoolExecutor(STARTERS) as threads:
        list(threads.map(start, range(count)))
    return guests


def stop_many(guests: list[tuple[Guest, socket.socket]]) -> None:
    """Stop them by a few threads."""

    def stop(running: tuple[Guest, socket.socket]) -> None:
        guest, wire = running
        guest.stop()
        wire.close()

    with ThreadPoolExecutor(STARTERS) as threads:
        list(threads.map(stop, guests))


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
    Row(
        "guests",
        "200 guests at once from one program: time and memory",
        partial(measure_many, MANY),
    ),
    Row("guests-1000", "the same for 1,000", partial(measure_many, THOUSAND)),
]
