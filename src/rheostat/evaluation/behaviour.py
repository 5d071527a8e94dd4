"""What a token policy does: entropies, actions by entropy and position, and traces (paper, appendix B.3)."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from rheostat.adapters.token import AdaptiveDecoding
from rheostat.decoding.policy import FixedStrategies, TokenPolicy
from rheostat.decoding.recording import Recorder, Steps, marginal_log_probability
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import Engine, Request
from rheostat.rollouts.collect import judge
from rheostat.tasks.base import Task
from rheostat.types import Completion, Problem, Prompt

_PROBLEMS = 48  # looked at token by token
_STATIC = Strategy(1.0)  # the representative static strategy of Figure 3: the model's own distribution
_EDGES = [0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, math.inf]  # of the entropy buckets, in nats
_POSITIONS = [0.0, 0.25, 0.5, 1.0]  # share of the token budget that is used up
_FREQUENT = 12  # tokens of each action
_SURE = 0.95  # of p_max: above it every action draws nearly the same token


def record(
    engine: Engine, requests: Sequence[Request], policy: TokenPolicy, order: Order
) -> tuple[list[Completion], Steps]:
    """Completions, and every one of their tokens."""
    recorder = Recorder(order, mask_above=1.0)
    completions = engine.generate(requests, policy, order, recorder)
    steps = recorder.steps()
    assert steps is not None, "nothing is masked"
    return completions, steps


def behaviour(
    engine: Engine, task: Task, problems: Sequence[Problem], policy: AdaptiveDecoding, name: str, seed: int
) -> dict[str, Any]:
    """``entropy``, ``frequent_tokens`` and ``traces``: what the policy does on some problems at its largest B."""
    space = policy.adapter.space
    spread = np.linspace(0, len(problems) - 1, min(_PROBLEMS, len(problems))).astype(int)
    chosen = [problems[index] for index in spread]
    parallel = max(policy.adapter.config.budgets or (1,))
    requests = [Request(task.prompt(problem), None, 0, seed, task.max_tokens, parallel) for problem in chosen]
    completions, adapted = record(engine, requests, policy, space.order)
    _, static = record(engine, requests, FixedStrategies([_STATIC] * len(requests), engine.info.device), space.order)
    edges = np.array(_EDGES)
    counts = [
        np.histogram(adapted.entropy_N[adapted.action_N == a].numpy(), edges)[0].tolist() for a in range(len(space))
    ]
    traced = _two(chosen, completions, task)
    return {
        "entropy": {
            "edges": [*_EDGES[:-1], round(max(float(adapted.entropy_N.max()), float(static.entropy_N.max()), 6.0), 3)],
            "static": {"policy": str(_STATIC), "counts": np.histogram(static.entropy_N.numpy(), edges)[0].tolist()},
            "adapted": {"policy": name, "counts": np.histogram(adapted.entropy_N.numpy(), edges)[0].tolist()},
            "actions": [str(strategy) for strategy in space],
            "by_action": counts,
            "grid": _grid(adapted),
            "parallel_budget": parallel,
        },
        "frequent_tokens": {
            str(strategy): _frequent(engine, completions, adapted[adapted.action_N == action])
            for action, strategy in enumerate(space)
        },
        "traces": [
            trace(engine, requests[index], completions[index], adapted[adapted.request_N == index], policy, name)
            | {"correct": judge(task, chosen[index], completions[index]).correct}
            for index in traced
        ],
    }


def _two(problems: Sequence[Problem], completions: Sequence[Completion], task: Task) -> list[int]:
    """One right and one wrong completion, the longest of each; fewer where there are none."""
    found: dict[bool | None, int] = {}
    by_length = sorted(range(len(problems)), key=lambda index: (-len(completions[index].token_ids), index))
    for index in by_length:
        found.setdefault(judge(task, problems[index], completions[index]).correct, index)
    return [found[verdict] for verdict in (True, False) if verdict in found]


def _frequent(engine: Engine, completions: Sequence[Completion], steps: Steps) -> list[list[Any]]:
    """Those of these steps' tokens that are drawn most often where the model is not sure, with their shares."""
    open_N = steps[steps.p_max_N <= _SURE]
    where = zip(open_N.request_N.tolist(), open_N.t_N.tolist(), strict=True)
    drawn = Counter(completions[request].token_ids[t] for request, t in where)
    most = sorted(drawn.items(), key=lambda item: (-item[1], item[0]))[:_FREQUENT]
    return [[engine.pieces([token])[0], round(n / drawn.total(), 4)] for token, n in most]


def _grid(steps: Steps) -> list[dict[str, Any]]:
    """The mean policy by entropy and by position in the token budget."""
    position_N = steps.t_N / steps.budget_N
    cells = []
    for low, high in pairwise(_EDGES):
        for first, last in pairwise(_POSITIONS):
            own_N = (steps.entropy_N >= low) & (steps.entropy_N < high) & (position_N >= first) & (position_N < last)
            if bool(own_N.any()):
                pi_A = steps.log_pi_NA[own_N].exp().mean(0)
                cells.append(
                    {
                        "entropy": [low, high if math.isfinite(high) else None],
                        "position": [first, last],
                        "n": int(own_N.sum()),
                        "pi": [round(float(share), 4) for share in pi_A],
                    }
                )
    return cells


def trace(
    engine: Engine, request: Request, completion: Completion, steps: Steps, policy: AdaptiveDecoding, name: str
) -> dict[str, Any]:
    """One generation, token by token; see :mod:`rheostat.reports.trace` for how it is shown.

    Args:
        engine: knows the text of tokens.
        request: what was asked.
        completion: what came out.
        steps: all its tokens.
        policy: decided.
        name: of the policy.
    """
    pi_NA = steps.log_pi_NA.exp()
    mu_N = marginal_log_probability(steps.log_pi_NA, steps.log_p_NA).exp()
    if policy.commit:
        mu_N = steps.log_p_NA.gather(1, steps.action_N[:, None]).squeeze(1).exp()
    pieces = engine.pieces(completion.token_ids)
    return {
        "prompt": request.prompt.text,
        "policy": name,
        "actions": [str(strategy) for strategy in policy.adapter.space],
        "budget": request.max_tokens,
        "parallel_budget": request.parallel_budget,
        "finish_reason": str(completion.finish_reason),
        "correct": None,
        "text": completion.text,
        "tokens": [
            {
                "text": piece,
                "action": int(steps.action_N[n]),
                "pi": [round(float(share), 4) for share in pi_NA[n]],
                "entropy": round(float(steps.entropy_N[n]), 4),
                "p_max": round(float(steps.p_max_N[n]), 4),
                "probability": round(float(mu_N[n]), 4),
                "remaining": int(steps.budget_N[n] - steps.t_N[n]),
            }
            for n, piece in enumerate(pieces)
        ],
    }


def traced(
    engine: Engine, prompt: Prompt, policy: AdaptiveDecoding, name: str, budget: int, max_tokens: int, seed: int
) -> tuple[list[Completion], list[dict[str, Any]]]:
    """``budget`` completions of a prompt under a token adapter, each with its trace."""
    requests = [Request(prompt, None, sample, seed, max_tokens, budget) for sample in range(budget)]
    completions, steps = record(engine, requests, policy, policy.adapter.space.order)
    traces = [
        trace(engine, request, completion, steps[steps.request_N == index], policy, name)
        for index, (request, completion) in enumerate(zip(requests, completions, strict=True))
    ]
    return completions, traces
