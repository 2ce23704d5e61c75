"""The plot: ratios to the reference where there is one, else plain medians.

The rule here: the only importer of matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.results import REFERENCE, Result, ratios, spread

COLOURS = {
    "ptender c": "#1b6ca8",
    "ptender python": "#e0a030",
    "ptender native": "#3a9a5b",
    "Guest": "#8050a0",
    "restore kvm": "#6fa8d0",
    "restore native": "#8fc8a0",
    "restore soft": "#b0b060",
    "ptender": "#c05040",
    REFERENCE: "#777777",
}


def draw(results: list[Result], path: Path) -> None:
    """Write a PNG; ImportError where matplotlib is not installed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    compared = [result for result in results if result.reference in result.samples]
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.45 * len(compared or results)))
    if compared:
        _bars(axes, compared, with_ratios=True)
        axes.axvline(1, color="black", linewidth=0.8)
        _targets(axes, compared)
        axes.set_xlabel("ratio to the reference, log scale (median, quartiles; below 1 is better)")
    else:
        _bars(axes, results, with_ratios=False)
        axes.set_xlabel("median in the unit of the row, log scale")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _targets(axes: Any, results: list[Result]) -> None:
    """A mark where a row has a target that is a ratio."""
    places, values = [], []
    for place, result in enumerate(results):
        for target in result.targets.values():
            if target.ratio is not None:
                places.append(place)
                values.append(target.ratio)
    axes.scatter(values, places, marker="|", s=200, color="#b03030", zorder=3, label="target")


def _bars(axes: Any, results: list[Result], *, with_ratios: bool) -> None:
    names = list(dict.fromkeys(name for result in results for name in result.samples))
    references = {result.reference for result in results} if with_ratios else set()
    names = [name for name in names if name not in references]
    for name in names:
        spots, heights, values = [], [], []
        for place, result in enumerate(results):
            if name in result.samples:
                found = ratios(result, name) if with_ratios else result.samples[name]
                beside = [each for each in names if each in result.samples]
                height = 0.8 / max(2, len(beside))
                spots.append(place + (beside.index(name) - (len(beside) - 1) / 2) * height)
                heights.append(height)
                values.append(spread(found))
        medians = [value.median for value in values]
        errors = [
            [value.median - value.low for value in values],
            [value.high - value.median for value in values],
        ]
        # On a log scale a bar has no natural beginning: ratios grow from 1, to either side.
        begin = 1 if with_ratios else min(medians) / 2
        widths = [median - begin for median in medians]
        colour = COLOURS.get(name)
        axes.barh(spots, widths, heights, begin, xerr=errors, label=name, color=colour, capsize=2)
    units = [result.name if with_ratios else f"{result.name} ({result.unit})" for result in results]
    axes.set_yticks(range(len(results)), units, fontsize=8)
