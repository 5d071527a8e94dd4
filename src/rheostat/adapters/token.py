"""The token-level decoding adapter: one action at every token (paper, section 2.3 and Algorithm 2)."""

import math
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Self

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
    weights_key,
)
from rheostat.adapters.sequence import PromptFeatures, SequenceAdapter, SequenceConfig
from rheostat.decoding.policy import Decision, SamplingParameters, StepState, draw_actions
from rheostat.decoding.recording import row_statistics
from rheostat.decoding.strategy import ActionSpace
from rheostat.errors import AdapterError, ConfigError
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
        start: of the sequence-level adapter that it starts from and reads (:meth:`TokenAdapter.starting_from`).

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
    start: SequenceConfig | None = None

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
        if self.start is None:
            return
        if self.start.hidden_size != self.hidden_size:
            raise ConfigError(
                f"adapter: start reads a model with {self.start.hidden_size} hidden numbers, not {self.hidden_size}"
            )
        if self.start.features is PromptFeatures.HIDDEN and self.start.pooling != "last":
            raise ConfigError(
                "adapter: start reads the mean over a prompt's hidden states, and the first step of decoding shows the "
                "last one: train the sequence level with --pooling last"
            )

    def described(self) -> dict[str, object]:
        """Its fields as JSON values; ``start`` where there is one, so that adapters without keep their keys."""
        fields = asdict(self)
        return fields if self.start is not None else {name: fields[name] for name in fields if name != "start"}

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
        start_NA: log π(a | x, B) of the sequence level for the token's prompt, where the adapter starts from one.
    """

    hidden_NH: Float[Tensor, "N H"]
    entropy_N: Float[Tensor, " N"]
    remaining_N: Int[Tensor, " N"]
    budget_N: Int[Tensor, " N"]
    parallel_N: Int[Tensor, " N"]
    start_NA: Float[Tensor, "N A"] | None = None


class TokenAdapter(nn.Module):
    """π(a | x_t): a three-layer MLP with SiLU and dropout on h_t and the codes of the budgets.

    Weights and arithmetic are float32. It starts as the uniform mixture of its actions, whatever it reads; with
    ``config.start``, as the policy of a sequence-level adapter, whose probabilities for the prompt it also reads: then
    π(a | x_t) ∝ π_sequence(a | prompt, B) · exp(MLP(x_t, π_sequence)). That adapter is part of it and stays frozen.

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
        self.start = None if config.start is None else SequenceAdapter(config.start, space).requires_grad_(False)
        in_features = codes * code + (config.hidden_size if config.reads_hidden else 0)
        in_features += len(space) if config.start is not None else 0
        self.hidden_1 = seeded_linear(in_features, width, generator)
        self.hidden_2 = seeded_linear(width, width, generator)
        self.output = seeded_linear(width, len(space), generator)
        nn.init.zeros_(self.output.weight)  # as in SequenceAdapter: what differs from MIXED later was learned
        nn.init.zeros_(self.output.bias)

    @classmethod
    def starting_from(cls, sequence: SequenceAdapter, config: TokenConfig, seed: int = 0) -> Self:
        """Both levels in one: a token-level adapter that begins as the policy of ``sequence``, over the same actions.

        An action that the sequence level all but rules out is hardly explored at the token level.

        Raises:
            ConfigError: ``sequence`` reads what the first step of decoding does not show, or has a single action.
        """
        adapter = cls(replace(config, start=sequence.config), sequence.space, seed)
        assert adapter.start is not None
        adapter.start.load_state_dict(sequence.state_dict())
        return adapter

    def forward(self, inputs: TokenInputs) -> Float[Tensor, "N A"]:
        """log π(a | x_t) of each token, float32; with dropout in training mode.

        Raises:
            AdapterError: hidden states of another size than ``config.hidden_size``, or no ``start_NA`` where it has a
                start.
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
        if self.start is not None:
            if inputs.start_NA is None:
                raise AdapterError("the adapter starts from a sequence-level one, whose choice it was not given")
            parts.append(inputs.start_NA.exp() * math.sqrt(self.config.budget_width))
        z_NZ = torch.cat(parts, dim=1)
        for layer in (self.hidden_1, self.hidden_2):
            z_NZ = functional.dropout(functional.silu(layer(z_NZ)), self.config.dropout, has_dropout)
        logits_NA: Tensor = self.output(z_NZ)
        logits_NA = logits_NA / self.config.temperature
        return (logits_NA if inputs.start_NA is None else logits_NA + inputs.start_NA).log_softmax(dim=1)


class AdaptiveDecoding:
    """A token adapter at work: the :class:`rheostat.decoding.policy.TokenPolicy` of its actions.

    Where the adapter starts from a sequence-level one, the hidden state (or the entropy) at a request's first step is
    what that one reads of the prompt. Its choice is computed there and kept for the request's later steps, by its
    position in the call: such a policy serves one call at a time.

    Args:
        adapter: read at every step; its device should be the engine's.
        commit: take the most probable action, the first of equals, instead of drawing one (Algorithm 2, line 7).
    """

    def __init__(self, adapter: TokenAdapter, commit: bool = False) -> None:
        self.adapter = adapter
        self.commit = commit
        self._parameters = SamplingParameters.of(adapter.space.strategies, adapter.output.weight.device)
        self._start_RA = torch.empty(0, len(adapter.space), device=adapter.output.weight.device)

    @property
    def replayable(self) -> bool:
        """See :class:`rheostat.decoding.policy.ReplayedPolicy`."""
        return self.adapter.start is None and self._parameters.top_n_sigma_K is None

    @property
    def start_RA(self) -> Float[Tensor, "R A"] | None:
        """log π of the sequence level for each request of the last call, by position; None without a start."""
        return None if self.adapter.start is None else self._start_RA

    def _starts(self, state: StepState) -> Float[Tensor, "S A"] | None:
        start = self.adapter.start
        if start is None:
            return None
        first_S = state.t_S == 0
        if bool(first_S.any()):
            row_S, request_S = state.row_S[first_S], state.request_S[first_S]
            if start.config.features is PromptFeatures.ENTROPY:
                statistics = row_statistics(state.logits_BV)
                read_BZ = torch.stack([statistics.entropy_B, statistics.p_max_B], dim=1)
            else:
                read_BZ = state.hidden_BH.float()
            missing = int(request_S.max()) + 1 - len(self._start_RA)
            if missing > 0:
                rows_RA = self._start_RA.new_full((missing, len(self.adapter.space)), torch.nan)
                self._start_RA = torch.cat([self._start_RA, rows_RA])
            self._start_RA[request_S] = start.log_probabilities(read_BZ[row_S], state.parallel_S[first_S])
        return self._start_RA[state.request_S]

    @property
    def key(self) -> str:
        """A hash of weights, features and actions: two policies with the same key decide alike."""
        actions = [strategy.to_dict() for strategy in self.adapter.space]
        return weights_key("token adapter", self.adapter, self.adapter.config.described(), actions, self.commit)

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
        inputs = TokenInputs(
            hidden_SH.bfloat16(), entropy_S, state.remaining_S, state.budget_S, state.parallel_S, self._starts(state)
        )
        log_pi_SA = self.adapter.log_probabilities(inputs)
        if self.commit:
            choice_S = (log_pi_SA == log_pi_SA.amax(dim=1, keepdim=True)).int().argmax(dim=1)
        else:
            choice_S = draw_actions(state, log_pi_SA.exp())
        return Decision(self._parameters, choice_S, log_pi_SA)
