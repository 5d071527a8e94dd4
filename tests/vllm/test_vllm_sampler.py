"""vLLM's own sampler against our transforms and draws, on fixed logits."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from rheostat.decoding.policy import Decision, SamplingParameters
from rheostat.decoding.sampling import draw
from rheostat.decoding.spaces import candidate_grid
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.seeding import Purpose, uniforms

STRATEGIES = (Strategy(0), *candidate_grid())
DRAWS = 20_000


def fixed_logits() -> Tensor:
    return 1.4 * torch.randn(60, generator=torch.Generator().manual_seed(7))


class MinP:
    """vLLM's min-p processor in the state in which its batch would have put it."""

    def __init__(self, strategy: Strategy, rows: int) -> None:
        from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors, MinPLogitsProcessor

        from vllm import SamplingParams

        class Scheduler:
            max_num_seqs = rows

        class Config:
            scheduler_config = Scheduler

        processor = MinPLogitsProcessor(Config, torch.device("cpu"), False)  # type: ignore[arg-type]
        params = SamplingParams(min_p=strategy.min_p or 0.0)
        processor.update_state(BatchUpdate(rows, [], [(i, params, [], []) for i in range(rows)], []))
        self.processors = LogitsProcessors([processor])


def vllm_samples(logits_V: Tensor, strategy: Strategy, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of vLLM's sampler (runner V1) for ``rows`` rows of one strategy."""
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    full = lambda value, dtype=torch.float32: torch.full((rows,), value, dtype=dtype)  # noqa: E731
    fields: dict[str, Any] = {
        "temperature": full(strategy.temperature),
        "all_greedy": strategy.is_greedy,
        "all_random": not strategy.is_greedy,
        "top_p": None if strategy.top_p is None else full(strategy.top_p),
        "top_k": None if strategy.top_k is None else full(strategy.top_k, torch.int32),
        "generators": {},
        "max_num_logprobs": -1,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": torch.tensor([]),
        "presence_penalties": torch.tensor([]),
        "repetition_penalties": torch.tensor([]),
        "output_token_ids": [],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": MinP(strategy, rows).processors,
    }
    sampler = Sampler(logprobs_mode="processed_logprobs")
    output = sampler(logits_V.repeat(rows, 1), SamplingMetadata(**fields))
    return output.sampled_token_ids[:, 0].long(), output.logprobs_tensors.logprobs


def fits(tokens: np.ndarray, p_V: np.ndarray) -> bool:
    counts = np.bincount(tokens, minlength=len(p_V))
    assert counts[p_V == 0].sum() == 0
    common = p_V * len(tokens) >= 5
    observed, expected = list(counts[common]), list(p_V[common] * len(tokens))
    if rest := len(tokens) - sum(observed):
        observed, expected = [*observed, rest], [*expected, len(tokens) - sum(expected)]
    return len(observed) == 1 or chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue > 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_vllm_and_we_sample_alike(strategy: Strategy) -> None:
    logits_V = fixed_logits()
    parameters = SamplingParameters.of([strategy])
    p_V = transform(logits_V[None], parameters, Order.VLLM)[0].numpy()
    torch.manual_seed(3)
    tokens, log_p_SV = vllm_samples(logits_V, strategy, DRAWS)
    if not strategy.is_greedy:  # of greedy rows vLLM gives the untempered log-probabilities
        np.testing.assert_allclose(log_p_SV[0].exp().numpy(), p_V, atol=1e-5)
    assert fits(tokens.numpy(), p_V)
    uniform_S = uniforms(np.arange(DRAWS, dtype=np.uint64), 0, Purpose.TOKEN)
    rows_S = torch.zeros(DRAWS, dtype=torch.int64)
    ours = draw(logits_V[None], rows_S, Decision(parameters, rows_S), torch.from_numpy(uniform_S), Order.VLLM)
    assert fits(ours.numpy(), p_V)


def test_the_orders_differ_on_these_logits() -> None:
    """Else the comparison above could not tell them apart."""
    sets = SamplingParameters.of(STRATEGIES)
    logits_AV = fixed_logits().repeat(len(STRATEGIES), 1)
    vllm, transformers = (transform(logits_AV, sets, order) for order in Order)
    assert ((vllm - transformers).abs().amax(1) > 1e-3).sum() > 10
