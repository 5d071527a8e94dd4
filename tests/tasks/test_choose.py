"""From what a run says to its task: each way to name one, and one clear line for what does not fit."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from rheostat.errors import ConfigError
from rheostat.tasks import prompts
from rheostat.tasks.base import Split
from rheostat.tasks.benchmarks import BENCHMARKS
from rheostat.tasks.choose import TaskChoice, make_task, with_chat
from rheostat.tasks.mixture import MixtureTask
from rheostat.tasks.procedural import PROCEDURAL, ProceduralTask
from rheostat.tasks.prompts import Chat
from rheostat.tasks.questions import QuestionTask
from rheostat.types import Completion, FinishReason

OWN_TASK = """
from rheostat.tasks.procedural import procedural_task

def make():
    return procedural_task("gcd")
"""


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"problem": f"What is {number} + 1?", "answer": number + 1} for number in range(first, first + count)]


def jsonl(path: Path, found: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(fields) + "\n" for fields in found))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a file of 40 problems, ``a.jsonl``, one of 20 others, ``b.jsonl``, and a task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    jsonl(tmp_path / "a.jsonl", rows(40))
    jsonl(tmp_path / "b.jsonl", rows(20, first=100))
    (tmp_path / "own.py").write_text(OWN_TASK)
    return tmp_path


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The locations that were asked for at a Hub that is down."""
    asked: list[str] = []

    def load(location: str, *_: object, **__: object) -> Iterator[dict[str, object]]:
        asked.append(location)
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"task": "chess"}, "unknown task 'chess'"),
        ({"task": ""}, "unknown task ''"),
        ({"task": "rows.csv"}, "unknown task 'rows.csv'"),
        ({"task": "own.py"}, "a task of your own (FILE.py:NAME)"),
        ({"task": "demo", "data": ("a.jsonl",)}, "task demo brings its own prompts and problems: leave out data"),
        (
            {"task": "gcd", "verifier": "exact", "cot": 0.1, "thinking": True, "shots": 1},
            "leave out verifier, cot, thinking, shots",
        ),
        ({"task": "own.py:make", "max_tokens": 3}, "leave out max_tokens"),
        ({"task": "own.py:make", "cot": 0.3}, "task own.py:make brings its own prompts and problems: leave out cot"),
        ({"task": "absent.py:make"}, "there is no file absent.py"),
        ({"task": "own.py:absent"}, "has no attribute 'absent'"),
        ({"task": "gsm8k", "verifier": "math", "data": ("a.jsonl",)}, "task gsm8k has a verifier of its own"),
        ({"task": "gsm8k", "data": ("test=absent.jsonl",)}, "absent.jsonl: cannot be read"),
        ({"task": "gsm8k", "data": ("exam=a.jsonl",)}, "the splits are train, validation, test"),
        ({"task": "humaneval", "data": ("a.jsonl",)}, "a.jsonl:1: no field 'test' or 'test_list'"),
        (
            {"task": "codecontests", "data": ("a.jsonl",)},
            "a.jsonl:1: no field 'public_tests'; there are problem, answer",
        ),
        ({"task": "a.jsonl"}, "task a.jsonl: say how an answer is judged: --verifier math, exact, regex"),
        ({"task": "own", "data": ("a.jsonl",)}, "task own: say how an answer is judged: --verifier"),
        ({"task": "a.jsonl", "verifier": "exakt"}, "--verifier exakt: use math, exact, regex, or FILE.py:FUNCTION"),
        ({"task": "absent.jsonl", "verifier": "exakt"}, "--verifier exakt"),
        ({"task": "a.jsonl", "verifier": "own.py"}, "--verifier own.py: use math"),
        ({"task": "a.jsonl", "verifier": "exact", "data": ("b.jsonl",)}, "--task a.jsonl holds all problems"),
        ({"task": "absent.jsonl", "verifier": "exact"}, "absent.jsonl: cannot be read (No such file or directory)"),
        ({"task": "own", "verifier": "exact", "data": ("train=a.jsonl", "test=a.jsonl")}, "the same problem stands in"),
        ({"task": "a.jsonl", "verifier": "exact", "shots": 40}, "task a: 40 worked examples come from the training"),
        ({"task": "own", "verifier": "exact", "data": ("test=a.jsonl",), "shots": 1}, "which holds 0 problems"),
        ({"task": "gcd+chess"}, "unknown task 'chess'"),
        ({"task": "gcd+"}, "unknown task ''"),
        ({"task": "gcd+gcd"}, "two tasks or more of different names, got ['gcd', 'gcd']"),
        ({"task": "gcd+demo", "shots": 1}, "task gcd brings its own prompts and problems: leave out shots"),
        ({"task": "gcd+demo", "data": ("a.jsonl",)}, "the members of a mixture bring their own"),
        ({"task": "gcd+demo", "verifier": "exact"}, "the members of a mixture bring their own"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(choice: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_task(TaskChoice(**choice))
    told = str(caught.value)
    assert said in told
    assert "\n" not in told


def test_an_unknown_task_is_told_all_that_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        make_task(TaskChoice("chess"))
    assert all(name in str(caught.value) for name in (*PROCEDURAL, *BENCHMARKS))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_are_asked_of_the_hub_and_without_it_name_local_files(name: str, no_hub: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"the Hub does not give it \(no network\).*--data train=FILE.jsonl"):
        make_task(TaskChoice(name))
    assert no_hub == [BENCHMARKS[name].hub[Split.TEST].location]


def test_a_benchmark_of_the_hub_whose_rows_have_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each subset counts its rows from 0."""

    def load(location: str, subset: str | None, split: str, **_: object) -> Iterator[dict[str, object]]:
        for number in range(5):
            yield {"problem": f"{location} {subset} {split} {number}?", "solution": f"So \\boxed{{{number}}}."}

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = make_task(TaskChoice("math"))
    assert isinstance(task, QuestionTask)
    assert sum(task.size(split) for split in Split) == 5 * (7 + 1)
    assert task.size(Split.TEST) == 5
    assert task.size(Split.VALIDATION) > 0


@pytest.mark.usefixtures("folder", "no_hub")
def test_a_benchmark_from_local_files() -> None:
    task = make_task(TaskChoice("gsm8k", ("train=a.jsonl", "test=b.jsonl"), max_tokens=7, cot=0.5, shots=2, seed=3))
    assert isinstance(task, QuestionTask)
    assert (task.name, task.max_tokens, task.style) == ("gsm8k", 7, prompts.MATH)
    assert (task.asking.cot, task.asking.shots, task.asking.seed) == (0.5, 2, 3)
    assert task.size(Split.TEST) == 20
    assert task.size(Split.TRAIN) + task.size(Split.VALIDATION) == 38
    assert make_task(TaskChoice("gsm8k", ("a.jsonl",))).max_tokens == BENCHMARKS["gsm8k"].max_tokens
    [problem] = task.problems(Split.TEST, 1)
    for text, right in ((f"\\boxed{{{problem.answer}}}", True), ("\\boxed{-1}", False)):
        assert task.verify(problem, Completion(text, (1,), FinishReason.STOP)).correct is right


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("verifier", "style", "right", "wrong"),
    [
        ("math", prompts.MATH, "so \\boxed{%s.0}", "so \\boxed{0.5}"),
        ("exact", prompts.PLAIN, "so\n%s", "so\n0.5"),
        ("regex", prompts.PLAIN, "it's %s!", "0.5"),
        ("judge.py:verify", prompts.PLAIN, "<%s>", "%s"),
    ],
)
def test_problems_of_ones_own(folder: Path, verifier: str, style: prompts.Style, right: str, wrong: str) -> None:
    (folder / "judge.py").write_text("def verify(problem, text):\n    return text == '<' + problem['answer'] + '>'\n")
    task = make_task(TaskChoice("a.jsonl", verifier=verifier))
    assert isinstance(task, QuestionTask)
    assert (task.name, task.max_tokens, task.style, task.repeated) == ("a", 256, style, 0)
    assert sum(task.size(split) for split in Split) == 40
    [problem] = task.problems(Split.TEST, 1)
    for text, correct in ((right, True), (wrong, False)):
        completion = Completion(text.replace("%s", problem.answer), (1,), FinishReason.STOP)
        assert task.verify(problem, completion).correct is correct


@pytest.mark.usefixtures("folder")
def test_problems_of_ones_own_by_split() -> None:
    task = make_task(TaskChoice("sums", ("train=a.jsonl", "test=b.jsonl"), "exact"))
    assert isinstance(task, QuestionTask)
    assert task.name == "sums"
    assert {p.answer for p in task.problems(Split.TEST, 20)} == {str(number) for number in range(101, 121)}
    whole = make_task(TaskChoice("sums", ("a.jsonl",), "exact"))
    alone = make_task(TaskChoice("a.jsonl", verifier="exact"))
    assert isinstance(whole, QuestionTask)
    assert isinstance(alone, QuestionTask)
    for split in Split:
        assert [p.question for p in whole.splits[split]] == [p.question for p in alone.splits[split]]
    assert {problem.task for own in whole.splits.values() for problem in own} == {"sums"}


def test_repeated_problems_are_counted_and_only_id_names_a_row_of_ones_own(folder: Path) -> None:
    found = [fields | {"name": "Bob", "task_id": 1} for fields in (*rows(10), *rows(3))]
    task = make_task(TaskChoice(jsonl(folder / "c.jsonl", found), verifier="exact"))
    assert isinstance(task, QuestionTask)
    assert task.repeated == 3
    named = jsonl(folder / "d.jsonl", [fields | {"id": 1} for fields in rows(2)])
    with pytest.raises(ConfigError, match=r"d.jsonl:2: the id 'd/1' stands also at .*d.jsonl:1"):
        make_task(TaskChoice(named, verifier="exact"))


@pytest.mark.parametrize("verifier", ["math", "exact", "regex"])
def test_answers_that_are_compared_must_be_there(folder: Path, verifier: str) -> None:
    path = jsonl(folder / "c.jsonl", [*rows(2), {"problem": "q", "label": "1"}])
    with pytest.raises(ConfigError, match=r"c.jsonl:3: no field 'answer'; there are problem, label"):
        make_task(TaskChoice(path, verifier=verifier))
    (folder / "judge.py").write_text("def verify(problem, text): return text == problem['metadata']['label']")
    assert isinstance(make_task(TaskChoice(path, verifier="judge.py:verify")), QuestionTask)


@pytest.mark.usefixtures("no_hub")
def test_mixtures(folder: Path) -> None:
    task = make_task(TaskChoice("gcd+count_bits+syllogism"))
    assert isinstance(task, MixtureTask)
    assert task.name == "gcd+count_bits+syllogism"
    with pytest.raises(ConfigError, match="different names"):  # the task of own.py is gcd, too
        make_task(TaskChoice("gcd+own.py:make"))
    plus = jsonl(folder / "c++.jsonl", rows(10))
    assert make_task(TaskChoice(plus, verifier="exact")).name == "c++"


def test_procedural_tasks_and_tasks_of_ones_own(folder: Path) -> None:
    for name in PROCEDURAL:
        assert make_task(TaskChoice(name, seed=5, require_isolation=True)).name == name
    own = make_task(TaskChoice(f"{folder}/own.py:make"))
    assert isinstance(own, ProceduralTask)
    assert own.name == "gcd"


def test_a_procedural_task_takes_a_token_budget() -> None:
    for name, own in (("steps", 32), ("demo", 12), ("gcd", 12)):
        plain, halved = make_task(TaskChoice(name)), make_task(TaskChoice(name, max_tokens=own // 2))
        assert (plain.max_tokens, halved.max_tokens) == (own, own // 2)
        assert halved.problems(Split.TEST, 12) == plain.problems(Split.TEST, 12)


@pytest.mark.usefixtures("folder")
def test_a_chat_template_reaches_every_member_that_asks_in_one() -> None:
    chat = Chat(lambda turns, thinking: f"<{thinking}>{turns[-1]['content']}", can_think=True)
    own = make_task(TaskChoice("a.jsonl", verifier="exact"))
    assert isinstance(own, QuestionTask)
    gcd = make_task(TaskChoice("gcd"))
    assert with_chat(gcd, chat) is gcd
    asking = with_chat(own, chat)
    [problem] = own.problems(Split.TEST, 1)
    assert asking.prompt(problem).text == f"<False>{problem.question}\n\n/nothink"
    assert with_chat(asking, None).prompt(problem) == own.prompt(problem)
    other = replace(own, name="other")
    mixture = MixtureTask([gcd, other])
    with_template = with_chat(mixture, chat)
    first, last = mixture.problems(Split.TEST, 2)
    assert with_template.prompt(first) == mixture.prompt(first)
    assert with_template.prompt(last).text == f"<False>{last.question}\n\n/nothink"
