"""Workers on a real Ray: the same rollouts as one process, whoever dies on the way."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rheostat.baselines.turn import TokenEntropy
from rheostat.baselines.uniform import UniformMixture
from rheostat.decoding.spaces import TABLE_13, TABLE_14
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import Engine, Request
from rheostat.engines.fake import FakeEngine
from rheostat.errors import ConfigError, ModelError, RheostatError
from rheostat.rollouts.collect import collect
from rheostat.rollouts.store import Rollout, RolloutStore
from rheostat.rollouts.sweep import sweep
from rheostat.tasks.base import Split
from rheostat.tasks.choose import TaskChoice, make_task
from rheostat.types import Prompt

distributed = pytest.importorskip("rheostat.training.distributed")
crew = pytest.importorskip("crew")

GCD = TaskChoice("gcd")
Open = Callable[..., Any]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Makes Ray engines; they end with the test."""
    made: list[Any] = []

    def make(open_engine: Callable[[], Engine] = FakeEngine, choice: TaskChoice = GCD, workers: int = 2) -> Any:
        made.append(distributed.RayEngine(open_engine, choice, workers))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def requests_of(choice: TaskChoice, problems: int = 24) -> tuple[Any, list[Any], list[Request]]:
    task = make_task(choice)
    asked = task.problems(Split.TRAIN, problems)
    strategies = (Strategy(0.5), Strategy(1.0, top_k=3), Strategy(0))
    prompts = [task.prompt(problem) for problem in asked]
    requests = [Request(prompt, s, n, 3, task.max_tokens) for prompt in prompts for s in strategies for n in range(3)]
    return task, asked, requests


def collected(engine: Engine, folder: Path, choice: TaskChoice = GCD) -> list[tuple[Any, ...]]:
    """What 36 batches and more leave in a store, without what names the process; every key once."""
    task, asked, requests = requests_of(choice)
    with RolloutStore(folder) as store:
        rollouts = collect(engine, task, asked, requests, store, batch_size=12)
        [stored] = store.query("SELECT count(*), count(DISTINCT key) FROM rollouts").fetchall()
    assert stored == (len({rollout.key for rollout in rollouts}),) * 2
    return [told(rollout) for rollout in rollouts]


def told(rollout: Rollout) -> tuple[Any, ...]:
    r = rollout
    return r.problem_id, r.strategy, r.sample, r.text, r.tokens, r.finish_reason, r.correct, r.answer


def test_two_workers_write_what_one_process_writes(opened: Open, tmp_path: Path) -> None:
    engine = opened()
    assert collected(engine, tmp_path / "two") == collected(FakeEngine(), tmp_path / "one")
    assert engine.info.fingerprint == FakeEngine().info.fingerprint
    task, asked, _ = requests_of(GCD)
    prompts = [task.prompt(problem) for problem in asked[:5]]
    assert torch.equal(engine.embed(prompts), FakeEngine().embed(prompts))
    assert engine.embed([]).shape == (0, FakeEngine().info.hidden_size)
    assert engine.pieces([1, 2]) == FakeEngine().pieces([1, 2])
    # a token policy travels, and an observer there and back
    requests = [Request(prompt, None, n, 3, 6) for prompt in prompts for n in range(2)]
    seen, expected = TokenEntropy(), TokenEntropy()
    policy = UniformMixture(TABLE_14)
    ours = engine.generate(requests, policy, Order.VLLM, seen)
    assert ours == FakeEngine().generate(requests, policy, Order.VLLM, expected)
    assert np.allclose(seen.mean_N(len(requests)), expected.mean_N(len(requests)))


def test_engines_that_differ_are_refused(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"different engines, whose dtype is bfloat16 or float32: give all of them"):
        opened(partial(crew.another_dtype, tmp_path))


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_worker_that_ends_is_replaced_and_nothing_is_lost(
    end: str, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if end == "stop":
        monkeypatch.setattr(distributed.workers, "_SILENCE", 8.0)
        monkeypatch.setattr(distributed.workers, "_HEARTBEAT", 0.5)
    engine = opened(partial(crew.Unlucky, tmp_path, end))
    assert collected(engine, tmp_path / "store") == collected(FakeEngine(), tmp_path / "one")
    calls = len(list(tmp_path.glob("call-*")))
    batches = len(list((tmp_path / "one").glob("*.parquet")))
    assert calls == batches + 1  # what the worker had is done again, nothing else
    assert capsys.readouterr().out == ""  # where results belong, and not what Ray says about processes


def test_whoever_was_not_asked_is_not_silent(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + away)
    monkeypatch.setattr(distributed.workers, "time", clock)
    (tmp_path / "mark").touch()
    engine = opened(partial(crew.Unlucky, tmp_path, "kill"))
    for round_ in range(4):
        collected(engine, tmp_path / f"store-{round_}")
        away += 1000  # the driver has something else to do, as an update
        time.sleep(0.5)
    assert len({call.name.rsplit("-")[-1] for call in tmp_path.glob("call-*")}) == 2  # processes


def test_a_batch_that_ends_every_worker_is_named(opened: Open, tmp_path: Path) -> None:
    engine = opened(partial(crew.Unlucky, tmp_path, "always"), workers=1)
    with pytest.raises(RheostatError, match=r"a batch of 7 requests ended 3 processes"):
        collected(engine, tmp_path / "store")


def test_a_judge_that_dies_is_replaced(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, pathlib, signal\n"
        "from rheostat.tasks.procedural import procedural_task\n"
        "class Own:\n"
        "    def __init__(self): self.own = procedural_task('gcd'); self.name = 'gcd'; self.max_tokens = 12\n"
        "    def problems(self, *a): return self.own.problems(*a)\n"
        "    def prompt(self, p, epoch=0): return self.own.prompt(p)\n"
        "    def verify(self, p, c):\n"
        f"        mark = pathlib.Path({str(tmp_path / 'mark')!r})\n"
        "        if not mark.exists() and 'raylet' in open(f'/proc/{os.getppid()}/cmdline').read():\n"
        "            mark.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return self.own.verify(p, c)\n"
    )
    choice = TaskChoice(f"{tmp_path / 'own.py'}:Own")
    assert collected(opened(choice=choice), tmp_path / "two", choice) == collected(FakeEngine(), tmp_path / "one")
    assert (tmp_path / "mark").exists()


def test_what_an_engine_says_arrives_as_it_was(opened: Open) -> None:
    with pytest.raises(ModelError, match=r"^there is no model on this node: pull it there$"):
        opened(crew.missing_model)
    engine = opened()
    with pytest.raises(ModelError, match="context"):
        engine.generate([Request(Prompt("p", "x" * 100_000), Strategy(1.0), 0, 0, 4)])


def test_sweeps_run_on_it(opened: Open, tmp_path: Path) -> None:
    task = make_task(GCD)
    problems = task.problems(Split.VALIDATION, 8)
    found = []
    for name, engine in (("two", opened()), ("one", FakeEngine())):
        with RolloutStore(tmp_path / name) as store:
            found.append(sweep(engine, task, problems, TABLE_13, 4, 0, store))
    assert np.array_equal(found[0].rewards_PAS, found[1].rewards_PAS)
    assert np.array_equal(found[0].length_PAS, found[1].length_PAS)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:1", "127.0.0.1:1", "nowhere"])
def test_nobody_at_the_address(address: str) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match=f"^--address {address}: "):
        distributed.RayEngine(FakeEngine, GCD, 2, address)
    assert time.monotonic() - start < 20


def test_a_cluster_that_is_too_small_says_what_it_has(tmp_path: Path) -> None:
    code = "import ray, time; ray.init(num_cpus=2, include_dashboard=False); print('up', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as cluster:
        try:
            assert cluster.stdout is not None
            while b"up" not in cluster.stdout.readline():
                pass
            with pytest.raises(ConfigError, match=r"--workers 5: the cluster has 2 processors"):
                distributed.RayEngine(FakeEngine, GCD, 5, "auto")
            with distributed.RayEngine(FakeEngine, GCD, 2, "auto") as engine:
                assert len(collected(engine, tmp_path / "store")) == 24 * 9
        finally:
            cluster.terminate()


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.cluster, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'rheostat\[ray\]'"):
        distributed.RayEngine(FakeEngine, GCD, 2)
