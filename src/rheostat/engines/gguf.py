"""From a GGUF file to the files of transformers: config, safetensors, tokenizer."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Notes:
    """What a GGUF file does not say, or says wrongly, about its model.

    Each of ``end_tokens`` ends a completion, the first is the tokenizer's own. ``splitter`` says how text is cut before
    the merges. ``is_tied``: one matrix embeds tokens and scores them.
    """

    end_tokens: tuple[str, ...]
    pad_token: str
    splitter: Literal["smollm", "qwen2"]
    is_tied: bool


def convert_gguf(gguf: Path, folder: Path, notes: Notes) -> None:
    """Write the model in ``gguf`` into ``folder`` as transformers' own files: config, safetensors, tokenizer.

    Weights become bfloat16. What four bits and a scale per block of 32 leave of a weight is far coarser than
    bfloat16's eight bits of mantissa, so nothing that matters is lost and the file is half of what float32 takes.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with _quiet():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        config = loaded.config
        tokenizer = _tokenizer(gguf, notes, config.max_position_embeddings)
        ends = tokenizer.convert_tokens_to_ids(list(notes.end_tokens))
        config.eos_token_id, config.pad_token_id = ends[0], tokenizer.pad_token_id
        if notes.is_tied and not config.tie_word_embeddings:
            # one matrix, quantised twice: the output's copy is the finer one
            loaded.get_input_embeddings().weight = loaded.get_output_embeddings().weight
            config.tie_word_embeddings = True
        # save_pretrained refuses a model that was read from GGUF, and knows it by its quantization_config. A fresh
        # model on the meta device takes over the same tensors, so the weights are in memory once.
        for field in ("quantization_config", "_model_name_or_path"):
            if hasattr(config, field):
                delattr(config, field)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=ends if len(ends) > 1 else ends[0],
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _tokenizer(gguf: Path, notes: Notes, length: int) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _set_splitter(read.backend_tokenizer, notes.splitter)
    return PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        bos_token=read.bos_token,
        eos_token=notes.end_tokens[0],
        pad_token=notes.pad_token,
        unk_token=read.unk_token,
        chat_template=read.chat_template,
        model_max_length=length,
    )


def _set_splitter(backend: Any, name: Literal["smollm", "qwen2"]) -> None:
    """Cut text before the merges as the model's own tokenizer does.

    A GGUF file only names its splitter (``tokenizer.ggml.pre``) and transformers does not know each of them: it
    would cut the blank line in "one.\\n\\n2" into two tokens, which SmolLM2 never saw in training.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    cut: Any
    if name == "smollm":
        cut, by_regex = pre_tokenizers.Digits(individual_digits=True), True
        backend.normalizer = None
    else:
        cut, by_regex = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"), False
        backend.normalizer = normalizers.NFC()
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars, warnings and log lines off the terminal: they speak of nothing a user can change."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
