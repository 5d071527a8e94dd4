"""Whose row is whose, under the calls of either runner, against a dictionary."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

ROWS, HIDDEN = 12, 3


def probe_of(*runner: Any) -> Any:
    """A processor whose requests say their slot themselves, and which notes down what it is shown."""
    from rheostat.engines.vllm_rows import RowProcessor

    class Probe(RowProcessor):
        seen: list[tuple[int, int, int]] = []  # noqa: RUF012

        def admit(self, params: Any) -> int:
            return int(params)

        def step(self, logits_BV: Any, hidden_BH: Any, row_S: Any, slot_S: Any, t_S: Any) -> None:
            assert len(hidden_BH) == len(logits_BV)
            Probe.seen = list(zip(row_S.tolist(), slot_S.tolist(), t_S.tolist(), strict=True))
            logits_BV[torch.from_numpy(row_S)] = -1.0

    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=ROWS))
    return Probe(config, *runner)


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Any:
    from rheostat.engines import vllm_rows

    return lambda rows: monkeypatch.setattr(vllm_rows, "_hidden_BH", torch.zeros(rows, HIDDEN))


def test_runner_v1_through_random_batches(hidden: Any) -> None:
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    probe = probe_of(torch.device("cpu"), False)
    draw, batch, fresh = random.Random(1), {}, 0  # batch: row → (slot, output)
    for _ in range(400):
        removed, added, moved = [], [], []
        for row in [row for row in batch if draw.random() < 0.2]:
            del batch[row]
            removed.append(row)
        while len(batch) < ROWS and draw.random() < 0.5:  # vLLM fills holes first
            row = min(set(range(ROWS)) - set(batch))
            if row in removed:
                removed.remove(row)
            slot = -1 if draw.random() < 0.3 else fresh
            fresh += 1
            output = [0] * draw.choice((0, 0, 5))  # 5: it was preempted
            batch[row] = (slot, output)
            added.append((row, slot, None, output))
        while batch and max(batch) >= len(batch):  # and condenses the rest
            source, target = max(batch), min(set(range(ROWS)) - set(batch))
            batch[target] = batch.pop(source)
            moved.append((source, target, MoveDirectionality.UNIDIRECTIONAL))
        if len(batch) > 1 and draw.random() < 0.5:
            a, b = draw.sample(sorted(batch), 2)
            batch[a], batch[b] = batch[b], batch[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        update = BatchUpdate(len(batch), removed, added, moved) if removed or added or moved else None
        probe.update_state(update)
        expected = [(row, *(batch[row][0], len(batch[row][1]))) for row in sorted(batch) if batch[row][0] >= 0]
        type(probe).seen = []
        logits_BV = torch.zeros(len(batch), 4)
        hidden(len(batch))
        if batch:
            probe.apply(logits_BV)
        assert type(probe).seen == expected
        assert logits_BV[:, 0].nonzero().squeeze(1).tolist() == [row for row, _, _ in expected]
        for _, output in batch.values():
            output.append(1)


def test_runner_v2(hidden: Any) -> None:
    prompt_len = SimpleNamespace(np=np.array([4, 9, 2, 7, 1]))
    states = SimpleNamespace(device=torch.device("cpu"), max_num_reqs=5, prompt_len=prompt_len)
    probe = probe_of(states)
    assert [probe.add_request(i, slot) for i, slot in enumerate((30, -1, 10, 40, 20))] == [
        True,
        False,
        True,
        True,
        True,
    ]
    context = SimpleNamespace(idx_mapping_np=np.array([3, 1, 0, 4]), seq_lens_upper_bound_np=np.array([5, 9, 4, 8]))
    hidden(4)
    logits_BV = probe.apply(torch.zeros(4, 6), context)
    # request 3 is in the middle of its prompt of 7, request 1 did not opt in, request 0 draws its first token
    assert type(probe).seen == [(2, 30, 0), (3, 20, 7)]
    assert logits_BV[:, 0].tolist() == [0, 0, -1, -1]
    probe.add_request(0, -1)  # the entry has a new owner
    probe.apply(logits_BV, context)
    assert type(probe).seen == [(3, 20, 7)]


def test_batches_without_a_request_of_ours_are_not_looked_at() -> None:
    probe = probe_of(torch.device("cpu"), False)
    logits_BV = torch.zeros(3, 4)
    assert probe.apply(logits_BV) is logits_BV  # no hidden states were kept, and none were asked for


def test_another_way_to_logits_is_not_silently_wrong(hidden: Any) -> None:
    from rheostat.engines.vllm_rows import hidden_rows

    hidden(3)
    with pytest.raises(RuntimeError, match="4 rows of logits, but 3 hidden states"):
        hidden_rows(4)
