"""Adapters in ``model.generate``: against transformers' own hidden states, and against the local engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import rheostat
from rheostat.adapters.description import BaseModel
from rheostat.adapters.files import save_adapter
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig, TokenInputs
from rheostat.decoding.policy import SamplingParameters
from rheostat.decoding.recording import row_statistics
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines.base import Request
from rheostat.engines.local import LocalEngine
from rheostat.errors import AdapterError, ConfigError
from rheostat.seeding import Purpose, derive_seed, uniforms
from rheostat.types import Prompt

SPACE = ActionSpace(
    (Strategy(0), Strategy(0.5), Strategy(1.25, 10, 0.9), Strategy(0.75, None, 0.9, 0.1)), Order.TRANSFORMERS
)
CERTAIN = ActionSpace((Strategy(0), Strategy(1.0, top_k=1)))  # both write the argmax
TEXTS = ("Once upon a time", "what is 23 * 17 - 4?", "é ü 漢", "a", "Think step by step.", "zzz 0 zzz")


def save_model(folder: Path) -> Path:
    """A tiny random Qwen2 whose tokens are bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({text: i for i, text in enumerate(["<eos>", *alphabet])}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = transformers.Qwen2Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    folder = save_model(tmp_path_factory.mktemp("qwen2"))
    return LocalEngine(folder, str(folder), torch.float32, "cpu")


@pytest.fixture(scope="module")
def plain(engine: LocalEngine) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(engine.info.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def saved(folder: Path, engine: LocalEngine, adapter: TokenAdapter | SequenceAdapter, fingerprint: str = "") -> Path:
    with torch.no_grad():
        adapter.output.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(1))
    info = engine.info
    base = BaseModel(info.model, None, info.hidden_size, fingerprint or info.fingerprint)
    save_adapter(folder, adapter.eval(), base, {}, {})
    return folder


def token_adapter(space: ActionSpace = SPACE) -> TokenAdapter:
    return TokenAdapter(TokenConfig(32, Features.BOTH, budgets=(1, 2, 4)), space)


def inputs_of(engine: LocalEngine, texts: tuple[str, ...] = TEXTS) -> Any:
    engine.tokenizer.pad_token = engine.tokenizer.eos_token
    return engine.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")


def test_actions_and_tokens(engine: LocalEngine, plain: Any, tmp_path: Path) -> None:
    adapter = token_adapter()
    processor = rheostat.RheostatLogitsProcessor(
        plain, engine.tokenizer, saved(tmp_path / "a", engine, adapter), seed=5
    )
    inputs = inputs_of(engine)
    torch.manual_seed(0)
    written = plain.generate(**inputs, **processor.arguments(max_new_tokens=12, parallel_budget=2))
    processor.remove()
    actions_ST = torch.stack(processor.actions, dim=1)
    assert actions_ST.shape == (len(TEXTS), 12)
    assert len(actions_ST.unique()) >= 3
    firm = 0
    for row, text in enumerate(TEXTS):
        ids = engine.tokenizer(text)["input_ids"]
        tokens = written[row, inputs["input_ids"].shape[1] :]
        with torch.inference_mode():
            output = plain(torch.tensor([[*ids, *tokens.tolist()]]), output_hidden_states=True)
        hidden_TH, logits_TV = (part[0, len(ids) - 1 : -1] for part in (output.hidden_states[-1], output.logits))
        t = torch.arange(12)
        with torch.no_grad():
            pi_TA = adapter.log_probabilities(
                TokenInputs(hidden_TH.bfloat16(), row_statistics(logits_TV).entropy_B, 12 - t, 0 * t + 12, 0 * t + 2)
            ).exp()
        uniform_T = uniforms(np.full(12, derive_seed(5, "row", row), np.uint64), t.numpy(), Purpose.ACTION)
        cdf_TA = pi_TA.double().cumsum(1).numpy()
        for step in range(12):
            if np.abs(cdf_TA[step] - uniform_T[step]).min() > 1e-4:
                assert actions_ST[row, step] == np.searchsorted(cdf_TA[step], uniform_T[step], side="right")
                firm += 1
        sets = SamplingParameters.of(SPACE.strategies)[actions_ST[row]]
        assert (transform(logits_TV, sets, Order.TRANSFORMERS).gather(1, tokens[:, None]) > 0).all()
    assert firm > 60


def test_committed_completions_are_the_local_engines(engine: LocalEngine, plain: Any, tmp_path: Path) -> None:
    """Both actions write the argmax, so that only the loop around them could make a difference."""
    adapter = token_adapter(CERTAIN)
    processor = rheostat.RheostatLogitsProcessor(
        plain, engine.tokenizer, saved(tmp_path / "a", engine, adapter), commit=True
    )
    inputs = inputs_of(engine)
    written = plain.generate(**inputs, **processor.arguments(max_new_tokens=10))[:, inputs["input_ids"].shape[1] :]
    processor.remove()
    requests = [Request(Prompt(text, text), None, 0, 0, 10) for text in TEXTS]
    for row, done in zip(written, engine.generate(requests, AdaptiveDecoding(adapter, commit=True)), strict=True):
        assert tuple(row.tolist())[: len(done.token_ids)] == done.token_ids
    assert len(torch.stack(processor.actions).unique()) == 2


def test_sequence_level(engine: LocalEngine, plain: Any, tmp_path: Path) -> None:
    adapter = SequenceAdapter(SequenceConfig(32), SPACE)
    folder = saved(tmp_path / "s", engine, adapter)
    processor = rheostat.RheostatLogitsProcessor(plain, engine.tokenizer, folder, commit=True)
    plain.generate(**inputs_of(engine), **processor.arguments(max_new_tokens=3, parallel_budget=4))
    processor.remove()
    expected_P = adapter.choose(engine.embed([Prompt(text, text) for text in TEXTS]), torch.full((len(TEXTS),), 4))
    for choice_P in processor.actions:
        assert torch.equal(choice_P, expected_P)
    assert len(processor.actions) == 3


def test_refusals(engine: LocalEngine, plain: Any, tmp_path: Path) -> None:
    foreign = saved(tmp_path / "foreign", engine, token_adapter(), "0" * 32)
    with pytest.raises(AdapterError, match="was trained for"):
        rheostat.RheostatLogitsProcessor(plain, engine.tokenizer, foreign)
    mean = saved(tmp_path / "mean", engine, SequenceAdapter(SequenceConfig(32, pooling="mean"), SPACE))
    with pytest.raises(AdapterError, match="mean over a prompt"):
        rheostat.RheostatLogitsProcessor(plain, engine.tokenizer, mean)
    processor = rheostat.RheostatLogitsProcessor(
        plain, engine.tokenizer, saved(tmp_path / "a", engine, token_adapter())
    )
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        processor.arguments(0)
    arguments = processor.arguments(2)
    plain.generate(**inputs_of(engine), **arguments)
    with pytest.raises(ConfigError, match="arguments"):
        plain.generate(**inputs_of(engine), **arguments)
    processor.remove()
