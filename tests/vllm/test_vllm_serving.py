"""The running batch over vLLM against the local engine's, on the same float32 weights, and `rheostat serve` with it."""

import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vllm import CONTEXT, SPACE, TEXTS, make_adapter, save_model

from rheostat.adapters.autodeco import AutoDeco, AutoDecoConfig, AutoDecoding
from rheostat.adapters.sequence import SequenceAdapter
from rheostat.adapters.token import AdaptiveDecoding
from rheostat.decoding.policy import Decision, FixedStrategies, StepState, TokenPolicy
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import Pooling
from rheostat.engines.jobs import Batch, Failed, Job, PromptState, Written
from rheostat.engines.local import LocalEngine
from rheostat.errors import AdapterError
from rheostat.types import Completion, FinishReason, Prompt

LONG = "Solve the problem. Think step by step and write. " * 4  # several of vLLM's blocks
STRATEGIES = (
    Strategy(1.0),
    Strategy(0),
    Strategy(1.25, 10, 0.9),
    Strategy(0.75, None, 0.95, 0.1),
    Strategy(1.5, top_n_sigma=2.0),  # vLLM itself has no such truncation
    Strategy(0.005),  # and raises this one to 0.01
)

Key = tuple[int, int]  # of a sample: which job, and which sample of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalEngine:
    return LocalEngine(folder, "tiny", torch.float32, "cpu")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Any:
    from rheostat.engines.vllm import VllmEngine

    return VllmEngine(folder, "tiny", torch.float32)


@pytest.fixture
def vllm(engine: Any) -> Iterator[Any]:
    """vLLM itself; a test leaves nothing in it."""
    yield engine.llm.llm_engine
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert not engine.llm.llm_engine.engine_core.engine_core.scheduler.requests


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("adapters")
    made: dict[str, Any] = {
        "token": make_adapter(root / "token", folder),
        "last": make_adapter(root / "last", folder, "sequence", spread=0.3),
        "mean": make_adapter(root / "mean", folder, "sequence", pooling="mean", spread=0.3),
        "autodeco": AutoDeco(AutoDecoConfig(64, 16)),
    }
    for layer in (made["autodeco"].temperature_output, made["autodeco"].top_p_output):
        torch.nn.init.normal_(layer.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    return made


@dataclass
class Seen:
    """What a batch said of its jobs, which are known by their numbers."""

    events: dict[Key, list[Written]] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)

    def completion(self, key: Key) -> Completion | None:
        return self.events[key][-1].completion if key in self.events else None


def run(batch: Batch, jobs: Sequence[Job], at: Callable[[int], None] = lambda step: None) -> Seen:
    """Until the batch is empty; ``at`` is called before every step, and may add jobs for the first 40."""
    seen, number = Seen(), {job: index for index, job in enumerate(jobs)}
    step = 0
    while batch.running or batch.waiting or step < 40:
        at(step)
        step += 1
        assert step < 3000
        for event in batch.step():
            if isinstance(event, Failed):
                seen.failed.append(number[event.job])
                continue
            key = (number[event.job], event.sample)
            assert seen.completion(key) is None
            seen.events.setdefault(key, []).append(event)
            if event.completion is not None:
                assert event.completion.token_ids == tuple(e.token_id for e in seen.events[key])
    return seen


def all_at_once(batch: Batch, jobs: Sequence[Job]) -> Seen:
    for job in jobs:
        batch.add(job)
    return run(batch, jobs)


def kinds(adapters: dict[str, Any]) -> list[tuple[TokenPolicy | None, str | None]]:
    """Token policies, and the names of sequence-level adapters."""
    policies: list[TokenPolicy] = [
        AdaptiveDecoding(adapters["token"]),
        AdaptiveDecoding(adapters["token"], commit=True),
        AutoDecoding(adapters["autodeco"]),
    ]
    return [(None, None), *((policy, None) for policy in policies), (None, "last"), (None, "mean")]


def jobs_of(engine: LocalEngine, adapters: dict[str, Any], seed: int, count: int) -> list[Job]:
    """Jobs of every kind; two calls give equal ones."""
    draw, found = random.Random(seed), kinds(adapters)
    jobs = []
    for number in range(count):
        policy, name = found[number % len(found)]
        prompt = Prompt(f"p{number}", draw.choice([*TEXTS, LONG]), draw.choice([(), ("e",), ("a ", "é")]))
        job = Job(
            prompt,
            engine.encode(prompt.text),
            samples=draw.choice((1, 2, 5)),
            seed=draw.randrange(9),
            max_tokens=draw.choice((1, 3, 20, 30)),
            parallel_budget=draw.choice((1, 4)),
            order=draw.choice(list(Order)) if policy is None and name is None else Order.VLLM,
            policy=policy,
            strategy=draw.choice(STRATEGIES) if policy is None and name is None else None,
            details=True,
            top=3,
        )
        if name is not None:
            job.choose = chooser(adapters[name], name, job.parallel_budget)
        jobs.append(job)
    return jobs


def chooser(adapter: SequenceAdapter, pooling: str, budget: int) -> Callable[[PromptState], Strategy]:
    def choose(state: PromptState) -> Strategy:
        read_H = state.last_H if pooling == "last" else state.mean_H
        return SPACE.strategies[int(adapter.choose(read_H[None], torch.tensor([budget])))]

    return choose


def assert_same(ours: Seen, theirs: Seen) -> int:
    """Token for token, with all that is said about each; returns how many. Rounding may decide one draw in a run.

    Adapters read hidden states rounded to bfloat16: where two engines' last bits lie on either side of a rounding, what
    an adapter gives moves by more than these bits.
    """
    assert ours.events.keys() == theirs.events.keys()
    other = [key for key in ours.events if ours.completion(key) != theirs.completion(key)]
    assert len(other) <= 1, other
    moved: list[float] = []
    for key, events in ours.events.items():
        if key in other:
            continue
        for a, b in zip(events, theirs.events[key], strict=True):
            assert a.token_id == b.token_id
            assert a.details is not None
            assert b.details is not None
            assert (a.details.action, a.details.remaining) == (b.details.action, b.details.remaining)
            for name in ("entropy", "p_max"):
                assert getattr(a.details, name) == pytest.approx(getattr(b.details, name), abs=1e-4), name
            assert (a.details.pi is None) == (b.details.pi is None)
            read = [(x.temperature, x.top_p, *(x.pi or ())) for x in (a.details, b.details)]
            moved.append(max(abs(x - y) for x, y in zip(*read, strict=True)))
            assert a.log_probabilities is not None
            assert b.log_probabilities is not None
            assert a.log_probabilities.own == pytest.approx(b.log_probabilities.own, abs=1e-4)
            tops = zip(a.log_probabilities.top, b.log_probabilities.top, strict=True)
            assert all(x[1] == pytest.approx(y[1], abs=1e-4) for x, y in tops)
    assert max(moved) < 0.01
    assert sum(move > 1e-4 for move in moved) < 0.02 * len(moved)
    return len(moved)


# --- the same as the local engine's batch ----------------------------------------------------------------------


def test_it_serves_what_the_local_engine_serves(engine: Any, local: LocalEngine) -> None:
    assert engine.vocabulary.texts == local.vocabulary.texts
    assert engine.vocabulary.eos_ids == local.vocabulary.eos_ids
    for text in TEXTS:
        assert engine.encode(text) == local.encode(text)
        assert engine.vocabulary.decode(engine.encode(text)) == local.vocabulary.decode(local.encode(text))


@pytest.mark.parametrize("rows", [3, 64])
def test_the_same_jobs_give_the_same_tokens(
    engine: Any, vllm: Any, local: LocalEngine, adapters: dict[str, Any], rows: int
) -> None:
    ours, theirs = (jobs_of(local, adapters, rows, 30) for _ in range(2))
    tokens = assert_same(all_at_once(engine.open_batch(rows), ours), all_at_once(local.open_batch(rows), theirs))
    assert tokens > 500
    assert [job.strategy for job in ours] == [job.strategy for job in theirs]
    assert len({job.strategy for job in ours if job.choose is not None}) > 1


@pytest.mark.parametrize("seed", range(3))
def test_joining_leaving_and_being_set_back_change_nobodys_tokens(
    engine: Any, vllm: Any, local: LocalEngine, adapters: dict[str, Any], seed: int
) -> None:
    """Jobs come and go at random steps; at some, vLLM drops all it knows of the running rows and starts them anew."""
    draw = random.Random(seed)
    jobs = jobs_of(local, adapters, seed, 24)
    arrival = {number: draw.randrange(40) for number in range(24)}
    gone = {number: arrival[number] + draw.randrange(6) for number in draw.sample(range(24), 6)}
    set_back = set(draw.sample(range(60), 6))
    batch = engine.open_batch(draw.choice((4, 16)))

    def at(step: int) -> None:
        if step in set_back:
            assert vllm.reset_prefix_cache(reset_running_requests=True)
        for number, job in enumerate(jobs):
            if arrival[number] == step:
                batch.add(job)
            job.cancelled |= gone.get(number) == step

    ours = run(batch, jobs, at)
    theirs = all_at_once(local.open_batch(64), jobs_of(local, adapters, seed, 24))
    stayed = [key for key in theirs.events if key[0] not in gone]
    assert all(ours.completion(key) is not None for key in stayed)
    ours.events, theirs.events = ({key: seen.events[key] for key in stayed} for seen in (ours, theirs))
    assert assert_same(ours, theirs) > 100


def test_the_choice_reads_what_embed_gives(engine: Any, vllm: Any) -> None:
    """Whatever vLLM has in its cache, and beside other rows."""
    seen: dict[str, PromptState] = {}

    def choose(text: str) -> Callable[[PromptState], Strategy]:
        def keep(state: PromptState) -> Strategy:
            assert text not in seen  # once per job
            seen[text] = state
            return Strategy(0)

        return keep

    texts = [*TEXTS, LONG, LONG + "!", "a" * 70]
    other = Job(Prompt("other", LONG), engine.encode(LONG), 3, 0, 20, strategy=Strategy(1.0))
    jobs = [Job(Prompt(text, text), engine.encode(text), 3, 0, 2, choose=choose(text)) for text in texts]
    all_at_once(engine.open_batch(32), [other, *jobs])
    for text in texts:
        prompt = Prompt("p", text)
        last, mean = engine.embed([prompt]), engine.embed([prompt], Pooling.MEAN)
        torch.testing.assert_close(seen[text].last_H, last[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[text].mean_H, mean[0], rtol=1e-4, atol=1e-4)


# --- ends ------------------------------------------------------------------------------------------------------


def test_ends_by_stop_strings_budgets_and_the_context(engine: Any, vllm: Any, local: LocalEngine) -> None:
    ids = local.encode(TEXTS[0])
    prompts = [Prompt("s", TEXTS[0], ("e", "a ", "é")), Prompt("n", TEXTS[0])]

    def jobs() -> list[Job]:
        hot = Strategy(1.5)
        short = [Job(prompt, ids, 20, 5, 30, strategy=hot, details=True, top=1) for prompt in prompts]
        return [*short, Job(prompts[1], ids, 8, 6, CONTEXT - len(ids), strategy=hot, details=True, top=1)]

    ours, theirs = all_at_once(engine.open_batch(64), jobs()), all_at_once(local.open_batch(64), jobs())
    assert_same(ours, theirs)
    done = [ours.completion(key) for key in ours.events]
    assert {c.finish_reason for c in done if c is not None} == set(FinishReason)
    eos = [c for key in ours.events if key[0] and (c := ours.completion(key)) and c.finish_reason is FinishReason.STOP]
    assert all(c.token_ids[-1] in local.vocabulary.eos_ids for c in eos)
    assert eos
    assert max(len(c.token_ids) for c in done if c is not None) == CONTEXT - len(ids)


def test_a_cancelled_job_leaves_vllm_at_the_next_step(engine: Any, vllm: Any) -> None:
    ids = engine.encode(LONG)
    jobs = [Job(Prompt(f"p{n}", LONG), ids, 3, n, 100, strategy=Strategy(1.0)) for n in range(3)]
    batch = engine.open_batch(7)
    for job in jobs:
        batch.add(job)
    for _ in range(3):
        batch.step()
    assert (batch.running, batch.waiting) == (7, 2)
    jobs[0].cancelled = jobs[2].cancelled = True
    events = batch.step()
    assert {event.job for event in events} <= {jobs[1]}
    assert (batch.running, batch.waiting) == (3, 0)
    assert vllm.get_num_unfinished_requests() == 3
    batch.clear()
    assert (batch.running, batch.waiting) == (0, 0)


# --- failures --------------------------------------------------------------------------------------------------


class Broken:
    """Fails at its fourth token."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def decide(self, state: StepState) -> Decision:
        if int(state.t_S.max()) == 3:
            raise self.error
        return FixedStrategies([Strategy(0)] * 64).decide(state)


def test_what_fails_fails_its_own_jobs_only(engine: Any, vllm: Any, local: LocalEngine) -> None:
    def refuse(state: PromptState) -> Strategy:
        raise AdapterError("damaged")

    ids, prompt = engine.encode(TEXTS[0]), Prompt("g", TEXTS[0])
    good = Job(prompt, ids, 4, 0, 30, strategy=Strategy(1.0), details=True, top=1)
    bad = [
        Job(prompt, ids, 9, 0, 12, policy=Broken(AdapterError("damaged"))),
        Job(prompt, ids, 2, 0, 12, choose=refuse),
    ]
    seen = all_at_once(engine.open_batch(10), [good, *bad])  # three samples of the first bad one are waiting
    assert seen.failed == [1, 2]
    assert {key: len(events) for key, events in seen.events.items() if key[0]} == {(1, n): 3 for n in range(6)}
    ours = Seen({key: events for key, events in seen.events.items() if not key[0]})
    assert_same(ours, all_at_once(local.open_batch(4), [replace(good)]))


def test_a_step_that_breaks_can_be_cleared_away(engine: Any, vllm: Any) -> None:
    ids, prompt = engine.encode(TEXTS[0]), Prompt("g", TEXTS[0])
    good = Job(prompt, ids, 4, 0, 8, strategy=Strategy(1.0))
    batch = engine.open_batch(8)
    expected = all_at_once(batch, [replace(good)])
    batch.add(replace(good))
    batch.add(Job(prompt, ids, 2, 0, 8, policy=Broken(ZeroDivisionError("a bug"))))
    for _ in range(3):
        batch.step()
    with pytest.raises(ZeroDivisionError):
        batch.step()
    batch.clear()
    assert not vllm.has_unfinished_requests()
    again = all_at_once(batch, [replace(good)])
    assert [again.completion(key) for key in again.events] == [expected.completion(key) for key in expected.events]


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a chat template, and a token-level adapter for it."""
    root = tmp_path_factory.mktemp("chatty")
    model = save_model(root / "model", "llama")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (model / "chat_template.jinja").write_text(template)
    make_adapter(root / "token" / "adapter", model)
    return model, root / "token" / "adapter"


@dataclass
class Served:
    process: subprocess.Popen[str]
    client: Any


@pytest.fixture(scope="module")
def served(chatty: tuple[Path, Path]) -> Iterator[Served]:
    openai = pytest.importorskip("openai")
    model, adapter = chatty
    main = "import sys; from rheostat.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--model", str(model), "--engine", "vllm", "--adapter", str(adapter), "--port", "0"]
    process = subprocess.Popen([sys.executable, "-c", main, "serve", *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        said = next((line for line in lines if line.startswith("serving ")), None)
        assert said is not None, f"exit code {process.wait()}"
        url = said.split()[-1]
        yield Served(process, openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.timeout(300)
def test_the_server_answers_as_the_local_engine_would(served: Served, chatty: tuple[Path, Path]) -> None:
    from rheostat.engines.base import Request
    from rheostat.seeding import derive_seed

    client, local = served.client, LocalEngine(chatty[0])
    assert sorted(model.id for model in client.models.list()) == ["model", "model:token"]
    messages: Any = [{"role": "user", "content": "Once upon"}]
    text = local.chat_text(messages)
    prompt = Prompt(f"prompt-{derive_seed(text):016x}", text)
    fields: dict[str, Any] = {"messages": messages, "n": 4, "max_tokens": 20, "seed": 3}

    plain = client.chat.completions.create(model="model", **fields)
    assert len(plain.choices) == 4
    assert all(choice.message.content for choice in plain.choices)
    wanted = local.generate([Request(prompt, Strategy(), sample, 3, 20) for sample in range(4)])
    if local.info.dtype == "float32":  # in bfloat16 two engines soon part
        assert sum(c.message.content == w.text for c, w in zip(plain.choices, wanted, strict=True)) >= 3

    adapted = client.chat.completions.create(model="model:token", **fields, extra_body={"rheostat": {"trace": True}})
    assert adapted.rheostat["level"] == "token"
    traces = [choice.rheostat["trace"] for choice in adapted.choices]
    assert sum(len(trace) for trace in traces) == adapted.usage.completion_tokens
    assert {step["action"] for trace in traces for step in trace} > {0}

    streamed: dict[int, str] = {}
    for chunk in client.chat.completions.create(model="model:token", **fields, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert sum(streamed[c.index] == c.message.content for c in adapted.choices) >= 3


@pytest.mark.timeout(120)
def test_a_client_that_goes_away_and_the_end(served: Served) -> None:
    """Last: the server is gone afterwards."""
    stream = served.client.completions.create(model="model", prompt=TEXTS[0], max_tokens=200, n=8, stream=True)
    next(iter(stream))
    stream.close()
    health = str(served.client.base_url).removesuffix("/v1/") + "/health"
    for _ in range(100):
        text = urllib.request.urlopen(health).read().decode()
        if '"running":0' in text:
            break
        time.sleep(0.05)
    else:
        pytest.fail(text)
    os.kill(served.process.pid, signal.SIGTERM)
    assert served.process.wait(60) == 0
