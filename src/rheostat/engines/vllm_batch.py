"""Continuous batching by vLLM: its scheduler decides which rows a pass of the model holds, the step is ours.

Every sample of a job is one request of vLLM's. Policies and draws run on vLLM's rows of logits, as those of
:class:`rheostat.engines.continuous.ContinuousBatch` do on the local engine's, and vLLM is told the token; so tokens
agree with the local engine's up to rounding. vLLM may read a prompt's beginning from its cache, or stop a row and
compute it again later: what was written stands in the row here.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rheostat.engines.jobs import Failed, Job, PromptState, Row, Sampler, Written
from rheostat.errors import RheostatError

if TYPE_CHECKING:
    from rheostat.engines.vllm import VllmEngine


@dataclass(frozen=True, slots=True)
class _Request:
    name: str  # vLLM's
    row: Row


class VllmBatch:
    """See :class:`rheostat.engines.jobs.Batch`.

    Args:
        engine: runs the model; nothing else may use it while a step is under way.
        rows: how many samples are vLLM's at a time, at least 1. As many run as its memory holds.
    """

    def __init__(self, engine: "VllmEngine", rows: int) -> None:
        self._engine = engine
        self._most = rows
        self._requests: dict[int, _Request] = {}  # by seat, which is vLLM's slot
        self._seats = set(range(rows))
        self._waiting: deque[Job] = deque()
        self._sampler = Sampler(engine.vocabulary, engine.info.device, rows)
        self._events: list[Written | Failed] = []  # of the pass under way
        engine.keep_whole_passes()

    @property
    def running(self) -> int:
        return len(self._requests)

    @property
    def waiting(self) -> int:
        return sum(job.samples - job.admitted for job in self._waiting)

    def add(self, job: Job) -> None:
        self._waiting.append(job)

    def clear(self) -> None:
        self._engine.forget_requests()
        self._waiting.clear()
        self._requests.clear()
        self._events.clear()
        self._seats = set(range(self._most))

    def step(self) -> list[Written | Failed]:
        self._remove([seat for seat, request in self._requests.items() if request.row.job.cancelled])
        self._admit()
        if self._requests:
            self._engine.run_pass(self)
        self._remove([seat for seat, request in self._requests.items() if request.row.is_over])
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        """As many samples as there are seats go to vLLM, which may let them wait for memory."""
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        while self._seats and self._waiting:
            job = self._waiting[0]
            row = self._sampler.row(job, job.admitted, self._seats.pop())
            # the mean over a prompt needs all of it
            reads_all = job.choose is not None and row.sample == 0
            name = self._engine.add_request(job.token_ids, row.seat, job.max_tokens, reads_all)
            self._requests[row.seat] = _Request(name, row)
            job.admitted += 1
            if job.admitted == job.samples:
                self._waiting.popleft()

    def _remove(self, seats: Sequence[int]) -> None:
        self._engine.abort_requests([self._requests.pop(seat).name for seat in seats])
        self._seats.update(seats)

    def sample(
        self,
        logits_BV: Tensor,
        hidden_BH: Tensor,
        row_S: NDArray[np.int64],
        slot_S: NDArray[np.int64],
        t_S: NDArray[np.int64],
    ) -> Tensor:
        """See :meth:`rheostat.engines.vllm_calls.Call.sample`; a row whose job failed gets any token, and leaves."""
        rows = [self._requests[slot].row for slot in slot_S.tolist()]
        self._choose(rows, hidden_BH, logits_BV)
        alive = [position for position, row in enumerate(rows) if not row.is_over]
        own = [rows[position] for position in alive]
        self._events += self._sampler.write(own, row_S[alive].tolist(), hidden_BH, logits_BV)
        return torch.tensor([row.tokens[-1] if row.tokens else 0 for row in rows], device=logits_BV.device)

    def _choose(self, rows: Sequence[Row], hidden_BH: Tensor, logits_BV: Tensor) -> None:
        """The strategies of jobs whose prompt has just been read; vLLM reads that of sample 0 first."""
        failed: set[Job] = set()
        for position, row in enumerate(rows):
            job = row.job
            if job.choose is None or job.strategy is not None or row.sample:
                continue
            last_H = hidden_BH[position].float().cpu()
            mean_H = last_H
            if (
                self._engine.whole_pass is not None
            ):  # a GPU may replay a pass of single tokens, and nothing watches that
                last_B = [len(other.job.token_ids) + len(other.tokens) - 1 for other in rows]
                _, hidden_CH = self._engine.whole_pass.rows(last_B)[position]
                mean_H = hidden_CH.float().mean(0).cpu()
            try:
                job.strategy = job.choose(PromptState(last_H, mean_H, logits_BV[position].cpu()))
            except RheostatError as error:
                job.cancelled = True
                failed.add(job)
                self._events.append(Failed(job, error))
        for row in rows:
            row.is_over = row.job in failed
