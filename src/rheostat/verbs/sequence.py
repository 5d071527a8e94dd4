"""The sequence level: sweep, train and judge adapters that pick one strategy per prompt."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rheostat.adapters.files import save_adapter
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.config import RunConfig
from rheostat.console import Console
from rheostat.engines.base import Engine, Request
from rheostat.files import atomic_write
from rheostat.reports.cards import measured_of
from rheostat.rollouts.collect import collect
from rheostat.rollouts.sweep import Sweep
from rheostat.tasks.base import Split
from rheostat.training.bandit import BanditData, DrawRewards, Epoch, Estimator, train_bandit
from rheostat.types import Problem
from rheostat.verbs.judge import Rivals, judge
from rheostat.verbs.run import WITH_BUDGET, WITHOUT_BUDGET, Run, base_of, open_run

_ONLINE_FROM = 1_000_000  # sample numbers of online training: never those of a sweep


def _config(run: Run) -> RunConfig:
    assert isinstance(run.config, RunConfig)
    return run.config


def _sweep(run: Run, split: Split) -> Sweep:
    config = _config(run)
    return run.sweep(split, config.space, getattr(config.samples, split.value))


def _draw_rewards(run: Run, problems: Sequence[Problem]) -> DrawRewards:
    """Fresh rollouts for online training; every update has sample numbers of its own."""
    config = _config(run)
    strategies, most = config.space.strategies, max(config.bandit.budgets)

    def draw(problem_P: Tensor, action_PG: Tensor, budget_P: Tensor, epoch: int) -> Tensor:
        asked, requests, cell_of = [], [], []
        # in the task's order, so that prompts of one data set follow each other and share their batches
        for index, row in sorted((index, row) for row, index in enumerate(problem_P.tolist())):
            prompt = run.task.prompt(problems[index])
            asked.append(problems[index])
            for group, action in enumerate(action_PG[row].tolist()):
                first = _ONLINE_FROM + (epoch * action_PG.shape[1] + group) * most
                for number in range(first, first + int(budget_P[row])):
                    cell_of.append((row, group))
                    strategy, seed = strategies[action], config.seed
                    requests.append(Request(prompt, strategy, number, seed, run.task.max_tokens))
        rollouts = collect(
            run.engine,
            run.task,
            asked,
            requests,
            run.store,
            order=config.order,
        )
        reward_PG = torch.zeros(action_PG.shape)
        for cell, rollout in zip(cell_of, rollouts, strict=True):
            reward_PG[cell] = max(float(reward_PG[cell]), float(rollout.correct or False))
        return reward_PG

    return draw


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
    config = _config(run)
    bandit = config.bandit
    train_problems, validation_problems = run.splits[Split.TRAIN], run.splits[Split.VALIDATION]
    sizes = SequenceConfig(
        hidden_size=run.engine.info.hidden_size,
        width=bandit.width,
        pooling=config.pooling,
        budgets=bandit.budgets,
        features=config.features,
    )
    embedding_train_PH, embedding_validation_PH = (
        run.embed(problems, sizes) for problems in (train_problems, validation_problems)
    )
    if bandit.estimator is Estimator.FULL_INFORMATION:
        train = BanditData.of(embedding_train_PH, _sweep(run, Split.TRAIN), bandit.budgets)
    else:
        train = BanditData(embedding_train_PH, torch.empty(0))
    on_validation = _sweep(run, Split.VALIDATION)
    validation = BanditData.of(embedding_validation_PH, on_validation, bandit.budgets)
    trained = {}
    for kind in kinds:
        adapter = SequenceAdapter(replace(sizes, with_budget=kind == WITH_BUDGET), config.space, config.seed)
        with run.phase("training"), run.console.progress(f"training {kind}", bandit.epochs, "") as bar:
            history, kept = train_bandit(
                adapter,
                train,
                validation,
                bandit,
                config.seed,
                _draw_rewards(run, train_problems),
                bar,
            )
        trained[kind] = Trained(adapter, history, kept)
    return trained, on_validation


def save(run: Run, folder: Path, trained: Trained, metrics: dict[str, object]) -> None:
    """Write a trained adapter as a folder."""
    config = _config(run)
    last = trained.history[trained.kept_epoch]
    summary = {
        "task": config.task,
        "estimator": str(config.bandit.estimator),
        "seed": config.seed,
        "problems": config.problems.train,
        "samples": config.samples.train,
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
            "features": str(config.features),
            "validation_reward": round(trained[kind].history[trained[kind].kept_epoch].validation_reward, 6),
            "validation_best_single_strategy": round(float(single.max()), 6),
            "validation_best_at_any_budget": round(best, 6),
            "training": trained[kind].to_dict(config.bandit.estimator),
        }
        atomic_write(run.out / "training.json", json.dumps(summary, indent=1))
        return summary


def train_and_judge(run: Run) -> dict[str, Any]:
    """Train with and without budget, judge on test, write both adapters; returns the results."""
    config = _config(run)
    trained, on_validation = train_adapters(run, [WITH_BUDGET, WITHOUT_BUDGET])
    rivals = Rivals(sequence={name: item.adapter for name, item in trained.items()}, commit=config.commit)
    results = judge(run, config.bandit.budgets, on_validation, _sweep(run, Split.TEST), rivals)
    results["training"] = {name: item.to_dict(config.bandit.estimator) for name, item in trained.items()}
    own = RunConfig.model_validate(config.model_dump(include=set(RunConfig.model_fields)))
    results["config"] = own.model_dump(mode="json")
    for name, folder in ((WITH_BUDGET, "adapter"), (WITHOUT_BUDGET, "adapter-without-budget")):
        save(run, run.out / folder, trained[name], measured_of(results, name))
    return results
