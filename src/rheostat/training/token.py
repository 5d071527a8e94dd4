"""Training of token-level adapters: policy gradient on terminal rewards (paper, section 2.3, equation 2)."""

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.adapters.features import weights_key
from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter
from rheostat.decoding.recording import Recorder
from rheostat.engines.base import Engine
from rheostat.errors import RheostatError
from rheostat.rollouts.collect import Crew, policy_device
from rheostat.seeding import derive_seed
from rheostat.statistics import pass_at_k
from rheostat.tasks.base import Task
from rheostat.training.checkpoint import load_checkpoint, save_checkpoint
from rheostat.training.groups import Groups, collect_groups
from rheostat.training.objectives import pass_at_k_advantage
from rheostat.training.token_config import TokenTrainingConfig
from rheostat.training.tracking import Tracker, Tracking
from rheostat.training.update import Lesson, NotFinite, Rank, Update, Updated, Updater, update, weights_of
from rheostat.types import Problem

_MEMORY = 0.9  # of the running mean square of advantages, per batch
_PATIENCE = 10  # batches in a row without reward variance


@dataclass(frozen=True)
class TokenTraining:
    """What a training run works with.

    Attributes:
        train: problems to learn from, filtered by :func:`informative_prompts`.
        validation: problems to choose the weights by; never learned from.
        folder: where checkpoint and metrics go.
        seed: every draw is a function of it.
        updater: makes the updates; None: this process, on the engine's device.
    """

    engine: Engine
    task: Task
    train: Sequence[Problem]
    validation: Sequence[Problem]
    config: TokenTrainingConfig
    folder: Path
    seed: int
    tracking: tuple[Tracking, ...] = ()
    updater: Updater | None = None

    def identity(self, adapter: TokenAdapter) -> str:
        """Everything that shapes the run; ``steps`` does not, so that a run can be made longer."""
        parts = [
            self.config.model_dump(mode="json", exclude={"steps"}),
            self.engine.info.identity,
            [problem.id for problem in self.train],
            [problem.id for problem in self.validation],
            [adapter.config.described(), [strategy.to_dict() for strategy in adapter.space], str(adapter.space.order)],
            self.seed,
            self.task.max_tokens,
            *([] if adapter.start is None else [weights_key("start", adapter.start)]),
        ]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """One line per batch, and the batch whose weights were kept (0: the policy before training).

    ``policy_version`` of a line is the number of the update whose weights sampled its batch.
    """

    lines: list[dict[str, Any]]
    kept_step: int

    @property
    def validation_reward(self) -> float:
        """Of the kept weights."""
        return float(next(line["validation"]["reward"] for line in self.lines if line["step"] == self.kept_step))


def informative_prompts(
    problems: Sequence[Problem], pass_rate_P: Float[np.ndarray, " P"], config: TokenTrainingConfig
) -> list[Problem]:
    """The paper's first stabilisation: training prompts whose initial pass rate lies strictly between the limits.

    Raises:
        RheostatError: none is left.
    """
    kept = [
        problem
        for problem, rate in zip(problems, pass_rate_P.tolist(), strict=True)
        if config.filter_low < rate < config.filter_high
    ]
    if not kept:
        raise RheostatError(
            f"training: none of {len(problems)} prompts has an initial pass rate between {config.filter_low:g} and "
            f"{config.filter_high:g} (their mean is {float(np.mean(pass_rate_P)):.3f}): widen filter_low and "
            "filter_high, raise filter_samples, or take another task"
        )
    return kept


def train_token(
    adapter: TokenAdapter, run: TokenTraining, progress: Callable[[int, int, int], None] | None = None
) -> TokenHistory:
    """Train ``adapter`` in place; it ends with the weights that did best on validation.

    Batch s is sampled from the weights after update max(0, s − 1 − ``staleness``). A crew whose weights may be stale
    samples the next batch while the update is made; everybody else does one after the other, with the same outcome.

    A checkpoint is written after every batch; a run that was interrupted continues from it and ends with the same
    bits on a CPU, because rollouts, prompts and dropout are functions of the seed and the batch's number.

    Raises:
        RheostatError: a loss or gradient that is not finite, or ten batches in a row without reward variance; the
            checkpoint of the last good batch stays.
        StoreError: a checkpoint of another run, or a disk that refuses.
    """
    trainer = _Trainer(adapter, run)
    tracker = Tracker(run.folder, run.tracking, trainer.lines)
    try:
        if not trainer.lines:
            trainer.begin()
            tracker.log(trainer.lines[-1])
        while trainer.step < run.config.steps:
            trainer.advance()
            tracker.log(trainer.lines[-1])
            if progress:
                progress(trainer.step, run.config.steps, trainer.tokens)
    finally:
        tracker.close()
    adapter.load_state_dict(trainer.best)
    adapter.eval()
    return TokenHistory(trainer.lines, trainer.kept)


@dataclass(frozen=True, slots=True)
class _Sampled:
    """A batch, the version of the weights that it was drawn from, and how long that took."""

    groups: Groups
    version: int
    seconds: float


class _Trainer:
    """The loop's state: what a checkpoint holds."""

    def __init__(self, adapter: TokenAdapter, run: TokenTraining) -> None:
        self.run, self.config = run, run.config
        self.adapter = adapter.to(policy_device(run.engine))
        self.policy = AdaptiveDecoding(copy.deepcopy(self.adapter).eval())  # of whichever version is sampled from
        self.optimizer: dict[str, Any] = {}
        self.path = run.folder / "checkpoint.pt"
        self.identity = run.identity(adapter)
        self.lines: list[dict[str, Any]] = []
        self.step = self.kept = self.idle = self.tokens = 0
        self.is_fitted = False
        self.mean_squares: dict[str, float] = {}  # of the advantages at each parallel budget, running
        self.best = weights_of(self.adapter)
        self.versions = {0: self.best}  # weights after update 0, 1, …: those that batches to come are drawn from
        self.ahead: _Sampled | None = None  # the next batch, where it was sampled during an update
        self._load()

    def _load(self) -> None:
        state = load_checkpoint(self.path, self.identity)
        if state is None:
            return
        self.optimizer, self.best = state["optimizer"], state["best"]
        self.lines = json.loads(state["lines"])
        self.mean_squares = json.loads(state["mean_squares"])
        for name in ("step", "kept", "idle", "is_fitted"):
            setattr(self, name, state[name])
        self.versions = {self.step - age: weights for age, weights in enumerate(reversed(state["versions"]))}
        self.adapter.load_state_dict(self.versions[self.step])

    def _save(self) -> None:
        save_checkpoint(
            self.path,
            self.identity,
            {
                "versions": [self.versions[version] for version in sorted(self.versions)],
                "optimizer": self.optimizer,
                "best": self.best,
                "lines": json.dumps(self.lines),
                "mean_squares": json.dumps(self.mean_squares),
                **{name: getattr(self, name) for name in ("step", "kept", "idle", "is_fitted")},
            },
        )

    def begin(self) -> None:
        """Look at the validation problems before anything was learned."""
        self.lines.append({"step": 0, "policy_version": 0, "validation": self._validate()})
        self._save()

    def advance(self) -> None:
        """One batch: rollouts, update, and where due a look at the validation problems."""
        self.step += 1
        sampled, self.ahead = self.ahead or self._sample(self.step), None
        groups = sampled.groups
        self.tokens += groups.tokens
        line: dict[str, Any] = {"step": self.step, "policy_version": sampled.version}
        line |= describe(groups, self.adapter)
        line["tokens_per_second"] = round(groups.tokens / sampled.seconds, 1)
        line["learning_rate"] = self._learning_rate
        line |= self._learn(groups)
        self.versions[self.step] = weights_of(self.adapter)
        self.versions = {v: w for v, w in self.versions.items() if v >= self._version(self.step + 1)}
        self.lines.append(line)
        if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
            line["validation"] = self._validate()
            best = max(old["validation"]["reward"] for old in self.lines[:-1] if "validation" in old)
            if line["validation"]["reward"] > best:
                self.kept, self.best = self.step, self.versions[self.step]
        self._save()

    @property
    def _learning_rate(self) -> float:
        return self.config.learning_rate * self.config.decay ** (self.step - 1)

    def _version(self, step: int) -> int:
        """The update whose weights sample a batch."""
        return max(0, step - 1 - self.config.staleness)

    def _sample(self, step: int) -> _Sampled:
        start, version = time.perf_counter(), self._version(step)
        self.policy.adapter.load_state_dict(self.versions[version])
        groups = self._rollouts(step)
        return _Sampled(groups, version, time.perf_counter() - start)

    def _rollouts(self, step: int) -> Groups:
        config, seed = self.config, self.run.seed
        epoch, problems = self._problems(step)
        draw = np.random.default_rng(derive_seed(seed, "budgets", step))
        budgets = draw.choice(config.seen_budgets or (1,), size=min(config.prompts, len(self.run.train)))
        return collect_groups(
            self.run.engine,
            self.run.task,
            problems,
            self.policy,
            self.adapter.space.order,
            torch.from_numpy(budgets),
            config.group,
            step * config.group,
            derive_seed(seed, "training"),
            Recorder(self.adapter.space.order, config.mask_above),
            epoch,
        )

    def _problems(self, step: int) -> tuple[int, list[Problem]]:
        """The epoch, and the batch's problems: consecutive ones of a permutation that every epoch draws anew."""
        problems, size = self.run.train, min(self.config.prompts, len(self.run.train))
        batches = len(problems) // size
        epoch, batch = divmod(step - 1, batches)
        order = np.random.default_rng(derive_seed(self.run.seed, "order", epoch)).permutation(len(problems))
        return epoch, [problems[index] for index in order[batch * size : (batch + 1) * size]]

    def _learn(self, groups: Groups) -> dict[str, Any]:
        """Update the weights by one batch; returns what the metrics say about it."""
        lesson = self._lesson(groups)
        if isinstance(lesson, str):
            return self._skip(lesson)
        self.idle = 0
        seeds = tuple(derive_seed(self.run.seed, "dropout", self.step, n) for n in range(self.config.passes))
        judged = int((~groups.reward_PG.isnan().any(1)).sum()) * self.config.group
        tokens = len(lesson.steps)
        job = Update(self.adapter, self.optimizer, self.config, judged, tokens, self._learning_rate, seeds)
        try:
            updated = self._updated(job, lesson)
        except NotFinite as error:
            raise RheostatError(
                f"training: {error} at step {self.step}; lower learning_rate (now {self.config.learning_rate:g}) and "
                f"start again in another folder; {self.path} holds the state before it"
            ) from None
        self.adapter.load_state_dict(updated.weights)
        self.optimizer = updated.optimizer
        return updated.metrics

    def _updated(self, job: Update, lesson: Lesson) -> Updated:
        """The update; meanwhile a crew samples the next batch, if its weights are there."""
        make = self.run.updater or partial(update, rank=Rank(device=policy_device(self.run.engine)))
        if not (isinstance(self.run.engine, Crew) and self.config.staleness and self.step < self.config.steps):
            return make(job, lesson)
        # It is the update that has a thread of its own: Ctrl-C reaches this one, and sampling takes longer. Whatever
        # happens here, the update is waited for: it draws dropout from the process's generator, as the next one will.
        with ThreadPoolExecutor(1) as thread:
            made = thread.submit(make, job, lesson)
            self.ahead = self._sample(self.step + 1)
            return made.result()

    def _lesson(self, groups: Groups) -> Lesson | str:
        """What a batch teaches; or why it teaches nothing."""
        steps = groups.steps
        if steps is not None and not self.is_fitted and self.adapter.standardizer is not None:
            # The first batch is drawn from the uniform policy, whatever the features are.
            self.adapter.standardizer.fit(steps.hidden_NH.float())
            self.is_fitted = True
        judged_P = ~groups.reward_PG.isnan().any(1)  # a group with a missing verdict has no unbiased advantage
        advantage_PG = pass_at_k_advantage(groups.reward_PG.nan_to_num(), groups.budget_P) * judged_P[:, None]
        if steps is not None:
            steps = steps[judged_P[steps.request_N // self.config.group]]
        if not bool(judged_P.any()):
            return "no group has all its verdicts"
        if not bool((advantage_PG != 0).any()):
            return "no reward variance"
        if steps is None or not len(steps):
            return "every token is masked"
        scaled_PG = self._scaled(advantage_PG, groups.budget_P, judged_P)
        return Lesson(steps, scaled_PG.flatten()[steps.request_N], groups.start_RA)

    def _scaled(self, advantage_PG: Tensor, budget_P: Tensor, judged_P: Tensor) -> Tensor:
        """Advantages over the running root mean square of their parallel budget.

        pass@B of a hard problem has advantages up to B, pass@1 below 1: unscaled, large budgets would drown small ones.
        A policy that sees B can answer for each by itself, so that a scale for each moves its optimum only through the
        weight that β has beside it. The scale is that
        of earlier batches (of this one, where there are none), so that it does not depend on what it scales.
        """
        scaled_PG = torch.zeros_like(advantage_PG)
        for budget in sorted(set(budget_P[judged_P].tolist())):
            own_P, name = judged_P & (budget_P == budget), str(budget)
            now = float(advantage_PG[own_P].square().mean())
            before = self.mean_squares.get(name) or now
            if before:
                scaled_PG[own_P] = advantage_PG[own_P] / math.sqrt(before)
                self.mean_squares[name] = _MEMORY * before + (1 - _MEMORY) * now
        return scaled_PG

    def _skip(self, reason: str) -> dict[str, Any]:
        self.idle += 1
        if self.idle >= _PATIENCE:
            raise RheostatError(
                f"training: {_PATIENCE} batches in a row taught nothing, the last because: {reason}; "
                "take prompts of middling difficulty (filter_low, filter_high), or raise group or "
                "prompts"
            )
        return {"skipped": reason}

    def _validate(self) -> dict[str, Any]:
        """Mean unbiased pass@B over validation problems and budgets, from the same streams at every look."""
        self.policy.adapter.load_state_dict(self.versions[self.step])
        rewards, parts = {}, []
        for budget in self.config.seen_budgets or (1,):
            groups = collect_groups(
                self.run.engine,
                self.run.task,
                self.run.validation,
                self.policy,
                self.adapter.space.order,
                torch.full((len(self.run.validation),), budget),
                max(budget, self.config.validation_samples),
                0,
                derive_seed(self.run.seed, "validation"),
            )
            parts.append(groups)
            rewards[str(budget)] = _pass_at(groups, budget)
        reward_P = np.mean(list(rewards.values()), axis=0)
        cot_P = parts[0].cot_P.numpy()
        shown = {"reward": float(reward_P.mean()), "by_budget": {b: float(r.mean()) for b, r in rewards.items()}}
        if cot_P.any() and not cot_P.all():
            shown |= {"reward_cot": float(reward_P[cot_P].mean()), "reward_direct": float(reward_P[~cot_P].mean())}
        return shown


def _pass_at(groups: Groups, budget: int) -> Float[np.ndarray, " P"]:
    right_PG = groups.reward_PG.nan_to_num().long().numpy()
    return pass_at_k(right_PG.sum(1), right_PG.shape[1], budget)


def describe(groups: Groups, adapter: TokenAdapter) -> dict[str, Any]:
    """What a batch's metrics say about its rollouts; action shares are over recorded tokens, by prompt style too."""
    steps, actions = groups.steps, len(adapter.space)
    metrics: dict[str, Any] = {
        "reward": None if bool(groups.reward_PG.isnan().all()) else float(groups.reward_PG.nanmean()),
        "without_verdict": int(groups.reward_PG.isnan().sum()),
        "length": float(groups.length_PG.float().mean()),
        "truncated": float(groups.truncated_PG.float().mean()),
        "rollouts": groups.rollouts,
        "tokens": groups.tokens,
        "recorded": 0 if steps is None else len(steps),
    }
    if steps is None:
        return metrics
    cot_N = groups.cot_P[steps.request_N // groups.reward_PG.shape[1]]
    for name, own_N in (("actions", torch.ones_like(cot_N)), ("actions_cot", cot_N), ("actions_direct", ~cot_N)):
        if bool(own_N.any()) and (name == "actions" or not bool(own_N.all())):
            counts = torch.bincount(steps.action_N[own_N], minlength=actions).float()
            metrics[name] = [round(share, 6) for share in (counts / counts.sum()).tolist()]
    return metrics
