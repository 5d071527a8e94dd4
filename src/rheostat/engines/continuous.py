"""Continuous batching: completions join and leave a running batch at token boundaries.

Every step feeds the model the last token of each running completion, and pieces of the prompts that are joining, of
bounded size so that nobody waits long for a long prompt. Policies decide, one token of each completion is drawn from
its own random stream, and what has ended leaves. A request's tokens are those of
:meth:`rheostat.engines.base.Engine.generate`, whoever else is in the batch.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.engines.jobs import Failed, Job, PromptState, Row, Sampler, ServedEngine, Written
from rheostat.errors import RheostatError

_PROMPT_TOKENS = 192  # prompt tokens in one pass beside the running rows: what a step may be longer for them


class Fed(NamedTuple):
    """After a pass, of each row: last hidden state (after the final norm), float32 logits, sum of its hidden states."""

    hidden_BH: Float[Tensor, "B H"]
    logits_BV: Float[Tensor, "B V"]
    sum_BH: Float[Tensor, "B H"]


class Slots(Protocol):
    """The model's side: rows 0, 1, ... that hold the tokens which they were fed."""

    capacity: int  # tokens that rows × longest row may come to

    def feed(self, tokens: Sequence[Sequence[int]]) -> Fed:
        """Continue row i by ``tokens[i]`` (one at least); rows beyond the known ones are new."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Row ``target`` becomes a copy of row ``source``."""
        ...

    def keep(self, rows: int) -> None:
        """Forget all rows but the first."""
        ...


class SlotEngine(ServedEngine, Protocol):
    """An engine whose model this module runs, in rows."""

    def open_slots(self) -> Slots: ...


@dataclass(eq=False)
class _Joining:
    """A prompt of which ``done`` tokens have been fed, for ``samples`` rows from sample number ``first`` on."""

    job: Job
    first: int
    samples: int
    done: int = 0
    sum_H: Tensor | float = 0.0


class ContinuousBatch:
    """A batch that completions join and leave: see :class:`rheostat.engines.jobs.Batch`.

    Args:
        engine: runs the model; nothing else may use it while a step is under way.
        rows: how many completions run at a time, at least 1.
    """

    def __init__(self, engine: SlotEngine, rows: int) -> None:
        self._slots = engine.open_slots()
        self._most = rows
        self._rows: list[Row] = []
        self._joining: _Joining | None = None  # its slot is the one after the running rows
        self._waiting: deque[Job] = deque()
        self._seats = set(range(rows))
        self._sampler = Sampler(engine.vocabulary, engine.info.device, rows)

    @property
    def running(self) -> int:
        """Completions under way."""
        return len(self._rows) + (0 if self._joining is None else self._joining.samples)

    @property
    def waiting(self) -> int:
        """Completions that have not joined yet."""
        return sum(job.samples - job.admitted for job in self._waiting)

    def add(self, job: Job) -> None:
        """Queue the job's samples; first come, first served."""
        self._waiting.append(job)

    def clear(self) -> None:
        """Forget everybody."""
        self._waiting.clear()
        self._rows.clear()
        self._joining = None
        self._seats = set(range(self._most))
        self._slots.keep(0)

    def step(self) -> list[Written | Failed]:
        """One pass of the model: at most one token of every running completion. Cancelled jobs leave first."""
        self._drop(lambda job: job.cancelled)
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        joining, counts = self._admit()
        feeds: list[Sequence[int]] = [row.tokens[-1:] for row in self._rows]
        feeds += [new.job.token_ids[new.done : new.done + count] for new, count in zip(joining, counts, strict=True)]
        if not feeds:
            return []
        fed = self._slots.feed(feeds)
        row_S = list(range(len(self._rows)))
        failures = self._join(joining, counts, fed, row_S)
        return failures + self._sample(fed, row_S)

    # ---- who joins ----

    def _admit(self) -> tuple[list[_Joining], list[int]]:
        """The prompts that are fed in this pass, and how many tokens of each; all but the last are fed to their end."""
        joining = [] if self._joining is None else [self._joining]
        counts: list[int] = []
        left = _PROMPT_TOKENS
        while True:
            if len(joining) == len(counts):
                new = self._next(joining)
                if new is None:
                    break
                joining.append(new)
            counts.append(min(left, len(joining[-1].job.token_ids) - joining[-1].done))
            left -= counts[-1]
            if left == 0:
                break
        self._joining = None
        return joining, counts

    def _next(self, joining: list[_Joining]) -> _Joining | None:
        """As many samples of the first waiting job as there is room for."""
        if not self._waiting:
            return None
        job = self._waiting[0]
        live = [row.job for row in self._rows] + [new.job for new in joining for _ in range(new.samples)]
        longest = max([job.need, *(other.need for other in live)])
        room = min(self._most, self._slots.capacity // longest) - len(live)
        if not live:
            room = max(room, 1)  # what is too long for company runs alone
        samples = min(room, job.samples - job.admitted)
        if samples < 1:
            return None
        first, job.admitted = job.admitted, job.admitted + samples
        if job.admitted == job.samples:
            self._waiting.popleft()
        return _Joining(job, first, samples)

    def _join(self, joining: list[_Joining], counts: list[int], fed: Fed, row_S: list[int]) -> list[Written | Failed]:
        """Turn the prompts that are fed to their end into rows; ``row_S`` gets the fed row of each."""
        failures: list[Written | Failed] = []
        first = len(self._rows)
        whole: list[tuple[int, _Joining]] = []
        for fed_row, (new, count) in enumerate(zip(joining, counts, strict=True), start=first):
            new.done += count
            new.sum_H = new.sum_H + fed.sum_BH[fed_row]
            if new.done < len(new.job.token_ids):
                self._joining = new
            else:
                whole.append((fed_row, new))
        forks = sum(new.samples - 1 for _, new in whole)
        if self._joining is not None and forks:
            self._slots.copy(first + len(whole), first + len(whole) + forks)
        rows = [(fed_row, new, 0) for fed_row, new in whole]
        for fed_row, new in whole:
            for sample in range(1, new.samples):
                self._slots.copy(fed_row, first + len(rows))
                rows.append((fed_row, new, sample))
        bad: set[Job] = set()
        for fed_row, new in whole:
            try:
                self._choose(new, fed, fed_row)
            except RheostatError as error:
                new.job.cancelled = True
                failures.append(Failed(new.job, error))
                bad.add(new.job)
        for fed_row, new, sample in rows:
            row = self._sampler.row(new.job, new.first + sample, self._seats.pop())
            row.is_over = new.job in bad
            self._rows.append(row)
            row_S.append(fed_row)
        return failures

    def _choose(self, new: _Joining, fed: Fed, row: int) -> None:
        job = new.job
        if job.choose is not None and job.strategy is None:
            mean_H = torch.as_tensor(new.sum_H) / len(job.token_ids)
            job.strategy = job.choose(
                PromptState(fed.hidden_BH[row].float().cpu(), mean_H.cpu(), fed.logits_BV[row].cpu())
            )

    # ---- what they write ----

    def _sample(self, fed: Fed, row_S: list[int]) -> list[Written | Failed]:
        """One token of every row whose job goes on; who has ended leaves."""
        alive = [(row, fed_row) for row, fed_row in zip(self._rows, row_S, strict=True) if not row.is_over]
        rows, row_S = [row for row, _ in alive], [fed_row for _, fed_row in alive]
        events = self._sampler.write(rows, row_S, fed.hidden_BH, fed.logits_BV)
        gone = [row.is_over for row in self._rows]
        if any(gone):
            self._remove(gone)
        return events

    # ---- who leaves ----

    def _drop(self, leaves: Callable[[Job], bool]) -> None:
        if self._joining is not None and leaves(self._joining.job):
            self._joining = None
            self._slots.keep(len(self._rows))
        gone = [leaves(row.job) for row in self._rows]
        if any(gone):
            self._remove(gone)

    def _remove(self, gone: Sequence[bool]) -> None:
        """The last rows move into the places of those that leave: one row's copy for each of these."""
        rows, before = self._rows, len(self._rows)
        self._seats.update(row.seat for row, is_gone in zip(rows, gone, strict=True) if is_gone)
        count = before - sum(gone)
        holes = [place for place in range(count) if gone[place]]
        movers = [place for place in range(count, before) if not gone[place]]
        for hole, mover in zip(holes, movers, strict=True):
            self._slots.copy(mover, hole)
            rows[hole] = rows[mover]
        del rows[count:]
        if self._joining is not None and self._joining.done:
            self._slots.copy(before, count)
            count += 1
        self._slots.keep(count)
