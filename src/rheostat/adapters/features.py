"""What an adapter's network reads: standardised hidden states, and the budget as a vector."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rheostat.errors import AdapterError, ConfigError

_SMALLEST_SHARE = 0.1  # of the typical spread: no dimension is magnified more than ten times beyond the others
_ROUNDING = 1e-6  # spreads below this share of the largest one are what float32 leaves of a constant


def seeded_linear(in_features: int, out_features: int, generator: torch.Generator | None = None) -> nn.Linear:
    """A float32 linear layer with torch's own initial distribution, drawn from ``generator`` alone.

    torch's constructor draws from the global generator; this one leaves it untouched (without ``generator``, weights
    and bias are drawn from the global one).
    """
    layer = nn.Linear(in_features, out_features, device="meta", dtype=torch.float32).to_empty(device="cpu")
    bound = 1 / math.sqrt(in_features)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


_BUDGET_GAIN = 6.0


class BudgetEncoder(nn.Module):
    """A budget as a vector of ``width`` numbers.

    "We encode the budget value using a two-layer MLP, then concatenate it to the embedding of the context" (paper,
    section 3.1). The MLP reads log2 of the budget: budgets double (1, 2, 4, 8), so that log2 spaces them evenly and
    keeps a large one from drowning the small ones.

    Args:
        width: how many numbers it gives, also the width of its hidden layer.
        generator: where the initial weights come from; by default torch's global generator.
    """

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.hidden = seeded_linear(1, width, generator)
        self.output = seeded_linear(width, width, generator)
        with torch.no_grad():  # budgets of 1 to 8 then differ by about one standard deviation, as embeddings do
            self.output.weight.mul_(_BUDGET_GAIN)

    def forward(self, budget_P: Int[Tensor, " P"]) -> Float[Tensor, "P W"]:
        """The code of each budget.

        Args:
            budget_P: budgets of at least 1.

        Raises:
            ConfigError: a budget below 1.
        """
        if bool((budget_P < 1).any()):
            raise ConfigError(f"budget must be at least 1, got {budget_P.min().item()}")
        log_P1 = budget_P.to(self.hidden.weight).log2().unsqueeze(-1)
        code_PW: Tensor = self.output(functional.silu(self.hidden(log_P1)))
        return code_PW


class Standardizer(nn.Module):
    """Embeddings with mean 0 and spread 1 in every dimension, as measured on the training embeddings.

    Hidden states have a few dimensions that are hundreds of times larger than the rest; a small network learns little
    from them as they are. Before :meth:`fit` it is the identity. Mean and scale are buffers, so that they travel in
    the adapter's file.
    """

    mean_H: Tensor
    scale_H: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("mean_H", torch.zeros(hidden_size, dtype=torch.float32))
        self.register_buffer("scale_H", torch.ones(hidden_size, dtype=torch.float32))

    @torch.no_grad()
    def fit(self, embedding_PH: Float[Tensor, "P H"]) -> None:
        """Take mean and scale from the training embeddings.

        The scale is the standard deviation, but at least a tenth of the median one, so that a dimension that hardly
        moved in training does not explode when it moves later; where nothing moves at all it is 1.

        Args:
            embedding_PH: finite embeddings of P ≥ 1 prompts.

        Raises:
            AdapterError: no embeddings, embeddings of another size, or values that are not finite.
        """
        require_size(embedding_PH, len(self.mean_H))
        if not len(embedding_PH):
            raise AdapterError("cannot standardise: there are no training embeddings")
        values_PH = embedding_PH.to(self.mean_H.device, torch.float64)
        if not bool(values_PH.isfinite().all()):
            raise AdapterError("cannot standardise: the training embeddings hold values that are not finite")
        mean_H = values_PH.mean(dim=0)
        spread_H = values_PH.std(dim=0, correction=0)
        if spread_H.max() <= _ROUNDING * values_PH.abs().max():
            scale_H = torch.ones_like(spread_H)
        else:
            typical = spread_H[spread_H > _ROUNDING * spread_H.max()].median()
            scale_H = spread_H.clamp_min(_SMALLEST_SHARE * typical)
        self.mean_H.copy_(mean_H)
        self.scale_H.copy_(scale_H)

    def forward(self, embedding_PH: Float[Tensor, "P H"]) -> Float[Tensor, "P H"]:
        """``(embedding - mean) / scale``, in float32."""
        return (embedding_PH.to(self.mean_H) - self.mean_H) / self.scale_H


def require_size(embedding_PH: Tensor, hidden_size: int) -> None:
    """Refuse embeddings that are not P rows of ``hidden_size`` numbers with an AdapterError that names both sizes."""
    if embedding_PH.ndim != 2:
        raise AdapterError(
            f"the adapter reads one embedding per row, P x {hidden_size} numbers, "
            f"got an array of shape {tuple(embedding_PH.shape)}"
        )
    if embedding_PH.shape[1] != hidden_size:
        raise AdapterError(
            f"the adapter reads embeddings of {hidden_size} numbers, got {embedding_PH.shape[1]}: "
            "use the base model that it was trained for"
        )
