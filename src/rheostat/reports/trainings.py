"""How policies took shape: the figure of each training, its legend, and what its caption says."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rheostat.reports import reading
from rheostat.reports.figures import training
from rheostat.reports.figures.svg import Drawing
from rheostat.reports.reading import PLAIN_ADAPTER, Results, number

_STARTS = {
    "sequence": "The policy starts without knowing which strategy helps, and moves towards the choices that are "
    "rewarded on training problems.",
    "token": "The policy starts by picking every action equally often, and moves towards the actions of rewarded "
    "answers.",
    "autodeco": "The heads start at a temperature of 1 and a top-p of 0.95 for every token, and learn from right "
    "answers.",
}
_DRAW = {
    "sequence": training.sequence_training,
    "token": training.token_training,
    "autodeco": training.autodeco_training,
}


@dataclass(frozen=True, slots=True)
class Shaped:
    """One training. ``nature`` is sequence, token or autodeco; ``start`` says how such a policy begins."""

    policy: str
    nature: str
    start: str
    figure: Drawing
    legend: list[str]
    caption: str


def trainings(results: Results, named: Callable[[str, int], str]) -> Iterator[Shaped]:
    """What can be drawn of ``results["training"]``; ``named`` makes a figure's name of the nature and the number."""
    for index, (policy, run) in enumerate(reading.mapping(results, "training").items(), start=1):
        history = reading.items(run, "history") if isinstance(run, Mapping) else []
        if not history:
            continue
        nature = _nature(history)
        names = [] if nature == "autodeco" else training.names_of(results, policy, nature == "token")
        legend = [names[place] for place in reading.by_randomness(names)]
        draw = _DRAW[nature]
        figure = Drawing.of(lambda width, name: draw(results, policy, width, name), named(nature, index), legend)  # noqa: B023 called at once
        if figure is not None:
            yield Shaped(policy, nature, _STARTS[nature], figure, legend, _caption(policy, nature, run))


def _nature(history: Sequence[Mapping[str, Any]]) -> str:
    """Whose history it is: an epoch of the sequence level has probabilities, one of AutoDeco a temperature."""
    if any("action_probability" in row for row in history):
        return "sequence"
    return "autodeco" if any("temperature" in row for row in history) else "token"


def _caption(policy: str, nature: str, run: Mapping[str, Any]) -> str:
    kept = number(run.get("kept_step" if nature == "token" else "kept_epoch"))
    if nature == "autodeco":
        text = (
            "The loss on the tokens of right answers to validation problems, and the temperature and the top-p that "
            "the heads give those tokens, on average."
        )
    elif nature == "token":
        text = (
            "Areas: the actions taken in each batch, at the tokens that training learned from. Line: validation "
            "reward, the percentage of validation problems solved, mean over the budgets, on the right axis."
        )
    else:
        text = (
            "Areas: how often each strategy is chosen, mean over validation problems. Line: validation reward, the "
            "percentage of validation problems solved over all budgets, on the right axis."
        )
    unit = "batch" if nature == "token" else "epoch"
    if kept == 0 and nature != "sequence":
        text += f" Dotted: {unit} 0. No {unit} did better on validation than the start, which was kept."
    elif kept is not None:
        text += f" Dotted: {unit} {kept:.0f}, which was kept."
    if policy == PLAIN_ADAPTER and nature == "sequence":
        text += " This adapter does not see B: one panel serves every budget."
    if estimator := run.get("estimator"):
        text += f" Gradient estimator: {str(estimator).replace('_', ' ')}."
    return text
