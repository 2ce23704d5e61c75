"""What a program that embeds the tender waits for: a guest's start to exit, and many at once.

The rule here: the program is this bench itself. Its first guest makes the server that forks the
others, and is not measured. The reference is started as a program starts it, by posix_spawn.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

from bench.place import HELLO, Place, Unavailable
from bench.results import REFERENCE, Result, Target
from bench.rows import Row
from bench.start import spawn_ms
from bench.tenders import MEM_MIB, environment
from tender import Descriptor, Guest
from tender.errors import TenderError

RATIO = 0.8
PAIRS = 3  # as for `hello`
MANY, QUICK_MANY = 200, 20
STARTERS = 4  # threads that start guests
NAME = "Guest"
QUIET_S = 0.05  # before each sample: what the one before left to do falls on none
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


def measure_guest(place: Place) -> list[Result]:
    """Each way beside the reference: a program readies a process for guests like the last one."""
    return [_measure_way(place, name, options) for name, options in WAYS.items()]


def _measure_way(place: Place, row: str, options: dict[str, object]) -> Result:
    ways: dict[str, Callable[[], float]] = {}
    reference = [tender.words(HELLO) for tender in place.tenders if tender.engine is None]
    if reference:
        ways[REFERENCE] = lambda: spawn_ms(reference[0], environment())
    ways[NAME] = lambda: guest_ms(**options)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    try:
        guest_ms(**options)
    except TenderError as error:
        raise Unavailable(f"{row}: {error}") from None
    for _ in range(place.pairs * PAIRS):
        for name, measure in ways.items():
            time.sleep(QUIET_S)
            samples[name].append(measure())
    return Result(row, "ms", samples, {NAME: Target(ratio=RATIO)} if row == "guest" else {})


def measure_many(place: Place) -> list[Result]:
    count = QUICK_MANY if place.quick else MANY
    kernel = place.guest("ping")
    begin = perf_counter_ns()
    guests = start_many(kernel, count)
    for guest, wire in guests:
        ask(guest, wire)
    answered_ns = perf_counter_ns() - begin
    pss_kib = [pss(guest.pid) for guest, _ in guests if guest.pid]
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


def pss(pid: int) -> int:
    found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    if not found:
        raise Unavailable(f"/proc/{pid}/smaps_rollup has no Pss")
    return int(found[1])


ROWS = [
    Row(
        "guest",
        "start to exit of the hello guest, by a program; on KVM; without sandbox",
        measure_guest,
    ),
    Row("guests", "200 guests at once from one program: time and memory", measure_many),
]
