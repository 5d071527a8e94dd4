"""Baselines that have something to choose: TURN's temperature from unlabelled prompts, EDT and dynamic temperature on
validation problems.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rheostat.baselines import Baseline
from rheostat.baselines.dynamic_temperature import DynamicTemperature
from rheostat.baselines.edt import EntropyBasedTemperature
from rheostat.baselines.turn import TEMPERATURES, Aggregation, TokenEntropy, turning_point
from rheostat.decoding.policy import NamedPolicy
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.tasks.base import Split
from rheostat.verbs.run import Run

_PROMPTS, _SAMPLES = 64, 2  # that TURN looks at for each temperature, and completions of each
_EDT = {f"T0 = {t0:g}, θ = {theta:g}": (t0, theta) for t0 in (0.5, 1.0, 1.5) for theta in (0.1, 0.3, 1.0)}
_DYNAMIC = {f"T = {low:g} to {high:g}": (low, high) for low, high in ((0, 1), (0, 1.5), (0.5, 1), (0.5, 1.5))}


@dataclass(frozen=True)
class Tuned:
    """The baselines as they are judged.

    Attributes:
        strategies: those that are one strategy.
        policies: those that are token-level policies.
        chosen: how each was chosen, for the results.
    """

    strategies: Mapping[str, Strategy] = field(default_factory=dict)
    policies: Mapping[str, NamedPolicy] = field(default_factory=dict)
    chosen: Mapping[str, object] = field(default_factory=dict)


def tune(run: Run, baselines: Sequence[Baseline], budgets: Sequence[int], samples: int) -> Tuned:
    """Choose each baseline's parameters on the validation problems, ``samples`` completions each."""
    strategies: dict[str, Strategy] = {}
    policies: dict[str, NamedPolicy] = {}
    chosen: dict[str, object] = {}
    if Baseline.TURN in baselines:
        strategies["TURN"], chosen["TURN"] = _turn(run)
    if Baseline.EDT in baselines:
        edt = {name: EntropyBasedTemperature(*values) for name, values in _EDT.items()}
        policies["EDT"], chosen["EDT"] = _best(run, "EDT", edt, budgets, samples)
    if Baseline.DYNAMIC in baselines:
        dynamic = {name: DynamicTemperature(*values) for name, values in _DYNAMIC.items()}
        name = "dynamic temperature"
        policies[name], chosen[name] = _best(run, name, dynamic, budgets, samples)
    return Tuned(strategies, policies, chosen)


def _best(
    run: Run, what: str, candidates: Mapping[str, NamedPolicy], budgets: Sequence[int], samples: int
) -> tuple[NamedPolicy, dict[str, object]]:
    """The candidate with the highest pass@k on validation, averaged over the budgets."""
    problems, values = run.splits[Split.VALIDATION], {}
    for name, policy in candidates.items():
        found = run.sample(f"{what}, {name}", problems, policy, 1, samples)
        values[name] = float(np.mean([found.pass_at(k).mean() for k in budgets]))
    best = max(values, key=values.__getitem__)
    rounded = {name: round(value, 6) for name, value in values.items()}
    return candidates[best], {"chosen": best, "validation": rounded}


def _turn(run: Run) -> tuple[Strategy, dict[str, object]]:
    """TURN's temperature for best-of-N, which is what pass@k asks for; verdicts are not looked at."""
    problems = run.splits[Split.VALIDATION]
    spread = np.linspace(0, len(problems) - 1, min(_PROMPTS, len(problems))).astype(int)
    prompts = [run.task.prompt(problems[index]) for index in spread]
    entropy_T = []
    total = len(TEMPERATURES) * len(prompts) * _SAMPLES
    with run.phase("rollouts TURN"), run.console.progress("TURN", total, "") as bar:
        for done, temperature in enumerate(TEMPERATURES, start=1):
            strategy, observer = Strategy(temperature), TokenEntropy()
            requests = [
                Request(prompt, strategy, number, run.config.seed, run.task.max_tokens)
                for prompt in prompts
                for number in range(_SAMPLES)
            ]
            run.engine.generate(requests, order=run.config.order, observer=observer)
            entropy_T.append(float(observer.mean_N(len(requests)).mean()))
            bar(done * len(requests), total, 0)
    temperature = turning_point(TEMPERATURES, entropy_T, Aggregation.BEST_OF_N)
    curve = [round(value, 6) for value in entropy_T]
    return Strategy(temperature), {"chosen": f"T = {temperature:g}", "temperatures": TEMPERATURES, "entropy": curve}
