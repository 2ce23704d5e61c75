"""A row of the table: its name, what it means, and how it is measured.

The rule here: a row measures its tenders in turn (A B A B ...) through `in_turn`, so that other
load on the machine affects all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.results import Result
from bench.session import Session
from bench.tenders import Tender


@dataclass(frozen=True)
class Row:
    """`measure` returns one or more results, or raises Unavailable."""

    name: str
    meaning: str
    measure: Callable[[Session], list[Result]]


def in_turn(
    tenders: list[Tender], pairs: int, measure: Callable[[Tender], float]
) -> dict[str, list[float]]:
    """`pairs` samples of each tender, in turn."""
    samples: dict[str, list[float]] = {tender.name: [] for tender in tenders}
    for _ in range(pairs):
        for tender in tenders:
            samples[tender.name].append(measure(tender))
    return samples
