"""The rows of the table: a name, what it means, and how it is measured.

The rule here: a row measures its tenders in turn (A B A B ...) through `in_turn`, so that what else
the machine does falls on all of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from bench.place import Place
from bench.results import Result
from bench.tenders import Tender


@dataclass(frozen=True)
class Row:
    """`measure` gives one or more results; it raises Unavailable where it can't."""

    name: str
    meaning: str
    measure: Callable[[Place], list[Result]]


def in_turn(
    tenders: list[Tender], pairs: int, measure: Callable[[Tender], float]
) -> dict[str, list[float]]:
    """`pairs` samples of each tender, in turn."""
    samples: dict[str, list[float]] = {tender.name: [] for tender in tenders}
    for _ in range(pairs):
        for tender in tenders:
            samples[tender.name].append(measure(tender))
    return samples


def all_rows() -> list[Row]:
    """In the order of the table. bench/softcpu.py adds its own `ROWS`, where it is there."""
    from bench import disk, hypercalls, memory, network, program, start

    rows = [*hypercalls.ROWS, *disk.ROWS, *start.ROWS, *program.ROWS, *network.ROWS, *memory.ROWS]
    if importlib.util.find_spec("bench.softcpu"):
        rows += importlib.import_module("bench.softcpu").ROWS
    return rows
