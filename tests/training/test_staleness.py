"""Which weights sample which batch, and that a crew, here without Ray, ends with what one process ends with."""

import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import QUICK, SPACE, CountingEngine, TinyTask, adapter_for, problems, run_of, same_weights, without_rates
from torch import Tensor

from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter, TokenConfig
from rheostat.decoding.policy import TokenPolicy
from rheostat.decoding.recording import Recorder
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Request
from rheostat.rollouts.collect import Answer, Call, Crew, judge_all
from rheostat.training import groups as grouping
from rheostat.training.groups import Groups, collect_groups
from rheostat.training.token import train_token
from rheostat.training.token_config import TokenTrainingConfig
from rheostat.training.update import Lesson, Update, Updated, update
from rheostat.types import Completion

PLAIN = QUICK.model_copy(update={"dropout": 0.0})


class Workers(CountingEngine):
    """A crew in this process, which answers its calls from the last to the first."""

    workers = 3

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__(fails_at)
        self.calls_in_batches: list[int] = []

    def answer(
        self, calls: Iterable[Call], order: Order, policy: TokenPolicy | None, recorder: Recorder | None = None
    ) -> Iterator[Answer]:
        asked = list(calls)
        self.calls_in_batches.append(len(asked))
        for call in reversed(asked):
            own, copy = deepcopy(policy), deepcopy(recorder)
            completions = self.generate(call.requests, own, order, copy)
            start_RA = own.start_RA if isinstance(own, AdaptiveDecoding) else None
            verdicts = judge_all(TinyTask(), call.problems, completions)
            yield Answer(call, completions, verdicts, None if copy is None else copy.steps(), start_RA)


class Watch(CountingEngine):
    """Keeps the weights of each call of a training batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, Tensor]]] = []

    def generate(self, requests: Sequence[Request], policy: Any = None, *others: Any) -> list[Completion]:
        if requests[0].sample > 0:  # validation begins at sample 0
            self.seen.append((requests[0].sample // QUICK.group, deepcopy(policy.adapter.state_dict())))
        return super().generate(requests, policy, *others)


def stale(staleness: int, config: TokenTrainingConfig = QUICK) -> TokenTrainingConfig:
    return config.model_copy(update={"staleness": staleness})


def close(one: TokenAdapter, other: TokenAdapter) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(mine, theirs, rtol=0, atol=1e-5) for mine, theirs in pairs)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_batch_s_is_sampled_from_the_weights_after_update_s_minus_1_minus_k(staleness: int, tmp_path: Path) -> None:
    engine, after = Watch(), [adapter_for(QUICK).state_dict()]

    def kept(job: Update, lesson: Lesson) -> Updated:
        after.append(update(job, lesson).weights)
        return update(job, lesson)

    run = run_of(tmp_path, stale(staleness), engine=engine, updater=kept)
    history = train_token(adapter_for(QUICK), run)
    assert [step for step, _ in engine.seen] == [1, 2, 3, 4, 5, 6]
    expected = [max(0, step - 1 - staleness) for step in range(1, 7)]
    assert [line["policy_version"] for line in history.lines] == [0, *expected]
    for (step, weights), version in zip(engine.seen, expected, strict=True):
        agrees = [all(torch.equal(weights[name], w[name]) for name in weights) for w in after]
        assert agrees == [number == version for number in range(7)], step


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("fails_at", [2, 5, 8])
def test_a_stale_run_resumed_in_the_middle_is_undisturbed(staleness: int, fails_at: int, tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, broken, resumed = (adapter_for(QUICK) for _ in range(3))
    config = stale(staleness)
    history = train_token(whole, run_of(tmp_path / "whole", config))
    with pytest.raises(KeyboardInterrupt):
        train_token(broken, run_of(tmp_path / "broken", config, engine=CountingEngine(fails_at)))
    again = train_token(resumed, run_of(tmp_path / "broken", config, engine=CountingEngine()))
    assert same_weights(whole, resumed)
    assert without_rates(again.lines) == without_rates(history.lines)


def test_staleness_changes_the_run(tmp_path: Path) -> None:
    adapters = [adapter_for(QUICK) for _ in range(3)]
    for number, adapter in enumerate(adapters):
        (folder := tmp_path / str(number)).mkdir()
        train_token(adapter, run_of(folder, stale(number)))
    assert not same_weights(adapters[0], adapters[1])
    assert not same_weights(adapters[1], adapters[2])


# --- A crew ---


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_crew_ends_with_what_one_process_ends_with(staleness: int, tmp_path: Path) -> None:
    for name in ("one", "crew"):
        (tmp_path / name).mkdir()
    one, many = adapter_for(PLAIN), adapter_for(PLAIN)
    config, crew = stale(staleness, PLAIN), Workers()
    assert isinstance(crew, Crew)
    history = train_token(one, run_of(tmp_path / "one", config))
    others = train_token(many, run_of(tmp_path / "crew", config, engine=crew))
    assert close(one, many)
    for mine, theirs in zip(history.lines, others.lines, strict=True):
        for name in ("step", "policy_version", "reward", "actions", "tokens", "validation"):
            assert mine.get(name) == theirs.get(name)
        assert mine.get("loss") == pytest.approx(theirs.get("loss"), abs=1e-5)
    assert set(crew.calls_in_batches) == {2, 3}  # 4 prompts of 8 rollouts each, 8 validation problems of 4


@pytest.mark.parametrize("fails_at", [4, 7, 12, 16])
def test_a_crew_interrupted_during_an_update_or_after_it_is_undisturbed(fails_at: int, tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, resumed = adapter_for(QUICK), adapter_for(QUICK)
    history = train_token(whole, run_of(tmp_path / "whole", stale(1), engine=Workers()))
    with pytest.raises(KeyboardInterrupt):
        train_token(adapter_for(QUICK), run_of(tmp_path / "broken", stale(1), engine=Workers(fails_at)))
    again = train_token(resumed, run_of(tmp_path / "broken", stale(1), engine=Workers()))
    assert same_weights(whole, resumed)
    assert without_rates(again.lines) == without_rates(history.lines)


def test_an_interruption_leaves_no_update_behind(tmp_path: Path) -> None:
    """It would draw from the process's generator beside the next run's."""
    made: list[Updated] = []

    def slow(job: Update, lesson: Lesson) -> Updated:
        time.sleep(0.1)
        made.append(update(job, lesson))
        return made[-1]

    with pytest.raises(KeyboardInterrupt):
        train_token(adapter_for(QUICK), run_of(tmp_path, stale(1), engine=Workers(7), updater=slow))
    assert len(made) == 1


@pytest.mark.parametrize(("staleness", "overlaps"), [(0, False), (1, True)])
def test_a_stale_crew_samples_during_updates(staleness: int, overlaps: bool, tmp_path: Path) -> None:
    crew = Workers()
    waited: list[bool] = []

    def patient(job: Update, lesson: Lesson) -> Updated:
        """Waits a while for the next batch to be asked for."""
        asked, until = len(crew.calls_in_batches), time.monotonic() + (5 if overlaps and len(waited) < 5 else 0.05)
        while len(crew.calls_in_batches) == asked and time.monotonic() < until:
            time.sleep(0.001)
        waited.append(len(crew.calls_in_batches) > asked)
        return update(job, lesson)

    train_token(adapter_for(QUICK), run_of(tmp_path, stale(staleness), engine=crew, updater=patient))
    assert waited == [overlaps] * 5 + [False]  # there is nothing to sample after the last batch


def groups_of(engine: Any, policy: TokenPolicy, prompts: int = 5) -> Groups:
    return collect_groups(
        engine, TinyTask(broken=["train-2"]), problems(prompts), policy, SPACE.order,
        torch.arange(1, prompts + 1), 8, 16, 3, Recorder(SPACE.order, 1.0),
    )  # fmt: skip


def test_parts_are_joined_as_one_call_would_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what an adapter read of the sequence level that it starts from."""
    monkeypatch.setattr(grouping, "_LEAST", 1)
    sequence = SequenceAdapter(SequenceConfig(5, budgets=(1, 8)), SPACE, 1)
    with torch.no_grad():
        sequence.output.weight.normal_(generator=torch.Generator().manual_seed(0))
    adapter = TokenAdapter.starting_from(sequence, TokenConfig(5, budgets=(1, 8), width=8), 0)
    one, many = (groups_of(engine, AdaptiveDecoding(adapter)) for engine in (CountingEngine(), Workers()))
    assert one.steps is not None
    assert many.steps is not None
    assert many.reward_PG[2].isnan().logical_not().all()  # the crew's judges have a task of their own
    one.reward_PG[2] = many.reward_PG[2]
    for name in ("reward_PG", "length_PG", "truncated_PG", "budget_P", "cot_P"):
        assert torch.equal(getattr(one, name), getattr(many, name)), name
    for name in ("hidden_NH", "request_N", "t_N", "budget_N", "parallel_N", "action_N", "entropy_N", "p_max_N"):
        assert torch.equal(getattr(one.steps, name), getattr(many.steps, name)), name
    for name in ("log_pi_NA", "log_p_NA"):
        torch.testing.assert_close(getattr(one.steps, name), getattr(many.steps, name), rtol=0, atol=1e-6)
    assert one.start_RA is not None
    assert many.start_RA is not None
    assert one.start_RA.shape == (40, 2)
    assert float(one.start_RA.std()) > 0.01
    torch.testing.assert_close(one.start_RA, many.start_RA, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("prompts", "group", "workers", "size"),
    [
        (24, 12, 2, 3),  # four calls for each worker
        (24, 12, 8, 3),  # one, of 36 requests
        (24, 12, 32, 1),  # what there is
        (512, 16, 8, 16),
        (4, 64, 2, 1),
        (1, 2, 8, 1),
    ],
)
def test_prompts_in_a_call(prompts: int, group: int, workers: int, size: int) -> None:
    assert grouping._prompts_in_part(prompts, group, workers) == size
