"""``report.html``: one self-contained page that says what a run learned, shows it, and tells how it was measured."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rheostat.errors import StoreError
from rheostat.files import atomic_write
from rheostat.reports import figures, reading, svg
from rheostat.reports.headline import headline, in_words
from rheostat.reports.reading import ADAPTER, MISSING, PLAIN_ADAPTER, Results, count, number, percent, points

FORMAT = 1  # of results.json
_WIDE, _NARROW = 780, 356  # a desktop column and a phone screen, in CSS pixels
_ORDERS = {"vllm": "temperature, min-p, top-k, top-p", "transformers": "temperature, top-k, top-p, min-p"}


def sentence(results: Results) -> str:
    """What was learned, in plain words, with the numbers and their interval."""
    return str(headline(results))


def write_report(results: Results, path: Path) -> None:
    """Render the results of a run as one HTML file that needs no network, and write it atomically.

    Args:
        results: the content of ``results.json``.
        path: the file to write; its folder must exist.

    Raises:
        StoreError: the results have another format, or the file cannot be written.
    """
    atomic_write(path, render(results))


def render(results: Results) -> str:
    """The page as text; what the results lack is left out."""
    if results.get("format") != FORMAT:
        raise StoreError(
            f"results: format {results.get('format')!r} is not the format {FORMAT} that this rheostat reads; "
            "write the report with the version that made the results"
        )
    environment = Environment(
        loader=PackageLoader("rheostat", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, points=points, count=count, in_words=in_words, tight=_tight, breakable=_breakable
    )
    names = reading.strategies(results)
    order = reading.by_randomness(names)
    return environment.get_template("page.html.jinja").render(
        headline=headline(results),
        model=str(reading.mapping(results, "model").get("model") or "the model"),
        task=str(results.get("task") or "the task"),
        members=[str(member) for member in results.get("members") or ()],
        budgets=reading.budgets(results),
        order_words=_ORDERS.get(str(results.get("order")), str(results.get("order"))),
        theme=svg.THEME,
        colours=svg.strategy_colours(len(names)),
        legend=[names[index] for index in order],
        table=reading.table(results),
        single=reading.single_strategy(results),
        key_numbers=_key_numbers(results),
        curve=_both(figures.curve(results, _WIDE), figures.curve(results, _NARROW)),
        forest=_both(figures.forest(results, _WIDE), figures.forest(results, _NARROW)),
        differences=_differences(results),
        training=list(_training(results)),
        choices=_choices(results, order),
        by_member=_by_member(results),
        measured=_measured(results),
        details=_details(results),
    )


def _tight(text: str) -> str:
    """Keep a number and its percent sign on one line."""
    return text.replace(" %", "\u00a0%")


def _breakable(name: str) -> Markup:
    """Let a long name break after its commas and underscores."""
    return Markup("<wbr>").join(re.findall(r"[^,_]*[,_]?", name))


def _both(wide: Markup | None, narrow: Markup | None) -> tuple[Markup, Markup] | None:
    return None if wide is None or narrow is None else (wide, narrow)


def _key_numbers(results: Results) -> list[tuple[str, str, str]]:
    """Number, unit and meaning of the two levels and their difference."""
    rows = reading.items(results, "rows")
    single = reading.single_strategy(results)
    ours = number(reading.find(rows, policy=ADAPTER, k="mean").get("estimate"))
    theirs = number(reading.find(rows, policy=single, k="mean").get("estimate"))
    row = reading.find(reading.items(results, "differences"), policy=ADAPTER, baseline=reading.SINGLE, k="mean")
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


def _training(results: Results) -> Iterator[dict[str, Any]]:
    """The figures of the two adapters, with what their captions say."""
    for policy in (ADAPTER, PLAIN_ADAPTER):
        drawn = _both(figures.training(results, policy, _WIDE), figures.training(results, policy, _NARROW))
        run = reading.mapping(reading.mapping(results, "training"), policy)
        if drawn:
            kept = number(run.get("kept_epoch"))
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
        spoken = ", ".join(f"{name} {share:.0f} %" for _, name, share in pieces if share >= 0.5)
        bar = {"budget": choice.get("budget"), "pieces": pieces, "top": top[1], "share": top[2], "spoken": spoken}
        members.setdefault(str(choice.get("member")), []).append(bar)
    return [{"member": member, "bars": bars} for member, bars in members.items()]


def _by_member(results: Results) -> list[dict[str, Any]]:
    """Per member the adapter with budget and BEST at every k."""
    rows = reading.items(results, "by_member")
    columns = reading.table(results).columns
    out = []
    for member in dict.fromkeys(str(row.get("member")) for row in rows):
        own = [row for row in rows if str(row.get("member")) == member]
        cells = []
        for k in columns:
            ours, best = reading.find(own, policy=ADAPTER, k=k), reading.find(own, policy="BEST", k=k)
            a, b = number(ours.get("estimate")), number(best.get("estimate"))
            gap = None if a is None or b is None else a - b
            cells.append({"ours": _with_half(ours), "best": _with_half(best), "gap": gap})
        sizes = {count(row.get("n_problems")) for row in own}
        out.append({"member": member, "cells": cells, "n": " / ".join(sorted(sizes))})
    return out


def _with_half(row: Mapping[str, Any]) -> str:
    low, high = number(row.get("low")), number(row.get("high"))
    half = "" if low is None or high is None else f" ± {percent((high - low) / 2)}"
    return percent(row.get("estimate")) + half


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


def _details(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Everything else that shaped the numbers, group by group, as (name, value) pairs."""
    groups = {
        "Model": "model",
        "Machine": "machine",
        "Versions": "versions",
        "Seeds": "seeds",
        "Configuration": "config",
    }
    found = [
        (title, [(k, _plain(v)) for k, v in _flat(reading.mapping(results, key))]) for title, key in groups.items()
    ]
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
