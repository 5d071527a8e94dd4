"""The token level: train and judge adapters that pick an action at every token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rheostat.adapters.files import save_adapter
from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig
from rheostat.baselines.uniform import UniformMixture
from rheostat.config import TokenRunConfig
from rheostat.console import Console
from rheostat.decoding.policy import NamedPolicy
from rheostat.engines.base import Engine
from rheostat.evaluation.behaviour import behaviour
from rheostat.evaluation.evaluate import compare_token
from rheostat.files import make_folder
from rheostat.rollouts.sweep import PolicySweep, Sweep, sweep_policy
from rheostat.tasks.base import Split
from rheostat.training.token import TokenHistory, TokenTraining, informative_prompts, train_token
from rheostat.training.token_config import TokenTrainingConfig
from rheostat.types import Problem
from rheostat.verbs.run import WITH_BUDGET, WITHOUT_BUDGET, Run, base_of, open_run

ENTROPY_ONLY = "entropy-only adapter"


def _config(run: Run) -> TokenRunConfig:
    assert isinstance(run.config, TokenRunConfig)
    return run.config


def _sweep_policy(
    run: Run, what: str, problems: Sequence[Problem], policy: NamedPolicy, budget: int, samples: int
) -> PolicySweep:
    with run.phase(f"rollouts {what}"), run.console.progress(what, len(problems) * samples, "tokens") as bar:
        result = sweep_policy(
            run.engine, run.task, problems, policy, run.config.order, budget, samples, run.config.seed, run.store, bar
        )
    run.sweeps.append(result)
    return result


def _informative(run: Run) -> list[Problem]:
    """Training prompts with something to learn from, by their initial pass rate under the uniform policy."""
    config, problems = _config(run), run.splits[Split.TRAIN]
    if config.filter_samples == 0:
        return problems
    uniform = UniformMixture(config.space, run.engine.info.device)
    first = _sweep_policy(run, "pass rates of training prompts", problems, uniform, 1, config.filter_samples)
    return informative_prompts(problems, first.pass_at(1), config)


@dataclass(frozen=True)
class Trained:
    """A trained adapter and how it came about."""

    adapter: TokenAdapter
    history: TokenHistory
    problems: int


def train(run: Run, folder: Path) -> Trained:
    """Train one adapter; checkpoint and metrics lie in ``folder``."""
    config = _config(run)
    training = TokenTrainingConfig.model_validate(config.model_dump(include=set(TokenTrainingConfig.model_fields)))
    sizes = TokenConfig(
        hidden_size=run.engine.info.hidden_size,
        features=training.features,
        with_budget=training.with_budget,
        budgets=training.seen_budgets,
        width=training.width,
        dropout=training.dropout,
    )
    adapter = TokenAdapter(sizes, config.space, config.seed)
    problems = _informative(run)
    setting = TokenTraining(
        run.engine,
        run.task,
        problems,
        run.splits[Split.VALIDATION],
        training,
        make_folder(folder),
        config.seed,
        config.tracking,
    )
    with run.phase("training"), run.console.progress(f"training {_kind(config)}", config.steps, "tokens") as bar:
        history = train_token(adapter, setting, bar)
    return Trained(adapter.to(run.engine.info.device), history, len(problems))


def save(run: Run, folder: Path, trained: Trained, metrics: Mapping[str, object]) -> None:
    """Write a trained adapter as a folder."""
    config, history = _config(run), trained.history
    summary = {
        "task": config.task,
        "estimator": str(config.estimator),
        "objective": str(config.objective),
        "seed": config.seed,
        "problems": trained.problems,
        "rollouts": sum(line.get("rollouts", 0) for line in history.lines),
        "kept_step": history.kept_step,
        "validation_reward": round(history.validation_reward, 6),
    }
    save_adapter(folder, trained.adapter, base_of(run.engine.info), summary, metrics)


def train_token_level(
    config: TokenRunConfig, out: Path, console: Console, engine: Engine | None = None
) -> dict[str, object]:
    """`rheostat train token`: train one adapter into ``out/adapter``."""
    with open_run(config, out, console, engine) as run:
        trained = train(run, run.out)
        save(run, run.out / "adapter", trained, {})
        history = trained.history
        return {
            "adapter": str(run.out / "adapter"),
            "kind": _kind(config),
            "validation_reward": round(history.validation_reward, 6),
            "validation_reward_of_the_uniform_policy": round(history.lines[0]["validation"]["reward"], 6),
            "kept_step": history.kept_step,
            "metrics": str(run.out / "metrics.jsonl"),
        }


def _kind(config: TokenRunConfig) -> str:
    if config.features is Features.ENTROPY:
        return ENTROPY_ONLY
    return WITH_BUDGET if config.with_budget else WITHOUT_BUDGET


def judge(run: Run, adapters: Mapping[str, TokenAdapter], histories: Mapping[str, object]) -> dict[str, Any]:
    """Sample the test problems under every policy and compare; the content of ``results.json``."""
    config, device = _config(run), run.engine.info.device
    on_validation = run.sweep(Split.VALIDATION, config.space, config.samples)
    on_test = run.sweep(Split.TEST, config.space, config.samples)
    problems = run.splits[Split.TEST]
    mixed = _sweep_policy(run, "MIXED", problems, UniformMixture(config.space, device), 1, config.samples)
    policies = {name: AdaptiveDecoding(adapter.to(device), config.commit) for name, adapter in adapters.items()}
    sweeps: dict[str, dict[int, PolicySweep]] = {}
    for name, policy in policies.items():
        if policy.adapter.config.budgets:
            sweeps[name] = {
                k: _sweep_policy(run, f"{name}, B = {k}", problems, policy, k, max(2 * k, config.samples))
                for k in config.budgets
            }
        else:
            sweeps[name] = dict.fromkeys(config.budgets, _sweep_policy(run, name, problems, policy, 1, config.samples))
    prompts = [run.task.prompt(problem) for problem in problems]
    with run.phase("evaluation"):
        cot_P = np.array([prompt.cot for prompt in prompts])
        comparison = compare_token(on_validation, on_test, sweeps, mixed, config.budgets, cot_P)
    results: dict[str, Any] = {
        "kind": "token",
        **run.facts(),
        "budgets": list(config.budgets),
        **comparison.to_dict(),
        **run.bounds(on_test, config.budgets),
        "training": dict(histories),
        "lengths": _lengths(run.task.max_tokens, on_test, sweeps),
        "config": config.model_dump(mode="json"),
    }
    if policies:
        name = next(iter(policies))
        with run.phase("behaviour"):
            results |= behaviour(run.engine, run.task, problems, policies[name], name, config.seed)
    results["wall_seconds"] = dict(run.wall_seconds)
    return results


def _lengths(most: int, on_test: Sweep, sweeps: Mapping[str, Mapping[int, PolicySweep]]) -> dict[str, list[int]]:
    """How many completions have 0, 1, …, ``most`` tokens, of each strategy and each adapter (all budgets together)."""
    lengths: dict[str, NDArray[np.int64]] = {
        str(strategy): on_test.length_PAS[:, index].ravel() for index, strategy in enumerate(on_test.space)
    }
    for name, own in sweeps.items():
        distinct = {id(sweep): sweep for sweep in own.values()}.values()
        lengths[name] = np.concatenate([sweep.length_PS.ravel() for sweep in distinct])
    return {name: np.bincount(values, minlength=most + 1).tolist() for name, values in lengths.items()}


def train_and_judge(run: Run, folder: Path) -> dict[str, Any]:
    """Train one adapter into ``folder/adapter`` and judge it on test; returns the results."""
    kind, trained = _kind(_config(run)), train(run, folder)
    save(run, folder / "adapter", trained, {})  # before the long judgement: nothing trained is lost
    history = {"kept_step": trained.history.kept_step, "history": trained.history.lines}
    results = judge(run, {kind: trained.adapter}, {kind: history})
    save(
        run, folder / "adapter", trained, {"rows": [row for row in results["rows"] if row["policy"] in (kind, "BEST")]}
    )
    return results
