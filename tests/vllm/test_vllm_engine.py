"""The engine over vLLM against plain transformers and against the local engine."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_vllm import CONTEXT, TEXTS, Plain, plain_of, save_model
from torch import Tensor

from rheostat.decoding.policy import FixedStrategies, SamplingParameters
from rheostat.decoding.recording import Recorder
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines.base import Engine, Pooling, Request
from rheostat.engines.local import LocalEngine
from rheostat.engines.vllm_calls import WholePass
from rheostat.errors import ConfigError, ModelError
from rheostat.types import FinishReason, Prompt

STRATEGIES = (Strategy(1.0), Strategy(0), Strategy(1.25, 10, 0.9), Strategy(0.75, None, 0.95, 0.1))
PROMPTS = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalEngine:
    return LocalEngine(folder, "tiny", torch.float32, "cpu")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Plain:
    return plain_of(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    from rheostat.engines.vllm import VllmEngine

    return VllmEngine(folder, "tiny", torch.float32)


def test_info_is_the_local_engines(engine: Engine, local: LocalEngine) -> None:
    ours, theirs = engine.info.to_dict(), local.info.to_dict()
    assert ours.pop("kind") == "vllm"
    assert theirs.pop("kind") == "local"
    assert (ours.pop("kernels"), theirs.pop("kernels")) == ("", "compiled")
    assert ours == theirs


@pytest.mark.parametrize("pooling", Pooling)
def test_embeddings(engine: Engine, oracle: Plain, pooling: Pooling) -> None:
    texts = [*TEXTS, *(text * 5 + "!" for text in TEXTS)]
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    assert max(len(oracle.ids(text)) for text in texts) > 64
    engine.generate([Request(prompt, Strategy(0), 0, 0, 2) for prompt in prompts])  # whole blocks are cached now
    found_PH = engine.embed(prompts, pooling)
    assert found_PH.dtype == torch.float32
    for row, text in zip(found_PH, texts, strict=True):
        hidden_TH, _ = oracle.forward(oracle.ids(text))
        expected_H = hidden_TH[-1] if pooling is Pooling.LAST else hidden_TH.mean(0)
        torch.testing.assert_close(row, expected_H, rtol=1e-4, atol=1e-4)


def test_embeddings_read_a_shared_prefix_once(engine: Any, oracle: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means over tokens of which most ran for another prompt, in the same pass or before, whole blocks and not."""
    prefix = "A number is prime if nothing but 1 and itself divides it. " * 2
    texts = [prefix + tail * n for n in (1, 2, 7, 20) for tail in ("2", "é", " a b")] + [prefix, prefix[:90]]
    starts: list[int] = []
    original = WholePass.rows

    def rows(self: WholePass, last_B: Sequence[int]) -> list[tuple[int, Tensor]]:
        found = original(self, last_B)
        starts.extend(start for start, _ in found)
        return found

    monkeypatch.setattr(WholePass, "rows", rows)
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    for some in (order, order[::-1], order[3:7]):
        found_PH = engine.embed([Prompt(str(i), texts[i]) for i in some], Pooling.MEAN)
        for row, index in zip(found_PH, some, strict=True):
            expected_H = oracle.forward(oracle.ids(texts[index]))[0].mean(0)
            torch.testing.assert_close(row, expected_H, rtol=1e-4, atol=1e-4)
    assert len([start for start in starts if start]) > 20
    assert starts.count(0) >= 3  # nothing from the call before


def test_nothing_asked(engine: Engine) -> None:
    assert engine.generate([]) == []
    assert engine.embed([]).shape == (0, engine.info.hidden_size)


def test_greedy_is_the_argmax(engine: Engine, oracle: Plain) -> None:
    for prompt, done in zip(
        PROMPTS, engine.generate([Request(p, Strategy(0), 0, 0, 10) for p in PROMPTS]), strict=True
    ):
        ids = oracle.ids(prompt.text)
        _, logits_TV = oracle.forward([*ids, *done.token_ids])
        for t, token in enumerate(done.token_ids):
            row_V = logits_TV[len(ids) - 1 + t]
            assert row_V[token] >= row_V.max() - 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_first_tokens_have_the_strategys_distribution(engine: Engine, oracle: Plain, strategy: Strategy) -> None:
    n = 3000
    drawn = Counter(c.token_ids[0] for c in engine.generate([Request(PROMPTS[1], strategy, s, 5, 1) for s in range(n)]))
    _, logits_TV = oracle.forward(oracle.ids(PROMPTS[1].text))
    p_V = transform(logits_TV[-1:], SamplingParameters.of([strategy]), Order.VLLM)[0].numpy()
    assert all(p_V[token] > 0 for token in drawn)
    large = np.flatnonzero(p_V * n >= 8)
    observed = [drawn[token] for token in large]
    expected = list(p_V[large] * n)
    if p_V[large].sum() < 1 - 1e-9:
        observed, expected = [*observed, n - sum(observed)], [*expected, n - sum(expected)]
    assert len(expected) == 1 or chisquare(observed, expected).pvalue > 1e-4


def test_seeds_belong_to_the_request(engine: Engine) -> None:
    requests = [Request(prompt, Strategy(1.25), s, 3, 8) for prompt in PROMPTS for s in range(4)]
    whole = engine.generate(requests)
    assert engine.generate(requests[::-1])[::-1] == whole
    assert [engine.generate([request])[0] for request in requests[:6]] == whole[:6]
    assert len({done.token_ids for done in whole[:4]}) > 1


def test_under_a_policy_tokens_are_the_local_engines(engine: Engine, local: LocalEngine) -> None:
    requests = [
        Request(prompt, STRATEGIES[(i + s) % 4], s, 1, 1 + 5 * s) for i, prompt in enumerate(PROMPTS) for s in range(4)
    ]
    policy = FixedStrategies([request.strategy for request in requests if request.strategy])
    ours, theirs = engine.generate(requests, policy), local.generate(requests, policy)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert same >= len(requests) - 1  # rounding may decide a draw that falls on a boundary


def test_recorded_steps_are_the_local_engines(engine: Engine, local: LocalEngine) -> None:
    requests = [Request(prompt, Strategy(1.25, 10), s, 1, 9, 2) for prompt in PROMPTS for s in range(2)]
    steps = []
    for each in (engine, local):
        recorder = Recorder(Order.VLLM, mask_above=1.0)
        each.generate(requests, observer=recorder)
        steps.append(recorder.steps())
    ours, theirs = steps
    assert ours is not None
    assert theirs is not None
    assert not ours.hidden_NH.is_inference()  # an update could not train on it
    for name in ("request_N", "t_N", "budget_N", "parallel_N", "action_N"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.log_p_NA, theirs.log_p_NA, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.hidden_NH, theirs.hidden_NH, rtol=2e-2, atol=2e-2)


def test_stops_and_budgets_end_as_in_the_local_engine(engine: Engine, local: LocalEngine) -> None:
    stops = ("e", "a ", "é")
    requests = [Request(Prompt("p", TEXTS[0], stops), Strategy(1.5), s, 5, 30) for s in range(40)]
    policy = FixedStrategies([Strategy(1.5)] * len(requests))
    ours, theirs = engine.generate(requests, policy), local.generate(requests, policy)
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= len(requests) - 1
    assert {done.finish_reason for done in ours} == set(FinishReason)
    for done in engine.generate(requests):  # vLLM's own draws
        assert not any(stop in done.text for stop in stops)
        assert (done.finish_reason is FinishReason.LENGTH) <= (len(done.token_ids) == 30)


def test_refusals(engine: Engine) -> None:
    prompt = PROMPTS[0]
    with pytest.raises(ConfigError, match="its own order"):
        engine.generate([Request(prompt, Strategy(1), 0, 0, 1)], order=Order.TRANSFORMERS)
    with pytest.raises(ConfigError, match="raises temperatures below"):
        engine.generate([Request(prompt, Strategy(0.001), 0, 0, 1)])
    with pytest.raises(ConfigError, match="knows no top-nσ"):
        engine.generate([Request(prompt, Strategy(1, top_n_sigma=1.0), 0, 0, 1)])
    with pytest.raises(ConfigError, match="names no strategy"):
        engine.generate([Request(prompt, None, 0, 0, 1)])
    with pytest.raises(ConfigError, match="stop string is empty"):
        engine.generate([Request(Prompt("p", "a", ("",)), Strategy(1), 0, 0, 1)])
    with pytest.raises(ModelError, match="is empty"):
        engine.embed([Prompt("nothing", "")])
    with pytest.raises(ModelError, match=f"holds {CONTEXT}"):
        engine.generate([Request(prompt, Strategy(0), 0, 0, CONTEXT)])


def test_a_call_that_was_interrupted_leaves_nothing_behind(engine: Engine) -> None:
    class Broken:
        def decide(self, state):  # type: ignore[no-untyped-def]
            if int(state.t_S.max()) == 2:
                raise KeyboardInterrupt
            return FixedStrategies([Strategy(1.0)] * 8).decide(state)

    requests = [Request(PROMPTS[0], Strategy(0), s, 0, 12) for s in range(8)]
    expected = engine.generate(requests)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, Broken())
    assert engine.generate(requests) == expected


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    from rheostat.engines.vllm import VllmEngine

    with pytest.raises(ModelError, match=str(tmp_path)):
        VllmEngine(tmp_path)
