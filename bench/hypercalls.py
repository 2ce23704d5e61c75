"""What a tender spends on a hypercall, through the stand-in for KVM_RUN."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from bench import standin
from bench.results import Result, Target
from bench.rows import Row, in_turn
from bench.session import DISK_BYTES, HELLO, Session
from bench.standin import Scenario
from bench.tenders import Tender

PYTHON_NS = 3000  # with the Python handlers, for any call
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
    "net-read": Call(Scenario("NET_READ", 1514), "NET_READ without a frame", "net"),
    "net-write": Call(Scenario("NET_WRITE", 1500), "NET_WRITE of 1500 bytes to a tap", "net"),
    "block-read": Call(Scenario("BLOCK_READ", 512, DISK_BYTES), "BLOCK_READ of 512 bytes", "block"),
    "block-write": Call(
        Scenario("BLOCK_WRITE", 512, DISK_BYTES), "BLOCK_WRITE of 512 bytes", "block"
    ),
}


def command(session: Session, tender: Tender, device: str) -> list[str]:
    """The tender with a guest that has that device; the guest itself never runs."""
    if device == "net":
        return [*session.namespace.enter, *tender.command_line(session.guest("ping"), tap="quiet")]
    if device == "block":
        return tender.command_line(session.guest("disk"), disk=session.disk())
    return tender.command_line(HELLO)


def measure_call(name: str, call: Call, session: Session) -> list[Result]:
    own: list[float] = []

    def one(tender: Tender) -> float:
        figures = standin.run(command(session, tender, call.device), call.scenario, session.folder)
        own.append(figures.own_ns)
        return figures.median_ns

    samples = in_turn(session.on_kvm, session.pairs, one)
    note = f"the stand-in's own {min(own):.1f} to {max(own):.1f} ns are taken off"
    return [Result(name, "ns", samples, _targets(session, call), note=note)]


def _targets(session: Session, call: Call) -> dict[str, Target]:
    by_engine = {"c": Target(ratio=call.ratio), "python": Target(value=PYTHON_NS)}
    return {tender.name: by_engine[tender.engine] for tender in session.on_kvm if tender.engine}


ROWS = [
    Row(name, f"tender time of {call.meaning} (stand-in)", partial(measure_call, name, call))
    for name, call in HYPERCALLS.items()
]
