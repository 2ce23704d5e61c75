"""The memory of a tender beside that of its guest: PSS without guest memory.

Guest memory is found by its size in /proc/PID/smaps (protected parts split it), and subtracted.
Source: Linux, Documentation/filesystems/proc.rst. Memory that the kernel keeps for a process (page
tables, KVM's own) is not in PSS.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.results import Result
from bench.rows import Row, in_turn
from bench.session import Session, Unavailable, start
from bench.tenders import MEM_MIB, Tender

_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")
_ASLEEP_S = 0.2


class Mapping(NamedTuple):
    """A line of /proc/PID/maps with its share of memory."""

    start: int
    end: int
    pss_kib: int


def parse_smaps(text: str) -> list[Mapping]:
    mappings: list[Mapping] = []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            mappings.append(Mapping(int(head[1], 16), int(head[2], 16), 0))
        elif line.startswith("Pss:"):
            mappings[-1] = mappings[-1]._replace(pss_kib=int(line.split()[1]))
    return mappings


def guest_memory(mappings: list[Mapping], size: int) -> list[Mapping]:
    """The adjacent mappings of `size` bytes in all; empty if there are none."""
    for first in range(len(mappings)):
        end = mappings[first].start
        for last in range(first, len(mappings)):
            if mappings[last].start != end or end - mappings[first].start > size:
                break
            end = mappings[last].end
            if end - mappings[first].start == size:
                return mappings[first : last + 1]
    return []


def tender_pss_kib(pid: int) -> int:
    """PSS of a tender with a guest of MEM_MIB, without the guest's memory."""
    guest = guest_memory(parse_smaps(Path(f"/proc/{pid}/smaps").read_text()), MEM_MIB << 20)
    if not guest:
        raise Unavailable(f"process {pid}: no mapping of {MEM_MIB} MiB")
    own = pss_kib(pid) - sum(mapping.pss_kib for mapping in guest)
    return own + sum(map(_guest_process_kib, _children(pid)))


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _guest_process_kib(pid: int) -> int:
    """PSS of a guest's process on the native CPU, without guest memory, which is at its start."""
    mappings = parse_smaps(Path(f"/proc/{pid}/smaps").read_text())
    return sum(each.pss_kib for each in mappings if each.start > MEM_MIB << 20)


def pss_kib(pid: int) -> int:
    """PSS of a process, in KiB."""
    found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    if not found:
        raise Unavailable(f"/proc/{pid}/smaps_rollup has no Pss")
    return int(found[1])


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_until_idle(pid: int) -> None:
    """Wait until the process uses no CPU: its guest sleeps."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        before = _cpu_ticks(pid)
        time.sleep(_ASLEEP_S)
        if _cpu_ticks(pid) == before:
            return
    raise Unavailable(f"process {pid}: the guest does not sleep")


@contextmanager
def sleeping(tender: Tender, kernel: Path) -> Iterator[int]:
    """A guest that has printed its banner, and sleeps; the PID of its tender."""
    command = tender.command_line(kernel, "600000")
    process = start(command)
    assert process.stdout
    try:
        first = process.stdout.readline()
        if not first.startswith("Solo5:"):
            raise Unavailable(f"{tender.name}: the guest did not start: {first}")
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def pss_of(session: Session, count: int, tender: Tender) -> float:
    """KiB per guest, of `count` that run at the same time."""
    with ExitStack() as stack:
        kernel = session.guest("sleep")
        pids = [stack.enter_context(sleeping(tender, kernel)) for _ in range(count)]
        wait_until_idle(pids[-1])
        return sum(tender_pss_kib(pid) for pid in pids) / count


def measure(count: int, session: Session) -> list[Result]:
    if session.quick:
        count = min(count, 10)
    samples = in_turn(session.tenders, min(session.pairs, 3), partial(pss_of, session, count))
    note = "per guest, each in a process of its own; without guest memory"
    return [Result(f"memory-{count}", "KiB", samples, note=note)]


ROWS = [
    Row("memory-1", "memory of one guest, without its own", partial(measure, 1)),
    Row("memory-100", "memory of each of 100 guests, without their own", partial(measure, 100)),
]
