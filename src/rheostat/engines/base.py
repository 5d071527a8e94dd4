"""What every engine offers: embed prompts, and complete them under a policy, with the model frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.decoding.policy import FixedStrategies, StepObserver, TokenPolicy
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
    """One completion to be sampled: sample number ``sample`` of a prompt.

    Attributes:
        strategy: None leaves the choice to the token policy of the call.
        max_tokens: the token budget b, at least 1.
        parallel_budget: B, how many completions of the prompt may be sampled, at least 1; policies may look at it.

    Raises:
        ConfigError: a budget below one.
    """

    prompt: Prompt
    strategy: Strategy | None
    sample: int
    seed: int
    max_tokens: int
    parallel_budget: int = 1

    def __post_init__(self) -> None:
        for name in ("max_tokens", "parallel_budget"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def stream(self) -> int:
        """The random stream that belongs to this request, wherever and with whomever it is served.

        Strategies of one temperature share it: where their truncations keep the same tokens they are equal in effect,
        draw the same tokens, and a sweep runs the model once for all of them. Each one's completions have the
        distribution that is its own.
        """
        if self.strategy is None:
            return derive_seed(self.seed, self.prompt.problem_id, self.sample, f"policy B={self.parallel_budget}")
        return derive_seed(self.seed, self.prompt.problem_id, self.sample, f"T={self.strategy.temperature}")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What shapes an engine's numbers.

    Attributes:
        fingerprint: identifies the base model's content.
        threads: of the processor, which divide sums among them.
        kernels: who computes a step's attention in the local engine: ``torch``, or on a CPU ``compiled``
            (:mod:`rheostat.engines.kernels`); other engines say nothing.
    """

    kind: str
    model: str
    fingerprint: str
    hidden_size: int
    context_length: int
    dtype: str
    device: str
    threads: int
    kernels: str = ""

    @property
    def identity(self) -> list[str | int]:
        """All of it that shapes the numbers: not the model's name, nor what the fingerprint has."""
        compiled = [self.kernels] if self.kernels == "compiled" else []
        return [self.fingerprint, self.kind, self.dtype, self.device, self.threads, *compiled]

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

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of the model's conversations; None: a base model."""
        ...

    def chat_text(self, turns: Sequence[Mapping[str, str]], thinking: bool | None = None) -> str:
        """A conversation in the model's chat template, ready for the assistant's answer.

        Args:
            turns: ``role`` and ``content`` of each.
            thinking: given to the template as ``enable_thinking``; None leaves it to the template.

        Raises:
            ModelError: a base model.
        """
        ...

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        """One completion per request, in their order.

        Args:
            requests: what to sample; the composition of the call may change rounding, never the draws.
            policy: picks the sampling parameters at every step; by default each request's own strategy.
            order: the order of the transforms.
            observer: sees every step; :class:`rheostat.decoding.recording.Recorder` keeps what training needs.

        Raises:
            ModelError: a prompt and its token budget exceed the context.
            ConfigError: a request without a strategy where there is no policy.
        """
        ...


def own_strategies(requests: Sequence[Request], device: torch.device | str = "cpu") -> FixedStrategies:
    """The policy of a call without one: every request's own strategy.

    Raises:
        ConfigError: a request has none.
    """
    strategies = [request.strategy for request in requests if request.strategy is not None]
    if len(strategies) < len(requests):
        raise ConfigError("a request names no strategy: give it one, or give the call a token policy")
    return FixedStrategies(strategies, device)
