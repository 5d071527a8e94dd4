"""Reading a results dictionary: numbers that may be missing, names, and the table that page and terminal share."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rheostat.decoding.strategy import Strategy
from rheostat.errors import ConfigError

Results = Mapping[str, Any]

ADAPTER = "adapter with budget"
PLAIN_ADAPTER = "adapter without budget"
BOTH_LEVELS = "adapter of both levels"
OWN_NAMES = (ADAPTER, PLAIN_ADAPTER, BOTH_LEVELS, "entropy-only adapter")  # what training calls its adapters
SINGLE = "best single strategy"
MISSING = "–"

NATURES = {  # of what is learned, as `judge` names them
    "sequence": "sequence-level adapter",
    "token": "token-level adapter",
    "both": BOTH_LEVELS,
    "autodeco": "AutoDeco heads",
}


def number(value: object) -> float | None:
    """``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def percent(value: object, digits: int = 1) -> str:
    """A fraction as percent without the sign: 0.342 is ``34.2``."""
    fraction = number(value)
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f}"


def points(value: object, digits: int = 1) -> str:
    """A difference of two fractions in percentage points, always with its sign: 0.021 is ``+2.1``."""
    fraction = number(value)
    if fraction is None:
        return MISSING
    text = f"{abs(100 * fraction):.{digits}f}"
    sign = "" if float(text) == 0 else "+" if fraction > 0 else "−"
    return sign + text


def digits_for(values: Iterable[object]) -> int:
    """How many decimals percentage points need so that nothing but zero is written as zero: 1, 2 or 3."""
    sizes = [abs(100 * value) for value in map(number, values) if value is not None and abs(value) > 1e-12]
    return next((digits for digits in (1, 2) if all(round(size, digits) > 0 for size in sizes)), 3)


def count(value: object) -> str:
    """A whole number with thin spaces between the thousands."""
    whole = number(value)
    return MISSING if whole is None else f"{whole:,.0f}".replace(",", "\u202f")


def interval(low: object, high: object, digits: int = 1) -> str:
    """The ends of an interval of fractions in percent: ``32.4–36.1``; empty where one is missing."""
    return f"{percent(low, digits)}–{percent(high, digits)}" if None not in (number(low), number(high)) else ""


def p_value(value: object) -> str:
    """Two digits, and what is tiny as ``< 0.001``."""
    p = number(value)
    return MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def items(results: Results, key: str) -> list[Mapping[str, Any]]:
    """The list of mappings under ``key``; empty where it is missing."""
    found = results.get(key)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, Sequence) else []


def mapping(results: Results, key: str) -> Mapping[str, Any]:
    """The mapping under ``key``; empty where it is missing."""
    found = results.get(key)
    return found if isinstance(found, Mapping) else {}


def budgets(results: Results) -> list[int]:
    """The parallel budgets of the run, smallest first."""
    return sorted(int(value) for value in results.get("budgets") or () if number(value) is not None)


def strategies(results: Results) -> list[str]:
    """The strategies in the order of the action space."""
    return [str(name) for name in results.get("strategies") or ()]


def actions(results: Results) -> list[str]:
    """What a token policy picks from: all strategies, where more were measured those of its own."""
    own = [str(name) for name in mapping(results, "entropy").get("actions") or ()]
    return own or strategies(results)


def by_randomness(names: Sequence[str]) -> list[int]:
    """Indices of ``names`` from greedy to the hottest, truncated before free; what is no strategy comes last."""

    def key(index: int) -> tuple[float, int, int]:
        try:
            strategy = Strategy.parse(names[index])
        except ConfigError:
            return math.inf, 0, index
        limits = (strategy.top_k, strategy.top_p, strategy.min_p, strategy.top_n_sigma)
        return strategy.temperature, -sum(limit is not None for limit in limits), index

    return sorted(range(len(names)), key=key)


def probabilities(value: object, size: int) -> list[float] | None:
    """A distribution over ``size`` strategies, or None if it is not one."""
    if not isinstance(value, Sequence) or len(value) != size:
        return None
    shares = [number(share) for share in value]
    known = [share for share in shares if share is not None and share >= 0]
    total = sum(known)
    return [share / total for share in known] if len(known) == size and total > 0 else None


def counts(value: object) -> list[float]:
    """A list of counts; empty if one is missing."""
    known = [number(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else []
    found = [item for item in known if item is not None and item >= 0]
    return found if len(found) == len(known) else []


def is_token(results: Results) -> bool:
    """Whether something of the results chooses at every token, as MIXED then does."""
    return results.get("kind") == "token"


def learned(results: Results) -> dict[str, str]:
    """Every adapter that was judged, AutoDeco's heads among them, with its nature: a key of ``NATURES``.

    Earlier results do not say it: there, only what chooses at every token has lengths of its own, and baselines that
    are named by a folder are AutoDeco's.
    """
    told, at_tokens = mapping(results, "adapters"), mapping(results, "lengths")
    found: dict[str, str] = {}
    for row in items(results, "rows"):
        name, kind = str(row.get("policy")), row.get("kind")
        nature = mapping(told, name).get("kind")
        if nature in NATURES:
            found[name] = nature
        elif kind == "adapter" and name == BOTH_LEVELS:
            found[name] = "both"
        elif kind == "adapter":
            found[name] = "token" if is_token(results) and (not at_tokens or name in at_tokens) else "sequence"
        elif kind == "baseline" and "/" in name:
            found[name] = "autodeco"
    return found


def levels(results: Results) -> list[str]:
    """The levels of what was learned, ``sequence`` before ``token``; empty where nothing was."""
    natures = set(learned(results).values())
    return ["sequence"] * ("sequence" in natures) + ["token"] * bool(natures - {"sequence"})


def subjects(results: Results) -> list[str]:
    """Whom a page is about: what was learned, the adapter of the headline first; where nothing was, the baselines."""
    names = list(learned(results)) or [
        str(row.get("policy")) for row in items(results, "rows") if row.get("kind") == "baseline"
    ]
    names = list(dict.fromkeys(names or [str(row.get("policy")) for row in items(results, "differences")]))
    return sorted(names, key=lambda name: name != ADAPTER)


def judged(results: Results) -> str:
    """The first of whom the page is about: the adapter with budget, where it was judged."""
    return next(iter(subjects(results)), ADAPTER)


def chooser(results: Results) -> str | None:
    """The sequence-level adapter whose choices the results hold: the first."""
    return next((name for name, nature in learned(results).items() if nature == "sequence"), None)


def the(policy: str) -> str:
    """A policy inside a sentence: ``the adapter without budget``, and ``TURN`` or ``runs/mine/adapter`` as they are."""
    return f"the {policy}" if policy in OWN_NAMES else policy


def what(results: Results, policy: str) -> str:
    """What a learned policy is, where its name does not say so: ``token-level adapter``, ``AutoDeco heads``."""
    return "" if policy in OWN_NAMES else NATURES.get(learned(results).get(policy, ""), "")


def titled(policy: str) -> str:
    """A policy as a heading: training's own names with a capital; no letter of another name is changed."""
    return policy[0].upper() + policy[1:] if policy in OWN_NAMES else policy


def find(rows: Iterable[Mapping[str, Any]], **fields: object) -> Mapping[str, Any]:
    """The first row in which all ``fields`` have these values; empty where there is none."""
    return next((row for row in rows if all(row.get(name) == value for name, value in fields.items())), {})


def single_strategy(results: Results) -> str | None:
    """The one static strategy that was best on validation, by its name."""
    found = find((row for row in items(results, "differences") if row.get("baseline_strategy")), baseline=SINGLE)
    name = found.get("baseline_strategy") or find(items(results, "rows"), policy=SINGLE).get("chosen")
    return None if name is None else str(name)


def without_twin(results: Results, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """``rows`` without the best single strategy, where the same numbers stand in the strategy's own row."""
    twin = find(rows, policy=single_strategy(results))
    return [row for row in rows if not twin or row.get("policy") != SINGLE]


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one budget: fractions with their 95 % interval, and whether it tops its column."""

    estimate: float | None
    low: float | None
    high: float | None
    chosen: str | None
    best: bool

    @property
    def interval(self) -> str:
        """``32.4–36.1`` in percent; empty where an end is missing."""
        return interval(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Line:
    """One policy of the table, with one cell per column; ``what`` says of a learned one what its name does not."""

    policy: str
    kind: str
    what: str
    single: bool  # this static strategy is the best single one
    cells: tuple[Cell, ...]
    n_problems: str
    n_samples: str


@dataclass(frozen=True, slots=True)
class Table:
    """Policies down; budgets, their mean and the area under their curve across."""

    columns: tuple[int | str, ...]
    lines: tuple[Line, ...]


_KINDS = ("adapter", "best", "baseline", "mixed", "static", "oracle")


def table(results: Results) -> Table:
    """The rows of a run as a table: adapters, BEST, baselines, MIXED, every static strategy, and the oracle.

    The oracle knows the best action of each problem in hindsight; it tops no column.
    """
    single = single_strategy(results)
    rows = without_twin(results, items(results, "rows"))
    columns: list[int | str] = [*budgets(results)]
    columns += [name for name in ("mean", "area") if any(row.get("k") == name for row in rows)]
    kinds = {str(row.get("policy")): str(row.get("kind")) for row in reversed(rows)}
    names = list(dict.fromkeys(str(row.get("policy")) for row in rows))
    names.sort(key=lambda name: _KINDS.index(kinds[name]) if kinds[name] in _KINDS else len(_KINDS))
    fair = [row for row in rows if row.get("kind") != "oracle"]
    known = [(row.get("k"), value) for row in fair if (value := number(row.get("estimate"))) is not None]
    top = {k: max((value for own, value in known if own == k), default=None) for k in columns}
    lines = []
    for name in names:
        own = [row for row in rows if str(row.get("policy")) == name]
        found = [(k, find(own, k=k)) for k in columns]
        cells = tuple(
            Cell(
                estimate=(estimate := number(row.get("estimate"))),
                low=number(row.get("low")),
                high=number(row.get("high")),
                chosen=str(row["chosen"]) if row.get("chosen") is not None else None,
                best=kinds[name] != "oracle" and estimate is not None and estimate == top[k],
            )
            for k, row in found
        )
        sizes = _distinct(own, "n_problems"), _distinct(own, "n_samples")
        lines.append(Line(name, kinds[name], what(results, name), name == single, cells, *sizes))
    return Table(tuple(columns), tuple(lines))


def _distinct(rows: Iterable[Mapping[str, Any]], key: str) -> str:
    """One number where the rows agree, else the smallest and the largest."""
    values = sorted({value for row in rows if (value := number(row.get(key))) is not None})
    return "–".join(count(value) for value in dict.fromkeys([values[0], values[-1]])) if values else MISSING
