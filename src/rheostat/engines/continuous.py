"""Continuous batching: completions join and leave a running batch at token boundaries.

Every step feeds the model the last token of each running completion, and pieces of the prompts that are joining, of
bounded size so that nobody waits long for a long prompt. Policies decide, one token of each completion is drawn from
its own random stream, and what has ended leaves. A request's tokens are those of
:meth:`rheostat.engines.base.Engine.generate`, whoever else is in the batch.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.decoding.policy import Decision, FixedStrategies, StepState, TokenPolicy
from rheostat.decoding.recording import row_statistics
from rheostat.decoding.sampling import draw
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import Engine, Request
from rheostat.engines.decode import Vocabulary, ending_tokens, finish
from rheostat.errors import RheostatError
from rheostat.seeding import Purpose, uniforms
from rheostat.types import Completion, Prompt

_PROMPT_TOKENS = 192  # prompt tokens in one pass beside the running rows: what a step may be longer for them
_STOPS = 64  # tuples of stop strings whose ending tokens are kept


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


class SlotEngine(Engine, Protocol):
    """An engine whose rows can join and leave."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def open_slots(self) -> Slots: ...

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """What slots are fed for a prompt, given as text or as tokens of the vocabulary."""
        ...


@dataclass(frozen=True, slots=True)
class PromptState:
    """What the model shows at the end of a prompt, float32: last and mean hidden state, and the next token's logits."""

    last_H: Float[Tensor, " H"]
    mean_H: Float[Tensor, " H"]
    logits_V: Float[Tensor, " V"]


@dataclass(frozen=True, slots=True)
class TokenDetails:
    """How one token was drawn. ``action`` and ``pi`` are None where no token policy decided.

    ``entropy`` (nats) and ``p_max`` are of the model's untempered distribution; ``remaining`` is b_t, which counts this
    token.
    """

    action: int | None
    temperature: float
    top_p: float
    entropy: float
    p_max: float
    pi: tuple[float, ...] | None
    remaining: int


@dataclass(frozen=True, slots=True)
class LogProbabilities:
    """Of the model's own distribution: the token's, and the most probable tokens'."""

    own: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Job:
    """Samples 0 to ``samples`` − 1 of one prompt.

    Attributes:
        policy: decides at every token, where there is one.
        strategy: of all tokens; set once ``choose`` has read the prompt, where that is given.
        choose: picks the strategy from the prompt, once.
        details: whether every token comes with its :class:`TokenDetails`.
        top: how many log-probabilities come with every token; None: none, not even its own.
    """

    prompt: Prompt
    token_ids: Sequence[int]
    samples: int
    seed: int
    max_tokens: int
    parallel_budget: int = 1
    order: Order = Order.VLLM
    policy: TokenPolicy | None = None
    strategy: Strategy | None = None
    choose: Callable[[PromptState], Strategy] | None = None
    details: bool = False
    top: int | None = None
    cancelled: bool = False
    admitted: int = field(default=0, init=False)  # samples that have joined the batch

    @property
    def need(self) -> int:
        """Tokens that one of its rows may come to."""
        return len(self.token_ids) + self.max_tokens


@dataclass(frozen=True, slots=True)
class Written:
    """One token of a sample; with it, the whole completion if it was the last."""

    job: Job
    sample: int
    token_id: int
    completion: Completion | None
    details: TokenDetails | None
    log_probabilities: LogProbabilities | None


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that cannot go on; none of its samples will write again."""

    job: Job
    error: Exception


@dataclass(eq=False)
class _Row:
    job: Job
    request: Request
    seat: int  # what its policy knows it by
    ends_V: Tensor
    tokens: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Joining:
    """A prompt of which ``done`` tokens have been fed, for ``samples`` rows from sample number ``first`` on."""

    job: Job
    first: int
    samples: int
    done: int = 0
    sum_H: Tensor | float = 0.0


class ContinuousBatch:
    """A batch that completions join and leave.

    Args:
        engine: runs the model; nothing else may use it while a step is under way.
        rows: how many completions run at a time, at least 1.
    """

    def __init__(self, engine: SlotEngine, rows: int) -> None:
        self._engine = engine
        self._slots = engine.open_slots()
        self._most = rows
        self._rows: list[_Row] = []
        self._joining: _Joining | None = None  # its slot is the one after the running rows
        self._waiting: deque[Job] = deque()
        self._seats = set(range(rows))
        self._fixed: tuple[list[_Row], FixedStrategies] | None = None
        self._endings = lru_cache(_STOPS)(lambda stop: ending_tokens(engine.vocabulary, stop))

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
        self._joining = self._fixed = None
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
        bad: set[int] = set()
        for fed_row, new in whole:
            try:
                self._choose(new, fed, fed_row)
            except RheostatError as error:
                new.job.cancelled = True
                failures.append(Failed(new.job, error))
                bad.add(id(new))
        for fed_row, new, sample in rows:
            self._rows.append(self._row(new, sample))
            row_S.append(fed_row)
        if bad:
            alive = [not row.job.cancelled for row in self._rows]
            row_S[:] = [fed_row for fed_row, is_alive in zip(row_S, alive, strict=True) if is_alive]
            self._drop(lambda job: job.cancelled)
        return failures

    def _choose(self, new: _Joining, fed: Fed, row: int) -> None:
        job = new.job
        if job.choose is not None and job.strategy is None:
            mean_H = torch.as_tensor(new.sum_H) / len(job.token_ids)
            job.strategy = job.choose(
                PromptState(fed.hidden_BH[row].float().cpu(), mean_H.cpu(), fed.logits_BV[row].cpu())
            )

    def _row(self, new: _Joining, sample: int) -> _Row:
        job = new.job
        strategy = None if job.policy is not None else job.strategy
        request = Request(job.prompt, strategy, new.first + sample, job.seed, job.max_tokens, job.parallel_budget)
        return _Row(job, request, self._seats.pop(), self._endings(job.prompt.stop))

    # ---- what they write ----

    def _sample(self, fed: Fed, row_S: list[int]) -> list[Written | Failed]:
        """One token of every row."""
        groups: dict[tuple[int, Order], list[int]] = {}
        for position, row in enumerate(self._rows):
            groups.setdefault((id(row.job.policy), row.job.order), []).append(position)
        events: list[Written | Failed] = []
        failed: set[Job] = set()
        for members in groups.values():
            try:
                events += self._sample_group(fed, row_S, members)
            except RheostatError as error:
                jobs = dict.fromkeys(self._rows[position].job for position in members)
                for job in jobs:
                    job.cancelled = True  # samples of it may still be waiting
                events += [Failed(job, error) for job in jobs]
                failed.update(jobs)
        ended = {(event.job, event.sample) for event in events if isinstance(event, Written) and event.completion}
        if ended or failed:
            self._remove([row.job in failed or (row.job, row.request.sample) in ended for row in self._rows])
        return events

    def _sample_group(self, fed: Fed, row_S: list[int], members: list[int]) -> list[Written]:
        rows = [self._rows[position] for position in members]
        device = fed.logits_BV.device
        streams = np.array([row.request.stream for row in rows], dtype=np.uint64)
        steps = np.array([len(row.tokens) for row in rows])
        job = rows[0].job
        policy = job.policy or self._own_strategies(rows)
        state = StepState(
            fed.hidden_BH,
            fed.logits_BV,
            torch.tensor([row_S[position] for position in members], device=device),
            torch.tensor([row.seat for row in rows], device=device),
            torch.from_numpy(steps).to(device),
            torch.tensor([row.job.max_tokens for row in rows], device=device),
            torch.tensor([row.job.parallel_budget for row in rows], device=device),
            streams,
        )
        decision = policy.decide(state)
        uniform_S = torch.from_numpy(uniforms(streams, steps, Purpose.TOKEN)).to(device)
        token_S = draw(fed.logits_BV, state.row_S, decision, uniform_S, job.order).tolist()
        details = _details([row.job.details for row in rows], state, decision, job.policy is not None)
        likely = _log_probabilities([row.job.top for row in rows], state, token_S)
        events = []
        for index, (row, token) in enumerate(zip(rows, token_S, strict=True)):
            row.tokens.append(token)
            is_due = bool(row.ends_V[token]) or len(row.tokens) >= row.job.max_tokens
            completion = finish(self._engine.vocabulary, row.request, row.tokens) if is_due else None
            events.append(
                Written(row.job, row.request.sample, token, completion, details.get(index), likely.get(index))
            )
        return events

    def _own_strategies(self, rows: list[_Row]) -> FixedStrategies:
        """The strategies of ``rows`` by their seats; made anew when somebody has joined or left."""
        if self._fixed is None or self._fixed[0] != rows:
            by_seat = dict.fromkeys(range(self._most), Strategy())
            by_seat |= {row.seat: row.request.strategy or Strategy() for row in rows}
            self._fixed = (rows, FixedStrategies(list(by_seat.values()), self._engine.info.device))
        return self._fixed[1]

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
        self._fixed = None
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


def _details(wanted: Sequence[bool], state: StepState, decision: Decision, is_adapted: bool) -> dict[int, TokenDetails]:
    """Of the sequences that want them, by position."""
    index_N = torch.tensor([index for index, is_wanted in enumerate(wanted) if is_wanted], dtype=torch.int64)
    if not len(index_N):
        return {}
    index_N = index_N.to(state.row_S.device)
    statistics = row_statistics(state.logits_BV[state.row_S[index_N]])
    choice_N = decision.choice_S[index_N]
    chosen = decision.parameters[choice_N]
    has_pi = is_adapted and decision.log_pi_SK is not None
    pi = decision.log_pi_SK[index_N].exp().tolist() if has_pi and decision.log_pi_SK is not None else None
    columns = zip(
        index_N.tolist(),
        choice_N.tolist(),
        chosen.temperature_K.tolist(),
        chosen.top_p_K.tolist(),
        statistics.entropy_B.tolist(),
        statistics.p_max_B.tolist(),
        state.remaining_S[index_N].tolist(),
        strict=True,
    )
    return {
        index: TokenDetails(
            choice if pi else None, temperature, top_p, entropy, p_max, tuple(pi[n]) if pi else None, remaining
        )
        for n, (index, choice, temperature, top_p, entropy, p_max, remaining) in enumerate(columns)
    }


def _log_probabilities(
    wanted: Sequence[int | None], state: StepState, token_S: Sequence[int]
) -> dict[int, LogProbabilities]:
    """Of the sequences that want them, by position."""
    found = {}
    for index, top in enumerate(wanted):
        if top is not None:
            log_p_V = state.logits_BV[state.row_S[index]].log_softmax(0)
            best = log_p_V.topk(top)
            pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            found[index] = LogProbabilities(float(log_p_V[token_S[index]]), pairs)
    return found
