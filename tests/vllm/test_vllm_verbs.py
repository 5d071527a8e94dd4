"""The commands with ``--engine vllm``, each opening a real one."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_vllm import save_model

from rheostat import cli

SIZES = ["--problems.train", "12", "--problems.validation", "8", "--problems.test", "8"]
SAMPLES = ["--samples.train", "4", "--samples.validation", "4", "--samples.test", "4"]
BUDGETS = ["--budgets", "1", "2"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a random model, and problems that it sometimes solves: which letter its answer has."""
    save_model(tmp_path / "model", "llama")
    (tmp_path / "letters.py").write_text("def verify(problem, completion):\n    return 'a' in completion\n")
    rows = [{"problem": f"letter {n}?", "answer": "a"} for n in range(80)]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_evaluate_select_and_generate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["--task", "letters.jsonl", "--verifier", "letters.py:verify", "--max-tokens", "16"]

    def run(*words: str) -> dict[str, Any]:
        code = cli.main([*words, "--model", "model", "--engine", "vllm", "--json"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return dict(json.loads(captured.out))

    run("train", "sequence", *task, *SIZES, *SAMPLES, "--bandit.budgets", "1", "2", "--out", "sequence")
    summary = json.loads((place / "sequence" / "training.json").read_text())
    rewards = [epoch["validation_reward"] for epoch in summary["training"]["history"]]
    assert 0 < rewards[0] <= max(rewards) < 1

    judged = run(
        "evaluate", "--adapter", "sequence/adapter", *task, *SIZES[2:], *SAMPLES[2:], *BUDGETS, "--out", "judged"
    )
    assert (judged["model"]["kind"], judged["counts"]["without_verdict"]) == ("vllm", 0)
    assert {row["policy"] for row in judged["rows"]} >= {"sequence/adapter", "BEST", "MIXED"}

    chosen = run("select", *task, "--problems", "8", "--samples", "2", "--candidates", "table13", "--actions", "2")
    assert len(chosen["strategies"]) == 2

    answer = run("generate", "letter 5?", "--adapter", "sequence/adapter", "--budget", "3", "--max-tokens", "9")
    assert len(answer["completions"]) == 3
    assert all(0 < completion["tokens"] <= 9 for completion in answer["completions"])
