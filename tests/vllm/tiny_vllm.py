"""Tiny random models and adapters for them, and transformers as their oracle."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from rheostat.adapters.description import BaseModel
from rheostat.adapters.files import save_adapter
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.adapters.token import Features, TokenAdapter, TokenConfig
from rheostat.decoding.strategy import ActionSpace, Strategy

CONTEXT, HIDDEN = 256, 64
SPACE = ActionSpace(
    (Strategy(0), Strategy(0.5), Strategy(1.0), Strategy(1.25, 10, 0.9), Strategy(0.75, None, 0.95, 0.1))
)
TEXTS = ("Once upon a time", "what is 23 * 17 - 4?", "é ü 漢", "a", "Solve the problem. Think step by step and write.")


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def save_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """A random two-layer model whose distributions are neither flat nor certain."""
    classes = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    config = classes[kind](
        vocab_size=292,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=kind == "qwen2",
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Plain:
    """Transformers on the same folder, the oracle."""

    folder: Path
    model: Any
    tokenizer: Any

    @torch.inference_mode()
    def forward(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm, and logits, of one text by itself."""
        output = self.model(torch.tensor([ids]), output_hidden_states=True)
        return output.hidden_states[-1][0], output.logits[0]

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


def plain_of(folder: Path) -> Plain:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Plain(folder, model, transformers.AutoTokenizer.from_pretrained(folder))


def make_adapter(
    folder: Path,
    base: Path,
    kind: str = "token",
    space: ActionSpace = SPACE,
    features: Features = Features.BOTH,
    hidden_size: int = HIDDEN,
    pooling: str = "last",
    fingerprint: str | None = None,
    spread: float = 1.0,
) -> TokenAdapter | SequenceAdapter:
    """An adapter whose decisions depend on everything that it reads, saved for the model in ``base``."""
    from rheostat.engines.vllm import checkpoint_fingerprint

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    adapter: TokenAdapter | SequenceAdapter
    if kind == "token":
        adapter = TokenAdapter(TokenConfig(hidden_size, features, budgets=(1, 2, 4, 8)), space).eval()
    else:
        adapter = SequenceAdapter(SequenceConfig(hidden_size, pooling=pooling), space).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapter.output.weight.normal_(std=spread, generator=generator)
    identity = fingerprint or checkpoint_fingerprint(base, tokenizer)
    save_adapter(folder, adapter, BaseModel(str(base), None, hidden_size, identity), {}, {})
    return adapter


def rows_of(llm: Any) -> Any:
    """The adapter's logits processor inside an LLM."""
    from rheostat.serving.vllm_plugin import AdapterRows

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    (found,) = [p for p in runner.input_batch.logitsprocs.all if isinstance(p, AdapterRows)]
    return found
