"""Block throughput: the tender alone, through the stand-in, and with a guest that reads.

With a guest, one block is one exit, so on an emulating KVM the figure is mostly that of KVM and the
guest. A block has at most 32 KiB there: the manifest's field for its size has 16 bits, and a guest
moves one block per call.
"""

from __future__ import annotations

import re
import subprocess
from functools import partial

from bench import standin
from bench.results import Result
from bench.rows import Row, in_turn
from bench.session import DISK_BYTES, Session, Unavailable
from bench.standin import Scenario
from bench.tenders import Tender, environment

SIZES = {"512": 512, "4k": 4096, "64k": 65536}
GUEST_SIZES = {"512": 512, "4k": 4096, "32k": 32768}
GUEST_MS = 300


def measure_tender(name: str, call: str, size: int, session: Session) -> list[Result]:
    scenario = Scenario(call, size, DISK_BYTES)

    def one(tender: Tender) -> float:
        command = tender.command_line(session.guest("disk"), disk=session.disk())
        return size * 1000 / standin.run(command, scenario, session.folder).median_ns

    return [Result(name, "MB/s", in_turn(session.on_kvm, session.pairs, one), more_is_better=True)]


def read_mb_per_s(session: Session, size: int, tender: Tender) -> float:
    """What a guest reads that does nothing else."""
    image, disk = session.guest("readall", tender.target), session.disk()
    command = tender.command_line(image, str(GUEST_MS), disk=disk, sector_size=size)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    found = re.search(r"read (\d+) bytes in (\d+) ns", done.stdout)
    if not found:
        raise Unavailable(f"{tender.name}: {done.stdout}{done.stderr}")
    return int(found[1]) * 1000 / int(found[2])


def measure_guest(name: str, size: int, session: Session) -> list[Result]:
    samples = in_turn(session.tenders, session.pairs, partial(read_mb_per_s, session, size))
    note = "mostly the guest's time and KVM's, not the tender's"
    return [Result(name, "MB/s", samples, more_is_better=True, note=note)]


ROWS = [
    *(
        Row(
            f"disk-{verb}-{label}",
            f"block throughput in calls of {size} bytes, {doing} (stand-in)",
            partial(measure_tender, f"disk-{verb}-{label}", f"BLOCK_{verb.upper()}", size),
        )
        for verb, doing in (("read", "reading"), ("write", "writing"))
        for label, size in SIZES.items()
    ),
    *(
        Row(
            f"disk-guest-{label}",
            f"block throughput of a guest that reads blocks of {size} bytes",
            partial(measure_guest, f"disk-guest-{label}", size),
        )
        for label, size in GUEST_SIZES.items()
    ),
]
