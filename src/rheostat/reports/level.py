"""What the page says of one level: the sequence level (one strategy per prompt) or the token level (one at every
token). Both have the same keys; each has a few of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rheostat.reports import adapters, facts, grids, reading
from rheostat.reports.figures import forest, lines, token
from rheostat.reports.figures.svg import Drawing
from rheostat.reports.grids import Grid
from rheostat.reports.headline import Headline, headline
from rheostat.reports.reading import Results, count, number, percent, points
from rheostat.reports.trace import view
from rheostat.reports.trainings import Shaped, trainings

ORDERS = {"vllm": "temperature, min-p, top-k, top-p", "transformers": "temperature, top-k, top-p, min-p"}
_GROUPS = {  # key of the results: (what one of them is called, heading)
    "by_style": ("prompt style", "By prompt style"),
    "by_member": ("kind of problem", "{subject} and BEST, by kind of problem"),
    "by_level": ("level", "{subject} and BEST, by level of difficulty"),
    "by_subject": ("subject", "{subject} and BEST, by subject"),
}
_FIGURES = {"sequence": "", "token": "token-", "autodeco": "autodeco-"}  # what names of figures begin with
_HEADINGS = {
    "compared": "What was compared",
    "curve": "Accuracy against parallel budget",
    "forest": "{subject} minus its rivals, problem by problem",
    "table": "Every policy, every budget",
    "majority": "The most frequent answer",
    "within": "Accuracy against token budget",
    "costs": "What it costs",
    "tuned": "How the baselines were tuned",
    "training": "How the policy took shape",
    "choices": "What it chooses, by kind of problem",
    **{key: heading for key, (_, heading) in _GROUPS.items()},
    "entropy": "Where it acts: entropy and position",
    "frequent": "Which tokens it draws with which action",
    "lengths": "How long the answers are",
    "traces": "Two answers, token by token",
}


@dataclass(frozen=True, slots=True)
class Level:
    """One level as the template takes it; what the results lack is None or empty. ``prefix`` begins its ids."""

    prefix: str
    levels: list[str]
    is_token: bool
    headline: Headline
    model: str
    task: str
    who: str
    subject: str
    chooser: str
    adapters: list[tuple[list[str], str]]
    natures: list[str]
    actions: int
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
    training: list[Shaped]
    choices: list[dict[str, Any]]
    groups: dict[str, Grid]
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
        own = {key: heading.format(subject=self.subject) for key, heading in _HEADINGS.items()}
        if len(self.traces) != 2:
            own["traces"] = "Answers, token by token" if len(self.traces) > 1 else "An answer, token by token"
        shown = {key: bool(self.groups.get(key)) if key in _GROUPS else bool(getattr(self, key)) for key in own}
        shown["frequent"] |= bool(self.no_frequent)
        return {key: heading for key, heading in own.items() if shown[key]}

    @property
    def drawings(self) -> list[Drawing]:
        """All figures, in the order of the page."""
        first, last = (self.curve, self.forest, self.within), (self.entropy, self.frequent, self.lengths)
        found = [*first, *(part.figure for part in self.training), *last]
        return [drawing for drawing in found if drawing is not None]

    def what(self, key: str) -> str:
        """What one group of ``by_member``, ``by_style``, … is called."""
        return _GROUPS[key][0]

    @property
    def title(self) -> str:
        """The level, or both."""
        named = {"sequence": "Sequence level", "token": "Token level"}
        return "Both levels" if len(self.levels) > 1 else named[self.levels[0]] if self.levels else "Contents"

    @property
    def chooses(self) -> str:
        """How often a strategy is chosen."""
        often = {"sequence": "one strategy for each answer", "token": "one strategy at every token"}
        return ", or ".join(often[level] for level in self.levels)


@dataclass(frozen=True, slots=True)
class Majority:
    """maj@k: the table of all policies, and the paired differences."""

    table: reading.Table
    differences: Grid


def level(results: Results, prefix: str = "") -> Level:
    """One level of the results of a run; its ids begin with ``prefix``."""
    is_token, found = reading.is_token(results), reading.learned(results)
    levels = reading.levels(results)
    base, prefix = prefix, prefix + ("token-" if is_token and "sequence" not in levels else "")
    names, actions = reading.strategies(results), reading.actions(results)
    table = reading.table(results)

    legend, action_legend = ([own[index] for index in reading.by_randomness(own)] for own in (names, actions))

    def draw(what: Any, name: str) -> Drawing | None:
        return Drawing.of(lambda width, name: what(results, width, name), prefix + name, legend)

    def draw_tokens(what: Any, name: str) -> Drawing | None:
        return Drawing.of(lambda width, name: what(results, width, name), f"{base}token-{name}", action_legend)

    columns, rows = _entropy_table(results)
    frequent = draw_tokens(token.frequent, "frequent-tokens") if is_token else None
    return Level(
        prefix=prefix,
        levels=levels,
        is_token=is_token,
        headline=headline(results),
        model=str(reading.mapping(results, "model").get("model") or "the model"),
        task=str(results.get("task") or "the task"),
        who=reading.the(reading.judged(results)),
        subject=adapters.subject(results),
        chooser=reading.the(reading.chooser(results) or reading.judged(results)),
        adapters=adapters.adapters(results),
        natures=list(dict.fromkeys(found.values())),
        actions=adapters.number_of_actions(results),
        policies=tuple(line.policy for line in table.lines),
        baselines=[line.policy for line in table.lines if line.kind == "baseline" and line.policy not in found],
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
        training=list(trainings(results, lambda nature, n: f"{base}{_FIGURES[nature]}training-{n}")),
        choices=_choices(results),
        groups={key: grids.groups(results, key, what) for key, (what, _) in _GROUPS.items()},
        entropy=draw_tokens(token.entropy, "entropy") if is_token else None,
        entropy_table=rows,
        entropy_columns=columns,
        grid=_grid(results),
        frequent=frequent,
        no_frequent=_no_frequent(results) if frequent is None else "",
        lengths=draw_tokens(token.lengths, "lengths") if is_token else None,
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
    shared = {key: results.get(key) for key in ("kind", "budgets", "adapters", "lengths")}
    shared |= {key: found.get(key) for key in ("rows", "differences")}
    table = reading.table(shared)
    return Majority(table, grids.differences(reading.items(shared, "differences"))) if table.lines else None


def _key_numbers(results: Results) -> list[tuple[str, str, str]]:
    """Number, unit and meaning of the two levels and their difference; none where several are judged."""
    if headline(results).judgements:
        return []
    who = "the adapter" if reading.learned(results) else reading.judged(results)
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
        (percent(ours), "%", f"solved by {who}, mean over the budgets"),
        (percent(theirs), "%", f"solved by {single}, the best single strategy"),
        (difference, "points", f"paired difference, 95 % interval {low} to {high}"),
    ]


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
