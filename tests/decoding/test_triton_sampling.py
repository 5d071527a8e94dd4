"""The GPU's sampler against the reference and against the CPU's, in Triton's interpreter: no GPU is needed."""

import os

import pytest
import torch
from test_sampling import BELOW_ONE, reference, some_logits, some_uniforms

from rheostat.decoding import sampling
from rheostat.decoding.policy import Decision, SamplingParameters
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import transform

if os.environ.get("TRITON_INTERPRET") != "1":  # read when Triton is imported, which other tests may have done
    pytest.skip("needs Triton's interpreter (make test-triton)", allow_module_level=True)
pytest.importorskip("triton")
from rheostat.decoding import triton_sampling

SOME = (
    Strategy(0),
    Strategy(0.75),
    Strategy(1e-3),
    Strategy(1.25, 5),
    Strategy(1.0, 5000, None, 0.1),
    Strategy(1.0, None, 0.9),
    Strategy(1.0, None, 1e-9),
    Strategy(1.5, 20, 0.95),
    Strategy(1.25, 10, 0.9, 0.2),
    Strategy(2.0, None, 0.8, 0.05),
    Strategy(1.25, None, 0.9, 0.1, top_n_sigma=2.1),
)
# 89 equal logits: no cut of top-p falls on the edge between two tokens, where rounding would decide
CASES = [
    ("float32", 300, Order.VLLM),
    ("float32", 300, Order.TRANSFORMERS),
    ("ties", 300, Order.VLLM),
    ("ties", 300, Order.TRANSFORMERS),
    ("float32", 2, Order.VLLM),
    ("all equal", 89, Order.VLLM),
    ("impossible", 90, Order.VLLM),
    ("zeros", 89, Order.VLLM),
]


@pytest.mark.parametrize(("kind", "size", "order"), CASES)
def test_equals_the_inverse_cdf_and_the_cpu(
    kind: str, size: int, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_sampling, "_BLOCK", 128 if size > 128 else 32)  # more blocks than one
    logits_BV = torch.stack([some_logits(size, spread, size, kind == "ties") for spread in (0.3, 3.0)])
    if kind == "all equal":
        logits_BV[:] = -2.5
    elif kind == "impossible":
        logits_BV[:, : size // 2] = -torch.inf
    elif kind == "zeros":
        logits_BV = torch.where(logits_BV > 0, 0.0, -0.0) + torch.where(logits_BV > 1, 1.0, -0.0)
    parameters = SamplingParameters.of(SOME)
    choice_S = torch.arange(len(SOME)).repeat(2)
    row_S = torch.arange(len(choice_S)) % 2  # an odd number of sets: each is on both rows
    uniform_S = some_uniforms(len(choice_S), kind, size)
    decision = Decision(parameters, choice_S)
    token_S = triton_sampling.draw(logits_BV, row_S, decision, uniform_S, order)
    probability_SV = transform(logits_BV[row_S], parameters[choice_S], order)
    expected_S, safe_S = reference(probability_SV, uniform_S)
    torch.testing.assert_close(token_S[safe_S], expected_S[safe_S])
    assert safe_S.float().mean() > 0.9
    safe_S |= parameters.temperature_K[choice_S] == 0
    cpu_S = sampling.draw(logits_BV, row_S, decision, uniform_S, order)
    torch.testing.assert_close(token_S[safe_S], cpu_S[safe_S])


def test_the_ends_of_the_unit_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last token that is kept."""
    monkeypatch.setattr(triton_sampling, "_BLOCK", 32)
    logits_BV = some_logits(90, 3.0, 1, rounded=False)[None]
    parameters = SamplingParameters.of(SOME[1:])
    choice_S = torch.arange(len(parameters)).repeat(2)
    uniform_S = torch.where(torch.arange(len(choice_S)) < len(parameters), 0.0, BELOW_ONE).double()
    decision = Decision(parameters, choice_S)
    token_S = triton_sampling.draw(logits_BV, torch.zeros_like(choice_S), decision, uniform_S, Order.VLLM)
    kept_SV = transform(logits_BV.expand(len(choice_S), -1), parameters[choice_S], Order.VLLM) > 0
    first_S, last_S = kept_SV.int().argmax(1), kept_SV.shape[1] - 1 - kept_SV.flip(1).int().argmax(1)
    expected_S = torch.where(uniform_S == 0, first_S, last_S)
    is_kept_S = kept_SV.gather(1, token_S[:, None]).squeeze(1)
    assert is_kept_S.all()
    truncates_S = parameters.truncates_K[choice_S]  # untruncated tails have less weight than a rounding of the sum
    torch.testing.assert_close(token_S[truncates_S], expected_S[truncates_S])


@pytest.mark.parametrize("order", Order)
def test_min_p_before_and_after_top_p(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw from the middle of every kept token's share, where the order decides how many are kept."""
    monkeypatch.setattr(triton_sampling, "_BLOCK", 32)
    logits_BV = some_logits(90, 3.0, 1, rounded=False)[None]
    parameters = SamplingParameters.of((Strategy(2.0, None, 0.8, 0.2), Strategy(2.0, 40, 0.7, 0.3)))
    other = next(other for other in Order if other is not order)
    p_KV = transform(logits_BV.expand(2, -1), parameters, order)
    assert ((p_KV > 0).sum(1) != (transform(logits_BV.expand(2, -1), parameters, other) > 0).sum(1)).all()
    choice_S, token_S = (p_KV > 0).nonzero(as_tuple=True)
    uniform_S = (p_KV.cumsum(1) - p_KV / 2)[choice_S, token_S].double()
    decision = Decision(parameters, choice_S)
    drawn_S = triton_sampling.draw(logits_BV, torch.zeros_like(choice_S), decision, uniform_S, order)
    torch.testing.assert_close(drawn_S, token_S)


def test_nobody() -> None:
    none = torch.empty(0, dtype=torch.int64)
    decision = Decision(SamplingParameters.of(SOME), none)
    assert len(triton_sampling.draw(torch.zeros(1, 9), none, decision, torch.empty(0).double(), Order.VLLM)) == 0
