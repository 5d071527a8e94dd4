"""Token-level training on a real Ray: the same adapter as in one process, whoever is killed on the way."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import QUICK, SPACE, TinyTask, adapter_for, problems, run_of, tiny_engine, without_rates
from torch import Tensor

from conftest import HERE, TINY
from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter
from rheostat.decoding.recording import Recorder
from rheostat.errors import ConfigError, RheostatError
from rheostat.tasks.choose import TaskChoice
from rheostat.training.checkpoint import load_checkpoint
from rheostat.training.groups import Groups, collect_groups
from rheostat.training.token import TokenHistory, train_token
from rheostat.training.token_config import TokenTrainingConfig
from rheostat.training.update import Lesson, Update, Updated, update

distributed = pytest.importorskip("rheostat.training.distributed")
crew = pytest.importorskip("crew")

CHOICE = TaskChoice(f"{HERE / 'crew.py'}:MortalTask")
CONFIG = QUICK.model_copy(update={"dropout": 0.0, "learning_rate": 1e-3, "group": 16})


@dataclass(frozen=True)
class Together:
    """Two workers and two trainers, and the folder of their misfortunes."""

    engine: Any
    trainers: Any
    folder: Path


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    folder = tmp_path_factory.mktemp("misfortunes")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{TINY}")
        environment.setenv(crew.MISFORTUNES, str(folder))
        with distributed.RayEngine(crew.Mortal, CHOICE, 2, trainers=2) as engine, distributed.Trainers(2) as trainers:
            yield Together(engine, trainers, folder)


@dataclass(frozen=True)
class Trained:
    """How a run ended: the weights after its last update, which need not be those that were kept."""

    weights: dict[str, Tensor]
    history: TokenHistory


def trained(
    folder: Path,
    config: TokenTrainingConfig,
    adapter: TokenAdapter | None = None,
    misfortune: Path | None = None,
    **other: Any,
) -> Trained:
    """After the second batch, ``misfortune`` comes to be."""
    folder.mkdir(exist_ok=True)
    adapter = adapter or adapter_for(config)
    run = run_of(folder, config, **other)

    def progress(step: int, *_: int) -> None:
        if step == 2 and misfortune is not None:
            misfortune.touch()

    history = train_token(adapter, run, progress)
    state = load_checkpoint(folder / "checkpoint.pt", run.identity(adapter))
    assert state is not None
    return Trained(state["versions"][-1], history)


def stale(staleness: int) -> TokenTrainingConfig:
    return CONFIG.model_copy(update={"staleness": staleness})


def assert_alike(one: Trained, other: Trained) -> None:
    """But for the rounding of sums in another order."""
    for name in one.weights:
        torch.testing.assert_close(one.weights[name], other.weights[name], rtol=0, atol=1e-5)
    for line, others in zip(one.history.lines, other.history.lines, strict=True):
        for name in ("step", "policy_version", "reward", "tokens", "recorded", "actions", "validation", "skipped"):
            assert line.get(name) == others.get(name), name
        for name in ("loss", "gradient_norm", "entropy", "clipped"):
            if name in line:
                assert line[name] == pytest.approx(others[name], rel=1e-4, abs=1e-5), name
    assert one.history.kept_step == other.history.kept_step


def assert_same(one: Trained, other: Trained) -> None:
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert without_rates(one.history.lines) == without_rates(other.history.lines)


def groups_of(engine: Any) -> Groups:
    recorder, budget_P = Recorder(SPACE.order, 1.0), torch.arange(1, 8)
    policy = AdaptiveDecoding(adapter_for(CONFIG))
    return collect_groups(engine, TinyTask(), problems(7), policy, SPACE.order, budget_P, 12, 24, 3, recorder)


def lesson_of(groups: Groups) -> Lesson:
    assert groups.steps is not None
    reward_R = groups.reward_PG.flatten()
    return Lesson(groups.steps, (reward_R - reward_R.mean())[groups.steps.request_N])


def job_of(lesson: Lesson, **fields: Any) -> Update:
    config = CONFIG.model_copy(update={"passes": 1, "max_gradient_norm": 1e6})
    return replace(Update(adapter_for(config), {}, config, 84, len(lesson.steps), 1e-3, (5,)), **fields)


def gradient(updated: Updated) -> Tensor:
    """Adam's first moment after one step is a tenth of it."""
    return 10 * torch.cat([state["exp_avg"].flatten() for state in updated.optimizer["state"].values()])


def test_two_workers_record_what_one_process_records(ray: Together) -> None:
    one, two = groups_of(tiny_engine()), groups_of(ray.engine)
    for name in ("reward_PG", "length_PG", "truncated_PG", "budget_P", "cot_P"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert 0 < float(one.reward_PG.mean()) < 1
    assert one.steps is not None
    assert two.steps is not None
    for name in one.steps.__dataclass_fields__:
        assert torch.equal(getattr(one.steps, name), getattr(two.steps, name)), name


def test_two_ranks_compute_the_gradient_of_one(ray: Together) -> None:
    lesson = lesson_of(groups_of(tiny_engine()))
    job = job_of(lesson)
    alone, shared = update(job, lesson), ray.trainers(job, lesson)
    assert float(gradient(alone).abs().max()) > 1e-3
    torch.testing.assert_close(gradient(shared), gradient(alone), rtol=0, atol=1e-6)
    assert shared.metrics == pytest.approx(alone.metrics, rel=1e-5, abs=1e-6)
    dropped = replace(job, config=job.config.model_copy(update={"dropout": 0.3}))  # the ranks draw, and draw the same
    dropped.adapter.config = replace(dropped.adapter.config, dropout=0.3)
    first, second = ray.trainers(dropped, lesson), ray.trainers(dropped, lesson)
    assert torch.equal(gradient(first), gradient(second))
    assert not torch.allclose(gradient(first), gradient(alone), rtol=0, atol=1e-5)


def test_what_an_update_says_arrives_as_it_was(ray: Together) -> None:
    lesson = lesson_of(groups_of(tiny_engine()))
    broken = replace(lesson, advantage_N=lesson.advantage_N * float("nan"))
    with pytest.raises(RheostatError, match=r"^the loss became nan$"):
        ray.trainers(job_of(lesson), broken)
    assert ray.trainers(job_of(lesson), lesson).metrics["loss"] != 0  # and the ranks live on


@pytest.mark.parametrize("staleness", [0, 1])
def test_workers_and_trainers_end_with_the_adapter_of_one_process(
    staleness: int, ray: Together, tmp_path: Path
) -> None:
    alone = trained(tmp_path / "alone", stale(staleness))
    assert_alike(trained(tmp_path / "crew", stale(staleness), engine=ray.engine, updater=ray.trainers), alone)
    assert [line["policy_version"] for line in alone.history.lines] == [max(0, s - 1 - staleness) for s in range(7)]


@pytest.mark.parametrize("misfortune", ["worker", "judge"])
def test_whoever_is_killed_the_run_is_undisturbed(misfortune: str, ray: Together, tmp_path: Path) -> None:
    """A worker in recorded rollouts, a judge in a verification."""
    undisturbed = trained(tmp_path / "whole", stale(1), engine=ray.engine)
    assert_same(
        trained(tmp_path / "killed", stale(1), misfortune=ray.folder / misfortune, engine=ray.engine), undisturbed
    )
    assert not list(ray.folder.iterdir())


def test_a_trainer_killed_in_an_update_leaves_the_run_undisturbed(ray: Together, tmp_path: Path) -> None:
    fields = {"config": stale(1), "engine": ray.engine, "updater": ray.trainers}
    undisturbed = trained(tmp_path / "whole", adapter=crew.mortal_adapter(adapter_for(CONFIG)), **fields)
    killed = trained(
        tmp_path / "killed",
        adapter=crew.mortal_adapter(adapter_for(CONFIG)),
        misfortune=ray.folder / "trainer",
        **fields,
    )
    assert_same(killed, undisturbed)
    assert not list(ray.folder.iterdir())
    assert_alike(killed, trained(tmp_path / "alone", stale(1)))


DRIVER = """
import sys
from pathlib import Path
import crew
from rheostat.training.distributed import RayEngine
from test_ray_training import CHOICE, stale, trained
with RayEngine(crew.Mortal, CHOICE, 2) as engine:
    trained(Path(sys.argv[1]), stale(1), engine=engine)
"""


def test_a_killed_driver_goes_on_where_it_was(ray: Together, tmp_path: Path) -> None:
    (folder := tmp_path / "killed").mkdir()
    environment = dict(os.environ) | {"RHEOSTAT_TEST_SLOW": "1", crew.MISFORTUNES: str(tmp_path)}
    metrics, until = folder / "metrics.jsonl", time.monotonic() + 240
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)], env=environment) as driver:
        try:
            while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
                assert driver.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            driver.kill()
    lines = len(metrics.read_text().splitlines())
    assert 4 <= lines < 7
    undisturbed = trained(tmp_path / "whole", stale(1), engine=ray.engine)
    assert_same(trained(folder, stale(1), engine=ray.engine), undisturbed)


def test_too_many_trainers_are_refused_at_once() -> None:
    class Small:
        """Two machines of two processors, one of which somebody else has."""

        cluster_resources = staticmethod(lambda: {"CPU": 4.0})
        available_resources = staticmethod(lambda: {"CPU": 3.0})
        shutdown = staticmethod(lambda: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.cluster, "ray", Small)
        patch.setattr(distributed.cluster, "PATIENCE", 0.2)
        message = r"^--workers 1 --trainers 40: the cluster has 4 processors, and each worker and trainer needs one$"
        with pytest.raises(ConfigError, match=message):
            distributed.cluster._require_resources(1, 40)
        with pytest.raises(ConfigError, match=r"^--workers 4: the cluster has 4 processors, of which 3 are free, and"):
            distributed.cluster._require_resources(4, 1)
        distributed.cluster._require_resources(1, 2)


def test_trainers_are_not_reached_through_a_client() -> None:
    with pytest.raises(ConfigError, match=r"^--address ray://127\.0\.0\.1:1: trainers .*--address auto$"):
        distributed.RayEngine(tiny_engine, CHOICE, 1, "ray://127.0.0.1:1", trainers=2)
