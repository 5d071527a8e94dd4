"""Every strategy, or a token policy, on every problem, several times: the rewards that training and evaluation read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from rheostat.decoding.policy import NamedPolicy
from rheostat.decoding.strategy import ActionSpace, Order
from rheostat.engines.base import Engine, Request
from rheostat.rollouts.collect import Progress, collect
from rheostat.rollouts.store import Rollout, RolloutStore
from rheostat.statistics import maj_at_k, pass_at_k
from rheostat.tasks.base import Task
from rheostat.types import FinishReason, Problem


@dataclass(frozen=True, slots=True)
class Sweep:
    """Rewards of A strategies on P problems with S samples each.

    Attributes:
        rewards_PAS: 1 right, 0 wrong, NaN without a verdict. Greedy decoding always gives the same completion,
            so its one sample is repeated.
        length_PAS: tokens written.
        truncated_PAS: ended at the token budget.
        label_PAS: which answer votes in self-consistency: 0 each right one, from 1 on the wrong ones, equal numbers
            for equal texts; -1 for none.
        sampled: how many completions were sampled, greedy ones once.
        tokens: how many tokens these hold.
        truncated: how many of these ended at the token budget.
        missing: how many of these have no verdict.
        seconds: how long these took, in whichever run sampled them; None: not known of all.
    """

    problems: tuple[Problem, ...]
    space: ActionSpace
    rewards_PAS: Float[NDArray[np.float32], "P A S"]
    length_PAS: Int[NDArray[np.int64], "P A S"]
    truncated_PAS: Bool[NDArray[np.bool_], "P A S"]
    label_PAS: Int[NDArray[np.int64], "P A S"]
    sampled: int
    tokens: int
    truncated: int
    missing: int
    seconds: float | None = None

    @classmethod
    def of(
        cls,
        problems: Sequence[Problem],
        space: ActionSpace,
        samples: int,
        rollouts: Sequence[Rollout],
        seconds: float | None = None,
    ) -> Self:
        """From rollouts in the order problem, strategy, sample."""
        shape = (len(problems), len(space), samples)
        return cls(tuple(problems), space, *_arrays(rollouts, shape), *_counts(rollouts), seconds)

    def pass_at(self, k: int, missing_is: float = 0.0) -> Float[NDArray[np.float64], "P A"]:
        """Unbiased pass@k of each problem and strategy; a missing verdict counts as ``missing_is``."""
        rewards_PAS = np.nan_to_num(self.rewards_PAS, nan=missing_is)
        return pass_at_k(rewards_PAS.sum(-1).astype(np.int64), self.rewards_PAS.shape[2], k)

    def maj_at(self, k: int) -> Float[NDArray[np.float64], "P A"]:
        """maj@k of each problem and strategy; what has no answer has no vote."""
        return np.stack([_maj_at(label_PS, k) for label_PS in self.label_PAS.swapaxes(0, 1)], axis=1)


@dataclass(frozen=True, slots=True)
class PolicySweep:
    """Rewards of one token policy on P problems with S samples each, drawn under one parallel budget.

    Attributes: as those of :class:`Sweep`, without the axis of strategies.
    """

    problems: tuple[Problem, ...]
    rewards_PS: Float[NDArray[np.float32], "P S"]
    length_PS: Int[NDArray[np.int64], "P S"]
    truncated_PS: Bool[NDArray[np.bool_], "P S"]
    label_PS: Int[NDArray[np.int64], "P S"]
    sampled: int
    tokens: int
    truncated: int
    missing: int
    seconds: float | None = None

    def pass_at(self, k: int, missing_is: float = 0.0) -> Float[NDArray[np.float64], " P"]:
        """Unbiased pass@k of each problem; a missing verdict counts as ``missing_is``."""
        rewards_PS = np.nan_to_num(self.rewards_PS, nan=missing_is)
        return pass_at_k(rewards_PS.sum(-1).astype(np.int64), self.rewards_PS.shape[1], k)

    def maj_at(self, k: int) -> Float[NDArray[np.float64], " P"]:
        """maj@k of each problem; what has no answer has no vote."""
        return _maj_at(self.label_PS, k)


def _maj_at(label_PS: Int[NDArray[np.int64], "P S"], k: int) -> Float[NDArray[np.float64], " P"]:
    return maj_at_k(label_PS, np.zeros(len(label_PS), dtype=np.int64), k)


def _arrays(
    rollouts: Sequence[Rollout], shape: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Rewards, lengths, what was truncated, and which answer each has."""
    verdicts = [np.nan if rollout.correct is None else float(rollout.correct) for rollout in rollouts]
    lengths = [rollout.tokens for rollout in rollouts]
    truncated = [rollout.finish_reason is FinishReason.LENGTH for rollout in rollouts]
    return (
        np.array(verdicts, dtype=np.float32).reshape(shape),
        np.array(lengths, dtype=np.int64).reshape(shape),
        np.array(truncated, dtype=bool).reshape(shape),
        np.array(_labels(rollouts), dtype=np.int64).reshape(shape),
    )


def _labels(rollouts: Sequence[Rollout]) -> list[int]:
    """What the verifier took for right is one answer, however it is written; wrong answers are equal where their texts
    are."""
    wrong: dict[tuple[str, str], int] = {}
    found = []
    for rollout in rollouts:
        if rollout.answer is None:
            found.append(-1)
        elif rollout.correct:
            found.append(0)
        else:
            found.append(wrong.setdefault((rollout.problem_id, rollout.answer), len(wrong) + 1))
    return found


def _counts(rollouts: Sequence[Rollout]) -> tuple[int, int, int, int]:
    """Distinct completions, their tokens, how many were truncated, how many have no verdict."""
    own = list({rollout.key: rollout for rollout in rollouts}.values())
    return (
        len(own),
        sum(rollout.tokens for rollout in own),
        sum(rollout.finish_reason is FinishReason.LENGTH for rollout in own),
        sum(rollout.correct is None for rollout in own),
    )


def sweep(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    space: ActionSpace,
    samples: int,
    seed: int,
    store: RolloutStore,
    progress: Progress | None = None,
) -> Sweep:
    """Sample what the store lacks of ``samples`` completions per problem and strategy, and return the rewards."""
    requests = [
        Request(prompt, strategy, sample, seed, task.max_tokens)
        for prompt in map(task.prompt, problems)
        for strategy in space
        for sample in range(samples)
    ]
    rollouts = collect(engine, task, problems, requests, store, order=space.order, progress=progress)
    return Sweep.of(problems, space, samples, rollouts, store.seconds(rollout.key for rollout in rollouts))


def sweep_policy(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    policy: NamedPolicy,
    order: Order,
    budget: int,
    samples: int,
    seed: int,
    store: RolloutStore,
    progress: Progress | None = None,
) -> PolicySweep:
    """Sample what the store lacks of ``samples`` completions per problem under a policy that sees B = ``budget``."""
    requests = [
        Request(prompt, None, sample, seed, task.max_tokens, budget)
        for prompt in map(task.prompt, problems)
        for sample in range(samples)
    ]
    rollouts = collect(engine, task, problems, requests, store, order=order, progress=progress, policy=policy)
    seconds = store.seconds(rollout.key for rollout in rollouts)
    return PolicySweep(tuple(problems), *_arrays(rollouts, (len(problems), samples)), *_counts(rollouts), seconds)
