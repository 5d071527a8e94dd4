"""The reward tensor against single requests, and pass@k against the fake engine's exact distribution."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rheostat.baselines.uniform import UniformMixture
from rheostat.decoding.policy import StepObserver, TokenPolicy
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.engines.base import Request
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.rollouts.store import Rollout, RolloutStore
from rheostat.rollouts.sweep import PolicySweep, Sweep, sweep, sweep_policy
from rheostat.seeding import derive_seed
from rheostat.tasks.base import Split
from rheostat.types import Completion, FinishReason, Problem, Prompt, Verdict

STRATEGIES = (Strategy(1.0), Strategy(0), Strategy(1.25, None, 0.8, 0.3))
SEED = 11


class LetterTask:
    """Up to two letters, "a" or "b", are written; one word of them, which may be empty, is right."""

    name = "letters"
    max_tokens = 2
    _ANSWERS = ("", "a", "aa", "b", "ba")

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.broken = frozenset(broken)

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        return [
            Problem(f"{split}-{i}", self.name, "letters", f"word {i}", self._ANSWERS[i % len(self._ANSWERS)])
            for i in range(start, start + count)
        ]

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        return Prompt(problem.id, f"{problem.question}:")

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        if problem.id in self.broken:
            raise OSError("no verifier")
        return Verdict(completion.text == problem.answer)


class CountingEngine(FakeEngine):
    requests = 0

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        self.requests += len(requests)
        return super().generate(requests, policy, order, observer)


def mild(text: str, tokens: tuple[int, ...]) -> list[float]:
    """Chances that differ from prompt to prompt, and leave something to each token."""
    return [derive_seed(text, str(tokens), token) / 2**63 for token in range(3)]


def engine() -> CountingEngine:
    return CountingEngine((EOS, "a", "b"), logits=mild)


@pytest.mark.parametrize("order", list(Order))
def test_rewards_stand_in_the_order_problem_strategy_sample(tmp_path: Path, order: Order) -> None:
    task, fake, space = LetterTask(), engine(), ActionSpace(STRATEGIES, order)
    problems = task.problems(Split.TRAIN, 12)
    with RolloutStore(tmp_path) as store:
        got = sweep(fake, task, problems, space, 5, SEED, store)
    assert got.problems == tuple(problems)
    assert got.space == space
    assert got.rewards_PAS.shape == (12, 3, 5)
    assert got.rewards_PAS.dtype == np.float32

    tokens = truncated = 0
    for p, problem in enumerate(problems):
        for a, strategy in enumerate(STRATEGIES):
            for s in range(5):
                request = Request(task.prompt(problem), strategy, s, SEED, task.max_tokens)
                [alone] = fake.generate([request], order=order)
                assert got.rewards_PAS[p, a, s] == task.verify(problem, alone).correct
                assert got.length_PAS[p, a, s] == len(alone.token_ids)
                if not strategy.is_greedy or s == 0:
                    tokens += len(alone.token_ids)
                    truncated += alone.finish_reason is FinishReason.LENGTH
    assert (got.sampled, got.tokens, got.truncated, got.missing) == (12 * (5 + 1 + 5), tokens, truncated, 0)
    assert 0 < truncated < got.sampled
    greedy_PS = got.rewards_PAS[:, 1]
    assert (greedy_PS == greedy_PS[:, :1]).all()
    assert 0 < greedy_PS.mean() < 1


def test_the_order_of_the_transforms_is_the_action_spaces(tmp_path: Path) -> None:
    """0.8 for "a", 0.12 for the end, 0.08 for "b": min-p first leaves "a" so much that top-p cuts all else; top-p
    first keeps the end, so that "aa" comes out with (0.8 / 0.92)² only."""
    fake = FakeEngine((EOS, "a", "b"), logits=lambda *_: np.log([0.12, 0.8, 0.08]))
    task, problem = LetterTask(), LetterTask().problems(Split.TRAIN, 3)[2]
    assert problem.answer == "aa"
    share = {}
    for order in Order:
        with RolloutStore(tmp_path / order) as store:
            space = ActionSpace((Strategy(1.0, None, 0.85, 0.12),), order)
            share[order] = sweep(fake, task, [problem], space, 200, SEED, store).pass_at(1)[0, 0]
    assert share[Order.VLLM] == 1
    assert share[Order.TRANSFORMERS] == pytest.approx((0.8 / 0.92) ** 2, abs=0.1)


def test_what_is_stored_is_not_sampled_again(tmp_path: Path) -> None:
    task, fake, space = LetterTask(), engine(), ActionSpace(STRATEGIES)
    problems = task.problems(Split.TRAIN, 6)
    with RolloutStore(tmp_path) as store:
        first = sweep(fake, task, problems, space, 4, SEED, store)
        assert fake.requests == first.sampled == 6 * 9
        again = sweep(fake, task, problems, space, 4, SEED, store)
        assert fake.requests == 6 * 9
        more = sweep(fake, task, problems, space, 6, SEED, store)
        assert fake.requests == more.sampled == 6 * 13
    np.testing.assert_array_equal(again.rewards_PAS, first.rewards_PAS)
    np.testing.assert_array_equal(more.rewards_PAS[:, :, :4], first.rewards_PAS)
    assert (again.sampled, again.tokens) == (first.sampled, first.tokens)


def test_pass_at_k_agrees_with_the_exact_distribution(tmp_path: Path) -> None:
    task, fake, space = LetterTask(), engine(), ActionSpace(STRATEGIES)
    problems = task.problems(Split.TEST, 60)
    with RolloutStore(tmp_path) as store:
        got = sweep(fake, task, problems, space, 16, SEED, store)
    chance_PA = np.array(
        [
            [fake.distribution(task.prompt(p), s, task.max_tokens).get(p.answer, 0.0) for s in STRATEGIES]
            for p in problems
        ]
    )
    assert 0.05 < chance_PA[:, 0].mean() < 0.5
    for k in (1, 2, 4, 8):
        error_PA = got.pass_at(k) - (1 - (1 - chance_PA) ** k)
        np.testing.assert_allclose(error_PA[:, 1], 0, atol=1e-12)  # greedy has one outcome
        for a in (0, 2):
            standard_error = error_PA[:, a].std(ddof=1) / np.sqrt(len(problems))
            assert 0 < standard_error < 0.05
            assert abs(error_PA[:, a].mean()) < 4 * standard_error


def test_missing_verdicts_are_counted_and_give_two_bounds(tmp_path: Path) -> None:
    """A verifier that fails on one problem of 40: each greedy completion counts once."""
    task, space = LetterTask(broken=["train-7"]), ActionSpace(STRATEGIES)
    problems = task.problems(Split.TRAIN, 40)
    with RolloutStore(tmp_path) as store:
        got = sweep(engine(), task, problems, space, 4, SEED, store)
    assert np.isnan(got.rewards_PAS[7]).all()
    assert np.isnan(got.rewards_PAS).sum() == 3 * 4
    assert got.missing == 4 + 1 + 4
    low_PA, high_PA = got.pass_at(2), got.pass_at(2, missing_is=1.0)
    assert (low_PA[7] == 0).all()
    assert (high_PA[7] == 1).all()
    others = np.arange(40) != 7
    np.testing.assert_array_equal(low_PA[others], high_PA[others])


def test_bounds_by_hand() -> None:
    """Of four samples one is right and one has no verdict: pass@2 is 1 − 3/6, or 1 − 1/6 were it right."""
    rewards_PAS = np.array([[[1, np.nan, 0, 0]]], dtype=np.float32)
    problem = LetterTask().problems(Split.TRAIN, 1)[0]
    lengths_PAS = np.ones((1, 1, 4), dtype=np.int64)
    got = Sweep(
        (problem,), ActionSpace((Strategy(1.0),)), rewards_PAS, lengths_PAS, lengths_PAS < 0, -lengths_PAS, 4, 8, 0, 1
    )
    assert got.pass_at(2)[0, 0] == pytest.approx(1 / 2)
    assert got.pass_at(2, missing_is=1.0)[0, 0] == pytest.approx(5 / 6)
    assert got.pass_at(1)[0, 0] == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match="pass@5"):
        got.pass_at(5)


@pytest.mark.parametrize("order", list(Order))
def test_a_policys_rewards_and_lengths_stand_in_the_order_problem_sample(tmp_path: Path, order: Order) -> None:
    task, fake = LetterTask(), engine()
    problems, policy = task.problems(Split.TRAIN, 10), UniformMixture(ActionSpace(STRATEGIES, order))
    with RolloutStore(tmp_path) as store:
        got = sweep_policy(fake, task, problems, policy, order, 2, 6, SEED, store)
        assert fake.requests == got.sampled == 60
        again = sweep_policy(fake, task, problems, policy, order, 2, 6, SEED, store)
        assert fake.requests == 60
    assert got.rewards_PS.shape == got.length_PS.shape == (10, 6)
    np.testing.assert_array_equal(again.rewards_PS, got.rewards_PS)
    tokens = truncated = 0
    for p, problem in enumerate(problems):
        for s in range(6):
            [alone] = fake.generate([Request(task.prompt(problem), None, s, SEED, task.max_tokens, 2)], policy, order)
            assert got.rewards_PS[p, s] == task.verify(problem, alone).correct
            assert got.length_PS[p, s] == len(alone.token_ids)
            tokens += len(alone.token_ids)
            truncated += alone.finish_reason is FinishReason.LENGTH
    assert (got.tokens, got.truncated, got.missing) == (tokens, truncated, 0)
    assert 0 < got.rewards_PS.mean() < 1


def test_samples_under_another_parallel_budget_are_others(tmp_path: Path) -> None:
    task, fake, policy = LetterTask(), engine(), UniformMixture(ActionSpace(STRATEGIES))
    problems = task.problems(Split.TRAIN, 10)
    with RolloutStore(tmp_path) as store:
        one, two = (sweep_policy(fake, task, problems, policy, Order.VLLM, b, 6, SEED, store) for b in (1, 2))
    assert fake.requests == 120
    assert (one.length_PS != two.length_PS).any()


def test_a_policys_pass_at_k_and_its_bounds_by_hand() -> None:
    rewards_PS = np.array([[1, np.nan, 0, 0], [0, 0, 0, 0]], dtype=np.float32)
    problems = tuple(LetterTask().problems(Split.TRAIN, 2))
    lengths_PS = np.ones((2, 4), dtype=np.int64)
    got = PolicySweep(problems, rewards_PS, lengths_PS, lengths_PS < 0, -lengths_PS, 8, 8, 0, 1)
    assert got.pass_at(2).tolist() == pytest.approx([1 / 2, 0])
    assert got.pass_at(2, missing_is=1.0).tolist() == pytest.approx([5 / 6, 0])
    assert got.pass_at(1).tolist() == pytest.approx([1 / 4, 0])


def test_right_answers_vote_together_and_wrong_ones_by_their_text() -> None:
    """Of 1/2, 0.5, 3, 3, 4 the first two are right: what a majority of three finds is counted by hand."""
    problems = [Problem(name, "t", "m", "?", "0.5") for name in ("a", "b")]
    written = [("1/2", True), ("0.5", True), ("3", False), ("3", False), ("4", False), (None, False)]
    base = Rollout("", "", "t", "m", "T=1", "vllm", 0, 0, 4, "", 1, FinishReason.STOP, None, "", None, "")
    rollouts = [
        replace(base, key=f"{p.id}{n}", problem_id=p.id, correct=right, answer=answer)
        for p in problems
        for n, (answer, right) in enumerate(written)
    ]
    got = Sweep.of(problems, ActionSpace((Strategy(1.0),)), 6, rollouts)
    assert got.label_PAS[0, 0].tolist() == [0, 0, 1, 1, 2, -1]
    votes = [[0, 0, 1, 1, 2, None][i] for i in range(6)]
    won = 0.0
    for drawn in itertools.combinations(votes, 3):
        counts = Counter(vote for vote in drawn if vote is not None)
        best = [answer for answer, count in counts.items() if count == max(counts.values())]
        won += (0 in best) / len(best)
    assert got.maj_at(3)[:, 0] == pytest.approx([won / 20] * 2)
    assert set(got.label_PAS[1, 0]) == {0, 3, 4, -1}
    as_policy = PolicySweep(tuple(problems), *(got_PAS[:, 0] for got_PAS in (
        got.rewards_PAS, got.length_PAS, got.truncated_PAS, got.label_PAS)), 12, 12, 0, 0)  # fmt: skip
    assert as_policy.maj_at(3) == pytest.approx(got.maj_at(3)[:, 0])
