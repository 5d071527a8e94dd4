"""A model and its tokenizer from a folder, what identifies them, and the text of their tokens."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import nn

from rheostat.engines.attention import NAME
from rheostat.engines.machine import free_memory
from rheostat.errors import ModelError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


class TokenizerVocabulary:
    """Text of tokens, through the model's tokenizer.

    Args:
        tokenizer: of the model.
        eos_ids: the tokens that end a completion.
        size: how many logits the model gives; it may be more than the tokenizer knows.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, eos_ids: frozenset[int], size: int) -> None:
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.texts: list[str] = tokenizer.batch_decode([[index] for index in range(size)])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def eos_ids(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion."""
    eos = model.generation_config.eos_token_id  # type: ignore[union-attr]
    found = eos if isinstance(eos, list) else [eos, tokenizer.eos_token_id]
    return frozenset(int(token) for token in found if token is not None)


def cache_shape(config: transformers.PretrainedConfig) -> tuple[int, int, int]:
    """Of a model's keys, and of its values: layers, KV heads, and numbers of a head."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", config.num_attention_heads), head_dim


def gigabytes(size: int) -> str:
    """``size`` bytes as messages write them."""
    return f"{size / 1e9:.2f} GB"


def _check_size(path: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights that do not fit, before minutes go into loading them; the largest is there twice for a while."""
    sizes = []
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            sizes += [math.prod(tensors.get_slice(name).get_shape()) * dtype.itemsize for name in names]
    need, free = sum(sizes) + max(sizes, default=0), free_memory(device)
    if need > free:
        raise ModelError(
            f"{path}: its weights take {gigabytes(need)} in {str(dtype).removeprefix('torch.')}, and "
            f"{gigabytes(free)} is free on {device.type}: {gigabytes(need - free)} is missing; free some memory, or "
            "take a smaller model"
        )


def load(
    path: Path, dtype: torch.dtype, device: torch.device
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Model and tokenizer from a local folder, refusing what the engine cannot run exactly or has no memory for."""
    if dtype not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise ModelError(f"{path}: the local engine computes in {names}, not in {str(dtype).removeprefix('torch.')}")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # loading takes a second
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        text_config = config.get_text_config()
        window = "sliding_attention" if getattr(text_config, "sliding_window", None) else "full_attention"
        kinds = set(getattr(text_config, "layer_types", None) or [window])
        if kinds != {"full_attention"}:
            raise ModelError(f"{path}: the local engine runs full attention only, this model has {sorted(kinds)}")
        _check_size(path, dtype, device)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=NAME, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path}: no model that transformers can load ({reason})") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return model.to(device).eval().requires_grad_(False), tokenizer


def fingerprint(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """A hash of what an adapter depends on: config, vocabulary, final norm, and a sample of lm_head.

    Weights are compared as bfloat16, so that the dtype a model is loaded in does not change its identity.
    """
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
    digest = hashlib.sha256(json.dumps([getattr(config, name, None) for name in names]).encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))).encode())
    head_VH = model.get_output_embeddings().weight  # type: ignore[operator]
    named = model.base_model.named_parameters()  # type: ignore[union-attr]
    norms = [parameter for name, parameter in named if parameter.ndim == 1 and ".layers." not in f".{name}"]
    for tensor in (head_VH[:: max(1, len(head_VH) // 64)], *norms):
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]
