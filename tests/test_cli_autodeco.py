"""AutoDeco heads from the command line: trained, judged beside a token-level adapter, and used."""

import json
from pathlib import Path

import pytest

from rheostat import cli

TASK = ["--model", "fake", "--verifier", "regex", "--max-tokens", "3"]


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "digits.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}:", "answer": "^[0-4]"}) + "\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def trained(problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AutoDeco heads and a token-level adapter."""
    out = tmp_path_factory.mktemp("trained")
    task = ["--task", problems, *TASK, "--problems.train", 20, "--problems.validation", 6]
    assert run("train", "autodeco", *task, "--epochs", 2, "--width", 8, "--out", out / "autodeco") == 0
    words = ["--budgets", 1, 2, "--steps", 1, "--prompts", 4, "--group", 4, "--filter-samples", 0, "--samples", 4]
    assert run("train", "token", *task, "--problems.test", 6, *words, "--width", 8, "--out", out / "token") == 0
    return out


def test_heads_are_trained_on_right_answers_and_say_how(
    trained: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = json.loads((trained / "autodeco" / "training.json").read_text())
    assert written["rollouts"] == 20 * 4 > written["right"] > 0
    assert written["tokens"] >= written["right"]
    assert [line["epoch"] for line in written["history"]] == [0, 1, 2]
    assert written["validation_loss"] == round(written["history"][written["kept_epoch"]]["validation_loss"], 6)
    described = json.loads((trained / "autodeco" / "adapter" / "adapter.json").read_text())
    assert (described["kind"], described["training"]["right"]) == ("autodeco", written["right"])
    task = ["--task", problems, *TASK, "--problems.train", 20, "--problems.validation", 6]
    assert run("train", "autodeco", *task, "--epochs", 2, "--width", 8, "--out", tmp_path, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["history"] == written["history"]
    weights = [(out / "adapter" / "adapter.safetensors").read_bytes() for out in (tmp_path, trained / "autodeco")]
    assert weights[0] == weights[1]


def test_without_a_right_answer_it_is_one_line_of_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--problems.train", "8", "--problems.validation", "8", "--samples", "1"]
    assert run("train", "autodeco", "--model", "fake", *few, "--out", tmp_path) == 2
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert "none of 8 answers at T = 1 to 8 problems is right" in said
    assert not (tmp_path / "adapter").exists()


def test_a_dry_run_counts_the_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--problems.train", 8, "--problems.validation", 4, "--samples", 3, "--dry-run", "--json"]
    assert run("train", "autodeco", "--model", "fake", *few, "--out", tmp_path / "no") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["rollouts"] == (8 + 4) * 3
    assert not (tmp_path / "no").exists()


def test_it_is_judged_as_a_policy_of_the_token_level(
    trained: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(trained / kind / "adapter") for kind in ("autodeco", "token")]
    words = ["evaluate", "--task", problems, *TASK, "--problems.validation", 6, "--problems.test", 6]
    words += ["--samples.validation", 4, "--samples.test", 4, "--budgets", 1, 2, "--json", "--out", tmp_path]
    found = []
    for more in (["--adapter", names[0], "--strategies", "greedy", "T=1"], ["--adapter", *names]):
        capsys.readouterr()
        assert run(*words, *more) == 0
        found.append(json.loads(capsys.readouterr().out))
    alone, both = found
    assert (alone["kind"], both["kind"]) == ("token", "token")
    assert {row["policy"] for row in alone["rows"]} >= {names[0], "greedy", "T=1", "BEST", "MIXED"}
    assert {row["policy"] for row in both["rows"]} >= {*names, "greedy", "T=1.25"}
    values = [
        [row["estimate"] for row in results["rows"] if (row["policy"], row["k"]) == (names[0], 1)] for results in found
    ]
    assert values[0] == values[1] != []
    assert sum(both["lengths"][names[0]]) == 6 * 4  # it does not see B: one sweep for all k


def test_beside_adapters_of_every_kind_results_say_which_is_which(
    trained: Path, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["--task", problems, *TASK, "--problems.validation", 6, "--problems.test", 12]
    few = ["--problems.train", 12, "--samples.train", 8, "--samples.validation", 4, "--samples.test", 4]
    words = ["--bandit.epochs", 2, "--bandit.budgets", 1, 2, "--bandit.width", 8, "--strategies", "greedy", "T=1"]
    assert run("train", "sequence", *task, *few, *words, "--features", "entropy", "--out", tmp_path / "seq") == 0
    token = ["--budgets", 1, 2, "--steps", 1, "--prompts", 4, "--group", 4, "--filter-samples", 0, "--samples", 4]
    token += ["--start", tmp_path / "seq" / "adapter", "--problems.train", 12, "--width", 8, "--strategies", "greedy"]
    assert run("train", "token", *task, *token, "T=1", "--out", tmp_path / "both") == 0
    folders = [trained / "token", trained / "autodeco", tmp_path / "seq", tmp_path / "both"]
    names = [str(folder / "adapter") for folder in folders]
    words = ["evaluate", *task, "--samples.validation", 4, "--samples.test", 4, "--budgets", 1, 2, "--adapter", *names]
    capsys.readouterr()
    assert run(*words, "--json", "--out", tmp_path / "judged") == 0
    results = json.loads(capsys.readouterr().out)
    told = results["adapters"]
    assert [told[name]["kind"] for name in names] == ["token", "autodeco", "sequence", "both"]
    assert told[names[2]] == {"kind": "sequence", "features": "entropy", "with_budget": True, "actions": 2}
    assert told[names[0]]["actions"] == 4
    first = names[2]  # sequence-level adapters come first
    assert {row["policy"] for row in results["by_group"]} == {first}
    assert len(results["by_group"]) == 3  # one data set, at B = 1, 2 and in the mean
    for row in results["by_group"]:  # all problems are of this one data set
        find = {"policy": first, "baseline": "BEST", "k": row["k"]}
        (whole,) = [own for own in results["differences"] if find.items() <= own.items()]
        assert [row[end] for end in ("estimate", "low", "high")] == pytest.approx(
            [whole[end] for end in ("estimate", "low", "high")], abs=1e-6
        )


def test_it_completes_a_prompt_and_has_no_actions_to_trace(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "12:", "--model", "fake", "--adapter", trained / "autodeco" / "adapter", "--budget", 3]
    assert run(*words, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["strategy"], len(answer["completions"])) == (None, 3)
    for option in ("--trace", "--commit"):
        assert run(*words, option) == 2
        assert "need --adapter with a token-level adapter" in capsys.readouterr().err
