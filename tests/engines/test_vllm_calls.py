"""What a call reads from vLLM's passes, with passes made by hand; tests/vllm runs the real ones."""

from dataclasses import dataclass

import numpy as np
import torch

from rheostat.engines.base import Pooling
from rheostat.engines.vllm_calls import Embedding, WholePass

BLOCK = 4


@dataclass
class Engine:
    whole_pass: WholePass | None = None


def test_means_from_passes_that_share_blocks() -> None:
    """Rows that begin behind another's blocks, in whatever order; then a pass of single tokens that nothing watched."""
    tokens = [list(range(11)), [*range(8), 50], [*range(4), 60, 61], [*range(8), 70]]
    state = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))  # of a token, wherever it stands
    engine = Engine()
    result_PH = torch.zeros(4, 3)
    call = Embedding(engine, Pooling.MEAN, tokens, result_PH, BLOCK)  # type: ignore[arg-type]
    slots, starts = [2, 1, 0], [4, 8, 0]
    parts = [tokens[slot][start:] for slot, start in zip(slots, starts, strict=True)]
    positions = [p for slot, start in zip(slots, starts, strict=True) for p in range(start, len(tokens[slot]))]
    padded = torch.cat(
        (state[torch.tensor([token for part in parts for token in part])], torch.full((5, 3), torch.nan))
    )
    engine.whole_pass = WholePass(padded, torch.tensor([*positions, 0, 0, 0, 0, 0]))
    last_BH = state[torch.tensor([part[-1] for part in parts])]
    assert call.sample(torch.empty(3, 1), last_BH, np.arange(3), np.array(slots), np.zeros(3, np.int64)) is None
    engine.whole_pass = None
    call.sample(torch.empty(1, 1), state[[70]], np.arange(1), np.array([3]), np.zeros(1, np.int64))
    expected_PH = torch.stack([state[torch.tensor(ids)].mean(0) for ids in tokens])
    torch.testing.assert_close(result_PH, expected_PH)
