"""Results as a table of 80 columns, as Markdown, as JSON.

Pure; figures are never rounded to a target.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from bench.results import Result, Skipped, Spread, is_met, ratios, spread

Found = Result | Skipped

LEGEND = (
    "Median of the samples. The ratio is that to the first tender of the row, of pairs measured\n"
    "in turn: median [quartiles]; above 1, more time or memory is taken, or less is moved."
)
WIDTH = 80
MARKERS = ("<!-- figures: begin -->", "<!-- figures: end -->")


def number(value: float) -> str:
    """At least three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(found: list[float]) -> str:
    if not found:
        return ""
    value: Spread = spread(found)
    return f"{number(value.median)} [{number(value.low)}-{number(value.high)}]"


def _target(result: Result, tender: str) -> str:
    target = result.targets.get(tender)
    if target is None:
        return ""
    if target.value is not None:
        return f"{number(target.value)} {result.unit}"
    return f"ratio {target.ratio}"


def _verdict(result: Result, tender: str) -> str:
    return {True: "met", False: "missed", None: ""}[is_met(result, tender)]


def cells(result: Result) -> list[list[str]]:
    """One list per tender: row, tender, median with its unit, ratio, target, verdict."""
    return [
        [
            result.name,
            tender,
            f"{number(spread(samples).median)} {result.unit}",
            _ratio(ratios(result, tender)),
            _target(result, tender),
            _verdict(result, tender),
        ]
        for tender, samples in result.samples.items()
    ]


_LINE = "{:<16} {:<14} {:>12}  {:<17} {:<9} {:<6}"


def lines(found: Found) -> list[str]:
    """One row for the table."""
    if isinstance(found, Skipped):
        reason = f"not measured: {' '.join(found.reason.split())}"
        wrapped = textwrap.wrap(reason, WIDTH - 18)
        return [f"{found.name:<16} {wrapped[0]}", *(f"{'':<17}{line}" for line in wrapped[1:])]
    rows = cells(found)
    for row in rows[1:]:
        row[0] = ""
    return [_LINE.format(*row).rstrip() for row in rows]


def header() -> list[str]:
    return [_LINE.format("row", "tender", "median", "ratio", "target", "").rstrip(), "-" * 79]


def markdown(machine: dict[str, str], command: str, results: list[Found]) -> str:
    """The figures for docs/performance.md, with the command and the machine that made them."""
    parts = [f"Made by `{command}` on this machine:", ""]
    parts += [f"- {name}: {value}" for name, value in machine.items()]
    parts += ["", "| row | tender | median | ratio | target | |"]
    parts += ["|---|---|---:|---|---|---|"]
    for found in results:
        if isinstance(found, Skipped):
            reason = " ".join(found.reason.split())
            parts.append(f"| {found.name} | | not measured: {reason} | | | |")
        else:
            parts += [f"| {' | '.join(row)} |" for row in cells(found)]
    return "\n".join([*parts, "", LEGEND])


def insert(document: str, figures: str) -> str:
    """The document with the new figures between its markers."""
    begin, end = MARKERS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"no {begin} ... {end} in the document")
    return pattern.sub(lambda _: f"{begin}\n{figures}\n{end}", document)


def as_json(machine: dict[str, str], command: str, results: list[Found]) -> dict[str, Any]:
    return {"machine": machine, "command": command, "rows": [_as_json(row) for row in results]}


def _as_json(found: Found) -> dict[str, Any]:
    if isinstance(found, Skipped):
        return {"name": found.name, "skipped": found.reason}
    return {
        "name": found.name,
        "unit": found.unit,
        "more_is_better": found.more_is_better,
        "note": found.note,
        "tenders": {
            tender: {
                "samples": samples,
                "median": spread(samples).median,
                "ratios": ratios(found, tender),
                "target": _target(found, tender) or None,
                "met": is_met(found, tender),
            }
            for tender, samples in found.samples.items()
        },
        "reference": found.reference if found.reference in found.samples else None,
    }
