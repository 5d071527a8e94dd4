"""The benchmark's gradients against autograd of the training loss, and its ratio on draws of known variance."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter, TokenConfig
from rheostat.bench import estimator
from rheostat.bench.estimator import family_gradients, variance_ratio
from rheostat.decoding.recording import Recorder, Steps
from rheostat.decoding.spaces import TABLE_14
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.seeding import derive_seed
from rheostat.tasks.base import Split
from rheostat.training.groups import collect_groups
from rheostat.training.surrogate import surrogate_loss
from rheostat.training.token_config import TokenEstimator, TokenTrainingConfig
from rheostat.types import Completion, Problem, Prompt, Verdict

PROMPTS, HALF = 5, 8


class ShortTask:
    """Right is what begins with "a"."""

    name = "short"
    max_tokens = 3

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        return [Problem(f"{split}-{i}", "short", "short", f"{i}?", "a") for i in range(start, start + count)]

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        return Prompt(problem.id, problem.question)

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        return Verdict(completion.text.startswith(problem.answer))


def sometimes_certain(text: str, tokens: tuple[int, ...]) -> list[float]:
    """A distribution of its own after every prefix; a third of them are all but certain of a token."""
    scale = 40 if derive_seed("certain", text, str(tokens)) % 3 == 0 else 3
    return [scale * derive_seed(text, str(tokens), token) / 2**64 for token in range(3)]


ENGINE = FakeEngine((EOS, "a", "b"), sometimes_certain, hidden_size=5)


def same_rollouts() -> tuple[TokenAdapter, Steps, Tensor]:
    task = ShortTask()
    adapter = TokenAdapter(TokenConfig(5), TABLE_14).eval()
    ones_P = torch.ones(PROMPTS, dtype=torch.int64)
    problems = task.problems(Split.TRAIN, PROMPTS)
    groups = collect_groups(
        ENGINE, task, problems, AdaptiveDecoding(adapter), TABLE_14.order, ones_P, 2 * HALF, 0, 0,
        Recorder(TABLE_14.order, 1.0),
    )  # fmt: skip
    assert groups.steps is not None
    assert adapter.standardizer is not None
    adapter.standardizer.fit(groups.steps.hidden_NH.float())
    return adapter, groups.steps, groups.reward_PG.view(PROMPTS, 2, HALF)


def by_autograd(name: str, adapter: TokenAdapter, steps: Steps, reward_P2G: Tensor, prompt: int, half: int) -> Tensor:
    reward_G = reward_P2G[prompt, half]
    advantage_G = torch.stack([r - torch.cat([reward_G[:i], reward_G[i + 1 :]]).mean() for i, r in enumerate(reward_G)])
    first = 2 * HALF * prompt + HALF * half
    own = steps[(steps.request_N >= first) & (steps.request_N < first + HALF)]
    if name == "action+mask":
        own = own[own.p_max_N <= 0.95]
    config = TokenTrainingConfig(
        estimator=TokenEstimator.MARGINAL if name == "marginal" else TokenEstimator.ACTION, clip=math.inf, beta=0
    )
    adapter.zero_grad()
    loss, _ = surrogate_loss(adapter, own, advantage_G[own.request_N - first], HALF, config)
    loss.backward()
    weight_AZ, bias_A = adapter.output.weight.grad, adapter.output.bias.grad
    assert weight_AZ is not None
    assert bias_A is not None
    assert all(not bool(layer.weight.grad.any()) for layer in (adapter.hidden_1, adapter.hidden_2))
    return -torch.cat([weight_AZ, bias_A[:, None]], dim=1).flatten()


def test_gradients_are_those_of_the_training_loss() -> None:
    found = family_gradients(ENGINE, ShortTask(), PROMPTS)
    adapter, steps, reward_P2G = same_rollouts()
    assert 0 < int((steps.p_max_N > 0.95).sum()) < len(steps)
    for name in ("action", "action+mask", "marginal"):
        assert found[name].shape[:2] == (PROMPTS, 2)
        for prompt in range(PROMPTS):
            for half in range(2):
                expected_D = by_autograd(name, adapter, steps, reward_P2G, prompt, half).numpy()
                np.testing.assert_allclose(found[name][prompt, half], expected_D, atol=1e-6)
        assert np.abs(found[name]).max() > 0.01
    assert np.abs(found["action"] - found["action+mask"]).max() > 0.01


def test_the_marginal_estimator_varies_less_on_the_same_rollouts() -> None:
    found = family_gradients(ENGINE, ShortTask(), 120)
    ratio, low, high = variance_ratio(found["action"], found["marginal"])
    assert 1 < low < ratio < high


def gaussians(seed: int, deviation_D: Sequence[float], prompts: int = 400) -> np.ndarray:
    draw = np.random.default_rng(seed)
    mean_P1D = 50 * draw.standard_normal((prompts, 1, len(deviation_D)))  # what prompts differ by
    return mean_P1D + draw.standard_normal((prompts, 2, len(deviation_D))) * np.array(deviation_D)


def test_ratio_of_known_variances_whatever_prompts_differ_by() -> None:
    above, below = gaussians(1, [3.0, 1.0, 2.0]), gaussians(2, [1.0, 1.0, 1.5])  # 14 over 4.25
    ratio, low, high = variance_ratio(above, below)
    assert low < 14 / 4.25 < high
    assert ratio == pytest.approx(14 / 4.25, rel=0.15)
    assert high / low < 1.6
    assert estimator._draw_variance(above).mean() == pytest.approx(14, rel=0.1)


def test_ratio_by_hand_and_of_equals() -> None:
    one = np.array([[[0.0, 2.0], [2.0, 2.0]], [[1.0, 1.0], [1.0, 5.0]]])  # distances² 4 and 16
    assert variance_ratio(one, np.sqrt([[[0.5]]]) * one)[0] == pytest.approx(2)
    assert variance_ratio(one, one) == pytest.approx((1, 1, 1))


def test_the_interval_covers_the_ratio_as_often_as_it_says() -> None:
    bounds = [variance_ratio(gaussians(i, [2.0, 1.0], 60), gaussians(1000 + i, [1.0, 1.0], 60)) for i in range(60)]
    covered = sum(low < 2.5 < high for _, low, high in bounds)
    assert covered >= 50  # 57 are expected


def test_means_apart_are_counted_in_standard_errors() -> None:
    draw = np.random.default_rng(3)
    one, other = draw.standard_normal((2, 300, 2, 200))
    assert estimator._mean_gap(one, other)[0] == pytest.approx(1, abs=0.15)
    # the mean of two halves of each estimator differs by a variance of 1: a standard error of 1/√300
    assert estimator._mean_gap(one + 0.5, other)[0] == pytest.approx(0.5 * math.sqrt(300), rel=0.1)
