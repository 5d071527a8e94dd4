"""AutoDeco's loss against the whole vocabulary and numeric differentiation, and what its training finds."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from rheostat.adapters.autodeco import AutoDeco, AutoDecoConfig
from rheostat.decoding.policy import Decision, SamplingParameters, StepState
from rheostat.decoding.strategy import Strategy
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.errors import RheostatError
from rheostat.tasks.base import Split
from rheostat.training.autodeco import (
    STEEPNESS,
    AnswerRecorder,
    AnswerTokens,
    AutoDecoTrainingConfig,
    collect_right_answers,
    soft_top_p_loss,
    train_autodeco,
)
from rheostat.types import Completion, Problem, Prompt, Verdict

V = 40


def recorded(candidates: int, logits_NV: Tensor, token_N: Tensor, share_rows: bool = False) -> AnswerTokens:
    """Tokens as the decode loop shows them, each on a row of its own."""
    count = len(logits_NV)
    numbers_N = torch.arange(count)
    state = StepState(
        torch.zeros(count, 3), logits_NV, numbers_N, numbers_N, 0 * numbers_N, 0 * numbers_N + 4, 0 * numbers_N + 1,
        np.zeros(count, dtype=np.uint64),
    )  # fmt: skip
    recorder = AnswerRecorder(candidates)
    recorder.observe(state, Decision(SamplingParameters.of([Strategy()]), 0 * numbers_N), token_N)
    return recorder.tokens()


def some_logits(count: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(count, V, generator=generator) * 2 + 30
    return logits_NV, torch.randint(V, (count,), generator=generator)


def plain_loss(
    logits_NV: Tensor, token_N: Tensor, temperature_N: NDArray[np.float64], top_p_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The published formula over the whole vocabulary, in float64 numpy, one token at a time."""
    losses = []
    for logits_V, token, temperature, top_p in zip(
        logits_NV.double().numpy(), token_N.tolist(), temperature_N, top_p_N, strict=True
    ):
        p_V = np.exp((logits_V - logits_V.max()) / temperature)
        p_V /= p_V.sum()
        order_V = np.argsort(-p_V, kind="stable")
        mask_V = np.empty_like(p_V)
        mask_V[order_V] = np.exp(-STEEPNESS * np.maximum(np.cumsum(p_V[order_V]) - top_p, 0))
        losses.append(-np.log(p_V[token] * mask_V[token] / (p_V * mask_V).sum()))
    return np.array(losses)


def heads_at(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator) * 1.6 + 0.3, torch.rand(count, generator=generator) * 0.8 + 0.15


@pytest.mark.parametrize("candidates", [V, 256])
def test_the_loss_is_the_published_one_where_all_candidates_are_kept(candidates: int) -> None:
    logits_NV, token_N = some_logits()
    temperature_N, top_p_N = heads_at(1, len(token_N))
    found_N = soft_top_p_loss(temperature_N, top_p_N, recorded(candidates, logits_NV, token_N))
    expected_N = plain_loss(logits_NV, token_N, temperature_N.numpy(), top_p_N.numpy())
    np.testing.assert_allclose(found_N.numpy(), expected_N, rtol=2e-4, atol=2e-4)
    assert expected_N.std() > 1


def test_what_is_left_of_the_rest_is_exact_at_temperature_one_and_close_elsewhere() -> None:
    """Where a quarter of the tokens lies beyond the candidates; without truncation T = 1 is exact."""
    logits_NV, token_N = some_logits(200)
    logits_NV = logits_NV / 2
    tokens = recorded(20, logits_NV, token_N)
    assert 0.2 < float((tokens.rank_N == 20).float().mean()) < 0.8
    one_N = torch.ones(len(token_N))
    exact_N = soft_top_p_loss(one_N, one_N, tokens)
    np.testing.assert_allclose(exact_N.numpy(), plain_loss(logits_NV, token_N, one_N.numpy(), one_N.numpy()), atol=1e-4)
    for temperature, top_p in ((1.0, 0.8), (0.7, 0.9), (1.4, 0.95)):
        found_N = soft_top_p_loss(one_N * temperature, one_N * top_p, tokens).numpy()
        expected_N = plain_loss(logits_NV, token_N, one_N.numpy() * temperature, one_N.numpy() * top_p)
        assert abs(found_N.mean() - expected_N.mean()) < 0.1 < expected_N.std()
        assert np.corrcoef(found_N, expected_N)[0, 1] > 0.995


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9])
def test_where_the_cut_lies_among_the_rest_its_mass_is_that_of_many_small_tokens(top_p: float) -> None:
    logits_NV = torch.randn(30, 4000, generator=torch.Generator().manual_seed(0)) * 0.3
    token_N = logits_NV.argsort(descending=True)[torch.arange(30), torch.arange(30) * 60]  # at or above p or far beyond
    tokens, one_N = recorded(64, logits_NV, token_N), torch.ones(30)
    found_N = soft_top_p_loss(one_N, top_p * one_N, tokens).numpy()
    expected_N = plain_loss(logits_NV, token_N, one_N.numpy(), top_p * one_N.numpy())
    np.testing.assert_allclose(found_N, expected_N, atol=0.02)


@pytest.mark.parametrize("candidates", [V, 12])
def test_the_gradient_is_that_of_numeric_differentiation(candidates: int) -> None:
    logits_NV, token_N = some_logits(12, seed=3)
    tokens = recorded(candidates, logits_NV, token_N)
    tokens = replace(tokens, **{n: getattr(tokens, n).double() for n in ("top_NK", "rest_N", "logit_N", "share_N")})
    temperature_N, top_p_N = (value_N.double().requires_grad_() for value_N in heads_at(4, len(token_N)))
    assert torch.autograd.gradcheck(
        lambda temperature_N, top_p_N: soft_top_p_loss(temperature_N, top_p_N, tokens),
        (temperature_N, top_p_N),
        eps=1e-7,
        atol=1e-4,
    )
    loss = soft_top_p_loss(temperature_N, top_p_N, tokens).sum()
    loss.backward()
    assert temperature_N.grad is not None
    assert top_p_N.grad is not None
    assert temperature_N.grad.abs().min() > 0
    assert (top_p_N.grad.abs() > 0).any()


def test_gradients_stay_finite_at_the_ends_of_both_heads() -> None:
    logits_NV, token_N = some_logits(8)
    logits_NV[:, 5:] = -1e4
    for candidates in (3, 8, V):
        for temperature, top_p in ((1e-30, 0.5), (2.0, 1e-30), (1e-3, 1.0), (2.0, 1.0)):
            temperature_N = torch.full((8,), temperature, requires_grad=True)
            top_p_N = torch.full((8,), top_p, requires_grad=True)
            soft_top_p_loss(temperature_N, top_p_N, recorded(candidates, logits_NV, token_N)).sum().backward()
            for grad_N in (temperature_N.grad, top_p_N.grad):
                assert grad_N is not None
                assert bool(grad_N.isfinite().all())


# --- A world where the best temperature is known ---

KINDS = ("cold", "hot")
LOGITS = np.array([1.0, 0.0, -0.5, -1.0])
# share of each token among right answers
RIGHT: dict[str, tuple[float, ...]] = {"cold": (0.9, 0.1, 0.0, 0.0), "hot": (0.3, 0.3, 0.2, 0.2)}


class Shares:
    """One token is written; how often a token counts as right is its prompt's kind's to say."""

    name, max_tokens = "shares", 1

    def __init__(self, right: dict[str, tuple[float, ...]]) -> None:
        self.right = right

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        return [
            Problem(f"{split}-{i}", self.name, self.name, KINDS[i % 2] + str(i), "")
            for i in range(start, start + count)
        ]

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        return Prompt(problem.id, problem.question)

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        kind = KINDS[int(problem.id.rpartition("-")[2]) % 2]
        chance = np.exp(LOGITS)[TEXTS.index(completion.text)]
        draw = np.random.default_rng([ord(c) for c in problem.id + completion.text]).random()
        # drawn at T = 1, so that what is kept has the shares of `right`
        most = max(share / weight for share, weight in zip(self.right[kind], np.exp(LOGITS), strict=True))
        return Verdict(bool(draw < self.right[kind][TEXTS.index(completion.text)] / chance / most))


TEXTS = ("a", "b", "c", "d")


def engine() -> FakeEngine:
    def logits(_: str, tokens: tuple[int, ...]) -> list[float]:
        return [*LOGITS, -1e4]

    def features(text: str, _: tuple[int, ...]) -> list[float]:
        return [float(text.startswith("hot")), 0.3]

    return FakeEngine((*TEXTS, EOS), logits, features, hidden_size=2)


def best_temperature(tokens: AnswerTokens, kind_N: Tensor, kind: int) -> float:
    """The likeliest temperature of one kind's tokens without top-p, by a search of its own."""
    count_V = torch.bincount(tokens.rank_N[kind_N == kind], minlength=4)[:4].numpy()

    def loss(temperature: float) -> float:
        scaled_V = LOGITS / temperature
        return float(-(count_V * (scaled_V - np.log(np.exp(scaled_V).sum()))).sum())

    return float(minimize_scalar(loss, bounds=(0.05, 2.0), method="bounded").x)


def answers(problems: int, split: Split = Split.TRAIN, samples: int = 2) -> AnswerTokens:
    task = Shares(RIGHT)
    return collect_right_answers(engine(), task, task.problems(split, problems), samples, seed=0).tokens


def test_the_heads_find_the_temperature_that_makes_right_answers_likeliest() -> None:
    train, validation = answers(1500), answers(400, Split.VALIDATION)
    adapter = AutoDeco(AutoDecoConfig(2, width=16))
    config = AutoDecoTrainingConfig(epochs=40, batch_size=256, learning_rate=1e-2)
    history, kept = train_autodeco(adapter, train, validation, config, seed=0)
    kind_N = train.hidden_NH[:, 0].long()
    temperature_2, top_p_2 = (value_2.detach() for value_2 in adapter(torch.tensor([[0.0, 0.3], [1.0, 0.3]])))
    # where right answers are spread over all tokens, top-p has nothing to cut, and T is the likeliest one
    assert float(top_p_2[1]) > 0.95
    assert float(temperature_2[1]) == pytest.approx(best_temperature(train, kind_N, 1), rel=0.1)
    assert float(temperature_2[1]) > 1.2
    # where they are the first two alone, 9 to 1, the heads together make them so
    scaled_V = torch.tensor(LOGITS).float() / temperature_2[0]
    first = AnswerTokens(
        torch.zeros(2, 2), torch.zeros(2), *(train[train.rank_N < 2][:1].top_NK.repeat(2, 1),), torch.full((2,), -1e4),
        torch.zeros(2, dtype=torch.int64), torch.tensor([0.0, -1.0]), torch.tensor([0, 1]), torch.zeros(2),
    )  # fmt: skip
    p_2 = (-soft_top_p_loss(temperature_2[:1].repeat(2), top_p_2[:1].repeat(2), first)).exp()
    count_V = torch.bincount(train.rank_N[kind_N == 0], minlength=4)
    assert float(p_2[0]) == pytest.approx(float(count_V[0] / count_V.sum()), abs=0.06)
    assert float(p_2.sum()) > scaled_V.softmax(0)[:2].sum() > 0.5
    assert history[kept]["validation_loss"] < history[0]["validation_loss"] - 0.1
    assert history[kept]["validation_loss"] == min(line["validation_loss"] for line in history)


def test_training_is_a_function_of_the_seed() -> None:
    tokens, config = answers(60), AutoDecoTrainingConfig(epochs=2, batch_size=16)
    runs = []
    for seed in (0, 0, 1):
        adapter = AutoDeco(AutoDecoConfig(2, width=4))
        before = torch.get_rng_state()
        runs.append((train_autodeco(adapter, tokens, tokens, config, seed)[0], adapter.state_dict()))
        assert torch.equal(torch.get_rng_state(), before)
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


# --- What is learned from ---


class OnlyB(Shares):
    """Right: the answer b, where the prompt is cold; no verdict at every third problem."""

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        number = int(problem.id.rpartition("-")[2])
        if number % 3 == 0:
            return Verdict(None)
        return Verdict(completion.text == "b" and number % 2 == 0)


def test_only_tokens_of_right_answers_are_kept() -> None:
    task = OnlyB(RIGHT)
    progress: list[Sequence[int]] = []
    found = collect_right_answers(
        engine(), task, task.problems(Split.TRAIN, 30), 8, seed=0, progress=lambda *done: progress.append(done)
    )
    assert found.right == len(found.tokens) > 5
    assert found.tokens.rank_N.tolist() == [1] * len(found.tokens)  # b is the second likeliest
    assert not found.tokens.hidden_NH[:, 0].any()  # no hot prompt has a right answer
    assert (found.problems, found.rollouts) == (30, 240)
    assert progress == [(240, 240, 240)]


def test_calls_are_as_large_as_memory_allows_and_end_when_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answers(40)
    monkeypatch.setattr("rheostat.training.autodeco._CALL_BYTES", 1)  # one problem at a time
    again = answers(40)
    assert torch.equal(torch.bincount(again.rank_N), torch.bincount(whole.rank_N))
    monkeypatch.setattr("rheostat.training.autodeco._MOST_TOKENS", 10)
    assert 10 <= len(answers(40)) < 12 < len(whole)


class Never(Shares):
    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        return Verdict(False)


def test_without_a_right_answer_it_is_refused_with_advice() -> None:
    task = Never(RIGHT)
    with pytest.raises(RheostatError, match="none of 12 answers at T = 1 to 6 problems is right") as caught:
        collect_right_answers(engine(), task, task.problems(Split.TRAIN, 6), 2, seed=0)
    assert "\n" not in str(caught.value)
