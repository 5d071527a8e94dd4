"""Paired differences with their intervals, as a forest plot."""

from collections.abc import Mapping
from typing import Any

import matplotlib
from markupsafe import Markup

from rheostat.reports import reading
from rheostat.reports.figures.lines import short
from rheostat.reports.figures.svg import RC, colour, new_figure, quiet, to_svg
from rheostat.reports.reading import SINGLE, Results, number, points


def forest(results: Results, width: int, name: str = "forest") -> Markup | None:
    """Paired differences of the adapter, one panel per baseline; filled where zero is excluded."""
    adapter = reading.judged(results)
    rows = [row for row in reading.items(results, "differences") if row.get("policy") == adapter]
    rows = [row for row in rows if all(number(row.get(name)) is not None for name in ("estimate", "low", "high"))]
    baselines = list(dict.fromkeys(str(row.get("baseline")) for row in rows))
    order: list[int | str] = [*reading.budgets(results), "mean"]
    rows = [row for row in rows if row.get("k") in order]
    if not rows:
        return None
    narrow = width < 500
    across = 1 if narrow else min(3, len(baselines))
    down = -(-len(baselines) // across)
    with matplotlib.rc_context(RC):
        height = 34.0 * len(order) * down + 44 * down + 46
        figure = new_figure(width, height)
        grid: Any = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=54 / width, right=1 - 10 / width, bottom=44 / height, top=1 - 34 / height, wspace=0.08, hspace=0.28
        )
        for index, axes in enumerate(grid.flat):
            if index >= len(baselines):
                axes.set_visible(False)
                continue
            baseline = baselines[index]
            quiet(axes, "x")
            axes.spines["left"].set_visible(False)
            axes.axvline(0, color=colour("muted"), linewidth=1.2, zorder=2)
            axes.set_title(f"minus {_baseline(results, baseline)}", color=colour("ink"), fontsize=12, pad=10)
            for row in rows:
                if str(row.get("baseline")) == baseline:
                    _interval(axes, order.index(row["k"]), row)
            axes.set_yticks(range(len(order)), ["mean" if k == "mean" else f"B = {k}" for k in order])
            axes.set_ylim(len(order) - 0.4, -0.6)
        ends = [100 * float(row[name]) for row in rows for name in ("low", "high")]
        room = 0.05 * (max(ends) - min(ends)) + 0.3
        grid[0, 0].set_xlim(min(*ends, 0) - room, max(*ends, 0) + room)
        grid[0, 0].xaxis.get_major_locator().set_params(nbins=5)
        grid[-1, 0].set_xlabel("percentage points", color=colour("muted"), loc="left", labelpad=6)
        return to_svg(figure, f"{name}{width}", "Forest plot: paired differences of the adapter with 95 % intervals.")


def _baseline(results: Results, baseline: str) -> str:
    single = reading.single_strategy(results)
    return "best single strategy" if baseline == SINGLE and single else short(baseline, most=24)


def _interval(axes: Any, place: int, row: Mapping[str, Any]) -> None:
    estimate, low, high = (100 * float(row[name]) for name in ("estimate", "low", "high"))
    clear = low > 0 or high < 0
    tint = colour("muted" if not clear else "accent" if low > 0 else "second")
    axes.plot([low, high], [place, place], color=tint, linewidth=2.2, solid_capstyle="round", zorder=3)
    face = tint if clear else colour("paper")
    size = 8.5 if row["k"] == "mean" else 6.5
    shape = "D" if row["k"] == "mean" else "o"
    axes.plot(
        [estimate], [place], shape, color=face, markeredgecolor=tint, markeredgewidth=1.6, markersize=size, zorder=4
    )
    text = points(row["estimate"], reading.digits_for([row["estimate"]]))
    label = axes.annotate(text, (estimate, place), (0, 9), textcoords="offset points", ha="center", fontsize=10.5)
    label.set(color=tint, bbox={"facecolor": colour("paper"), "edgecolor": "none", "pad": 0.5})
