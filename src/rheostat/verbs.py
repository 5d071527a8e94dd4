"""What the commands do, as functions: open the engine and the store, sweep, train, evaluate, write."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.adapters.files import BaseModel, save_adapter
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.config import RunConfig
from rheostat.console import Console
from rheostat.engines import models
from rheostat.engines.base import Engine, EngineInfo, Request
from rheostat.engines.fake import FakeEngine
from rheostat.engines.local import LocalEngine
from rheostat.environment import machine, versions
from rheostat.errors import AdapterError
from rheostat.evaluation.evaluate import compare
from rheostat.files import atomic_write, make_folder
from rheostat.reports.page import write_report
from rheostat.rollouts.collect import collect
from rheostat.rollouts.store import RolloutStore
from rheostat.rollouts.sweep import Sweep, sweep
from rheostat.statistics import mean_interval
from rheostat.tasks.base import Split, Task
from rheostat.tasks.procedural import procedural_task
from rheostat.training.bandit import BanditData, DrawRewards, Epoch, Estimator, train_bandit
from rheostat.types import Problem

WITH_BUDGET, WITHOUT_BUDGET = "adapter with budget", "adapter without budget"
_ONLINE_FROM = 1_000_000  # sample numbers of online training: never those of a sweep


def open_engine(model: str) -> Engine:
    """The engine of a model name, folder or Hub id; ``fake`` needs no weights.

    Raises:
        ModelError: no such model.
    """
    if model == "fake":
        return FakeEngine()
    return LocalEngine(models.locate(model), name=model)


@dataclass
class Run:
    """One run of a command: what it works with, and where its results go."""

    config: RunConfig
    out: Path
    engine: Engine
    task: Task
    store: RolloutStore
    console: Console
    wall_seconds: dict[str, float] = field(default_factory=dict)
    sweeps: list[Sweep] = field(default_factory=list)
    splits: dict[Split, list[Problem]] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.wall_seconds[name] = self.wall_seconds.get(name, 0) + round(time.perf_counter() - start, 3)

    def sweep(self, split: Split) -> Sweep:
        """Every strategy on every problem of a split, from the store where it is there."""
        problems, samples = self.splits[split], getattr(self.config.samples, split.value)
        total = len(problems) * len(self.config.space) * samples
        with self.phase(f"rollouts {split}"), self.console.progress(f"rollouts for {split}", total, "tokens") as bar:
            result = sweep(
                self.engine, self.task, problems, self.config.space, samples, self.config.seed, self.store, bar
            )
        self.sweeps.append(result)
        return result

    def embed(self, problems: Sequence[Problem]) -> Float[Tensor, "P H"]:
        """Embeddings of the problems' prompts."""
        chunks = []
        with self.phase("embeddings"), self.console.progress("prompt embeddings", len(problems), "") as bar:
            for start in range(0, len(problems), 128):
                prompts = [self.task.prompt(problem) for problem in problems[start : start + 128]]
                chunks.append(self.engine.embed(prompts, self.config.pooling))
                bar(start + len(prompts), len(problems), 0)
        return torch.cat(chunks)

    def draw_rewards(self, problems: Sequence[Problem]) -> DrawRewards:
        """Fresh rollouts for online training; every update has sample numbers of its own."""
        strategies, most = self.config.space.strategies, max(self.config.bandit.budgets)

        def draw(problem_P: Tensor, action_PG: Tensor, budget_P: Tensor, epoch: int) -> Tensor:
            asked, requests, cell_of = [], [], []
            for row, index in enumerate(problem_P.tolist()):
                prompt = self.task.prompt(problems[index])
                asked.append(problems[index])
                for group, action in enumerate(action_PG[row].tolist()):
                    first = _ONLINE_FROM + (epoch * action_PG.shape[1] + group) * most
                    for number in range(first, first + int(budget_P[row])):
                        cell_of.append((row, group))
                        strategy, seed = strategies[action], self.config.seed
                        requests.append(Request(prompt, strategy, number, seed, self.task.max_tokens))
            rollouts = collect(
                self.engine,
                self.task,
                asked,
                requests,
                self.store,
                order=self.config.order,
            )
            reward_PG = torch.zeros(action_PG.shape)
            for cell, rollout in zip(cell_of, rollouts, strict=True):
                reward_PG[cell] = max(float(reward_PG[cell]), float(rollout.correct or False))
            return reward_PG

        return draw


@contextmanager
def open_run(config: RunConfig, out: Path, console: Console, engine: Engine | None = None) -> Iterator[Run]:
    """A run in folder ``out``, whose store is locked until it ends."""
    start = time.perf_counter()
    task = procedural_task(config.task)
    # all splits at once: what a task cannot give is refused before anything is paid for
    splits = {split: task.problems(split, getattr(config.problems, split.value)) for split in Split}
    out = make_folder(out)
    with RolloutStore(out / "rollouts") as store:
        engine = engine or open_engine(config.model)
        run = Run(config, out, engine, task, store, console, splits=splits)
        run.wall_seconds["set-up"] = round(time.perf_counter() - start, 3)
        yield run


@dataclass(frozen=True)
class Trained:
    """A trained adapter and how it came about."""

    adapter: SequenceAdapter
    history: list[Epoch]
    kept_epoch: int

    def to_dict(self, estimator: Estimator) -> dict[str, object]:
        return {
            "estimator": str(estimator),
            "kept_epoch": self.kept_epoch,
            "history": [epoch.to_dict() for epoch in self.history],
        }


def train_adapters(run: Run, kinds: Sequence[str]) -> tuple[dict[str, Trained], Sweep]:
    """Sweep train and validation, and train an adapter of each kind; also returns the validation sweep."""
    bandit = run.config.bandit
    train_problems, validation_problems = run.splits[Split.TRAIN], run.splits[Split.VALIDATION]
    embedding_train_PH, embedding_validation_PH = run.embed(train_problems), run.embed(validation_problems)
    if bandit.estimator is Estimator.FULL_INFORMATION:
        train = BanditData.of(embedding_train_PH, run.sweep(Split.TRAIN), bandit.budgets)
    else:
        train = BanditData(embedding_train_PH, torch.empty(0))
    on_validation = run.sweep(Split.VALIDATION)
    validation = BanditData.of(embedding_validation_PH, on_validation, bandit.budgets)
    trained = {}
    for kind in kinds:
        config = SequenceConfig(
            hidden_size=run.engine.info.hidden_size,
            with_budget=kind == WITH_BUDGET,
            width=bandit.width,
            pooling=run.config.pooling,
            budgets=bandit.budgets,
        )
        adapter = SequenceAdapter(config, run.config.space, run.config.seed)
        with run.phase("training"), run.console.progress(f"training {kind}", bandit.epochs, "") as bar:
            history, kept = train_bandit(
                adapter,
                train,
                validation,
                bandit,
                run.config.seed,
                run.draw_rewards(train_problems),
                bar,
            )
        trained[kind] = Trained(adapter, history, kept)
    return trained, on_validation


def base_of(info: EngineInfo) -> BaseModel:
    """The base model as adapter files name it."""
    return BaseModel(info.model, None, info.hidden_size, info.fingerprint)


def save(run: Run, folder: Path, trained: Trained, metrics: dict[str, object]) -> None:
    """Write a trained adapter as a folder."""
    last = trained.history[trained.kept_epoch]
    summary = {
        "task": run.config.task,
        "estimator": str(run.config.bandit.estimator),
        "seed": run.config.seed,
        "problems": run.config.problems.train,
        "samples": run.config.samples.train,
        "kept_epoch": trained.kept_epoch,
        "validation_reward": round(last.validation_reward, 6),
    }
    save_adapter(folder, trained.adapter, base_of(run.engine.info), summary, metrics)


def train_sequence(
    config: RunConfig, out: Path, console: Console, with_budget: bool = True, engine: Engine | None = None
) -> dict[str, object]:
    """`rheostat train sequence`: train one adapter into ``out/adapter``."""
    kind = WITH_BUDGET if with_budget else WITHOUT_BUDGET
    with open_run(config, out, console, engine) as run:
        trained, on_validation = train_adapters(run, [kind])
        best = max(float(on_validation.pass_at(k).mean(0).max()) for k in config.bandit.budgets)
        save(run, run.out / "adapter", trained[kind], {})
        single = sum(on_validation.pass_at(k).mean(0) for k in config.bandit.budgets) / len(config.bandit.budgets)
        summary: dict[str, object] = {
            "adapter": str(run.out / "adapter"),
            "kind": kind,
            "validation_reward": round(trained[kind].history[trained[kind].kept_epoch].validation_reward, 6),
            "validation_best_single_strategy": round(float(single.max()), 6),
            "validation_best_at_any_budget": round(best, 6),
            "training": trained[kind].to_dict(config.bandit.estimator),
        }
        atomic_write(run.out / "training.json", json.dumps(summary, indent=1))
        return summary


def evaluate(
    config: RunConfig,
    out: Path,
    console: Console,
    adapters: dict[str, SequenceAdapter],
    engine: Engine | None = None,
) -> dict[str, object]:
    """`rheostat evaluate`: adapters against static strategies on the test split; writes results and report."""
    with open_run(config, out, console, engine) as run:
        for name, adapter in adapters.items():
            if adapter.config.pooling != config.pooling:
                raise AdapterError(f"{name}: it reads '{adapter.config.pooling}' embeddings; set pooling to that")
        return _judge(run, adapters, run.sweep(Split.VALIDATION), {})


def demo(config: RunConfig, out: Path, console: Console, engine: Engine | None = None) -> dict[str, object]:
    """`rheostat demo`: train with and without budget, judge on test, write adapter, results and report."""
    with open_run(config, out, console, engine) as run:
        trained, on_validation = train_adapters(run, [WITH_BUDGET, WITHOUT_BUDGET])
        histories: dict[str, object] = {name: item.to_dict(config.bandit.estimator) for name, item in trained.items()}
        results = _judge(run, {name: item.adapter for name, item in trained.items()}, on_validation, histories)
        rows: list[dict[str, object]] = results["rows"]  # type: ignore[assignment]
        for name, folder in ((WITH_BUDGET, "adapter"), (WITHOUT_BUDGET, "adapter-without-budget")):
            save(
                run, run.out / folder, trained[name], {"rows": [row for row in rows if row["policy"] in (name, "BEST")]}
            )
        return results


def _judge(
    run: Run, adapters: dict[str, SequenceAdapter], on_validation: Sweep, histories: dict[str, object]
) -> dict[str, object]:
    """Sweep the test split, compare, and write ``results.json`` and ``report.html``."""
    config = run.config
    on_test = run.sweep(Split.TEST)
    embedding_PH = run.embed(on_test.problems)
    with run.phase("evaluation"):
        comparison = compare(on_validation, on_test, adapters, embedding_PH, config.bandit.budgets, config.commit)
    missing = sum(item.missing for item in run.sweeps)
    results: dict[str, object] = {
        "format": 1,
        "kind": "sequence",
        "model": run.engine.info.to_dict(),
        "task": config.task,
        "members": list(dict.fromkeys(problem.member for problem in on_test.problems)),
        "order": str(config.order),
        "strategies": [str(strategy) for strategy in config.space],
        "budgets": list(config.bandit.budgets),
        **comparison.to_dict(),
        "training": histories,
        "counts": {
            "rollouts": sum(item.sampled for item in run.sweeps),
            "tokens": sum(item.tokens for item in run.sweeps),
            "truncated": sum(item.truncated for item in run.sweeps),
            "without_verdict": missing,
        },
        "config": RunConfig.model_validate(config.model_dump(include=set(RunConfig.model_fields))).model_dump(
            mode="json"
        ),
        "seeds": {"run": config.seed},
        "versions": versions(),
        "machine": machine(),
    }
    if missing:
        results["bounds"] = {
            str(k): {
                "missing_wrong": mean_interval(on_test.pass_at(k).mean(1)).estimate,
                "missing_right": mean_interval(on_test.pass_at(k, missing_is=1.0).mean(1)).estimate,
            }
            for k in config.bandit.budgets
        }
    results["wall_seconds"] = dict(run.wall_seconds)
    atomic_write(run.out / "results.json", json.dumps(results, indent=1))
    write_report(results, run.out / "report.html")
    return results
