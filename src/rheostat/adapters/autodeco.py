"""A learned rival: heads that predict a temperature and a top-p at every token (AutoDeco; Wang et al., 2025).

arXiv:2510.26697. Where Rheostat's token adapter draws one of a few strategies, and is trained by policy gradient, these
heads give any temperature in (0, 2) and any top-p in (0, 1), and are trained by cross-entropy on right answers
(:mod:`rheostat.training.autodeco`).
"""

from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rheostat.adapters.features import Standardizer, is_whole, require_size, seeded_linear, weights_key
from rheostat.decoding.policy import Decision, SamplingParameters, StepState
from rheostat.decoding.strategy import Strategy
from rheostat.errors import AdapterError, ConfigError
from rheostat.seeding import derive_seed

_TOP_P_BIAS = 3.0  # σ(3) = 0.95


@dataclass(frozen=True, slots=True)
class AutoDecoConfig:
    """How large the heads are.

    Attributes:
        hidden_size: numbers in the base model's hidden state.
        width: of the hidden layer of each head (256 as published).
        budgets: empty, since the heads see no parallel budget.

    Raises:
        ConfigError: a field outside its range.
    """

    hidden_size: int
    width: int = 256
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(self.budgets))
        for name in ("hidden_size", "width"):
            if not is_whole(getattr(self, name)):
                raise ConfigError(f"adapter: {name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if self.budgets:
            raise ConfigError(f"adapter: AutoDeco sees no parallel budget, budgets must be empty, got {self.budgets}")


class AutoDeco(nn.Module):
    """T = 2σ(MLP(h)) and p = σ(MLP([h, T])), two layers with ReLU each.

    Weights and arithmetic are float32. It starts at T = 1 and p = 0.95 whatever it reads. Unlike the published heads it
    standardises the hidden state, as Rheostat's own adapters do, so that the comparison is not one of learning rates.

    Args:
        config: its size.
        seed: the initial weights are a function of it; torch's global generator is neither read nor moved.
    """

    def __init__(self, config: AutoDecoConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(derive_seed("autodeco", seed))
        self.standardizer = Standardizer(config.hidden_size)
        self.temperature_hidden = seeded_linear(config.hidden_size, config.width, generator)
        self.temperature_output = seeded_linear(config.width, 1, generator)
        self.top_p_hidden = seeded_linear(config.hidden_size + 1, config.width, generator)
        self.top_p_output = seeded_linear(config.width, 1, generator)
        for layer, bias in ((self.temperature_output, 0.0), (self.top_p_output, _TOP_P_BIAS)):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, bias)

    def forward(self, hidden_NH: Float[Tensor, "N H"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Temperature, 0 to 2, and top-p, 0 to 1, of each token, float32.

        Raises:
            AdapterError: hidden states of another size than ``config.hidden_size``.
        """
        require_size(hidden_NH, self.config.hidden_size)
        h_NH = self.standardizer(hidden_NH)
        temperature_N1 = 2 * self.temperature_output(self.temperature_hidden(h_NH).relu()).sigmoid()
        read_NZ = torch.cat([h_NH, temperature_N1], dim=1)
        top_p_N1 = self.top_p_output(self.top_p_hidden(read_NZ).relu()).sigmoid()
        return temperature_N1.squeeze(1), top_p_N1.squeeze(1)


class AutoDecoding:
    """The heads at work: a :class:`rheostat.decoding.policy.TokenPolicy` with sampling parameters for every row.

    Temperature and top-p alone mean the same in either order of transforms.

    Args:
        adapter: read at every step; its device should be the engine's.
    """

    def __init__(self, adapter: AutoDeco) -> None:
        self.adapter = adapter
        self._plain = SamplingParameters.of([Strategy()], adapter.top_p_output.weight.device)

    @property
    def key(self) -> str:
        """A hash of the weights: two policies with the same key decide alike."""
        return weights_key("autodeco", self.adapter, asdict(self.adapter.config))

    @torch.no_grad()
    def decide(self, state: StepState) -> Decision:
        """See :class:`rheostat.decoding.policy.TokenPolicy`; parameter set b is that of row b.

        Raises:
            AdapterError: the weights or the hidden states are not finite.
        """
        # Training sees h as it was recorded, in bfloat16; so does decoding.
        temperature_B, top_p_B = self.adapter(state.hidden_BH.bfloat16())
        if not bool((temperature_B + top_p_B).isfinite().all()):
            raise AdapterError("AutoDeco's temperatures are not finite: its weights or the hidden states are damaged")
        plain = self._plain[torch.zeros(len(temperature_B), dtype=torch.int64, device=temperature_B.device)]
        # a top-p of 0, which a saturated head gives, would hold no token
        top_p_B = top_p_B.double().clamp(min=torch.finfo(torch.float64).tiny)
        parameters = replace(plain, temperature_K=temperature_B.double(), top_p_K=top_p_B)
        return Decision(parameters, state.row_S)
