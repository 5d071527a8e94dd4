"""``adapter.json``: its schema, how it is made from an adapter, and how it is read, with errors of one line."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Never

import pydantic
from pydantic import JsonValue

from rheostat.adapters.autodeco import AutoDecoConfig
from rheostat.adapters.sequence import PromptFeatures, SequenceConfig
from rheostat.adapters.token import Features, TokenConfig
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.errors import AdapterError, ConfigError

FORMAT_VERSION = 1
Kind = Literal["sequence", "token", "autodeco"]
Config = SequenceConfig | TokenConfig | AutoDecoConfig


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The frozen model that an adapter was trained for; ``fingerprint`` is its engine's."""

    id: str
    revision: str | None
    hidden_size: int
    fingerprint: str

    def __str__(self) -> str:
        name = self.id if self.revision is None else f"{self.id}@{self.revision}"
        return " ".join(name.split())  # errors are one line


class _Schema(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Base(_Schema):
    id: str
    revision: str | None
    hidden_size: int
    fingerprint: str


class _Features(_Schema):
    """The fields of an adapter's configuration but ``hidden_size`` (the base model's) and ``budgets``."""

    width: int


class _PolicyFeatures(_Features):
    with_budget: bool
    budget_width: int
    dropout: float
    temperature: float


class _SequenceFeatures(_PolicyFeatures):
    pooling: str
    features: PromptFeatures = PromptFeatures.HIDDEN  # not in the files of earlier adapters


class _Start(_SequenceFeatures):
    budgets: tuple[int, ...]


class _TokenFeatures(_PolicyFeatures):
    features: Features
    start: _Start | None = None


class _Strategy(_Schema):
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    top_n_sigma: float | None = None  # not in the files of earlier adapters


class _ActionSpace(_Schema):
    order: Literal["vllm", "transformers"]
    strategies: tuple[_Strategy, ...]


class Description(_Schema):
    """``adapter.json``. ``weights_sha256`` ties it to its ``adapter.safetensors``; AutoDeco has no action space."""

    format_version: int
    kind: Kind
    base_model: _Base
    features: _Features
    action_space: _ActionSpace | None
    budgets: tuple[int, ...]
    training: dict[str, JsonValue]
    metrics: dict[str, JsonValue]
    weights_sha256: str


class _SequenceDescription(Description):
    features: _SequenceFeatures
    action_space: _ActionSpace


class _TokenDescription(Description):
    features: _TokenFeatures
    action_space: _ActionSpace


class _AutoDecoDescription(Description):
    features: _Features
    action_space: None


_KINDS: dict[Kind, tuple[type[Description], type[Config]]] = {
    "sequence": (_SequenceDescription, SequenceConfig),
    "token": (_TokenDescription, TokenConfig),
    "autodeco": (_AutoDecoDescription, AutoDecoConfig),
}


def kind_of(config: Config) -> Kind:
    """What an adapter with this configuration is."""
    return next(kind for kind, (_, own) in _KINDS.items() if isinstance(config, own))


def describe(
    path: Path,
    config: Config,
    space: ActionSpace | None,
    base: BaseModel,
    training: Mapping[str, object],
    metrics: Mapping[str, object],
    weights_sha256: str,
) -> Description:
    """What goes into ``path``. Tuples become lists, and numbers that are not finite null.

    Raises:
        AdapterError: training or metrics hold what JSON cannot write.
    """
    kind = kind_of(config)
    schema, _ = _KINDS[kind]
    features = config.described() if isinstance(config, TokenConfig) else asdict(config)
    for name in ("hidden_size", "budgets"):
        features.pop(name)
    if isinstance(start := features.get("start"), dict):
        start.pop("hidden_size")
    try:
        return schema.model_validate(
            {
                "format_version": FORMAT_VERSION,
                "kind": kind,
                "base_model": asdict(base),
                "features": features,
                "action_space": space
                and {
                    "order": str(space.order),
                    "strategies": tuple(strategy.to_dict() for strategy in space),
                },
                "budgets": config.budgets,
                "training": _json_values(training),
                "metrics": _json_values(metrics),
                "weights_sha256": weights_sha256,
            }
        )
    except pydantic.ValidationError as error:
        _refuse(path, error)


def read(path: Path, content: bytes) -> tuple[Description, Config, ActionSpace | None]:
    """The description in ``content``, and what its network is built from; ``path`` is named in errors.

    Raises:
        AdapterError: no JSON, another format version or kind, an unknown key, a missing or wrong field.
    """
    schema, config_of = _KINDS[_kind(path, content)]
    try:
        description = schema.model_validate_json(content)
        space = None if description.action_space is None else _space(description.action_space)
        hidden_size, features = description.base_model.hidden_size, description.features.model_dump()
        if features.get("start") is not None:
            features["start"] = SequenceConfig(hidden_size=hidden_size, **features["start"])
        config = config_of(hidden_size=hidden_size, budgets=description.budgets, **features)
    except pydantic.ValidationError as error:
        _refuse(path, error)
    except ConfigError as error:
        raise AdapterError(f"{path}: {error}") from error
    return description, config, space


def _space(fields: _ActionSpace) -> ActionSpace:
    strategies = tuple(Strategy(**strategy.model_dump()) for strategy in fields.strategies)
    return ActionSpace(strategies, Order(fields.order))


def _kind(path: Path, content: bytes) -> Kind:
    """Format and kind come first: what another version or kind holds is not for this one to judge."""
    try:
        fields = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(fields, dict) or "format_version" not in fields or "kind" not in fields:
        raise AdapterError(f"{path}: not the description of an adapter (it has no format_version and kind)")
    version, kind = fields["format_version"], fields["kind"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: format_version {version!r}: this Rheostat reads version {FORMAT_VERSION}; update Rheostat"
        )
    for known in _KINDS:
        if kind == known:
            return known
    *most, last = (f"'{known}'" for known in _KINDS)
    names = f"{', '.join(most)} and {last}"
    raise AdapterError(f"{path}: kind {kind!r}: this Rheostat loads adapters of kind {names} only")


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is no JSON value")


def _refuse(path: Path, error: pydantic.ValidationError) -> Never:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = " ".join(".".join(str(part) for part in first["loc"]).split())  # on one line, whatever the key
    what = {"extra_forbidden": "unknown key", "missing": "is missing"}.get(first["type"], first["msg"])
    raise AdapterError(f"{path}: {field}: {what}") from error


def _json_values(value: object) -> object:
    """Tuples as lists, and null for numbers that JSON cannot write; the schema judges the rest."""
    if isinstance(value, Mapping):
        return {key: _json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
