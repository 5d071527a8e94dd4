"""What a policy is worth on each test problem: pass@k, the tokens it takes, and how early it is right.

At the sequence level a strategy is applied to all B samples of a prompt, so a policy's pass@k is
Σ_a π(a|x, B=k)·pass@k(x, a), with the unbiased pass@k of each strategy over all its samples. A token policy draws anew
at every token, so its pass@k is the unbiased estimate over samples drawn under B = k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from rheostat.decoding.policy import SequencePolicy
from rheostat.decoding.strategy import ActionSpace
from rheostat.errors import ConfigError
from rheostat.rollouts.sweep import PolicySweep, Sweep
from rheostat.statistics import accuracy_within

PerProblem = Float[NDArray[np.float64], " P"]


@dataclass(frozen=True, slots=True)
class Judged:
    """One policy on P problems.

    Attributes:
        kind: ``adapter``, ``baseline``, ``best``, ``mixed``, ``oracle`` or ``static``.
        solved: pass@k of each problem, for each budget k.
        majority: maj@k likewise; empty where completions have no answers that could vote.
        tokens: how many tokens k samples take, for each budget k; None where that means nothing.
        within_PT: the share of single samples that are right within the first t tokens, for each t of a grid.
        samples: completions per problem behind the smallest of these estimates.
    """

    kind: str
    solved: Mapping[int, PerProblem]
    majority: Mapping[int, PerProblem]
    tokens: Mapping[int, PerProblem] | None
    within_PT: Float[NDArray[np.float64], "P T"] | None
    samples: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Every strategy of a sweep on the test problems, at each budget; what sequence-level policies mix.

    Attributes:
        solved: for each budget k, pass@k of each problem and strategy.
        majority: maj@k likewise; empty where completions have no answers that could vote.
        within_PAT: as ``Judged.within_PT``, of each strategy.
        grid: the T token budgets.
    """

    test: Sweep
    solved: Mapping[int, Float[NDArray[np.float64], "P A"]]
    majority: Mapping[int, Float[NDArray[np.float64], "P A"]]
    within_PAT: Float[NDArray[np.float64], "P A T"]
    grid: tuple[int, ...]

    @classmethod
    def of(cls, test: Sweep, budgets: Sequence[int], grid: Sequence[int]) -> "Measured":
        right_PAS = np.nan_to_num(test.rewards_PAS)
        within = [accuracy_within(test.length_PAS[:, a], right_PAS[:, a], grid) for a in range(len(test.space))]
        majority = {k: test.maj_at(k) for k in budgets} if has_answers(test.label_PAS) else {}
        return cls(test, {k: test.pass_at(k) for k in budgets}, majority, np.stack(within, axis=1), tuple(grid))

    def mixture(self, kind: str, pi: Mapping[int, Float[NDArray[np.float64], "P A"]]) -> Judged:
        """A policy that applies strategy a to all k samples of problem x with probability ``pi[k][x, a]``."""
        length_PA = self.test.length_PAS.mean(2)
        once_A = np.array([strategy.is_greedy for strategy in self.test.space])  # whose k samples are one
        first_PA = next(iter(pi.values()))
        return Judged(
            kind,
            {k: (pi_PA * self.solved[k]).sum(1) for k, pi_PA in pi.items()},
            {k: (pi[k] * majority_PA).sum(1) for k, majority_PA in self.majority.items() if k in pi},
            {k: (pi_PA * length_PA * np.where(once_A, 1, k)).sum(1) for k, pi_PA in pi.items()},
            np.einsum("pa,pat->pt", first_PA, self.within_PAT),
            int(self.test.rewards_PAS.shape[2]),
        )

    def uniform(self, kind: str, own: ActionSpace, budgets: Sequence[int]) -> Judged:
        """Each strategy of ``own`` with equal probability, once per prompt.

        Raises:
            ConfigError: one of them was not measured, or under another order of transforms.
        """
        share_A = np.bincount(_positions("the uniform mixture", own, self.test.space), minlength=len(self.test.space))
        return self.mixture(kind, dict.fromkeys(budgets, np.tile(share_A / len(own), (len(self.test.problems), 1))))

    def static(self, kind: str, chosen: Mapping[int, int]) -> Judged:
        """Strategy number ``chosen[k]`` on all problems at budget k."""
        problems, strategies = len(self.test.problems), len(self.test.space)
        return self.mixture(kind, {k: np.eye(strategies)[np.full(problems, a)] for k, a in chosen.items()})


def sequence_choices(
    name: str,
    policy: SequencePolicy,
    measured: ActionSpace,
    embedding_PH: Float[Tensor, "P H"],
    budgets: Sequence[int],
    commit: bool,
) -> dict[int, Float[NDArray[np.float64], "P A"]]:
    """π(a | x, B = k) of a sequence-level policy over all strategies that were measured, at each budget k.

    Args:
        commit: it takes its most probable action, instead of drawing one.

    Raises:
        ConfigError: it chooses from strategies that were not measured, or under another order of transforms.
    """
    own_A = _positions(name, policy.space, measured)
    found = {}
    for k in budgets:
        pi_PA = policy.probabilities(embedding_PH, torch.full((len(embedding_PH),), k)).double().numpy()
        if commit:
            pi_PA = np.eye(len(own_A))[pi_PA.argmax(1)]
        found[k] = pi_PA @ np.eye(len(measured))[own_A]
    return found


def _positions(name: str, own: ActionSpace, measured: ActionSpace) -> list[int]:
    """Where an adapter's strategies stand among those that were measured."""
    unknown = [strategy for strategy in own if strategy not in measured.strategies]
    if unknown or own.order != measured.order:
        what = f"strategies that were not measured, like {unknown[0]}" if unknown else f"the order {own.order}"
        raise ConfigError(f"{name}: it has {what}; measure them as well, or evaluate it on its own")
    return [measured.strategies.index(strategy) for strategy in own]


def token_judged(kind: str, sweeps: Mapping[int, PolicySweep], grid: Sequence[int]) -> Judged:
    """A token policy from the samples that it drew under each B = k (one that does not see B has the same for all)."""
    first = next(iter(sweeps.values()))
    return Judged(
        kind,
        {k: sweep.pass_at(k) for k, sweep in sweeps.items()},
        {k: sweep.maj_at(k) for k, sweep in sweeps.items()} if has_answers(first.label_PS) else {},
        {k: k * sweep.length_PS.mean(1) for k, sweep in sweeps.items()},
        accuracy_within(first.length_PS, np.nan_to_num(first.rewards_PS), grid),
        min(sweep.rewards_PS.shape[1] for sweep in sweeps.values()),
    )


def has_answers(labels: Int[NDArray[np.int64], "..."]) -> bool:
    """Whether a majority can be had: programs, for one, have no answers."""
    return bool((labels >= 0).any())


def token_grid(most: int) -> tuple[int, ...]:
    """Token budgets at which accuracy is shown: doubling down from ``most``, with its three quarters."""
    halves = {max(1, most >> n) for n in range(6)} | {max(1, (3 * most) >> (n + 2)) for n in range(3)}
    return tuple(sorted(halves))
