"""Supervised training of AutoDeco's heads: cross-entropy on right answers, through a softened top-p.

The rival (Wang et al., 2025, arXiv:2510.26697) is rebuilt on Rheostat's own rollouts: answers are drawn at T = 1
without truncation, and the tokens of those that the task's verifier finds right are what the heads learn to make
likely. Its two corrections of the loss, easy-token masking and dynamic fine-tuning, are left out.

The language model is run once, to draw the answers. Of each token is kept what the loss needs: the hidden state, the
256 largest logits, and the sum of the rest. The rest enters as tokens of one common logit. At T = 1 its mass is exact;
at another T it is approximate, from above for T > 1 and from below for T < 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from rheostat.adapters.autodeco import AutoDeco
from rheostat.decoding.policy import Decision, StepState
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Engine, Request
from rheostat.errors import RheostatError
from rheostat.rollouts.collect import BATCH_SIZE, judge_all
from rheostat.seeding import derive_seed
from rheostat.tasks.base import Task
from rheostat.types import Problem

STEEPNESS = 30.0  # α of the soft top-p, as published
CANDIDATES = 256  # largest logits kept of each token
_COLDEST = 0.01  # temperatures below are trained as this one: next to greedy, where gradients explode
_CHUNK = 16  # rows of the vocabulary looked at at once
_CALL_BYTES = 256 << 20  # recorded tokens of one call, right answers or not
_MOST_TOKENS = 1 << 18  # tokens of right answers: 600 MB of a model with 576 hidden numbers


class AutoDecoTrainingConfig(BaseModel):
    """How AutoDeco's heads are trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int = Field(4, ge=1, description="answers drawn at T = 1 per prompt; right ones are learned from")
    epochs: int = Field(40, ge=1, description="passes over the tokens of right answers")
    batch_size: int = Field(256, ge=1, description="tokens in one update")
    learning_rate: float = Field(1e-3, gt=0, description="Adam's step size")
    width: int = Field(256, ge=1, description="hidden units of each head")


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """N tokens of answers, with what a softened top-p at any temperature needs of their distributions.

    Logits are those above the largest one, so at most 0.

    Attributes:
        hidden_NH: h_t, bfloat16.
        request_N: whose token it is: a position among the requests of the call.
        top_NK: the K largest logits, falling.
        rest_N: log Σ exp of the others; −inf where there are none.
        others_N: how many others there are.
        logit_N: the token's own.
        rank_N: its place among the K largest; K if it is one of the others.
        share_N: of the others' mass at T = 1, how much lies at or above it; 0 for one of the K largest.
    """

    hidden_NH: Float[Tensor, "N H"]
    request_N: Int[Tensor, " N"]
    top_NK: Float[Tensor, "N K"]
    rest_N: Float[Tensor, " N"]
    others_N: Int[Tensor, " N"]
    logit_N: Float[Tensor, " N"]
    rank_N: Int[Tensor, " N"]
    share_N: Float[Tensor, " N"]

    def __len__(self) -> int:
        return len(self.request_N)

    def __getitem__(self, index: Tensor) -> Self:
        """The tokens at ``index`` (positions or a mask)."""
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Several as one (at least one)."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def bytes_per_token(hidden_size: int) -> int:
    """Memory of one recorded token: bfloat16 hidden state, float32 logits, six further numbers of at most 8 bytes."""
    return 2 * hidden_size + 4 * CANDIDATES + 6 * 8


class AnswerRecorder:
    """Observes a decode loop and keeps every token; see :class:`rheostat.decoding.policy.StepObserver`."""

    def __init__(self, candidates: int = CANDIDATES) -> None:
        self._candidates = candidates
        self._parts: list[AnswerTokens] = []

    def observe(self, state: StepState, decision: Decision, token_S: Int[Tensor, " S"]) -> None:
        """Record one step."""
        del decision
        for row_R in torch.split(torch.arange(len(state.logits_BV), device=state.row_S.device), _CHUNK):
            own_S = (state.row_S >= row_R[0]) & (state.row_S <= row_R[-1])
            if bool(own_S.any()):
                self._record(
                    state, own_S, state.logits_BV[row_R].float(), state.row_S[own_S] - row_R[0], token_S[own_S]
                )

    def _record(self, state: StepState, own_S: Tensor, logits_RV: Tensor, row_S: Tensor, token_S: Tensor) -> None:
        logits_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
        kept = min(self._candidates, logits_RV.shape[1])
        top_RK, index_RK = logits_RV.topk(kept, dim=-1)
        others_RV = logits_RV.scatter(1, index_RK, -torch.inf)
        rest_R = others_RV.logsumexp(-1)
        is_token_SK = index_RK[row_S] == token_S[:, None]
        rank_S = torch.where(is_token_SK.any(1), is_token_SK.int().argmax(1), kept)
        logit_S = logits_RV[row_S, token_S]
        share_S = torch.zeros_like(logit_S)
        far_S = rank_S == kept
        if bool(far_S.any()):
            far_FV = others_RV[row_S[far_S]]
            above_FV = far_FV.masked_fill(far_FV < logit_S[far_S, None], -torch.inf)
            share_S[far_S] = (above_FV.logsumexp(-1) - rest_R[row_S[far_S]]).exp().clamp(max=1)
        found = (
            state.hidden_BH[state.row_S[own_S]].bfloat16(),
            state.request_S[own_S],
            top_RK[row_S],
            rest_R[row_S],
            torch.full_like(rank_S, logits_RV.shape[1] - kept),
            logit_S,
            rank_S,
            share_S,
        )
        self._parts.append(AnswerTokens(*(tensor.cpu() for tensor in found)))

    def tokens(self) -> AnswerTokens:
        """What was recorded (at least one token)."""
        return AnswerTokens.joined(self._parts)


def soft_top_p_loss(
    temperature_N: Float[Tensor, " N"], top_p_N: Float[Tensor, " N"], tokens: AnswerTokens
) -> Float[Tensor, " N"]:
    """−log of each token's probability under its temperature and softened top-p.

    Tokens sorted by probability have cumulative probabilities c, their own included; each probability is scaled by
    exp(−α · relu(c − p)) and all are divided by their new sum. Of the tokens beyond the recorded ones, the cumulative
    probabilities are taken as evenly spread over what is left.
    """
    cold_N = 1 / temperature_N.clamp(min=_COLDEST)
    scaled_NK = tokens.top_NK * cold_N[:, None]
    log_total_N = scaled_NK.logsumexp(1)
    rest_N = torch.zeros_like(log_total_N)
    if bool((tokens.others_N > 0).any()):
        log_others_N = tokens.others_N.clamp(min=1).log()
        # −inf times a temperature has no gradient
        log_rest_N = (tokens.rest_N.clamp(min=-1e30) - log_others_N) * cold_N + log_others_N
        log_total_N = torch.logaddexp(log_total_N, log_rest_N)
        rest_N = (log_rest_N - log_total_N).exp()
    p_NK = (scaled_NK - log_total_N[:, None]).exp()
    above_NK = (p_NK.cumsum(1) - top_p_N[:, None]).relu()
    begin_N = 1 - rest_N  # where the cumulative probabilities of the others begin
    inside_N = torch.maximum(top_p_N, begin_N)
    fading_N = ((top_p_N - inside_N) * STEEPNESS).exp() - ((top_p_N - 1) * STEEPNESS).exp()
    kept_rest_N = (inside_N - begin_N) + fading_N / STEEPNESS  # apart from the sum, which may be 1e-9
    kept_N = (p_NK * (-STEEPNESS * above_NK).exp()).sum(1) + kept_rest_N

    last = tokens.top_NK.shape[1] - 1
    own_N = above_NK.gather(1, tokens.rank_N.clamp(max=last)[:, None]).squeeze(1)
    far_N = (begin_N + rest_N * tokens.share_N - top_p_N).relu()
    above_N = torch.where(tokens.rank_N > last, far_N, own_N)
    return log_total_N - tokens.logit_N * cold_N + STEEPNESS * above_N + kept_N.log()


@dataclass(frozen=True, slots=True)
class RightAnswers:
    """Tokens of right answers, and what was asked for them."""

    tokens: AnswerTokens
    problems: int
    rollouts: int
    right: int


def collect_right_answers(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    samples: int,
    seed: int,
    progress: Callable[[int, int, int], None] | None = None,
) -> RightAnswers:
    """Draw ``samples`` answers per problem at T = 1 and keep the tokens of right ones.

    Problems are asked in an order of their own until all were, or 262,144 tokens are kept. A problem without a right
    answer contributes nothing. Answers are not stored: a run that was killed draws them again.

    Raises:
        RheostatError: no answer is right.
    """
    shuffled = np.random.default_rng(derive_seed(seed, "autodeco problems")).permutation(len(problems))
    room = _CALL_BYTES // (task.max_tokens * bytes_per_token(engine.info.hidden_size))
    per_call = max(1, min(room, BATCH_SIZE) // samples)
    parts: list[AnswerTokens] = []
    asked = right = kept = written = 0
    for start in range(0, len(problems), per_call):
        chosen = [problems[index] for index in shuffled[start : start + per_call]]
        requests = [
            Request(prompt, Strategy(1.0), number, derive_seed(seed, "autodeco"), task.max_tokens)
            for prompt in map(task.prompt, chosen)
            for number in range(samples)
        ]
        recorder = AnswerRecorder()
        completions = engine.generate(requests, observer=recorder)
        verdicts = judge_all(task, [problem for problem in chosen for _ in range(samples)], completions)
        is_right = torch.tensor([verdict.correct is True for verdict in verdicts])
        tokens = recorder.tokens()
        parts.append(tokens[is_right[tokens.request_N]])
        asked, right, kept = asked + len(chosen), right + int(is_right.sum()), kept + len(parts[-1])
        written += sum(len(done.token_ids) for done in completions)
        if progress:
            progress(asked * samples, len(problems) * samples, written)
        if kept >= _MOST_TOKENS:
            break
    if not right:
        raise RheostatError(
            f"training: none of {asked * samples} answers at T = 1 to {asked} problems is right, and AutoDeco learns "
            "from right answers alone: take an easier task or a stronger model, or raise --samples"
        )
    return RightAnswers(AnswerTokens.joined(parts), asked, asked * samples, right)


def train_autodeco(
    adapter: AutoDeco,
    train: AnswerTokens,
    validation: AnswerTokens,
    config: AutoDecoTrainingConfig,
    seed: int,
    progress: Callable[[int, int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Train ``adapter`` in place; it ends with the weights of the epoch that did best on validation.

    Args:
        adapter: on the device where it is trained; its features are standardised on the training tokens first.
        train: tokens of right answers to training problems.
        validation: the same of validation problems; never learned from.
        config: see :class:`AutoDecoTrainingConfig`.
        seed: the order of the tokens is a function of it alone.
        progress: called with epoch, epochs, and 0 (nothing is generated).

    Returns:
        The history (epoch 0 is untrained) and the epoch that was kept.

    Raises:
        RheostatError: the loss became non-finite.
    """
    adapter.standardizer.fit(train.hidden_NH.float())
    optimizer = torch.optim.Adam(adapter.parameters(), lr=config.learning_rate)
    generator = torch.Generator().manual_seed(derive_seed(seed, "autodeco order") % 2**63)
    history: list[dict[str, Any]] = [{"epoch": 0, "loss": None, **_look(adapter, validation, config.batch_size)}]
    kept, weights = 0, {name: value.clone() for name, value in adapter.state_dict().items()}
    for epoch in range(1, config.epochs + 1):
        losses = []
        for index_N in torch.split(torch.randperm(len(train), generator=generator), config.batch_size):
            loss = _loss(adapter, train[index_N])[0].mean()
            if not torch.isfinite(loss):
                raise RheostatError(
                    f"training: the loss became {loss.item()} in epoch {epoch}; lower --learning-rate (now "
                    f"{config.learning_rate:g})"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()) * len(index_N))
        history.append(
            {"epoch": epoch, "loss": sum(losses) / len(train), **_look(adapter, validation, config.batch_size)}
        )
        if history[-1]["validation_loss"] < history[kept]["validation_loss"]:
            kept, weights = epoch, {name: value.clone() for name, value in adapter.state_dict().items()}
        if progress:
            progress(epoch, config.epochs, 0)
    adapter.load_state_dict(weights)
    adapter.eval()
    return history, kept


def _loss(adapter: AutoDeco, tokens: AnswerTokens) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, temperature and top-p of each token."""
    tokens = tokens.to(adapter.top_p_output.weight.device)
    temperature_N, top_p_N = adapter(tokens.hidden_NH)
    return soft_top_p_loss(temperature_N, top_p_N, tokens), temperature_N, top_p_N


@torch.no_grad()
def _look(adapter: AutoDeco, tokens: AnswerTokens, batch_size: int) -> dict[str, float]:
    """Means over the tokens."""
    parts = [
        torch.stack([value_N.sum() for value_N in _loss(adapter, tokens[index_N])]).double().cpu()
        for index_N in torch.split(torch.arange(len(tokens)), batch_size)
    ]
    loss, temperature, top_p = (torch.stack(parts).sum(0) / len(tokens)).tolist()
    return {"validation_loss": loss, "temperature": temperature, "top_p": top_p}
