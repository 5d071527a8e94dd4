"""How a run was measured: counts, time by phase, and everything that shaped the numbers, as pairs of name and text."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from rheostat.reports import reading
from rheostat.reports.reading import MISSING, Results, count, number, percent

Facts = list[tuple[str, str]]


def measured(results: Results) -> Facts:
    """The facts of the measurement, in words."""
    counts = reading.mapping(results, "counts")
    lines = reading.table(results).lines
    facts = [("test problems", " / ".join(dict.fromkeys(line.n_problems for line in lines)))]
    facts += [("samples per problem and strategy", " / ".join(dict.fromkeys(line.n_samples for line in lines)))]
    facts += [
        (f"{name} is uniform over", ", ".join(map(str, own)))
        for name, own in reading.mapping(results, "mixed").items()
        if isinstance(own, list)
    ]
    facts += [("problems per split", ", ".join(f"{split} {count(size)}" for split, size in _splits(results)))]
    rollouts = number(counts.get("rollouts"))
    facts += [("samples drawn", count(rollouts)), ("tokens drawn", count(counts.get("tokens")))]
    for key, name in (("truncated", "cut off at the token limit"), ("without_verdict", "without a verdict")):
        value = number(counts.get(key))
        share = f" ({100 * value / rollouts:.2g} %)" if value and rollouts else ""
        facts.append((name, count(value) + share))
    for k, ends in reading.mapping(results, "bounds").items():
        both = (
            [number(ends.get(name)) for name in ("missing_wrong", "missing_right")] if isinstance(ends, Mapping) else []
        )
        if None not in both:
            name = f"mean of the strategies at B = {k}, missing verdicts wrong to right"
            facts.append((name, f"{percent(both[0])} to {percent(both[1])} %"))
    return [(name, text) for name, text in facts if text not in ("", MISSING)]


def _splits(results: Results) -> list[tuple[str, object]]:
    """Split sizes: ``splits`` of the results, or whole numbers that the configuration keeps under a split's name."""
    given = reading.mapping(results, "splits")
    if given:
        sizes = {split: size.get("n") if isinstance(size, Mapping) else size for split, size in given.items()}
        return [(str(split), size) for split, size in sizes.items()]
    found: dict[str, object] = {}
    for key, value in flat(reading.mapping(results, "config")):
        last = key.rsplit(".", 1)[-1]
        if last in ("train", "validation", "test") and isinstance(value, int) and not isinstance(value, bool):
            found.setdefault(last, value)
    return list(found.items())


def seconds(results: Results) -> list[tuple[str, str, float]]:
    """Phases of the run with their seconds, and each one's part of the whole in percent."""
    spent = [(name, number(value)) for name, value in flat(reading.mapping(results, "wall_seconds"))]
    known = [(name, value) for name, value in spent if value is not None]
    total = sum(value for _, value in known)
    return [(name, f"{value:,.1f}".replace(",", "\u202f"), 100 * value / (total or 1)) for name, value in known]


def seed(results: Results) -> str:
    """The seed of a run."""
    return plain(reading.mapping(results, "seeds").get("run"))


def details(results: Results) -> list[tuple[str, Facts]]:
    """Everything else that shaped the numbers, group by group, as (name, value) pairs."""
    groups = {title: reading.mapping(results, title.lower()) for title in ("Model", "Machine", "Versions", "Seeds")}
    groups["Configuration"] = reading.mapping(results, "config")
    groups["Configuration of the token level"] = reading.mapping(reading.mapping(results, "token"), "config")
    found = [(title, [(k, plain(v)) for k, v in flat(group)]) for title, group in groups.items()]
    return [(title, pairs) for title, pairs in found if pairs]


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(value: object) -> str:
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
        return ", ".join(map(plain, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
