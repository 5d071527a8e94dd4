"""Baselines that are tuned, end to end on the fake engine: what they see, what they choose, and what is kept of it."""

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rheostat.baselines import Baseline
from rheostat.baselines.dynamic_temperature import DynamicTemperature
from rheostat.baselines.edt import EntropyBasedTemperature
from rheostat.baselines.turn import TEMPERATURES, Aggregation, turning_point
from rheostat.config import EvaluateConfig
from rheostat.console import Console
from rheostat.decoding.policy import NamedPolicy
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


def problems(folder: Path, name: str, answer: str = "^[1-3]", split: Split | None = None) -> str:
    """Problems with one answer, a pattern; those of ``split``, if it is given, have ``answer``."""
    file = folder / name / "digits.jsonl"
    file.parent.mkdir()
    rows = [{"id": n, "problem": f"Digit {n}?", "answer": "^[1-3]"} for n in range(80)]
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
    best, voting = (turning_point(TEMPERATURES, found["entropy"], own) for own in Aggregation)
    assert (found["chosen"], found["majority"]) == (f"T = {best:g}", f"T = {voting:g}")


def test_votes_are_cast_at_the_temperature_for_votes(tmp_path: Path) -> None:
    """TURN's pass@k is that of its temperature for best-of-N, its maj@k that of the one a tenth below."""
    file = problems(tmp_path, "a", "3", Split.TEST)
    digits = config(file, Baseline.TURN).model_copy(update={"verifier": "exact", "max_tokens": 1})
    results = evaluate(digits, tmp_path / "run", Console(quiet=True), Rivals(), FakeEngine())
    found = results["tuned"]["TURN"]
    best, voting = (found[name].replace("T = ", "T=") for name in ("chosen", "majority"))
    assert best != voting
    for table, own in ((results["rows"], best), (results["majority"]["rows"], voting)):
        values = {(row["policy"], row["k"]): row["estimate"] for row in table}
        assert {values["TURN", k] - values[own, k] for k in (1, 2, "mean")} == {0}
        assert any(values["TURN", k] != values[{best: voting, voting: best}[own], k] for k in (1, 2))


def test_what_turn_measured_is_kept_and_counted(tmp_path: Path) -> None:
    file, out = problems(tmp_path, "a"), tmp_path / "run"
    plain = judged(file, tmp_path / "plain")["counts"]
    engine = Counting()
    first = judged(file, out, Baseline.TURN, engine=engine)
    per_temperature = 2 * VALIDATION
    assert engine.asked[: len(TEMPERATURES)] == [per_temperature] * len(TEMPERATURES)
    extra = {first["tuned"]["TURN"][name].replace("T = ", "T=") for name in ("chosen", "majority")} - {"greedy", "T=1"}
    swept = len(extra) * SAMPLES * (VALIDATION + TEST)  # TURN's temperatures as strategies
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
    assert json.loads((out / "unfinished.json").read_text()) == config(file, Baseline.TURN).model_dump(mode="json")
    damaged = next(iter((out / "turn").glob("*.json")))
    damaged.write_text(damaged.read_text()[:9])
    engine = Counting()
    found = judged(file, out, Baseline.TURN, engine=engine)
    assert engine.asked[: 14 - 4] == [2 * VALIDATION] * (14 - 4)
    assert (found["tuned"], found["counts"], found["rows"]) == (whole["tuned"], whole["counts"], whole["rows"])
    assert not (out / "unfinished.json").exists()


# --- Chosen on validation, and on nothing else ---


def value_by_hand(engine: FakeEngine, task: Any, policy: NamedPolicy) -> float:
    """pass@1 and pass@2 of a policy on the validation problems, averaged: pairs of samples, one by one."""
    found = []
    for problem in task.problems(Split.VALIDATION, VALIDATION):
        requests = [Request(task.prompt(problem), None, n, 0, BUDGET) for n in range(SAMPLES)]
        right = [re.search(problem.answer, c.text) is not None for c in engine.generate(requests, policy)]
        pairs = [any(pair) for pair in itertools.combinations(right, 2)]
        found.append((sum(right) / len(right) + sum(pairs) / len(pairs)) / 2)
    return sum(found) / len(found)


def test_settings_are_valued_on_validation_problems(tmp_path: Path) -> None:
    file, engine = problems(tmp_path, "a"), FakeEngine()
    tuned = judged(file, tmp_path / "run", Baseline.EDT, Baseline.DYNAMIC)["tuned"]
    task = make_task(TaskChoice(file, verifier="regex", max_tokens=BUDGET))
    some: dict[str, dict[str, NamedPolicy]] = {
        "EDT": {
            "T0 = 0.5, θ = 0.1": EntropyBasedTemperature(0.5, 0.1),
            "T0 = 1.5, θ = 1": EntropyBasedTemperature(1.5, 1),
        },
        "dynamic temperature": {
            "T = 0 to 1, e = 1": DynamicTemperature(0, 1),
            "T = 0.5 to 1.5, e = 0.5,k=40,p=0.95,m=0.05": DynamicTemperature(
                0.5, 1.5, 0.5, Strategy(top_k=40, top_p=0.95, min_p=0.05)
            ),
        },
    }
    for name, settings in some.items():
        values = tuned[name]["validation"]
        for setting, policy in settings.items():
            assert values[setting] == pytest.approx(value_by_hand(engine, task, policy), abs=2e-6)
        assert len(set(values.values())) > 3
        assert values[tuned[name]["chosen"]] == max(values.values())


def test_answers_of_test_problems_choose_nothing_and_turn_sees_no_answers_at_all(tmp_path: Path) -> None:
    every = (Baseline.TURN, Baseline.EDT, Baseline.DYNAMIC)
    found = {
        name: judged(problems(tmp_path, name, "^8", split), tmp_path / name / "run", *every)
        for name, split in (("plain", None), ("other tests", Split.TEST), ("other validation", Split.VALIDATION))
    }
    tuned = {name: results["tuned"] for name, results in found.items()}
    assert tuned["other tests"] == tuned["plain"]
    assert found["other tests"]["rows"] != found["plain"]["rows"]
    assert tuned["other validation"]["TURN"] == tuned["plain"]["TURN"]
    for name in ("EDT", "dynamic temperature"):
        assert tuned["other validation"][name]["validation"] != tuned["plain"][name]["validation"]


def test_another_seed_is_another_measurement(tmp_path: Path) -> None:
    file, out = problems(tmp_path, "a"), tmp_path / "run"
    judged(file, out, Baseline.TURN)
    engine = Counting()
    other = config(file, Baseline.TURN).model_copy(update={"seed": 1})
    evaluate(other, out, Console(quiet=True), Rivals(), engine)
    assert engine.asked[:14] == [2 * VALIDATION] * 14
