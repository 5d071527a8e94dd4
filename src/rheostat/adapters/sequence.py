"""The sequence-level decoding adapter: one strategy per prompt (paper, section 2.2 and Algorithm 1)."""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rheostat.adapters.features import BudgetEncoder, Standardizer, require_fields, require_size, seeded_linear
from rheostat.decoding.policy import invert_cdf
from rheostat.decoding.strategy import ActionSpace
from rheostat.errors import ConfigError
from rheostat.seeding import derive_seed

_POOLINGS = ("last", "mean")


class PromptFeatures(StrEnum):
    """What a sequence adapter reads of the frozen model at the end of a prompt."""

    HIDDEN = "hidden"  # the prompt's embedding
    ENTROPY = "entropy"  # entropy (nats) and largest probability of the next token alone: the paper's ablation


@dataclass(frozen=True, slots=True)
class SequenceConfig:
    """What a sequence adapter reads and how large it is.

    The paper asks "is entropy alone sufficient?" at the token level. Which statistic of a prompt would stand for it at
    the sequence level is ours to choose: with ``features`` entropy, the adapter reads the entropy, in nats, and the
    largest probability of the model's next-token distribution at the prompt's end.

    Attributes:
        hidden_size: numbers in the base model's embedding of a prompt.
        with_budget: whether the policy also reads the parallel budget B.
        width: of the two hidden layers.
        budget_width: of the budget's code; unused without budget.
        dropout: in [0, 1), after each hidden layer, in training only (paper, Table 15: 0.1).
        temperature: T > 0 of the softmax over actions (Algorithm 1, line 6).
        pooling: which hidden state stands for a prompt, ``last`` or ``mean``; unused with ``features`` entropy.
        budgets: the parallel budgets that the adapter is trained for, rising.
        features: what it reads of the model.

    Raises:
        ConfigError: a field outside its range.
    """

    hidden_size: int
    with_budget: bool = True
    width: int = 128
    budget_width: int = 16
    dropout: float = 0.1
    temperature: float = 1.0
    pooling: str = "last"
    budgets: tuple[int, ...] = (1, 2, 4, 8)
    features: PromptFeatures = PromptFeatures.HIDDEN

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "features", PromptFeatures(self.features))
        except ValueError:
            raise ConfigError(
                f"adapter: features must be one of {', '.join(PromptFeatures)}, got {self.features!r}"
            ) from None
        if self.pooling not in _POOLINGS:
            raise ConfigError(f"adapter: pooling must be last or mean, got {self.pooling!r}")
        object.__setattr__(self, "budgets", tuple(self.budgets))
        require_fields(self)

    @property
    def inputs(self) -> int:
        """How many numbers it reads of each prompt."""
        return self.hidden_size if self.features is PromptFeatures.HIDDEN else 2


class SequenceAdapter(nn.Module):
    """π(a | x, B): a three-layer MLP with SiLU and dropout on the prompt's features and the code of the budget.

    It is a :class:`rheostat.decoding.policy.SequencePolicy`. Weights and arithmetic are float32.

    Args:
        config: what it reads, and its size.
        space: the strategies it chooses from, in the order of its outputs.
        seed: the initial weights are a function of it; torch's global generator is neither read nor moved.
    """

    def __init__(self, config: SequenceConfig, space: ActionSpace, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.space = space
        generator = torch.Generator().manual_seed(derive_seed("sequence adapter", seed))
        self.standardizer = Standardizer(config.inputs)
        self.budget_encoder = BudgetEncoder(config.budget_width, generator) if config.with_budget else None
        in_features = config.inputs + (config.budget_width if config.with_budget else 0)
        self.hidden_1 = seeded_linear(in_features, config.width, generator)
        self.hidden_2 = seeded_linear(config.width, config.width, generator)
        self.output = seeded_linear(config.width, len(space), generator)
        # Zero, so that the policy starts as MIXED, the uniform mixture, whatever the embedding: every action is
        # explored alike, and what differs from MIXED later was learned.
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, embedding_PH: Float[Tensor, "P H"], budget_P: Int[Tensor, " P"]) -> Float[Tensor, "P A"]:
        """log π(a | x, B) of each prompt, float32; with dropout in training mode.

        Args:
            embedding_PH: the frozen model's embeddings, as pooled by ``config.pooling``; with ``config.features``
                entropy, the two numbers of :func:`rheostat.training.prompts.prompt_entropy` instead.
            budget_P: parallel budgets of at least 1; ignored by an adapter without budget.

        Raises:
            AdapterError: not ``config.inputs`` numbers of each prompt.
            ConfigError: a budget below 1, or not one budget per prompt.
        """
        return self._log_probabilities(embedding_PH, budget_P, self.training)

    def log_probabilities(
        self, embedding_PH: Float[Tensor, "P H"], budget_P: Int[Tensor, " P"]
    ) -> Float[Tensor, "P A"]:
        """As :meth:`forward`, without dropout whatever the mode."""
        return self._log_probabilities(embedding_PH, budget_P, False)

    @torch.no_grad()
    def probabilities(self, embedding_PH: Float[Tensor, "P H"], budget_P: Int[Tensor, " P"]) -> Float[Tensor, "P A"]:
        """π(a | x, B) of each prompt, float32, without dropout or gradient, whatever the mode; rows sum to one.

        Raises:
            AdapterError, ConfigError: as :meth:`forward`.
        """
        return self.log_probabilities(embedding_PH, budget_P).exp()

    def choose(
        self,
        embedding_PH: Float[Tensor, "P H"],
        budget_P: Int[Tensor, " P"],
        uniform_P: Float[Tensor, " P"] | None = None,
    ) -> Int[Tensor, " P"]:
        """The position in ``space`` of one action per prompt (Algorithm 1, SEQSELECTSTRATEGY).

        Args:
            embedding_PH: as in :meth:`forward`.
            budget_P: as in :meth:`forward`.
            uniform_P: one uniform in [0, 1) per prompt, float64, which draws the action by inverse CDF; without them
                the most likely action, the first of equals.

        Raises:
            AdapterError, ConfigError: as :meth:`forward`, and for uniforms that are not one in [0, 1) per prompt.
        """
        pi_PA = self.probabilities(embedding_PH, budget_P)
        if uniform_P is None:
            # torch's argmax promises no order among equals
            return (pi_PA == pi_PA.amax(dim=1, keepdim=True)).int().argmax(dim=1)
        if uniform_P.shape != (len(pi_PA),) or not bool(((uniform_P >= 0) & (uniform_P < 1)).all()):
            raise ConfigError("adapter: choosing needs one uniform in [0, 1) per prompt")
        return invert_cdf(pi_PA, uniform_P)

    def _log_probabilities(self, embedding_PH: Tensor, budget_P: Tensor, has_dropout: bool) -> Tensor:
        """Dropout is an argument and not the module's mode, so that one adapter can serve several threads."""
        require_size(embedding_PH, self.config.inputs)
        # Embedding and code of the budget enter with the same norm: 576 numbers of the one would drown 16 of the other,
        # and a policy trained for minutes would hardly see the budget.
        z_PZ = self.standardizer(embedding_PH) * math.sqrt(self.config.budget_width / self.config.inputs)
        if self.budget_encoder is not None:
            if budget_P.shape != (len(embedding_PH),):
                raise ConfigError(
                    f"adapter: give one budget per prompt, got {tuple(budget_P.shape)} for {len(embedding_PH)} prompts"
                )
            z_PZ = torch.cat([z_PZ, self.budget_encoder(budget_P)], dim=1)
        for layer in (self.hidden_1, self.hidden_2):
            z_PZ = functional.dropout(functional.silu(layer(z_PZ)), self.config.dropout, has_dropout)
        logits_PA: Tensor = self.output(z_PZ)
        return (logits_PA / self.config.temperature).log_softmax(dim=1)
