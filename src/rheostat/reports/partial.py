"""A run without results: what is there, and what is missing."""

from collections.abc import Sequence
from dataclasses import dataclass

from rheostat.reports.facts import Facts, flat, plain
from rheostat.reports.figures.svg import Drawing
from rheostat.reports.folders import Run, histories_so_far
from rheostat.reports.reading import NATURES, count, number, percent
from rheostat.reports.trainings import Shaped, trainings


@dataclass(frozen=True, slots=True)
class Partial:
    """A run that was interrupted, or one that trained and was never judged (``is_trained``)."""

    is_trained: bool
    title: str
    missing: list[str]
    facts: Facts
    training: list[Shaped]
    batches: list[tuple[int, str]]

    @property
    def drawings(self) -> list[Drawing]:
        return [part.figure for part in self.training]


def view(run: Run, prefix: str) -> Partial:
    """What the template takes of a run without results."""
    at_top = run.path / "adapter" in run.adapters
    is_trained = at_top and (bool(run.trainings) or bool(run.batches and not (run.path / "token").is_dir()))
    trains = bool(run.trainings or run.batches)
    missing = []
    if not is_trained:
        if trains and not run.adapters:
            missing.append("the adapter: its training has not ended")
        missing.append("results.json: the run was interrupted, or is still going on, before it was judged")
    title = "Trained, and not judged yet" if is_trained else f"Partial: {_short(missing)}"
    return Partial(
        is_trained=is_trained,
        title=title,
        missing=missing,
        facts=_facts(run),
        training=list(
            trainings({"training": histories_so_far(run)}, lambda nature, n: f"{prefix}{nature}-training-{n}")
        ),
        batches=_batches(run),
    )


def _short(missing: Sequence[str]) -> str:
    names = [text.partition(":")[0] for text in missing]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"


def _facts(run: Run) -> Facts:
    found: Facts = []
    if run.stored is not None:
        tokens, rollouts = run.stored.total("tokens"), run.stored.total("rollouts")
        found += [("rollouts so far", count(rollouts)), ("tokens so far", count(tokens))]
        for key, name in (("cut", "cut off at the token limit"), ("missing", "without a verdict")):
            found.append((name, count(run.stored.total(key))))
        found.append(("seed", ", ".join(map(str, run.stored.seeds))))
    if run.batches:
        found.append(
            ("batches of the token level so far", count(max(int(line.get("step", 0)) for line in run.batches)))
        )
    for path, description in run.adapters.items():
        seen = f", for B = {', '.join(map(str, description.budgets))}" if description.budgets else ""
        found.append((f"{path.relative_to(run.path)}/", f"{NATURES[description.kind]}{seen}"))
    told = run.trainings[0] if len(run.trainings) == 1 else {}
    summary = {k: v for k, v in told.items() if k not in ("training", "history", "config", "adapter")}
    found += [(name.replace("_", " "), plain(value)) for name, value in flat(summary)]
    return found


def _batches(run: Run) -> list[tuple[int, str]]:
    """Validation rewards of the token level, batch by batch."""
    found = []
    for line in run.batches:
        validation = line.get("validation")
        if isinstance(validation, dict) and number(validation.get("reward")) is not None:
            found.append((int(line.get("step", 0)), percent(validation["reward"])))
    return found
