"""The search for an action space: its rounds, what it keeps, what it writes, on the fake engine."""

import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rheostat.cli import main
from rheostat.config import SelectConfig
from rheostat.console import Console
from rheostat.decoding.selection import Candidates
from rheostat.decoding.spaces import read_space, space_named
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import Request
from rheostat.engines.fake import FakeEngine
from rheostat.errors import ConfigError, RheostatError, StoreError
from rheostat.rollouts.store import RolloutStore
from rheostat.tasks.base import Split
from rheostat.tasks.choose import TaskChoice, make_task
from rheostat.verbs.select import Round, rollouts_of, rounds_of, select, worth_keeping

POOL = ("greedy", "T=0.5", "T=1", "T=1,k=2", "T=1,p=0.5", "T=2", "T=2,k=3", "T=4")


@pytest.fixture
def task(tmp_path: Path) -> str:
    """Questions whose answer is what the fake engine writes under one of several strategies."""
    path = tmp_path / "own.jsonl"
    questions = [{"id": f"q{number}", "problem": f"question {number}", "answer": "?"} for number in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in questions))
    asked = make_task(TaskChoice(str(path), verifier="exact", max_tokens=2))
    prompts = [asked.prompt(problem) for problem in asked.problems(Split.VALIDATION, 32)]
    requests = [Request(prompt, Strategy.parse(POOL[number % 3]), 0, 0, 2) for number, prompt in enumerate(prompts)]
    written = {r.prompt.problem_id: c.text for r, c in zip(requests, FakeEngine().generate(requests), strict=True)}
    for row in questions:
        row["answer"] = written.get(f"own/{row['id']}", "").strip() or "?"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions))
    return str(path)


def config(task: str, **fields: object) -> SelectConfig:
    chosen = {"verifier": "exact", "candidates": POOL, "problems": 32, "samples": 4, "actions": 3} | fields
    return SelectConfig(model="fake", task=task, max_tokens=2, **chosen)  # type: ignore[arg-type]


@given(st.integers(8, 200), st.integers(8, 300), st.integers(1, 16), st.integers(1, 4), st.integers(500, 500_000))
def test_rounds_keep_to_what_is_allowed(strategies: int, problems: int, samples: int, actions: int, most: int) -> None:
    try:
        plan = rounds_of(strategies, problems, samples, actions, most)
    except ConfigError:
        assume(False)
    assert rollouts_of(plan) <= most
    if strategies * problems * samples <= most:
        assert plan == [Round(strategies, problems, samples)]
    cells = [item.problems * item.samples for item in plan]
    assert cells == sorted(cells)
    assert all(a.problems <= b.problems and a.samples <= b.samples for a, b in pairwise(plan))
    assert plan[-1].problems <= problems
    assert plan[-1].samples <= max(samples, 1)
    assert plan[-1].strategies >= min(2 * actions, strategies)


def test_the_whole_sweep_costs_what_it_costs() -> None:
    assert rounds_of(181, 240, 8, 6, None) == [Round(181, 240, 8)]
    assert rollouts_of([Round(181, 240, 8)]) == 181 * 240 * 8
    assert rollouts_of([Round(8, 10, 2), Round(4, 20, 2), Round(2, 20, 4)]) == 8 * 20 + 4 * 20 + 2 * 40


def test_what_complements_is_kept_before_what_is_good() -> None:
    """One strategy solves the few problems that no other does; the rest are near copies of the best."""
    strategies = tuple(Strategy(1 + number / 10) for number in range(8))
    rewards_PAS = np.zeros((100, 8, 4))
    rewards_PAS[:80, :7] = 1
    for copy in range(1, 7):
        rewards_PAS[copy, copy] = 0
    rewards_PAS[90:, 7] = 1
    kept = worth_keeping(Candidates.of(rewards_PAS, strategies), actions=1, count=2)
    assert kept == [0, 7]


def test_a_selection_is_written_and_can_be_trained_on(task: str, tmp_path: Path) -> None:
    results = select(config(task), tmp_path / "run", Console(quiet=True), FakeEngine())
    written = tmp_path / "run" / "action_space.toml"
    space = read_space(written)
    assert [str(strategy) for strategy in space] == results["greedy"]["strategies"]
    assert space_named([str(written)], Order.VLLM) == space
    content = tomllib.loads(written.read_text())["provenance"]
    assert (content["problems"], content["samples"], content["rollouts"]) == (32, 4, 8 * 32 * 4)
    assert results["greedy"]["coverage"] == sorted(results["greedy"]["coverage"])
    assert len(results["held_out"]["greedy"]) == 3
    assert json.loads((tmp_path / "run" / "results.json").read_text())["greedy"] == results["greedy"]
    with pytest.raises(ConfigError, match="chosen under order vllm; set order to that"):
        space_named([str(written)], Order.TRANSFORMERS)


def test_interrupted_and_continued_is_undisturbed(task: str, tmp_path: Path) -> None:
    class Stops(FakeEngine):
        calls = 0

        def generate(self, *arguments: object, **named: object) -> list[object]:  # type: ignore[override]
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().generate(*arguments, **named)  # type: ignore[arg-type, return-value]

    asked = config(task, max_rollouts=800, actions=2)
    whole = select(asked, tmp_path / "whole", Console(quiet=True), FakeEngine())
    assert len(whole["plan"]) > 1
    with pytest.raises(KeyboardInterrupt):
        select(asked, tmp_path / "broken", Console(quiet=True), Stops())
    again = select(asked, tmp_path / "broken", Console(quiet=True), FakeEngine())
    for name in ("greedy", "top", "held_out", "plan", "heat", "chosen_in_resamples"):
        assert again[name] == whole[name], name


def test_the_cross_fitted_objective(task: str, tmp_path: Path) -> None:
    results = select(config(task, parallel_budget=2), tmp_path / "run", Console(quiet=True), FakeEngine())
    assert results["objective"] == "pass@2"
    assert len(results["greedy"]["held_out"]) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--actions", "9", "--candidates", "table13"], "there are 6 candidates"),
        (["--candidates", "greedy", "greedy"], "'greedy' is listed twice"),
        (["--candidates", "missing.toml"], "missing.toml: cannot be read"),
        (["--parallel-budget", "8", "--samples", "8"], "samples must be at least twice the parallel budget, 16"),
        (["--max-rollouts", "10"], "max_rollouts: 10 are too few"),
        (["--task", "chess"], "unknown task 'chess'"),
        (["--problems", "9"], "multiples of its 6 members"),
    ],
)
def test_bad_input_is_one_line(words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["select", "--model", "fake", "--problems", "12", *words, "--out", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert told in line


def test_a_grid_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pool.toml"
    path.write_text('order = "transformers"\n[grid]\ntemperature = [0.5, 1.0]\ntop_k = [0, 5]\nmin_p = [0, 0.1]\n')
    space = read_space(path)
    assert (len(space), space.order) == (8, Order.TRANSFORMERS)
    assert Strategy(0.5, 5, None, 0.1) in space.strategies
    for content in (
        "",
        "strategies = 5",
        "[grid]\ntop_k = [5]",
        'strategies = ["T=x"]',
        "order = 'up'\nstrategies = []",
    ):
        path.write_text(content)
        with pytest.raises(RheostatError):
            read_space(path)


def test_nothing_solved_says_that_nothing_can_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no strategy ever solves a problem"):
        select(
            SelectConfig(model="fake", candidates=POOL, problems=6, samples=2, actions=2),
            tmp_path, Console(quiet=True), FakeEngine(),
        )  # fmt: skip


def test_every_round_counts_once(task: str, tmp_path: Path) -> None:
    """Counts and heat map against the store itself, which holds every rollout once."""
    results = select(config(task, max_rollouts=800, actions=2), tmp_path / "run", Console(quiet=True), FakeEngine())
    assert len(results["plan"]) > 1
    with RolloutStore(tmp_path / "run" / "rollouts") as store:
        total = store.query(
            "SELECT count(*), sum(tokens), count(*) FILTER (finish_reason = 'length'), "
            "count(*) FILTER (correct IS NULL) FROM rollouts"
        ).fetchall()
        by_strategy = store.query("SELECT strategy, avg(correct::INT), count(*) FROM rollouts GROUP BY 1").fetchall()
    names = ("rollouts", "tokens", "truncated", "without_verdict")
    assert tuple(results["counts"][name] for name in names) == total[0]
    found = {entry["strategy"]: (entry["reward"], entry["rollouts"]) for entry in results["heat"]}
    assert found == {name: (pytest.approx(mean, abs=1e-6), count) for name, mean, count in by_strategy}
    assert list(found) == list(POOL)
    for number, (strategies, problems, samples) in enumerate(results["plan"], start=1):
        held = [entry for entry in results["heat"] if entry["round"] >= number]
        assert len(held) == strategies
        left = [entry for entry in held if entry["round"] == number and entry["strategy"] != "greedy"]
        assert {entry["rollouts"] for entry in left} <= {problems * samples}
    assert set(results["greedy"]["strategies"]) <= {
        entry["strategy"] for entry in results["heat"] if entry["round"] == len(results["plan"])
    }


def test_what_measures_the_rate_counts_once(task: str, tmp_path: Path) -> None:
    results = select(config(task, max_time=1000.0), tmp_path / "run", Console(quiet=True), FakeEngine())
    with RolloutStore(tmp_path / "run" / "rollouts") as store:
        assert results["counts"]["rollouts"] == len(store) == 32 * (4 * (len(POOL) - 1) + 1)


def test_the_report_is_written(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "fake", "--task", task, "--verifier", "exact", "--max-tokens", "2", "--candidates", *POOL]
    out = tmp_path / "run"
    small = ["--problems", "32", "--samples", "4", "--actions", "3"]
    assert main(["select", *words, *small, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    text = (out / "report.html").read_text()
    for name in results["greedy"]["strategies"]:
        assert name in text
    said = capsys.readouterr().err
    assert "Chosen on 16 problems and valued on 16 others" in " ".join(said.split())
    assert str(out / "report.html") in "".join(said.split("\n"))


def test_a_folder_of_another_model_or_task_is_refused(task: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    select(config(task, samples=1), out, Console(quiet=True), FakeEngine())
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(StoreError, match=r"holds rollouts of the model 'fake', not of 'other'; give another folder"):
        select(config(task), out, Console(quiet=True), FakeEngine(seed=1, name="other"))
    other = tmp_path / "foreign.jsonl"
    other.write_text(Path(task).read_text())
    with pytest.raises(StoreError, match=r"holds rollouts of the task 'own', not of .*foreign.jsonl'; give another"):
        select(config(str(other)), out, Console(quiet=True), FakeEngine())
    assert sorted(path.name for path in out.rglob("*")) == before
    shard = next((out / "rollouts").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    select(config(task, samples=2), out, Console(quiet=True), FakeEngine())


def test_always_solved_says_that_nothing_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "easy.jsonl"
    rows = [{"id": f"q{number}", "problem": f"question {number}", "answer": ".*"} for number in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    easy = SelectConfig(
        model="fake", task=str(path), verifier="regex", max_tokens=2, candidates=POOL[:3],
        problems=6, samples=2, actions=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"every strategy always solves every problem.*; take harder problems"):
        select(easy, tmp_path / "run", Console(quiet=True), FakeEngine())
    assert not (tmp_path / "run" / "action_space.toml").exists()


def test_cells_with_fewer_verdicts(task: str, tmp_path: Path) -> None:
    """A cell that lacks a verdict has too few samples for two halves of pass@2: it covers nothing, and is counted."""
    asked = make_task(TaskChoice(task, verifier="exact", max_tokens=2)).problems(Split.VALIDATION, 32)
    verifier = tmp_path / "judge.py"
    verifier.write_text(
        "def verify(problem, completion):\n"
        f"    if problem['id'] == {asked[0].id!r}:\n"
        "        return None if sum(map(ord, completion)) % 2 else 0.0\n"
        "    return float(completion.strip() == problem['answer'])\n"
    )
    chosen = config(task, verifier=f"{verifier}:verify", parallel_budget=2)
    results = select(chosen, tmp_path / "run", Console(quiet=True), FakeEngine())
    missing = results["counts"]["without_verdict"]
    assert 0 < missing < 4 * len(POOL)
    low, high = (results["bounds"][name] for name in ("missing_wrong", "missing_right"))
    assert low <= results["greedy"]["coverage"][-1] <= high
    assert high - low == pytest.approx(1 / 32, abs=1e-6)
    assert "missing verdicts wrong to right" in (tmp_path / "run" / "report.html").read_text()
    assert results["greedy"]["cells_without_estimate"] > 0


def test_the_plan_of_the_documentation_is_the_command_s() -> None:
    page = (Path(__file__).parents[2] / "docs" / "select.md").read_text()
    [limit] = re.findall(r"--max-rollouts (\d+)`", page)
    plan = rounds_of(181, 240, 8, 6, int(limit))
    rows = re.findall(r"^\| \d+ \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|$", page, flags=re.MULTILINE)
    assert [(int(a), int(b), int(c)) for a, b, c, _ in rows] == [(r.strategies, r.problems, r.samples) for r in plan]
    assert sum(int(fresh.replace(",", "")) for *_, fresh in rows) == rollouts_of(plan)
    assert f"asks for {rollouts_of(plan):,}" in page


def test_a_sweep_killed_at_any_moment_and_started_again_ends_as_if_undisturbed(task: str, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"

    def command(out: Path) -> list[str]:
        words = ["select", "--model", "fake", "--task", task, "--verifier", "exact", "--max-tokens", "2"]
        words += [
            "--problems",
            "32",
            "--samples",
            "4",
            "--actions",
            "2",
            "--max-rollouts",
            "800",
            "--candidates",
            *POOL,
        ]
        return [sys.executable, "-m", "rheostat.cli", *words, "--out", str(out)]

    subprocess.run(command(undisturbed), check=True, capture_output=True)
    process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob("rollouts/*.parquet")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    subprocess.run(command(killed), check=True, capture_output=True)

    results = [json.loads((out / "results.json").read_text()) for out in (undisturbed, killed)]
    assert len(results[0]["plan"]) > 1
    for name in ("greedy", "top", "held_out", "chosen_in_resamples", "plan", "heat", "counts"):
        assert results[0][name] == results[1][name], name
    assert len({(out / "action_space.toml").read_text() for out in (undisturbed, killed)}) == 1
    counts = []
    for out in (undisturbed, killed):
        with RolloutStore(out / "rollouts") as store:
            counts.append(store.query("SELECT count(*), count(DISTINCT key) FROM rollouts").fetchall()[0])
    assert counts[0] == counts[1]
    assert counts[0][0] == counts[0][1] > 0
