"""Adapted decoding is invariant: batch size, order of arrival and compaction do not change which tokens are drawn.

"The same tokens" means: identical up to the first step whose uniform, for the action or for the token, lies within
1e-5 of a boundary of its CDF, because the model's own rounding differs in a batch of another shape.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_local import config_of, save_model
from torch import Tensor

from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig
from rheostat.decoding.policy import Decision, StepState
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines import decode
from rheostat.engines.base import Request
from rheostat.engines.local import LocalEngine
from rheostat.seeding import Purpose, uniforms
from rheostat.types import Completion, Prompt

BOUNDARY = 1e-5
SPACE = ActionSpace((Strategy(0), Strategy(0.5), Strategy(1.25), Strategy(1.0, 10, 0.9)))


class Margins:
    """How far each draw's uniforms lie from a boundary: (request, step) to the smaller of the two distances."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.found: dict[tuple[int, int], float] = {}

    def observe(self, state: StepState, decision: Decision, token_S: Tensor) -> None:
        assert decision.log_pi_SK is not None
        streams, t = state.streams_S, int(state.t_S[0])
        p_SV = transform(state.logits_BV[state.row_S], decision.parameters[decision.choice_S], self.order)
        for purpose, distribution_SK in ((Purpose.ACTION, decision.log_pi_SK.exp()), (Purpose.TOKEN, p_SV)):
            uniform_S = torch.from_numpy(uniforms(streams, t, purpose))
            gap_S = (distribution_SK.double().cumsum(1) - uniform_S[:, None]).abs().amin(1)
            for request, gap in zip(state.request_S.tolist(), gap_S.tolist(), strict=True):
                self.found[request, t] = min(gap, self.found.get((request, t), 1.0))


def policy_of(hidden_size: int) -> AdaptiveDecoding:
    """An adapter that is far from uniform and reads everything there is."""
    config = TokenConfig(hidden_size, Features.BOTH, budgets=(1, 8), width=16)
    adapter = TokenAdapter(config, SPACE, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    torch.nn.init.normal_(adapter.output.weight, std=1.0, generator=generator)
    return AdaptiveDecoding(adapter)


def requests_of(texts: Sequence[str], count: int, most: int) -> list[Request]:
    draw = random.Random(3)
    return [
        Request(
            Prompt(f"p{i % len(texts)}", texts[i % len(texts)]), None, i, 4, draw.randint(1, most), draw.choice((1, 8))
        )
        for i in range(count)
    ]


def check_invariance(engine: LocalEngine, texts: Sequence[str], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, requests = policy_of(engine.info.hidden_size), requests_of(texts, 64, most)
    margins = Margins(SPACE.order)
    baseline = engine.generate(requests, policy, SPACE.order, margins)
    assert len({c.token_ids for c in baseline}) > 20  # there is something to confuse

    def same(index: int, got: Completion) -> None:
        expected = baseline[index].token_ids
        if got.token_ids != expected:
            pairs = zip(got.token_ids, expected, strict=False)
            t = next(t for t, (a, b) in enumerate(pairs) if a != b)
            assert margins.found[index, t] < BOUNDARY, f"request {index} parts at step {t}, far from every boundary"

    for size in (1, 7, 64):
        arrival = list(range(64))
        random.Random(size).shuffle(arrival)
        for start in range(0, 64, size):
            part = arrival[start : start + size]
            for index, got in zip(part, engine.generate([requests[i] for i in part], policy, SPACE.order), strict=True):
                same(index, got)
    for share in (0.0, 1.0):  # rows leave as soon as they end; never
        monkeypatch.setattr(decode, "IDLE_SHARE", share)
        for index, got in enumerate(engine.generate(requests, policy, SPACE.order)):
            same(index, got)


def test_invariance_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(save_model(tmp_path, config_of("llama")), dtype=torch.float32, device="cpu")
    check_invariance(engine, ("one", "two and three", "a longer text of several words", "?"), 20, monkeypatch)


def test_invariance_on_smollm2(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(smollm2_path, dtype=torch.float32)
    texts = ("Question: 3 + 4 = ?\nAnswer:", "The capital of France is", "Once upon a time", "def add(a, b):\n")
    check_invariance(engine, texts, 6, monkeypatch)


def test_a_policy_that_confuses_positions_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails where an action depends on the row's place in the batch."""
    engine = LocalEngine(save_model(tmp_path, config_of("llama")), dtype=torch.float32, device="cpu")

    def by_place(state: StepState, pi_SA: Tensor) -> Tensor:
        return torch.from_numpy(np.arange(len(pi_SA)) % pi_SA.shape[1])

    monkeypatch.setattr("rheostat.adapters.token.draw_actions", by_place)
    with pytest.raises(AssertionError, match="far from every boundary"):
        check_invariance(engine, ("one", "two and three"), 12, monkeypatch)
