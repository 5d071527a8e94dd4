"""What the page says of one level: the sequence level (one strategy per prompt) or the token level (one at every
token). Both have the same keys; each has a few of its own.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from rheostat.reports import figures, reading, token_figures
from rheostat.reports.headline import Headline, headline
from rheostat.reports.reading import MISSING, Results, count, number, percent, points
from rheostat.reports.trace import view

Pair = tuple[Markup, Markup]  # for a desktop and for a phone

_WIDE, _NARROW = 780, 356  # a desktop column and a phone screen, in CSS pixels
ORDERS = {"vllm": "temperature, min-p, top-k, top-p", "transformers": "temperature, top-k, top-p, min-p"}
_STYLES = {"cot": "with a chain of thought", "direct": "answer only"}
_HEADINGS = {
    "compared": "What was compared",
    "curve": "Accuracy against budget",
    "forest": "The adapter minus its rivals, problem by problem",
    "table": "Every policy, every budget",
    "training": "How the policy took shape",
    "choices": "What it chooses, by kind of problem",
    "by_style": "With and without a chain of thought",
    "by_member": "The adapter and BEST, by kind of problem",
    "entropy": "Where it acts: entropy and position",
    "lengths": "How long the answers are",
    "traces": "Two answers, token by token",
}


@dataclass(frozen=True, slots=True)
class Level:
    """One level as the template takes it; what the results lack is None or empty. ``prefix`` begins its ids."""

    prefix: str
    headline: Headline
    model: str
    task: str
    adapter: str
    policies: tuple[str, ...]
    budgets: list[int]
    order_words: str
    palette: int
    legend: list[str]
    single: str | None
    key_numbers: list[tuple[str, str, str]]
    compared: bool
    curve: Pair | None
    forest: Pair | None
    differences: list[dict[str, str]]
    table: reading.Table | None
    columns: tuple[int | str, ...]
    training: list[dict[str, Any]]
    choices: list[dict[str, Any]]
    by_style: list[dict[str, Any]]
    by_member: list[dict[str, Any]]
    entropy: Pair | None
    entropy_table: list[tuple[str, list[str]]]
    entropy_columns: list[str]
    grid: dict[str, Any] | None
    lengths: Pair | None
    traces: list[dict[str, Any]]
    measured: list[tuple[str, str]]

    @property
    def is_token(self) -> bool:
        return bool(self.prefix)

    @property
    def headings(self) -> dict[str, str]:
        """Of the sections that have something to show, in their order."""
        own = dict(_HEADINGS)
        if len(self.traces) != 2:
            own["traces"] = "Answers, token by token" if len(self.traces) > 1 else "An answer, token by token"
        return {key: heading for key, heading in own.items() if getattr(self, key)}


def level(results: Results) -> Level:
    """One level of the results of a run."""
    is_token = reading.is_token(results)
    prefix = "token-" if is_token else ""
    names = reading.strategies(results)
    order = reading.by_randomness(names)
    table = reading.table(results)

    def draw(what: Callable[[Results, int, str], Markup | None], name: str) -> Pair | None:
        return both(lambda width: what(results, width, prefix + name))

    columns, rows = _entropy_table(results, order)
    return Level(
        prefix=prefix,
        headline=headline(results),
        model=str(reading.mapping(results, "model").get("model") or "the model"),
        task=str(results.get("task") or "the task"),
        adapter=reading.judged(results),
        policies=tuple(line.policy for line in table.lines),
        budgets=reading.budgets(results),
        order_words=ORDERS.get(str(results.get("order")), str(results.get("order"))),
        palette=len(names),
        legend=[names[index] for index in order],
        single=reading.single_strategy(results),
        key_numbers=_key_numbers(results),
        compared=bool(names) or not is_token,
        curve=draw(figures.curve, "curve"),
        forest=draw(figures.forest, "forest"),
        differences=_differences(results),
        table=table if table.lines else None,
        columns=table.columns,
        training=list(_training(results, prefix)),
        choices=_choices(results, order),
        by_style=_groups(results, "by_style", "style"),
        by_member=_groups(results, "by_member", "member"),
        entropy=draw(token_figures.entropy, "entropy") if is_token else None,
        entropy_table=rows,
        entropy_columns=columns,
        grid=_grid(results, order),
        lengths=draw(token_figures.lengths, "lengths") if is_token else None,
        traces=[view(trace) for trace in reading.items(results, "traces")],
        measured=_measured(results),
    )


def both(draw: Callable[[int], Markup | None]) -> Pair | None:
    """A figure for a desktop and for a phone; None where there is nothing to draw."""
    wide, narrow = draw(_WIDE), draw(_NARROW)
    return None if wide is None or narrow is None else (wide, narrow)


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


def _differences(results: Results) -> list[dict[str, str]]:
    """The numbers behind the forest plot."""
    out = []
    for row in reading.items(results, "differences"):
        digits = reading.digits_for(row.get(name) for name in ("estimate", "low", "high"))
        text = {name: points(row.get(name), digits) for name in ("estimate", "low", "high")}
        strategy = row.get("baseline_strategy")
        text["policy"] = str(row.get("policy"))
        text["baseline"] = f"{row.get('baseline')} ({strategy})" if strategy is not None else str(row.get("baseline"))
        text["k"] = str(row.get("k"))
        text["n"] = count(row.get("n_problems"))
        out.append(text)
    return out


def _training(results: Results, prefix: str) -> Iterator[dict[str, Any]]:
    """The figures of the adapters, with what their captions say."""
    draw = token_figures.training if reading.is_token(results) else figures.training
    for index, (policy, run) in enumerate(reading.mapping(results, "training").items()):
        drawn = both(lambda width: draw(results, policy, width, f"{prefix}training{index}-"))  # noqa: B023 called at once
        if drawn and isinstance(run, Mapping):
            kept = number(run.get("kept_step" if reading.is_token(results) else "kept_epoch"))
            estimator = str(run.get("estimator") or "").replace("_", " ")
            yield {
                "policy": policy,
                "figure": drawn,
                "kept": None if kept is None else int(kept),
                "estimator": estimator,
            }


def _choices(results: Results, order: Sequence[int]) -> list[dict[str, Any]]:
    """Per member and budget the shares of the strategies, from greedy to hot."""
    names = reading.strategies(results)
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


def _groups(results: Results, key: str, field: str) -> list[dict[str, Any]]:
    """Per kind of problem, or prompt style, the adapter and BEST at every k."""
    rows = reading.items(results, key)
    columns = reading.table(results).columns
    out = []
    for group in dict.fromkeys(str(row.get(field)) for row in rows):
        own = [row for row in rows if str(row.get(field)) == group]
        cells = []
        for k in columns:
            ours, best = reading.find(own, policy=reading.judged(results), k=k), reading.find(own, policy="BEST", k=k)
            a, b = number(ours.get("estimate")), number(best.get("estimate"))
            gap = None if a is None or b is None else a - b
            cells.append({"ours": _with_half(ours), "best": _with_half(best), "gap": gap})
        sizes = {count(row.get("n_problems")) for row in own}
        out.append({"name": _STYLES.get(group, group), "cells": cells, "n": " / ".join(sorted(sizes))})
    return out


def _with_half(row: Mapping[str, Any]) -> str:
    low, high = number(row.get("low")), number(row.get("high"))
    half = "" if low is None or high is None else f" ± {percent((high - low) / 2)}"
    return percent(row.get("estimate")) + half


def _entropy_table(results: Results, order: Sequence[int]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The numbers behind the figure of entropies: names of the columns, and a row for each bucket."""
    content = reading.mapping(results, "entropy")
    edges = reading.counts(content.get("edges"))
    names = reading.strategies(results)
    columns: dict[str, list[float]] = {}
    for key in ("static", "adapted"):
        side = reading.mapping(content, key)
        columns[str(side.get("policy"))] = reading.counts(side.get("counts"))
    by_action = [reading.counts(row) for row in content.get("by_action") or ()]
    if len(by_action) == len(names):
        columns |= {f"{names[index]}, adapted": by_action[index] for index in order}
    columns = {name: counts for name, counts in columns.items() if len(counts) == len(edges) - 1}
    ranges = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    rows = [(text, [count(counts[bucket]) for counts in columns.values()]) for bucket, text in enumerate(ranges)]
    return list(columns), rows


def _grid(results: Results, order: Sequence[int]) -> dict[str, Any] | None:
    """The mean policy by entropy (down) and position (across)."""
    names = reading.strategies(results)
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


def _measured(results: Results) -> list[tuple[str, str]]:
    """The facts of the measurement, in words."""
    counts = reading.mapping(results, "counts")
    lines = reading.table(results).lines
    facts = [("test problems", " / ".join(dict.fromkeys(line.n_problems for line in lines)))]
    facts += [("samples per problem and strategy", " / ".join(dict.fromkeys(line.n_samples for line in lines)))]
    facts += [("problems per split", ", ".join(f"{split} {count(size)}" for split, size in _splits(results)))]
    rollouts = number(counts.get("rollouts"))
    facts += [("samples drawn", count(rollouts)), ("tokens drawn", count(counts.get("tokens")))]
    for key, name in (("truncated", "cut off at the token limit"), ("without_verdict", "without a verdict")):
        value = number(counts.get(key))
        share = f" ({100 * value / rollouts:.2g} %)" if value and rollouts else ""
        facts.append((name, count(value) + share))
    spent = [f"{name} {_plain(value)} s" for name, value in _flat(reading.mapping(results, "wall_seconds"))]
    facts.append(("time taken", ", ".join(spent)))
    return [(name, text) for name, text in facts if text not in ("", MISSING)]


def _splits(results: Results) -> list[tuple[str, object]]:
    """Split sizes: ``splits`` of the results, or whole numbers that the configuration keeps under a split's name."""
    given = reading.mapping(results, "splits")
    if given:
        return [(str(split), size) for split, size in given.items()]
    found: dict[str, object] = {}
    for key, value in _flat(reading.mapping(results, "config")):
        last = key.rsplit(".", 1)[-1]
        if last in ("train", "validation", "test") and isinstance(value, int) and not isinstance(value, bool):
            found.setdefault(last, value)
    return list(found.items())


def details(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything else that shaped the numbers, group by group, as (name, value) pairs."""
    groups = {title: reading.mapping(results, title.lower()) for title in ("Model", "Machine", "Versions", "Seeds")}
    groups["Configuration"] = reading.mapping(results, "config")
    groups["Configuration of the token level"] = reading.mapping(reading.mapping(results, "token"), "config")
    found = [(title, [(k, _plain(v)) for k, v in _flat(group)]) for title, group in groups.items()]
    return [(title, pairs) for title, pairs in found if pairs]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: object) -> str:
    """A value as a reader would write it."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return MISSING
        return f"{value:g}"
    if isinstance(value, list | tuple) and all(not isinstance(item, Mapping | list | tuple) for item in value):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
