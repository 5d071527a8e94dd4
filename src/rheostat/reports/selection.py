"""The report of `rheostat select`: what was chosen, what it covers (Figure 6 of the paper), and out of what."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rheostat.decoding.strategy import Strategy
from rheostat.errors import ConfigError
from rheostat.reports import facts, reading
from rheostat.reports.figures import selection as figure
from rheostat.reports.figures.svg import Drawing
from rheostat.reports.headline import Headline, in_words
from rheostat.reports.level import ORDERS
from rheostat.reports.reading import MISSING, Results, count, number, percent, points

_DEEPEST = 50  # percent of accent in the strongest cell: ink keeps the contrast that WCAG asks for, light and dark
_OFTEN = 0.2  # share of the resamples from which a strategy that was not chosen is worth a word


@dataclass(frozen=True, slots=True)
class Tried:
    """A candidate: its mean reward in the last round that held it (``latest``: the last round of all)."""

    name: str
    temperature: float
    truncation: str
    reward: float | None
    rollouts: float | None
    round: int | None
    latest: bool
    place: int | None  # in the order of the choice, from 1
    share: float | None  # of the bootstrap resamples that choose it; None: it took no part
    depth: float  # of its colour, in percent

    @property
    def spoken(self) -> str:
        """All that is known of it, in a line."""
        parts = [f"{self.name}: {percent(self.reward)} %" if self.reward is not None else f"{self.name}: no estimate"]
        parts += [f"{count(self.rollouts)} rollouts"] if self.rollouts is not None else []
        parts += [f"left after round {self.round}"] if not self.latest else []
        parts += [f"number {self.place} of the choice"] if self.place else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Truncations down, temperatures across; None where the pool has no such strategy."""

    temperatures: list[str]
    rows: list[tuple[str, list[Tried | None]]]
    greedy: Tried | None
    low: float
    high: float
    left_early: bool


@dataclass(frozen=True, slots=True)
class Page:
    """The report as its template takes it; ids begin with ``prefix``."""

    prefix: str
    headline: Headline
    key_numbers: list[tuple[str, str, str]]
    model: str
    task: str
    objective: str
    cross_fitted: bool
    order_words: str
    chosen: list[dict[str, Any]]
    runners_up: list[tuple[str, float]]
    curve: Drawing | None
    curve_table: list[dict[str, str]]
    problems: tuple[str, str]
    top: list[str]
    heat: HeatMap | None
    tried: list[Tried]
    rounds: list[dict[str, str]]
    asked: str
    full_sweep: str
    measured: facts.Facts
    seconds: list[tuple[str, str, float]]

    @property
    def deepest(self) -> int:
        return _DEEPEST

    @property
    def drawings(self) -> list[Drawing]:
        return [] if self.curve is None else [self.curve]


def view(results: Results, prefix: str = "") -> Page:
    """What the template takes; what the results lack is left out. Ids begin with ``prefix``."""
    tried = _tried(results)
    names = _names(results, "greedy")
    return Page(
        prefix=prefix,
        headline=headline(results),
        key_numbers=_key_numbers(results),
        model=str(reading.mapping(results, "model").get("model") or "the model"),
        task=str(results.get("task") or "the task"),
        objective=str(results.get("objective") or "mean reward"),
        cross_fitted=reading.mapping(results, "config").get("parallel_budget") is not None,
        order_words=ORDERS.get(str(results.get("order")), str(results.get("order"))),
        chosen=_chosen(results, tried),
        runners_up=[(name, share) for name, share in _shares(results).items() if share >= _OFTEN and name not in names],
        curve=Drawing.of(lambda width, name: figure.best_of_n(results, width, name), f"{prefix}best-of-n"),
        curve_table=_curve_table(results),
        problems=(_held(results, "chosen_on"), _held(results, "valued_on")),
        top=_names(results, "top"),
        heat=_heat(tried),
        tried=tried,
        rounds=_rounds(results),
        asked=count(results.get("rollouts_asked")),
        full_sweep=count(results.get("full_sweep")),
        measured=_measured(results),
        seconds=facts.seconds(results),
    )


def headline(results: Results) -> Headline:
    """What was chosen, what that is worth on problems it was not chosen on, and what finding it cost.

    A difference to the strategies with the highest means is claimed only where its 95 % interval excludes zero.
    """
    names = _names(results, "greedy")
    many = f"{in_words(len(names))} strategies"
    chosen = "Chosen, in this order: " + "; ".join(names) + "." if names else ""
    estimate, low, high = _last(results, "difference")
    if estimate is None or low is None or high is None or not names:
        return Headline("unknown", f"{many.capitalize()} are chosen.", _cost(results), chosen)
    best = f"{in_words(len(names))} best by themselves"
    size = points(abs(estimate), reading.digits_for((estimate, low, high))).lstrip("+")
    if len(names) == 1:
        verdict, title = "none", f"One strategy is chosen, the best by its {_mean_of(results)}: {names[0]}."
    elif low > 0:
        verdict, title = "gain", f"{many.capitalize()} chosen together cover {size} points more than the {best}."
    elif high < 0:
        verdict, title = "worse", f"{many.capitalize()} chosen together cover {size} points less than the {best}."
    elif low == high:
        verdict, title = "none", f"{many.capitalize()} are chosen; they cover as much as the {best}."
    else:
        verdict, title = "none", f"{many.capitalize()} are chosen; whether they cover more than the {best} is open."
    return Headline(verdict, title, f"{_evidence(results, len(names))} {_cost(results)}".strip(), chosen)


def _evidence(results: Results, actions: int) -> str:
    """Both coverages on the other problems, and their paired difference."""
    ours, theirs, difference = (_last(results, name) for name in ("greedy", "top", "difference"))
    digits = reading.digits_for(difference)
    seen, other = _held(results, "chosen_on"), _held(results, "valued_on")
    where = "Chosen on one half of the problems and valued on the other"
    if MISSING not in (seen, other):
        where = f"Chosen on {seen} problems and valued on {other} others"
    if actions == 1:
        return f"{where}, it solves {percent(ours[0])} % (95 % interval {percent(ours[1])} to {percent(ours[2])})."
    zero = ", which includes zero" if (difference[1] or 0) <= 0 <= (difference[2] or 0) else ""
    return (
        f"{where}, {in_words(actions)} strategies cover {percent(ours[0])} %, the {in_words(actions)} with the highest "
        f"{_mean_of(results)} {percent(theirs[0])} %; the paired difference is {points(difference[0], digits)} points "
        f"(95 % interval {points(difference[1], digits)} to {points(difference[2], digits)}{zero})."
    )


def _cost(results: Results) -> str:
    """Rollouts beside those of the full sweep."""
    asked, full = number(results.get("rollouts_asked")), number(results.get("full_sweep"))
    if not asked or not full:
        return ""
    if asked >= full:
        return f"The search was the full sweep: {count(full)} rollouts."
    return (
        f"The search asked for {count(asked)} rollouts, {100 * asked / full:.0f} % of the full sweep’s {count(full)}."
    )


def _mean_of(results: Results) -> str:
    return str(results.get("objective") or "mean reward")


def _key_numbers(results: Results) -> list[tuple[str, str, str]]:
    """Number, unit and meaning of the two coverages and their difference."""
    ours, theirs, difference = (_last(results, name) for name in ("greedy", "top", "difference"))
    actions = len(_names(results, "greedy"))
    if None in (*ours, *theirs, *difference) or actions < 2:
        return []
    estimate, low, high = (points(value, reading.digits_for(difference)) for value in difference)
    return [
        (percent(ours[0]), "%", f"covered by {in_words(actions)} strategies chosen together, on other problems"),
        (percent(theirs[0]), "%", f"covered by the {in_words(actions)} with the highest {_mean_of(results)}"),
        (estimate, "points", f"paired difference, 95 % interval {low} to {high}"),
    ]


def _names(results: Results, key: str) -> list[str]:
    return [str(name) for name in reading.mapping(results, key).get("strategies") or ()]


def _shares(results: Results) -> dict[str, float]:
    """How often resamples choose each strategy, most often first."""
    found = {str(name): number(share) for name, share in reading.mapping(results, "chosen_in_resamples").items()}
    known = [(name, share) for name, share in found.items() if share is not None]
    return dict(sorted(known, key=lambda pair: -pair[1]))


def _last(results: Results, name: str) -> tuple[float | None, float | None, float | None]:
    """Estimate and interval with all actions."""
    intervals = figure.intervals(results, name)
    return intervals[-1] if intervals else (None, None, None)


def _held(results: Results, key: str) -> str:
    return count(reading.mapping(results, "held_out_problems").get(key))


def _chosen(results: Results, tried: Sequence[Tried]) -> list[dict[str, Any]]:
    """The choice in its order, with what each strategy adds."""
    described = reading.mapping(results, "greedy")
    covers = [number(value) for value in described.get("coverage") or ()]
    held = [number(value) for value in described.get("held_out") or ()]
    shares, by_name = _shares(results), {one.name: one for one in tried}
    rows = []
    for index, (name, value) in enumerate(zip(_names(results, "greedy"), covers, strict=False)):
        before = covers[index - 1] if index else 0.0
        rows.append(
            {
                "name": name,
                "covers": percent(value),
                "gain": points(None if value is None or before is None else value - before),
                "held": percent(held[index]) if index < len(held) else None,
                "share": percent(shares.get(name, 0.0 if shares else None), 0),
                "reward": percent(by_name[name].reward) if name in by_name else MISSING,
            }
        )
    return rows


def _curve_table(results: Results) -> list[dict[str, str]]:
    """The numbers behind Figure 6."""
    curves = {name: figure.intervals(results, name) for name in ("greedy", "top", "difference")}
    rows = []
    for index, (ours, theirs, difference) in enumerate(zip(*curves.values(), strict=False), start=1):
        digits = reading.digits_for(difference)
        rows.append(
            {
                "actions": str(index),
                "greedy": _ranged([percent(value) for value in ours]),
                "top": _ranged([percent(value) for value in theirs]),
                "difference": _ranged([points(value, digits) for value in difference]),
            }
        )
    return rows


def _ranged(texts: Sequence[str]) -> str:
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


def _tried(results: Results) -> list[Tried]:
    """The candidates, from the highest mean reward to the lowest; those without one last."""
    entries = reading.items(results, "heat")
    rewards = [value for entry in entries if (value := number(entry.get("reward"))) is not None]
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    last = max((int(n) for entry in entries if (n := number(entry.get("round"))) is not None), default=None)
    names, shares = _names(results, "greedy"), _shares(results)
    found = []
    for entry in entries:
        temperature, reward, held = (number(entry.get(key)) for key in ("temperature", "reward", "round"))
        if temperature is None:
            continue
        truncation = str(entry.get("truncation") or "")
        name = str(entry.get("strategy") or _name(temperature, truncation))
        latest = held is None or held == last
        part = 0.0 if reward is None else (reward - low) / (high - low) if high > low else 0.5
        found.append(
            Tried(
                name=name,
                temperature=temperature,
                truncation=truncation,
                reward=reward,
                rollouts=number(entry.get("rollouts")),
                round=None if held is None else int(held),
                latest=latest,
                place=names.index(name) + 1 if name in names else None,
                share=shares.get(name, 0.0) if shares and latest else None,
                depth=round(3 + (_DEEPEST - 3) * part, 1),
            )
        )
    return sorted(found, key=lambda one: -1.0 if one.reward is None else one.reward, reverse=True)


def _name(temperature: float, truncation: str) -> str:
    return "greedy" if temperature == 0 else ",".join(filter(None, (f"T={temperature:g}", truncation)))


def _heat(tried: Sequence[Tried]) -> HeatMap | None:
    sampled = [one for one in tried if one.temperature > 0]
    rewards = [one.reward for one in tried if one.reward is not None]
    if not rewards:
        return None
    temperatures = sorted({one.temperature for one in sampled})
    truncations = sorted({one.truncation for one in sampled}, key=_tightness)
    cells = {(one.truncation, one.temperature): one for one in sampled}
    return HeatMap(
        temperatures=[f"{temperature:g}" for temperature in temperatures],
        rows=[(t, [cells.get((t, temperature)) for temperature in temperatures]) for t in truncations],
        greedy=next((one for one in tried if one.temperature == 0), None),
        low=min(rewards),
        high=max(rewards),
        left_early=any(not one.latest for one in tried),
    )


def _tightness(truncation: str) -> tuple[float, float, float, float]:
    """Free first; then from the loosest top-k, top-p, min-p and top-nσ to the tightest."""
    try:
        strategy = Strategy.parse(_name(1.0, truncation))
    except ConfigError:  # of a version to come
        return 0.0, 0.0, math.inf, 0.0
    sigma = strategy.top_n_sigma or math.inf
    return -(strategy.top_k or math.inf), -(strategy.top_p or 1.0), strategy.min_p or 0.0, -sigma


def _rounds(results: Results) -> list[dict[str, str]]:
    """The plan, with what each round asks for beyond the one before."""
    rows, before = [], 0.0
    for item in results.get("plan") or ():
        sizes = [number(value) for value in item]
        if len(sizes) != 3 or None in sizes:
            return []
        strategies, problems, samples = (size or 0.0 for size in sizes)
        fresh = strategies * (problems * samples - before)
        before = problems * samples
        rows.append(
            {
                "strategies": count(strategies),
                "problems": count(problems),
                "samples": count(samples),
                "fresh": count(fresh),
            }
        )
    return rows


def _measured(results: Results) -> list[tuple[str, str]]:
    """The facts of the measurement, in words."""
    counts: Mapping[str, Any] = reading.mapping(results, "counts")
    found = [
        ("problems, all of the validation split", count(results.get("problems"))),
        ("samples per problem and strategy, at most", count(results.get("samples"))),
        ("strategies in the pool", count(len(reading.items(results, "heat")) or None)),
    ]
    rollouts = number(counts.get("rollouts"))
    found += [("samples drawn, greedy ones once", count(rollouts)), ("tokens drawn", count(counts.get("tokens")))]
    for key, name in (("truncated", "cut off at the token limit"), ("without_verdict", "without a verdict")):
        value = number(counts.get(key))
        share = f" ({100 * value / rollouts:.2g} %)" if value and rollouts else ""
        found.append((name, count(value) + share))
    bounds = reading.mapping(results, "bounds")
    if bounds:
        ends = " to ".join(percent(bounds.get(name)) for name in ("missing_wrong", "missing_right"))
        found.append(("coverage of the choice, missing verdicts wrong to right", f"{ends} %"))
    empty = number(reading.mapping(results, "greedy").get("cells_without_estimate"))
    if empty:
        found.append(("problems × chosen strategies with too few verdicts, which cover nothing", count(empty)))
    return [(name, text) for name, text in found if text not in ("", MISSING)]
