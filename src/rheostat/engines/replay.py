"""Steps as CUDA graphs: the same kernels, launched by one call.

A step launches some hundreds of small kernels, and the host takes longer to launch them than a large GPU takes to run
them. A graph knows the memory that its kernels read and write and the host's numbers as they were when it was captured,
nothing else: what changes from step to step has to be in that memory.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rheostat.decoding.policy import Decision

Step = Callable[[], Decision]
_WARM_UP = 2  # steps before a capture, in which libraries allocate what they keep and kernels are compiled
_CLOSE = 0.05  # by how much a replayed logit may differ from the step's own, in units of the logits' spread


class Graph(Protocol):
    """What a capture leaves: see ``torch.cuda.CUDAGraph``."""

    def replay(self) -> None: ...

    def pool(self) -> Any: ...


def captured(step: Step, pool: Any) -> tuple[Decision, Graph]:
    """What ``step`` returned, and what does it again, into the same memory; ``pool`` is shared with an earlier one."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        decision = step()
    return decision, graph


class Replays:
    """Steps in the memory of some rows, each captured when it is first wanted.

    Until one cannot be captured or comes out wrong: then it warns, once, and steps run plainly.

    Args:
        changed: what a step reads and moves on; put back after a capture and its check.
        enabled: whether to try at all.
    """

    def __init__(self, changed: Sequence[Tensor], *, enabled: bool) -> None:
        self.enabled = enabled
        self._changed = changed
        # a policy's graphs go when it goes
        self._known: WeakKeyDictionary[object, dict[object, tuple[Decision, Graph]]] = WeakKeyDictionary()

    def run(self, owner: object, key: object, step: Step, logits_BV: Tensor) -> Decision:
        """The step that ``owner`` knows by ``key``: all host's numbers that it is made of. It writes ``logits_BV``."""
        if not self.enabled:
            return step()
        known = self._known.setdefault(owner, {})
        if key not in known:
            try:
                pool = next(iter(known.values()))[1].pool() if known else None
                known[key] = self._captured(step, pool, logits_BV)
            except RuntimeError as error:
                self.enabled = False
                self._known.clear()
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"steps run without CUDA graphs, which is slower ({reason})", stacklevel=2)
                return step()
        decision, graph = known[key]
        graph.replay()
        return decision

    def _captured(self, step: Step, pool: Any, logits_BV: Tensor) -> tuple[Decision, Graph]:
        """Captured, and compared with the step itself."""
        before = [tensor.clone() for tensor in self._changed]
        try:
            step()
            plain_BV = logits_BV.clone()
            decision, graph = captured(step, pool)
            self._restore(before)
            graph.replay()
            if bool(((logits_BV - plain_BV).abs() > _CLOSE * plain_BV.std()).any()):
                raise RuntimeError("a replayed step gave other logits than the step itself")
        finally:
            self._restore(before)
        return decision, graph

    def _restore(self, before: list[Tensor]) -> None:
        for tensor, old in zip(self._changed, before, strict=True):
            tensor.copy_(old)
