"""What the page says of one level: the sequence level (one strategy per prompt) or the token level (one at every
token). Both have the same keys; each has a few of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rheostat.reports import facts, grids, reading
from rheostat.reports.figures import forest, lines, token, training
from rheostat.reports.figures.svg import Drawing
from rheostat.reports.grids import Grid
from rheostat.reports.headline import Headline, headline
from rheostat.reports.reading import Results, count, number, percent, points
from rheostat.reports.trace import view

ORDERS = {"vllm": "temperature, min-p, top-k, top-p", "transformers": "temperature, top-k, top-p, min-p"}
_GROUPS = {  # key of the results: (field of a row, what one of them is called, heading)
    "by_style": ("style", "prompt style", "By prompt style"),
    "by_member": ("member", "kind of problem", "The adapter and BEST, by kind of problem"),
    "by_level": ("level", "level", "The adapter and BEST, by level of difficulty"),
    "by_subject": ("subject", "subject", "The adapter and BEST, by subject"),
}
_STYLES = {"thinking": "thinking first", "cot": "with a chain of thought", "direct": "answer only"}
_HEADINGS = {
    "compared": "What was compared",
    "curve": "Accuracy against parallel budget",
    "forest": "The adapter minus its rivals, problem by problem",
    "table": "Every policy, every budget",
    "majority": "The most frequent answer",
    "within": "Accuracy against token budget",
    "costs": "What it costs",
    "tuned": "How the baselines were tuned",
    "training": "How the policy took shape",
    "choices": "What it chooses, by kind of problem",
    **{key: heading for key, (_, _, heading) in _GROUPS.items()},
    "entropy": "Where it acts: entropy and position",
    "frequent": "Which tokens it draws with which action",
    "lengths": "How long the answers are",
    "traces": "Two answers, token by token",
}


@dataclass(frozen=True, slots=True)
class Level:
    """One level as the template takes it; what the results lack is None or empty. ``prefix`` begins its ids."""

    prefix: str
    is_token: bool
    headline: Headline
    model: str
    task: str
    who: str
    policies: tuple[str, ...]
    baselines: list[str]
    has_oracle: bool
    budgets: list[int]
    order_words: str
    palette: int
    legend: list[str]
    action_palette: int
    action_legend: list[str]
    single: str | None
    key_numbers: list[tuple[str, str, str]]
    compared: bool
    curve: Drawing | None
    forest: Drawing | None
    differences: Grid
    table: reading.Table | None
    columns: tuple[int | str, ...]
    majority: "Majority | None"
    within: Drawing | None
    areas: Grid
    costs: grids.Costs
    tuned: Grid
    training: list[dict[str, Any]]
    choices: list[dict[str, Any]]
    groups: dict[str, list[dict[str, Any]]]
    entropy: Drawing | None
    entropy_table: list[tuple[str, list[str]]]
    entropy_columns: list[str]
    grid: dict[str, Any] | None
    frequent: Drawing | None
    no_frequent: str
    lengths: Drawing | None
    traces: list[dict[str, Any]]
    measured: facts.Facts
    seconds: list[tuple[str, str, float]]
    sampled: Grid

    @property
    def headings(self) -> dict[str, str]:
        """Of the sections that have something to show, in their order."""
        own = dict(_HEADINGS)
        if len(self.traces) != 2:
            own["traces"] = "Answers, token by token" if len(self.traces) > 1 else "An answer, token by token"
        shown = {key: bool(self.groups.get(key)) if key in _GROUPS else bool(getattr(self, key)) for key in own}
        shown["frequent"] |= bool(self.no_frequent)
        return {key: heading for key, heading in own.items() if shown[key]}

    @property
    def drawings(self) -> list[Drawing]:
        """All figures, in the order of the page."""
        first, last = (self.curve, self.forest, self.within), (self.entropy, self.frequent, self.lengths)
        found = [*first, *(part["figure"] for part in self.training), *last]
        return [drawing for drawing in found if drawing is not None]

    def what(self, key: str) -> str:
        """What one group of ``by_member``, ``by_style``, … is called."""
        return _GROUPS[key][1]


@dataclass(frozen=True, slots=True)
class Majority:
    """maj@k: the table of all policies, and the paired differences."""

    table: reading.Table
    differences: Grid


def level(results: Results, prefix: str = "") -> Level:
    """One level of the results of a run; its ids begin with ``prefix``."""
    is_token = reading.is_token(results)
    prefix = prefix + ("token-" if is_token else "")
    names, actions = reading.strategies(results), reading.actions(results)
    table = reading.table(results)

    legend, action_legend = ([own[index] for index in reading.by_randomness(own)] for own in (names, actions))

    def draw(what: Any, name: str, strategies: Sequence[str] = legend) -> Drawing | None:
        return Drawing.of(lambda width, name: what(results, width, name), prefix + name, strategies)

    columns, rows = _entropy_table(results)
    frequent = draw(token.frequent, "frequent-tokens", action_legend) if is_token else None
    return Level(
        prefix=prefix,
        is_token=is_token,
        headline=headline(results),
        model=str(reading.mapping(results, "model").get("model") or "the model"),
        task=str(results.get("task") or "the task"),
        who=reading.the(reading.judged(results)),
        policies=tuple(line.policy for line in table.lines),
        baselines=[line.policy for line in table.lines if line.kind == "baseline"],
        has_oracle=any(line.kind == "oracle" for line in table.lines),
        budgets=reading.budgets(results),
        order_words=ORDERS.get(str(results.get("order")), str(results.get("order"))),
        palette=len(names),
        legend=legend,
        action_palette=len(actions),
        action_legend=action_legend,
        single=reading.single_strategy(results),
        key_numbers=_key_numbers(results),
        compared=bool(table.lines) or not is_token,
        curve=draw(lines.curve, "curve"),
        forest=draw(forest.forest, "forest"),
        differences=grids.differences(reading.items(results, "differences")),
        table=table if table.lines else None,
        columns=table.columns,
        majority=_majority(results),
        within=draw(lines.within, "within"),
        areas=grids.areas(results),
        costs=grids.costs(results),
        tuned=grids.tuned(results),
        training=list(_training(results, prefix, action_legend if is_token else legend)),
        choices=_choices(results),
        groups={key: _groups(results, key) for key in _GROUPS},
        entropy=draw(token.entropy, "entropy", action_legend) if is_token else None,
        entropy_table=rows,
        entropy_columns=columns,
        grid=_grid(results),
        frequent=frequent,
        no_frequent=_no_frequent(results) if frequent is None else "",
        lengths=draw(token.lengths, "lengths") if is_token else None,
        traces=[view(trace) for trace in reading.items(results, "traces")],
        measured=facts.measured(results),
        seconds=facts.seconds(results),
        sampled=grids.sampled(results),
    )


def _no_frequent(results: Results) -> str:
    """Why there is no picture of frequent tokens; empty where none is to be expected."""
    if not reading.mapping(results, "entropy"):
        return ""
    return (
        "Tokens were not counted by action in this run: rollouts are stored as text, without the action of each token. "
        "Judge the adapter again with this version of Rheostat, and the picture will be here."
    )


def _majority(results: Results) -> Majority | None:
    found = reading.mapping(results, "majority")
    if not found:
        return None
    shared = {"budgets": results.get("budgets"), "rows": found.get("rows"), "differences": found.get("differences")}
    table = reading.table(shared)
    return Majority(table, grids.differences(reading.items(shared, "differences"))) if table.lines else None


def _key_numbers(results: Results) -> list[tuple[str, str, str]]:
    """Number, unit and meaning of the two levels and their difference."""
    rows = reading.items(results, "rows")
    single = reading.single_strategy(results)
    ours = number(reading.find(rows, policy=reading.judged(results), k="mean").get("estimate"))
    theirs = number(reading.find(rows, policy=single, k="mean").get("estimate"))
    row = reading.find(
        reading.items(results, "differences"), policy=reading.judged(results), baseline=reading.SINGLE, k="mean"
    )
    bounds = [row.get(name) for name in ("estimate", "low", "high")]
    if ours is None or theirs is None or None in map(number, bounds):
        return []
    digits = reading.digits_for(bounds)
    difference, low, high = (points(value, digits) for value in bounds)
    return [
        (percent(ours), "%", "solved by the adapter, mean over the budgets"),
        (percent(theirs), "%", f"solved by {single}, the best single strategy"),
        (difference, "points", f"paired difference, 95 % interval {low} to {high}"),
    ]


def _training(results: Results, prefix: str, legend: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The figures of the adapters, with what their captions say."""
    is_token = reading.is_token(results)
    draw = training.token_training if is_token else training.sequence_training
    for index, (policy, run) in enumerate(reading.mapping(results, "training").items(), start=1):
        name = f"{prefix}training-{index}"
        drawn = Drawing.of(lambda width, name: draw(results, policy, width, name), name, legend)  # noqa: B023 called at once
        if drawn and isinstance(run, Mapping):
            kept = number(run.get("kept_step" if is_token else "kept_epoch"))
            estimator = str(run.get("estimator") or "").replace("_", " ")
            yield {
                "policy": policy,
                "figure": drawn,
                "kept": None if kept is None else int(kept),
                "estimator": estimator,
            }


def _choices(results: Results) -> list[dict[str, Any]]:
    """Per member and budget the shares of the strategies, from greedy to hot."""
    names = reading.strategies(results)
    order = reading.by_randomness(names)
    members: dict[str, list[dict[str, Any]]] = {}
    for choice in reading.items(results, "choices"):
        shares = reading.probabilities(choice.get("probability"), len(names))
        if shares is None:
            continue
        pieces = [(place, names[index], 100 * shares[index]) for place, index in enumerate(order)]
        top = max(pieces, key=lambda piece: piece[2])
        bar = {
            "budget": choice.get("budget"),
            "pieces": pieces,
            "top": top[1],
            "share": top[2],
            "spoken": _spoken(pieces),
        }
        members.setdefault(str(choice.get("member")), []).append(bar)
    return [{"member": member, "bars": bars} for member, bars in members.items()]


def _groups(results: Results, key: str) -> list[dict[str, Any]]:
    """Per kind of problem, prompt style, level or subject, the adapter and BEST at every k."""
    field, rows = _GROUPS[key][0], reading.items(results, key)
    columns = reading.table(results).columns
    out = []
    for group in dict.fromkeys(str(row.get(field)) for row in rows):
        own = [row for row in rows if str(row.get(field)) == group]
        cells = []
        for k in columns:
            ours, best = reading.find(own, policy=reading.judged(results), k=k), reading.find(own, policy="BEST", k=k)
            a, b = number(ours.get("estimate")), number(best.get("estimate"))
            gap = None if a is None or b is None else a - b
            cells.append({"ours": ours, "best": best, "gap": gap})
        sizes = {count(row.get("n_problems")) for row in own}
        name = _STYLES.get(group, group) if field == "style" else group
        out.append({"name": name, "cells": cells, "n": " / ".join(sorted(sizes))})
    return out


def _entropy_table(results: Results) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The numbers behind the figure of entropies: names of the columns, and a row for each bucket."""
    content = reading.mapping(results, "entropy")
    edges = reading.counts(content.get("edges"))
    names = reading.actions(results)
    columns: dict[str, list[float]] = {}
    for key in ("static", "adapted"):
        side = reading.mapping(content, key)
        columns[str(side.get("policy"))] = reading.counts(side.get("counts"))
    by_action = [reading.counts(row) for row in content.get("by_action") or ()]
    if len(by_action) == len(names):
        columns |= {f"{names[index]}, adapted": by_action[index] for index in reading.by_randomness(names)}
    columns = {name: counts for name, counts in columns.items() if len(counts) == len(edges) - 1}
    ranges = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    rows = [(text, [count(counts[bucket]) for counts in columns.values()]) for bucket, text in enumerate(ranges)]
    return list(columns), rows


def _grid(results: Results) -> dict[str, Any] | None:
    """The mean policy by entropy (down) and position (across)."""
    names = reading.actions(results)
    order = reading.by_randomness(names)
    cells: dict[tuple[Any, Any], dict[str, Any]] = {}
    for cell in reading.items(reading.mapping(results, "entropy"), "grid"):
        pi = reading.probabilities(cell.get("pi"), len(names))
        spans = [tuple(cell.get(axis) or ()) for axis in ("entropy", "position")]
        if pi is None or any(len(span) != 2 or number(span[0]) is None for span in spans):
            continue
        pieces = [(place, names[index], 100 * pi[index]) for place, index in enumerate(order)]
        cells[spans[0], spans[1]] = {"pieces": pieces, "spoken": _spoken(pieces), "n": count(cell.get("n"))}
    if not cells:
        return None
    entropies, positions = (sorted({key[axis] for key in cells}, key=lambda span: span[0]) for axis in (0, 1))
    return {
        "columns": [_span(span, is_share=True) for span in positions],
        "rows": [(_span(span), [cells.get((span, place)) for place in positions]) for span in entropies],
    }


def _span(span: Sequence[Any], is_share: bool = False) -> str:
    """``0.1 to 0.3``, ``over 5``, or as a share ``25 to 50 %``."""
    low, high = (number(end) for end in span)
    factor = 100 if is_share and high is not None and high <= 1 else 1
    unit = " %" if factor == 100 else ""
    return f"over {low:g}" if high is None else f"{factor * (low or 0):g} to {factor * high:g}{unit}"


def _spoken(pieces: Sequence[tuple[int, str, float]]) -> str:
    return ", ".join(f"{name} {share:.0f} %" for _, name, share in pieces if share >= 0.5)
