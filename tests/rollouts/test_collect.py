import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rheostat.baselines.uniform import UniformMixture
from rheostat.decoding.policy import Decision, StepObserver, StepState, TokenPolicy
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.engines.base import EngineInfo, Pooling, Request
from rheostat.errors import ConfigError, RheostatError, StoreError
from rheostat.rollouts.collect import Answer, Call, collect, judge_all, rollout_key
from rheostat.rollouts.store import Rollout, RolloutStore
from rheostat.tasks.base import Split
from rheostat.types import Completion, FinishReason, Problem, Prompt, Verdict

INFO = EngineInfo("tiny", "tiny/model", "f1", 8, 128, "float32", "cpu", 2)
WARM, GREEDY = Strategy(temperature=0.7), Strategy(temperature=0)


class TinyEngine:
    """Writes a number drawn from the request's own stream, and logs each call's requests as one line of a file."""

    info = INFO

    def __init__(self, log: Path) -> None:
        self.log = log
        log.touch()

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling = Pooling.LAST) -> torch.Tensor:
        raise NotImplementedError

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        assert (policy is None) == (requests[0].strategy is not None)
        with self.log.open("a") as file:
            names = [f"{request.prompt.problem_id}/{request.strategy}/{request.sample}" for request in requests]
            file.write(" ".join(names) + "\n")
        completions = []
        for request in requests:
            number = request.stream % 10
            length = 1 + request.stream % 3
            reason = FinishReason.LENGTH if length == 3 else FinishReason.STOP
            completions.append(Completion(f"{number} {order}", tuple(range(length)), reason))
        return completions

    @property
    def calls(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()]


class TinyTask:
    """An answer is right when its number is even; problems named in ``broken`` break the verifier."""

    name = "tiny"
    max_tokens = 4

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.broken = set(broken)

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        return [
            Problem(f"{split}-{index}", self.name, "ab"[index // 8 % 2], f"question {index}", "even")
            for index in range(start, start + count)
        ]

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        return Prompt(problem.id, f"Q: {problem.question}\nA:", ("\n",))

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        if problem.id in self.broken:
            raise OSError(f"no worker for {problem.id}\ud800")
        return Verdict(int(completion.text[0]) % 2 == 0, f"read {completion.text[0]}", completion.text[0])


def problems_and_requests(
    count: int = 20, samples: int = 3, strategies: Sequence[Strategy] = (WARM,), seed: int = 7
) -> tuple[list[Problem], list[Request]]:
    task = TinyTask()
    problems = task.problems(Split.TRAIN, count)
    return problems, [
        Request(task.prompt(problem), strategy, sample, seed, task.max_tokens)
        for problem in problems
        for strategy in strategies
        for sample in range(samples)
    ]


def table(folder: Path) -> list[Rollout]:
    with RolloutStore(folder) as store:
        return sorted(
            store.get(row[0] for row in store.query("SELECT key FROM rollouts").fetchall()), key=lambda r: r.key
        )


@pytest.fixture
def engine(tmp_path: Path) -> TinyEngine:
    return TinyEngine(tmp_path / "calls")


def test_rollouts_say_what_was_asked_and_judged_in_the_order_of_the_requests(
    tmp_path: Path, engine: TinyEngine
) -> None:
    problems, requests = problems_and_requests(strategies=(WARM, Strategy(top_k=5)))
    random.Random(3).shuffle(requests)
    reports = []
    with RolloutStore(tmp_path / "s") as store:
        rollouts = collect(
            engine, TinyTask(), problems, requests, store, Order.TRANSFORMERS, lambda *n: reports.append(n), 12
        )
        assert store.get([rollout.key for rollout in rollouts]) == rollouts
    members = {problem.id: problem.member for problem in problems}
    for request, rollout in zip(requests, rollouts, strict=True):
        number, length = request.stream % 10, 1 + request.stream % 3
        assert rollout == Rollout(
            key=rollout_key(INFO, Order.TRANSFORMERS, request),
            problem_id=request.prompt.problem_id,
            task="tiny",
            member=members[request.prompt.problem_id],
            strategy=str(request.strategy),
            order="transformers",
            sample=request.sample,
            seed=7,
            max_tokens=4,
            text=f"{number} transformers",
            tokens=length,
            finish_reason=FinishReason.LENGTH if length == 3 else FinishReason.STOP,
            correct=number % 2 == 0,
            detail=f"read {number}",
            answer=str(number),
            batch=rollout.batch,
        )
    assert len({rollout.batch for rollout in rollouts}) == len(engine.calls) == len(reports)
    assert [total for _, total, _ in reports] == [120] * len(reports)
    assert [done for done, _, _ in reports] == sorted({done for done, _, _ in reports})
    assert reports[-1] == (120, 120, sum(rollout.tokens for rollout in rollouts))


def test_batches_keep_prompts_whole_and_end_where_the_member_changes(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests(count=20, samples=3)  # members: a × 8, b × 8, a × 4
    requests.sort(key=lambda request: request.sample)  # the samples of a prompt arrive apart
    with RolloutStore(tmp_path / "s") as store:
        collect(engine, TinyTask(), problems, requests, store, batch_size=10)
        assert [len(call) for call in engine.calls] == [9, 9, 6, 9, 9, 6, 9, 3]
        assert engine.calls[0] == [f"train-{index}/T=0.7/{sample}" for index in range(3) for sample in range(3)]
    with RolloutStore(tmp_path / "t") as store:
        collect(engine, TinyTask(), problems, requests, store, batch_size=2)
        assert [len(call) for call in engine.calls[8:]] == [3] * 20
        with pytest.raises(ConfigError, match="batch_size must be at least 1"):
            collect(engine, TinyTask(), problems, requests, store, batch_size=0)


def test_stored_rollouts_are_reused_and_reported(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests()
    with RolloutStore(tmp_path / "s") as store:
        first = collect(engine, TinyTask(), problems, requests, store, batch_size=10)
    calls = len(engine.calls)
    reports = []
    with RolloutStore(tmp_path / "s") as store:
        again = collect(
            engine, TinyTask(), problems, requests, store, progress=lambda *n: reports.append(n), batch_size=10
        )
    assert again == first
    assert len(engine.calls) == calls
    assert reports[-1] == (60, 60, 0)
    assert len(reports) == calls


def test_what_is_stored_does_not_change_the_composition(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests(count=8)
    with RolloutStore(tmp_path / "s") as store:
        collect(engine, TinyTask(), problems, requests, store, batch_size=9)
    undisturbed = engine.calls
    engine.log.write_text("")
    with RolloutStore(tmp_path / "t") as store:
        collect(engine, TinyTask(), problems, requests[:1] + requests[12:15], store, batch_size=9)
        engine.log.write_text("")
        collect(engine, TinyTask(), problems, requests, store, batch_size=9)
    # One sample of the first prompt and all of the fifth are there: their batches lack these and gain nothing instead.
    assert engine.calls == [undisturbed[0][1:], undisturbed[1][:3] + undisturbed[1][6:], undisturbed[2]]
    assert len(table(tmp_path / "t")) == 24


def test_greedy_is_generated_once(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests(count=4, samples=5, strategies=(GREEDY, WARM))
    reports = []
    with RolloutStore(tmp_path / "s") as store:
        rollouts = collect(engine, TinyTask(), problems, requests, store, progress=lambda *n: reports.append(n))
        assert len(store) == 4 * (1 + 5)
        late = [request for request in requests if request.strategy.is_greedy and request.sample == 4]
        assert collect(engine, TinyTask(), problems, late, store) == rollouts[4::10]
    assert [name for name in engine.calls[0] if "greedy" in name] == [f"train-{index}/greedy/0" for index in range(4)]
    assert len(engine.calls) == 1
    for start in range(0, 40, 10):
        assert rollouts[start : start + 5] == [rollouts[start]] * 5
        assert rollouts[start].sample == 0
        assert [rollout.sample for rollout in rollouts[start + 5 : start + 10]] == [0, 1, 2, 3, 4]
    assert reports == [(40, 40, sum({rollout.key: rollout.tokens for rollout in rollouts}.values()))]


def test_a_request_that_stands_twice_is_generated_once(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests(count=2)
    with RolloutStore(tmp_path / "s") as store:
        rollouts = collect(engine, TinyTask(), problems, requests + requests, store)
        assert rollouts[:6] == rollouts[6:]
        assert len(store) == 6


def test_the_key_changes_with_everything_that_shapes_a_completion_and_with_nothing_else() -> None:
    request = Request(Prompt("p", "text", ("stop",)), WARM, 1, 2, 3)
    others = [
        (replace(INFO, **{name: value}), Order.VLLM, request)
        for name, value in (("fingerprint", "f2"), ("kind", "k"), ("dtype", "d"), ("device", "c"), ("threads", 1))
    ]
    others.append((replace(INFO, kernels="compiled"), Order.VLLM, request))
    others.append((INFO, Order.TRANSFORMERS, request))
    prompts = [
        Prompt("q", "text", ("stop",)),
        Prompt("p", "t", ("stop",)),
        Prompt("p", "text"),
        Prompt("p", "text", ("s",)),
    ]
    strategies = [GREEDY, replace(WARM, top_k=1), replace(WARM, top_p=0.5), replace(WARM, min_p=0.5)]
    strategies.append(Strategy(temperature=0.7000001))  # the same text, another number
    requests = [replace(request, prompt=prompt) for prompt in prompts]
    requests += [replace(request, strategy=strategy) for strategy in strategies]
    requests += [replace(request, **{name: 9}) for name in ("sample", "seed", "max_tokens")]
    others += [(INFO, Order.VLLM, other) for other in requests]
    keys = {rollout_key(*other) for other in others} | {rollout_key(INFO, Order.VLLM, request)}
    assert len(keys) == len(others) + 1
    assert all(len(key) == 32 for key in keys)
    renamed = replace(INFO, model="another/name", hidden_size=9, context_length=9)
    assert rollout_key(renamed, Order.VLLM, request) == rollout_key(INFO, Order.VLLM, request)
    # Keys outlive processes and releases: this one is written down.
    assert rollout_key(INFO, Order.VLLM, request) == "7cff4cb408052846079f6f2c8ff8d5c7"


def test_a_verifier_that_fails_now_and_then_costs_only_the_verdict(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests(count=20, samples=3)
    with RolloutStore(tmp_path / "s") as store:
        rollouts = collect(engine, TinyTask(broken=["train-19"]), problems, requests, store)  # 3 of 60: 5 %
    missing = [rollout for rollout in rollouts if rollout.correct is None]
    assert [(rollout.problem_id, rollout.detail) for rollout in missing] == [
        ("train-19", "OSError: no worker for train-19?")
    ] * 3
    assert {type(rollout.correct) for rollout in rollouts[:57]} == {bool}


def test_more_than_five_percent_without_a_verdict_stop_the_run_and_are_not_stored(
    tmp_path: Path, engine: TinyEngine
) -> None:
    problems, requests = problems_and_requests(count=20, samples=3)
    with RolloutStore(tmp_path / "s") as store:
        with pytest.raises(
            RheostatError, match=r"6 of 60 .* problem train-4: OSError: no worker for train-4.*run again"
        ):
            collect(engine, TinyTask(broken=["train-4", "train-9"]), problems, requests, store, batch_size=3)
        assert len(store) == 9 * 3  # what came before stays, with the three tolerated ones
        rollouts = collect(engine, TinyTask(), problems, requests, store, batch_size=3)
        assert sum(rollout.correct is None for rollout in rollouts) == 3
        with pytest.raises(RheostatError, match=r"3 of 3 .* use another folder"):
            collect(engine, TinyTask(), problems, requests[12:15], store)


def test_requests_and_stores_that_do_not_fit(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests(count=3)
    with RolloutStore(tmp_path / "s") as store:
        with pytest.raises(ConfigError, match="'train-2', which is not among the problems"):
            collect(engine, TinyTask(), problems[:2], requests, store)
        assert collect(engine, TinyTask(), problems, [], store) == []
        collect(engine, TinyTask(), problems, requests, store)
        other = [replace(problem, task="other") for problem in problems]
        with pytest.raises(StoreError, match="judged by the task 'tiny', not 'other'; use another folder"):
            collect(engine, TinyTask(), other, requests, store)


def test_a_damaged_shard_is_sampled_again_and_alone(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests()
    with RolloutStore(tmp_path / "s") as store:
        first = collect(engine, TinyTask(), problems, requests, store, batch_size=10)
    calls = engine.calls
    path = tmp_path / "s" / f"{first[20].batch}.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with RolloutStore(tmp_path / "s") as store:
        assert len(store) < len(first)
        assert collect(engine, TinyTask(), problems, requests, store, batch_size=10) == first
    assert engine.calls[len(calls) :] == [calls[2]]


def test_an_interruption_keeps_what_is_finished(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests()

    def interrupt(done_requests: int, total: int, generated_tokens: int) -> None:
        if done_requests >= 18:
            raise KeyboardInterrupt

    with RolloutStore(tmp_path / "s") as store, pytest.raises(KeyboardInterrupt):
        collect(engine, TinyTask(), problems, requests, store, progress=interrupt, batch_size=10)
    with RolloutStore(tmp_path / "s") as store:
        assert len(store) == 18


KILLED_RUNS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_collect import TinyEngine, TinyTask, problems_and_requests
from rheostat.rollouts.collect import collect
from rheostat.rollouts.store import RolloutStore

folder, log = Path(sys.argv[2]), Path(sys.argv[3])

def reach(place):
    global countdown
    if place == where:
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)

class Engine(TinyEngine):
    def generate(self, requests, policy=None, order="vllm"):
        completions = super().generate(requests, policy, order)
        reach("generated")
        return completions

plain_fsync, calls = os.fsync, 0
def fsync(descriptor):
    global calls
    calls += 1
    if calls % 2 == 1:  # the file's own; the folder's follows the rename
        if where == "half" and countdown == 1:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        reach("half")
        reach("written")
        plain_fsync(descriptor)
    else:
        reach("renamed")
        plain_fsync(descriptor)
os.fsync = fsync

for arm in sys.argv[4:]:  # the imports take seconds, so that one process makes them and forks a run for each arm
    where, countdown = arm.split(":")[0], int(arm.split(":")[1])
    if (run := os.fork()) == 0:
        problems, requests = problems_and_requests()
        with RolloutStore(folder) as store:
            engine, progress = Engine(log), lambda *_: reach("between")
            collect(engine, TinyTask(), problems, requests, store, progress=progress, batch_size=10)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(run, 0)[1])
    print(where, status, len(list(folder.glob(".*.tmp"))), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
@pytest.mark.timeout(300)
def test_a_run_killed_again_and_again_ends_with_the_rows_of_an_undisturbed_one(
    tmp_path: Path, engine: TinyEngine
) -> None:
    problems, requests = problems_and_requests()
    with RolloutStore(tmp_path / "undisturbed") as store:
        collect(engine, TinyTask(), problems, requests, store, batch_size=10)
    folder, log = tmp_path / "killed", tmp_path / "killed-calls"
    places = ["generated", "half", "written", "renamed", "between"]  # the last two come after the batch is stored
    dice = random.Random(0)
    dice.shuffle(places)
    arms = [f"{place}:{dice.choice([1, 2])}" for place in places] + ["never:1"]
    command = [sys.executable, "-c", KILLED_RUNS, str(Path(__file__).parent), str(folder), str(log), *arms]
    done = subprocess.run(command, timeout=240, capture_output=True, text=True)
    lines = [f"{place} {-signal.SIGKILL} {int(place in ('half', 'written'))}" for place in places] + ["never 0 0"]
    assert done.stdout.splitlines() == lines, done.stderr
    assert table(folder) == table(tmp_path / "undisturbed")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "undisturbed").iterdir()
    )
    calls = TinyEngine(log).calls
    assert sorted({tuple(call) for call in calls}) == sorted({tuple(call) for call in engine.calls})
    assert (
        len(calls) == len(engine.calls) + 3
    )  # three kills came before their batch was stored, and cost that one batch


class Named:
    """A policy that is nothing but its name."""

    def __init__(self, key: str) -> None:
        self.key = key

    def decide(self, state: StepState) -> Decision:
        raise NotImplementedError


def test_the_key_of_a_policy_s_rollout_changes_with_the_policy_and_the_parallel_budget() -> None:
    request = Request(Prompt("p", "text", ("stop",)), None, 1, 2, 3, 4)
    own = replace(request, strategy=WARM)
    keys = {
        rollout_key(INFO, Order.VLLM, request, "one"),
        rollout_key(INFO, Order.VLLM, request, "two"),
        rollout_key(INFO, Order.VLLM, replace(request, parallel_budget=5), "one"),
        rollout_key(INFO, Order.VLLM, replace(request, sample=2), "one"),
        rollout_key(INFO, Order.VLLM, own),
    }
    assert len(keys) == 5
    assert rollout_key(INFO, Order.VLLM, request, "one") in keys
    # a strategy of its own looks at no budget
    assert rollout_key(INFO, Order.VLLM, replace(own, parallel_budget=9)) == rollout_key(INFO, Order.VLLM, own)
    with pytest.raises(ConfigError, match="names no strategy"):
        rollout_key(INFO, Order.VLLM, request)


def test_rollouts_under_a_policy_are_stored_as_its_own(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests(count=4)
    requests = [replace(request, strategy=None) for request in requests]
    wide = [replace(request, parallel_budget=8) for request in requests]
    one, two = UniformMixture(ActionSpace((WARM, GREEDY))), Named("two")
    with RolloutStore(tmp_path / "s") as store:
        first = collect(engine, TinyTask(), problems, requests, store, policy=one)
        assert collect(engine, TinyTask(), problems, requests, store, policy=one) == first
        assert len(engine.calls) == 1
        collect(engine, TinyTask(), problems, requests, store, policy=two)
        collect(engine, TinyTask(), problems, wide, store, policy=one)
        assert len(engine.calls) == 3
        assert len(store) == 3 * 12
        assert collect(engine, TinyTask(), problems, requests, store, policy=one) == first
    assert [rollout.key for rollout in first] == [
        rollout_key(INFO, Order.VLLM, request, one.key) for request in requests
    ]
    assert {rollout.strategy for rollout in first} == {"uniform mixture of T=0.7; greedy, B=1"}
    assert {rollout.strategy for rollout in table(tmp_path / "s")} == {
        "uniform mixture of T=0.7; greedy, B=1", "uniform mixture of T=0.7; greedy, B=8", "two, B=1"
    }  # fmt: skip


class Slow(TinyEngine):
    """Takes its time over every call."""

    def generate(self, requests: Sequence[Request], *rest: Any, **named: Any) -> list[Completion]:
        time.sleep(0.03)
        return super().generate(requests, *rest, **named)


class SlowCrew(TinyEngine):
    """Has all batches ready at once, after a time."""

    workers = 4

    def answer(self, calls: Iterable[Call], *_: object) -> Iterator[Answer]:
        answers = []
        for call in calls:
            done = self.generate(call.requests)
            answers.append(Answer(call, done, judge_all(TinyTask(), call.problems, done)))
        time.sleep(0.12)
        yield from answers


@pytest.mark.parametrize("kind", [Slow, SlowCrew])
def test_batches_know_what_they_took(tmp_path: Path, kind: type[TinyEngine]) -> None:
    """Four of them add up to the time on the clock, of a crew as well."""
    problems, requests = problems_and_requests(count=4)
    start = time.perf_counter()
    with RolloutStore(tmp_path / "s") as store:
        keys = [
            own.key for own in collect(kind(tmp_path / "calls"), TinyTask(), problems, requests, store, batch_size=3)
        ]
        took = time.perf_counter() - start
        assert len(list((tmp_path / "s").glob("*.parquet"))) == 4
        known = store.seconds(keys)
        assert known is not None
        assert 0.12 <= known <= took


def test_a_strategy_or_a_policy_and_not_both(tmp_path: Path, engine: TinyEngine) -> None:
    problems, requests = problems_and_requests(count=2)
    nameless = [replace(request, strategy=None) for request in requests]
    with RolloutStore(tmp_path / "s") as store:
        with pytest.raises(ConfigError, match=r"names a strategy, but a token policy picks .* give one of both"):
            collect(engine, TinyTask(), problems, [*nameless, requests[0]], store, policy=Named("one"))
        with pytest.raises(ConfigError, match="names no strategy: give it one, or give the call a token policy"):
            collect(engine, TinyTask(), problems, [*requests, nameless[0]], store)
        assert len(store) == 0
    assert engine.calls == []
