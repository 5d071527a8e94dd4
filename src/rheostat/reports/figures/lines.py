"""Accuracy against the parallel budget and against the token budget, one line for each policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup

from rheostat.reports import reading
from rheostat.reports.figures.svg import MARKS, RC, colour, new_figure, quiet, to_svg
from rheostat.reports.reading import Results, count

_LEADER = 1.06  # where the names beside a curve begin, in widths of the plot
_SPACED = 16.0  # pixels that the name of a line takes


def short(name: str, wrap: bool = False, most: int = 25) -> str:
    """A name that fits beside a curve: at most so many characters, of a path the end that tells it from others; on two
    lines if ``wrap``."""
    if len(name) > most:
        name = name.removesuffix("/adapter")
    if len(name) > most:
        name = "…" + name[1 - most :] if "/" in name else name[: most - 1] + "…"
    if wrap and len(name) > 13:
        middle = max(name.rfind(end, 0, 14) for end in (",", " ", "/"))
        first, second = (name[: middle + 1].rstrip(), name[middle + 1 :]) if middle > 0 else (name[:13], name[13:])
        if len(second) > 14:
            second = "…" + second[-13:] if "/" in name else second[:13] + "…"
        return first + "\n" + second
    return name


@dataclass(frozen=True, slots=True)
class _Style:
    colour: str
    width: float
    dash: str | tuple[float, tuple[float, ...]]
    layer: int
    marker: str = ""


_BASELINES = [
    _Style("muted", 1.3, (0, dash), 4)
    for dash in ((3.0, 1.5, 1.0, 1.5), (5.0, 2.0), (1.0, 1.0), (7.0, 1.5, 1.0, 1.5, 1.0, 1.5))
]
_KINDS = {
    "best": _Style("ink", 1.6, "-", 5),
    "mixed": _Style("ink", 1.4, "--", 3),
    "oracle": _Style("muted", 1.4, (0, (1, 2)), 3),
}
_STATIC = _Style("faint", 1.0, "-", 2)


@dataclass(frozen=True, slots=True)
class _Line:
    policy: str
    ys: list[float]
    band: tuple[list[float], list[float]] | None
    style: _Style
    label: str


def _styles(results: Results, kinds: dict[str, str]) -> dict[str, _Style]:
    """How each policy is drawn: adapters differ in colour and marker, the first is thick, baselines in their dashes."""
    found, learned = {}, reading.subjects(results) if reading.learned(results) else []
    baselines = iter(_BASELINES * len(kinds))
    for policy, kind in kinds.items():
        if policy in learned:
            place = learned.index(policy)
            colour, marker, dash = MARKS[place % len(MARKS)]
            found[policy] = _Style(colour, 1.8 if place else 3.0, dash, 6 if place else 7, marker)
        elif kind == "baseline":
            found[policy] = next(baselines)
        else:
            found[policy] = _KINDS.get(kind, _STATIC)
    return found


def curve(results: Results, width: int, name: str = "curve") -> Markup | None:
    """Percent of problems solved against the parallel budget, every policy labelled at the end of its line."""
    xs = reading.budgets(results)
    content = reading.table(results)
    styles = _styles(results, {line.policy: line.kind for line in content.lines})
    lines = []
    for line in content.lines:
        cells = line.cells[: len(xs)]
        ys = _percents([cell.estimate for cell in cells])
        lows, highs = (_percents([getattr(cell, end) for cell in cells]) for end in ("low", "high"))
        band = (lows, highs) if styles[line.policy].layer == 7 and lows and highs else None
        label = f"{line.policy} (unreachable)" if line.kind == "oracle" else line.policy
        if ys:
            lines.append(_Line(line.policy, ys, band, styles[line.policy], label))
    if not lines or len(xs) < 2:  # one budget makes no line
        return None
    spoken = "Line chart: percent of test problems solved against the number of samples."
    labels = ("B, samples drawn per problem", "problems solved, %")
    return _chart(xs, lines, labels, width, name, spoken, reading.single_strategy(results))


def within(results: Results, width: int, name: str = "within") -> Markup | None:
    """Percent of single answers that are right within so many tokens, every policy labelled at the end of its line."""
    rows = reading.without_twin(results, reading.items(results, "within"))
    grids = {tuple(reading.counts(row.get("tokens"))) for row in rows}
    if len(grids) != 1 or len(xs := [int(value) for value in next(iter(grids))]) < 2:
        return None
    kinds = {line.policy: line.kind for line in reading.table(results).lines}
    known = {str(row.get("policy")): row for row in rows}
    styles = _styles(results, {policy: kinds.get(policy, "static") for policy in known})
    shares = {policy: _percents(reading.counts(row.get("accuracy"))) for policy, row in known.items()}
    lines = [_Line(p, ys, None, styles[p], p) for p, ys in shares.items() if len(ys) == len(xs)]
    if not lines:
        return None
    spoken = "Line chart: percent of single answers that are right within so many tokens."
    labels = ("tokens that an answer may take", "answers right by then, %")
    return _chart(xs, lines, labels, width, name, spoken, reading.single_strategy(results))


def _percents(fractions: Sequence[float | None]) -> list[float]:
    """The fractions in percent; empty if one is missing."""
    known = [100 * fraction for fraction in fractions if fraction is not None]
    return known if len(known) == len(fractions) else []


def _chart(
    xs: list[int],
    lines: Sequence[_Line],
    labels: tuple[str, str],
    width: int,
    name: str,
    spoken: str,
    single: str | None,
) -> Markup:
    narrow = width < 500
    with matplotlib.rc_context(RC):
        height = 430 if narrow else 440
        figure = new_figure(width, height)
        left, right, bottom, top = 30, (126 if narrow else 220), 46, 34
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        axes: Any = figure.add_axes(box)
        axes.set_xscale("log", base=2)
        quiet(axes)
        axes.spines["left"].set_visible(False)
        for line in lines:
            _draw(axes, xs, line)
        ticks = xs[:1]
        for x in xs[1:]:
            ticks += [x] if not narrow or x >= 1.9 * ticks[-1] else []
        axes.set_xticks(ticks, [count(x) for x in ticks], minor=False)
        axes.xaxis.minorticks_off()
        axes.set_xlim(xs[0] / 1.08, xs[-1] * 1.04)
        axes.set_xlabel(labels[0], color=colour("muted"), loc="left", labelpad=6)
        figure.text(2 / width, 1 - 12 / height, labels[1], color=colour("muted"), va="center")
        _end_labels(
            axes, _labelled(lines, single, narrow, height - bottom - top), xs[-1], narrow, height - bottom - top
        )
        return to_svg(figure, f"{name}{width}", spoken)


def _labelled(lines: Sequence[_Line], single: str | None, wrap: bool, height: float) -> list[_Line]:
    """The lines whose names have room, of equals the first on top: static strategies stand back but for the best."""
    taken = sum(_SPACED * (short(line.label, wrap).count("\n") + 1) for line in lines)
    kept = [line for line in lines if taken <= height or line.style is not _STATIC or line.policy == single]
    return kept[::-1]


def _draw(axes: Any, xs: list[int], line: _Line) -> None:
    if line.band:
        axes.fill_between(xs, *line.band, color=colour("accent"), alpha=0.16, linewidth=0, zorder=1)
    style, tint = line.style, colour(line.style.colour)
    axes.plot(xs, line.ys, color=tint, linewidth=style.width, linestyle=style.dash, zorder=style.layer)
    if style is not _STATIC:
        size = 6.5 if style.marker else 3.5
        axes.plot(xs, line.ys, style.marker or "o", color=tint, markersize=size, zorder=style.layer)


def _end_labels(axes: Any, lines: Sequence[_Line], x: float, wrap: bool, height: float) -> None:
    """Write each name beside the end of its line, pushed apart until no two overlap, with a thin leader."""
    low, high = axes.get_ylim()
    low, high = max(low, 0.0), max(high, low + 1)
    axes.set_ylim(low, high)
    scale = height / (high - low)  # pixels per unit
    lines = sorted(lines, key=lambda line: line.ys[-1])
    texts = [short(line.label, wrap, 22 if line.style.layer == 7 else 25) for line in lines]
    sizes = [13.0 * (text.count("\n") + 1) + 3 for text in texts]
    places = _push_apart([(line.ys[-1] - low) * scale for line in lines], sizes, height)
    across = axes.get_yaxis_transform()
    for line, text, place in zip(lines, texts, places, strict=True):
        style, level = line.style, low + place / scale
        leader = {"color": colour("rule"), "linewidth": 0.9, "zorder": 1}
        axes.annotate("", (x, line.ys[-1]), (_LEADER, level), textcoords=across, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "shrinkA": 2, "shrinkB": 5, **leader})  # fmt: skip
        if style.marker:
            axes.plot([_LEADER], [level], style.marker, color=colour(style.colour), markersize=5.5, transform=across,
                      clip_on=False)  # fmt: skip
        axes.annotate(
            text,
            (_LEADER, level),
            (7 if style.marker else 0, 0),
            xycoords=across,
            textcoords="offset points",
            annotation_clip=False,
            color=colour("muted" if style is _STATIC else style.colour),
            fontsize=10.5 if style is _STATIC else 11.5,
            fontweight="bold" if style.layer == 7 else "normal",
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
