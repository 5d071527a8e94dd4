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
SINGLE = "best single strategy"
MISSING = "–"


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
    """Whether the results are those of the token level."""
    return results.get("kind") == "token"


def judged(results: Results) -> str:
    """The adapter that the headline is about: the one with budget, or the first where that one was not judged."""
    names = [str(row.get("policy")) for row in items(results, "differences")]
    names += [str(row.get("policy")) for row in items(results, "rows") if row.get("kind") == "adapter"]
    return ADAPTER if ADAPTER in names or not names else names[0]


def find(rows: Iterable[Mapping[str, Any]], **fields: object) -> Mapping[str, Any]:
    """The first row in which all ``fields`` have these values; empty where there is none."""
    return next((row for row in rows if all(row.get(name) == value for name, value in fields.items())), {})


def single_strategy(results: Results) -> str | None:
    """The one static strategy that was best on validation, by its name."""
    found = find((row for row in items(results, "differences") if row.get("baseline_strategy")), baseline=SINGLE)
    return str(found["baseline_strategy"]) if found else None


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one budget: fractions with their 95 % interval, and whether it tops its column."""

    estimate: float | None
    low: float | None
    high: float | None
    chosen: str | None
    best: bool

    @property
    def half(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def text(self) -> str:
        """``34.2 ± 1.8`` in percent, or the sign for a missing number."""
        if self.estimate is None or self.half is None:
            return percent(self.estimate)
        return f"{percent(self.estimate)} ± {percent(self.half)}"


@dataclass(frozen=True, slots=True)
class Line:
    """One policy of the table, with one cell per column."""

    policy: str
    kind: str
    single: bool  # this static strategy is the best single one
    cells: tuple[Cell, ...]
    n_problems: str
    n_samples: str


@dataclass(frozen=True, slots=True)
class Table:
    """Policies down, budgets and their mean across."""

    columns: tuple[int | str, ...]
    lines: tuple[Line, ...]


_KINDS = ("adapter", "oracle", "best", "baseline", "mixed", "static")


def table(results: Results) -> Table:
    """The rows of a run as a table: adapters first, then BEST, MIXED and every static strategy."""
    single = single_strategy(results)
    rows = items(results, "rows")
    if find(rows, policy=single):  # the same numbers as this strategy's own row, which carries the mark
        rows = [row for row in rows if row.get("policy") != SINGLE]
    columns: list[int | str] = [*budgets(results)]
    columns += ["mean"] if any(row.get("k") == "mean" for row in rows) else []
    kinds = {str(row.get("policy")): str(row.get("kind")) for row in reversed(rows)}
    names = list(dict.fromkeys(str(row.get("policy")) for row in rows))
    names.sort(key=lambda name: _KINDS.index(kinds[name]) if kinds[name] in _KINDS else len(_KINDS))
    known = [(row.get("k"), value) for row in rows if (value := number(row.get("estimate"))) is not None]
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
                best=estimate is not None and estimate == top[k],
            )
            for k, row in found
        )
        line = Line(name, kinds[name], name == single, cells, _distinct(own, "n_problems"), _distinct(own, "n_samples"))
        lines.append(line)
    return Table(tuple(columns), tuple(lines))


def _distinct(rows: Iterable[Mapping[str, Any]], key: str) -> str:
    """One number where the rows agree, else the smallest and the largest."""
    values = sorted({value for row in rows if (value := number(row.get(key))) is not None})
    return "–".join(count(value) for value in dict.fromkeys([values[0], values[-1]])) if values else MISSING
