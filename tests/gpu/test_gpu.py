"""What only a GPU can show: its kernel, its graphs, and its agreement with the CPU. Skipped where there is none."""

import copy
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / room) for room in ("decoding", "engines")]
from test_local import TEXTS, config_of, save_model
from test_sampling import ALL, reference, some_logits, some_uniforms

from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig
from rheostat.decoding import sampling
from rheostat.decoding.policy import Decision, SamplingParameters
from rheostat.decoding.recording import Recorder
from rheostat.decoding.spaces import TABLE_14
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines.base import Request
from rheostat.engines.local import LocalEngine
from rheostat.engines.static import StaticRows
from rheostat.errors import AdapterError
from rheostat.types import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a GPU: make test-gpu"
    ),
]
GPU = torch.device("cuda")


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("size", [300, 49_152, 151_936])
def test_the_kernel_draws_what_the_reference_draws(size: int, order: Order) -> None:
    pytest.importorskip("triton")
    assert sampling._kernel(GPU) is not None
    rows = 4
    logits_BV = torch.stack([some_logits(size, spread, size, rounded=True) for spread in (0.3, 1.0, 3.0, 12.0)])
    parameters = SamplingParameters.of(ALL)
    choice_S = torch.arange(len(ALL)).repeat(rows)
    row_S = torch.arange(rows).repeat_interleave(len(ALL))
    uniform_S = some_uniforms(len(choice_S), "gpu", size)
    there = Decision(SamplingParameters.of(ALL, GPU), choice_S.to(GPU))
    token_S = sampling.draw(logits_BV.to(GPU), row_S.to(GPU), there, uniform_S.to(GPU), order).cpu()
    cpu_S = sampling.draw(logits_BV, row_S, Decision(parameters, choice_S), uniform_S, order)
    for row in range(rows):
        own_S = row_S == row
        probability_SV = transform(logits_BV[row].expand(len(ALL), -1), parameters, order)
        expected_S, safe_S = reference(probability_SV, uniform_S[own_S])
        torch.testing.assert_close(token_S[own_S][safe_S], expected_S[safe_S])
        torch.testing.assert_close(token_S[own_S][safe_S], cpu_S[own_S][safe_S])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma"])
def test_graphs_and_plain_steps_give_the_same_tokens(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a row for every request, and with fewer rows than requests; beside the decode loop, there and on a CPU."""
    folder = save_model(tmp_path, config_of(kind))
    engine = LocalEngine(folder, dtype=torch.float32, device="cuda")
    on_cpu = LocalEngine(folder, dtype=torch.float32, device="cpu")
    fixed = [
        Request(
            Prompt(str(i), text, ("e",) if i % 2 else ()), Strategy(temperature), sample, 1, 5 + 60 * (sample % 2) + i
        )
        for i, text in enumerate(TEXTS)
        for sample in range(4)
        for temperature in (0, 1.0)
    ]
    free = [replace(request, strategy=None) for request in fixed]
    adapter = TokenAdapter(TokenConfig(engine.info.hidden_size, Features.BOTH, budgets=(1, 8)), TABLE_14).eval()
    theirs = AdaptiveDecoding(copy.deepcopy(adapter))
    ours = AdaptiveDecoding(adapter.to(GPU))
    row = 256 * engine.bytes_per_token + engine.logit_bytes
    for planned, rows in ((engine.batch_bytes, 64), (2 * 8 * row, 8)):
        monkeypatch.setattr(engine, "batch_bytes", planned)
        for requests, policy, policy_on_cpu in ((fixed, None, None), (free, ours, theirs)):
            engine._static = static = StaticRows(engine, replays=True)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a graph that could not be captured
                replayed = engine.generate(requests, policy)
                assert engine.generate(requests, policy) == replayed
            assert static._replays._known
            assert static.cache.rows == rows
            engine._static = StaticRows(engine, replays=False)
            assert engine.generate(requests, policy) == replayed
            engine._static = None
            for elsewhere in (engine.generate(requests, policy), on_cpu.generate(requests, policy_on_cpu)):
                same = sum(a.token_ids == b.token_ids for a, b in zip(replayed, elsewhere, strict=True))
                assert same >= 0.9 * len(requests)  # the rest stood near the edge between two tokens


def test_what_is_recorded_of_replayed_steps(tmp_path: Path) -> None:
    engine = LocalEngine(save_model(tmp_path, config_of("llama")), dtype=torch.float32, device="cuda")
    space = ActionSpace((Strategy(0), Strategy(1.5), Strategy(1.0, top_k=5), Strategy(0.75, None, 0.8)))
    policy = AdaptiveDecoding(TokenAdapter(TokenConfig(engine.info.hidden_size), space).eval().to(GPU))
    requests = [Request(Prompt(text, text), None, sample, 1, 20) for text in TEXTS for sample in range(4)]
    steps = []
    for static in (engine._static, None):
        engine._static, recorder = static, Recorder(Order.VLLM, 1.0)
        completions = engine.generate(requests, policy, observer=recorder)
        recorded = recorder.steps()
        assert recorded is not None
        assert len(recorded) == sum(len(completion.token_ids) for completion in completions)
        steps.append(recorded[recorded.t_N == 0])  # later ones may part at an edge
    torch.testing.assert_close(steps[0].log_p_NA, steps[1].log_p_NA, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(steps[0].action_N, steps[1].action_N)


def test_a_policy_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    engine = LocalEngine(save_model(tmp_path, config_of("llama")), dtype=torch.float32, device="cuda")
    adapter = TokenAdapter(TokenConfig(engine.info.hidden_size), TABLE_14).eval().to(GPU)
    adapter.output.bias.data.fill_(torch.nan)
    with pytest.raises(AdapterError, match="the policy's probabilities are not finite"):
        engine.generate([Request(Prompt("p", "a"), None, 0, 0, 20)], AdaptiveDecoding(adapter))
