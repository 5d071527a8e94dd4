"""``report.html``: one self-contained page that says what a run learned or chose, and how it was measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rheostat.errors import StoreError
from rheostat.files import atomic_write
from rheostat.reports import facts, grids, partial, reading, selection, template, together
from rheostat.reports.figures.svg import Drawing
from rheostat.reports.folders import FORMAT, Run, Stored, histories
from rheostat.reports.grids import Grid
from rheostat.reports.headline import counted, headline, in_words
from rheostat.reports.level import Level, level
from rheostat.reports.reading import Results


def sentence(results: Results) -> str:
    """What was learned or chosen, in plain words, with the numbers and their interval; also of ``results["token"]``."""
    return str(selection.headline(results) if results.get("kind") == "selection" else headline(results))


def write_report(results: Results, path: Path) -> None:
    """Render the results of a run as one HTML file that needs no network, and write it atomically.

    Args:
        results: the content of ``results.json``, of a selection or of either level; the token level may also stand
            under ``token``.
        path: the file to write; its folder must exist.

    Raises:
        StoreError: the results have another format, or the file cannot be written.
    """
    if results.get("format") != FORMAT:
        raise StoreError(
            f"results: format {results.get('format')!r} is not the format {FORMAT} that this rheostat reads; "
            "write the report with the version that made the results"
        )
    atomic_write(path, render([Run(path.parent, results, [], [], {}, None)]).html)


@dataclass(frozen=True, slots=True)
class Part:
    """What the page says of one run; ids begin with ``prefix``. Of the four kinds of content one is there."""

    prefix: str
    title: str
    headline: str
    path: str
    model: str
    task: str
    levels: list[Level]
    selection: selection.Page | None
    policies: Grid | None
    partial: partial.Partial | None
    stored: Grid | None
    damaged: int
    unread: str
    is_outdated: bool
    measured: facts.Facts
    seconds: list[tuple[str, str, float]]
    details: list[tuple[str, facts.Facts]]

    @property
    def drawings(self) -> list[Drawing]:
        found = [drawing for one in self.levels for drawing in one.drawings]
        found += [] if self.selection is None else self.selection.drawings
        return found + ([] if self.partial is None else self.partial.drawings)

    @property
    def palettes(self) -> set[int]:
        sizes = {size for one in self.levels for size in (one.palette, one.action_palette)}
        sizes |= {len(trace["legend"]) for one in self.levels for trace in one.traces}
        return sizes | {drawing.palette for drawing in self.drawings}


@dataclass(frozen=True, slots=True)
class Report:
    """The page as text, and its figures."""

    html: str
    drawings: list[Drawing]


def render(runs: Sequence[Run]) -> Report:
    """One page of one run or several; what a run lacks is left out.

    Raises:
        ConfigError: the runs are of different models, tasks, orders, kinds or test problems.
    """
    together.require_alike(runs)
    parts = [_part(run, f"run{number}-" if len(runs) > 1 else "") for number, run in enumerate(runs, start=1)]
    palettes = template.palettes({size for part in parts for size in part.palettes})
    overview = _overview(runs) if len(runs) > 1 else None
    html = template.render("page.html.jinja", parts=parts, palettes=palettes, overview=overview)
    return Report(html, [drawing for part in parts for drawing in part.drawings])


def _part(run: Run, prefix: str) -> Part:
    results: Results = run.results or {}
    kind, token = results.get("kind"), reading.mapping(results, "token")
    chosen = selection.view(results, prefix) if kind == "selection" else None
    fixed = grids.policies(results) if kind == "policies" else None
    unjudged = partial.view(run, prefix) if run.results is None else None
    levels = []
    if chosen is None and fixed is None and unjudged is None:
        shared = {key: results.get(key) for key in ("model", "task", "order")}
        levels = [level(_with_training(run, results), prefix)]
        levels += [level(shared | dict(token) | {"kind": "token"}, prefix)] if token else []
    return Part(
        prefix=prefix,
        title=f"Seed {facts.seed(results)}" if results else run.path.name,
        headline=_headline(run, unjudged),
        path=str(run.path),
        model=_model(run),
        task=str(results.get("task") or (run.stored and ", ".join(run.stored.tasks)) or _trained_on(run)),
        levels=levels,
        selection=chosen,
        policies=fixed,
        partial=unjudged,
        stored=None if run.stored is None else _stored(run.stored),
        damaged=0 if run.stored is None else run.stored.damaged,
        unread=run.unread,
        is_outdated=run.is_outdated,
        measured=facts.measured(results) if fixed is not None else [],
        seconds=facts.seconds(results) if fixed is not None else [],
        details=facts.details(results),
    )


def _headline(run: Run, unjudged: partial.Partial | None) -> str:
    """The part's content in a line."""
    if unjudged is not None:
        return unjudged.title
    results: Results = run.results or {}
    if results.get("kind") == "policies":
        return "Fixed strategies as they are"
    return selection.headline(results).title if results.get("kind") == "selection" else headline(results).title


def _model(run: Run) -> str:
    """The model by name, from the results, the store or an adapter."""
    name = reading.mapping(run.results or {}, "model").get("model") or (run.stored and run.stored.model)
    return str(name or next((own.base_model.id for own in run.adapters.values()), "an unknown model"))


def _trained_on(run: Run) -> str:
    return str(
        next((own.training["task"] for own in run.adapters.values() if "task" in own.training), "an unknown task")
    )


def _with_training(run: Run, results: Results) -> Results:
    """The results with the training history that lies beside them, where they hold none."""
    known = histories(run)
    return results if reading.mapping(results, "training") or not known else {**results, "training": known}


def _stored(stored: Stored) -> Grid:
    """What the rollout store holds, policy by policy."""
    rows = [
        [
            grids.name_cell(row["policy"]),
            grids.count_cell(row["rollouts"]),
            grids.count_cell(row["problems"]),
            grids.share_cell(row["right"]),
            grids.Cell(f"{row['tokens'] / row['rollouts']:.1f}", value=row["tokens"] / row["rollouts"]),
            grids.count_cell(row["cut"]),
            grids.count_cell(row["missing"]),
        ]
        for row in stored.rows
    ]
    names = ["strategy or policy", "rollouts", "problems", "right, %", "mean tokens", "cut off", "no verdict"]
    return Grid(names, rows)


@dataclass(frozen=True, slots=True)
class Overview:
    """What stands above several runs."""

    title: str
    evidence: str
    side_by_side: list[tuple[str, Grid]]
    differing: list[str]


def _overview(runs: Sequence[Run]) -> Overview:
    judged = {run.path: run.results for run in runs if run.results is not None and run.results.get("rows")}
    many = in_words(len(runs)).capitalize()
    is_repeated = together.differ_in_seed_only(runs)
    seeds = ", ".join(facts.seed(run.results or {}) for run in runs)
    title = f"{many} runs that differ in their seed alone: {seeds}" if is_repeated else f"{many} runs side by side"
    levels = [("", judged), ("Token level", {path: reading.mapping(one, "token") for path, one in judged.items()})]
    tables = [
        (name, together.side_by_side({path: one for path, one in found.items() if one.get("differences")}))
        for name, found in levels
    ]
    found = [headline(one) for one in judged.values() if reading.items(one, "differences")]
    verdicts = [own.verdict for one in found for own in one.judgements or [one]]
    evidence = counted(verdicts, "in")
    said = f"Over the best single strategy: {evidence}. " if evidence else ""
    said += "Every run stands for itself: intervals are those of its problems, and runs are never added up."
    different = [] if is_repeated else together.differing(runs)
    return Overview(title, said, [(name, grid) for name, grid in tables if grid], different)
