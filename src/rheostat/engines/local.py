"""The local engine: transformers weights, our own decode loop."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from rheostat.decoding.policy import StepObserver, TokenPolicy
from rheostat.decoding.strategy import Order
from rheostat.engines.attention import Prefix, RowCache
from rheostat.engines.base import EngineInfo, Pooling, Request, own_strategies
from rheostat.engines.continuous import ContinuousBatch, Fed
from rheostat.engines.decode import decode, ending_tokens
from rheostat.engines.layers import speed_up
from rheostat.engines.loading import (
    TokenizerVocabulary,
    cache_shape,
    default_dtype,
    eos_ids,
    fingerprint,
    gigabytes,
    load,
)
from rheostat.engines.machine import free_memory, keep_freed_memory, steady
from rheostat.engines.refill import Refill
from rheostat.engines.rows import LocalRows, Waiting, asked, common_prefix
from rheostat.engines.slots import LocalSlots, SlotCache
from rheostat.engines.static import StaticCache, StaticRows
from rheostat.errors import ModelError
from rheostat.types import Completion, Prompt

_CACHE_BYTES = 512 << 20  # keys and values of one batch on a CPU, where more rows gain little
_FEW_ROWS, _FEW_BYTES = 64, 2 << 30  # but for so few rows, as long answers leave room for
_LOGITS = 4  # copies of a row's float32 logits at a time, the sampler's included
_PREFILL_TOKENS = 4096  # tokens in one pass of the model
_SCORE_BYTES = 64 << 20  # attention scores of one layer in one pass
_PREFIXES = 8  # shared prefixes kept for later batches
_PASS_TOKENS = 64  # prompt tokens whose prefill costs about as much as a pass of the model for one token per row


class LocalEngine:
    """A frozen transformers model on one device.

    Args:
        path: folder with config, tokenizer and safetensors (``rheostat.engines.models.locate`` finds one).
        name: how users call the model; stored with what it produces.
        dtype: by default bfloat16 where the hardware multiplies it, else float32.
        device: by default the first GPU, else the CPU.

    Raises:
        ModelError: the folder holds no usable causal language model, or one whose attention is not full, or there is
            not enough memory for it.
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cpu":
            keep_freed_memory()
        dtype = dtype or default_dtype(self.device)
        self.model, self.tokenizer = load(Path(path), dtype, self.device)
        config = self.model.config.get_text_config()
        identity = fingerprint(self.model, self.tokenizer)
        size: int = self.model.get_output_embeddings().weight.shape[0]
        self.has_kernels = speed_up(self.model)
        self.info = EngineInfo(
            kind="local",
            model=name or str(path),
            fingerprint=identity,
            hidden_size=config.hidden_size,
            context_length=config.max_position_embeddings,
            dtype=str(dtype).removeprefix("torch."),
            device=self.device.type,
            threads=torch.get_num_threads(),
            kernels="compiled" if self.has_kernels else "torch",
        )
        self.vocabulary = TokenizerVocabulary(self.tokenizer, eos_ids(self.model, self.tokenizer), size)
        self._hidden_BLH = torch.empty(0)
        self.model.base_model.register_forward_hook(self._keep_hidden)
        self._heads = config.num_attention_heads
        # half of what is free is planned for: prompts, prefixes and attention need some, and so may others
        self.batch_bytes = steady(free_memory(self.device) // 2)
        on_cpu = self.device.type == "cpu"
        self._cache_bytes = min(self.batch_bytes, _CACHE_BYTES) if on_cpu else self.batch_bytes
        self._few_bytes = min(self.batch_bytes, _FEW_BYTES) if on_cpu else self.batch_bytes
        self.logit_bytes = _LOGITS * 4 * size
        self._static = None if on_cpu else StaticRows(self, replays=True)
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self._endings: dict[tuple[str, ...], Tensor] = {}

    def _keep_hidden(self, _module: nn.Module, _args: object, output: transformers.utils.ModelOutput) -> None:
        self._hidden_BLH = output.last_hidden_state

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling = Pooling.LAST) -> Float[Tensor, "P H"]:
        """See :meth:`rheostat.engines.base.Engine.embed`."""
        tokens = self.tokenize(prompts, [0] * len(prompts))
        result_PH = torch.empty(len(prompts), self.info.hidden_size)
        for batch in self.batches(tokens, [1] * len(prompts), [0] * len(prompts)):
            rows = LocalRows(self, [tokens[index] for index in batch])
            result_PH[batch] = rows.embed(pooling).float().cpu()
        return result_PH

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """See :meth:`rheostat.engines.base.Engine.pieces`."""
        return [self.vocabulary.texts[token] for token in token_ids]

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        """See :meth:`rheostat.engines.base.Engine.generate`."""
        policy = policy or own_strategies(requests, self.device)
        whole = asked(self, requests)
        rows = self._static
        if rows is not None and requests and getattr(policy, "replayable", False):
            count = rows.begin(len(requests), max(len(part.tokens) + part.budget for part in whole))
            if count:
                prompt_of = {index: p for p, part in enumerate(whole) for index in part.members}
                tokens = [part.tokens for part in whole]
                return Refill(self, rows, count, requests, tokens, prompt_of).complete(policy, order, observer)
        waiting = Waiting(self, requests, whole)
        results: dict[int, Completion] = {}
        while (batch := waiting.next()) is not None:
            results |= decode(
                batch, self.vocabulary, self.ending_tokens_of, order, policy, observer, waiting.next_beside
            )
        return [results[index] for index in range(len(requests))]

    def read(self, tokens: Sequence[list[int]]) -> Iterator[tuple[list[int], RowCache]]:
        """Keys and values of prompts: those that were read together, and where."""
        for batch in self.batches(tokens, [1] * len(tokens), [1] * len(tokens)):
            rows = LocalRows(self, [tokens[index] for index in batch])
            rows.prefill(logits=False)
            yield batch, rows.cache

    def open_slots(self) -> LocalSlots:
        """See :meth:`rheostat.engines.continuous.SlotEngine.open_slots`."""
        return LocalSlots(self)

    def open_batch(self, rows: int) -> ContinuousBatch:
        """See :meth:`rheostat.engines.jobs.ServedEngine.open_batch`."""
        return ContinuousBatch(self, rows)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """See :meth:`rheostat.engines.jobs.ServedEngine.encode`."""
        return list(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)

    @property
    def chat_template(self) -> str | None:
        """See :attr:`rheostat.engines.base.Engine.chat_template`."""
        template = self.tokenizer.chat_template
        return None if template is None else str(template)

    def chat_text(self, turns: Sequence[Mapping[str, str]], thinking: bool | None = None) -> str:
        """See :meth:`rheostat.engines.base.Engine.chat_text`."""
        if self.chat_template is None:
            raise ModelError(f"{self.info.model} has no chat template: give the prompt as plain text")
        switch = {} if thinking is None else {"enable_thinking": thinking}
        text = self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **switch)
        return str(text)

    def ending_tokens_of(self, stop: tuple[str, ...]) -> Tensor:
        """:func:`rheostat.engines.decode.ending_tokens`, kept."""
        if stop not in self._endings:
            self._endings[stop] = ending_tokens(self.vocabulary, stop)
        return self._endings[stop]

    def tokenize(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[list[int]]:
        """The prompts' tokens.

        Raises:
            ModelError: a prompt is empty, or does not fit in the context with its token budget.
        """
        if not prompts:
            return []
        tokens: list[list[int]] = self.tokenizer([prompt.text for prompt in prompts])["input_ids"]
        for prompt, ids, budget in zip(prompts, tokens, budgets, strict=True):
            if not ids:
                raise ModelError(f"prompt of problem {prompt.problem_id!r} is empty: give the model some text")
            if len(ids) + budget > self.info.context_length:
                raise ModelError(
                    f"prompt of problem {prompt.problem_id!r} has {len(ids)} tokens and asks for {budget} more, but "
                    f"the context of {self.info.model} holds {self.info.context_length}: shorten it or lower max_tokens"
                )
        return tokens

    def batches(
        self, tokens: Sequence[list[int]], samples: Sequence[int], budgets: Sequence[int], share: int = 1
    ) -> Iterator[list[int]]:
        """Prompts that begin together: neighbours in token order, so that they share a prefix, within the memory.

        A prompt joins unless the cache could outgrow its bound, of which the batch gets a ``share``-th, or shortening
        the batch's shared prefix would cost more than the passes of the model that a batch of its own takes.
        """
        batch: list[int] = []
        shared = rows = row_tokens = 0
        for index in sorted(range(len(tokens)), key=lambda i: (tokens[i], i)):
            length, count = len(tokens[index]), samples[index]
            common = min(shared, common_prefix(tokens[batch[0]], tokens[index])) if batch else length
            extra_prefill = (len(batch) - 1) * shared - len(batch) * common
            own_tokens = row_tokens + count * (length + budgets[index]) - (rows + count) * common
            is_large = not self.fits(share * own_tokens, share * (rows + count))
            if batch and (extra_prefill > _PASS_TOKENS * budgets[index] or is_large):
                yield batch
                batch, common, rows, row_tokens = [], length, 0, 0
            batch.append(index)
            shared, rows, row_tokens = common, rows + count, row_tokens + count * (length + budgets[index])
        if batch:
            yield batch

    def fits(self, tokens: int, rows: int) -> bool:
        """Whether a batch whose rows come to so many tokens beside what they share keeps to the memory planned."""
        kept = tokens * self.bytes_per_token
        most = self._few_bytes if rows <= _FEW_ROWS else self._cache_bytes
        return kept <= most and kept + rows * self.logit_bytes <= self.batch_bytes

    def most_samples(self, prompt: Prompt, length: int, budget: int) -> int:
        """How many answers to a prompt a batch holds; they share all but its last token. One runs in any case.

        Raises:
            ModelError: not even one fits in the memory that is free.
        """
        own = 1 + budget
        kept = own * self.bytes_per_token
        most = max(self._cache_bytes // kept, min(_FEW_ROWS, self._few_bytes // kept))
        most = min(most, self.batch_bytes // (kept + self.logit_bytes))
        if most:
            return most
        whole, free = (length + budget) * self.bytes_per_token + self.logit_bytes, free_memory(self.device)
        if whole > free:
            room = (free - self.logit_bytes) // self.bytes_per_token - length
            advice = f"lower max_tokens to {room}" if room > 0 else "free some memory, or take a smaller model"
            raise ModelError(
                f"prompt of problem {prompt.problem_id!r}: its {length} tokens and {budget} more take "
                f"{gigabytes(whole)} of keys and values, and {gigabytes(free)} is free on {self.device.type}: "
                f"{gigabytes(whole - free)} is missing; {advice}"
            )
        return 1

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, all layers together."""
        return 2 * math.prod(self.cache_shape) * int(self.model.dtype.itemsize)

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, KV heads, and numbers of a head."""
        return cache_shape(self.model.config)

    def prefix(self, tokens: tuple[int, ...]) -> Prefix:
        """Keys and values of a shared prefix, computed once and kept for later batches."""
        if tokens not in self._prefixes:
            cache = RowCache(Prefix([], 0), torch.zeros(1, dtype=torch.int64, device=self.device))
            sum_BH = torch.zeros(1, self.info.hidden_size)
            if tokens:
                positions = torch.arange(len(tokens), device=self.device)[None]
                ids = torch.tensor([tokens], device=self.device)
                sum_BH = self.prefill(ids, positions, cache).sum_BH
            layers = [
                (k[0, :, : cache.length].contiguous(), v[0, :, : cache.length].contiguous()) for k, v in cache.buffers
            ]
            self._prefixes[tokens] = Prefix(layers, len(tokens), sum_BH[0])
            while len(self._prefixes) > _PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(tokens)
        return self._prefixes[tokens]

    def forget_prefixes(self) -> None:
        """Drop the shared prefixes kept for later batches."""
        self._prefixes.clear()

    @torch.inference_mode()
    def prefill(self, ids_BL: Tensor, position_BL: Tensor, cache: RowCache, *, logits: bool = False) -> Fed:
        """Run prompt tokens through the model in passes of bounded memory; without ``logits`` there are none.

        A row's padding is invisible and left out of the sum of hidden states.
        """
        rows, length = ids_BL.shape
        is_padding_BL = torch.arange(length, device=self.device) < cache.padding_B[:, None]
        scores = rows * self._heads * (cache.prefix.length + length) * 4
        step = max(1, min(_PREFILL_TOKENS // rows, _SCORE_BYTES // scores))
        sum_BH = torch.zeros(rows, self.info.hidden_size, device=self.device)
        for start in range(0, length, step):
            end = min(start + step, length)
            causal_LC = torch.arange(end, device=self.device) > torch.arange(start, end, device=self.device)[:, None]
            hidden_LC = causal_LC | is_padding_BL[:, None, None, :end]
            # a padding query sees itself, so that its softmax is defined
            hidden_LC &= torch.arange(end, device=self.device) != torch.arange(start, end, device=self.device)[:, None]
            mask, is_last = cache.mask(hidden_LC), end == length
            hidden_BLH, logits_BV = self.forward(
                ids_BL[:, start:end], position_BL[:, start:end], mask, cache, logits=logits and is_last
            )
            cache.step(end - start)
            sum_BH += (hidden_BLH.float() * ~is_padding_BL[:, start:end, None]).sum(1)
        return Fed(hidden_BLH[:, -1], logits_BV.float(), sum_BH)

    @torch.inference_mode()
    def step(self, token_B: Tensor, position_B: Tensor, cache: RowCache) -> tuple[Tensor, Tensor]:
        """One token per row: hidden_BH after the final norm, and float32 logits_BV."""
        mask = no_mask(self.device) if self.has_kernels else cache.mask_of_step()
        hidden_BLH, logits_BV = self.forward(token_B[:, None], position_B[:, None], mask, cache, logits=True)
        cache.step(1)
        return hidden_BLH[:, -1], logits_BV.float()

    def forward(
        self, ids_BL: Tensor, position_BL: Tensor, mask: Tensor, cache: RowCache | StaticCache, *, logits: bool
    ) -> tuple[Tensor, Tensor]:
        """A pass: hidden_BLH after the final norm, and logits_BV of the last tokens where they are wanted.

        The cache is written, and ``cache.step`` not called.
        """
        inputs = {
            "input_ids": ids_BL,
            "position_ids": position_BL,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": True,
            "rheostat_prefix": cache.prefix,
        }
        if logits:
            logits_BV = self.model(**inputs, logits_to_keep=1).logits[:, -1]
        else:
            self.model.base_model(**inputs)
            logits_BV = torch.empty(len(ids_BL), 0, device=self.device)
        return self._hidden_BLH, logits_BV

    @torch.inference_mode()
    def run_flat(self, id_N: Tensor, position_N: Tensor, last_B: Tensor, cache: SlotCache) -> tuple[Tensor, Tensor]:
        """Tokens of many rows in one pass: hidden_NH after the final norm, and float32 logits_BV at ``last_B``."""
        output = self.model(
            input_ids=id_N[None],
            position_ids=position_N[None],
            attention_mask=no_mask(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last_B,
            rheostat_slots=cache,
        )
        return self._hidden_BLH[0], output.logits[0].float()


def no_mask(device: torch.device) -> Tensor:
    """A mask of four axes, which transformers does not look at, where attention needs none."""
    return torch.zeros(1, 1, 1, 1, device=device)
