"""The arithmetic of the bench: pairs, targets, the table, the mappings of a process."""

from __future__ import annotations

from typing import Any

import pytest

from bench import against, memory, report, start
from bench.results import REFERENCE, Result, Skipped, Target, is_met, ratios, spread
from bench.rows import in_turn
from bench.tenders import Tender

OURS = "ptender c"


def result(ours: list[float], theirs: list[float], target: Target) -> Result:
    return Result("row", "ns", {REFERENCE: theirs, OURS: ours}, {OURS: target})


def test_tenders_are_measured_in_turn() -> None:
    tenders = [Tender(name, (name,), None) for name in "AB"]
    order: list[str] = []

    def measure(tender: Tender) -> float:
        order.append(tender.name)
        return len(order)

    assert in_turn(tenders, 3, measure) == {"A": [1, 3, 5], "B": [2, 4, 6]}
    assert order == list("ABABAB")


def test_a_ratio_is_that_of_a_pair() -> None:
    found = result([20, 90], [10, 30], Target(ratio=2.5))
    assert ratios(found, OURS) == [2, 3]
    assert ratios(found, REFERENCE) == []
    assert spread(ratios(found, OURS)).median == 2.5


def test_a_ratio_above_one_always_says_that_ptender_is_behind() -> None:
    found = result([5], [10], Target())
    assert ratios(found, OURS) == [0.5]
    found.more_is_better = True
    assert ratios(found, OURS) == [2]


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (Target(ratio=2.0), True),
        (Target(ratio=1.9), False),
        (Target(value=20), True),
        (Target(value=19), False),
    ],
)
def test_a_target_is_met_by_the_median(target: Target, met: bool) -> None:
    assert is_met(result([20, 20, 99], [10, 10, 10], target), OURS) is met


def test_nothing_is_met_without_something_to_compare_with() -> None:
    alone = Result("row", "ns", {OURS: [20]}, {OURS: Target(ratio=2)})
    assert is_met(alone, OURS) is None
    assert is_met(result([1], [1], Target(ratio=2)), REFERENCE) is None


def test_the_table_has_80_columns() -> None:
    wide = Result("disk-write-512", "MB/s", {REFERENCE: [12345], "ptender python": [1.0]})
    skipped = Skipped("ping", "no\nroot " * 20)
    for line in [*report.header(), *report.lines(wide), *report.lines(skipped)]:
        assert len(line) <= 80
    assert "12,345 MB/s" in report.lines(wide)[0]
    assert report.lines(skipped)[0].startswith("ping             not measured: no root no root")


def test_figures_go_between_the_markers_of_a_document() -> None:
    begin, end = report.MARKERS
    document = f"before\n{begin}\nold\n{end}\nafter\n"
    text = report.markdown({"CPU": "x"}, "the command", [result([20], [10], Target(ratio=1.5))])
    changed = report.insert(document, text)
    assert changed.startswith("before\n")
    assert changed.endswith("\nafter\n")
    assert "old" not in changed
    assert "| row | ptender c | 20.0 ns | 2.00 [2.00-2.00] | ratio 1.5 | missed |" in changed
    assert report.insert(changed, text) == changed
    with pytest.raises(ValueError, match="figures"):
        report.insert("no place", text)


SMAPS = """\
00001000-00003000 r--p 00000000 00:00 0 /lib/x
Pss:                   5 kB
00010000-00014000 rw-p 00000000 00:00 0
Pss:                   8 kB
00014000-00015000 r--p 00000000 00:00 0
Pss:                   4 kB
00015000-00018000 rw-p 00000000 00:00 0
Pss:                   2 kB
00020000-00028000 rw-p 00000000 00:00 0
Pss:                  64 kB
"""


def test_guest_memory_is_found_where_it_is_split() -> None:
    mappings = memory.parse_smaps(SMAPS)
    assert [mapping.pss_kib for mapping in memory.guest_memory(mappings, 0x5000)] == [8, 4]
    assert [mapping.pss_kib for mapping in memory.guest_memory(mappings, 0x4000)] == [8]
    assert memory.guest_memory(mappings, 0x7000) == []


def test_import_times_are_read() -> None:
    text = "import time: self [us] | cumulative | imported package\nimport time:  12 |  34 |   os\n"
    assert start.import_lines(text) == [("os", 12)]


def turn(**samples: float) -> list[dict[str, Any]]:
    """A run of the bench with one row."""
    tenders = {name: {"samples": [value]} for name, value in samples.items()}
    return [{"name": "row", "unit": "ns", "more_is_better": False, "tenders": tenders}]


def test_two_builds_are_compared_tender_by_tender() -> None:
    turns = {"old": [turn(c=10), turn(c=30)], "this": [turn(c=11, new=1), turn(c=60, new=1)]}
    compared, skipped = against.joined("old", turns)
    assert isinstance(compared, Result)
    assert compared.samples == {"old": [10, 30], "this: c": [11, 60]}
    assert ratios(compared, "this: c") == [1.1, 2]
    assert is_met(compared, "this: c") is False
    assert skipped == Skipped("row", "new: old has no such row")


def test_a_row_that_fails_in_a_build_is_skipped() -> None:
    failed = [{"name": "row", "skipped": "no tap"}]
    assert list(against.joined("old", {"old": [failed], "this": [failed]})) == [
        Skipped("row", "no tap")
    ]
