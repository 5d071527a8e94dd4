"""Figure 6 of the paper: best-of-N accuracy over the number of actions."""

from typing import Any

import matplotlib
from markupsafe import Markup

from rheostat.reports import reading
from rheostat.reports.figures.svg import RC, colour, new_figure, quiet, to_svg
from rheostat.reports.reading import Results, number

_LINES = {  # name: (label, colour, dash)
    "top": ("highest means", "second", (0, (4, 2))),
    "greedy": ("chosen together", "accent", "-"),
}


def intervals(results: Results, name: str) -> list[tuple[float, float, float]]:
    """Estimate, low and high with 1, 2, … actions; empty where one is missing."""
    rows = [[number(value) for value in row] for row in reading.mapping(results, "held_out").get(name) or ()]
    known = [(row[0], row[1], row[2]) for row in rows if len(row) == 3]
    found = [(a, b, c) for a, b, c in known if a is not None and b is not None and c is not None]
    return found if len(found) == len(rows) else []


def best_of_n(results: Results, width: int, name: str = "best-of-n") -> Markup | None:
    """Coverage in percent against the number of actions, greedy choice beside the highest means, with 95 % bands."""
    curves = {line: intervals(results, line) for line in _LINES}
    if not all(curves.values()):
        return None
    narrow = width < 500
    with matplotlib.rc_context(RC):
        height = 330 if narrow else 380
        figure = new_figure(width, height)
        left, right, bottom, top = 34, (76 if narrow else 130), 46, 34
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        axes: Any = figure.add_axes(box)
        quiet(axes)
        axes.spines["left"].set_visible(False)
        for layer, (line, (_, tint, dash)) in enumerate(_LINES.items(), start=2):
            xs = list(range(1, len(curves[line]) + 1))
            ys, lows, highs = ([100 * value for value in column] for column in zip(*curves[line], strict=True))
            if len(xs) > 1:
                axes.fill_between(xs, lows, highs, color=colour(tint), alpha=0.15, linewidth=0, zorder=1)
            else:
                axes.plot([1, 1], [lows[0], highs[0]], color=colour(tint), linewidth=6, alpha=0.3, zorder=1)
            axes.plot(
                xs, ys, color=colour(tint), linewidth=1.8 + 0.6 * (line == "greedy"), linestyle=dash, zorder=layer
            )
            axes.plot(xs, ys, "o", color=colour(tint), markersize=5, zorder=layer)
        most = max(map(len, curves.values()))
        axes.set_xlim(0.9, most + 0.1)
        axes.set_xticks(range(1, most + 1, -(-most // (8 if narrow else 16))))
        axes.set_xlabel("N, number of strategies", color=colour("muted"), loc="left", labelpad=6)
        figure.text(2 / width, 1 - 12 / height, "covered, %", color=colour("muted"), va="center")
        _labels(axes, {line: 100 * curve[-1][0] for line, curve in curves.items()}, narrow, height - bottom - top)
        return to_svg(
            figure, f"{name}{width}", "Line chart: coverage on other problems against the number of strategies."
        )


def _labels(axes: Any, ends: dict[str, float], wrap: bool, height: float) -> None:
    """The name beside the end of each line; two that would overlap are pushed apart."""
    low, high = axes.get_ylim()
    least = (34 if wrap else 18) * (high - low) / height
    upper, lower = sorted(ends, key=lambda line: -ends[line] if ends["greedy"] != ends["top"] else line)
    push = max(least - (ends[upper] - ends[lower]), 0) / 2
    for line, place in ((upper, ends[upper] + push), (lower, ends[lower] - push)):
        label, tint, _ = _LINES[line]
        axes.text(
            1.03,
            place,
            label.replace(" ", "\n") if wrap else label,
            transform=axes.get_yaxis_transform(),
            color=colour(tint),
            fontsize=11.5,
            fontweight="bold" if line == "greedy" else "normal",
            va="center",
            linespacing=1.1,
        )
