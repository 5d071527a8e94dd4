"""Weights of whole vocabularies, compiled and by torch, against float64."""

import math

import pytest
import torch
from torch import Tensor

from rheostat.decoding.weights import BLOCK, entropies, weigh

SIZES = [1, 15, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17]


def logits_of(rows: int, size: int) -> Tensor:
    """Some tokens are impossible; every other column of a wider tensor, or a part of one, is not dense."""
    logits_BV = 4 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    if size > 10:
        logits_BV[1, ::3] = -torch.inf
    return logits_BV


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["dense", "part", "strided"])
def test_sums_over_blocks(size: int, layout: str) -> None:
    logits_BV = logits_of(5, size)
    if layout == "part":
        logits_BV = torch.cat([logits_BV, torch.full((5, 9), torch.nan)], 1)[:, :size]
    elif layout == "strided":
        logits_BV = logits_BV.repeat_interleave(2, 1)[:, ::2]
    row_D = torch.tensor([3, 1, 1, 4, 0, 2, 1] * 4)
    temperature_D = torch.linspace(0.05, 3, len(row_D), dtype=torch.float64)
    largest_D, sum_DN = weigh(logits_BV, row_D, temperature_D)
    exact_DV = logits_BV.double()[row_D]
    torch.testing.assert_close(largest_D.double(), exact_DV.amax(-1), rtol=0, atol=0)
    weight_DV = ((exact_DV - exact_DV.amax(-1, keepdim=True)) / temperature_D[:, None]).exp()
    blocks = -(-size // BLOCK)
    exact_DN = torch.nn.functional.pad(weight_DV, (0, blocks * BLOCK - size)).view(len(row_D), blocks, BLOCK).sum(-1)
    torch.testing.assert_close(sum_DN.double(), exact_DN, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 1e30])
def test_temperatures_at_the_ends(temperature: float) -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 3.0, -torch.inf]])
    _, sum_DN = weigh(logits_BV, torch.tensor([0]), torch.tensor([temperature], dtype=torch.float64))
    assert sum_DN.tolist() == [[2.0 if temperature < 1 else 3.0]]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", SIZES)
def test_entropies(size: int) -> None:
    logits_BV = logits_of(40, size)
    logits_BV[2] = -torch.inf
    logits_BV[2, size // 2] = 5.0  # certain
    logits_BV[3] = 1.5  # even
    largest_B, total_B, entropy_B = entropies(logits_BV)
    log_p_BV = logits_BV.double().log_softmax(-1)
    torch.testing.assert_close(
        (largest_B + total_B.log()).double(), logits_BV.double().logsumexp(-1), rtol=1e-6, atol=1e-6
    )
    exact_B = -torch.special.xlogy(log_p_BV.exp(), log_p_BV.exp()).sum(-1)
    torch.testing.assert_close(entropy_B.double(), exact_B, rtol=1e-5, atol=2e-6)
    assert entropy_B.min() >= 0
    assert float(entropy_B[3]) == pytest.approx(math.log(size), abs=1e-6)
