"""What a token policy does: entropies, lengths, and the tokens of each action (Figures 3, 4 and 5 of the paper)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
from markupsafe import Markup

from rheostat.reports import reading
from rheostat.reports.figures.lines import short
from rheostat.reports.figures.svg import RC, colour, new_figure, quiet, to_svg
from rheostat.reports.reading import Results, number
from rheostat.reports.trace import visible

_BARS = 24  # of a histogram of lengths, at most


def entropy(results: Results, width: int, name: str) -> Markup | None:
    """Tokens by entropy: static against adapted decoding, and the shares of the actions (Figure 3)."""
    content = reading.mapping(results, "entropy")
    edges = reading.counts(content.get("edges"))
    size = len(edges) - 1
    sides = [
        (str(side.get("policy")), counts)
        for side in (reading.mapping(content, key) for key in ("static", "adapted"))
        if len(counts := reading.counts(side.get("counts"))) == size and sum(counts) > 0
    ]
    by_action = [reading.counts(row) for row in content.get("by_action") or ()]
    names = reading.actions(results)
    is_split = len(by_action) == len(names) > 0 and all(len(row) == size for row in by_action)
    panels: list[Callable[[Any], None]] = []
    if sides:
        panels.append(partial(_sides, sides=sides))
    if is_split:
        panels.append(partial(_actions, by_action=by_action, order=reading.by_randomness(names)))
    if size < 1 or not panels:
        return None
    across = 1 if width < 500 else len(panels)
    down = -(-len(panels) // across)
    with matplotlib.rc_context(RC):
        height = 226.0 * down + 40
        figure = new_figure(width, height)
        grid: Any = figure.subplots(down, across, squeeze=False)
        figure.subplots_adjust(
            left=34 / width, right=1 - 14 / width, bottom=44 / height, top=1 - 30 / height, wspace=0.16, hspace=0.42
        )
        for axes, draw in zip(grid.flat, panels, strict=True):
            quiet(axes)
            draw(axes)
            every = -(-len(edges) // 11)
            ticks = range(0, len(edges), every)
            axes.set_xticks([tick - 0.5 for tick in ticks], [f"{edges[tick]:.2g}" for tick in ticks])
            axes.set_xlim(-0.5, size - 0.5)
            axes.set_xlabel("entropy of the next token, nats", color=colour("muted"), loc="left", labelpad=4)
        return to_svg(figure, f"{name}{width}", "Bars: how many tokens have which entropy, and which actions they get.")


def _sides(axes: Any, sides: Sequence[tuple[str, list[float]]]) -> None:
    """Bars side by side, in percent of each side's tokens."""
    axes.set_title("share of tokens, %", color=colour("muted"), fontsize=11, pad=9)
    wide = 0.8 / len(sides)
    for index, (policy, counts) in enumerate(sides):
        places = [place - 0.4 + wide * (index + 0.5) for place in range(len(counts))]
        tint = colour("accent" if index == len(sides) - 1 else "faint")
        axes.bar(places, [100 * n / sum(counts) for n in counts], wide, color=tint, label=short(policy))
    axes.legend(frameon=False, labelcolor=colour("ink"), fontsize=11, handlelength=0.9, handleheight=0.9, loc="best")


def _actions(axes: Any, by_action: Sequence[Sequence[float]], order: Sequence[int]) -> None:
    """Bars of 100 %: which actions the tokens of each bucket got; an empty bucket stays empty."""
    axes.set_title("actions taken, %", color=colour("muted"), fontsize=11, pad=9)
    totals = [sum(column) for column in zip(*by_action, strict=True)]
    floor = [0.0] * len(totals)
    for place, action in enumerate(order):
        shares = [100 * n / total if total else 0.0 for n, total in zip(by_action[action], totals, strict=True)]
        tint = {"color": colour(f"s{place}"), "edgecolor": colour("paper"), "linewidth": 0.6}
        axes.bar(range(len(totals)), shares, 0.86, bottom=floor, **tint)
        floor = [low + share for low, share in zip(floor, shares, strict=True)]
    axes.set_ylim(0, 100)
    axes.set_yticks([0, 50, 100])


def lengths(results: Results, width: int, name: str) -> Markup | None:
    """Histograms of the number of tokens of a completion, one panel per policy (Figure 4)."""
    found = {
        str(policy): counts
        for policy, value in reading.mapping(results, "lengths").items()
        if sum(counts := reading.counts(value)) > 0
    }
    statics = reading.strategies(results)
    adapters = [policy for policy in found if policy not in statics]
    ordered = adapters + [statics[i] for i in reading.by_randomness(statics) if statics[i] in found]
    if not ordered:
        return None
    most = max(map(len, found.values())) - 1
    step = max(1, -(-(most + 1) // _BARS))
    across = min(len(ordered), 2 if width < 500 else 3)
    down = -(-len(ordered) // across)
    with matplotlib.rc_context(RC):
        height = 124.0 * down + 66
        figure = new_figure(width, height)
        grid: Any = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=30 / width, right=1 - 8 / width, bottom=44 / height, top=1 - 52 / height, wspace=0.12, hspace=0.5
        )
        for index, axes in enumerate(grid.flat):
            if index >= len(ordered):
                axes.set_visible(False)
                continue
            policy = ordered[index]
            counts = found[policy]
            shares = [100 * sum(counts[start : start + step]) / sum(counts) for start in range(0, most + 1, step)]
            quiet(axes)
            tint = colour("accent" if policy in adapters else "faint")
            starts = [start - 0.5 for start in range(0, most + 1, step)]
            axes.bar(starts, shares, 0.92 * step, align="edge", color=tint)
            mean = mean_length(counts)
            axes.axvline(mean, color=colour("ink"), linewidth=1.2, linestyle=(0, (1, 2)))
            axes.set_title(short(policy), color=colour("ink"), fontsize=11.5, pad=17 if width < 500 else 6)
            spot = {"ha": "left", "x": 0, "y": 1.04} if width < 500 else {"ha": "right", "x": 1, "y": 1.06}
            axes.text(s=f"mean {mean:.1f}", transform=axes.transAxes, color=colour("muted"), fontsize=10.5, **spot)
            axes.set_xlim(-0.5, starts[-1] + step)
            axes.tick_params(labelbottom=index + across >= len(ordered))
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=4)
        grid[0, 0].yaxis.get_major_locator().set_params(nbins=3)
        grid[0, 0].set_ylim(bottom=0)
        figure.text(2 / width, 1 - 10 / height, "share of answers, %", color=colour("muted"), fontsize=11, va="center")
        grid[-1, 0].set_xlabel("tokens in the answer", color=colour("muted"), loc="left", labelpad=4)
        return to_svg(figure, f"{name}{width}", "Histograms: how many tokens the answers of each policy have.")


def mean_length(counts: Sequence[float]) -> float:
    """The mean of a histogram whose bar ``i`` counts answers of ``i`` tokens."""
    return sum(length * n for length, n in enumerate(counts)) / sum(counts)


def frequent(results: Results, width: int, name: str) -> Markup | None:
    """The tokens that each action drew most often, one panel per action (Figure 5)."""
    content = reading.mapping(results, "frequent_tokens")
    names = [name for name in reading.actions(results) if name in content]
    found = [_counted(content[name]) for name in names]
    if not any(found):
        return None
    order = reading.by_randomness(names)
    most = max(map(len, found))
    across = min(len(names), 2 if width < 500 else 4)
    down = -(-len(names) // across)
    with matplotlib.rc_context(RC):
        height = (17.0 * most + 52) * down + 36
        figure = new_figure(width, height)
        grid: Any = figure.subplots(down, across, squeeze=False)
        figure.subplots_adjust(
            left=82 / width, right=1 - 26 / width, bottom=8 / height, top=1 - 62 / height, wspace=0.95, hspace=0.3
        )
        figure.text(
            2 / width,
            1 - 10 / height,
            "share of the action's tokens, %",
            color=colour("muted"),
            fontsize=11,
            va="center",
        )
        for index, axes in enumerate(grid.flat):
            if index >= len(names):
                axes.set_visible(False)
                continue
            _most_frequent(axes, found[order[index]], most, names[order[index]], f"s{index}")
        return to_svg(figure, f"{name}{width}", "Bars: the tokens that each action drew most often.")


def _counted(row: object) -> list[tuple[str, float]]:
    """Pairs of a token and its share of what was drawn, in percent, as results hold them."""
    pairs = [pair for pair in row if isinstance(pair, Sequence) and len(pair) == 2] if isinstance(row, Sequence) else []
    return [(visible(text), 100 * share) for text, n in pairs if (share := number(n)) is not None]


def _most_frequent(axes: Any, tokens: Sequence[tuple[str, float]], most: int, title: str, tint: str) -> None:
    axes.barh(range(len(tokens)), [share for _, share in tokens], 0.72, color=colour(tint))
    quiet(axes, "")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks([])
    labels = [text.replace("\n", "")[:9] + ("…" if len(text) > 10 else "") for text, _ in tokens]
    axes.set_yticks(range(len(tokens)), labels)
    axes.tick_params(axis="y", labelcolor=colour("ink"))
    axes.set_ylim(most - 0.4, -0.6)
    for place, (_, share) in enumerate(tokens):
        text = f"{share:.0f}" if share >= 1 else f"{share:.1g}"
        style = {"va": "center", "fontsize": 9.5, "color": colour("muted")}
        axes.annotate(text, (share, place), (4, 0), textcoords="offset points", **style)
    if not tokens:
        axes.text(-0.55, 1, "not taken", transform=axes.transAxes, color=colour("muted"), fontsize=9.5, va="top")
    axes.set_title(short(title), color=colour("ink"), fontsize=11.5, pad=6, x=-0.55)
