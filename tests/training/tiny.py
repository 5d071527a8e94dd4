"""A small world whose best policy is known, for tests of token-level training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rheostat.adapters.token import Features, TokenAdapter, TokenConfig
from rheostat.decoding.policy import StepObserver, TokenPolicy
from rheostat.decoding.strategy import ActionSpace, Order, Strategy
from rheostat.engines.base import Request
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.tasks.base import Split
from rheostat.training.token import TokenTraining
from rheostat.training.token_config import Objective, TokenTrainingConfig
from rheostat.types import Completion, Problem, Prompt, Verdict

NEVER = -1e4  # a logit

SPACE = ActionSpace((Strategy(0), Strategy(4.0)))


class TinyTask:
    """An answer is right when it is the problem's; problems named in ``broken`` have no verdict."""

    name = "tiny"

    def __init__(self, max_tokens: int = 2, broken: Sequence[str] = ()) -> None:
        self.max_tokens, self.broken = max_tokens, set(broken)

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        raise NotImplementedError

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        return Prompt(problem.id, problem.question, cot=problem.member == "cot")

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        return Verdict(None if problem.id in self.broken else completion.text == problem.answer)


def tiny_features(text: str, tokens: tuple[int, ...]) -> list[float]:
    """One dimension for each kind of prompt and step, one with the sign of the prompt's number."""
    cell = [0.0] * 4
    cell[2 * (text[0] == "y") + min(len(tokens), 1)] = 1.0
    return [*cell, 0.25 * (-1) ** len(text)]


def tiny_engine(features: Any = tiny_features) -> FakeEngine:
    """Two tokens, the first always more likely; <eos> never comes."""
    return FakeEngine((EOS, "a", "b"), lambda _, __: [NEVER, 1.0, 0.0], features, hidden_size=5)


class CountingEngine:
    """Fails at its ``fails_at``-th call."""

    def __init__(self, fails_at: int | None = None, features: Any = tiny_features) -> None:
        self.engine, self.fails_at, self.calls = tiny_engine(features), fails_at, 0
        self.info = self.engine.info
        self.embed = self.engine.embed

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return self.engine.generate(requests, policy, order, observer)


def problems(count: int, prefix: str = "train", answers: tuple[str, str] = ("ab", "ba")) -> list[Problem]:
    """Prompts of kind x want greedy first and a hot second token; those of kind y the other way round."""
    return [
        Problem(f"{prefix}-{i}", "tiny", "xy"[i % 2], "xy"[i % 2] + "!" * (i // 2 + 1), answers[i % 2])
        for i in range(count)
    ]


CONFIG = TokenTrainingConfig(
    objective=Objective.PASS_1, steps=40, prompts=8, group=16, learning_rate=1e-2, width=16, validate_every=20,
    with_budget=False,
)  # fmt: skip
QUICK = CONFIG.model_copy(update={"steps": 6, "validate_every": 2, "prompts": 4, "group": 8, "passes": 2})


def adapter_for(config: TokenTrainingConfig, seed: int = 0) -> TokenAdapter:
    return TokenAdapter(
        TokenConfig(
            5, Features(config.features), config.with_budget, config.seen_budgets, config.width, 8, config.dropout
        ),
        SPACE,
        seed,
    )


def run_of(folder: Path, config: TokenTrainingConfig = QUICK, **other: Any) -> TokenTraining:
    defaults = TokenTraining(tiny_engine(), TinyTask(), problems(16), problems(8, "validation"), config, folder, 0)
    return replace(defaults, **other)


def same_weights(one: TokenAdapter, other: TokenAdapter) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def without_rates(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
