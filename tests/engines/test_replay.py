"""Rows that stay in place, and steps of theirs that are replayed, write what the decode loop writes.

The stand-in for a GPU's graph knows what a graph knows: it writes down which operation a step does on which memory, and
does these again, without a line of the step's Python.
"""

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from test_decode import Sees
from test_local import TEXTS, config_of, save_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rheostat.adapters import features
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig
from rheostat.baselines.uniform import UniformMixture
from rheostat.decoding import sampling, weights
from rheostat.decoding.policy import Decision, FixedStrategies, SamplingParameters, StepState, TokenPolicy, draw_actions
from rheostat.decoding.recording import Recorder
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines import replay, static
from rheostat.engines.base import Request
from rheostat.engines.local import LocalEngine
from rheostat.engines.static import StaticRows
from rheostat.errors import AdapterError
from rheostat.types import Completion, FinishReason, Prompt

SPACE = ActionSpace((Strategy(0), Strategy(1.5), Strategy(1.0, top_k=5), Strategy(0.75, None, 0.8)))
STRATEGIES = (Strategy(1.0), Strategy(0), Strategy(1.25, 10, 0.9), Strategy(0.75, None, 0.95, 0.1))
# operations with whose results a host goes on, or that bring a number of its own to the device
_LOOKS = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "equal",
    "masked_select",
    "lift_fresh",
    "bincount",
}


def requests_of(fixed: bool = True, count: int = 60) -> list[Request]:
    """Prompts that share a prefix and such that do not, one of a single token, stops, budgets, samples."""
    pick = random.Random(3)
    stops: list[tuple[str, ...]] = [(), (), ("e",), ("\n", " a"), ("é",)]
    return [
        Request(
            Prompt(f"p{i % len(TEXTS)}", TEXTS[i % len(TEXTS)], pick.choice(stops)),
            pick.choice(STRATEGIES) if fixed else None,
            i,
            11,
            pick.choice((1, 2, 4, 12, 30)),
            1 if fixed else 1 + 7 * (i % 2),
        )
        for i in range(count)
    ]


def adaptive(commit: bool = False) -> AdaptiveDecoding:
    """A policy that depends on everything a token policy may see."""
    adapter = TokenAdapter(TokenConfig(32, Features.BOTH, budgets=(1, 8), width=8, budget_width=4), SPACE, seed=1)
    torch.nn.init.normal_(adapter.output.weight, std=3.0, generator=torch.Generator().manual_seed(3))
    return AdaptiveDecoding(adapter.eval(), commit)


POLICIES: dict[str, Callable[[], TokenPolicy | None]] = {
    "fixed": lambda: None,
    "adapter": adaptive,
    "commit": lambda: adaptive(True),
    "uniform": lambda: UniformMixture(SPACE),
}


class Tape(TorchDispatchMode):
    """The operations of a step, with the memory that they read and wrote. The host may not look at a number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2])
        )
        if name in _LOOKS or by_mask:
            raise RuntimeError(f"the host looks at a step: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """In place of the GPU's."""

    def __init__(self, graphs: "Graphs", tape: Tape) -> None:
        self._graphs, self._tape = graphs, tape

    @torch.inference_mode()
    def replay(self) -> None:
        self._graphs.replays += 1
        for func, args, kwargs, out in self._tape.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or done in place
                    old.copy_(new)
        if self._graphs.fault:
            self._graphs.fault(self._tape)

    def pool(self) -> None:
        return None


class Graphs:
    """Counts what is captured and replayed."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.fault: Callable[[Tape], object] | None = None

    def __call__(self, step: Callable[[], Decision], pool: object) -> tuple[Decision, Graph]:
        self.captures += 1
        with Tape() as tape:
            decision = step()
        return decision, Graph(self, tape)


def draw(logits_BV: Tensor, row_S: Tensor, decision: Decision, uniform_S: Tensor, order: Order) -> Tensor:
    """The inverse CDF of the reference's transforms, which looks at nothing, as the GPU's kernel does."""
    cdf_SV = transform(logits_BV[row_S], decision.parameters[decision.choice_S], order).cumsum(1)
    return torch.searchsorted(cdf_SV, uniform_S[:, None], right=True).squeeze(1).clamp(max=logits_BV.shape[1] - 1)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    folder = save_model(tmp_path_factory.mktemp("replay"), config_of(request.param))
    engine = LocalEngine(folder, dtype=torch.float32, device="cpu")
    engine.vocabulary.eos_ids = frozenset(range(0, 290, 29))  # the model alone would hardly end
    return engine


@pytest.fixture
def plain(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> StaticRows:
    """Rows in place, whose steps are not replayed."""
    monkeypatch.setattr(engine, "_static", StaticRows(engine, replays=False))
    return engine._static


@pytest.fixture
def graphs(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Steps are replayed; what a CPU looks at and a GPU does not is done as on a GPU."""
    graphs = Graphs()
    monkeypatch.setattr(replay, "captured", graphs)
    monkeypatch.setattr(static, "draw", draw)
    monkeypatch.setattr(weights, "compiled_sampling", lambda _: None)
    monkeypatch.setattr(features, "_log2", lambda budget_N, like: budget_N.to(like).log2())
    monkeypatch.setattr(engine, "_static", StaticRows(engine, replays=True))
    return graphs


def looped(engine: LocalEngine, *args: Any) -> list[Completion]:
    """What the decode loop writes."""
    rows, engine._static = engine._static, None
    try:
        return engine.generate(*args)
    finally:
        engine._static = rows


def limit(engine: LocalEngine, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan for so many rows of 256 tokens."""
    row = 256 * engine.bytes_per_token + engine.logit_bytes
    monkeypatch.setattr(engine, "batch_bytes", 2 * rows * row)


@pytest.mark.parametrize(("most", "order"), [(1, Order.VLLM), (8, Order.TRANSFORMERS), (512, Order.VLLM)])
@pytest.mark.parametrize("which", POLICIES)
def test_rows_in_place_write_what_the_loop_writes(
    which: str, most: int, order: Order, engine: LocalEngine, plain: StaticRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row for all, more requests than rows, a row for each: who leaves, who comes, and who ends where."""
    requests, policy = requests_of(which == "fixed"), POLICIES[which]()
    limit(engine, most, monkeypatch)
    expected = looped(engine, requests, policy, order)
    assert engine.generate(requests, policy, order) == expected
    by_reason = [completion.finish_reason for completion in expected]
    assert min(by_reason.count(reason) for reason in FinishReason) > 5
    by_stop = sum(
        c.finish_reason is FinishReason.STOP and c.token_ids[-1] not in engine.vocabulary.eos_ids for c in expected
    )
    assert by_stop > 1
    assert by_reason.count(FinishReason.STOP) - by_stop > 1


@pytest.mark.parametrize("which", POLICIES)
def test_replayed_steps_write_what_the_loop_writes(
    which: str, engine: LocalEngine, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rows leave and come, and attention's room grows; a graph serves the calls that follow."""
    monkeypatch.setattr(static, "_ROOM", 16)
    requests, policy = requests_of(which == "fixed"), POLICIES[which]()
    limit(engine, 8, monkeypatch)
    for order in Order:
        assert engine.generate(requests, policy, order) == looped(engine, requests, policy, order)
    captures = graphs.captures
    assert captures >= 4
    assert graphs.replays > 5 * captures
    strategy = Strategy(0.9, 7) if which == "fixed" else None
    others = [replace(request, seed=5, strategy=strategy) for request in requests[::-1]]
    assert engine.generate(others, policy) == looped(engine, others, policy)
    captures = graphs.captures
    assert engine.generate(others, policy) == engine.generate(others, policy)
    assert graphs.captures == captures
    assert engine.generate(requests[:20], policy, order) == looped(engine, requests[:20], policy, order)


@pytest.mark.parametrize("which", POLICIES)
def test_a_step_stays_where_its_tensors_are(which: str, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without numbers there is nothing to look at, nor to mix with a CPU's."""
    device = torch.device("meta")
    there = LocalEngine(engine.info.model, dtype=torch.float32, device="cpu")
    there.device = device
    for module in there.model.to(device).modules():  # and what is no parameter
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.to(device))
    monkeypatch.setattr(static, "draw", draw)
    policy: TokenPolicy = FixedStrategies(STRATEGIES, device)
    if which == "uniform":
        policy = UniformMixture(SPACE, device)
    elif which != "fixed":
        policy = AdaptiveDecoding(adaptive().adapter.to(device), which == "commit")
    rows = StaticRows(there, replays=False)
    assert rows.begin(5, 100) == 8
    rows.seat([0, 3], [(1,) * 7] * 2, FixedStrategies(STRATEGIES, device).sets(torch.arange(2, device=device)))
    rows.copy([0], [1], 5)
    for order in Order:
        decision = rows.run(8, 256, policy, order)
        assert decision.choice_S.device == decision.parameters.top_k_K.device == device


def test_graphs_end_with_their_policy_and_their_memory(engine: LocalEngine, graphs: Graphs) -> None:
    requests = requests_of(False, 8)
    policy, rows = adaptive(), engine._static
    engine.generate(requests, policy)
    assert len(rows._replays._known) == 1
    del policy
    assert len(rows._replays._known) == 0
    policy = adaptive()
    engine.generate(requests, policy)
    assert rows.cache.rows == 8
    known, captures = rows._replays, graphs.captures
    engine.generate(requests, policy)
    assert (rows._replays, graphs.captures) == (known, captures)
    more = requests_of(False, 9)
    assert engine.generate(more, policy) == looped(engine, more, policy)
    assert rows.cache.rows == 16
    assert rows._replays is not known


@pytest.mark.parametrize("fault", ["capture", "look", "result"])
def test_what_cannot_be_replayed_is_run_with_one_warning(
    fault: str, engine: LocalEngine, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of()
    limit(engine, 8, monkeypatch)
    reason = "no graph here"
    if fault == "capture":

        def refuse(*_: object) -> None:
            raise RuntimeError("no graph here\nand more")

        monkeypatch.setattr(replay, "captured", refuse)
    elif fault == "look":
        monkeypatch.setattr(static, "draw", sampling.draw)
        monkeypatch.setattr(sampling, "compiled_sampling", lambda _: None)
        reason = "the host looks at a step: aten._unique2.default"
    else:
        graphs.fault = lambda _: engine._static.logits_RV.add_(1)
        reason = "a replayed step gave other logits than the step itself"
    expected = looped(engine, requests)
    with pytest.warns(UserWarning, match=rf"steps run without CUDA graphs, which is slower \({reason}\)") as caught:
        assert engine.generate(requests) == expected
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limit(engine, 16, monkeypatch)  # other memory, the same machine
        assert engine.generate(requests) == expected


@pytest.mark.parametrize("which", ["fixed", "adapter"])
def test_an_observer_sees_what_it_sees_of_the_loop(
    which: str, engine: LocalEngine, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token that belongs to an answer, once, with the state that it was drawn from."""
    requests, policy = requests_of(which == "fixed"), POLICIES[which]()
    limit(engine, 8, monkeypatch)
    recorders = [Recorder(Order.VLLM, 1.0), Recorder(Order.VLLM, 1.0)]
    completions = engine.generate(requests, policy, Order.VLLM, recorders[0])
    assert completions == looped(engine, requests, policy, Order.VLLM, recorders[1])
    ours, theirs = (recorder.steps() for recorder in recorders)
    assert ours is not None
    assert theirs is not None
    assert len(ours) == sum(len(completion.token_ids) for completion in completions)
    for field in fields(ours):
        if which == "fixed" and field.name in ("action_N", "log_pi_NA", "log_p_NA"):
            continue  # the loop's policy was made for the call
        torch.testing.assert_close(getattr(ours, field.name), getattr(theirs, field.name), rtol=1e-2, atol=1e-2)
    assert not ours.hidden_NH.is_inference()


@pytest.mark.parametrize("when", [0, 3])
def test_a_policy_that_is_not_finite_is_refused(when: int, engine: LocalEngine, plain: StaticRows) -> None:
    """Where the host looks; what comes after a sequence's end is nobody's business."""

    class Broken:
        replayable = True

        def decide(self, state: StepState) -> Decision:
            pi_SA = torch.full((len(state.row_S), 2), 0.5).where(state.t_S[:, None] != when, torch.nan)
            return Decision(SamplingParameters.of(STRATEGIES[:2]), draw_actions(state, pi_SA), pi_SA.log())

    requests = requests_of(False)
    with pytest.raises(AdapterError, match="the policy's probabilities are not finite"):
        engine.generate(requests, Broken())
    engine.generate([replace(request, max_tokens=2) for request in requests], Broken()) if when else None


def test_other_policies_run_in_the_loop(
    engine: LocalEngine, plain: StaticRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "run", None)

    class Odd:
        def decide(self, state: StepState) -> Decision:
            return Decision(SamplingParameters.of(STRATEGIES[:2]), state.request_S % 2)

    start = SequenceAdapter(SequenceConfig(32, width=4, budget_width=4), SPACE)
    both = TokenAdapter.starting_from(start, TokenConfig(32, width=4, budget_width=4)).eval()
    sigma = ActionSpace((Strategy(1.0), Strategy(1.0, top_n_sigma=1.0)))
    requests = requests_of(False, 12)
    for policy in (Odd(), AdaptiveDecoding(both), UniformMixture(sigma)):
        assert engine.generate(requests, policy) == looped(engine, requests, policy)
    sharp = [replace(request, strategy=sigma.strategies[1]) for request in requests]
    assert engine.generate(sharp) == looped(engine, sharp)
    monkeypatch.setattr(plain, "begin", lambda *_: 0)  # not one row fits beside what a batch may have
    assert engine.generate(requests, UniformMixture(SPACE)) == looped(engine, requests, UniformMixture(SPACE))


def test_nothing_is_left_of_who_sat_there_before(engine: LocalEngine, plain: StaticRows) -> None:
    requests = requests_of()
    expected = engine.generate(requests)
    for pair in plain.cache.buffers:
        for buffer in pair:
            buffer.data.uniform_(-30, 30)
    for tensor in (*plain._changed, plain.logits_RV, plain.hidden_RH):
        tensor.data.fill_(7)
    assert engine.generate(requests) == expected


def watched(plain: StaticRows, monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """The rows of each step, and ``"look"`` where the host looked."""
    seen: list[int | str] = []
    run, values = plain.run, static.Read.values
    monkeypatch.setattr(plain, "run", lambda rows, *rest: (seen.append(rows), run(rows, *rest))[1])
    monkeypatch.setattr(static.Read, "values", lambda self: (seen.append("look"), values(self))[1])
    return seen


def test_the_host_looks_every_few_steps_and_late(
    engine: LocalEngine, plain: StaticRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.vocabulary, "eos_ids", frozenset())
    seen = watched(plain, monkeypatch)
    requests = [Request(Prompt(text, text), Strategy(), 0, 0, 14) for text in TEXTS]
    engine.generate(requests)
    # not one step more than there are tokens, and when it waits for some of them the next ones are under way
    assert seen == [8] * 8 + ["look"] + [8] * 4 + ["look"] + [8] * 2 + ["look", "look"]
    seen.clear()
    engine.generate([replace(request, max_tokens=2) for request in requests], observer=Sees())
    assert seen == [8, "look", "look", 8, "look", "look"]  # the second for the observer


def test_a_row_whose_budget_is_spent_stays_in_its_room(
    engine: LocalEngine, plain: StaticRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the others go on."""
    monkeypatch.setattr(engine.vocabulary, "eos_ids", frozenset())
    requests = [Request(Prompt("p", TEXTS[1]), Strategy(), i, 0, budget) for i, budget in enumerate((1, 2, 40, 7))]
    engine.generate(requests)
    first = len(engine.tokenizer(TEXTS[1])["input_ids"]) - 1
    position_R = plain._whole[static._WHOLE.index("position")]
    assert (position_R - first).tolist() == [request.max_tokens - 1 for request in requests]


def test_rows_shrink_with_those_who_stay(
    engine: LocalEngine, plain: StaticRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.vocabulary, "eos_ids", frozenset())
    seen = watched(plain, monkeypatch)
    requests = [Request(Prompt("p", TEXTS[1]), Strategy(), i, 0, 4 + 4 * i) for i in range(9)]
    assert engine.generate(requests) == looped(engine, requests)
    sizes = [rows for rows in seen if rows != "look"]
    assert sizes == [16] * 4 + [8] * 32  # fewer take as long


def test_a_prompt_is_read_once(engine: LocalEngine, plain: StaticRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its samples are divided among those who sit down at one time, and whatever else runs beside them."""
    read: list[list[int]] = []
    original = engine.read
    monkeypatch.setattr(engine, "read", lambda tokens: (read.extend(tokens), original(tokens))[1])
    limit(engine, 8, monkeypatch)
    requests = requests_of()
    engine.generate(requests)
    tokens = [engine.tokenizer(prompt.text)["input_ids"] for prompt in {request.prompt for request in requests}]
    assert sorted(read) == sorted(ids[:-1] for ids in tokens if len(ids) > 1)
    assert len(tokens) > len(read)  # one has a single token: its first step reads it


def test_rows_keep_to_the_memory_planned(
    engine: LocalEngine, plain: StaticRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of what a batch may have; not one row: the loop looks what can be done."""
    row = 256 * engine.bytes_per_token + engine.logit_bytes
    for planned, rows in ((2 * row - 1, 0), (2 * row, 1), (2 * 7 * row, 4)):
        monkeypatch.setattr(engine, "batch_bytes", planned)
        assert plain.begin(60, 256) == rows
    assert plain.begin(3, 256) == 4
    assert plain.begin(1, 257) == 1
    assert (plain.cache.rows, plain.cache.room) == (1, 512)
    monkeypatch.setattr(engine, "batch_bytes", 2 * 2 * 8 * row)
    assert plain.begin(5, 100) == 8
    assert (plain.cache.rows, plain.cache.room) == (8, 512)  # the calls before may come again
    monkeypatch.setattr(engine, "batch_bytes", 2 * 3 * row)
    assert plain.begin(1, 513) == 1
    assert (plain.cache.rows, plain.cache.room) == (1, 768)
    held = sum(buffer.nbytes for pair in plain.cache.buffers for buffer in pair)
    assert held == 768 * engine.bytes_per_token


def test_what_attention_sees_grows_in_few_sizes() -> None:
    sizes = [static.seen_of(length) for length in range(1, 40_000)]
    assert all(length <= size <= max(256, 1.25 * length + 256) for length, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 30
