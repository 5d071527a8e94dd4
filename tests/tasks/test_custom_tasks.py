"""Tasks and verifiers of a user's own: what is taken, what is refused, and what a broken one costs."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rheostat.errors import ConfigError, RheostatError
from rheostat.tasks import custom
from rheostat.tasks.base import Split
from rheostat.tasks.custom import (
    ExactVerifier,
    FunctionVerifier,
    answered_fields,
    is_file_target,
    load_task,
    plain_fields,
)
from rheostat.tasks.records import Record
from rheostat.types import Problem

TASK = """
from __future__ import annotations

from dataclasses import dataclass

import neighbour
from rheostat.errors import ConfigError
from rheostat.types import Problem, Prompt, Verdict


@dataclass
class Echo:
    name: str = "echo"
    max_tokens: int = 4

    def problems(self, split, count, start=0):
        return [Problem(f"echo/{n}", "echo", "echo", neighbour.ask(n), str(n)) for n in range(start, start + count)]

    def prompt(self, problem, epoch=0):
        return Prompt(problem.id, problem.question)

    def verify(self, problem, completion):
        return Verdict(completion.text == problem.answer)


def make():
    return Echo("made")


def takes(argument):
    return Echo()


def refuses():
    raise ConfigError("echo: set ECHO_HOME first")


def stops():
    raise SystemExit(0)


ready = Echo("ready")
number = 3


class Half:
    name, max_tokens = "half", 4

    def problems(self, split, count, start=0): ...
"""


@pytest.fixture
def task_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour.py").write_text("def ask(n):\n    return f'{n}?'\n")
    path = tmp_path / "own_task.py"
    path.write_text(TASK)
    yield path
    sys.modules.pop("neighbour", None)


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("a.py:Task", True),
        ("/x/y:z/a.py:make", True),
        ("a.py", False),
        ("a.py:", False),
        ("a.py:1", False),
        ("a.txt:Task", False),
        ("rheostat.tasks:Task", False),
        ("me/data:test", False),
        ("", False),
    ],
)
def test_what_names_a_thing_in_a_file(text: str, yes: bool) -> None:
    assert is_file_target(text) == yes


@pytest.mark.parametrize(("target", "name"), [("Echo", "echo"), ("make", "made"), ("ready", "ready")])
def test_a_task_is_a_class_a_function_or_an_object(task_file: Path, target: str, name: str) -> None:
    task = load_task(f"{task_file}:{target}")
    assert (task.name, task.max_tokens) == (name, 4)
    assert [problem.question for problem in task.problems(Split.TEST, 2)] == ["0?", "1?"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("Ekho", "has no attribute 'Ekho'"),
        ("takes", "TypeError: takes() missing 1 required positional argument"),
        ("number", "no task, it lacks name, max_tokens, problems, prompt, verify"),
        ("Half", "no task, it lacks prompt, verify"),
        ("stops", "SystemExit: 0"),
    ],
)
def test_what_is_no_task_is_told(task_file: Path, target: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_task(f"{task_file}:{target}")
    told = str(caught.value)
    assert told.startswith(f"--task {task_file}:{target}: ")
    assert said in told


def test_what_a_task_says_itself_is_passed_on(task_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^echo: set ECHO_HOME first$"):
        load_task(f"{task_file}:refuses")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("import no_such_package_at_all", "ModuleNotFoundError: No module named 'no_such_package_at_all'"),
        ("class Task(:", "SyntaxError: invalid syntax (bad_task.py, line 1)"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_a_file_that_cannot_be_imported_is_told(task_file: Path, content: str, said: str) -> None:
    path = task_file.with_name("bad_task.py")
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_task(f"{path}:Task")
    told = str(caught.value)
    assert told.startswith(f"--task {path}:Task: ")
    assert said in told
    assert "\n" not in told


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    for path in (tmp_path / "absent.py", tmp_path / "folder.py"):
        with pytest.raises(ConfigError, match=f"there is no file {path}"):
            load_task(f"{path}:Task")


# rows


def test_plain_rows() -> None:
    fields = {"id": 7, "prompt": "q", "answer": 4.5, "name": "Bob", "tests": [1]}
    assert plain_fields(Record(fields, "x")) == ("q", "4.5", {"name": "Bob", "tests": [1]})
    for missing in ({}, {"answer": None}):
        assert plain_fields(Record({"question": "q"} | missing, "x")) == ("q", "", {})


@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": " "}])
def test_rows_whose_answer_is_compared_must_have_one(answer: dict[str, object]) -> None:
    """An empty pattern is found everywhere."""
    assert answered_fields(Record({"problem": "q", "answer": 0}, "x"))[1] == "0"
    with pytest.raises(ConfigError, match=r"rows:1: (no field 'answer'; there are|the answer is empty)"):
        answered_fields(Record({"problem": "q"} | answer, "rows:1"))


# verdicts


def problem(answer: str, **metadata: object) -> Problem:
    return Problem("own/1", "own", "own", "q?", answer, metadata)


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("42", "42", True),
        ("42", "  42\n", True),
        ("a  b", "a b", True),
        ("a\nb", "a\nb", True),
        ("42", "It is\n42", True),
        ("42", "It is 42", False),
        ("42", "42\nor 43", False),
        ("42", "", False),
        ("42", "042", False),
        ("\ud800", "\ud800", True),
    ],
)
def test_exact_answers(answer: str, completion: str, right: bool) -> None:
    assert ExactVerifier()(problem(answer), completion).correct is right


JUDGE = """
import json, os, time

def verify(problem, completion):
    if completion == "hang":
        time.sleep(60)
    if completion == "crash":
        os._exit(3)
    if completion == "raise":
        raise ValueError("no such\\nthing")
    if completion == "print":
        print("noise")
        return True
    if completion == "problem":
        return problem == {"id": "own/1", "question": "q?", "answer": "42", "metadata": {"hint": ["a", 1]}}
    return eval(completion)

not_a_function = 3
"""


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FunctionVerifier]:
    path = tmp_path_factory.mktemp("judge") / "judge.py"
    path.write_text(JUDGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custom, "_TIMEOUT", 1.0)
        yield FunctionVerifier(f"{path}:verify")


@pytest.mark.parametrize(
    ("completion", "correct", "detail"),
    [
        ("True", True, "score 1"),
        ("1", True, "score 1"),
        ("1.0", True, "score 1"),
        ("2.5", True, "score 2.5"),
        ("False", False, "score 0"),
        ("0", False, "score 0"),
        ("0.5", False, "score 0.5"),
        ("0.999999", False, "score 0.999999"),
        ("-1", False, "score -1"),
        ("problem", True, "score 1"),
        ("print", True, "score 1"),
        ("hang", False, "took longer than 1 s"),
        ("crash", False, "ended its process"),
        ("None", None, "gave no verdict"),
        ("'yes'", None, "returned str, not a number, a bool or None"),
        ("[1]", None, "returned list"),
        ("raise", None, "judge.py:verify: ValueError: no such"),
        ("{1}", None, "TypeError"),
    ],
)
def test_what_a_function_returns_or_does_is_the_verdict(
    judge: FunctionVerifier, completion: str, correct: bool | None, detail: str
) -> None:
    start = time.monotonic()
    verdict = judge(problem("42", hint=["a", 1]), completion)
    assert verdict.correct is correct
    assert detail in verdict.detail
    assert time.monotonic() - start < 10


def test_a_function_that_hung_or_crashed_judges_the_next_completion(judge: FunctionVerifier) -> None:
    for completion in ("hang", "crash", "raise"):
        assert judge(problem("42"), completion).correct is not True
        assert judge(problem("42"), "True").correct is True


def test_a_missing_file_is_refused_before_anything_is_judged(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--verifier {tmp_path}/absent.py:verify: there is no file"):
        FunctionVerifier(f"{tmp_path}/absent.py:verify")


@pytest.mark.parametrize("name", ["judge.py:absent", "judge.py:not_a_function"])
def test_a_function_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    with pytest.raises(RheostatError, match=name):
        FunctionVerifier(f"{tmp_path}/{name}")(problem("42"), "1")


@pytest.fixture(scope="module")
def regex() -> Iterator[FunctionVerifier]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(custom, "_TIMEOUT", 1.0)
        yield FunctionVerifier("rheostat.tasks.custom:matches")


@pytest.mark.parametrize(
    ("pattern", "completion", "correct"),
    [
        (r"^\s*4[0-9]$", "  42", True),
        (r"\b42\b", "It is 42.", True),
        (r"\b42\b", "It is 421.", False),
        (r"(?i)yes", "YES", True),
        (r"(a+)+$", "a" * 60 + "b", False),  # takes for ever
        (r"(", "(", None),
    ],
)
def test_patterns(regex: FunctionVerifier, pattern: str, completion: str, correct: bool | None) -> None:
    start = time.monotonic()
    verdict = regex(problem(pattern), completion)
    assert verdict.correct is correct
    assert time.monotonic() - start < 10
    if correct is None:
        assert "error: missing ), unterminated subpattern" in verdict.detail
