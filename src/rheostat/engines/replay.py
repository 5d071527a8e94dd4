"""A step of the local engine as a CUDA graph: the same kernels, launched by one call.

A step for a few rows launches some hundreds of small kernels, and the host takes longer to launch them than a large GPU
takes to run them. A graph is bound to memory: it is captured when the rows' keys and values have stayed where they are
for a step, and lasts until they move (rows fork or leave, buffers grow).
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rheostat.engines.attention import RowCache

if TYPE_CHECKING:
    from rheostat.engines.local import LocalEngine

ROOM = 256  # tokens by which buffers grow where steps are replayed: a capture takes as long as tens of steps
_WARM_UP = 2  # passes before a capture, in which libraries allocate what they keep
_CLOSE = 0.05  # by how much a replayed logit may differ from the step's own, in units of the logits' spread


class Replay:
    """One step of ``cache``'s rows, captured now.

    Raises:
        RuntimeError: the step cannot be captured.
    """

    def __init__(
        self, engine: "LocalEngine", cache: RowCache, token_B: Tensor, position_B: Tensor, mask: Tensor
    ) -> None:
        self._inputs = (token_B.clone(), position_B.clone(), mask.clone())
        self._at_1 = torch.tensor([cache.length], device=token_B.device)

        def step() -> tuple[Tensor, Tensor]:
            token_B, position_B, mask = self._inputs
            cache.at_1 = self._at_1
            try:
                return engine.forward(token_B[:, None], position_B[:, None], mask, cache, logits=True)
            finally:
                cache.at_1 = None

        (self._hidden_BLH, self._logits_BV), self._replay = captured(step)

    def __call__(self, token_B: Tensor, position_B: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """hidden_BLH and logits_BV of the step that writes at ``length``; the next one overwrites the logits."""
        for own, given in zip(self._inputs, (token_B, position_B, mask), strict=True):
            own.copy_(given)
        self._at_1.fill_(length)
        self._replay()
        return self._hidden_BLH.clone(), self._logits_BV


def captured(step: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], Callable[[], None]]:
    """The tensors that ``step`` writes its results to, and what does it again."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return results, graph.replay


class Replays:
    """Captures steps of an engine, until one cannot be captured or comes out wrong: then it warns once, and stops."""

    def __init__(self, engine: "LocalEngine", *, enabled: bool) -> None:
        self._engine, self._enabled, self._is_checked = engine, enabled, False

    def of(self, cache: RowCache, token_B: Tensor, position_B: Tensor, mask: Tensor) -> Replay | None:
        """The step of ``cache`` to replay, captured at the second one in the same memory; None: run it."""
        if not (self._enabled and cache.still and cache.fits()):
            return None
        if cache.replay is None:
            try:
                replay = Replay(self._engine, cache, token_B, position_B, mask)
                if not self._is_checked:
                    self._check(replay, cache, token_B, position_B, mask)
                cache.replay = replay
            except RuntimeError as error:
                self._enabled = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"steps run without CUDA graphs, which is slower ({reason})", stacklevel=2)
        return cache.replay

    def _check(self, replay: Replay, cache: RowCache, token_B: Tensor, position_B: Tensor, mask: Tensor) -> None:
        """Compare the first one with a step that is not replayed."""
        _, ours_BV = replay(token_B, position_B, mask, cache.length)
        _, plain_BV = self._engine.forward(token_B[:, None], position_B[:, None], mask, cache, logits=True)
        if bool(((ours_BV - plain_BV).abs() > _CLOSE * plain_BV.std()).any()):
            raise RuntimeError("a replayed step gave other logits than the step itself")
        self._is_checked = True
