"""What a row found, as values: samples of each tender, and the ratios of pairs.

Pure. Tenders are measured in turn, so the n-th samples of two tenders are a pair, made within
seconds of each other; a ratio is that of a pair, and of many the median and the quartiles are
shown. A ratio above 1 always means that ptender takes more.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

REFERENCE = "solo5-hvt"


@dataclass(frozen=True)
class Spread:
    """The median of some numbers and their quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Target:
    """What ptender should reach: at most `ratio` of the reference, or at most `value`."""

    ratio: float | None = None
    value: float | None = None


@dataclass
class Result:
    """The samples of one row by tender, one per turn."""

    name: str
    unit: str
    samples: dict[str, list[float]]
    targets: dict[str, Target] = field(default_factory=dict)  # by tender
    more_is_better: bool = False
    note: str = ""
    reference: str = REFERENCE


@dataclass(frozen=True)
class Skipped:
    """A row that could not be measured here."""

    name: str
    reason: str


def spread(samples: list[float]) -> Spread:
    if len(samples) < 2:
        return Spread(samples[0], samples[0], samples[0])
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratios(result: Result, tender: str) -> list[float]:
    """The ratio of each pair; empty without the reference, and for the reference itself."""
    reference = result.samples.get(result.reference, [])
    if tender == result.reference:
        return []
    pairs = zip(result.samples[tender], reference, strict=False)
    if result.more_is_better:
        return [theirs / ours for ours, theirs in pairs]
    return [ours / theirs for ours, theirs in pairs]


def is_met(result: Result, tender: str) -> bool | None:
    """Whether the target is met; None: there is no target, or no reference."""
    target = result.targets.get(tender)
    if target is None:
        return None
    if target.value is not None:
        median = spread(result.samples[tender]).median
        return median >= target.value if result.more_is_better else median <= target.value
    found = ratios(result, tender)
    if target.ratio is None or not found:
        return None
    return spread(found).median <= target.ratio
