"""Groups of rollouts: G completions per prompt under the policy that is being trained, judged and recorded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rheostat.adapters.token import AdaptiveDecoding
from rheostat.decoding.policy import TokenPolicy
from rheostat.decoding.recording import Recorder, Steps
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Engine, Request
from rheostat.rollouts.collect import Answer, Call, Crew, judge_all
from rheostat.tasks.base import Task
from rheostat.types import FinishReason, Problem

_LEAST = 32  # requests in a worker's call: an engine takes hardly less time for fewer
_CALLS = 4  # for each worker, of that size or larger, so that none is idle for long before the last is done


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
        start_RA: log π of the sequence level for each rollout, where the policy starts from one.
    """

    reward_PG: Float[Tensor, "P G"]
    length_PG: Int[Tensor, "P G"]
    truncated_PG: Bool[Tensor, "P G"]
    budget_P: Int[Tensor, " P"]
    steps: Steps | None
    cot_P: Bool[Tensor, " P"]
    start_RA: Float[Tensor, "R A"] | None = None

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
        engine: samples under ``policy``; of a crew, every worker takes some of the prompts.
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
    call = Call(tuple(requests), tuple(problem for problem in problems for _ in range(group)))
    if isinstance(engine, Crew):
        answer = _answered_in_parts(
            engine, call, _prompts_in_part(len(problems), group, engine.workers) * group, policy, order, recorder
        )
    else:
        answer = _answered(engine, task, call, policy, order, recorder)
    rewards = [float("nan") if verdict.correct is None else float(verdict.correct) for verdict in answer.verdicts]
    shape = (len(problems), group)
    return Groups(
        torch.tensor(rewards).reshape(shape),
        torch.tensor([len(done.token_ids) for done in answer.completions]).reshape(shape),
        torch.tensor([done.finish_reason is FinishReason.LENGTH for done in answer.completions]).reshape(shape),
        budget_P,
        answer.steps,
        torch.tensor([prompt.cot for prompt in prompts]),
        answer.start_RA,
    )


def _answered(
    engine: Engine, task: Task, call: Call, policy: TokenPolicy, order: Order, recorder: Recorder | None
) -> Answer:
    completions = engine.generate(call.requests, policy, order, recorder)
    verdicts = judge_all(task, call.problems, completions)
    start_RA = policy.start_RA if isinstance(policy, AdaptiveDecoding) else None
    if start_RA is not None:
        start_RA = start_RA[: len(call.requests)].clone()  # the policy writes over it in its next call
    return Answer(call, completions, verdicts, None if recorder is None else recorder.steps(), start_RA)


def _answered_in_parts(
    crew: Crew, whole: Call, size: int, policy: TokenPolicy, order: Order, recorder: Recorder | None
) -> Answer:
    """The same from many workers, ``size`` requests each; what is recorded is numbered as in ``whole``."""
    starts = range(0, len(whole.requests), size)
    calls = [Call(whole.requests[start : start + size], whole.problems[start : start + size]) for start in starts]
    answers = {id(answer.call): answer for answer in crew.answer(calls, order, policy, recorder)}
    parts = [answers[id(call)] for call in calls]
    steps = [
        replace(part.steps, request_N=part.steps.request_N + start)
        for start, part in zip(starts, parts, strict=True)
        if part.steps is not None
    ]
    starts_RA = [part.start_RA for part in parts if part.start_RA is not None]
    return Answer(
        whole,
        [completion for part in parts for completion in part.completions],
        [verdict for part in parts for verdict in part.verdicts],
        Steps.joined(steps) if steps else None,
        torch.cat(starts_RA) if starts_RA else None,
    )


def _prompts_in_part(prompts: int, group: int, workers: int) -> int:
    """Enough for an engine to be busy with and few enough to share evenly; fewer where workers would go without."""
    least, most = -(-_LEAST // group), -(-prompts // workers)
    return min(most, max(least, -(-prompts // (_CALLS * workers))))
