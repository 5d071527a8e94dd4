"""Decoding adapters inside an unmodified vLLM, offline or serving: ``RHEOSTAT_ADAPTER=DIR vllm serve MODEL``.

A request opts in by its extra arguments (``SamplingParams.extra_args``; over HTTP ``vllm_xargs``):

============================  =====================================================================================
``rheostat``                  ``adapt``: draw every action from the policy; ``commit``: take the most probable one
``rheostat_parallel_budget``  B, at least 1; by default the request's ``n``
``rheostat_seed``             the stream of the actions' draws; by default made from ``seed``, else random
``rheostat_trace``            a name under which ``collective_rpc("rheostat_actions", args=(name,))`` finds the actions
============================  =====================================================================================

vLLM applies custom logits processors before temperature and truncation. So an adapted request keeps those off, and the
processor here scales and truncates its rows as the chosen action says; vLLM draws the token.
"""

import copy
import os
import secrets
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from rheostat.adapters.description import BaseModel
from rheostat.adapters.files import DESCRIPTION, load_adapter
from rheostat.adapters.sequence import SequenceAdapter
from rheostat.adapters.token import TokenAdapter, TokenInputs
from rheostat.decoding.recording import row_statistics
from rheostat.decoding.strategy import Order
from rheostat.engines import models
from rheostat.engines.vllm import checkpoint_fingerprint
from rheostat.engines.vllm_rows import RowProcessor, keep_hidden_rows
from rheostat.errors import AdapterError, ConfigError
from rheostat.seeding import Purpose, derive_seed, uniforms
from rheostat.serving.actions import Actions, draw_from, most_probable, require_last_state
from rheostat.serving.vllm_entry import ADAPTER

_MODE, _BUDGET, _SEED, _TRACE = "rheostat", "rheostat_parallel_budget", "rheostat_seed", "rheostat_trace"
_KEYS = (_MODE, _BUDGET, _SEED, _TRACE)
_CHILD, _TICKET = "rheostat_child", "rheostat_ticket"  # ours, set after a request was admitted
_TRACED_STEPS = 1 << 16  # steps of traced requests that are kept

_log: deque[tuple[list[tuple[str, int]], NDArray[np.int64], Tensor]] = deque(maxlen=_TRACED_STEPS)
_loaded: dict[Path, tuple[int, int, int]] = {}  # adapter folders of this process, as they were when it started


def install() -> None:
    """Teach this process's vLLM: called in the front end, the engine and its worker, which may be one.

    Raises:
        AdapterError: no adapter in the folder that ``RHEOSTAT_ADAPTER`` names.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.parallel_sampling import ParentRequest

    keep_hidden_rows()
    _loaded.setdefault(_folder(), _state_of(_folder()))
    if getattr(EngineArgs.create_engine_config, "knows_rheostat", False):
        return
    create, child = EngineArgs.create_engine_config, ParentRequest._get_child_sampling_params

    def create_engine_config(self: Any, *args: Any, **fields: Any) -> Any:
        if not os.environ.get(ADAPTER):  # another engine of this process, made without adapter
            return create(self, *args, **fields)
        self.logits_processors = [*(self.logits_processors or []), f"{__name__}:{AdapterRows.__name__}"]
        self.worker_extension_cls = self.worker_extension_cls or f"{__name__}.{ActionsRPC.__name__}"
        if self.speculative_config is not None:  # vLLM's own complaint names neither adapter nor remedy
            raise ConfigError(f"{_folder()}: adapters do not work with speculative decoding: switch it off")
        config = create(self, *args, **fields)
        open_for(config)
        return config

    def child_params(self: Any, index: int) -> Any:
        return _child_params(self, child(self, index), index)

    create_engine_config.knows_rheostat = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config
    ParentRequest._get_child_sampling_params = child_params


def _folder() -> Path:
    return Path(os.environ[ADAPTER]).expanduser()


def _state_of(folder: Path) -> tuple[int, int, int]:
    try:
        status = (folder / DESCRIPTION).stat()
    except OSError as error:
        raise AdapterError(f"{folder} is no adapter: {DESCRIPTION} cannot be read ({error.strerror})") from error
    return status.st_ino, status.st_mtime_ns, status.st_size


def open_for(vllm_config: Any) -> SequenceAdapter | TokenAdapter:
    """The adapter that the environment names, for the engine that ``vllm_config`` describes.

    Raises:
        AdapterError: it is for another model, or does what vLLM cannot do.
        ConfigError: the engine does what adapters were not tested with.
    """
    folder, model, parallel = _folder(), vllm_config.model_config, vllm_config.parallel_config
    for refused, what in (
        (vllm_config.speculative_config is not None, "speculative decoding"),
        (vllm_config.lora_config is not None, "LoRA, which changes the hidden states that the adapter reads"),
        (model.quantization is not None, "quantised weights, which change the hidden states that the adapter reads"),
        (parallel.world_size > 1, "tensor or pipeline parallelism"),
        (parallel.data_parallel_size > 1, "data parallelism"),
        (model.runner_type != "generate", "pooling models"),
    ):
        if refused:
            raise ConfigError(f"{folder}: adapters do not work with {what}: switch it off, or serve without adapter")
    path = models.locate(model.model, model.revision)
    tokenizer = _tokenizer(path)
    base = BaseModel(model.model, None, model.get_hidden_size(), checkpoint_fingerprint(path, tokenizer))
    adapter = require_last_state(str(folder), load_adapter(folder, base=base).adapter)
    if adapter.space.order is not Order.VLLM:
        raise AdapterError(
            f"{folder}: it was trained with the order of transforms of {adapter.space.order}, vLLM has its own: "
            "use the local engine, or train one with --order vllm"
        )
    return adapter


def _tokenizer(path: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


def _child_params(parent: Any, params: Any, index: int) -> Any:
    """vLLM makes n requests of one, with equal arguments: each of ours needs its own number, all of them n and seed."""
    extra = params.extra_args or {}
    if _MODE not in extra:
        return params
    if not hasattr(parent, "rheostat_seed"):
        parent.rheostat_seed = _base_seed(parent.sampling_params)
    params = copy.copy(params)
    params.extra_args = {_BUDGET: parent.sampling_params.n} | extra | {_SEED: parent.rheostat_seed, _CHILD: index}
    return params


def _base_seed(params: Any) -> int:
    extra = params.extra_args
    if _SEED in extra:
        return int(extra[_SEED]) % 2**64
    return secrets.randbits(64) if params.seed is None else derive_seed("vllm", params.seed)


class _Ticket:
    """A request's slot, from its first step until vLLM forgets the request; survives preemption."""

    __slots__ = ("_free", "slot")

    def __init__(self, slot: int, free: list[int]) -> None:
        self.slot, self._free = slot, free

    def __del__(self) -> None:
        self._free.append(self.slot)


class AdapterRows(RowProcessor):
    """The logits processor of one engine: the adapter's decisions for the rows of the requests that opted in."""

    def __init__(self, vllm_config: Any, *runner: Any) -> None:
        super().__init__(vllm_config, *runner)
        self.adapter = open_for(vllm_config).to(self.device)
        self.actions = Actions(self.adapter.space, self.device)
        self._free: list[int] = []
        self._budget_R = np.zeros(0, dtype=np.int64)
        self._parallel_R = np.zeros(0, dtype=np.int64)
        self._stream_R = np.zeros(0, dtype=np.uint64)
        self._commit_R = np.zeros(0, dtype=bool)
        self._traced_R = np.zeros(0, dtype=bool)
        self._name_R: list[tuple[str, int]] = []
        self._choice_R = torch.zeros(0, dtype=torch.int64, device=self.device)  # of sequence-level adapters
        self._grow(len(self._slot_R))

    @property
    def requests(self) -> int:
        """How many requests hold a slot."""
        return len(self._name_R) - len(self._free)

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse, before it is queued, a request that opts in and asks for what cannot be had.

        Raises:
            ValueError: in one line; vLLM's server answers 400.
        """
        extra = sampling_params.extra_args or {}
        ours = [key for key in extra if key.startswith(_MODE)]
        if not ours:
            return
        if unknown := [key for key in ours if key not in _KEYS]:
            raise ValueError(f"unknown extra argument {unknown[0]!r}: Rheostat knows {', '.join(_KEYS)}")
        if extra.get(_MODE) not in ("adapt", "commit"):
            raise ValueError(f"extra argument rheostat must be 'adapt' or 'commit', got {extra.get(_MODE)!r}")
        for key, least in ((_BUDGET, 1), (_SEED, -(2**63))):
            value = extra.get(key, least)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**64:
                raise ValueError(f"extra argument {key} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(extra.get(_TRACE, ""), str):
            raise ValueError(f"extra argument {_TRACE} must be a name, got {extra[_TRACE]!r}")
        own = {
            "temperature": (1.0,),
            "top_p": (1.0,),
            "top_k": (0, -1),
            "min_p": (0.0,),
            "presence_penalty": (0.0,),
            "frequency_penalty": (0.0,),
            "repetition_penalty": (1.0,),
        }
        for name, neutral in own.items():
            if getattr(sampling_params, name) not in neutral:
                raise ValueError(
                    f"an adapted request leaves sampling to the adapter: send {name}={neutral[0]:g}, "
                    f"not {getattr(sampling_params, name):g}"
                )
        for folder, state in _loaded.items():
            try:
                changed = _state_of(folder) != state
            except AdapterError:
                changed = True
            if changed:
                raise ValueError(f"{folder} has changed since this server started: restart the server")

    def admit(self, params: Any) -> int:
        """See :meth:`rheostat.engines.vllm_rows.RowProcessor.admit`."""
        extra = params.extra_args or {}
        if _MODE not in extra:
            return -1
        if _TICKET not in extra:
            if not self._free:
                self._grow(len(self._name_R))
            slot = self._free.pop()
            extra[_TICKET] = _Ticket(slot, self._free)
            child, base = extra.get(_CHILD, 0), _base_seed(params)
            # one action serves all completions of a prompt at the sequence level
            is_own = child > 0 and isinstance(self.adapter, TokenAdapter)
            self._stream_R[slot] = derive_seed(base, child) if is_own else base
            self._budget_R[slot] = params.max_tokens
            self._parallel_R[slot] = extra.get(_BUDGET, 1)
            self._commit_R[slot] = extra[_MODE] == "commit"
            self._traced_R[slot] = _TRACE in extra
            self._name_R[slot] = (extra.get(_TRACE, ""), child)
        return int(extra[_TICKET].slot)

    def _grow(self, more: int) -> None:
        size = len(self._name_R)
        self._free.extend(range(size, size + more))
        for name in ("_budget_R", "_parallel_R", "_stream_R", "_commit_R", "_traced_R"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros(more, dtype=old.dtype)]))
        self._name_R.extend([("", 0)] * more)
        self._choice_R = torch.cat([self._choice_R, self._choice_R.new_zeros(more)])

    def step(
        self,
        logits_BV: Tensor,
        hidden_BH: Tensor,
        row_S: NDArray[np.int64],
        slot_S: NDArray[np.int64],
        t_S: NDArray[np.int64],
    ) -> None:
        """See :meth:`rheostat.engines.vllm_rows.RowProcessor.step`."""
        all_rows = len(row_S) == len(logits_BV)
        rows_S = self._put(row_S)
        logits_SV = logits_BV if all_rows else logits_BV[rows_S]
        choice_S = self.choose(logits_SV, hidden_BH if all_rows else hidden_BH[rows_S], slot_S, t_S)
        if self._traced_R[slot_S].any():
            seen = np.flatnonzero(self._traced_R[slot_S])
            _log.append(([self._name_R[slot] for slot in slot_S[seen]], t_S[seen], choice_S[self._put(seen)]))
        self.actions.apply(logits_SV, choice_S)
        if not all_rows:
            logits_BV.index_copy_(0, rows_S, logits_SV)

    def choose(
        self, logits_SV: Tensor, hidden_SH: Tensor, slot_S: NDArray[np.int64], t_S: NDArray[np.int64]
    ) -> Int[Tensor, " S"]:
        """The action of each row."""
        if isinstance(self.adapter, TokenAdapter):
            log_pi_SA = self.adapter.log_probabilities(self._inputs(logits_SV, hidden_SH, slot_S, t_S))
            return self._pick(log_pi_SA.exp(), slot_S, t_S)
        first = np.flatnonzero(t_S == 0)
        if len(first):
            slots = slot_S[first]
            pi_SA = self.adapter.probabilities(hidden_SH[self._put(first)].float(), self._put(self._parallel_R[slots]))
            self._choice_R[self._put(slots)] = self._pick(pi_SA, slots, t_S[first])
        return self._choice_R[self._put(slot_S)]

    def _inputs(self, logits_SV: Tensor, hidden_SH: Tensor, slot_S: NDArray[np.int64], t_S: Any) -> TokenInputs:
        assert isinstance(self.adapter, TokenAdapter)
        if self.adapter.config.reads_entropy:
            entropy_S = row_statistics(logits_SV).entropy_B
        else:
            entropy_S = torch.zeros(len(slot_S), device=self.device)
        budget_S = self._budget_R[slot_S]
        return TokenInputs(
            hidden_SH.bfloat16(),  # as AdaptiveDecoding reads it
            entropy_S,
            self._put(np.maximum(budget_S - t_S, 1)),
            self._put(budget_S),
            self._put(self._parallel_R[slot_S]),
        )

    def _pick(self, pi_SA: Tensor, slot_S: NDArray[np.int64], t_S: NDArray[np.int64]) -> Tensor:
        drawn_S = draw_from(pi_SA, self._put(uniforms(self._stream_R[slot_S], t_S, Purpose.ACTION)))
        if not self._commit_R[slot_S].any():
            return drawn_S
        return torch.where(self._put(self._commit_R[slot_S]), most_probable(pi_SA), drawn_S)

    def _put(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


class ActionsRPC:
    """What vLLM's worker answers to ``collective_rpc``."""

    def rheostat_actions(self, name: str) -> dict[int, list[int]]:
        """The actions (positions in the action space) of the request traced as ``name``, by completion and token.

        The actions of the last 65,536 steps are kept.
        """
        found: dict[int, dict[int, int]] = {}
        for names, t_S, choice_S in _log:
            for (known, child), t, choice in zip(names, t_S.tolist(), choice_S.tolist(), strict=True):
                if known == name:
                    found.setdefault(child, {})[t] = choice
        return {child: [of[t] for t in sorted(of)] for child, of in sorted(found.items())}
