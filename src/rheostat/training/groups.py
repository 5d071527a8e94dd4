"""Groups of rollouts: G completions per prompt under the policy that is being trained, judged and recorded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rheostat.decoding.policy import TokenPolicy
from rheostat.decoding.recording import Recorder, Steps
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Engine, Request
from rheostat.rollouts.collect import judge_all
from rheostat.tasks.base import Task
from rheostat.types import FinishReason, Problem


@dataclass(frozen=True, slots=True)
class Groups:
    """P prompts × G rollouts; rollout g of prompt p is number p · G + g in ``steps.request_N``.

    Attributes:
        reward_PG: 1 right, 0 wrong, NaN without a verdict.
        length_PG: tokens written.
        truncated_PG: ended by the token budget.
        budget_P: the parallel budget B that each group was drawn under.
        steps: the recorded tokens; None if there are none.
        cot_P: which prompts ask for a chain of thought.
    """

    reward_PG: Float[Tensor, "P G"]
    length_PG: Int[Tensor, "P G"]
    truncated_PG: Bool[Tensor, "P G"]
    budget_P: Int[Tensor, " P"]
    steps: Steps | None
    cot_P: Bool[Tensor, " P"]

    @property
    def rollouts(self) -> int:
        return self.reward_PG.numel()

    @property
    def tokens(self) -> int:
        return int(self.length_PG.sum())


def collect_groups(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    policy: TokenPolicy,
    order: Order,
    budget_P: Int[Tensor, " P"],
    group: int,
    first_sample: int,
    seed: int,
    recorder: Recorder | None = None,
    epoch: int = 0,
) -> Groups:
    """Sample, judge and, where asked, record G rollouts of each problem.

    Args:
        engine: samples under ``policy``.
        task: renders the prompts and judges.
        problems: P of them.
        policy: picks the action at every token.
        order: the order of the transforms.
        budget_P: the parallel budget that the policy sees.
        group: G.
        first_sample: the number of each problem's first sample; numbers that were never used give fresh draws.
        seed: of the request streams.
        recorder: a new one, which keeps what an update needs.
        epoch: passes over the problems before this one; a task may ask otherwise in another.
    """
    prompts = [task.prompt(problem, epoch) for problem in problems]
    requests = [
        Request(prompt, None, first_sample + number, seed, task.max_tokens, int(budget))
        for prompt, budget in zip(prompts, budget_P, strict=True)
        for number in range(group)
    ]
    completions = engine.generate(requests, policy, order, recorder)
    verdicts = judge_all(task, [problem for problem in problems for _ in range(group)], completions)
    rewards = [float("nan") if verdict.correct is None else float(verdict.correct) for verdict in verdicts]
    shape = (len(problems), group)
    return Groups(
        torch.tensor(rewards).reshape(shape),
        torch.tensor([len(done.token_ids) for done in completions]).reshape(shape),
        torch.tensor([done.finish_reason is FinishReason.LENGTH for done in completions]).reshape(shape),
        budget_P,
        None if recorder is None else recorder.steps(),
        torch.tensor([prompt.cot for prompt in prompts]),
    )
