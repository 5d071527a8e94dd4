"""Steps that are replayed give what steps give; a stand-in for the GPU's graph, which knows only what a graph knows."""

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from test_local import TEXTS, config_of, save_model
from torch import Tensor

from rheostat.decoding.strategy import Strategy
from rheostat.engines import replay
from rheostat.engines.base import Request
from rheostat.engines.local import LocalEngine
from rheostat.engines.replay import Replays
from rheostat.types import Prompt

Step = Callable[[], tuple[Tensor, Tensor]]
REQUESTS = [
    Request(Prompt(str(i), text), Strategy(temperature), sample, 1, 5 + 40 * (sample % 2) + i)
    for i, text in enumerate(TEXTS)
    for sample in range(3)
    for temperature in (1.0, 1.5)
]


class Graphs:
    """In place of the GPU's: a capture keeps memory and host's numbers as they were, a replay writes to the same."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.error = 0.0  # added to what a replay gives

    def __call__(self, step: Step) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
        self.captures += 1
        cache = inspect.getclosurevars(step).nonlocals["cache"]
        length, buffers = cache.length, list(cache.buffers)
        hidden_BLH, logits_BV = (result.clone() for result in step())

        def again() -> None:
            self.replays += 1
            now, cache.length = cache.length, length
            try:
                for result, new in zip((hidden_BLH, logits_BV), step(), strict=True):
                    result.copy_(new + self.error)
            finally:
                cache.length = now
            pairs = zip(buffers, cache.buffers, strict=True)
            assert all(a is b for old, new in pairs for a, b in zip(old, new, strict=True))

        return (hidden_BLH, logits_BV), again


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    folder = save_model(tmp_path_factory.mktemp("replay"), config_of("llama"))
    return LocalEngine(folder, dtype=torch.float32, device="cpu")


@pytest.fixture
def graphs(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    graphs = Graphs()
    monkeypatch.setattr(replay, "captured", graphs)
    monkeypatch.setattr(engine, "_replays", Replays(engine, enabled=True))
    return graphs


def test_replayed_steps_give_the_same_tokens(engine: LocalEngine, graphs: Graphs) -> None:
    """While rows fork, leave, and grow beyond their buffers."""
    done = engine.generate(REQUESTS)
    assert graphs.captures > 2
    assert graphs.replays > 3 * graphs.captures
    engine._replays = Replays(engine, enabled=False)
    assert engine.generate(REQUESTS) == done


@pytest.mark.parametrize("fault", ["capture", "result"])
def test_what_cannot_be_replayed_is_run_with_one_warning(
    fault: str, engine: LocalEngine, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate(REQUESTS)
    monkeypatch.setattr(engine, "_replays", Replays(engine, enabled=True))
    if fault == "capture":

        def refuse(step: Step) -> None:
            raise RuntimeError("no graph here\nand more")

        monkeypatch.setattr(replay, "captured", refuse)
    else:
        graphs.error = 1.0
    with pytest.warns(UserWarning, match=r"without CUDA graphs, .* \((no graph here|a replayed step .*)\)") as caught:
        assert engine.generate(REQUESTS) == expected
    assert len(caught) == 1
