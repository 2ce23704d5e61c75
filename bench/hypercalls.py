"""What a tender spends on a hypercall, through the stand-in for KVM_RUN."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from bench import standin
from bench.place import DISK_BYTES, HELLO, Place
from bench.results import Result, Target
from bench.rows import Row, in_turn
from bench.standin import Scenario
from bench.tenders import Tender

PYTHON_NS = 3000  # on the Python path, whatever the call
ENGINE_RATIO = 1.1


@dataclass(frozen=True)
class Call:
    """A call on the device that it needs."""

    scenario: Scenario
    meaning: str
    device: str = ""
    ratio: float = ENGINE_RATIO


HYPERCALLS = {
    "walltime": Call(Scenario("WALLTIME"), "WALLTIME"),
    "puts": Call(Scenario("PUTS", 20), "PUTS of 20 bytes to /dev/null"),
    "poll": Call(Scenario("POLL"), "POLL(0) with one quiet tap", "net", 0.2),
    "net-read": Call(Scenario("NET_READ", 1514), "NET_READ, nothing waits", "net"),
    "net-write": Call(Scenario("NET_WRITE", 1500), "NET_WRITE of 1500 bytes to a tap", "net"),
    "block-read": Call(Scenario("BLOCK_READ", 512, DISK_BYTES), "BLOCK_READ of 512 bytes", "block"),
    "block-write": Call(
        Scenario("BLOCK_WRITE", 512, DISK_BYTES), "BLOCK_WRITE of 512 bytes", "block"
    ),
}


def command(place: Place, tender: Tender, device: str) -> list[str]:
    """The tender with a guest that has that device; the guest itself never runs."""
    if device == "net":
        return [*place.namespace.enter, *tender.words(place.guest("ping"), tap="quiet")]
    if device == "block":
        return tender.words(place.guest("disk"), disk=place.disk())
    return tender.words(HELLO)


def measure_call(name: str, call: Call, place: Place) -> list[Result]:
    own: list[float] = []

    def one(tender: Tender) -> float:
        figures = standin.run(command(place, tender, call.device), call.scenario, place.folder)
        own.append(figures.own_ns)
        return figures.median_ns

    samples = in_turn(place.tenders, place.pairs, one)
    note = f"the stand-in's own {min(own):.1f} to {max(own):.1f} ns are taken off"
    return [Result(name, "ns", samples, _targets(place, call), note=note)]


def _targets(place: Place, call: Call) -> dict[str, Target]:
    by_engine = {"c": Target(ratio=call.ratio), "python": Target(value=PYTHON_NS)}
    return {tender.name: by_engine[tender.engine] for tender in place.tenders if tender.engine}


ROWS = [
    Row(name, f"tender time of {call.meaning} (stand-in)", partial(measure_call, name, call))
    for name, call in HYPERCALLS.items()
]
