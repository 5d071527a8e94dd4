"""Which actions a policy takes while it trains, and its validation reward (Figures 2, 7 and 8 of the paper)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.patheffects import withStroke

from rheostat.reports import reading
from rheostat.reports.figures.svg import RC, colour, new_figure, quiet, to_svg
from rheostat.reports.reading import PLAIN_ADAPTER, Results, number

_STYLES = {  # of a prompt: the keys of the metrics lines, and the panel's title
    "chain of thought": ("actions_cot", "reward_cot"),
    "answer only": ("actions_direct", "reward_direct"),
    "all prompts": ("actions", "reward"),
}


def names_of(results: Results, policy: str, is_token: bool) -> list[str]:
    """What a policy chose from while it trained: its own list where that is known, else that of the results."""
    own = reading.mapping(reading.mapping(results, "training"), policy).get("strategies")
    shared = reading.actions(results) if is_token else reading.strategies(results)
    return [str(name) for name in own] if own else shared


def sequence_training(results: Results, policy: str, width: int, name: str = "training") -> Markup | None:
    """Action probabilities over training, one panel per budget, with the validation reward (Figure 2 of the paper)."""
    names = names_of(results, policy, is_token=False)
    run = reading.mapping(reading.mapping(results, "training"), policy)
    history = reading.items(run, "history")
    rewards = _column(history, "validation_reward")
    known = {str(budget) for row in history for budget in reading.mapping(row, "action_probability")}
    budgets = sorted(known, key=lambda budget: (len(budget), budget))
    shares = {budget: _shares(history, budget, len(names)) for budget in budgets}
    panels = [Panel(f"B = {budget}", own, rewards) for budget, own in shares.items() if own]
    if policy == PLAIN_ADAPTER and panels and all(panel.shares == panels[0].shares for panel in panels):
        panels = [Panel("any B", panels[0].shares, rewards)]  # it does not see B
    label = f"Stacked areas: how often the {policy} chooses each strategy, epoch by epoch."
    return shares_over_time(panels, names, number(run.get("kept_epoch")), "epoch", 4, width, name, label)


def token_training(results: Results, policy: str, width: int, name: str) -> Markup | None:
    """Shares of the actions in each batch with the validation reward, by prompt style and overall (Figure 8)."""
    names = names_of(results, policy, is_token=True)
    run = reading.mapping(reading.mapping(results, "training"), policy)
    lines = [line for line in reading.items(run, "history") if number(line.get("step")) is not None]
    panels = [
        Panel(title, shares, _rewards(lines, reward))
        for title, (key, reward) in _STYLES.items()
        if (shares := _token_shares(lines, key, len(names)))
    ]
    label = f"Stacked areas: how often the {policy} takes each action, batch by batch."
    return shares_over_time(panels, names, number(run.get("kept_step")), "batch", 3, width, name, label)


_CURVES = {"validation_loss": "validation loss, nats", "temperature": "mean temperature", "top_p": "mean top-p"}


def autodeco_training(results: Results, policy: str, width: int, name: str) -> Markup | None:
    """The loss of AutoDeco's heads on validation, and the temperature and top-p that they give, epoch by epoch."""
    run = reading.mapping(reading.mapping(results, "training"), policy)
    history, kept = reading.items(run, "history"), number(run.get("kept_epoch"))
    curves = {title: found for key, title in _CURVES.items() if (found := _column(history, key))}
    if not curves:
        return None
    across = 1 if width < 500 else len(curves)
    down = -(-len(curves) // across)
    with matplotlib.rc_context(RC):
        height = 150.0 * down + 60
        figure = new_figure(width, height)
        grid: Any = figure.subplots(down, across, sharex=True, squeeze=False)
        figure.subplots_adjust(
            left=46 / width, right=1 - 14 / width, bottom=44 / height, top=1 - 30 / height, wspace=0.3, hspace=0.4
        )
        for axes, (title, points) in zip(grid.flat, curves.items(), strict=True):
            quiet(axes)
            axes.set_title(title, color=colour("ink"), fontsize=12, pad=6)
            if kept is not None:
                axes.axvline(kept, color=colour("ink"), linewidth=1.2, linestyle=(0, (1, 2)))
            style = "o-" if len(points) < 16 else "-"
            axes.plot(*zip(*points, strict=True), style, color=colour("accent"), linewidth=2, markersize=4)
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            axes.yaxis.get_major_locator().set_params(nbins=4)
            axes.ticklabel_format(axis="y", useOffset=False)
        grid[-1, 0].set_xlabel("epoch", color=colour("muted"), loc="left", labelpad=4)
        return to_svg(figure, f"{name}{width}", "Line charts: validation loss, temperature and top-p, epoch by epoch.")


def _token_shares(lines: Sequence[Mapping[str, Any]], key: str, size: int) -> list[tuple[float, list[float]]]:
    found = [(float(line["step"]), reading.probabilities(line.get(key), size)) for line in lines]
    return [(step, shares) for step, shares in found if shares is not None]


def _rewards(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    found = [(float(line["step"]), number(reading.mapping(line, "validation").get(key))) for line in lines]
    return [(step, reward) for step, reward in found if reward is not None]


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
