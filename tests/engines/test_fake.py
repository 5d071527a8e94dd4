"""The fake engine's own promises: fixed, hashed, enumerable."""

import math

import numpy as np
import pytest
import torch

from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import Engine, Pooling, Request
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.errors import ConfigError, ModelError
from rheostat.types import FinishReason, Prompt

PROMPT = Prompt("p", "1+1=")


def coin(text: str, tokens: tuple[int, ...]) -> list[float]:
    """Heads 1/2, tails 1/4, end 1/4, whatever came before."""
    del text, tokens
    return [math.log(0.25), math.log(0.5), math.log(0.25)]


def coin_engine() -> FakeEngine:
    return FakeEngine((EOS, "H", "T"), logits=coin)


def test_is_an_engine() -> None:
    engine: Engine = FakeEngine()
    assert engine.info.kind == "fake"
    assert engine.info.to_dict()["hidden_size"] == 16


def test_distribution_by_hand() -> None:
    got = coin_engine().distribution(PROMPT, Strategy(1.0), max_tokens=2)
    expected = {"": 1 / 4, "H": 1 / 8, "T": 1 / 16, "HH": 1 / 4, "HT": 1 / 8, "TH": 1 / 8, "TT": 1 / 16}
    assert got == pytest.approx(expected)


def test_distribution_of_strategies_by_hand() -> None:
    engine = coin_engine()
    assert engine.distribution(PROMPT, Strategy(0), 3) == {"HHH": 1.0}
    # T = 0.5 squares the odds: 1 : 4 : 1
    assert engine.distribution(PROMPT, Strategy(0.5), 1) == pytest.approx({"": 1 / 6, "H": 2 / 3, "T": 1 / 6})
    # top-p 0.7 drops one of the two tied tokens, the one with the lower index
    assert engine.distribution(PROMPT, Strategy(1.0, None, 0.7), 1) == pytest.approx({"H": 2 / 3, "T": 1 / 3})


def test_distribution_merges_texts_and_cuts_at_stops() -> None:
    engine = FakeEngine((EOS, "a", "aa", "b"), logits=lambda *_: [-math.inf, 0, 0, 0])
    assert engine.distribution(PROMPT, Strategy(), 2)["aaa"] == pytest.approx(2 / 9)
    stopped = engine.distribution(Prompt("p", "x", ("ab", "aaa")), Strategy(), 2)
    expected = {"aa": 1 / 9, "": 2 / 9 + 1 / 9 + 1 / 9, "a": 1 / 9, "ba": 1 / 9, "baa": 1 / 9, "bb": 1 / 9}
    assert stopped == pytest.approx(expected)


def test_distribution_honours_the_order() -> None:
    engine = FakeEngine((EOS, "a", "b", "c"), logits=lambda *_: np.log([0.5, 0.3, 0.1, 0.1]))
    strategy = Strategy(1.0, None, 0.6, 0.3)
    assert engine.distribution(PROMPT, strategy, 1, Order.VLLM) == pytest.approx({"": 1})
    assert engine.distribution(PROMPT, strategy, 1, Order.TRANSFORMERS) == pytest.approx({"": 0.625, "a": 0.375})


@pytest.mark.parametrize("strategy", [Strategy(1.25), Strategy(0.75, 3, 0.9), Strategy(0)], ids=str)
def test_distribution_sums_to_one(strategy: Strategy) -> None:
    distribution = FakeEngine((EOS, "0", "1", "2", " ")).distribution(PROMPT, strategy, 4)
    assert sum(distribution.values()) == pytest.approx(1)


def test_default_distribution_is_fixed_per_prompt_and_prefix() -> None:
    engine, again, other = FakeEngine(), FakeEngine(), FakeEngine(seed=1)
    torch.testing.assert_close(engine.logits("a", (1, 2)), again.logits("a", (1, 2)), rtol=0, atol=0)
    rows = [
        engine.logits("a"),
        engine.logits("b"),
        engine.logits("a", (1,)),
        engine.logits("a", (2,)),
        other.logits("a"),
    ]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_default_numbers_never_change() -> None:
    """Tutorials print what they compute."""
    assert FakeEngine().logits("1+1=").tolist()[:3] == pytest.approx([-1.190333, -0.621243, 3.892445], abs=1e-6)
    assert FakeEngine().features("1+1=").tolist()[:3] == pytest.approx([-0.240544, -0.39428, 0.472355], abs=1e-6)


def test_default_features_are_gaussian() -> None:
    features = torch.cat([FakeEngine(hidden_size=64).features(str(i)) for i in range(200)])
    assert abs(features.mean()) < 0.05
    assert abs(features.std() - 1) < 0.05


def test_embed() -> None:
    engine = FakeEngine(hidden_size=2, features=lambda text, tokens: [len(text), len(tokens)])
    prompts = [Prompt("p", "abc"), Prompt("q", "z")]
    assert engine.embed(prompts).tolist() == [[3, 0], [1, 0]]
    assert engine.embed(prompts, Pooling.MEAN).tolist() == [[2, 0], [1, 0]]
    assert engine.embed([]).shape == (0, 2)
    assert engine.embed(prompts).dtype == torch.float32


def test_fingerprint_follows_the_definition() -> None:
    definitions = [
        FakeEngine(),
        FakeEngine(seed=1),
        FakeEngine(hidden_size=8),
        FakeEngine((EOS, "a")),
        FakeEngine(name="other"),
        FakeEngine((EOS, "H", "T")),
        coin_engine(),
        FakeEngine(features=lambda *_: [0.0] * 16),
    ]
    assert len({engine.info.fingerprint for engine in definitions}) == len(definitions)
    assert coin_engine().info.fingerprint == coin_engine().info.fingerprint


def test_same_completions_every_time() -> None:
    requests = [Request(PROMPT, Strategy(), sample, 0, 8) for sample in range(20)]
    completions = FakeEngine().generate(requests)
    assert completions == FakeEngine().generate(requests)
    assert len({c.text for c in completions}) > 5
    assert FakeEngine().generate([]) == []


def test_eos_is_a_token_but_no_text() -> None:
    engine = FakeEngine((EOS, "H", "T"), logits=lambda _, tokens: [9 * len(tokens), 8, 0])
    (completion,) = engine.generate([Request(PROMPT, Strategy(0), 0, 0, 5)])
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("H", (1, 0), FinishReason.STOP)


@pytest.mark.parametrize("vocabulary", [("a", "b"), (EOS, "a", EOS), ()])
def test_vocabulary_needs_one_end(vocabulary: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=EOS):
        FakeEngine(vocabulary)


def test_functions_of_the_wrong_length_are_named() -> None:
    with pytest.raises(ConfigError, match=r"logits.* 2 numbers"):
        FakeEngine((EOS, "a"), logits=lambda *_: [0.0]).logits("x")
    with pytest.raises(ConfigError, match=r"features.* 16 numbers"):
        FakeEngine(features=lambda *_: [0.0]).embed([PROMPT])


def test_context_and_empty_prompts() -> None:
    engine = FakeEngine(context_length=6)
    assert len(engine.generate([Request(PROMPT, Strategy(), 0, 0, 2)])) == 1
    with pytest.raises(ModelError, match=r"'p'.* 4 characters .* 3 tokens"):
        engine.generate([Request(PROMPT, Strategy(), 0, 0, 3)])
    for call in (lambda p: engine.embed([p]), lambda p: engine.generate([Request(p, Strategy(), 0, 0, 1)])):
        with pytest.raises(ModelError, match="'q' is empty"):
            call(Prompt("q", ""))
