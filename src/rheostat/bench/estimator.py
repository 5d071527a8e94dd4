"""`rheostat bench estimator`: variance of the token gradient, by the paper's estimator and its Rao–Blackwellisation.

All estimators read the same rollouts of the uniform initial policy, the point at which training starts. Its output
layer is zero, so that only that layer has a gradient, and the gradient of a rollout can be written down: Σ_t δ_t ⊗ z_t,
with z_t the layer's input and δ_t = onehot(a_t) − π for ``action``, posterior(a | y_t) − π for ``marginal``.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter, TokenConfig
from rheostat.console import Console
from rheostat.decoding.recording import Recorder, Steps
from rheostat.decoding.spaces import TABLE_14
from rheostat.engines import models
from rheostat.engines.base import Engine
from rheostat.engines.local import LocalEngine
from rheostat.environment import machine, versions
from rheostat.tasks.base import Split, Task
from rheostat.tasks.procedural import STEPS, ProceduralTask
from rheostat.training.groups import collect_groups
from rheostat.training.objectives import leave_one_out_advantage
from rheostat.training.surrogate import inputs_of

_PROMPTS = 24  # of each family and repetition
_GROUP = 16
_MASK = 0.95
_RESAMPLES = 1000  # of the bootstrap over prompts
_ESTIMATORS = ("action", "action+mask", "marginal")


def bench_estimator(model: str, repeats: int, console: Console) -> dict[str, Any]:
    """Variance ratios on four task families; ``repeats`` × 24 prompts × 16 rollouts each, intervals over prompts."""
    engine = LocalEngine(models.locate(model), name=model)
    families = {
        name: ProceduralTask(name, {name: member}, max_tokens=40, cot=1.0 if name == "count_bits" else 0.0)
        for name, member in STEPS.items()
    }
    rows: list[dict[str, Any]] = []
    pooled: dict[str, list[float]] = {}
    with console.progress("estimators", len(families), "") as bar:
        for done, (family, task) in enumerate(families.items()):
            gradients = family_gradients(engine, task, repeats * _PROMPTS)
            for name in _ESTIMATORS[:2]:
                ratio, low, high = variance_ratio(gradients[name], gradients["marginal"])
                rows.append(_row(f"{family}: {name}/marginal", ratio, low, high, "ratio"))
                pooled.setdefault(f"{name}/marginal", []).append(ratio)
            gap = _mean_gap(gradients["action"], gradients["marginal"])
            rows.append(_row(f"{family}: means apart, action and marginal", *gap, "standard errors"))
            bar(done + 1, len(families), 0)
    return {
        "bench": "estimator",
        "machine": machine() | {"device": engine.info.device, "threads": engine.info.threads},
        "versions": versions() | {"model": f"{model} {engine.info.dtype}"},
        "rows": rows,
        "ratios": {name: round(float(np.exp(np.mean(np.log(values)))), 3) for name, values in pooled.items()},
    }


def _row(case: str, value: float, low: float, high: float, unit: str) -> dict[str, Any]:
    return {"case": case, "value": round(value, 3), "unit": unit, "low": round(low, 3), "high": round(high, 3)}


def family_gradients(engine: Engine, task: Task, prompts: int) -> dict[str, NDArray[np.float64]]:
    """Per prompt the two half-groups' gradients under each estimator: arrays P × 2 × D.

    Two independent halves of a prompt's rollouts (8 each) tell the variance of the draws from that of the prompts.
    """
    problems = task.problems(Split.TRAIN, prompts)
    adapter = TokenAdapter(TokenConfig(engine.info.hidden_size), TABLE_14).eval().to(engine.info.device)
    policy = AdaptiveDecoding(adapter)
    ones_P = torch.ones(prompts, dtype=torch.int64)
    recorder = Recorder(TABLE_14.order, 1.0)
    groups = collect_groups(engine, task, problems, policy, TABLE_14.order, ones_P, _GROUP, 0, 0, recorder)
    steps = groups.steps
    assert steps is not None, "nothing is masked"
    assert adapter.standardizer is not None, "it reads hidden states"
    adapter.standardizer.fit(steps.hidden_NH.float())
    half_P2G = groups.reward_PG.nan_to_num().view(prompts, 2, _GROUP // 2)
    weight_R = leave_one_out_advantage(half_P2G.flatten(0, 1)).flatten() / (_GROUP // 2)
    z_NZ = _layer_inputs(adapter, steps)
    posterior_NA = (steps.log_pi_NA + steps.log_p_NA).softmax(1)
    drawn_NA = torch.nn.functional.one_hot(steps.action_N, len(TABLE_14)).float()
    pi_NA = steps.log_pi_NA.exp()
    seen_N1 = (steps.p_max_N <= _MASK).float()[:, None]
    delta = {
        "action": drawn_NA - pi_NA,
        "action+mask": (drawn_NA - pi_NA) * seen_N1,
        "marginal": posterior_NA - pi_NA,
    }
    found = {}
    for name, delta_NA in delta.items():
        token_ND = torch.einsum("na,nz->naz", delta_NA, z_NZ).flatten(1) * weight_R[steps.request_N][:, None]
        half_N = steps.request_N // (_GROUP // 2)
        gradient_MD = torch.zeros(prompts * 2, token_ND.shape[1]).index_add_(0, half_N, token_ND)
        found[name] = gradient_MD.view(prompts, 2, -1).double().numpy()
    return found


def _layer_inputs(adapter: TokenAdapter, steps: Steps) -> Tensor:
    """What the output layer reads at each token, and 1 for its bias."""
    seen: list[Tensor] = []
    hook = adapter.output.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().cpu()))
    with torch.no_grad():
        adapter.log_probabilities(inputs_of(steps, adapter.output.weight.device))
    hook.remove()
    return torch.cat([seen[0], torch.ones(len(seen[0]), 1)], dim=1)


def _draw_variance(gradient_P2D: NDArray[np.float64]) -> NDArray[np.float64]:
    """Per prompt the total variance of a half-group's gradient over draws: half the squared distance of the two."""
    distance_PD = gradient_P2D[:, 0] - gradient_P2D[:, 1]
    variance_P: NDArray[np.float64] = (distance_PD**2).sum(1) / 2
    return variance_P


def variance_ratio(
    above_P2D: NDArray[np.float64], below_P2D: NDArray[np.float64], seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of total variances over draws at equal rollouts, with its bootstrap interval over prompts.

    What prompts differ by is left out: it is the same for estimators of equal mean.
    """
    above_P, below_P = _draw_variance(above_P2D), _draw_variance(below_P2D)
    draws = np.random.default_rng(seed).integers(len(above_P), size=(_RESAMPLES, len(above_P)))
    ratios = above_P[draws].sum(1) / below_P[draws].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(above_P.sum() / below_P.sum()), float(low), float(high)


def _mean_gap(one_P2D: NDArray[np.float64], other_P2D: NDArray[np.float64]) -> tuple[float, float, float]:
    """How far the means of two estimators lie apart: standard errors per coordinate, root mean square; 1 is chance."""
    gap_PD = (one_P2D - other_P2D).mean(1)
    error_D = gap_PD.std(0, ddof=1) / np.sqrt(len(gap_PD))
    known_D = error_D > 0
    z_D = gap_PD.mean(0)[known_D] / error_D[known_D]
    rms = float(np.sqrt((z_D**2).mean()))
    return rms, float(np.quantile(np.abs(z_D), 0.025)), float(np.quantile(np.abs(z_D), 0.975))
