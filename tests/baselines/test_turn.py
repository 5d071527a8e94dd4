"""TURN: the turning point against second differences by hand, the entropy against the fake engine's distributions."""

import math

import numpy as np
import pytest

from rheostat.baselines.edt import EntropyBasedTemperature
from rheostat.baselines.turn import TEMPERATURES, Aggregation, TokenEntropy, turning_point
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.errors import ConfigError
from rheostat.types import Prompt

BEST, MAJORITY = Aggregation.BEST_OF_N, Aggregation.MAJORITY


def test_temperatures() -> None:
    assert [str(t) for t in TEMPERATURES] == [f"{i // 10}.{i % 10}" for i in range(1, 15)]


def test_by_hand() -> None:
    """ln H = 0, 4, 6, 7, 9, 15: slopes 4, 3, 1.5, 1.5, 4, 6; second differences inside -1.25, -0.75, 1.25, 2.25."""
    entropy_T = np.exp([0, 4, 6, 7, 9, 15])
    assert turning_point((1, 2, 3, 4, 5, 6), entropy_T, MAJORITY) == 4
    assert turning_point((1, 2, 3, 4, 5, 6), entropy_T, BEST) == 4.1
    assert turning_point((0.5, 0.6, 0.7), np.exp([0, 1, 5]), BEST) == 0.7


def second_differences(x: list[float], y: list[float]) -> list[float]:
    """Twice the central difference, one-sided at the ends, on equal steps."""

    def once(values: list[float]) -> list[float]:
        h, inside = x[1] - x[0], range(1, len(values) - 1)
        middle = [(values[i + 1] - values[i - 1]) / (2 * h) for i in inside]
        return [(values[1] - values[0]) / h, *middle, (values[-1] - values[-2]) / h]

    return once(once(y))


def test_random_curves() -> None:
    draw = np.random.default_rng(0)
    found = set()
    for _ in range(300):
        log_h = np.cumsum(draw.normal(size=len(TEMPERATURES))).tolist()
        second = second_differences(list(TEMPERATURES), log_h)
        inside = range(1, len(second) - 1)
        at = next((i for i in inside if second[i] > 0), len(second) - 2)
        found.add(at)
        for aggregation, beta in ((MAJORITY, 0.0), (BEST, 0.1)):
            expected = float(f"{TEMPERATURES[at] + beta:.4f}")
            assert turning_point(TEMPERATURES, np.exp(log_h), aggregation) == expected
    assert len(found) > 3


def test_a_curve_that_never_turns_gives_the_last_interior_temperature() -> None:
    entropy_T = np.exp(-((np.array(TEMPERATURES) - 2) ** 2))
    assert turning_point(TEMPERATURES, entropy_T, MAJORITY) == 1.3
    assert turning_point(TEMPERATURES, entropy_T, BEST) == 1.4
    # ln H = 0, 4, 6, 8.5: slopes 4, 3, 2.25, 2.5, which rise at the very end only
    assert turning_point((1, 2, 3, 4), np.exp([0, 4, 6, 8.5]), MAJORITY) == 3


def test_an_inflexion_is_found() -> None:
    """(T − 0.75)³ is convex from 0.8 on."""
    entropy_T = np.exp((np.array(TEMPERATURES) - 0.75) ** 3)
    assert turning_point(TEMPERATURES, entropy_T, MAJORITY) == 0.8


@pytest.mark.parametrize(
    ("temperatures", "entropy_T"),
    [
        ((1, 2), (1, 2)),
        ((1, 2, 3), (1, 2)),
        ((1, 3, 2), (1, 2, 3)),
        ((1, 2, 3), (0, 1, 2)),
        ((1, 2, 3), (1, 2, np.nan)),
    ],
)
def test_what_cannot_be_judged_is_refused(temperatures: tuple[float, ...], entropy_T: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="TURN"):
        turning_point(temperatures, entropy_T, BEST)


def test_an_entropy_of_zero_says_at_which_temperature_and_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        turning_point((0.1, 0.2, 0.3), (0.2, 0.0, 0.4), Aggregation.MAJORITY)
    assert "at T = 0.2 is 0," in str(caught.value)
    assert all(option in str(caught.value) for option in ("--problems.validation", "--task", "--baselines"))


def entropy_of(logits: list[float], temperature: float) -> float:
    if temperature == 0:
        return 0.0
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    p = [weight / sum(weights) for weight in weights]
    return -sum(q * math.log(q) for q in p if q)


def test_the_entropy_of_each_request_is_that_of_its_own_tempered_distributions() -> None:
    engine = FakeEngine((EOS, "a", "b", "c"))
    temperatures, prompts, samples = (0.0, 0.3, 1.0, 1.7), ("p", "q", "r"), 4
    requests = [
        Request(Prompt(text, text), Strategy(t), i, 5, 6)
        for t in temperatures
        for text in prompts
        for i in range(samples)
    ]
    watch = TokenEntropy()
    completions = engine.generate(requests, observer=watch)
    expected = []
    for request, completion in zip(requests, completions, strict=True):
        assert request.strategy is not None
        tokens, t = completion.token_ids, request.strategy.temperature
        per_token = [entropy_of(engine.logits(request.prompt.text, tokens[:i]).tolist(), t) for i in range(len(tokens))]
        expected.append(sum(per_token) / len(per_token))
    assert len({len(c.token_ids) for c in completions}) > 2  # so that the mean over tokens is not the mean over steps
    np.testing.assert_allclose(watch.mean_N(len(requests)), expected, rtol=1e-5, atol=1e-6)
    assert max(expected[:12]) == 0


def test_more_rows_than_are_held_at_once() -> None:
    engine = FakeEngine()
    requests = [Request(Prompt(f"p{i}", f"p{i}"), Strategy(0.5 + i % 3), 0, 1, 1) for i in range(150)]
    watch = TokenEntropy()
    engine.generate(requests, observer=watch)
    expected = [entropy_of(engine.logits(f"p{i}").tolist(), 0.5 + i % 3) for i in range(150)]
    np.testing.assert_allclose(watch.mean_N(150), expected, rtol=1e-5, atol=1e-6)


def test_a_temperature_per_row_is_measured_too() -> None:
    """Policies with parameter sets of their own at every step."""
    engine, watch = FakeEngine(), TokenEntropy()
    engine.generate([Request(Prompt("p", "p"), None, 0, 1, 1)], EntropyBasedTemperature(0.9, 0.0), observer=watch)
    assert watch.mean_N(2)[0] == pytest.approx(entropy_of(engine.logits("p").tolist(), 0.9), rel=1e-5)
    assert np.isnan(watch.mean_N(2)[1])
    assert np.isnan(TokenEntropy().mean_N(1)[0])


def test_truncation_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature alone"):
        FakeEngine().generate([Request(Prompt("p", "p"), Strategy(1, 5), 0, 1, 1)], observer=TokenEntropy())
