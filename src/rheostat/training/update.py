"""One update of a token-level adapter, as a function of values: here, or by many ranks at once.

What each rank is given is a share of the recorded tokens. It sums the gradient over its share, divided by the rollouts
of the whole batch; the ranks' gradients are summed, and from there on all of them do the same. So the number of ranks
changes rounding only, and the draws of dropout, which are each rank's own.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rheostat.adapters.token import TokenAdapter
from rheostat.decoding.recording import Steps
from rheostat.errors import RheostatError
from rheostat.seeding import derive_seed
from rheostat.training.surrogate import inputs_of, surrogate_loss
from rheostat.training.token_config import TokenTrainingConfig

_CHUNK = 16_384  # tokens whose features are held in float32 at once

Weights = dict[str, Tensor]


class NotFinite(RheostatError):
    """A loss, a gradient or a policy became infinite or no number."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """N recorded tokens, and what they teach.

    Attributes:
        advantage_N: of the rollout that each token belongs to.
        start_RA: log π of the sequence level for each rollout, where the adapter starts from one.
    """

    steps: Steps
    advantage_N: Float[Tensor, " N"]
    start_RA: Float[Tensor, "R A"] | None = None

    def share(self, rank: int, ranks: int) -> Self:
        """One rank's part: consecutive tokens; the parts differ by one token at most."""
        index_N = torch.arange(len(self.steps)).tensor_split(ranks)[rank]
        # by positions: a slice would be a view, and travel with all tokens
        return type(self)(self.steps[index_N], self.advantage_N[index_N], self.start_RA)


@dataclass(frozen=True, slots=True)
class Update:
    """What an update starts from, and how it is made.

    Attributes:
        adapter: with the weights to start from; it stays as it is.
        optimizer: Adam's state; empty before the first update.
        rollouts: of the batch, recorded tokens or not.
        tokens: recorded, of the whole batch.
        seeds: of dropout, one for each gradient step.
    """

    adapter: TokenAdapter
    optimizer: dict[str, Any]
    config: TokenTrainingConfig
    rollouts: int
    tokens: int
    learning_rate: float
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Updated:
    """What an update ends with, on the CPU: weights, Adam's state, and metrics of the last gradient step."""

    weights: Weights
    optimizer: dict[str, Any]
    metrics: dict[str, float]


Updater = Callable[[Update, Lesson], Updated]
"""Who makes updates: :func:`update`, or the same by many processes."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Who computes: one of several, whose vectors ``total`` sums in place, or the only one."""

    number: int = 0
    device: torch.device | str = "cpu"
    total: Callable[[Tensor], object] | None = None


ALONE = Rank()


def update(job: Update, lesson: Lesson, rank: Rank = ALONE) -> Updated:
    """The gradient steps on one batch; torch's global generator on the CPU is left as it was.

    Args:
        job: the same for every rank.
        lesson: the batch's tokens, or this rank's share of them.
        rank: who computes.

    Raises:
        NotFinite: at every rank.
    """
    config = job.config
    adapter = copy.deepcopy(job.adapter).to(rank.device)
    optimizer = torch.optim.Adam([p for p in adapter.parameters() if p.requires_grad], lr=config.learning_rate)
    if job.optimizer:
        optimizer.load_state_dict(copy.deepcopy(job.optimizer))  # which would share its tensors
    for parameters in optimizer.param_groups:
        parameters["lr"] = job.learning_rate
    metrics: dict[str, float] = {}
    adapter.train()
    with torch.random.fork_rng(devices=[]):
        for seed in job.seeds:
            torch.manual_seed((derive_seed(seed, rank.number) if rank.number else seed) % 2**63)
            metrics = _gradient_step(adapter, optimizer, job, lesson, rank)
    adapter.eval()
    with torch.no_grad():
        log_pi_NA = adapter(inputs_of(lesson.steps[:_CHUNK], rank.device, lesson.start_RA))
    _require_finite("policy", float(_summed(log_pi_NA.sum()[None], rank)))
    return Updated(weights_of(adapter), _on_cpu(optimizer.state_dict()), metrics)


def weights_of(adapter: TokenAdapter) -> Weights:
    """A copy of the weights, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in adapter.state_dict().items()}


def _gradient_step(
    adapter: TokenAdapter, optimizer: torch.optim.Adam, job: Update, lesson: Lesson, rank: Rank
) -> dict[str, float]:
    optimizer.zero_grad()
    sums = {"loss": 0.0, "entropy": 0.0, "clipped": 0.0}
    for index_N in torch.split(torch.arange(len(lesson.steps)), _CHUNK):
        loss, own = surrogate_loss(
            adapter, lesson.steps[index_N], lesson.advantage_N[index_N], job.rollouts, job.config, lesson.start_RA
        )
        loss.backward()  # type: ignore[no-untyped-call]
        own["loss"] = float(loss.detach())
        sums = {name: sums[name] + own[name] for name in sums}
    if rank.total is not None:
        sums = _sum_over_ranks(adapter, sums, rank)
    norm = float(nn.utils.clip_grad_norm_(adapter.parameters(), job.config.max_gradient_norm))
    _require_finite("loss", sums["loss"])
    _require_finite("gradient", norm)
    optimizer.step()
    return {
        "loss": sums["loss"],
        "gradient_norm": norm,
        "entropy": sums["entropy"] / job.tokens,
        "clipped": sums["clipped"] / job.tokens,
    }


def _sum_over_ranks(adapter: TokenAdapter, sums: dict[str, float], rank: Rank) -> dict[str, float]:
    """Gradients and sums of all ranks, in one vector."""
    learned = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
    own = torch.tensor(list(sums.values())).to(gradients[0])
    whole = _summed(torch.cat([*(gradient.flatten() for gradient in gradients), own]), rank)
    *parts, total = torch.split(whole, [*(gradient.numel() for gradient in gradients), len(own)])
    for parameter, part in zip(learned, parts, strict=True):
        parameter.grad = part.view_as(parameter).clone()
    return dict(zip(sums, total.tolist(), strict=True))


def _summed(vector: Tensor, rank: Rank) -> Tensor:
    if rank.total is not None:
        rank.total(vector)
    return vector


def _require_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise NotFinite(f"the {name} became {value}")


def _on_cpu(state: Any) -> Any:
    """A copy of nested dictionaries and lists, with its tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {name: _on_cpu(value) for name, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else state
