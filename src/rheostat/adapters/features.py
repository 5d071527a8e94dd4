"""What an adapter's network reads: standardised hidden states, and the budget as a vector."""

import hashlib
import json
import math
from typing import Protocol

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


_GAIN = 6.0


class ScalarEncoder(nn.Module):
    """A few numbers of about one to ten as a vector of ``width`` numbers: a two-layer MLP.

    Args:
        inputs: how many numbers it reads.
        width: how many numbers it gives, also the width of its hidden layer.
        generator: where the initial weights come from; by default torch's global generator.
    """

    def __init__(self, inputs: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.hidden = seeded_linear(inputs, width, generator)
        self.output = seeded_linear(width, width, generator)
        with torch.no_grad():  # inputs from 0 to 3 then differ by about one standard deviation, as embeddings do
            self.output.weight.mul_(_GAIN)

    def encode(self, value_NI: Float[Tensor, "N I"]) -> Float[Tensor, "N W"]:
        """The code of each row."""
        code_NW: Tensor = self.output(functional.silu(self.hidden(value_NI)))
        return code_NW


class BudgetEncoder(ScalarEncoder):
    """A parallel budget B as a vector of ``width`` numbers.

    "We encode the budget value using a two-layer MLP, then concatenate it to the embedding of the context" (paper,
    section 3.1). The MLP reads log2 of the budget: budgets double (1, 2, 4, 8), so that log2 spaces them evenly and
    keeps a large one from drowning the small ones.

    Args:
        width: how many numbers it gives, also the width of its hidden layer.
        generator: where the initial weights come from; by default torch's global generator.
    """

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__(1, width, generator)

    def forward(self, budget_P: Int[Tensor, " P"]) -> Float[Tensor, "P W"]:
        """The code of each budget.

        Args:
            budget_P: budgets of at least 1.

        Raises:
            ConfigError: a budget below 1.
        """
        return self.encode(_log2(budget_P, self.hidden.weight)[:, None])


class TokenBudgetEncoder(ScalarEncoder):
    """The remaining and the total token budget as a vector of ``width`` numbers.

    The MLP reads log2 of the share that remains, −log2 b to 0, and log2 of the total, centred at 64 tokens.

    Args:
        width: how many numbers it gives, also the width of its hidden layer.
        generator: where the initial weights come from; by default torch's global generator.
    """

    def __init__(self, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__(2, width, generator)

    def forward(self, remaining_N: Int[Tensor, " N"], budget_N: Int[Tensor, " N"]) -> Float[Tensor, "N W"]:
        """The code of b_t and b.

        Args:
            remaining_N: b_t = b − t, at least 1.
            budget_N: b, at least 1.

        Raises:
            ConfigError: a budget below 1.
        """
        log_total_N = _log2(budget_N, self.hidden.weight)
        log_share_N = _log2(remaining_N, self.hidden.weight) - log_total_N
        return self.encode(torch.stack([log_share_N, (log_total_N - 6) / 2], dim=1))


def _log2(budget_N: Tensor, like: Tensor) -> Tensor:
    # on a GPU, looking at the values would wait for it, at every token
    if budget_N.device.type == "cpu" and bool((budget_N < 1).any()):
        raise ConfigError(f"budget must be at least 1, got {budget_N.min().item()}")
    return budget_N.to(like).log2()


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


def weights_key(kind: str, module: nn.Module, *described: object) -> str:
    """``kind`` and a hash of a module's weights and of what else shapes its decisions (JSON values)."""
    digest = hashlib.blake2b(json.dumps(described).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return f"{kind} {digest.hexdigest()}"


class Sizes(Protocol):
    """The fields that the configurations of both adapters share."""

    @property
    def budgets(self) -> tuple[int, ...]: ...


def require_fields(config: Sizes, allow_no_budgets: bool = False) -> None:
    """Refuse an adapter's configuration with a field outside its range, with a ConfigError that names it."""
    for name in ("hidden_size", "width", "budget_width"):
        if not is_whole(getattr(config, name)):
            raise ConfigError(f"adapter: {name} must be a whole number of at least 1, got {getattr(config, name)!r}")
    with_budget, dropout, temperature = (getattr(config, name) for name in ("with_budget", "dropout", "temperature"))
    if not isinstance(with_budget, bool):
        raise ConfigError(f"adapter: with_budget must be true or false, got {with_budget!r}")
    if not (_is_number(dropout) and 0 <= dropout < 1):
        raise ConfigError(f"adapter: dropout must lie in [0, 1), got {dropout!r}")
    if not (_is_number(temperature) and 0 < temperature < math.inf):
        raise ConfigError(f"adapter: temperature must be a number above 0, got {temperature!r}")
    budgets = list(config.budgets)
    if not all(map(is_whole, budgets)) or budgets != sorted(set(budgets)) or not (budgets or allow_no_budgets):
        raise ConfigError(f"adapter: budgets must be whole numbers of at least 1 in rising order, got {budgets}")


def is_whole(value: object) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
