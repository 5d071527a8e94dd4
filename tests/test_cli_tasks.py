"""`rheostat tasks` and `rheostat evaluate --policy` from the command line, with the fake engine."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from rheostat import cli
from rheostat.decoding.strategy import Strategy
from rheostat.engines.base import Request
from rheostat.engines.fake import FakeEngine
from rheostat.tasks.base import Split
from rheostat.tasks.benchmarks import BENCHMARKS
from rheostat.tasks.choose import TaskChoice, make_task
from rheostat.tasks.procedural import PROCEDURAL

BUDGET = 2  # tokens: the fake model's answers are then often a digit


def run(*words: str | Path | int) -> int:
    return cli.main([str(word) for word in words])


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(fields) + "\n" for fields in rows))
    return path.name


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with ``sums.jsonl``: 60 problems, two of three with the fake model's greedy answer."""
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = [
        {"id": number, "problem": f"What is {number} + 1?", "answer": number, "solution": f"So\n{number}"}
        for number in range(60)
    ]
    jsonl(tmp_path / "sums.jsonl", rows)
    answers = completions("sums.jsonl", Strategy(temperature=0.0))
    for row in rows:
        if row["id"] % 3 and (answer := answers.get(f"sums/{row['id']}", "").strip()):
            row |= {"answer": answer, "solution": f"So\n{answer}"}
    jsonl(tmp_path / "sums.jsonl", rows)
    return tmp_path


def completions(path: str, strategy: Strategy, sample: int = 0) -> dict[str, str]:
    """What the fake engine writes for each test problem, asked by hand."""
    task = make_task(TaskChoice(path, verifier="exact"))
    prompts = [task.prompt(problem) for problem in task.problems(Split.TEST, 12)]
    done = FakeEngine().generate([Request(prompt, strategy, sample, 0, BUDGET) for prompt in prompts])
    return {prompt.problem_id: completion.text for prompt, completion in zip(prompts, done, strict=True)}


def evaluate(*words: str | Path | int) -> int:
    return run("evaluate", "--model", "fake", "--max-tokens", BUDGET, *words)


def test_list_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tasks", "list") == 0
    shown = capsys.readouterr()
    assert run("tasks", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in found] == [*PROCEDURAL, *BENCHMARKS]
    assert shown.out == ""
    for row in found:
        assert row["task"] in shown.err
        assert all(row.values())
    assert "HuggingFaceH4/MATH-500" in "".join(shown.err.split())


def test_show_prints_counts_and_problems_as_they_are_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tasks", "show", "sums.jsonl", "--verifier", "exact", "--shots", "1", "--cot", "0.5"]
    assert run(*words, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    task = make_task(TaskChoice("sums.jsonl", verifier="exact", shots=1, cot=0.5))
    assert (shown["task"], shown["max_tokens"], shown["repeated_and_left_out"]) == ("sums", 256, 0)
    assert sum(shown["problems"].values()) == 60
    problems = task.problems(Split.TEST, 2)
    assert shown["samples"] == [{"id": p.id, "prompt": task.prompt(p).text, "answer": p.answer} for p in problems]
    assert run(*words) == 0
    printed = capsys.readouterr().err
    assert f"test {shown['problems']['test']}" in printed
    for problem in problems:
        assert problem.id in printed
        assert problem.question in printed


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("split", Split)
def test_show_makes_do_with_what_there_is(
    folder: Path, rows: int, split: Split, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first look at one's own problems begins with a few of them, in any split."""
    path = jsonl(folder / "few.jsonl", [{"problem": f"[b]{n}[/] + 1?", "answer": f"[{n}]"} for n in range(rows)])
    words = ["tasks", "show", "few", "--data", f"{split}={path}", "--verifier", "exact"]
    assert run(*words, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert sum(shown["problems"].values()) == rows
    assert 0 < len(shown["samples"]) <= min(2, rows)
    assert run(*words) == 0
    assert shown["samples"][0]["prompt"].splitlines()[0] in capsys.readouterr().err


@pytest.mark.parametrize(("task", "members"), [("demo", 6), ("gcd", 1), ("gcd+syllogism", 2), ("steps+syllogism", 8)])
def test_show_takes_a_problem_or_more_of_every_member(
    task: str, members: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("tasks", "show", task, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["samples"]) == 2 * members
    assert len({sample["id"] for sample in shown["samples"]}) == 2 * members


def test_check_counts_the_solutions_that_are_accepted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": n, "problem": f"{n} + 1?", "answer": n + 1, "solution": f"So\n{n + 1}"} for n in range(5)]
    rows[3]["solution"] = "So [/b]\n0"
    path = jsonl(folder / "six.jsonl", [*rows, {"id": 5, "problem": "5 + 1?", "answer": 6}])
    assert run("tasks", "check", path, "--verifier", "exact", "--json") == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked.pop("first_failing") == [{"id": "six/3", "why": ""}]
    assert checked == {
        "task": "six",
        "problems": 6,
        "with_solution": 5,
        "accepted": 4,
        "failed": 1,
        "without_verdict": 0,
    }
    assert run("tasks", "check", path, "--verifier", "exact") == 0
    printed = capsys.readouterr().err
    assert "accepted 4 (80.00 %), failed 1, without a verdict 0" in printed
    assert "six/3" in printed


def test_evaluate_judges_fixed_strategies_on_the_test_split(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--policy", "greedy", "T=1", "--task", "sums.jsonl", "--verifier", "exact", "--limit", 12]
    assert evaluate(*words, "--out", folder / "runs" / "a", "--json") == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert json.loads((folder / "runs" / "a" / "results.json").read_text()) == results
    assert [(row["policy"], row["group"], row["k"], row["problems"]) for row in results["rows"]] == [
        ("greedy", "all", 1, 12),
        ("T=1", "all", 1, 12),
    ]
    task = make_task(TaskChoice("sums.jsonl", verifier="exact"))
    answers = {problem.id: problem.answer for problem in task.problems(Split.TEST, 12)}
    for row, strategy in zip(results["rows"], (Strategy(temperature=0.0), Strategy(temperature=1.0)), strict=True):
        texts = completions("sums.jsonl", strategy)
        right = [text.strip() == answers[name] for name, text in texts.items()]
        assert row["estimate"] == pytest.approx(sum(right) / 12, abs=1e-6)
    assert 0.3 < results["rows"][0]["estimate"] < 0.9  # the file is made so
    assert (results["task"], results["counts"]["rollouts"]) == ("sums.jsonl", 24)
    for part in ("greedy", "T=1", f"{100 * results['rows'][0]['estimate']:.1f}", "24 completions", "results.json"):
        assert part in captured.err


def test_evaluate_is_resumed_from_its_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--policy", "T=1", "--task", "sums.jsonl", "--verifier", "exact", "--limit", 5, "--json", "--out", "a"]
    found = []
    for samples in (2, 4, 4):
        assert evaluate(*words, "--policy-samples", samples) == 0
        found.append(json.loads(capsys.readouterr().out))
        shards = len(list(folder.rglob("*.parquet")))
        assert shards == min(len(found), 2)
    assert [[row["k"] for row in results["rows"]] for results in found] == [[1], [1, 2], [1, 2]]
    assert found[1]["rows"] == found[2]["rows"]
    assert {row["samples"] for row in found[2]["rows"]} == {4}


def test_evaluate_shows_members_and_prompt_styles(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--policy", "greedy", "--verifier", "exact", "--limit", 10, "--json", "--out", "a"]
    assert evaluate("--task", "sums.jsonl", "--cot", "0.3", *words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["group"], row["problems"]) for row in rows] == [
        ("all", 10),
        ("with chain of thought", 3),
        ("without", 7),
    ]
    assert rows[0]["estimate"] * 10 == pytest.approx(rows[1]["estimate"] * 3 + rows[2]["estimate"] * 7, abs=1e-4)
    assert (
        run("evaluate", "--model", "fake", "--task", "gcd+syllogism", "--policy", "greedy", "--limit", 6, "--json") == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["group"], row["problems"]) for row in rows] == [("all", 6), ("gcd", 3), ("syllogism", 3)]


def test_evaluate_of_a_single_problem_has_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "sums.jsonl", "--verifier", "exact", "--limit", 1, "--out", "a", "--json"]
    assert evaluate("--policy", "greedy", *words) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["problems"] == 1
    assert 0 <= row["low"] <= row["estimate"] <= row["high"] <= 1


def test_evaluate_reads_other_scripts_and_lone_surrogates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": text, "problem": f"{text}?", "answer": text} for text in ("数え", "كم", "\ud800", "[/b]", "é")]
    path = jsonl(folder / "odd.jsonl", rows)
    words = ["--task", "odd", "--data", f"test={path}", "--verifier", "exact", "--limit", 5, "--out", "a"]
    assert evaluate("--policy", "greedy", "T=1", *words) == 0
    assert run("tasks", "show", path, "--verifier", "exact") == 0
    assert "Traceback" not in capsys.readouterr().err


def test_a_verifier_without_verdicts_ends_the_run_and_says_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "judge.py").write_text("def verify(problem, completion):\n    raise KeyError('label')\n")
    words = ["--task", "sums.jsonl", "--verifier", "judge.py:verify", "--limit", 3, "--out", "a"]
    assert evaluate("--policy", "T=1", *words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: 3 of 3 rollouts have no verdict")
    assert "judge.py:verify: KeyError: 'label'" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tasks", "sing"], "Expected one of"),
        (["tasks", "show"], "tasks show: name a task"),
        (["tasks", "check"], "tasks check: name a task"),
        (["tasks", "show", "chess"], "unknown task 'chess'"),
        (["tasks", "show", "sums.jsonl"], "say how an answer is judged"),
        (["tasks", "show", "sums.jsonl", "--verifier", "exakt"], "--verifier exakt"),
        (["tasks", "show", "absent.jsonl", "--verifier", "exact"], "absent.jsonl: cannot be read"),
        (["tasks", "show", "bad.jsonl", "--verifier", "exact"], "bad.jsonl:2: no JSON"),
        (["tasks", "show", "math"], "the Hub does not give it (no network)"),
        (["tasks", "show", "math", "--data", "exam=sums.jsonl"], "the splits are train, validation, test"),
        (["tasks", "show", "sums.jsonl", "--verifier", "exact", "--shots", "60"], "60 worked examples"),
        (["tasks", "show", "sums.jsonl", "--verifier", "exact", "--shots", "-1"], "--shots"),
        (["tasks", "show", "sums.jsonl", "--verifier", "exact", "--cot", "2"], "--cot"),
        (["tasks", "show", "sums.jsonl", "--verifier", "absent.py:verify"], "there is no file absent.py"),
        (["tasks", "show", "absent.py:Task"], "there is no file absent.py"),
        (["tasks", "check", "demo"], "carry no solutions to check"),
        (["tasks", "check", "bare.jsonl", "--verifier", "exact"], "no problem has a field 'solution'"),
        (["evaluate", "--policy", "greedy", "--task", "chess"], "unknown task 'chess'"),
        (["evaluate", "--policy", "greedy", "--task", "sums.jsonl"], "say how an answer is judged"),
        (
            ["evaluate", "--policy", "greedy", "--task", "sums.jsonl", "--verifier", "exact", "--limit", "61"],
            "61 were asked for",
        ),
        (
            ["evaluate", "--policy", "greedy", "--task", "sums.jsonl", "--verifier", "exact", "--test-from", "60"],
            "120 were asked for from 60",
        ),
        (["evaluate", "--policy", "greedy", "--limit", "0"], "--limit"),
        (["evaluate", "--policy", "greedy", "--policy-samples", "0"], "--policy-samples"),
        (["evaluate", "--policy", "greedy", "--max-tokens", "0"], "--max-tokens"),
        (["evaluate", "--policy", "greedy", "--task", "gcd", "--shots", "2"], "leave out shots"),
        (["evaluate", "--policy", "greedy", "--limit", "7"], "multiples of its 6 members"),
        (["evaluate", "--policy", "heat=2", "--task", "gcd"], "unknown part 'heat=2'"),
        (["evaluate", "--policy", "greedy", "greedy", "--task", "gcd"], "greedy"),
        (
            ["evaluate", "--policy", "greedy", "--baselines", "turn", "--budgets", "1"],
            "leave out --baselines --budgets",
        ),
        (["evaluate", "--policy", "greedy", "--strategies", "T=1"], "leave out --strategies"),
        (["evaluate", "--policy", "greedy", "--out", "chosen"], "chosen/results.json holds a selection, not fixed"),
        (
            ["evaluate", "--out", "chosen"],
            "chosen/results.json holds a selection, not an evaluation: choose another --out",
        ),
        (["evaluate", "--out", "chosen", "--dry-run"], "chosen/results.json holds a selection"),
        (["evaluate", "--policy", "greedy", "--adapter", "somewhere"], "give --adapter or --policy, not both"),
        (
            ["evaluate", "--policy", "greedy", "--model", "no-such-model", "--task", "gcd"],
            "unknown model 'no-such-model'",
        ),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    words: list[str],
    said: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    (folder / "bad.jsonl").write_text('{"problem": "q", "answer": 1}\n{"problem": \n')
    jsonl(folder / "bare.jsonl", [{"problem": "q", "answer": "1"}])
    (folder / "chosen").mkdir()
    (folder / "chosen" / "results.json").write_text('{"kind": "selection"}')
    model = ["--model", "fake"] if words[0] == "evaluate" and "--model" not in words else []
    assert run(*words, *model) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err
    assert not list(folder.rglob("*.parquet"))
