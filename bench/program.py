"""How long a program waits for its guests: one from start to exit, and many at once.

The program is this bench. Its first guest starts the fork server, and is not measured. The
reference is started by posix_spawn, as a program would start it.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import TypeVar

from bench import memory
from bench.results import REFERENCE, Result, Target
from bench.rows import Row
from bench.session import HELLO, Session, Unavailable
from bench.start import spawn_ms
from bench.tenders import MEM_MIB, environment
from tender import Descriptor, Guest
from tender.errors import TenderError
from tender.testing.net.switch import Switch

T = TypeVar("T")
R = TypeVar("R")

RATIO = 0.8
PAIRS = 3  # as for `hello`
MANY, THOUSAND = 200, 1000
START_MS, STOP_MS, PSS_KIB = 5000, 2000, 2048
STARTERS = 4  # threads that start and stop guests
NAME = "Guest"
PATIENCE_S = 100.0  # with an answer
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
    kernel, number = _prepare_many(count, session)
    begin = perf_counter_ns()
    try:
        guests = start_many(kernel, number)
    except TenderError as error:
        raise Unavailable(f"{row}: {error}") from None
    for guest, wire in guests:
        ask(guest, wire)
    answered_ns = perf_counter_ns() - begin
    pids = [guest.pid for guest, _ in guests if guest.pid]
    memory.wait_until_idle(pids[-1])
    pss_kib = [float(memory.tender_pss_kib(pid)) for pid in pids]
    stopped_ns = stop_many([guest for guest, _ in guests])
    for _, wire in guests:
        wire.close()
    start, stop = _times(row, count == THOUSAND, answered_ns, stopped_ns)
    start.note = f"{number} guests at once, each with a network: all have answered"
    memory_of_one = Result(
        f"{row}-pss",
        "KiB",
        {NAME: pss_kib},
        {NAME: Target(value=PSS_KIB)},
        note="of one, without its own memory",
    )
    return [start, memory_of_one, stop]


def measure_on_switch(session: Session) -> list[Result]:
    """The same for 1,000 on one switch: until each has answered a ping, until all have ended."""
    row = f"guests-{THOUSAND}-switch"
    kernel, number = _prepare_many(THOUSAND, session)
    addresses = [f"10.0.{1 + each // 250}.{1 + each % 250}" for each in range(number)]
    with Switch(patience=PATIENCE_S, neigh_suppress=True) as switch:
        host = switch.host("10.0.0.1/16")

        def start(address: str) -> Guest:
            net = {"service": switch.port()}
            words = f"--ipv4={address}/16"
            return Guest(kernel, words, mem_mib=MEM_MIB, net=net, warn=lambda _: None).start()

        begin = perf_counter_ns()
        try:
            guests = _by_threads(start, addresses)
        except TenderError as error:
            raise Unavailable(f"{row}: {error}") from None
        if any(host.ping(each, timeout=PATIENCE_S).lost for each in addresses):
            raise Unavailable(f"{row}: a guest did not answer")
        answered_ns = perf_counter_ns() - begin
        results = _times(row, True, answered_ns, stop_many(guests))
    results[0].note = f"{number} guests on one switch, which does not flood ARP: all have answered"
    return results


def _prepare_many(count: int, session: Session) -> tuple[Path, int]:
    """The guest, and how many of them; starts the server."""
    kernel = session.guest("ping")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    guest_ms()
    return kernel, count // 10 if session.quick else count


def _times(row: str, has_target: bool, answered_ns: int, stopped_ns: int) -> list[Result]:
    def result(what: str, elapsed_ns: int, target_ms: int) -> Result:
        targets = {NAME: Target(value=target_ms)} if has_target else {}
        return Result(f"{row}-{what}", "ms", {NAME: [elapsed_ns / 1e6]}, targets)

    stop = result("stop", stopped_ns, STOP_MS)
    stop.note = "until all have ended"
    return [result("start", answered_ns, START_MS), stop]


def _by_threads(call: Callable[[T], R], values: Iterable[T]) -> list[R]:
    with ThreadPoolExecutor(STARTERS) as threads:
        return list(threads.map(call, values))


def start_many(kernel: Path, count: int) -> list[tuple[Guest, socket.socket]]:
    """Guests that answer ARP for 10.0.0.2, started by a few threads. Raises TenderError."""

    def start(_: int) -> tuple[Guest, socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE_S)
        net = {"service": Descriptor(theirs.fileno())}
        guest = Guest(kernel, mem_mib=MEM_MIB, net=net, warn=lambda _: None).start()
        theirs.close()
        return guest, ours

    return _by_threads(start, range(count))


def stop_many(guests: list[Guest]) -> int:
    """Stop them by a few threads; how long that took, in nanoseconds."""
    begin = perf_counter_ns()
    _by_threads(Guest.stop, guests)
    return perf_counter_ns() - begin


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
    Row("guests-1000-switch", "the same on one switch, without memory", measure_on_switch),
]
