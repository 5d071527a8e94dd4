"""What is known of a model's sizes without loading it."""

import math
from dataclasses import dataclass

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from rheostat.engines import models
from rheostat.engines.fake import FakeEngine
from rheostat.engines.loading import cache_shape
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
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ModelError, OSError, ValueError, StrictDataclassError) as error:
        known = {source.name: source.bytes for source in models.known_models()}
        return Sizes(weights=known.get(model), why=str(error).splitlines()[0])
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    itemsize = (config.dtype or torch.bfloat16).itemsize
    return Sizes(config.get_text_config().hidden_size, weights, 2 * math.prod(cache_shape(config)) * itemsize)
