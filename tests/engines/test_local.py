"""The local engine against plain transformers, on tiny random models in float32."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from rheostat.decoding.policy import FixedStrategies, SamplingParameters
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines import decode, loading, local, rows
from rheostat.engines.base import Pooling, Request
from rheostat.engines.local import LocalEngine
from rheostat.errors import ModelError
from rheostat.seeding import Purpose, uniforms
from rheostat.types import Completion, FinishReason, Prompt

BOUNDARY = 1e-5
CONTEXT = 256
STRATEGIES = (Strategy(1.0), Strategy(0), Strategy(1.25, 10, 0.9), Strategy(0.75, None, 0.95, 0.1))
SHARED = "Solve the problem. Think step by step and write the answer at the end.\nQuestion: "
TEXTS = (
    SHARED + "what is 1 + 1?",
    SHARED + "what is 23 * 17 - 4?",
    SHARED + "é ü 漢",
    SHARED,
    "a",
    "Once upon a time there was a number, and it was prime.",
)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges."""
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


def config_of(name: str, **fields: object) -> transformers.PretrainedConfig:
    """A tiny model's; one whose name ends in ``-wide`` has heads as large as the compiled kernels want them."""
    kind, _, wide = name.partition("-")
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma": transformers.GemmaConfig,
        "mistral": transformers.MistralConfig,
    }
    return classes[kind](
        vocab_size=292,  # two rows more than the tokenizer knows, as many models have
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=kind == "qwen2",
        **({"head_dim": 32} if wide else {"head_dim": 8} if kind in ("qwen3", "gemma") else {}),
        **fields,
    )


def save_model(folder: Path, config: transformers.PretrainedConfig) -> Path:
    """Random weights large enough that attention and the next token depend on the text."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(8)
    for name, weight in model.named_parameters():
        scale = 0.3 if weight.ndim == 2 else 0.1
        offset = 1.0 if "norm" in name else 0.0
        weight.data = offset + scale * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Pair:
    """The engine, and plain transformers on the same folder."""

    folder: Path
    engine: LocalEngine
    plain: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase

    @torch.inference_mode()
    def forward(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm, and logits, of one text by itself."""
        output = self.plain(torch.tensor([list(ids)]), output_hidden_states=True)
        return output.hidden_states[-1][0], output.logits[0]


@pytest.fixture(scope="session", params=["llama", "qwen2", "qwen3", "gemma", "llama-wide", "qwen3-wide"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = save_model(tmp_path_factory.mktemp(request.param), config_of(request.param))
    engine = LocalEngine(folder, dtype=torch.float32, device="cpu")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Pair(folder, engine, plain, transformers.AutoTokenizer.from_pretrained(folder))


def requests_of(count: int = 64, texts: Sequence[str] = TEXTS) -> list[Request]:
    draw = random.Random(3)
    return [
        Request(
            Prompt(f"p{i % len(texts)}", texts[i % len(texts)], draw.choice([(), ("e",), ("\n", " a")])),
            draw.choice(STRATEGIES),
            sample=i,
            seed=11,
            max_tokens=draw.choice((1, 4, 12)),
        )
        for i in range(count)
    ]


def expected_tokens(pair: Pair, request: Request, completion: Completion, order: Order) -> tuple[list[int], int]:
    """Along the engine's own trajectory: transformers' token at each step, and the first step rounding may decide."""
    prompt = pair.tokenizer(request.prompt.text)["input_ids"]
    written = completion.token_ids
    logits_TV = pair.forward([*prompt, *written[:-1]])[1][len(prompt) - 1 :]
    probability_TV = transform(logits_TV, SamplingParameters.of([request.strategy] * len(written)), order).numpy()
    uniform_T = uniforms(np.full(len(written), request.stream, np.uint64), np.arange(len(written)), Purpose.TOKEN)
    tokens, first_unsafe = [], len(written)
    for t, (probability_V, uniform) in enumerate(zip(probability_TV, uniform_T, strict=True)):
        cdf_V = probability_V.cumsum()
        tokens.append(int(np.searchsorted(cdf_V, uniform, side="right")))
        top_two = logits_TV[t].topk(2).values
        tied = request.strategy.is_greedy and top_two[0] - top_two[1] < 1e-4
        near = not request.strategy.is_greedy and np.abs(cdf_V - uniform).min() <= BOUNDARY
        if tied or near:
            first_unsafe = min(first_unsafe, t)
    return tokens, first_unsafe


@dataclass(frozen=True)
class Baseline:
    """Completions of one call, and how many tokens of each must come out the same in any company."""

    requests: list[Request]
    completions: list[Completion]
    firm: list[int]

    def check(self, completions: Sequence[Completion], requests: Sequence[Request] | None = None) -> None:
        known = {r: (c, firm) for r, c, firm in zip(self.requests, self.completions, self.firm, strict=True)}
        for request, completion in zip(requests or self.requests, completions, strict=True):
            expected, firm = known[request]
            assert completion.token_ids[:firm] == expected.token_ids[:firm]
            if firm == len(expected.token_ids):
                assert completion == expected


@pytest.fixture(scope="session")
def baseline(pair: Pair) -> Baseline:
    requests = requests_of()
    completions = pair.engine.generate(requests)
    firm = [expected_tokens(pair, r, c, Order.VLLM)[1] for r, c in zip(requests, completions, strict=True)]
    assert sum(firm) > 0.8 * sum(len(completion.token_ids) for completion in completions)
    return Baseline(requests, completions, firm)


# --- against plain transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:4]], ids=["nothing-shared", "shared-prefix"])
def test_embeddings_are_those_of_a_plain_forward(pair: Pair, texts: tuple[str, ...]) -> None:
    prompts = [Prompt(str(i), text) for i, text in enumerate(texts)]
    last_PH, mean_PH = pair.engine.embed(prompts), pair.engine.embed(prompts, Pooling.MEAN)
    assert last_PH.dtype == mean_PH.dtype == torch.float32
    for index, text in enumerate(texts):
        hidden_TH, _ = pair.forward(pair.tokenizer(text)["input_ids"])
        torch.testing.assert_close(last_PH[index], hidden_TH[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mean_PH[index], hidden_TH.mean(0), rtol=1e-4, atol=1e-4)
    assert (last_PH[0] - last_PH[1]).abs().max() > 0.1  # the texts matter


def test_greedy_is_transformers_greedy(pair: Pair) -> None:
    for text in TEXTS:
        (completion,) = pair.engine.generate([Request(Prompt("p", text), Strategy(0), 0, 0, 10)])
        ids = pair.tokenizer(text)["input_ids"]
        for t, token in enumerate(completion.token_ids):
            _, logits_TV = pair.forward([*ids, *completion.token_ids[:t]])
            assert logits_TV[-1, token] >= logits_TV[-1].max() - 1e-5


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:4]], ids=["nothing-shared", "shared-prefix"])
@pytest.mark.parametrize("order", Order)
def test_tokens_are_the_inverse_cdf_of_transformers_logits(pair: Pair, order: Order, texts: tuple[str, ...]) -> None:
    requests = requests_of(texts=texts)
    compared = 0
    for request, completion in zip(requests, pair.engine.generate(requests, order=order), strict=True):
        tokens, first_unsafe = expected_tokens(pair, request, completion, order)
        assert completion.token_ids[:first_unsafe] == tuple(tokens[:first_unsafe])
        compared += first_unsafe
    assert compared > 150


def test_policy_sees_the_hidden_states_and_logits_of_transformers(pair: Pair) -> None:
    requests = [Request(Prompt(str(i), text), Strategy(1.25), i, 0, 6) for i, text in enumerate(TEXTS * 2)]
    fixed = FixedStrategies([request.strategy for request in requests])
    seen = []

    class Watch:
        def decide(self, state):  # type: ignore[no-untyped-def]
            seen.append((state, state.hidden_BH.clone(), state.logits_BV.clone()))
            return fixed.decide(state)

    completions = pair.engine.generate(requests, Watch())
    streams = {r.stream: (r, c) for r, c in zip(requests, completions, strict=True)}
    checked = 0
    for state, hidden_BH, logits_BV in seen:
        assert logits_BV.dtype == torch.float32
        for position, stream in enumerate(state.streams_S.tolist()):
            request, completion = streams[stream]
            written = completion.token_ids[: int(state.t_S[position])]
            hidden_TH, logits_TV = pair.forward([*pair.tokenizer(request.prompt.text)["input_ids"], *written])
            row = int(state.row_S[position])
            torch.testing.assert_close(hidden_BH[row], hidden_TH[-1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logits_BV[row], logits_TV[-1], rtol=1e-4, atol=1e-4)
            checked += 1
    assert checked > 40


def test_texts_are_the_tokenizers(pair: Pair) -> None:
    requests = [Request(Prompt("p", text), Strategy(1.25), i, 5, 20) for i, text in enumerate(TEXTS * 3)]
    for completion in pair.engine.generate(requests):
        ended = completion.token_ids[-1] == 0
        assert ended == (completion.finish_reason is FinishReason.STOP)
        written = completion.token_ids[:-1] if ended else completion.token_ids
        assert completion.text == pair.tokenizer.decode(written, skip_special_tokens=True)


def test_stops_end_the_text_as_soon_as_they_are_complete(pair: Pair) -> None:
    stops = ("e", "a ", "é")
    requests = [Request(Prompt("p", TEXTS[0], stops), Strategy(1.5), i, 5, 40) for i in range(40)]
    stopped = 0
    for completion in pair.engine.generate(requests):
        whole, before = (
            pair.tokenizer.decode(completion.token_ids[:end], skip_special_tokens=True) for end in (None, -1)
        )
        assert not any(stop in before for stop in stops)
        cuts = [whole.index(stop) for stop in stops if stop in whole]
        assert completion.text == whole[: min(cuts, default=None)]
        stopped += bool(cuts)
    assert stopped > 3


# --- the same tokens in any company ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batch_size_and_order_of_arrival(pair: Pair, baseline: Baseline, size: int) -> None:
    arrived = random.Random(size).sample(baseline.requests, len(baseline.requests))
    for start in range(0, len(arrived), size):
        batch = arrived[start : start + size]
        baseline.check(pair.engine.generate(batch), batch)


@pytest.mark.parametrize("share", [0, 1], ids=["always-compact", "never-compact"])
def test_compaction(pair: Pair, baseline: Baseline, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "IDLE_SHARE", share)
    baseline.check(pair.engine.generate(baseline.requests))


@pytest.mark.parametrize("limit", ["_PREFILL_TOKENS", "_SCORE_BYTES"])
def test_prefill_in_several_passes(pair: Pair, baseline: Baseline, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, limit, {"_PREFILL_TOKENS": 30, "_SCORE_BYTES": 60_000}[limit])
    monkeypatch.setattr(pair.engine, "_prefixes", type(pair.engine._prefixes)())
    passes: list[int] = []
    hook = pair.engine.model.base_model.register_forward_pre_hook(
        lambda _module, _args, fields: passes.append(fields["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        baseline.check(pair.engine.generate(baseline.requests))
        prompts = [Prompt(str(i), text) for i, text in enumerate(TEXTS)]
        mean_PH, last_PH = pair.engine.embed(prompts, Pooling.MEAN), pair.engine.embed(prompts)
    finally:
        hook.remove()
    assert len([length for length in passes if length > 1]) > 5
    for index, text in enumerate(TEXTS):
        hidden_TH, _ = pair.forward(pair.tokenizer(text)["input_ids"])
        torch.testing.assert_close(mean_PH[index], hidden_TH.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last_PH[index], hidden_TH[-1], rtol=1e-4, atol=1e-4)


def test_batches_split_by_memory(pair: Pair, baseline: Baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.engine, "_cache_bytes", 100_000)
    monkeypatch.setattr(local, "_FEW_ROWS", 0)
    batches = []
    original = pair.engine.batches

    def watch(*args):  # type: ignore[no-untyped-def]
        for batch in original(*args):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(pair.engine, "batches", watch)
    joined: list[int] = []
    join = rows.LocalRows.join

    def watch_join(self, other):  # type: ignore[no-untyped-def]
        joined.append(len(self.position_B))
        return join(self, other)

    monkeypatch.setattr(rows.LocalRows, "join", watch_join)
    baseline.check(pair.engine.generate(baseline.requests))
    assert len(batches) > 3
    assert (len(joined) > 3 and max(joined) > 1) == pair.engine.has_kernels


def test_samples_of_one_prompt_split_by_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the limit, keys and values or logits, batches keep to it, and completions are those of one batch."""
    requests = [Request(Prompt("p", TEXTS[1]), Strategy(1.0), sample, 3, 12) for sample in range(20)]
    whole = pair.engine.generate(requests)
    sizes: list[int] = []
    original = local.decode

    def watch(batch, *rest):  # type: ignore[no-untyped-def]
        sizes.append(len(batch.requests))
        return original(batch, *rest)

    monkeypatch.setattr(local, "decode", watch)
    monkeypatch.setattr(pair.engine, "has_kernels", False)  # nobody joins
    row = 13 * pair.engine.bytes_per_token
    logits = 16 * len(pair.engine.vocabulary.texts)
    for limits in (
        {"_cache_bytes": 7 * row, "_few_bytes": 5 * row},
        {"_cache_bytes": 5 * row, "_few_bytes": 7 * row},
        {"batch_bytes": 7 * (row + logits)},
    ):
        with monkeypatch.context() as patch:
            for name, most in limits.items():
                patch.setattr(pair.engine, name, most)
            sizes.clear()
            assert pair.engine.generate(requests) == whole
            assert sizes == [7, 7, 6], limits


def test_few_rows_may_hold_more(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to _FEW_ROWS different prompts run together where _cache_bytes would hold three."""
    row = (len(pair.tokenizer("12 0123456789")["input_ids"]) + 10) * pair.engine.bytes_per_token
    monkeypatch.setattr(local, "_FEW_ROWS", 5)
    monkeypatch.setattr(pair.engine, "_cache_bytes", 3 * row)
    monkeypatch.setattr(pair.engine, "_few_bytes", 20 * row)
    tokens = [pair.tokenizer(f"{i:02d} 0123456789")["input_ids"] for i in range(12)]
    sizes = [len(batch) for batch in pair.engine.batches(tokens, [1] * 12, [10] * 12)]
    assert sizes == [5, 5, 2]


def test_an_answer_that_does_not_fit_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, and the budget that fits: that one runs, the next does not."""
    monkeypatch.setattr(pair.engine, "_cache_bytes", 1)  # every row is alone
    monkeypatch.setattr(local, "_FEW_ROWS", 0)
    monkeypatch.setattr(local, "free_memory", lambda _: 100 * pair.engine.bytes_per_token)
    prompt = Prompt("p", TEXTS[0])
    with pytest.raises(ModelError, match=r"p'.* 0\.00 GB is missing; lower max_tokens to (\d+)$") as caught:
        pair.engine.generate([Request(prompt, Strategy(0), 0, 0, 150)])
    fits = int(str(caught.value).split()[-1])
    assert 0 < fits < 100
    assert pair.engine.generate([Request(prompt, Strategy(0), 0, 0, fits)])[0].token_ids
    with pytest.raises(ModelError, match=f"to {fits}$"):
        pair.engine.generate([Request(prompt, Strategy(0), 0, 0, fits + 1)])
    monkeypatch.setattr(local, "free_memory", lambda _: 3 * pair.engine.bytes_per_token)
    with pytest.raises(ModelError, match=r"free some memory, or take a smaller model$"):
        pair.engine.generate([Request(prompt, Strategy(0), 0, 0, 1)])


def test_policy_knows_requests_by_their_position_in_the_call(
    pair: Pair, baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the call is split, a policy that looks requests up by ``request_S`` finds its own."""
    monkeypatch.setattr(pair.engine, "_cache_bytes", 100_000)
    monkeypatch.setattr(local, "_FEW_ROWS", 0)
    policy = FixedStrategies([request.strategy for request in baseline.requests])
    baseline.check(pair.engine.generate(baseline.requests, policy))


def test_no_shared_prefix(pair: Pair, baseline: Baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (local, rows):
        monkeypatch.setattr(module, "common_prefix", lambda _left, _right: 0)
    baseline.check(pair.engine.generate(baseline.requests))


def test_shared_prefix_is_shared(pair: Pair) -> None:
    prompts = [Prompt(str(i), text) for i, text in enumerate(TEXTS[:3])]
    pair.engine.embed(prompts)
    common = len(pair.tokenizer(SHARED)["input_ids"])
    assert max(map(len, pair.engine._prefixes)) >= common - 1


# --- refusals and identity ---------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [tensor.numel() for tensor in load_file(pair.folder / "model.safetensors").values()]
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        need = itemsize * (sum(sizes) + max(sizes))
        monkeypatch.setattr(loading, "free_memory", lambda _, need=need: need)
        LocalEngine(pair.folder, dtype=dtype, device="cpu")
        monkeypatch.setattr(loading, "free_memory", lambda _, need=need: need - 1)
        with pytest.raises(ModelError, match=r"take .* GB in (float32|bfloat16), and .* is missing; free some memory"):
            LocalEngine(pair.folder, dtype=dtype, device="cpu")


def test_a_config_that_makes_no_sense_is_one_line(tmp_path: Path) -> None:
    """Transformers raises an error of its own where Llama's hidden size is no multiple of its heads."""
    folder = save_model(tmp_path, config_of("llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 33}))
    with pytest.raises(ModelError, match="no model that transformers can load"):
        LocalEngine(folder, dtype=torch.float32, device="cpu")


def test_dtypes_that_it_does_not_compute_in_are_refused(pair: Pair) -> None:
    with pytest.raises(ModelError, match=r"computes in bfloat16, float16, float32, not in int8"):
        LocalEngine(pair.folder, dtype=torch.int8, device="cpu")


def test_info(pair: Pair) -> None:
    info = pair.engine.info
    assert (info.kind, info.model, info.hidden_size, info.context_length) == ("local", str(pair.folder), 32, CONTEXT)
    assert (info.dtype, info.device) == ("float32", "cpu")


def test_nothing_asked(pair: Pair) -> None:
    assert pair.engine.generate([]) == []
    assert pair.engine.embed([]).shape == (0, 32)


def test_context_length(pair: Pair) -> None:
    text = "a" * 400
    length = len(pair.tokenizer(text)["input_ids"])
    assert length > CONTEXT
    with pytest.raises(ModelError, match=rf"'long' has {length} tokens"):
        pair.engine.embed([Prompt("long", text)])
    room = CONTEXT - len(pair.tokenizer(TEXTS[0])["input_ids"])
    pair.engine.generate([Request(Prompt("p", TEXTS[0]), Strategy(0), 0, 0, room)])
    with pytest.raises(ModelError, match=rf"asks for {room + 1} more.* holds {CONTEXT}"):
        pair.engine.generate([Request(Prompt("p", TEXTS[0]), Strategy(0), 0, 0, room + 1)])


def test_empty_prompt(pair: Pair) -> None:
    with pytest.raises(ModelError, match="'nothing' is empty"):
        pair.engine.embed([Prompt("full", "a"), Prompt("nothing", "")])


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelError, match=str(folder)):
            LocalEngine(folder, device="cpu")


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_sliding_windows_are_refused(kind: str, tmp_path: Path) -> None:
    fields = {"use_sliding_window": True, "max_window_layers": 1} if kind == "qwen2" else {}
    save_model(tmp_path, config_of(kind, sliding_window=16, **fields))
    with pytest.raises(ModelError, match="full attention"):
        LocalEngine(tmp_path, dtype=torch.float32, device="cpu")


def test_fingerprint(pair: Pair, tmp_path: Path) -> None:
    assert LocalEngine(pair.folder, dtype=torch.float32, device="cpu").info.fingerprint == pair.engine.info.fingerprint
    half = LocalEngine(pair.folder, dtype=torch.bfloat16, device="cpu").info
    assert (half.dtype, half.fingerprint) == ("bfloat16", pair.engine.info.fingerprint)
    copy = tmp_path / "copy"
    shutil.copytree(pair.folder, copy)
    model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    model.model.norm.weight.data[5] += 0.5
    model.save_pretrained(copy)
    assert LocalEngine(copy, dtype=torch.float32, device="cpu").info.fingerprint != pair.engine.info.fingerprint


def test_fingerprint_knows_the_vocabulary(pair: Pair, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pair.folder, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert LocalEngine(copy, dtype=torch.float32, device="cpu").info.fingerprint != pair.engine.info.fingerprint
