"""Rows of the local engine in memory that stays where it is, and a step of theirs that the host does not look into.

Model, policy, draw and bookkeeping are one function of tensors, so that a GPU can replay it as one graph
(:mod:`rheostat.engines.replay`); run plainly, it does the same anywhere. Every sequence has a row of its own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from rheostat.decoding.policy import Decision, FixedStrategies, SamplingParameters, StepState, TokenPolicy
from rheostat.decoding.sampling import draw
from rheostat.decoding.strategy import Order
from rheostat.engines.attention import Prefix, RowCache
from rheostat.engines.machine import steady
from rheostat.engines.replay import Replays
from rheostat.seeding import Purpose, tensor_uniforms

if TYPE_CHECKING:
    from rheostat.engines.local import LocalEngine

STEPS = 4  # between two looks of the host; a sequence that has ended runs on for that many, and once more as many
_ROOM = 256  # tokens by which room, and what attention sees of it, grow
_WHOLE = ("token", "position", "t", "budget", "parallel", "request", "stream", "top_k")
_REAL = ("temperature", "top_p", "min_p")


def seen_of(length: int) -> int:
    """How much of the room a step for ``length`` tokens looks at: few sizes, each of them a graph of its own."""
    unit = max(_ROOM, steady(length) // 4)
    return -(-length // unit) * unit


class StaticCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Keys and values: per layer a pair of shape (rows, KV heads, room, head size).

    A step writes at ``position_B`` of its rows and looks at the first ``seen`` tokens. What it must not see holds zeros
    or what an earlier row left there: finite, so that a weight of zero silences it.
    """

    def __init__(
        self, shape: tuple[int, int, int], rows: int, room: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        self.prefix = Prefix([], 0)
        layers, groups, size = shape
        self.rows, self.room, self.seen = rows, room, 0
        self.position_B = torch.empty(0, dtype=torch.int64)
        self.buffers = [
            tuple(torch.zeros(rows, groups, room, size, dtype=dtype, device=device) for _ in range(2))
            for _ in range(layers)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write a token of each row, given as (rows, KV heads, 1, head size), and return what is seen."""
        rows = len(key_states)
        keys, values = (buffer[:rows] for buffer in self.buffers[layer_idx])
        at = self.position_B[:, None, None, None].expand_as(key_states)
        keys.scatter_(2, at, key_states)
        values.scatter_(2, at, value_states)
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def mask(self) -> Float[Tensor, "B 1 1 C"]:
        """What :func:`rheostat.engines.attention.attend` adds to a step's scores."""
        hidden_BC = torch.arange(self.seen, device=self.position_B.device) > self.position_B[:, None]
        zeros_BC = torch.zeros(hidden_BC.shape, device=hidden_BC.device)
        return zeros_BC.masked_fill_(hidden_BC, -torch.inf)[:, None, None]

    def copy(self, source_S: Tensor, target_S: Tensor, length: int) -> None:
        """The first ``length`` tokens of some rows become those of others."""
        for pair in self.buffers:
            for buffer in pair:
                buffer[target_S, :, :length] = buffer[source_S, :, :length]

    def take(self, cache: RowCache, target_B: Tensor) -> None:
        """The rows of ``cache``, their prefix first and without their padding, become the rows ``target_B``."""
        before, own = cache.prefix.length, cache.length
        index_BC = cache.padding_B[:, None] + torch.arange(own, device=target_B.device)
        index_BC = index_BC.clamp(max=own - 1)  # beyond a short row's end: anything, which nobody sees
        row_B1 = torch.arange(len(target_B), device=target_B.device)[:, None]
        for layer, pair in enumerate(self.buffers):
            for side, buffer in enumerate(pair):
                if before:
                    buffer[target_B, :, :before] = cache.prefix.layers[layer][side]
                of_row = cache.buffers[layer][side].transpose(1, 2)[row_B1, index_BC]
                buffer[target_B, :, before : before + own] = of_row.transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise NotImplementedError("rows have lengths of their own, which the host does not know")


class StaticRows:
    """Rows and all that a step needs of them. Calls follow each other in the same memory, as long as they fit in it.

    Args:
        engine: whose model runs.
        replays: whether steps are replayed as graphs.
    """

    def __init__(self, engine: "LocalEngine", *, replays: bool) -> None:
        self._engine, self._enabled = engine, replays
        self._allocate(0, 0)

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def _most(self, room: int) -> int:
        """How many rows of so many tokens the memory planned for them holds: a power of two, or 0."""
        engine = self._engine
        # half of what a batch may have: batches that run otherwise come between
        return steady(engine.batch_bytes // 2 // (room * engine.bytes_per_token + engine.logit_bytes))

    @torch.inference_mode()
    def begin(self, sequences: int, longest: int) -> int:
        """Empty rows for so many sequences, none longer than ``longest`` tokens with its prompt.

        Returns how many: a power of two, as many as are asked for or as the memory holds; 0: not one. They move, and
        graphs with them, only where there is no room for them; then there will be for calls like those before, too.
        """
        room = seen_of(longest)
        rows = min(self._most(room), 1 << (sequences - 1).bit_length())
        if not rows:
            return 0
        if rows > self.cache.rows or room > self.cache.room:
            all_rows, all_room = max(rows, self.cache.rows), max(room, self.cache.room)
            self._allocate(*((all_rows, all_room) if all_rows <= self._most(all_room) else (rows, room)))
        for tensor in self._changed:
            tensor.zero_()
        for name in ("budget", "parallel"):  # of one token: a row that nobody sits on stays where it is
            self._whole[_WHOLE.index(name)] = 1
        return rows

    @torch.inference_mode()
    def _allocate(self, rows: int, room: int) -> None:
        engine, device = self._engine, self._engine.device
        self.cache = StaticCache((0, 0, 0), 0, 0, engine.model.dtype, device)  # what was there goes first
        self.cache = StaticCache(engine.cache_shape, rows, room, engine.model.dtype, device)
        self._whole = torch.zeros(len(_WHOLE), rows, dtype=torch.int64, device=device)
        self._real = torch.zeros(len(_REAL), rows, dtype=torch.float64, device=device)
        self._written_TR = torch.zeros(STEPS, rows, dtype=torch.int64, device=device)
        self._row_R = torch.arange(rows, device=device)
        self.hidden_RH = torch.zeros(rows, engine.info.hidden_size, dtype=engine.model.dtype, device=device)
        self.logits_RV = torch.zeros(rows, len(engine.vocabulary.texts), device=device)
        self._changed = (self._whole, self._real, self._written_TR)
        self._replays = Replays(self._changed, enabled=self._enabled)

    @torch.inference_mode()
    def run(self, rows: int, seen: int, policy: TokenPolicy, order: Order) -> Decision:
        """One step of the first ``rows`` rows, of which no sequence has more than ``seen`` tokens with this one."""
        fixed = isinstance(policy, FixedStrategies)
        owner = self._replays if fixed else policy  # fixed strategies are part of the rows
        decision = self._replays.run(
            owner,
            (rows, seen, order),
            lambda: self._step(rows, seen, None if fixed else policy, order),
            self.logits_RV[:rows],
        )
        self._enabled = self._replays.enabled
        return decision

    def _step(self, rows: int, seen: int, policy: TokenPolicy | None, order: Order) -> Decision:
        """Rows write the token that they stand on, and draw the next one."""
        whole = dict(zip(_WHOLE, self._whole[:, :rows], strict=True))
        real = dict(zip(_REAL, self._real[:, :rows], strict=True))
        row_S, t_S = self._row_R[:rows], whole["t"]
        cache, hidden_BH, logits_BV = self.cache, self.hidden_RH[:rows], self.logits_RV[:rows]
        cache.position_B, cache.seen = whole["position"], seen
        found_BLH, found_BV = self._engine.forward(
            whole["token"][:, None], whole["position"][:, None], cache.mask(), cache, logits=True
        )
        hidden_BH.copy_(found_BLH[:, -1])
        logits_BV.copy_(found_BV)
        if policy is None:
            sets = SamplingParameters(real["temperature"], whole["top_k"], real["top_p"], real["min_p"])
            decision = Decision(sets, row_S)
        else:
            budgets = whole["budget"], whole["parallel"]
            decision = policy.decide(
                StepState(hidden_BH, logits_BV, row_S, whole["request"], t_S, *budgets, whole["stream"])
            )
        uniform_S = tensor_uniforms(whole["stream"], t_S, Purpose.TOKEN)
        token_S = draw(logits_BV, row_S, decision, uniform_S, order)
        whole["token"].copy_(token_S)
        if decision.log_pi_SK is not None:  # a policy that is not finite: the host will see it
            token_S = token_S.masked_fill(decision.log_pi_SK.isnan().any(1), -1)
        written_TS = self._written_TR[:, :rows]
        written_TS.copy_(torch.cat([written_TS[1:], token_S[None]]))
        goes_on_S = (t_S + 1 < whole["budget"]).long()
        whole["position"] += goes_on_S
        whole["t"] += goes_on_S
        return decision

    def read(self, rows: int, steps: int) -> "Read":
        """The tokens of the last ``steps`` steps, on their way to the host; −1 where the policy was not finite."""
        return Read(self._written_TR[STEPS - steps :, :rows])

    @torch.inference_mode()
    def seat(self, target_S: Sequence[int], whole: Sequence[Sequence[int]], sets: SamplingParameters | None) -> None:
        """Sequences sit down on the rows ``target_S``: their numbers (a row of them for each, ``top_k`` left out)."""
        at_S = torch.tensor(target_S, device=self._whole.device)
        self._whole[: len(_WHOLE) - 1, at_S] = torch.tensor(whole, device=at_S.device).T
        if sets is not None:
            self._whole[-1, at_S] = sets.top_k_K
            self._real[:, at_S] = torch.stack([sets.temperature_K, sets.top_p_K, sets.min_p_K])

    @torch.inference_mode()
    def copy(self, source_S: Sequence[int], target_S: Sequence[int], length: int) -> None:
        """The first ``length`` tokens of some rows become those of others, and all that is known of the former."""
        source, target = (torch.tensor(list(rows), device=self._whole.device) for rows in (source_S, target_S))
        self.cache.copy(source, target, length)
        for tensor in self._changed[:2]:
            tensor[:, target] = tensor[:, source]

    @torch.inference_mode()
    def take(self, cache: RowCache, target_B: Sequence[int]) -> None:
        """Prompts that were read elsewhere."""
        self.cache.take(cache, torch.tensor(target_B, device=self._whole.device))


class Read:
    """A copy of ``tensor`` to the host that nobody waits for until its values are asked for."""

    def __init__(self, tensor: Int[Tensor, "T B"]) -> None:
        self._copy = tensor.to("cpu", non_blocking=True, copy=True)  # from a GPU into pinned memory
        self._event = torch.cuda.Event() if tensor.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def values(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy
