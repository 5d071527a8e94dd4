"""The figures of the report. Each takes its width in CSS pixels and returns an ``<svg>`` element, or None where the
results lack what it shows. Below 500 pixels the panels and labels are arranged for a phone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.patheffects import withStroke

from rheostat.reports import reading
from rheostat.reports.reading import ADAPTER, PLAIN_ADAPTER, SINGLE, Results, number, points
from rheostat.reports.svg import RC, colour, new_figure, quiet, to_svg

_LEADER = 1.06  # where the names beside a curve begin, in widths of the plot


def short(name: str, wrap: bool = False) -> str:
    """A name that fits beside a curve: at most 30 characters, on two lines if ``wrap``."""
    name = name if len(name) <= 30 else name[:29] + "…"
    if wrap and len(name) > 13:
        middle = max(name.rfind(",", 0, 14), name.rfind(" ", 0, 14))
        if middle > 0:
            return name[: middle + 1].rstrip() + "\n" + name[middle + 1 :]
    return name


@dataclass(frozen=True, slots=True)
class _Style:
    colour: str
    width: float
    dash: str
    layer: int


_STYLES = {
    ADAPTER: _Style("accent", 3.0, "-", 6),
    PLAIN_ADAPTER: _Style("second", 1.8, "-", 5),
    "entropy-only adapter": _Style("second", 1.6, ":", 5),
    "BEST": _Style("ink", 1.6, "-", 4),
    "MIXED": _Style("ink", 1.4, "--", 3),
}
_STATIC = _Style("faint", 1.0, "-", 2)


def curve(results: Results, width: int, name: str = "curve") -> Markup | None:
    """Percent of problems solved against the parallel budget, every policy labelled at the end of its line."""
    xs = reading.budgets(results)
    content = reading.table(results)
    lines = [(line, _percents([cell.estimate for cell in line.cells[: len(xs)]])) for line in content.lines]
    drawn = [(line, ys) for line, ys in lines if ys]
    if not drawn or len(xs) < 2:  # one budget makes no line
        return None
    narrow = width < 500
    with matplotlib.rc_context(RC):
        height = 430 if narrow else 440
        figure = new_figure(width, height)
        left, right, bottom, top = 30, (106 if narrow else 190), 46, 34
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        axes: Any = figure.add_axes(box)
        axes.set_xscale("log", base=2)
        quiet(axes)
        axes.spines["left"].set_visible(False)
        for line, ys in drawn:
            _draw(axes, xs, ys, line)
        axes.set_xticks(xs, [str(x) for x in xs], minor=False)
        axes.xaxis.minorticks_off()
        axes.set_xlim(xs[0] / 1.08, xs[-1] * 1.04)
        axes.set_xlabel("B, samples drawn per problem", color=colour("muted"), loc="left", labelpad=6)
        figure.text(2 / width, 1 - 12 / height, "problems solved, %", color=colour("muted"), va="center")
        ends = [(line.policy, ys[-1]) for line, ys in reversed(drawn)]  # of equals the adapter comes on top
        _end_labels(axes, ends, xs[-1], narrow, height - bottom - top)
        return to_svg(
            figure, f"{name}{width}", "Line chart: percent of test problems solved against the number of samples."
        )


def _percents(fractions: Sequence[float | None]) -> list[float]:
    """The fractions in percent; empty if one is missing."""
    known = [100 * fraction for fraction in fractions if fraction is not None]
    return known if len(known) == len(fractions) else []


def _draw(axes: Any, xs: list[int], ys: list[float], line: reading.Line) -> None:
    """One policy's line; the adapter with budget with the band of its intervals."""
    style = _STYLES.get(line.policy, _STATIC)
    if line.policy == ADAPTER:
        lows = _percents([cell.low for cell in line.cells[: len(xs)]])
        highs = _percents([cell.high for cell in line.cells[: len(xs)]])
        if lows and highs:
            axes.fill_between(xs, lows, highs, color=colour("accent"), alpha=0.16, linewidth=0, zorder=1)
    tint = colour(style.colour)
    axes.plot(xs, ys, color=tint, linewidth=style.width, linestyle=style.dash, zorder=style.layer)
    if style is not _STATIC:
        axes.plot(xs, ys, "o", color=tint, markersize=6.5 if line.policy == ADAPTER else 3.5, zorder=style.layer)


def _end_labels(axes: Any, ends: list[tuple[str, float]], x: float, wrap: bool, height: float) -> None:
    """Write each name beside the end of its line, pushed apart until no two overlap, with a thin leader."""
    low, high = axes.get_ylim()
    low, high = max(low, 0.0), max(high, low + 1)
    axes.set_ylim(low, high)
    scale = height / (high - low)  # pixels per unit
    ends = sorted(ends, key=lambda end: end[1])
    texts = [short(name, wrap) for name, _ in ends]
    sizes = [13.0 * (text.count("\n") + 1) + 3 for text in texts]
    places = _push_apart([(y - low) * scale for _, y in ends], sizes, height)
    across = axes.get_yaxis_transform()
    for (name, y), text, place in zip(ends, texts, places, strict=True):
        style = _STYLES.get(name)
        level = low + place / scale
        leader = {"color": colour("rule"), "linewidth": 0.9, "zorder": 1}
        axes.annotate("", (x, y), (_LEADER, level), textcoords=across, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "shrinkA": 2, "shrinkB": 5, **leader})  # fmt: skip
        axes.text(
            _LEADER,
            level,
            text,
            transform=across,
            color=colour(style.colour if style else "muted"),
            fontsize=11.5 if style else 10.5,
            fontweight="bold" if name == ADAPTER else "normal",
            va="center",
            linespacing=1.1,
        )


def _push_apart(places: list[float], sizes: list[float], height: float) -> list[float]:
    """Move sorted centres until boxes of these sizes no longer overlap, within the height if they fit."""
    places = list(places)
    for _ in range(500):
        for below in range(len(places) - 1):
            gap = (sizes[below] + sizes[below + 1]) / 2 - (places[below + 1] - places[below])
            if gap > 0:
                places[below] -= gap / 2
                places[below + 1] += gap / 2
        places[0] = max(places[0], 0.0)
        places[-1] = min(places[-1], height)
    return places


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
    return f"{short(single)}, best single" if baseline == SINGLE and single else short(baseline)


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


def training(results: Results, policy: str, width: int, name: str = "training") -> Markup | None:
    """Action probabilities over training, one panel per budget, with the validation reward (Figure 2 of the paper)."""
    names = reading.strategies(results)
    run = reading.mapping(reading.mapping(results, "training"), policy)
    history = reading.items(run, "history")
    rewards = _column(history, "validation_reward")
    budgets = [str(budget) for budget in reading.budgets(results)]
    shares = {budget: _shares(history, budget, len(names)) for budget in budgets}
    panels = [Panel(f"B = {budget}", own, rewards) for budget, own in shares.items() if own]
    if policy == PLAIN_ADAPTER and panels and all(panel.shares == panels[0].shares for panel in panels):
        panels = [Panel("any B", panels[0].shares, rewards)]  # it does not see B
    label = f"Stacked areas: how often the {policy} chooses each strategy, epoch by epoch."
    return shares_over_time(panels, names, number(run.get("kept_epoch")), "epoch", 4, width, name, label)


@dataclass(frozen=True, slots=True)
class Panel:
    """Pairs (time, distribution over the strategies) and pairs (time, validation reward)."""

    title: str
    shares: list[tuple[float, list[float]]]
    rewards: list[tuple[float, float]]


def shares_over_time(
    panels: Sequence[Panel],
    names: Sequence[str],
    kept: float | None,
    unit: str,
    most: int,
    width: int,
    name: str,
    label: str,
) -> Markup | None:
    """Stacked shares, at most ``most`` panels in a row, and the validation reward on a right axis; None if empty."""
    if not panels:
        return None
    across = min(len(panels), most if width >= 500 else 2 if most == 4 else 1)
    down = -(-len(panels) // across)
    with matplotlib.rc_context(RC):
        height = 176.0 * down + 60
        figure = new_figure(width, height)
        grid: Any = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=34 / width, right=1 - 36 / width, bottom=44 / height, top=1 - 44 / height, wspace=0.14, hspace=0.3
        )
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_visible(False)
                continue
            _stack(axes, panels[index].shares, reading.by_randomness(names))
            axes.set_title(panels[index].title, color=colour("ink"), fontsize=12, pad=6)
            edge = index % across == across - 1 or index == len(panels) - 1
            _reward(axes, panels, index, kept, edge)
        times = [time for panel in panels for time, _ in [*panel.shares, *panel.rewards]]
        if min(times) < max(times):
            grid[0, 0].set_xlim(min(times), max(times))
        figure.text(2 / width, 1 - 10 / height, "share of choices, %", color=colour("muted"), fontsize=11, va="center")
        if any(panel.rewards for panel in panels):
            corner = (1 - 2 / width, 1 - 10 / height)
            figure.text(*corner, "validation reward, %", color=colour("ink"), fontsize=11, va="center", ha="right")
        grid[-1, 0].set_xlabel(unit, color=colour("muted"), loc="left", labelpad=4)
        return to_svg(figure, f"{name}{width}", label)


def _column(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """The pairs (epoch, value) of the epochs that have the value."""
    return [
        (e, v) for r in history if (e := number(r.get("epoch"))) is not None and (v := number(r.get(key))) is not None
    ]


def _shares(history: Sequence[Mapping[str, Any]], budget: str, size: int) -> list[tuple[float, list[float]]]:
    """The pairs (epoch, distribution) of one budget."""
    found = [
        (number(row.get("epoch")), reading.probabilities(reading.mapping(row, "action_probability").get(budget), size))
        for row in history
    ]
    return [(epoch, shares) for epoch, shares in found if epoch is not None and shares is not None]


def _stack(axes: Any, panel: list[tuple[float, list[float]]], order: list[int]) -> None:
    epochs = [epoch for epoch, _ in panel]
    layers = [[100 * shares[index] for _, shares in panel] for index in order]
    if len(epochs) == 1:  # an area needs two ends
        epochs, layers = [epochs[0] - 0.5, epochs[0] + 0.5], [layer * 2 for layer in layers]
    tints = [colour(f"s{place}") for place in range(len(order))]
    axes.stackplot(epochs, layers, colors=tints, edgecolor=colour("paper"), linewidth=0.7)
    quiet(axes, "")
    axes.set_xlim(epochs[0], epochs[-1])
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100])
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=4)


def _reward(axes: Any, panels: Sequence[Panel], index: int, kept: float | None, edge: bool) -> None:
    """The validation reward on the right axis, the same for all panels; a dotted line where the kept policy stands."""
    if kept is not None:
        axes.axvline(kept, color=colour("ink"), linewidth=1.2, linestyle=(0, (1, 2)))
    right = axes.twinx()
    quiet(right, "")
    for side in right.spines.values():
        side.set_visible(False)
    values = [100 * value for panel in panels for _, value in panel.rewards]
    if values:
        room = max(0.15 * (max(values) - min(values)), 0.5)
        right.set_ylim(max(min(values) - room, 0), max(values) + room)
        right.yaxis.get_major_locator().set_params(nbins=4)
    if panels[index].rewards:
        casing = [withStroke(linewidth=4.2, foreground=colour("paper"))]
        epochs, rewards = zip(*panels[index].rewards, strict=True)
        style = "o-" if len(epochs) < 16 else "-"
        percents = [100 * reward for reward in rewards]
        right.plot(
            epochs,
            percents,
            style,
            color=colour("ink"),
            linewidth=1.8,
            markersize=3,
            path_effects=casing,
            clip_on=False,
        )
    right.tick_params(labelright=edge and bool(values), colors=colour("ink"))
