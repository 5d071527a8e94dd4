"""Every configuration that cannot be used is refused in one line that names the field."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from rheostat.adapters.token import Features
from rheostat.config import DemoConfig, RunConfig, Splits, TokenRunConfig, build, read_toml
from rheostat.decoding.spaces import TABLE_13, TABLE_14
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.errors import ConfigError
from rheostat.training.bandit import BanditConfig, Estimator
from rheostat.training.token_config import Objective, TokenEstimator, TokenTrainingConfig
from rheostat.training.tracking import Tracking

SOURCE = "run.toml"


def refused(fields: dict[str, Any], model: type[BaseModel] = RunConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        build(model, fields, SOURCE)
    told = str(caught.value)
    assert told.startswith(f"{SOURCE}: ")
    assert "\n" not in told
    return told.removeprefix(f"{SOURCE}: ")


def test_defaults_fit_together() -> None:
    config = build(RunConfig, {}, SOURCE)
    assert config == RunConfig()
    assert config.space == TABLE_13
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_fields_of_every_kind_arrive() -> None:
    config = build(
        RunConfig,
        {
            "strategies": ["greedy", "T=0.75,k=10"],
            "order": "transformers",
            "problems": {"train": 6, "validation": 12, "test": 18},
            "samples": {"train": 2, "validation": 2, "test": 4},
            "bandit": {"budgets": [1, 2], "estimator": "online", "beta": 0.5},
            "seed": 3,
        },
        SOURCE,
    )
    assert config.space == ActionSpace((Strategy(0), Strategy(0.75, 10)), Order.TRANSFORMERS)
    assert config.problems == Splits(train=6, validation=12, test=18)
    assert config.bandit == BanditConfig(budgets=(1, 2), estimator=Estimator.ONLINE, beta=0.5)
    assert (config.seed, config.commit) == (3, True)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tsak": "demo"}, "tsak: unknown key; the keys at the top are task, data, "),
        ({"bandit": {"lr": 0.1}}, "bandit.lr: unknown key"),
        ({"problems": {"train": 6, "validation": 6, "test": 6, "dev": 6}}, "problems.dev: unknown key"),
        ({"problems": {"train": 6}}, "problems.validation: "),
        ({"seed": "tomorrow"}, "seed: "),
        ({"commit": "perhaps"}, "commit: "),
        ({"strategies": 5}, "strategies: "),
        ({"order": "alphabetical"}, "order: "),
        ({"pooling": "max"}, "pooling: "),
        ({"problems": 600}, "problems: "),
        ({"bandit": {"epochs": 0.5}}, "bandit.epochs: "),
        ({"bandit": {"budgets": [-1, 2]}}, "bandit.budgets: parallel budgets must be whole numbers of at least 1"),
        ({"bandit": {"budgets": [0]}}, "bandit.budgets: "),
        ({"bandit": {"budgets": [8, 1]}}, "bandit.budgets: "),
        ({"bandit": {"budgets": ["x"]}}, "bandit.budgets.0: "),
        ({"bandit": {"learning_rate": 0}}, "bandit.learning_rate: "),
    ],
)
def test_the_field_is_named_first(fields: dict[str, Any], told: str) -> None:
    assert refused(fields).startswith(told)


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        ({"train": 7, "validation": 16, "test": 16}, "samples.train must be at least the largest budget, 8"),
        ({"train": 8, "validation": 7, "test": 16}, "samples.validation must be at least the largest budget, 8"),
        ({"train": 8, "validation": 8, "test": 15}, "samples.test must be at least twice the largest budget, 16"),
    ],
)
def test_samples_must_be_enough_for_the_largest_budget(samples: dict[str, int], told: str) -> None:
    assert refused({"samples": samples}) == told
    enough = {name: count + 1 if f"samples.{name}" in told else count for name, count in samples.items()}
    assert build(RunConfig, {"samples": enough}, SOURCE).samples == Splits(**enough)


def test_online_training_needs_no_samples_of_the_training_problems() -> None:
    fields = {"samples": {"train": 1, "validation": 8, "test": 16}, "bandit": {"estimator": "online"}}
    assert build(RunConfig, fields, SOURCE).samples.train == 1


@pytest.mark.parametrize(
    ("strategies", "told"),
    [
        (["greedy"], "strategies: a policy needs at least two"),
        (["T=-0.5", "T=1"], "temperature must be 0 (greedy) or above, got -0.5"),
        (["T=1,p=0", "T=1"], "top_p must lie in (0, 1], got 0"),
        (["T=1,p=1.5", "T=1"], "top_p must lie in (0, 1], got 1.5"),
        (["T=1", "T=1,q=3"], "unknown part 'q=3'"),
        (["T=1", "T=1.0"], "'T=1' is listed twice"),
        (["table15"], "strategies: unknown name 'table15'; use table11,"),
        ([], "at least one strategy"),
    ],
)
def test_strategies_that_cannot_be_used(strategies: list[str], told: str) -> None:
    assert told in refused({"strategies": strategies})


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('task = "demo"\nseed = \n')
    with pytest.raises(ConfigError, match=r"run\.toml: .*line 2") as caught:
        read_toml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "not text"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.toml"
    if kind == "folder":
        path.mkdir()
    elif kind == "not text":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"--config .*run\.toml: cannot be read \(.+\)") as caught:
        read_toml(path)
    assert "\n" not in str(caught.value)


def test_a_file_becomes_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('strategies = ["greedy", "T=1"]\n[bandit]\nbudgets = [1, 4]\n')
    config = build(RunConfig, read_toml(path), SOURCE)
    assert config.bandit.budgets == (1, 4)
    assert len(config.space) == 2


def test_defaults_of_the_token_level_fit_together() -> None:
    config = build(TokenRunConfig, {}, SOURCE)
    assert config == TokenRunConfig()
    assert (config.task, config.space, config.commit) == ("steps", TABLE_14, False)
    fields = {name: getattr(config, name) for name in TokenTrainingConfig.model_fields}
    assert TokenTrainingConfig(**fields) == TokenTrainingConfig()


def test_fields_of_the_token_level_arrive() -> None:
    config = build(
        TokenRunConfig,
        {
            "objective": "pass@1",
            "estimator": "action",
            "features": "hidden+entropy",
            "group": 2,
            "budgets": [1, 2],
            "samples": 4,
            "strategies": ["greedy", "T=2"],
            "order": "transformers",
            "tracking": ["wandb"],
        },
        SOURCE,
    )
    assert (config.objective, config.estimator, config.features) == (
        Objective.PASS_1, TokenEstimator.ACTION, Features.BOTH,
    )  # fmt: skip
    assert config.space == ActionSpace((Strategy(0), Strategy(2.0)), Order.TRANSFORMERS)
    assert config.tracking == (Tracking.WANDB,)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"stepps": 3}, "stepps: unknown key; the keys at the top are estimator, objective, "),
        ({"objective": "best"}, "objective: "),
        ({"features": "eyes"}, "features: "),
        ({"tracking": ["mlflow"]}, "tracking.0: "),
        ({"group": 8}, "group must exceed the largest parallel budget, 8"),
        ({"budgets": [1, 16], "samples": 32}, "group must exceed the largest parallel budget, 16"),
        ({"samples": 3}, "samples must be at least twice the largest budget, 16"),
        ({"strategies": ["greedy"]}, "strategies: a policy needs at least two"),
        ({"mask_above": 0}, "mask_above: "),
        ({"dropout": 1}, "dropout: "),
        ({"steps": 0}, "steps: "),
        ({"problems": {"train": 6, "validation": 1, "test": 6}}, "problems.validation: "),
    ],
)
def test_token_fields_are_named_first(fields: dict[str, Any], told: str) -> None:
    assert refused(fields, TokenRunConfig).startswith(told)
    if "tracking" not in fields and "stepps" not in fields:
        assert refused({"token": fields}, DemoConfig).startswith(("token.", "token: "))


def test_the_demo_has_both_levels() -> None:
    config = build(DemoConfig, {"token": {"steps": 3}, "seed": 4}, SOURCE)
    assert (config.token.steps, config.seed, config.task) == (3, 4, "demo")
    assert len(TABLE_14) == len(TokenRunConfig(**config.token.model_dump(), seed=config.seed).space)
    assert refused({"token": {"seed": 1}}, DemoConfig) == "token.seed: unknown key"
