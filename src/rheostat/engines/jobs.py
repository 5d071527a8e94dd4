"""What is asked of a running batch, and the step that its rows take together, whoever runs the model.

A job is n samples of one prompt. At every pass of the model, policies decide for the rows of all jobs and one token of
each is drawn from the row's own random stream. So a request's tokens are those of
:meth:`rheostat.engines.base.Engine.generate`, whoever else is in the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol

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

_STOPS = 64  # tuples of stop strings whose ending tokens are kept


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


class Batch(Protocol):
    """Samples that run together, and join and leave at token boundaries."""

    @property
    def running(self) -> int:
        """Samples under way."""
        ...

    @property
    def waiting(self) -> int:
        """Samples that have not joined yet."""
        ...

    def add(self, job: Job) -> None:
        """Queue the job's samples; first come, first served."""
        ...

    def step(self) -> list[Written | Failed]:
        """One pass of the model: at most one token of every running sample. Cancelled jobs leave first."""
        ...

    def clear(self) -> None:
        """Forget everybody."""
        ...


class ServedEngine(Engine, Protocol):
    """An engine whose completions can join and leave."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a job for a prompt, given as text or as tokens of the vocabulary."""
        ...

    def open_batch(self, rows: int) -> Batch:
        """A batch of at most ``rows`` (at least 1) samples; nothing else may use the engine while it takes a step."""
        ...


@dataclass(eq=False)
class Row:
    """A sample under way."""

    job: Job
    sample: int
    seat: int  # what its policy knows it by
    ends_V: Tensor
    tokens: list[int] = field(default_factory=list)
    is_over: bool = False

    @cached_property
    def request(self) -> Request:
        """Made at its first token, when the strategy is known."""
        job = self.job
        strategy = None if job.policy is not None else job.strategy
        return Request(job.prompt, strategy, self.sample, job.seed, job.max_tokens, job.parallel_budget)

    @cached_property
    def stream(self) -> int:
        return self.request.stream


class Sampler:
    """Gives every row its next token.

    Args:
        vocabulary: of the model.
        device: where its logits are.
        seats: rows are known to policies by numbers below this.
    """

    def __init__(self, vocabulary: Vocabulary, device: torch.device | str, seats: int) -> None:
        self._vocabulary, self._device, self._seats = vocabulary, device, seats
        self._fixed: tuple[dict[int, Strategy], FixedStrategies] | None = None
        self._endings = lru_cache(_STOPS)(lambda stop: ending_tokens(vocabulary, stop))

    def row(self, job: Job, sample: int, seat: int) -> Row:
        return Row(job, sample, seat, self._endings(job.prompt.stop))

    def write(
        self, rows: Sequence[Row], row_S: Sequence[int], hidden_BH: Float[Tensor, "B H"], logits_BV: Tensor
    ) -> list[Written | Failed]:
        """One token of every row, or the failure of its job; row i stands on ``row_S[i]`` of the pass.

        Rows that wrote their last token are over, and so are those of a job that failed, which counts as cancelled.
        """
        groups: dict[tuple[int, Order], list[int]] = {}
        for position, row in enumerate(rows):
            groups.setdefault((id(row.job.policy), row.job.order), []).append(position)
        events: list[Written | Failed] = []
        for members in groups.values():
            own = [rows[position] for position in members]
            try:
                events += self._write_group(own, [row_S[position] for position in members], hidden_BH, logits_BV)
            except RheostatError as error:
                jobs = dict.fromkeys(row.job for row in own)
                for job in jobs:
                    job.cancelled = True  # samples of it may still be waiting
                for row in own:
                    row.is_over = True
                events += [Failed(job, error) for job in jobs]
        return events

    def _write_group(
        self, rows: list[Row], row_S: list[int], hidden_BH: Tensor, logits_BV: Tensor
    ) -> list[Written | Failed]:
        """Rows of one policy and one order of transforms."""
        device = logits_BV.device
        streams = np.array([row.stream for row in rows], dtype=np.uint64)
        steps = np.array([len(row.tokens) for row in rows])
        job = rows[0].job
        policy = job.policy or self._own_strategies(rows)
        state = StepState(
            hidden_BH,
            logits_BV,
            torch.tensor(row_S, device=device),
            torch.tensor([row.seat for row in rows], device=device),
            torch.from_numpy(steps).to(device),
            torch.tensor([row.job.max_tokens for row in rows], device=device),
            torch.tensor([row.job.parallel_budget for row in rows], device=device),
            streams,
        )
        decision = policy.decide(state)
        uniform_S = torch.from_numpy(uniforms(streams, steps, Purpose.TOKEN)).to(device)
        token_S = draw(logits_BV, state.row_S, decision, uniform_S, job.order).tolist()
        details = _details([row.job.details for row in rows], state, decision, job.policy is not None)
        likely = _log_probabilities([row.job.top for row in rows], state, token_S)
        events: list[Written | Failed] = []
        for index, (row, token) in enumerate(zip(rows, token_S, strict=True)):
            row.tokens.append(token)
            is_due = bool(row.ends_V[token]) or len(row.tokens) >= row.job.max_tokens
            completion = finish(self._vocabulary, row.request, row.tokens) if is_due else None
            row.is_over = completion is not None
            events.append(Written(row.job, row.sample, token, completion, details.get(index), likely.get(index)))
        return events

    def _own_strategies(self, rows: list[Row]) -> FixedStrategies:
        """The strategies of ``rows`` by their seats; made anew when somebody has joined or left."""
        own = {row.seat: row.request.strategy or Strategy() for row in rows}
        if self._fixed is None or self._fixed[0] != own:
            every = [own.get(seat, Strategy()) for seat in range(self._seats)]
            self._fixed = (own, FixedStrategies(every, self._device))
        return self._fixed[1]


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
