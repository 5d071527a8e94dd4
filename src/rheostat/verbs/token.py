"""The token level: train and judge adapters that pick an action at every token."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rheostat.adapters.files import load_adapter, save_adapter
from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig
from rheostat.baselines.uniform import UniformMixture
from rheostat.config import TokenRunConfig
from rheostat.console import Console
from rheostat.engines.base import Engine
from rheostat.errors import AdapterError
from rheostat.files import make_folder
from rheostat.reports.cards import measured_of
from rheostat.rollouts.collect import policy_device
from rheostat.tasks.base import Split
from rheostat.training.token import TokenHistory, TokenTraining, informative_prompts, train_token
from rheostat.training.token_config import TokenTrainingConfig
from rheostat.training.update import Updater
from rheostat.types import Problem
from rheostat.verbs.judge import Rivals, judge
from rheostat.verbs.run import WITH_BUDGET, WITHOUT_BUDGET, Run, base_of, open_run

ENTROPY_ONLY = "entropy-only adapter"
BOTH_LEVELS = "adapter of both levels"


def _config(run: Run) -> TokenRunConfig:
    assert isinstance(run.config, TokenRunConfig)
    return run.config


def _informative(run: Run) -> list[Problem]:
    """Training prompts with something to learn from, by their initial pass rate under the uniform policy."""
    config, problems = _config(run), run.splits[Split.TRAIN]
    if config.filter_samples == 0:
        return problems
    uniform = UniformMixture(config.space, policy_device(run.engine))
    first = run.sample("pass rates of training prompts", problems, uniform, 1, config.filter_samples)
    return informative_prompts(problems, first.pass_at(1), config)


@dataclass(frozen=True)
class Trained:
    """A trained adapter and how it came about."""

    adapter: TokenAdapter
    history: TokenHistory
    problems: int


def _untrained(run: Run, sizes: TokenConfig) -> TokenAdapter:
    """Uniform over its actions, or what the sequence-level adapter of ``start`` chooses."""
    config = _config(run)
    if config.start is None:
        return TokenAdapter(sizes, config.space, config.seed)
    sequence = load_adapter(config.start, base=base_of(run.engine.info), kind="sequence").adapter
    if sequence.space != config.space:
        names = " ".join(str(strategy) for strategy in sequence.space)
        raise AdapterError(
            f"--start {config.start}: both levels need the same actions: give --strategies {names} "
            f"--order {sequence.space.order}"
        )
    return TokenAdapter.starting_from(sequence, sizes, config.seed)


def train(run: Run, folder: Path, updater: Updater | None = None) -> Trained:
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
    adapter = _untrained(run, sizes)
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
        updater,
    )
    with run.phase("training"), run.console.progress(f"training {_kind(config)}", config.steps, "tokens") as bar:
        history = train_token(adapter, setting, bar)
    return Trained(adapter, history, len(problems))


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
    config: TokenRunConfig, out: Path, console: Console, engine: Engine | None = None, updater: Updater | None = None
) -> dict[str, object]:
    """`rheostat train token`: train one adapter into ``out/adapter``; ``updater`` makes the updates, by default it
    does itself."""
    with open_run(config, out, console, engine) as run:
        trained = train(run, run.out, updater)
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
    if config.start is not None:
        return BOTH_LEVELS
    if config.features is Features.ENTROPY:
        return ENTROPY_ONLY
    return WITH_BUDGET if config.with_budget else WITHOUT_BUDGET


def train_and_judge(run: Run, folder: Path) -> dict[str, Any]:
    """Train one adapter into ``folder/adapter`` and judge it on test; returns the results."""
    kind, trained = _kind(_config(run)), train(run, folder)
    save(run, folder / "adapter", trained, {})  # before the long judgement: nothing trained is lost
    history = {"kept_step": trained.history.kept_step, "history": trained.history.lines}
    config = _config(run)
    rivals = Rivals(token={kind: AdaptiveDecoding(trained.adapter, config.commit)})
    on_validation = run.sweep(Split.VALIDATION, config.space, config.samples)
    on_test = run.sweep(Split.TEST, config.space, config.samples)
    results = judge(run, config.budgets, on_validation, on_test, rivals)
    results |= {"training": {kind: history}, "config": config.model_dump(mode="json")}
    save(run, folder / "adapter", trained, measured_of(results, kind))
    return results
