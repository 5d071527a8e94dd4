"""One resolved, frozen configuration of a run; field descriptions are the command line's help."""

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rheostat.adapters.sequence import PromptFeatures
from rheostat.baselines import Baseline
from rheostat.decoding.spaces import space_named, strategies_named
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.engines.base import Pooling
from rheostat.errors import ConfigError, RheostatError
from rheostat.tasks.choose import TaskChoice
from rheostat.training.autodeco import AutoDecoTrainingConfig
from rheostat.training.bandit import BanditConfig, Estimator
from rheostat.training.budgets import ParallelBudgets
from rheostat.training.token_config import TokenTrainingConfig
from rheostat.training.tracking import Tracking

EngineName = Literal["local", "vllm"]


class Splits(BaseModel):
    """A whole number for each split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: int = Field(ge=1, description="for learning")
    validation: int = Field(ge=2, description="for choosing")
    test: int = Field(ge=2, description="for the final judgement")


class JudgedSplits(Splits):
    """The same, where nothing but what validation chooses is judged."""

    @field_validator("validation", mode="before")
    @classmethod
    def _enough_to_choose(cls, value: object) -> object:
        if isinstance(value, int) and value < 2:
            raise ValueError("BEST and the baselines are chosen on validation problems: at least 2 are needed")
        return value


class TaskConfig(BaseModel):
    """What is asked, how, and how it is judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(
        "demo",
        description="a name of 'rheostat tasks list', several joined by +, FILE.jsonl (and --verifier), FILE.py:NAME",
    )
    data: tuple[str, ...] = Field(
        (),
        description="problems from here: FILE.jsonl or owner/name[/subset][@revision][:split], for one split as "
        "train=..., validation=..., test=..., or one for all (divided by a hash of the question)",
    )
    verifier: str | None = Field(
        None, description="how problems of your own are judged: math, exact, regex, or FILE.py:FUNCTION"
    )
    max_tokens: int | None = Field(None, ge=1, description="token budget b of an answer (default: the task's)")
    cot: float = Field(0.0, ge=0, le=1, description="share of prompts that ask for a chain of thought (paper: 0.3)")
    thinking: bool = Field(False, description="let a model that can think before it answers do so")
    shots: int = Field(0, ge=0, description="worked examples before the question, from the training split")
    require_isolation: bool = Field(
        False, description="refuse to run programs on a system that lacks a protection of the sandbox"
    )

    def task_choice(self, seed: int) -> TaskChoice:
        """The same as the tasks' room reads it."""
        return TaskChoice(**{name: getattr(self, name) for name in TaskConfig.model_fields}, seed=seed)


class RunConfig(TaskConfig):
    """Everything that shapes the numbers of a run."""

    model: str = Field("smollm2", description="base model: a name from 'rheostat models list', a folder, or a Hub id")
    engine: EngineName = Field("local", description="what runs the model: local, or vllm (an extra: rheostat[vllm])")
    strategies: tuple[str, ...] = Field(
        ("table13",), description="action space: a table of the paper, or strategies like greedy T=0.75,k=10"
    )
    order: Order = Field(Order.VLLM, description="order of the transforms: as vLLM or as transformers applies them")
    features: PromptFeatures = Field(
        PromptFeatures.HIDDEN,
        description="what the policy reads of a prompt: hidden (its embedding), or entropy (of the next token)",
    )
    pooling: Pooling = Field(Pooling.LAST, description="prompt embedding: the last token's state, or the mean")
    problems: Splits = Field(Splits(train=900, validation=300, test=1080), description="problems of each split")
    test_from: int = Field(
        0,
        ge=0,
        description="first problem of the test split to judge on, counted from 0",
    )
    samples: Splits = Field(Splits(train=8, validation=16, test=16), description="completions per problem and strategy")
    bandit: BanditConfig = Field(BanditConfig(), description="training of the adapter")
    commit: bool = Field(True, description="evaluate the most probable action instead of drawing one")
    seed: int = Field(0, description="every draw and every initial weight is a function of it")

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        most = max(self.bandit.budgets)
        if self.bandit.estimator is Estimator.FULL_INFORMATION and self.samples.train < most:
            raise ValueError(f"samples.train must be at least the largest budget, {most}")
        if self.samples.validation < most:
            raise ValueError(f"samples.validation must be at least the largest budget, {most}")
        if self.samples.test < 2 * most:
            raise ValueError(f"samples.test must be at least twice the largest budget, {2 * most}")
        if len(self.space) < 2:
            raise ValueError("strategies: a policy needs at least two to choose from")
        return self

    @property
    def space(self) -> ActionSpace:
        return space_named(self.strategies, self.order)


class TokenLevel(TaskConfig, TokenTrainingConfig):
    """What is learned at the token level, and from how much."""

    task: str = Field(
        "steps", description="steps (answers of several tokens, partly with worked steps), or as at the sequence level"
    )
    strategies: tuple[str, ...] = Field(
        ("table14",), description="actions: a table of the paper, or strategies like greedy T=0.75,k=10"
    )
    problems: Splits = Field(Splits(train=720, validation=96, test=300), description="problems of each split")
    test_from: int = Field(
        0,
        ge=0,
        description="first problem of the test split to judge on, counted from 0",
    )
    samples: int = Field(16, ge=2, description="completions per test problem, policy and budget; strategies likewise")

    @model_validator(mode="after")
    def _fits_together(self) -> "TokenLevel":
        if self.samples < 2 * max(self.budgets):
            raise ValueError(f"samples must be at least twice the largest budget, {2 * max(self.budgets)}")
        if len(strategies_named(self.strategies)) < 2:
            raise ValueError("strategies: a policy needs at least two to choose from")
        return self


class TokenRunConfig(TokenLevel):
    """Everything that shapes the numbers of a token-level run."""

    model: str = Field("smollm2", description="base model: a name from 'rheostat models list', a folder, or a Hub id")
    engine: EngineName = Field("local", description="what runs the model: local, or vllm (an extra: rheostat[vllm])")
    order: Order = Field(Order.VLLM, description="order of the transforms: as vLLM or as transformers applies them")
    start: str | None = Field(
        None,
        description="sequence-level adapter (folder or Hub id) to start from and to read, with the same strategies",
    )
    commit: bool = Field(
        False, description="in evaluation: take the most probable action at every token instead of drawing one"
    )
    seed: int = Field(0, description="every draw and every initial weight is a function of it")
    tracking: tuple[Tracking, ...] = Field((), description="where metrics go beside metrics.jsonl")

    @property
    def space(self) -> ActionSpace:
        return space_named(self.strategies, self.order)


class LearnedSplits(BaseModel):
    """A whole number for each split that is learned from or chosen on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: int = Field(ge=1, description="for learning")
    validation: int = Field(ge=1, description="for choosing")


class AutoDecoRunConfig(TaskConfig, AutoDecoTrainingConfig):
    """Everything that shapes AutoDeco heads."""

    task: str = Field("steps", description="as at the token level: a name of 'rheostat tasks list', or FILE.jsonl")
    model: str = Field("smollm2", description="base model: a name from 'rheostat models list', a folder, or a Hub id")
    engine: EngineName = Field("local", description="what runs the model: local, or vllm (an extra: rheostat[vllm])")
    problems: LearnedSplits = Field(LearnedSplits(train=720, validation=96), description="problems of each split")
    seed: int = Field(0, description="every draw and every initial weight is a function of it")

    @property
    def order(self) -> Order:
        """Of no consequence: answers are drawn without truncation."""
        return Order.VLLM

    @property
    def space(self) -> ActionSpace:
        """What answers are drawn with."""
        return ActionSpace((Strategy(1.0),), self.order)


class EvaluateConfig(TaskConfig):
    """Everything that shapes the numbers of adapters, baselines and strategies judged together."""

    model: str = Field("smollm2", description="base model: a name from 'rheostat models list', a folder, or a Hub id")
    engine: EngineName = Field("local", description="what runs the model: local, or vllm (an extra: rheostat[vllm])")
    strategies: tuple[str, ...] = Field(
        (), description="strategies to measure beside those of the adapters (without adapters: table13)"
    )
    order: Order = Field(Order.VLLM, description="order of the transforms: as vLLM or as transformers applies them")
    budgets: ParallelBudgets | None = Field(
        None, description="parallel budgets B (default: those that the adapters were trained for, else 1 2 4 8)"
    )
    problems: JudgedSplits = Field(
        JudgedSplits(train=900, validation=300, test=1080), description="problems of each split; none of train are read"
    )
    test_from: int = Field(0, ge=0, description="first problem of the test split to judge on, counted from 0")
    samples: Splits = Field(
        Splits(train=8, validation=16, test=16),
        description="completions per problem and strategy, or per policy and budget; none of train are drawn",
    )
    baselines: tuple[Baseline, ...] = Field(
        (), description="rivals to tune on validation and to judge: turn, edt, dynamic (docs/baselines.md)"
    )
    seed: int = Field(0, description="every draw is a function of it")

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluateConfig":
        most = max(self.judged_budgets)
        if self.samples.validation < most:
            raise ValueError(f"samples.validation must be at least the largest budget, {most}")
        if self.samples.test < 2 * most:
            raise ValueError(f"samples.test must be at least twice the largest budget, {2 * most}")
        return self

    @property
    def judged_budgets(self) -> tuple[int, ...]:
        return self.budgets or (1, 2, 4, 8)

    @property
    def space(self) -> ActionSpace:
        return space_named(self.strategies or ("table13",), self.order)


class PolicyRunConfig(TaskConfig):
    """Everything that shapes the numbers of fixed strategies judged as they are."""

    model: str = Field("smollm2", description="base model: a name from 'rheostat models list', a folder, or a Hub id")
    engine: EngineName = Field("local", description="what runs the model: local, or vllm (an extra: rheostat[vllm])")
    strategies: tuple[str, ...] = Field(("greedy",), description="a table of the paper, or strategies like T=0.7,p=0.9")
    order: Order = Field(Order.VLLM, description="order of the transforms: as vLLM or as transformers applies them")
    limit: int = Field(120, ge=1, description="problems of the test split")
    test_from: int = Field(0, ge=0, description="first problem of the test split to judge on, counted from 0")
    samples: int = Field(1, ge=1, description="completions per problem and strategy")
    seed: int = Field(0, description="every draw is a function of it")

    @property
    def space(self) -> ActionSpace:
        return space_named(self.strategies, self.order)


class SelectConfig(TaskConfig):
    """Everything that shapes the choice of an action space."""

    model: str = Field("smollm2", description="base model: a name from 'rheostat models list', a folder, or a Hub id")
    engine: EngineName = Field("local", description="what runs the model: local, or vllm (an extra: rheostat[vllm])")
    candidates: tuple[str, ...] = Field(
        ("grid", "greedy"),
        description="the pool: grid (the 180 of Table 10), greedy, tables of the paper, strategies, FILE.toml",
    )
    order: Order = Field(Order.VLLM, description="order of the transforms: as vLLM or as transformers applies them")
    problems: int = Field(240, ge=4, description="problems of the validation split")
    samples: int = Field(8, ge=1, description="completions per problem and strategy")
    actions: int = Field(6, ge=1, description="strategies to choose")
    parallel_budget: int | None = Field(
        None,
        ge=1,
        description="choose for pass@B instead of the mean reward, cross-fitted over halves of the samples",
    )
    max_rollouts: int | None = Field(None, ge=1, description="halve the pool in rounds to stay below so many rollouts")
    max_time: float | None = Field(None, gt=0, description="the same in minutes, at the rate that a first batch shows")
    seed: int = Field(0, description="every draw is a function of it")

    @model_validator(mode="after")
    def _fits_together(self) -> "SelectConfig":
        if self.parallel_budget is not None and self.samples < 2 * self.parallel_budget:
            raise ValueError(f"samples must be at least twice the parallel budget, {2 * self.parallel_budget}")
        if self.actions > len(self.space):
            raise ValueError(f"actions: there are {len(self.space)} candidates")
        return self

    @property
    def space(self) -> ActionSpace:
        return space_named(self.candidates, self.order)


class DemoConfig(RunConfig):
    """Both levels."""

    strategies: tuple[str, ...] = Field(
        ("demo",),
        description="action space: demo (what 'rheostat select' chose for it), a table of the paper, or strategies",
    )
    problems: Splits = Field(Splits(train=1200, validation=360, test=1200), description="problems of each split")
    token: TokenLevel = Field(
        TokenLevel(
            budgets=(1, 8),
            steps=24,
            validate_every=12,
            problems=Splits(train=240, validation=40, test=160),
        ),
        description="the token level",
    )


Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: it is not there or not TOML; names the file and the line.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path}: {error}") from error


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """``second`` over ``first``; tables that both have are merged field by field."""
    both = dict(first)
    for name, value in second.items():
        has_both = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = merged(both[name], value) if has_both else value
    return both


def build(model: type[Model], fields: dict[str, Any], source: str) -> Model:
    """``model`` from plain fields, with pydantic's complaints as one line that names the field.

    Raises:
        ConfigError: an unknown field or a value outside its range.
    """
    try:
        return model(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = ", ".join(model.model_fields)
            what = f"unknown key; the keys at the top are {known}" if "." not in where else "unknown key"
        raise ConfigError(f"{source}: {where + ': ' if where else ''}{what}") from error
    except RheostatError as error:
        raise ConfigError(f"{source}: {error}") from error
