"""Several runs on one page: what must agree, what differs, and each one's main numbers side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rheostat.errors import ConfigError
from rheostat.reports import facts, reading
from rheostat.reports.folders import Run
from rheostat.reports.grids import Cell, Grid, name_cell, share_cell
from rheostat.reports.reading import ADAPTER, SINGLE, Results, number, p_value, points


def require_alike(runs: Sequence[Run]) -> None:
    """Runs on one page have one model, task, order of transforms, kind, set of test problems, and set of the validation
    problems that chose BEST; and no folder is given twice.

    Raises:
        ConfigError: two do not; names both values.
    """
    known: dict[Path, Path] = {}
    for run in runs:
        if (before := known.get(run.path.resolve())) is not None:
            raise ConfigError(f"{before} and {run.path} are the same folder; name each run once")
        known[run.path.resolve()] = run.path
    first = _identity(runs[0])
    for run in runs[1:]:
        for name, value in _identity(run).items():
            if name in first and value != first[name]:
                raise ConfigError(
                    f"{runs[0].path} and {run.path} cannot stand on one page: {name} {first[name][0]} and {value[0]}; "
                    "write a report of each"
                )


def _identity(run: Run) -> dict[str, tuple[str, str]]:
    """What must agree, as it is said and as it is compared; what is not known is left out."""
    if run.results is None:
        stored = run.stored
        if stored is None or stored.model is None:
            return {}
        return {"the model": _model(stored.model, stored.fingerprint), "the task": ("+".join(stored.tasks), "")}
    found = _level(run.results)
    if token := reading.mapping(run.results, "token"):
        found |= {f"{name} of the token level": value for name, value in _level(token).items()}
    return found


def _level(results: Results) -> dict[str, tuple[str, str]]:
    model = reading.mapping(results, "model")
    found = {
        "the kind": (str(results.get("kind")), ""),
        "the model": _model(model.get("model"), model.get("fingerprint")),
        "the task": (str(results.get("task")), ""),
        "the order of transforms": (str(results.get("order")), ""),
    }
    splits = {"selection": ["validation"], "policies": ["test"]}.get(str(results.get("kind")), ["validation", "test"])
    problems = {f"the {split} problems": _problems(results, split) for split in splits}
    return found | {name: value for name, value in problems.items() if value is not None}


def _model(name: object, fingerprint: object) -> tuple[str, str]:
    return f"{name} ({str(fingerprint)[:8]})", str(fingerprint)


def _problems(results: Results, split: str) -> tuple[str, str] | None:
    """The problems of a split: their number and hash; of earlier results what the configuration says of them. None
    where nothing is known."""
    own = reading.mapping(reading.mapping(results, "splits"), split)
    if own:
        return f"{own.get('n')} (hash {str(own.get('hash'))[:8]})", str(own.get("hash"))
    config = reading.mapping(results, "config")
    sizes = config.get("problems")
    size = sizes.get(split) if isinstance(sizes, Mapping) else config.get("limit", sizes)
    if size is None and split == "validation":
        return None
    start = (config.get("test_from") or 0) if split == "test" else 0
    return f"{size} from number {start}", ""


def differing(runs: Sequence[Run]) -> list[str]:
    """The names of configuration values in which the runs differ, of either level; the strategies among them."""
    flat = [_settings(run.results) for run in runs if run.results is not None]
    names = dict.fromkeys(name for one in flat for name in one)
    return [name for name in names if len({str(one.get(name)) for one in flat}) > 1]


def _settings(results: Results) -> dict[str, Any]:
    own = dict(facts.flat(reading.mapping(results, "config")))
    own["strategies"] = results.get("strategies") if results.get("kind") != "selection" else None
    token = reading.mapping(reading.mapping(results, "token"), "config")
    return own | {f"token.{name}": value for name, value in facts.flat(token)}


def differ_in_seed_only(runs: Sequence[Run]) -> bool:
    """Whether the runs are repetitions."""
    names = set(differing(runs))
    return all(run.results is not None for run in runs) and bool(names) and names <= {"seed", "token.seed"}


def side_by_side(results: Mapping[Path, Results]) -> Grid:
    """The main numbers of each run, and of each adapter where it judged several, on a line of its own; never one number
    of several."""
    out = []
    for path, one in results.items():
        judged, single = reading.judged(one), reading.single_strategy(one)
        rows, gaps = reading.items(one, "rows"), reading.items(one, "differences")
        theirs = reading.find(rows, policy=single, k="mean")
        for policy in [judged] if judged == ADAPTER else reading.subjects(one):
            line = [name_cell(facts.seed(one), str(path))]
            line += [_with_name(reading.find(rows, policy=policy, k="mean"), policy), _with_name(theirs, str(single))]
            for rival in (SINGLE, "BEST"):
                gap = reading.find(gaps, policy=policy, baseline=rival, k="mean")
                low, high = points(gap.get("low")), points(gap.get("high"))
                line.append(Cell(points(gap.get("estimate")), f"{low} to {high}", number(gap.get("estimate"))))
                line.append(Cell(p_value(gap.get("p_holm")), value=number(gap.get("p_holm"))))
            out.append(line)
    return Grid(["seed", "policy, %", "best single, %", "difference", "p (Holm)", "minus BEST", "p (Holm)"], out)


def _with_name(row: Mapping[str, Any], name: str) -> Cell:
    cell = share_cell(row.get("estimate"), row.get("low"), row.get("high"))
    return Cell(cell.text, f"{cell.small}\n{name}", cell.value)
