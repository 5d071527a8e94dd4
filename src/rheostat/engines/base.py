"""What every engine offers: embed prompts, and complete them under a policy, with the model frozen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from rheostat.decoding.policy import TokenPolicy
from rheostat.decoding.strategy import Order, Strategy
from rheostat.errors import ConfigError
from rheostat.seeding import derive_seed
from rheostat.types import Completion, Prompt


class Pooling(StrEnum):
    """Which hidden state stands for a prompt: the last token's, or the mean over its tokens."""

    LAST = "last"
    MEAN = "mean"


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to be sampled: sample number ``sample`` of a prompt under one strategy.

    Raises:
        ConfigError: a token budget below one.
    """

    prompt: Prompt
    strategy: Strategy
    sample: int
    seed: int
    max_tokens: int

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")

    @property
    def stream(self) -> int:
        """The random stream that belongs to this request, wherever and with whomever it is served."""
        return derive_seed(self.seed, self.prompt.problem_id, self.sample, str(self.strategy))


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What shapes an engine's numbers. ``fingerprint`` identifies the base model's content."""

    kind: str
    model: str
    fingerprint: str
    hidden_size: int
    context_length: int
    dtype: str
    device: str
    threads: int

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


class Engine(Protocol):
    """A frozen language model that embeds and completes."""

    @property
    def info(self) -> EngineInfo: ...

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling = Pooling.LAST) -> Float[Tensor, "P H"]:
        """The final hidden state (after the final norm) that stands for each prompt, float32 on the CPU.

        Raises:
            ModelError: a prompt is empty or longer than the context.
        """
        ...

    def generate(
        self, requests: Sequence[Request], policy: TokenPolicy | None = None, order: Order = Order.VLLM
    ) -> list[Completion]:
        """One completion per request, in their order.

        Args:
            requests: what to sample; the composition of the call may change rounding, never the draws.
            policy: picks the sampling parameters at every step; by default each request's own strategy.
            order: the order of the transforms.

        Raises:
            ModelError: a prompt and its token budget exceed the context.
        """
        ...
