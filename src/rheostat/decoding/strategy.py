"""One decoding configuration (an action), and the finite, ordered set a policy chooses from."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from rheostat.errors import ConfigError


class Order(StrEnum):
    """In which order an engine applies the transforms; the two give different distributions."""

    # top-nσ, of untempered logits, goes before either
    VLLM = "vllm"  # temperature, min-p, top-k, top-p
    TRANSFORMERS = "transformers"  # temperature, top-k, top-p, min-p


_FIELDS = ("temperature", "top_k", "top_p", "min_p", "top_n_sigma")


@dataclass(frozen=True, slots=True)
class Strategy:
    """A decoding strategy a, which maps the model's distribution p to p_a (paper, section 2.1).

    ``temperature`` 0 is greedy, an exact argmax, and drops the truncations, which cannot change it.
    ``top_k`` ≥ 1, ``top_p`` in (0, 1], ``min_p`` in [0, 1]; None is off, and so are ``top_p`` 1 and ``min_p`` 0.
    ``top_n_sigma`` > 0 keeps the tokens whose untempered logit is at least max − n·σ, with σ the standard deviation
    of the logits over the vocabulary; None is off (Tang et al., 2024, *Top-nσ: Not All Logits Are You Need*,
    arXiv:2411.07641).

    Raises:
        ConfigError: a field outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_n_sigma: float | None = None

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            absent = value is None and name != "temperature"
            if isinstance(value, bool) or not (absent or isinstance(value, int | float)):
                raise ConfigError(f"strategy: {name} must be a number, got {value!r}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"strategy: temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k is not None and not (self.top_k >= 1 and float(self.top_k).is_integer()):
            raise ConfigError(f"strategy: top_k must be a whole number of at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"strategy: top_p must lie in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"strategy: min_p must lie in [0, 1], got {self.min_p}")
        if self.top_n_sigma is not None and not (math.isfinite(self.top_n_sigma) and self.top_n_sigma > 0):
            raise ConfigError(f"strategy: top_n_sigma must be above 0 (leave it out: off), got {self.top_n_sigma}")
        greedy = self.temperature == 0
        put = object.__setattr__  # the one way to normalise a frozen value
        put(self, "temperature", float(self.temperature))
        put(self, "top_k", None if greedy or self.top_k is None else int(self.top_k))
        put(self, "top_p", None if greedy or self.top_p in (None, 1) else float(self.top_p or 1))
        put(self, "min_p", None if greedy or not self.min_p else float(self.min_p))
        put(self, "top_n_sigma", None if greedy or self.top_n_sigma is None else float(self.top_n_sigma))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_truncated(self) -> bool:
        return any(limit is not None for limit in (self.top_k, self.top_p, self.min_p, self.top_n_sigma))

    def __str__(self) -> str:
        if self.is_greedy:
            return "greedy"
        parts = [f"T={_shortest(self.temperature)}"]
        parts += [f"k={self.top_k}"] if self.top_k is not None else []
        parts += [f"p={_shortest(self.top_p)}"] if self.top_p is not None else []
        parts += [f"m={_shortest(self.min_p)}"] if self.min_p is not None else []
        parts += [f"s={_shortest(self.top_n_sigma)}"] if self.top_n_sigma is not None else []
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of ``str``: ``greedy`` or ``T=0.75,k=10,p=0.95,m=0.1,s=1`` (long names work too)."""
        if text.strip() == "greedy":
            return cls(temperature=0)
        short = dict(zip("Tkpms", _FIELDS, strict=True))
        fields: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = part.strip().partition("=")
            name = short.get(name, name)
            if not equals or name not in short.values():
                raise ConfigError(
                    f"strategy {text!r}: unknown part {part.strip()!r}; write 'greedy' or 'T=0.75,k=10,p=0.95,m=0.1'"
                )
            if name in fields:
                raise ConfigError(f"strategy {text!r}: {name} is written twice")
            try:
                fields[name] = int(value) if name == "top_k" else float(value)
            except ValueError:
                raise ConfigError(f"strategy {text!r}: {value!r} is not a number") from None
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Self:
        """From a mapping of field names, as in an adapter's file. Unknown names raise ConfigError."""
        unknown = sorted(set(fields) - set(_FIELDS))
        if unknown:
            raise ConfigError(f"strategy: unknown field {unknown[0]!r}; the fields are {', '.join(_FIELDS)}")
        return cls(**fields)  # type: ignore[arg-type]  # __post_init__ checks the types

    def to_dict(self) -> dict[str, float | int | None]:
        """The inverse of :meth:`from_dict`. ``top_n_sigma`` stands there only where it is on: keys of stored rollouts,
        and adapters' files, from before it was known stay what they were."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        if self.top_n_sigma is None:
            del fields["top_n_sigma"]
        return fields


def _shortest(value: float) -> str:
    """The shortest text that reads back as ``value``; whole numbers without their ``.0``."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


@dataclass(frozen=True, slots=True)
class ActionSpace:
    """The strategies a policy chooses from, in the order of its outputs, and the order of their transforms.

    Raises:
        ConfigError: no strategies, one of them twice, or an unknown order.
    """

    strategies: tuple[Strategy, ...]
    order: Order = Order.VLLM

    def __post_init__(self) -> None:
        if not self.strategies:
            raise ConfigError("action space: name at least one strategy")
        for index, strategy in enumerate(self.strategies):
            if strategy in self.strategies[:index]:
                raise ConfigError(f"action space: strategy '{strategy}' is listed twice")
        try:
            object.__setattr__(self, "order", Order(self.order))
        except ValueError:
            raise ConfigError(f"action space: order must be vllm or transformers, got {self.order!r}") from None

    def __len__(self) -> int:
        return len(self.strategies)

    def __iter__(self) -> Iterator[Strategy]:
        return iter(self.strategies)
