"""The data path with a stack in the guest: frames, requests, wake-ups, blocks.

The reference is the same guest for spt, which makes its system calls itself: it has no tender that
could be slow. The native CPU is beside it, and KVM and the original tenders where they are.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from bench import client
from bench.disk import GUEST_SIZES, read_mb_per_s
from bench.network import answering
from bench.results import Result, Target
from bench.rows import Row, in_turn
from bench.session import Session
from bench.tenders import Tender

SPT, NATIVE = "ptender spt", "ptender native"
DISK_RATIO = 1.5
SECONDS, QUICK_SECONDS = 1.0, 0.3
WHAT = {
    "data-frames": (client.frames_per_s, "1/s", "frames of 1,400 bytes echoed, some under way"),
    "data-requests": (client.requests_per_s, "1/s", "pages over HTTP, a connection each"),
    "data-wake": (client.round_trip_us, "us", "round trip of a frame to a guest that waits"),
}


def tenders(session: Session) -> list[Tender]:
    """ptender with spt and hvt guests, and the originals that are there."""
    found = [Tender(SPT, (str(session.ptender),), "c", kvm=False, target="spt")]
    path = os.environ.get("SOLO5_SPT")
    if path:
        words = (str(Path(path).resolve()),)
        found.append(Tender("solo5-spt", words, None, kvm=False, target="spt"))
    return [*found, *(each for each in session.tenders if each.engine != "python")]


def measure_network(name: str, session: Session) -> list[Result]:
    function, unit, note = WHAT[name]
    seconds = QUICK_SECONDS if session.quick else SECONDS
    words = [sys.executable, "-I", client.__file__, function.__name__, str(seconds)]

    def one(tender: Tender) -> float:
        with answering(session, tender, "web"):
            return float(session.namespace.run(*words))

    samples = in_turn(tenders(session), session.pairs, one)
    return [Result(name, unit, samples, more_is_better=unit == "1/s", note=note, reference=SPT)]


def measure_disk(label: str, session: Session) -> list[Result]:
    one = partial(read_mb_per_s, session, GUEST_SIZES[label])
    samples = in_turn(tenders(session), session.pairs, one)
    targets = {NATIVE: Target(ratio=DISK_RATIO)}
    name = f"data-disk-{label}"
    return [Result(name, "MB/s", samples, targets, more_is_better=True, reference=SPT)]


ROWS = [
    *(Row(name, what[2], partial(measure_network, name)) for name, what in WHAT.items()),
    *(
        Row(
            f"data-disk-{label}",
            f"a guest reads blocks of {size} bytes",
            partial(measure_disk, label),
        )
        for label, size in GUEST_SIZES.items()
    ),
]
