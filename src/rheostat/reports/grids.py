"""Tables of the page that sort: cells with what they say and what they are sorted by."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rheostat.reports import reading
from rheostat.reports.reading import MISSING, Results, count, interval, number, p_value, percent, points


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell says, below it in small letters, and what it is sorted by (None: last)."""

    text: str
    small: str = ""
    value: float | str | None = None


@dataclass(frozen=True, slots=True)
class Grid:
    """Headings and rows; the first cell of a row is its heading."""

    columns: list[str]
    rows: list[list[Cell]]

    def __bool__(self) -> bool:
        return bool(self.rows)


def name_cell(name: object, small: str = "") -> Cell:
    return Cell(str(name), small, str(name))


def count_cell(value: object) -> Cell:
    return Cell(count(value), value=number(value))


def share_cell(value: object, low: object = None, high: object = None) -> Cell:
    """A fraction in percent, with its interval below."""
    return Cell(percent(value), interval(low, high), number(value))


def differences(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """Every paired difference: interval, p-value, the same after Holm's correction, and the sign test's."""
    out = []
    for row in rows:
        digits = reading.digits_for(row.get(name) for name in ("estimate", "low", "high"))
        ends = [points(row.get(name), digits) for name in ("estimate", "low", "high")]
        strategy = row.get("baseline_strategy")
        out.append(
            [
                name_cell(row.get("policy")),
                name_cell(row.get("baseline"), "" if strategy is None else str(strategy)),
                Cell(str(row.get("k")), value=_order(row.get("k"))),
                Cell(ends[0], value=number(row.get("estimate"))),
                Cell(f"{ends[1]} to {ends[2]}", value=number(row.get("low"))),
                *(Cell(p_value(row.get(name)), value=number(row.get(name))) for name in ("p", "p_holm", "p_sign")),
                count_cell(row.get("n_problems")),
            ]
        )
    names = ["policy", "minus", "B", "points", "95 % interval", "p", "p, Holm", "p, sign test", "problems"]
    return Grid(names, out)


_STYLES = {"thinking": "thinking first", "cot": "with a chain of thought", "direct": "answer only"}


def groups(results: Results, key: str, what: str) -> Grid:
    """Per kind of problem, prompt style, level or subject (``key`` by_member, …): whom the page is about and BEST at
    every k; below the first its paired difference to BEST."""
    field, rows = key.removeprefix("by_"), reading.items(results, key)
    gaps = [row for row in reading.items(results, "by_group") if row.get("group") == field]
    first = next(iter(reading.subjects(results)), None)
    subjects = reading.subjects(results) or [reading.SINGLE]
    columns = reading.table(results).columns
    names = list(dict.fromkeys(str(row.get(field)) for row in rows))
    out = []
    for name in sorted(names, key=_natural) if field in ("level", "subject") else names:
        own = [row for row in rows if str(row.get(field)) == name]
        sizes = " / ".join(sorted({count(row.get("n_problems")) for row in own}))
        for policy in (*subjects, "BEST"):
            found = [(k, reading.find(own, policy=policy, k=k)) for k in columns]
            if not any(row for _, row in found):
                continue
            cells = []
            for k, row in found:
                cell = share_cell(row.get("estimate"), row.get("low"), row.get("high"))
                gap = _gap(own, gaps, name, policy, k) if policy == first else ""
                cells.append(Cell(cell.text, "\n".join(part for part in (cell.small, gap) if part), cell.value))
            shown = _STYLES.get(name, name) if field == "style" else name
            out.append([name_cell(f"{shown} · {policy}", f"{sizes} problems"), *cells])
    return Grid([f"{what} · policy", *("mean" if k == "mean" else f"B = {k}" for k in columns)], out)


def _gap(
    own: Sequence[Mapping[str, Any]], gaps: Sequence[Mapping[str, Any]], name: str, policy: str, k: int | str
) -> str:
    """A policy minus BEST on the problems of a group, with its interval; earlier results have none."""
    row = reading.find(gaps, value=name, policy=policy, k=k)
    if row:
        return f"{points(row.get('estimate'))}\n{points(row.get('low'))} to {points(row.get('high'))}"
    ours, best = (number(reading.find(own, policy=one, k=k).get("estimate")) for one in (policy, "BEST"))
    return points(ours - best) if ours is not None and best is not None else ""


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Numbers inside names by their size, before letters: level 2 before level 10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in parts]


def _order(k: object) -> float:
    """The mean comes after all budgets."""
    return number(k) or 1e9


@dataclass(frozen=True, slots=True)
class Costs:
    """Policies down, budgets across; ``static`` are the strategies but the best single one.

    Attributes:
        per_solved: tokens per solved problem.
        milliseconds: the same in time, where that is known.
        equal_to: how many samples of the best single strategy solve as many problems; of adapters and baselines.
        tokens: of B samples of a problem.
        static: tokens per solved problem of every static strategy.
    """

    per_solved: Grid
    milliseconds: Grid
    equal_to: Grid
    tokens: Grid
    static: Grid

    def __bool__(self) -> bool:
        return bool(self.per_solved) or bool(self.static)


def costs(results: Results) -> Costs:
    """What B samples of each policy cost."""
    kinds = {line.policy: line.kind for line in reading.table(results).lines}
    single, budgets = reading.single_strategy(results), reading.budgets(results)
    rows = reading.without_twin(results, reading.items(results, "costs"))
    statics = {name for name, kind in kinds.items() if kind == "static" and name != single}

    def grid(cell: Callable[[Mapping[str, Any]], Cell], policies: Iterable[str]) -> Grid:
        out = []
        for name in policies:
            own = [reading.find(rows, policy=name, k=k) for k in budgets]
            if any(own):
                out.append([name_cell(name, "best single strategy" if name == single else ""), *map(cell, own)])
        return Grid(["policy", *(f"B = {k}" for k in budgets)], out)

    named = dict.fromkeys(str(row.get("policy")) for row in rows)
    ours = [name for name in named if name not in statics]
    timed = [n for n in ours if any(_rate(results, row, kinds) for row in rows if row.get("policy") == n)]
    compared = [name for name in ours if any(row.get("equal_to") for row in rows if row.get("policy") == name)]
    return Costs(
        per_solved=grid(lambda row: _interval_cell(row.get("tokens_per_solved"), "no end"), ours),
        milliseconds=grid(lambda row: _milliseconds(results, row, kinds), timed),
        equal_to=grid(lambda row: _interval_cell(row.get("equal_to"), "more than drawn"), compared),
        tokens=grid(lambda row: Cell(_plain(number(row.get("tokens"))), value=number(row.get("tokens"))), named),
        static=grid(
            lambda row: _interval_cell(row.get("tokens_per_solved"), "no end"), [n for n in named if n in statics]
        ),
    )


def _rate(results: Results, row: Mapping[str, Any], kinds: Mapping[str, str]) -> float | None:
    """Milliseconds per token of a policy under B: its own, or where it applies strategies that of their sweep."""
    rates = reading.mapping(results, "milliseconds_per_token")
    policy = str(row.get("policy"))
    own = rates.get(f"{policy}, B = {row.get('k')}", rates.get(policy))
    applies = not reading.is_token(results) or kinds.get(policy, "best") in ("static", "best")
    applies = applies or reading.learned(results).get(policy) == "sequence"
    return number(own if own is not None or not applies else rates.get("strategies on test"))


def _milliseconds(results: Results, row: Mapping[str, Any], kinds: Mapping[str, str]) -> Cell:
    rate, tokens = _rate(results, row, kinds), row.get("tokens_per_solved")
    if rate is None or not isinstance(tokens, Sequence):
        return Cell(MISSING)
    return _interval_cell([None if (n := number(value)) is None else rate * n for value in tokens], "no end")


def _interval_cell(value: object, without: str) -> Cell:
    """Estimate and interval; what has no end says so."""
    if not isinstance(value, Sequence):
        return Cell(MISSING)
    estimate, low, high = _three(value)
    return Cell(_plain(estimate, without), _ends(low, high), estimate)


def _three(value: object) -> tuple[float | None, float | None, float | None]:
    """Estimate, low, high."""
    known = [number(item) for item in value] if isinstance(value, Sequence) and len(value) == 3 else [None] * 3
    return known[0], known[1], known[2]


def _plain(value: float | None, without: str = MISSING) -> str:
    if value is None:
        return without
    return f"{value:.{2 if value < 10 else 1}f}" if value < 100 else count(value)


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None and high is None else f"{_plain(low)}–{_plain(high, '∞')}"


def sampled(results: Results) -> Grid:
    """What was sampled, phase by phase: how much of it in this run, and what it took in whichever run it was."""
    out = []
    for what, own in reading.mapping(results, "sampled").items():
        spent, tokens = number(own.get("seconds")), number(own.get("tokens"))
        rate = 1000 * spent / tokens if spent is not None and tokens else None
        cells = [count_cell(own.get(name)) for name in ("rollouts", "in_this_run", "tokens")]
        out.append([name_cell(what), *cells, Cell(_plain(spent), value=spent), Cell(_plain(rate), value=rate)])
    return Grid(["what", "completions", "of these in this run", "tokens", "seconds", "ms per token"], out)


def areas(results: Results) -> Grid:
    """Accuracy at every token budget, and the area under the curve, policy by policy."""
    rows = reading.without_twin(results, reading.items(results, "within"))
    grid = next((list(row.get("tokens") or ()) for row in rows), [])
    out = []
    for row in rows:
        shares = [Cell(percent(share), value=number(share)) for share in row.get("accuracy") or ()]
        if len(shares) == len(grid):
            out.append([name_cell(row.get("policy")), share_cell(*_three(row.get("area"))), *shares])
    return Grid(["policy", "area, %", *map(count, grid)], out)


def tuned(results: Results) -> Grid:
    """What validation, or the entropy of unlabelled prompts, chose for each baseline, and out of what."""
    out = []
    for name, found in reading.mapping(results, "tuned").items():
        if not isinstance(found, Mapping):
            continue
        values = [f"{key}: {percent(value)} %" for key, value in reading.mapping(found, "validation").items()]
        curve = zip(found.get("temperatures") or (), found.get("entropy") or (), strict=False)
        values += [
            f"T = {temperature:g}: {entropy:.3g} nats" for temperature, entropy in curve if number(entropy) is not None
        ]
        voting = f"for votes {found['majority']}" if found.get("majority") else ""
        out.append([name_cell(name), name_cell(found.get("chosen"), voting), Cell(", ".join(values))])
    return Grid(["baseline", "chosen", "out of"], out)


def policies(results: Results) -> Grid:
    """Fixed strategies as they were judged, group by group and k by k."""
    out = [
        [
            name_cell(row.get("policy")),
            name_cell(row.get("group")),
            Cell(str(row.get("k")), value=number(row.get("k"))),
            share_cell(row.get("estimate"), row.get("low"), row.get("high")),
            count_cell(row.get("problems")),
            count_cell(row.get("samples")),
            Cell(f"{percent(row.get('truncated'))}", value=number(row.get("truncated"))),
            Cell(_plain(number(row.get("tokens"))), value=number(row.get("tokens"))),
        ]
        for row in reading.items(results, "rows")
    ]
    names = ["strategy", "problems of", "k", "solved, %", "problems", "samples", "cut off, %", "tokens"]
    return Grid(names, out)
