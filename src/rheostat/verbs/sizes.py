"""What is known of a model's sizes without loading it."""

import json
from dataclasses import dataclass
from typing import Any

from rheostat.engines import models
from rheostat.engines.fake import FakeEngine
from rheostat.errors import ModelError


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model; None where it is not known, with the reason in ``why``.

    Attributes:
        hidden: numbers of a hidden state.
        weights: bytes of the weights as they lie on disk.
        token: bytes of keys and values that a token leaves behind, in the dtype of the weights.
    """

    hidden: int | None = None
    weights: int | None = None
    token: int | None = None
    why: str = ""


def sizes_of(model: str) -> Sizes:
    """From the folder of a model that is here; of a known one that is not, the weights alone."""
    if model == "fake":
        return Sizes(hidden=FakeEngine().info.hidden_size, weights=0, token=0)
    try:
        folder = models.path(model)
        config = json.loads((folder / "config.json").read_text())
    except ModelError as error:
        known = {source.name: source.bytes for source in models.known_models()}
        return Sizes(weights=known.get(model), why=str(error))
    hidden, weights = config.get("hidden_size"), sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not isinstance(hidden, int):
        return Sizes(weights=weights, why=f"{model}: its config.json names no hidden_size")
    return Sizes(hidden, weights, _bytes_per_token(config, hidden))


def _bytes_per_token(config: dict[str, Any], hidden: int) -> int | None:
    """Of a Llama-like model."""
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    if not isinstance(layers, int) or not isinstance(heads, int):
        return None
    size = config.get("head_dim") or hidden // heads
    dtype = str(config.get("dtype") or config.get("torch_dtype"))
    return 2 * layers * int(config.get("num_key_value_heads") or heads) * size * (4 if dtype == "float32" else 2)
