"""The token-level decoding adapter: one action at every token (paper, section 2.3 and Algorithm 2)."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rheostat.adapters.features import (
    BudgetEncoder,
    ScalarEncoder,
    Standardizer,
    TokenBudgetEncoder,
    require_fields,
    require_size,
    seeded_linear,
)
from rheostat.decoding.policy import Decision, SamplingParameters, StepState, draw_actions
from rheostat.decoding.recording import row_statistics
from rheostat.decoding.strategy import ActionSpace
from rheostat.errors import ConfigError
from rheostat.seeding import derive_seed


class Features(StrEnum):
    """What a token adapter reads of the frozen model."""

    HIDDEN = "hidden"  # h_t, the last hidden state after the final norm
    ENTROPY = "entropy"  # the entropy of the untempered distribution alone: the paper's ablation
    BOTH = "hidden+entropy"


@dataclass(frozen=True, slots=True)
class TokenConfig:
    """What a token adapter reads and how large it is.

    Attributes:
        hidden_size: numbers in the base model's hidden state.
        features: what it reads of the model.
        with_budget: whether it also reads the remaining and the total token budget.
        budgets: the parallel budgets B that it is trained for and reads, rising; empty: trained for pass@1, blind to B.
        width: of the two hidden layers.
        budget_width: of the codes of budgets and entropy.
        dropout: in [0, 1), after each hidden layer, in updates only (paper, Table 15: 0.1).
        temperature: T > 0 of the softmax over actions (Algorithm 2, line 3).

    Raises:
        ConfigError: a field outside its range.
    """

    hidden_size: int
    features: Features = Features.HIDDEN
    with_budget: bool = True
    budgets: tuple[int, ...] = ()
    width: int = 128
    budget_width: int = 16
    dropout: float = 0.1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "features", Features(self.features))
        except ValueError:
            raise ConfigError(
                f"adapter: features must be one of {', '.join(Features)}, got {self.features!r}"
            ) from None
        object.__setattr__(self, "budgets", tuple(self.budgets))
        require_fields(self, allow_no_budgets=True)
        for name in ("dropout", "temperature"):  # 1 and 1.0 are one configuration, and one key
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def reads_hidden(self) -> bool:
        return self.features is not Features.ENTROPY

    @property
    def reads_entropy(self) -> bool:
        return self.features is not Features.HIDDEN


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """x_t of N tokens.

    Attributes:
        hidden_NH: h_t in any floating dtype.
        entropy_N: of the untempered distribution, in nats.
        remaining_N: b_t = b − t, at least 1.
        budget_N: the token budget b.
        parallel_N: the parallel budget B.
    """

    hidden_NH: Float[Tensor, "N H"]
    entropy_N: Float[Tensor, " N"]
    remaining_N: Int[Tensor, " N"]
    budget_N: Int[Tensor, " N"]
    parallel_N: Int[Tensor, " N"]


class TokenAdapter(nn.Module):
    """π(a | x_t): a three-layer MLP with SiLU and dropout on h_t and the codes of the budgets.

    Weights and arithmetic are float32. It starts as the uniform mixture of its actions, whatever it reads.

    Args:
        config: what it reads, and its size.
        space: the actions it chooses from, in the order of its outputs.
        seed: the initial weights are a function of it; torch's global generator is neither read nor moved.

    Raises:
        ConfigError: fewer than two actions.
    """

    def __init__(self, config: TokenConfig, space: ActionSpace, seed: int = 0) -> None:
        super().__init__()
        if len(space) < 2:
            raise ConfigError(f"adapter: a policy needs at least two actions to choose from, got {len(space)}")
        self.config = config
        self.space = space
        generator = torch.Generator().manual_seed(derive_seed("token adapter", seed))
        width, code = config.width, config.budget_width
        self.standardizer = Standardizer(config.hidden_size) if config.reads_hidden else None
        self.entropy_encoder = ScalarEncoder(1, code, generator) if config.reads_entropy else None
        self.budget_encoder = TokenBudgetEncoder(code, generator) if config.with_budget else None
        self.parallel_encoder = BudgetEncoder(code, generator) if config.budgets else None
        codes = sum(e is not None for e in (self.entropy_encoder, self.budget_encoder, self.parallel_encoder))
        in_features = codes * code + (config.hidden_size if config.reads_hidden else 0)
        self.hidden_1 = seeded_linear(in_features, width, generator)
        self.hidden_2 = seeded_linear(width, width, generator)
        self.output = seeded_linear(width, len(space), generator)
        nn.init.zeros_(self.output.weight)  # as in SequenceAdapter: what differs from MIXED later was learned
        nn.init.zeros_(self.output.bias)

    def forward(self, inputs: TokenInputs) -> Float[Tensor, "N A"]:
        """log π(a | x_t) of each token, float32; with dropout in training mode.

        Raises:
            AdapterError: hidden states of another size than ``config.hidden_size``.
            ConfigError: a budget below 1.
        """
        return self._log_probabilities(inputs, self.training)

    def log_probabilities(self, inputs: TokenInputs) -> Float[Tensor, "N A"]:
        """As :meth:`forward`, without dropout whatever the mode: the function that rollouts and ratios use."""
        return self._log_probabilities(inputs, False)

    def _log_probabilities(self, inputs: TokenInputs, has_dropout: bool) -> Tensor:
        parts = []
        if self.standardizer is not None:
            require_size(inputs.hidden_NH, self.config.hidden_size)
            # With the norm of a code, as in SequenceAdapter: a long vector would drown the short ones.
            scale = math.sqrt(self.config.budget_width / self.config.hidden_size)
            parts.append(self.standardizer(inputs.hidden_NH) * scale)
        if self.entropy_encoder is not None:
            parts.append(self.entropy_encoder.encode(inputs.entropy_N.float()[:, None]))
        if self.budget_encoder is not None:
            parts.append(self.budget_encoder(inputs.remaining_N, inputs.budget_N))
        if self.parallel_encoder is not None:
            parts.append(self.parallel_encoder(inputs.parallel_N))
        z_NZ = torch.cat(parts, dim=1)
        for layer in (self.hidden_1, self.hidden_2):
            z_NZ = functional.dropout(functional.silu(layer(z_NZ)), self.config.dropout, has_dropout)
        logits_NA: Tensor = self.output(z_NZ)
        return (logits_NA / self.config.temperature).log_softmax(dim=1)


class AdaptiveDecoding:
    """A token adapter at work: the :class:`rheostat.decoding.policy.TokenPolicy` of its actions.

    Args:
        adapter: read at every step; its device should be the engine's.
        commit: take the most probable action, the first of equals, instead of drawing one (Algorithm 2, line 7).
    """

    def __init__(self, adapter: TokenAdapter, commit: bool = False) -> None:
        self.adapter = adapter
        self.commit = commit
        self._parameters = SamplingParameters.of(adapter.space.strategies, adapter.output.weight.device)

    @property
    def key(self) -> str:
        """A hash of weights, features and actions: two policies with the same key decide alike."""
        described = [asdict(self.adapter.config), [s.to_dict() for s in self.adapter.space], self.commit]
        digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=16)
        for name, tensor in sorted(self.adapter.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"token adapter {digest.hexdigest()}"

    @torch.no_grad()
    def decide(self, state: StepState) -> Decision:
        """See :class:`rheostat.decoding.policy.TokenPolicy`."""
        config = self.adapter.config
        if config.reads_entropy:
            entropy_S = row_statistics(state.logits_BV).entropy_B[state.row_S]
        else:
            entropy_S = torch.zeros(len(state.row_S), device=state.row_S.device)
        hidden_SH = state.hidden_BH[state.row_S]
        # An update sees h_t as it was recorded, in bfloat16; so does the rollout, that both are the same function.
        inputs = TokenInputs(hidden_SH.bfloat16(), entropy_S, state.remaining_S, state.budget_S, state.parallel_S)
        log_pi_SA = self.adapter.log_probabilities(inputs)
        if self.commit:
            choice_S = (log_pi_SA == log_pi_SA.amax(dim=1, keepdim=True)).int().argmax(dim=1)
        else:
            choice_S = draw_actions(state, log_pi_SA.exp())
        return Decision(self._parameters, choice_S, log_pi_SA)
