"""Baselines that are tuned, end to end on the fake engine: what they see, what they choose, and what is kept of it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rheostat.baselines import Baseline
from rheostat.baselines.turn import TEMPERATURES, Aggregation, turning_point
from rheostat.config import EvaluateConfig
from rheostat.console import Console
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.engines.fake import FakeEngine
from rheostat.tasks.base import Split
from rheostat.tasks.choose import TaskChoice, make_task
from rheostat.types import Completion
from rheostat.verbs.judge import Rivals, evaluate

BUDGET, VALIDATION, TEST, SAMPLES = 4, 6, 5, 4
SPLITS = {"train": 1, "validation": VALIDATION, "test": TEST}


class Counting(FakeEngine):
    """Counts what it is asked for; dies (as of Ctrl-C) before call number ``dies``."""

    def __init__(self, dies: int | None = None) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.dies = dies

    def generate(self, requests: Sequence[Request], *rest: Any, **named: Any) -> list[Completion]:
        if len(self.asked) == self.dies:
            raise KeyboardInterrupt
        self.asked.append(len(requests))
        return super().generate(requests, *rest, **named)


def problems(folder: Path, name: str, answer: str = "[1-5]", split: Split | None = None) -> str:
    """Problems that a digit solves; those of ``split`` are solved by ``answer``."""
    file = folder / name / "digits.jsonl"
    file.parent.mkdir()
    rows = [{"id": n, "problem": f"Digit {n}?", "answer": "[1-5]"} for n in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if split is not None:
        task = make_task(TaskChoice(str(file), verifier="regex"))
        own = {problem.id for problem in task.problems(split, SPLITS[split])}
        for row in rows:
            row["answer"] = answer if f"digits/{row['id']}" in own else row["answer"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config(file: str, *baselines: Baseline) -> EvaluateConfig:
    sizes = {"train": 1, "validation": SAMPLES, "test": SAMPLES}
    return EvaluateConfig(
        task=file, verifier="regex", max_tokens=BUDGET, model="fake", strategies=("greedy", "T=1"), budgets=(1, 2),
        problems=SPLITS, samples=sizes, baselines=baselines,
    )  # fmt: skip


def judged(file: str, out: Path, *baselines: Baseline, engine: FakeEngine | None = None) -> dict[str, Any]:
    return evaluate(config(file, *baselines), out, Console(quiet=True), Rivals(), engine or FakeEngine())


def entropy_by_hand(engine: FakeEngine, request: Request, completion: Completion) -> float:
    """Mean over the completion's tokens of the entropy of the tempered distribution."""
    assert request.strategy is not None
    found = []
    for t in range(len(completion.token_ids)):
        logits = engine.logits(request.prompt.text, completion.token_ids[:t]).double() / request.strategy.temperature
        p = [math.exp(x) for x in (logits - logits.logsumexp(0)).tolist()]
        found.append(-sum(share * math.log(share) for share in p if share > 0))
    return sum(found) / len(found)


def test_turn_measures_the_entropy_of_validation_prompts(tmp_path: Path) -> None:
    file, engine = problems(tmp_path, "a"), FakeEngine()
    found = judged(file, tmp_path / "run", Baseline.TURN)["tuned"]["TURN"]
    task = make_task(TaskChoice(file, verifier="regex", max_tokens=BUDGET))
    prompts = [task.prompt(problem) for problem in task.problems(Split.VALIDATION, VALIDATION)]
    for temperature in (0.1, 0.8, 1.4):
        requests = [Request(p, Strategy(temperature), n, 0, BUDGET) for p in prompts for n in range(2)]
        own = [entropy_by_hand(engine, r, c) for r, c in zip(requests, engine.generate(requests), strict=True)]
        assert found["entropy"][TEMPERATURES.index(temperature)] == pytest.approx(sum(own) / len(own), abs=2e-6)
    chosen = turning_point(TEMPERATURES, found["entropy"], Aggregation.BEST_OF_N)
    assert found["chosen"] == f"T = {chosen:g}"


def test_what_turn_measured_is_kept_and_counted(tmp_path: Path) -> None:
    file, out = problems(tmp_path, "a"), tmp_path / "run"
    plain = judged(file, tmp_path / "plain")["counts"]
    engine = Counting()
    first = judged(file, out, Baseline.TURN, engine=engine)
    per_temperature = 2 * VALIDATION
    assert engine.asked[: len(TEMPERATURES)] == [per_temperature] * len(TEMPERATURES)
    extra = Strategy(float(first["tuned"]["TURN"]["chosen"].removeprefix("T = ")))
    assert str(extra) not in ("greedy", "T=1")
    swept = SAMPLES * (VALIDATION + TEST)  # TURN's temperature as a strategy
    assert first["counts"]["rollouts"] == plain["rollouts"] + 14 * per_temperature + swept == sum(engine.asked)

    again = Counting()
    second = judged(file, out, Baseline.TURN, engine=again)
    assert again.asked == []
    assert (second["tuned"], second["counts"]) == (first["tuned"], first["counts"])


def test_killed_at_any_temperature_turn_repeats_that_one_alone(tmp_path: Path) -> None:
    file, out = problems(tmp_path, "a"), tmp_path / "run"
    whole = judged(file, tmp_path / "whole", Baseline.TURN)
    dying = Counting(dies=5)
    with pytest.raises(KeyboardInterrupt):
        judged(file, out, Baseline.TURN, engine=dying)
    damaged = next(iter((out / "turn").glob("*.json")))
    damaged.write_text(damaged.read_text()[:9])
    engine = Counting()
    found = judged(file, out, Baseline.TURN, engine=engine)
    assert engine.asked[: 14 - 4] == [2 * VALIDATION] * (14 - 4)
    assert (found["tuned"], found["counts"], found["rows"]) == (whole["tuned"], whole["counts"], whole["rows"])


def test_another_seed_is_another_measurement(tmp_path: Path) -> None:
    file, out = problems(tmp_path, "a"), tmp_path / "run"
    judged(file, out, Baseline.TURN)
    engine = Counting()
    other = config(file, Baseline.TURN).model_copy(update={"seed": 1})
    evaluate(other, out, Console(quiet=True), Rivals(), engine)
    assert engine.asked[:14] == [2 * VALIDATION] * 14
