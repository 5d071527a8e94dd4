"""Paired differences with their intervals, as a forest plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.lines import Line2D

from rheostat.reports import reading
from rheostat.reports.figures.lines import short
from rheostat.reports.figures.svg import MARKS, RC, colour, new_figure, quiet, to_svg
from rheostat.reports.reading import SINGLE, Results, number, points

_FEW = 3  # adapters whose differences are shown at every budget; of more, those of the mean


def forest(results: Results, width: int, name: str = "forest") -> Markup | None:
    """Paired differences of everyone whom the page is about, one panel per baseline; filled where zero is excluded.

    Several are told apart by colour and marker, which a legend on top explains.
    """
    rows = [row for row in reading.items(results, "differences") if row.get("policy") in reading.subjects(results)]
    rows = [row for row in rows if all(number(row.get(name)) is not None for name in ("estimate", "low", "high"))]
    shown = [policy for policy in reading.subjects(results) if any(row["policy"] == policy for row in rows)]
    order: list[int | str] = [*reading.budgets(results), "mean"] if len(shown) <= _FEW else ["mean"]
    rows = [row for row in rows if row.get("k") in order]
    if not rows:
        return None
    baselines = list(dict.fromkeys(str(row.get("baseline")) for row in rows))
    narrow = width < 500
    across = 1 if narrow else min(3, len(baselines))
    down = -(-len(baselines) // across)
    places, tall = _places(order, shown)
    legend = _Legend.of(shown, width)
    with matplotlib.rc_context(RC):
        height = tall * down + 44 * down + 46 + legend.height
        figure = new_figure(width, height)
        grid: Any = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        left, top = (54 if len(order) > 1 else 12), 34 + legend.height
        figure.subplots_adjust(
            left=left / width,
            right=1 - 10 / width,
            bottom=44 / height,
            top=1 - top / height,
            wspace=0.08,
            hspace=44 / tall,
        )
        legend.draw(figure, width, height)
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
                    mark = MARKS[shown.index(row["policy"]) % len(MARKS)] if len(shown) > 1 else None
                    _interval(axes, places[row["k"], row["policy"]], row, mark)
            middles = [sum(places[k, policy] for policy in shown) / len(shown) for k in order]
            names = ["mean" if k == "mean" else f"B = {k}" for k in order] if len(order) > 1 else [""]
            axes.set_yticks(middles, names)
            axes.set_ylim(tall / _ROW - 0.4, -0.6)
        ends = [100 * float(row[name]) for row in rows for name in ("low", "high")]
        room = 0.05 * (max(ends) - min(ends)) + 0.3
        grid[0, 0].set_xlim(min(*ends, 0) - room, max(*ends, 0) + room)
        grid[0, 0].xaxis.get_major_locator().set_params(nbins=5)
        mean = ", mean over the budgets" if len(order) == 1 else ""
        grid[-1, 0].set_xlabel(f"percentage points{mean}", color=colour("muted"), loc="left", labelpad=6)
        return to_svg(figure, f"{name}{width}", "Forest plot: paired differences with 95 % intervals.")


_ROW = 34.0  # pixels from one interval to the next, where each stands alone


def _places(order: Sequence[int | str], shown: Sequence[str]) -> tuple[dict[tuple[int | str, str], float], float]:
    """Where each interval lies, in rows from the top, those of one budget close together; and the height in pixels."""
    step = 1.0 if len(shown) == 1 or len(order) == 1 else 0.68
    group = step * len(shown) + (0.5 if len(shown) > 1 and len(order) > 1 else 0.0)
    found = {(k, policy): group * g + step * n for g, k in enumerate(order) for n, policy in enumerate(shown)}
    return found, _ROW * max(group * len(order), 1.0)


@dataclass(frozen=True, slots=True)
class _Legend:
    """Marker and name of each of several, in columns on top of the drawing."""

    names: Sequence[str]
    columns: int

    @classmethod
    def of(cls, names: Sequence[str], width: int) -> "_Legend":
        return cls(names if len(names) > 1 else (), 1 if width < 500 else 3)

    @property
    def height(self) -> float:
        return 18.0 * -(-len(self.names) // self.columns) + (12 if self.names else 0)

    def draw(self, figure: Any, width: int, height: float) -> None:
        for index, name in enumerate(self.names):
            tint, marker, _ = MARKS[index % len(MARKS)]
            x, y = 14 + (width - 16) / self.columns * (index % self.columns), height - 10 - 18 * (index // self.columns)
            mark = Line2D([x / width], [y / height], marker=marker, color=colour(tint), markersize=6.5)
            figure.add_artist(mark)
            text = short(name, most=30)
            figure.text((x + 10) / width, y / height, text, color=colour(tint), fontsize=11.5, va="center")


def _baseline(results: Results, baseline: str) -> str:
    single = reading.single_strategy(results)
    return "best single strategy" if baseline == SINGLE and single else short(baseline, most=24)


def _interval(axes: Any, place: float, row: Mapping[str, Any], mark: tuple[str, str, Any] | None) -> None:
    """One estimate with its interval; of several in the colour and with the marker of its own."""
    estimate, low, high = (100 * float(row[name]) for name in ("estimate", "low", "high"))
    clear, is_mean = low > 0 or high < 0, row["k"] == "mean"
    name, shape = ("muted" if not clear else "accent" if low > 0 else "second"), ("D" if is_mean else "o")
    if mark is not None:
        name, shape, _ = mark
    tint = colour(name)
    axes.plot([low, high], [place, place], color=tint, linewidth=2.2, solid_capstyle="round", zorder=3)
    face = tint if clear else colour("paper")
    size = 8.5 if is_mean and mark is None else 6.5
    axes.plot(
        [estimate], [place], shape, color=face, markeredgecolor=tint, markeredgewidth=1.6, markersize=size, zorder=4
    )
    text = points(row["estimate"], reading.digits_for([row["estimate"]]))
    label = axes.annotate(text, (estimate, place), (0, 9), textcoords="offset points", ha="center", fontsize=10.5)
    label.set(color=tint, bbox={"facecolor": colour("paper"), "edgecolor": "none", "pad": 0.5})
