"""What an engine asks a policy, and what it gets back. Adapters and baselines stand behind the same protocols."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from rheostat.decoding.strategy import ActionSpace, Strategy
from rheostat.errors import AdapterError
from rheostat.seeding import Purpose, tensor_uniforms, uniforms


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """K parameter sets as columns: temperature ≥ 0 (0 greedy), top_k (0 off), top_p (1 off), min_p (0 off).

    ``top_n_sigma_K`` (0 off) is None where no set has it, and then costs nothing.
    """

    temperature_K: Float[Tensor, " K"]
    top_k_K: Int[Tensor, " K"]
    top_p_K: Float[Tensor, " K"]
    min_p_K: Float[Tensor, " K"]
    top_n_sigma_K: Float[Tensor, " K"] | None = None

    @classmethod
    def of(cls, strategies: Sequence[Strategy], device: torch.device | str = "cpu") -> Self:
        """The columns of ``strategies``, in their order, in float64."""
        sigmas = [s.top_n_sigma or 0.0 for s in strategies]
        return cls(
            torch.tensor([s.temperature for s in strategies], dtype=torch.float64, device=device),
            torch.tensor([s.top_k or 0 for s in strategies], dtype=torch.int64, device=device),
            torch.tensor([s.top_p or 1.0 for s in strategies], dtype=torch.float64, device=device),
            torch.tensor([s.min_p or 0.0 for s in strategies], dtype=torch.float64, device=device),
            torch.tensor(sigmas, dtype=torch.float64, device=device) if any(sigmas) else None,
        )

    @property
    def truncates_K(self) -> Bool[Tensor, " K"]:
        """Which sets may exclude tokens."""
        truncates_K = (self.top_k_K > 0) | (self.top_p_K < 1) | (self.min_p_K > 0)
        return truncates_K if self.top_n_sigma_K is None else truncates_K | (self.top_n_sigma_K > 0)

    def __getitem__(self, index: Tensor) -> Self:
        """The parameter sets at ``index`` (positions or a mask)."""
        return type(self)(
            self.temperature_K[index],
            self.top_k_K[index],
            self.top_p_K[index],
            self.min_p_K[index],
            None if self.top_n_sigma_K is None else self.top_n_sigma_K[index],
        )

    def __len__(self) -> int:
        return len(self.temperature_K)


@dataclass(frozen=True, slots=True)
class StepState:
    """What a token policy sees at one step, for S active sequences standing on B ≤ S distinct rows.

    Sequences of one prompt that have written the same tokens so far share a row, because the frozen model
    gives them the same distribution: ``hidden_BH[row_S]`` and ``logits_BV[row_S]`` are theirs.

    Attributes:
        hidden_BH: the last hidden state after the final norm, of each row.
        logits_BV: untempered logits, float32.
        row_S: each sequence's row.
        request_S: each sequence's position among the requests of the call.
        t_S: tokens written so far; the remaining budget is ``budget_S - t_S`` (paper, section 2.3).
        budget_S: each sequence's token budget b.
        parallel_S: how many completions of its prompt may be sampled: the parallel budget B of each sequence.
        streams_S: each sequence's random stream (``rheostat.seeding``); where the host may not look at a step, its 64
            bits as int64 on the device.
    """

    hidden_BH: Float[Tensor, "B H"]
    logits_BV: Float[Tensor, "B V"]
    row_S: Int[Tensor, " S"]
    request_S: Int[Tensor, " S"]
    t_S: Int[Tensor, " S"]
    budget_S: Int[Tensor, " S"]
    parallel_S: Int[Tensor, " S"]
    streams_S: NDArray[np.uint64] | Int[Tensor, " S"]

    @property
    def remaining_S(self) -> Int[Tensor, " S"]:
        """b_t = b − t, at least 1."""
        return self.budget_S - self.t_S


@dataclass(frozen=True, slots=True)
class Decision:
    """How each of S sequences samples its next token: sequence s uses parameter set ``choice_S[s]``.

    A policy with a distribution over the sets says so: ``log_pi_SK`` is log π(k | x_t), from which the choice was drawn
    (or of which it is the mode).
    """

    parameters: SamplingParameters
    choice_S: Int[Tensor, " S"]
    log_pi_SK: Float[Tensor, "S K"] | None = None


class TokenPolicy(Protocol):
    """Picks sampling parameters at every step, for every active sequence."""

    def decide(self, state: StepState) -> Decision: ...


class ReplayedPolicy(TokenPolicy, Protocol):
    """A token policy that a GPU can replay.

    Attributes:
        replayable: whether ``decide`` is nothing but operations on the step's tensors and on tensors that stay where
            they are, and looks at no number of them where ``streams_S`` is a tensor.
    """

    @property
    def replayable(self) -> bool: ...


class NamedPolicy(TokenPolicy, Protocol):
    """A token policy whose completions can be stored: ``key`` names everything that shapes its decisions."""

    @property
    def key(self) -> str: ...


class StepObserver(Protocol):
    """Watches a decode loop: called after every step with what the policy saw, what it decided, what was drawn."""

    def observe(self, state: StepState, decision: Decision, token_S: Int[Tensor, " S"]) -> None: ...


NOT_FINITE = "the policy's probabilities are not finite: its weights or the hidden states are damaged"


def invert_cdf(pi_PA: Float[Tensor, "P A"], uniform_P: Float[Tensor, " P"]) -> Int[Tensor, " P"]:
    """The action of each row whose share of [0, 1) holds that row's uniform, in float64.

    Raises:
        AdapterError: probabilities that are not finite.
    """
    cdf_PA = pi_PA.double().cumsum(dim=1)
    if not bool(cdf_PA[:, -1].isfinite().all()):
        raise AdapterError(NOT_FINITE)
    return _first_above(cdf_PA, uniform_P.to(cdf_PA))


def _first_above(cdf_PA: Tensor, uniform_P: Tensor) -> Tensor:
    cdf_PA = cdf_PA / cdf_PA[:, -1:]  # ends at exactly 1, above every uniform
    return torch.searchsorted(cdf_PA, uniform_P[:, None], right=True).squeeze(1)


def draw_actions(state: StepState, pi_SA: Float[Tensor, "S A"]) -> Int[Tensor, " S"]:
    """One action per sequence by inverse CDF, from the sequences' own action streams.

    These are independent of the token streams, so that a token is distributed as μ = Σ_a π(a) p_a.

    Args:
        state: the step.
        pi_SA: rows sum to one.

    Raises:
        AdapterError: probabilities that are not finite, where the host may look at them. Elsewhere any action stands
            for them, and ``log_pi_SK`` says so.
    """
    if isinstance(state.streams_S, Tensor):
        uniform_S = tensor_uniforms(state.streams_S, state.t_S, Purpose.ACTION)
        return _first_above(pi_SA.double().cumsum(dim=1), uniform_S).clamp(max=pi_SA.shape[1] - 1)
    steps = state.t_S.cpu().numpy()
    return invert_cdf(pi_SA, torch.from_numpy(uniforms(state.streams_S, steps, Purpose.ACTION)))


class SequencePolicy(Protocol):
    """Picks one strategy per prompt, from its embedding and the parallel budget B (paper, section 2.2)."""

    @property
    def space(self) -> ActionSpace: ...

    def probabilities(self, embedding_PH: Float[Tensor, "P H"], budget_P: Int[Tensor, " P"]) -> Float[Tensor, "P A"]:
        """π(a | x) of each prompt; rows sum to one."""
        ...


class FixedStrategies:
    """The token policy of requests that carry their own strategy: ``strategies[i]`` is request i's, at every step."""

    def __init__(self, strategies: Sequence[Strategy], device: torch.device | str = "cpu") -> None:
        table = list(dict.fromkeys(strategies))
        position = {strategy: index for index, strategy in enumerate(table)}
        self._parameters = SamplingParameters.of(table, device)
        self._choice_N = torch.tensor([position[s] for s in strategies], dtype=torch.int64, device=device)

    @property
    def replayable(self) -> bool:
        """See :class:`ReplayedPolicy`; top-nσ is worked out from the logits, by a host that looks at them."""
        return self._parameters.top_n_sigma_K is None

    def sets(self, request_S: Int[Tensor, " S"]) -> SamplingParameters:
        """The parameter sets of these requests, one each."""
        return self._parameters[self._choice_N[request_S]]

    def decide(self, state: StepState) -> Decision:
        return Decision(self._parameters, self._choice_N[state.request_S])
