"""Baselines that have something to choose: TURN's temperature from unlabelled prompts, EDT and dynamic temperature on
validation problems.
"""

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict

from rheostat.baselines import Baseline
from rheostat.baselines.dynamic_temperature import DynamicTemperature
from rheostat.baselines.edt import EntropyBasedTemperature
from rheostat.baselines.turn import TEMPERATURES, Aggregation, TokenEntropy, turning_point
from rheostat.decoding.policy import NamedPolicy
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.files import atomic_write, make_folder
from rheostat.rollouts.collect import rollout_key
from rheostat.tasks.base import Split
from rheostat.types import FinishReason, Prompt
from rheostat.verbs.run import Run, Sampled

TURN_PROMPTS, TURN_SAMPLES = 64, 2  # that TURN looks at for each temperature, and completions of each
EDT = {f"T0 = {t0:g}, θ = {theta:g}": (t0, theta) for t0 in (0.5, 1.0, 1.5) for theta in (0.1, 0.3, 1.0)}
_AS_LLAMA_CPP = Strategy(top_k=40, top_p=0.95, min_p=0.05)  # its defaults
DYNAMIC = {
    f"T = {low:g} to {high:g}, e = {exponent:g}{str(cut).removeprefix('T=1')}": (low, high, exponent, cut)
    for low, high in ((0, 1), (0, 1.5), (0.5, 1), (0.5, 1.5))
    for exponent in (1, 0.5)
    for cut in (Strategy(), _AS_LLAMA_CPP)
}


@dataclass(frozen=True)
class Tuned:
    """The baselines as they are judged.

    Attributes:
        strategies: those that are one strategy.
        majority: of these, the strategy whose samples vote (maj@k).
        policies: those that are token-level policies.
        chosen: how each was chosen, for the results.
    """

    strategies: Mapping[str, Strategy] = field(default_factory=dict)
    majority: Mapping[str, Strategy] = field(default_factory=dict)
    policies: Mapping[str, NamedPolicy] = field(default_factory=dict)
    chosen: Mapping[str, object] = field(default_factory=dict)


def tune(run: Run, baselines: Sequence[Baseline], budgets: Sequence[int], samples: int) -> Tuned:
    """Choose each baseline's parameters on the validation problems, ``samples`` completions each."""
    strategies: dict[str, Strategy] = {}
    majority: dict[str, Strategy] = {}
    policies: dict[str, NamedPolicy] = {}
    chosen: dict[str, object] = {}
    if Baseline.TURN in baselines:
        strategies["TURN"], majority["TURN"], chosen["TURN"] = _turn(run)
    if Baseline.EDT in baselines:
        edt = {name: EntropyBasedTemperature(*values) for name, values in EDT.items()}
        policies["EDT"], chosen["EDT"] = _best(run, "EDT", edt, budgets, samples)
    if Baseline.DYNAMIC in baselines:
        dynamic = {name: DynamicTemperature(*values) for name, values in DYNAMIC.items()}
        name = "dynamic temperature"
        policies[name], chosen[name] = _best(run, name, dynamic, budgets, samples)
    return Tuned(strategies, majority, policies, chosen)


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


class _Watched(BaseModel):
    """What TURN saw at one temperature, as the run's folder keeps it; the completions themselves are not kept, and
    nobody judged them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float
    entropy: float
    rollouts: int
    tokens: int
    truncated: int
    seconds: float


def _turn(run: Run) -> tuple[Strategy, Strategy, dict[str, object]]:
    """TURN's temperatures for best-of-N, which is what pass@k asks for, and for voting; verdicts are not looked at."""
    problems = run.splits[Split.VALIDATION]
    spread = np.linspace(0, len(problems) - 1, min(TURN_PROMPTS, len(problems))).astype(int)
    prompts = [run.task.prompt(problems[index]) for index in spread]
    watched, fresh = [], 0
    total = len(TEMPERATURES) * len(prompts) * TURN_SAMPLES
    with run.phase("rollouts TURN"), run.console.progress("TURN", total, "") as bar:
        for done, temperature in enumerate(TEMPERATURES, start=1):
            own, is_fresh = _watched(run, prompts, temperature)
            watched.append(own)
            fresh += own.rollouts * is_fresh
            bar(done * len(prompts) * TURN_SAMPLES, total, 0)
    rollouts, tokens, truncated = (
        sum(getattr(own, name) for own in watched) for name in ("rollouts", "tokens", "truncated")
    )
    seconds = round(sum(own.seconds for own in watched), 6)
    run.sampled["TURN, entropies"] = Sampled(rollouts, fresh, tokens, truncated, 0, seconds)
    entropy_T = [own.entropy for own in watched]
    best, voting = (
        turning_point(TEMPERATURES, entropy_T, own) for own in (Aggregation.BEST_OF_N, Aggregation.MAJORITY)
    )
    chosen: dict[str, object] = {"chosen": f"T = {best:g}", "majority": f"T = {voting:g}"}
    curve = {"temperatures": TEMPERATURES, "entropy": [round(value, 6) for value in entropy_T]}
    return Strategy(best), Strategy(voting), chosen | curve


def _watched(run: Run, prompts: Sequence[Prompt], temperature: float) -> tuple[_Watched, bool]:
    """What there is to see at one temperature, and if it was sampled now: from the run's folder where it is there,
    ``turn/<hash>.json``, named by a hash of everything that shapes the completions."""
    seed, most, order = run.config.seed, run.task.max_tokens, run.config.order
    samples = range(TURN_SAMPLES)
    requests = [Request(prompt, Strategy(temperature), n, seed, most) for prompt in prompts for n in samples]
    keys = "\n".join(rollout_key(run.engine.info, order, request) for request in requests)
    path = make_folder(run.out / "turn") / f"{hashlib.blake2b(keys.encode(), digest_size=16).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged: measured anew
        return _Watched.model_validate_json(path.read_bytes()), False
    start, observer = time.perf_counter(), TokenEntropy()
    completions = run.engine.generate(requests, order=order, observer=observer)
    watched = _Watched(
        temperature=temperature,
        entropy=float(observer.mean_N(len(requests)).mean()),
        rollouts=len(completions),
        tokens=sum(len(completion.token_ids) for completion in completions),
        truncated=sum(completion.finish_reason is FinishReason.LENGTH for completion in completions),
        seconds=round(time.perf_counter() - start, 6),
    )
    atomic_write(path, watched.model_dump_json())
    return watched, True
