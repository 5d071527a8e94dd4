"""Scaling and truncating rows of logits in place, against the sorted reference."""

import numpy as np
import pytest
import torch

from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.adapters.token import TokenAdapter, TokenConfig
from rheostat.decoding.policy import SamplingParameters, invert_cdf
from rheostat.decoding.spaces import candidate_grid
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.errors import AdapterError
from rheostat.serving import actions
from rheostat.serving.actions import Actions, draw_from, most_probable, require_last_state

CPU = torch.device("cpu")


def grid(order: Order = Order.VLLM) -> ActionSpace:
    sigmas = (Strategy(1.25, top_n_sigma=1.0), Strategy(0.75, 50, 0.9, None, 0.7))
    return ActionSpace((Strategy(0), *sigmas, *candidate_grid()), order)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("vocabulary", [60, 3000])
@pytest.mark.parametrize("is_cpu", [True, False], ids=["cpu", "as-on-a-gpu"])
def test_every_strategys_rows_are_the_reference(
    vocabulary: int, order: Order, is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows cannot be named without waiting for a GPU, all of them are sorted; that branch is taken here, too."""
    monkeypatch.setattr(actions, "_is_cpu", lambda _tensor: is_cpu)
    space = grid(order)
    logits_AV = (3 * torch.randn(len(space), vocabulary, generator=torch.Generator().manual_seed(2))).round(decimals=1)
    expected_AV = transform(logits_AV, SamplingParameters.of(space.strategies), order)
    found_AV = logits_AV.clone()
    Actions(space, CPU).apply(found_AV, torch.arange(len(space)))
    torch.testing.assert_close(found_AV.double().softmax(-1), expected_AV, rtol=1e-4, atol=1e-6)
    assert ((found_AV > -torch.inf) == (expected_AV > 0)).all()


@pytest.mark.parametrize("strategies", [(Strategy(1.0), Strategy(0.5)), (Strategy(0), Strategy(1)), (Strategy(1e-9),)])
def test_rows_without_truncation(strategies: tuple[Strategy, ...]) -> None:
    logits_SV = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    choice_S = torch.arange(6) % len(strategies)
    expected_SV = transform(logits_SV, SamplingParameters.of(strategies)[choice_S], Order.VLLM)
    Actions(ActionSpace(strategies), CPU).apply(logits_SV, choice_S)
    torch.testing.assert_close(logits_SV.double().softmax(-1), expected_SV, rtol=1e-5, atol=1e-7)


def test_draws_are_those_of_the_inverse_cdf() -> None:
    generator = np.random.default_rng(1)
    pi_SA = torch.from_numpy(generator.dirichlet([0.3] * 5, 4000)).float()
    pi_SA[::3, 4] = 0
    uniform_S = torch.from_numpy(generator.random(4000))
    uniform_S[:2] = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    drawn_S = draw_from(pi_SA, uniform_S)
    assert torch.equal(drawn_S, invert_cdf(pi_SA, uniform_S))
    assert len(drawn_S.unique()) == 5
    assert most_probable(torch.tensor([[0.2, 0.4, 0.4]])).tolist() == [1]


def test_what_reads_more_than_the_last_hidden_state_is_refused() -> None:
    space = ActionSpace((Strategy(0), Strategy(1.0)))
    sizes = {"hidden_size": 4, "width": 4}
    start = SequenceAdapter(SequenceConfig(**sizes), space, 0)
    served = (start, TokenAdapter(TokenConfig(**sizes), space, 0))
    refused = {
        "train one with --pooling last": SequenceAdapter(SequenceConfig(**sizes, pooling="mean"), space, 0),
        "reads the entropy of a prompt": SequenceAdapter(SequenceConfig(**sizes, features="entropy"), space, 0),
        "starts from a sequence-level adapter": TokenAdapter.starting_from(start, TokenConfig(**sizes)),
    }
    for adapter in served:
        assert require_last_state("mine", adapter) is adapter
    for why, adapter in refused.items():
        with pytest.raises(AdapterError, match=f"mine: it .*{why}.* use the local engine"):
            require_last_state("mine", adapter)
