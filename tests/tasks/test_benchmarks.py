"""How rows of the published data sets become problems, and that their own solutions are accepted."""

import json
from pathlib import Path
from typing import Any

import pytest

from rheostat.errors import ConfigError
from rheostat.tasks.base import Split
from rheostat.tasks.benchmarks import BENCHMARKS, function_fields, last_box, math_fields, problem_of, program_fields
from rheostat.tasks.choose import TaskChoice
from rheostat.tasks.records import Record, Source
from rheostat.tasks.sandbox import missing_protections
from rheostat.verbs.tasks import check_task


def row(**fields: object) -> Record:
    return Record(fields, "rows.jsonl:3")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(fields) + "\n" for fields in rows))
    return path


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{7}", "7"),
        ("so \\boxed{\\frac{1}{\\sqrt{2}}} it is {x}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("\\boxed{x = \\boxed{2}}", "2"),
        ("\\fbox{7}", "7"),
        ("\\boxed {7}", "7"),
        ("\\boxed{7\n}", "7\n"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("$\\boxed 7$ apples", "7"),
        ("$\\boxed 72$", "72"),
        ("7", None),
        ("\\boxes{7}", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("fields", "answer", "metadata"),
    [
        (
            {"problem": "q", "level": "Level 2", "type": "Algebra", "solution": "So $\\boxed{\\frac{1}{2}}$."},
            "\\frac{1}{2}",
            {"solution": "So $\\boxed{\\frac{1}{2}}$.", "level": "Level 2", "type": "Algebra"},
        ),
        (
            {"problem": "q", "solution": "\\boxed{3}", "answer": "4", "subject": "Geometry", "level": 5},
            "4",
            {"solution": "\\boxed{3}", "level": 5, "type": "Geometry"},
        ),
        ({"question": "q", "answer": "9 * 2 = <<9*2=18>>18\n#### 18"}, "18", {"solution": "9 * 2 = <<9*2=18>>18\n"}),
        ({"question": "q", "answer": " 1,000 "}, "1,000", {}),
        ({"problem": "q", "answer": 0}, "0", {}),
        (
            {"problem": "q", "answer": None, "solution": "\\boxed{1} then \\fbox{2}"},
            "2",
            {"solution": "\\boxed{1} then \\fbox{2}"},
        ),
    ],
)
def test_math_rows(fields: dict[str, object], answer: str, metadata: dict[str, object]) -> None:
    assert math_fields(row(**fields)) == ("q", answer, metadata)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": "q", "answer": "1"}, "no field 'problem' or 'question' or 'prompt'; there are text, answer"),
        ({"problem": "q", "level": "1"}, "no field 'solution'; there are problem, level"),
        ({"problem": "q", "solution": "it is 7"}, "neither an answer nor a box in its solution"),
        ({"problem": "q", "solution": "\\boxed{7"}, "neither an answer nor a box in its solution"),
        ({"problem": "q", "solution": "\\boxed{}"}, "neither an answer nor a box in its solution"),
        ({"problem": "q", "answer": ""}, "the answer is empty"),
        ({"problem": "q", "answer": "count #### "}, "the answer is empty"),
        ({"problem": " ", "answer": "1"}, "the problem is empty"),
    ],
)
def test_math_rows_that_lack_something(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        problem_of(row(**fields), "math", math_fields)
    assert str(caught.value) == f"rows.jsonl:3: {said}"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"id": 0, "unique_id": "u"}, "0"),
        ({"task_id": "HumanEval/3"}, "HumanEval/3"),
        ({"unique_id": "test/algebra/1.json"}, "test/algebra/1.json"),
        ({"name": "1575_A. Another Sorting Problem"}, "1575_A. Another Sorting Problem"),
        ({}, "rows.jsonl:3"),
        ({"id": None}, "rows.jsonl:3"),
    ],
)
def test_a_problem_is_named_by_its_row_or_by_where_it_stands(fields: dict[str, object], name: str) -> None:
    problem = problem_of(row(problem="q", answer="1", **fields), "math", math_fields)
    assert (problem.id, problem.task, problem.member) == (f"math/{name}", "math", "math")


HUB_PROGRAM: dict[str, Any] = {
    "name": "sum",
    "description": "Add two numbers.",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": [], "output": []},
    "generated_tests": {"input": ["2 2\n", "5 1\n"], "output": ["4\n", "6\n"]},
    "solutions": {"language": [2, 1, 3, 3], "solution": ["int main", "print 3", "print(sum(…))", "later"]},
    "incorrect_solutions": {"language": [3], "solution": ["print(0)"]},
}
TESTS = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2\n", "output": "4\n"}, {"input": "5 1\n", "output": "6\n"}]


def test_programs_of_the_hub() -> None:
    question, answer, metadata = program_fields(Record(HUB_PROGRAM, "x"))
    assert question.startswith("Add two numbers.\n\nWrite a Python 3 program")
    assert answer == ""
    assert metadata == {"tests": TESTS, "solution": "print(sum(…))"}


def test_programs_without_a_solution_in_python_3_have_none() -> None:
    others = HUB_PROGRAM | {"solutions": {"language": [2, 1], "solution": ["int main", "print 3"]}}
    assert "solution" not in program_fields(Record(others, "x"))[2]
    assert "solution" not in program_fields(Record(HUB_PROGRAM | {"solutions": None}, "x"))[2]


def test_plain_programs() -> None:
    fields = {"problem": "Add.", "tests": TESTS, "solution": "print(3)", "level": "easy", "time_limit": 2}
    question, _, metadata = program_fields(row(**fields))
    assert question.startswith("Add.\n\n")
    assert metadata == {"tests": TESTS, "solution": "print(3)", "level": "easy"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tests": []}, "no tests"),
        ({}, "no field 'public_tests'; there are problem"),
        ({"tests": "1 2"}, "tests: a list of objects is wanted"),
        ({"tests": [{"input": "1"}]}, "tests: a list of objects is wanted, each with the texts 'input' and 'output'"),
        ({"tests": [{"input": "1", "output": 3}]}, "tests: a list of objects is wanted"),
        ({"tests": {"input": ["1"], "output": []}}, "tests: two lists of one length are wanted"),
        ({"tests": {"input": ["1"]}}, "tests: two lists of one length are wanted"),
        (
            {"public_tests": {"input": [], "output": []}, "private_tests": {"input": []}},
            "private_tests: two lists of one length are wanted",
        ),
    ],
)
def test_programs_whose_tests_cannot_be_read(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        program_fields(row(problem="Add.", **fields))
    assert str(caught.value).startswith(f"rows.jsonl:3: {said}")


STARTER = 'def add(a, b):\n    """The sum."""\n'
HUMANEVAL: dict[str, Any] = {
    "task_id": "HumanEval/1",
    "prompt": STARTER,
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(2, 2) == 4\n",
    "entry_point": "add",
}
MBPP: dict[str, Any] = {
    "task_id": 11,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\r\n    return a + b",
    "test_list": ["assert add(ONE, 2) == 3", "assert add(2, 2) == 4"],
    "test_setup_code": "ONE = 1",
    "challenge_test_list": [],
}


def test_functions_of_humaneval() -> None:
    question, answer, metadata = function_fields(Record(HUMANEVAL, "x"))
    assert question == f"Complete this Python function. Write it whole, in one ```python block.\n\n{STARTER}"
    assert answer == ""
    assert metadata == {
        "test_code": metadata["test_code"],
        "starter": STARTER,
        "solution": "    return a + b\n",
        "entry_point": "add",
    }
    assert str(metadata["test_code"]).strip() == HUMANEVAL["test"].strip()


def test_functions_of_mbpp() -> None:
    question, _, metadata = function_fields(Record(MBPP, "x"))
    assert question.startswith("Write a function to add two numbers.\n\nPut your Python code into one ```python block.")
    assert question.endswith("tests such as:\nassert add(ONE, 2) == 3")  # a test, not the set-up
    assert metadata["test_code"] == "ONE = 1\nassert add(ONE, 2) == 3\nassert add(2, 2) == 4"
    assert metadata["solution"] == MBPP["code"]
    assert "entry_point" not in metadata


def test_plain_functions() -> None:
    fields = {"problem": "Add.", "test_code": "\nassert add(1, 2) == 3\nassert 1", "solution": "def add…"}
    question, _, metadata = function_fields(row(**fields))
    assert question.endswith("tests such as:\nassert add(1, 2) == 3")
    assert metadata == {"test_code": fields["test_code"], "starter": "", "solution": "def add…"}
    question, _, metadata = function_fields(row(**fields, starter=STARTER, entry_point="add"))
    assert question == "Complete this Python function. Write it whole, in one ```python block.\n\nAdd."
    assert (metadata["starter"], metadata["entry_point"]) == (STARTER, "add")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"problem": "Add."}, "no field 'test' or 'test_list'; there are problem"),
        ({"problem": "Add.", "test_code": " \n"}, "no tests"),
        ({"problem": "Add.", "test_list": [], "test_setup_code": "x = 1"}, "no tests"),
        ({"test_code": "assert 1"}, "no field 'problem' or 'prompt' or 'text'; there are test_code"),
    ],
)
def test_functions_that_lack_something(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        function_fields(row(**fields))
    assert str(caught.value) == f"rows.jsonl:3: {said}"


def test_every_benchmark_has_a_test_split_on_the_hub_and_a_licence() -> None:
    for benchmark in BENCHMARKS.values():
        assert Split.TEST in benchmark.hub
        assert benchmark.licence
        assert all(isinstance(source, Source) and not source.is_file for source in benchmark.hub.values())
        assert len({str(source) for source in benchmark.hub.values()}) == len(benchmark.hub)


# rheostat tasks check

MATH_ROWS = [
    {"id": "half", "problem": "1 / 2?", "solution": "So \\boxed{\\frac{1}{2}}.", "answer": "0.5"},
    {"id": "box", "problem": "2 + 2?", "solution": "It is \\boxed{4}."},
    {"id": "gsm", "problem": "9 * 2?", "answer": "9 * 2 = <<9*2=18>>18\n#### 18"},
    {"id": "bare", "problem": "3 + 3?", "solution": "Count on.", "answer": "6"},
    {"id": "wrong", "problem": "4 + 4?", "solution": "So \\boxed{9}.", "answer": "8"},
    {"id": "none", "problem": "5 + 5?", "answer": "10"},
]


@pytest.mark.parametrize(("task", "named"), [("math", ["--data"]), ("own", ["--data", "--verifier"])])
def test_right_solutions_are_accepted_and_wrong_ones_listed(tmp_path: Path, task: str, named: list[str]) -> None:
    rows = MATH_ROWS if task == "math" else [fields for fields in MATH_ROWS if fields["id"] not in ("box", "gsm")]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    checked = check_task(TaskChoice(task, (str(path),), "math" if "--verifier" in named else None))
    assert checked == {
        "task": task,
        "problems": len(rows),
        "with_solution": len(rows) - 1,
        "accepted": len(rows) - 2,
        "failed": 1,
        "without_verdict": 0,
        "first_failing": [{"id": f"{task}/wrong", "why": "not equal"}],
    }


def test_all_failures_are_counted_and_twenty_listed(tmp_path: Path) -> None:
    rows = [{"problem": f"{number}?", "solution": "no", "answer": "yes"} for number in range(25)]
    checked = check_task(TaskChoice(str(jsonl(tmp_path / "rows.jsonl", rows)), verifier="exact"))
    assert (checked["failed"], checked["accepted"], len(checked["first_failing"])) == (25, 0, 20)


def test_verdicts_that_are_missing_are_counted_and_listed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def verify(problem, completion):\n    return {'2': True, '3': 0}.get(completion)\n"
    )
    rows = [{"id": text, "problem": f"{text}?", "solution": text} for text in "123"]
    choice = TaskChoice(str(jsonl(tmp_path / "rows.jsonl", rows)), verifier=f"{tmp_path}/own.py:verify")
    checked = check_task(choice)
    assert (checked["accepted"], checked["failed"], checked["without_verdict"]) == (1, 1, 1)
    assert [failing["id"] for failing in checked["first_failing"]] == ["rows/3", "rows/1"]


@pytest.mark.parametrize(("task", "said"), [("demo", "carry no solutions"), ("gcd+syllogism", "carry no solutions")])
def test_tasks_without_solutions_are_refused(task: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_task(TaskChoice(task))


def test_a_file_without_solutions_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"problem": "1?", "answer": "1"}])
    with pytest.raises(ConfigError, match="task rows: no problem has a field 'solution' to check"):
        check_task(TaskChoice(str(path), verifier="exact"))


@pytest.mark.parametrize("task", ["codecontests", "humaneval", "mbpp"])
def test_programs_are_accepted_and_wrong_ones_listed(tmp_path: Path, task: str) -> None:
    if missing := missing_protections():
        pytest.skip(f"programs cannot be isolated here: {missing[0]}")
    program = "a, b = map(int, input().split())\nprint(a {} b)"
    rows = {
        "codecontests": [
            HUB_PROGRAM
            | {"name": name, "description": name, "solutions": {"language": [3], "solution": [program.format(sign)]}}
            for name, sign in (("right", "+"), ("wrong", "*"))
        ],
        "humaneval": [
            HUMANEVAL
            | {"task_id": name, "prompt": f"{STARTER}    # {name}\n", "canonical_solution": f"    return a {sign} b\n"}
            for name, sign in (("right", "+"), ("wrong", "*"))
        ],
        "mbpp": [
            MBPP | {"task_id": name, "text": name, "code": f"def add(a, b):\n    return a {sign} b"}
            for name, sign in (("right", "+"), ("wrong", "*"))
        ],
    }[task]
    checked = check_task(TaskChoice(task, (str(jsonl(tmp_path / "rows.jsonl", rows)),), require_isolation=True))
    assert (checked["accepted"], checked["failed"], checked["without_verdict"]) == (1, 1, 0), checked
    assert [failing["id"] for failing in checked["first_failing"]] == [f"{task}/wrong"]
