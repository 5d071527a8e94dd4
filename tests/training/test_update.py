"""An update is a function of its arguments, and ranks that share its tokens compute what one does."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny import QUICK, SPACE, TinyTask, adapter_for, problems, tiny_engine
from torch import Tensor

from rheostat.adapters.token import AdaptiveDecoding
from rheostat.decoding.recording import Recorder
from rheostat.training.groups import collect_groups
from rheostat.training.token_config import TokenTrainingConfig
from rheostat.training.update import Lesson, NotFinite, Rank, Update, Updated, update

CONFIG = QUICK.model_copy(update={"dropout": 0.0, "passes": 3, "beta": 0.1})


def lesson_of(prompts: int = 6) -> Lesson:
    policy = AdaptiveDecoding(adapter_for(CONFIG))
    groups = collect_groups(
        tiny_engine(), TinyTask(), problems(prompts), policy, SPACE.order, torch.ones(prompts, dtype=torch.int64),
        4, 0, 0, Recorder(SPACE.order, 1.0),
    )  # fmt: skip
    assert groups.steps is not None
    reward_R = groups.reward_PG.flatten()
    return Lesson(groups.steps, (reward_R - reward_R.mean())[groups.steps.request_N])


def job_of(lesson: Lesson, config: TokenTrainingConfig = CONFIG, optimizer: dict[str, Any] | None = None) -> Update:
    seeds = tuple(range(7, 7 + config.passes))
    return Update(adapter_for(config), optimizer or {}, config, 24, len(lesson.steps), 2e-3, seeds)


def together(job: Update, lesson: Lesson, ranks: int) -> list[Updated]:
    """Each rank in a thread; their vectors are summed behind a barrier."""
    given: dict[int, Tensor] = {}
    barrier = threading.Barrier(ranks)

    def work(number: int) -> Updated:
        def total(vector: Tensor) -> None:
            given[number] = vector.clone()
            barrier.wait(20)
            vector.copy_(sum(given[other] for other in range(ranks)))  # type: ignore[call-overload]
            barrier.wait(20)

        return update(job, lesson.share(number, ranks), Rank(number, total=total))

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(work, range(ranks)))


def moments(updated: Updated) -> Tensor:
    return torch.cat([state["exp_avg"].flatten() for state in updated.optimizer["state"].values()])


def flat(updated: Updated) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in updated.weights.values()])


def test_an_update_is_a_function_and_leaves_its_arguments_and_generators_alone() -> None:
    lesson, config = lesson_of(), CONFIG.model_copy(update={"dropout": 0.3})
    first = update(job_of(lesson, config), lesson)
    job = job_of(lesson, config, first.optimizer)
    before, generator = copy.deepcopy((job, lesson)), torch.get_rng_state()
    one = update(job, lesson)
    torch.rand(3)
    other = update(*before)
    torch.set_rng_state(generator)
    update(job, lesson)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(flat(one), flat(other))
    assert torch.equal(moments(one), moments(other))
    for now, was in zip(job.adapter.state_dict().values(), before[0].adapter.state_dict().values(), strict=True):
        assert torch.equal(now, was)
    for number, state in before[0].optimizer["state"].items():
        assert all(torch.equal(job.optimizer["state"][number][name], state[name]) for name in state)
    # Adam goes on where it was: from another state, and with other seeds, it ends elsewhere
    assert not torch.equal(flat(one), flat(update(job_of(lesson, config), lesson)))
    assert [float(state["step"]) for state in one.optimizer["state"].values()] == [6.0] * len(one.optimizer["state"])


def test_shares_are_the_tokens_once_each() -> None:
    lesson = lesson_of()
    parts = [lesson.share(rank, 5) for rank in range(5)]
    assert max(len(part.steps) for part in parts) - min(len(part.steps) for part in parts) <= 1
    assert torch.equal(torch.cat([part.steps.log_pi_NA for part in parts]), lesson.steps.log_pi_NA)
    assert torch.equal(torch.cat([part.advantage_N for part in parts]), lesson.advantage_N)
    for part in parts:  # no view of all tokens, which would travel with it
        assert part.steps.hidden_NH.untyped_storage().nbytes() == part.steps.hidden_NH.numel() * 2


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_compute_the_gradient_of_one(ranks: int) -> None:
    """Adam's first moment after one step is a tenth of the gradient; and after three steps all is still the same."""
    lesson = lesson_of()
    single = CONFIG.model_copy(update={"passes": 1, "max_gradient_norm": 1e6})
    alone = update(job_of(lesson, single), lesson)
    shared = together(job_of(lesson, single), lesson, ranks)
    assert float(moments(alone).abs().max()) > 1e-3
    for updated in shared:
        torch.testing.assert_close(10 * moments(updated), 10 * moments(alone), rtol=0, atol=1e-6)
        assert updated.metrics == pytest.approx(alone.metrics, rel=1e-5, abs=1e-6)
    alone = update(job_of(lesson), lesson)
    assert alone.metrics["gradient_norm"] > 0
    for updated in together(job_of(lesson), lesson, ranks):
        torch.testing.assert_close(flat(updated), flat(alone), rtol=0, atol=1e-5)


def test_more_ranks_than_tokens() -> None:
    lesson = lesson_of()
    few = Lesson(lesson.steps[torch.tensor([0, 5])], torch.tensor([1.0, -0.5]))
    alone, shared = update(job_of(few), few), together(job_of(few), few, 3)
    for updated in shared:
        torch.testing.assert_close(flat(updated), flat(alone), rtol=0, atol=1e-5)


def test_every_rank_hears_of_a_loss_that_is_not_finite() -> None:
    lesson = lesson_of()
    lesson.advantage_N[0] = float("nan")  # in the first rank's share
    with pytest.raises(NotFinite, match=r"^the loss became nan$"):
        update(job_of(lesson), lesson)
    said: list[str] = []
    barrier, given = threading.Barrier(2), {}

    def work(number: int) -> None:
        def total(vector: Tensor) -> None:
            given[number] = vector.clone()
            barrier.wait(20)
            vector.copy_(given[0] + given[1])
            barrier.wait(20)

        with pytest.raises(NotFinite) as caught:
            update(job_of(lesson), lesson.share(number, 2), Rank(number, total=total))
        said.append(str(caught.value))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))
    assert said == ["the loss became nan"] * 2
