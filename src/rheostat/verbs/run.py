"""What every command works with: engine, task, store, console, and where results go."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.adapters.files import BaseModel
from rheostat.adapters.sequence import SequenceConfig
from rheostat.config import (
    AutoDecoRunConfig,
    EngineName,
    EvaluateConfig,
    PolicyRunConfig,
    RunConfig,
    SelectConfig,
    TokenRunConfig,
)
from rheostat.console import Console
from rheostat.decoding.policy import NamedPolicy
from rheostat.decoding.strategy import ActionSpace
from rheostat.engines import models
from rheostat.engines.base import Engine, EngineInfo
from rheostat.engines.fake import FakeEngine
from rheostat.engines.local import LocalEngine
from rheostat.engines.machine import use_usable_cores
from rheostat.environment import machine, versions
from rheostat.errors import ConfigError
from rheostat.files import atomic_write, make_folder
from rheostat.reports.folders import FORMAT, UNFINISHED
from rheostat.reports.page import write_report
from rheostat.rollouts.store import RolloutStore
from rheostat.rollouts.sweep import PolicySweep, Sweep, sweep, sweep_policy
from rheostat.statistics import mean_interval
from rheostat.tasks.base import Split, Task
from rheostat.tasks.choose import make_task, with_chat
from rheostat.tasks.prompts import Chat
from rheostat.training.prompts import represent
from rheostat.types import Problem

Config = RunConfig | TokenRunConfig | AutoDecoRunConfig | PolicyRunConfig | SelectConfig | EvaluateConfig

WITH_BUDGET, WITHOUT_BUDGET = "adapter with budget", "adapter without budget"


_KINDS = {
    "sequence": "an evaluation",
    "token": "an evaluation",
    "policies": "fixed strategies (evaluate --policy)",
    "selection": "a selection",
}


def require_own_results(out: Path, kind: str) -> None:
    """Refuse a folder whose ``results.json`` is of another kind than the one that is about to be written.

    Raises:
        ConfigError: it is.
    """
    path = out / "results.json"
    try:
        found = json.loads(path.read_text()).get("kind")
    except (OSError, ValueError, AttributeError):  # not there, or nothing to lose
        return
    if _KINDS.get(found, found) != _KINDS[kind]:
        raise ConfigError(f"{path} holds {_KINDS.get(found, found)}, not {_KINDS[kind]}: choose another --out")


def open_engine(model: str, engine: EngineName = "local") -> Engine:
    """The engine of a model name, folder or Hub id; ``fake`` needs no weights.

    Raises:
        ModelError: no such model.
        ConfigError: vLLM is wanted, and not installed or of an unsupported version.
    """
    if model == "fake":
        return FakeEngine()
    if engine == "vllm":
        from rheostat.engines.vllm import VllmEngine

        return VllmEngine(models.locate(model), name=model)
    use_usable_cores()
    return LocalEngine(models.locate(model), name=model)


def base_of(info: EngineInfo) -> BaseModel:
    """The base model as adapter files name it."""
    return BaseModel(info.model, None, info.hidden_size, info.fingerprint)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a run sampled, or found in its folder.

    Attributes:
        rollouts: completions.
        in_this_run: how many of them were sampled in this run.
        tokens: of all.
        truncated: how many ended at the token budget.
        missing: how many have no verdict.
        seconds: what sampling and judging took, in whichever run it was; None: not known of all.
    """

    rollouts: int
    in_this_run: int
    tokens: int
    truncated: int
    missing: int
    seconds: float | None

    @classmethod
    def of(cls, sweep: Sweep | PolicySweep, in_this_run: int) -> Self:
        counts = (sweep.tokens, sweep.truncated, sweep.missing)
        return cls(sweep.sampled, in_this_run, *counts, None if sweep.seconds is None else round(sweep.seconds, 6))


@dataclass
class Run:
    """One level of one command. Two levels of a command share engine, store and console.

    Attributes:
        wall_seconds: what each phase took in this run.
        sampled: what was sampled, in this run or in an earlier one.
    """

    config: Config
    out: Path
    engine: Engine
    task: Task
    store: RolloutStore
    console: Console
    splits: Mapping[Split, list[Problem]]
    wall_seconds: dict[str, float] = field(default_factory=dict)
    sampled: dict[str, Sampled] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.wall_seconds[name] = self.wall_seconds.get(name, 0) + round(time.perf_counter() - start, 3)

    @property
    def milliseconds_per_token(self) -> dict[str, float]:
        """Of everything sampled whose time is known, judging included, in whichever run it was."""
        known = {what: (item.seconds, item.tokens) for what, item in self.sampled.items()}
        return {what: round(1000 * s / tokens, 4) for what, (s, tokens) in known.items() if s is not None and tokens}

    def sweep(self, split: Split, space: ActionSpace, samples: int) -> Sweep:
        """Every strategy on every problem of a split, from the store where it is there."""
        problems = self.splits[split]
        total = len(problems) * len(space) * samples
        before, title = len(self.store), f"rollouts for {split}"
        with self.phase(f"rollouts {split}"), self.console.progress(title, total, "tokens") as bar:
            result = sweep(self.engine, self.task, problems, space, samples, self.config.seed, self.store, bar)
        self.sampled[f"strategies on {split}"] = Sampled.of(result, len(self.store) - before)
        return result

    def embed(self, problems: Sequence[Problem], reads: SequenceConfig) -> Float[Tensor, "P H"]:
        """What a sequence-level adapter reads of the problems' prompts."""
        chunks = []
        with self.phase("embeddings"), self.console.progress("prompt embeddings", len(problems), "") as bar:
            for start in range(0, len(problems), 128):
                prompts = [self.task.prompt(problem) for problem in problems[start : start + 128]]
                chunks.append(represent(self.engine, prompts, reads))
                bar(start + len(prompts), len(problems), 0)
        return torch.cat(chunks)

    def sample(
        self, what: str, problems: Sequence[Problem], policy: NamedPolicy, budget: int, samples: int
    ) -> PolicySweep:
        """A token policy's completions under B = ``budget``, from the store where they are there."""
        before, order, seed = len(self.store), self.config.order, self.config.seed
        with self.phase(f"rollouts {what}"), self.console.progress(what, len(problems) * samples, "tokens") as bar:
            result = sweep_policy(
                self.engine, self.task, problems, policy, order, budget, samples, seed, self.store, bar
            )
        self.sampled[what] = Sampled.of(result, len(self.store) - before)
        return result

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Leave a note in the folder until results are there: those that it may hold meanwhile are an earlier run's."""
        note = self.out / UNFINISHED
        atomic_write(note, self.config.model_dump_json(indent=1))
        yield
        note.unlink(missing_ok=True)

    def write(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write ``results.json`` and ``report.html``."""
        atomic_write(self.out / "results.json", json.dumps(results, indent=1))
        write_report(results, self.out / "report.html")
        return results

    def facts(self) -> dict[str, object]:
        """What results say about the run itself."""
        return {
            "format": FORMAT,
            "model": self.engine.info.to_dict(),
            "task": self.config.task,
            "members": list(dict.fromkeys(problem.member for problem in [*self.splits.values()][-1])),
            "order": str(self.config.order),
            "strategies": [str(strategy) for strategy in self.config.space],
            "splits": {str(split): _identity(problems) for split, problems in self.splits.items()},
            "seeds": {"run": self.config.seed},
            "versions": versions(),
            "machine": machine(),
            "counts": {
                "rollouts": sum(item.rollouts for item in self.sampled.values()),
                "tokens": sum(item.tokens for item in self.sampled.values()),
                "truncated": sum(item.truncated for item in self.sampled.values()),
                "without_verdict": sum(item.missing for item in self.sampled.values()),
            },
            "sampled": {what: asdict(item) for what, item in self.sampled.items()},
        }

    def bounds(self, on_test: Sweep, budgets: tuple[int, ...]) -> dict[str, object]:
        """The mean over strategies with missing verdicts counted wrong and right; empty where none is missing."""
        if not any(item.missing for item in self.sampled.values()):
            return {}
        missing = {"missing_wrong": 0.0, "missing_right": 1.0}
        return {
            "bounds": {
                str(k): {
                    name: mean_interval(on_test.pass_at(k, missing_is=value).mean(1)).estimate
                    for name, value in missing.items()
                }
                for k in budgets
            }
        }


def _identity(problems: Sequence[Problem]) -> dict[str, object]:
    """How many problems a split has, and a hash that tells whether two runs had the same ones."""
    ids = "\0".join(f"{problem.id}\0{problem.question}" for problem in problems)
    return {"n": len(problems), "hash": hashlib.sha256(ids.encode()).hexdigest()[:16]}


def pose(config: Config, splits: Sequence[Split] = tuple(Split)) -> tuple[Task, dict[Split, list[Problem]]]:
    """The task and its problems, those splits at once: what cannot be had is refused before anything is paid for.

    Raises:
        ConfigError: no such task, or a split that holds fewer problems.
    """
    task = make_task(config.task_choice(config.seed))
    if isinstance(config, PolicyRunConfig):
        return task, {Split.TEST: task.problems(Split.TEST, config.limit, config.test_from)}
    if isinstance(config, SelectConfig):
        return task, {Split.VALIDATION: task.problems(Split.VALIDATION, config.problems)}
    if isinstance(config, AutoDecoRunConfig):
        learned = (Split.TRAIN, Split.VALIDATION)
        return task, {split: task.problems(split, getattr(config.problems, split.value)) for split in learned}
    start = {Split.TEST: config.test_from}
    return task, {s: task.problems(s, getattr(config.problems, s.value), start.get(s, 0)) for s in splits}


def _require_thinking(config: Config, engine: Engine) -> None:
    chat = _chat(engine)
    if config.thinking and (chat is None or not chat.can_think):
        raise ConfigError(f"thinking: the model {config.model!r} has no chat template that knows it; leave it out")


def _chat(engine: Engine) -> Chat | None:
    """The chat template of an engine's model, as tasks use it."""
    template = engine.chat_template
    return None if template is None else Chat(engine.chat_text, "enable_thinking" in template)


@contextmanager
def open_run(
    config: Config,
    out: Path,
    console: Console,
    engine: Engine | None = None,
    store: RolloutStore | None = None,
    splits: Sequence[Split] = tuple(Split),
) -> Iterator[Run]:
    """A run in folder ``out``, whose store is locked until it ends; ``store`` is one that is open already."""
    start = time.perf_counter()
    task, problems = pose(config, splits)
    out = make_folder(out)
    if store is not None:
        assert engine is not None, "who shares a store shares an engine"
        yield Run(config, out, engine, with_chat(task, _chat(engine)), store, console, problems)
        return
    with RolloutStore(out / "rollouts") as opened:
        engine = engine or open_engine(config.model, config.engine)
        _require_thinking(config, engine)
        run = Run(config, out, engine, with_chat(task, _chat(engine)), opened, console, problems)
        run.wall_seconds["set-up"] = round(time.perf_counter() - start, 3)
        yield run
