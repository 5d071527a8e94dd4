"""The published data sets that Rheostat knows by name: where the Hub holds them, and how their rows become problems.

Rows of a local file carry the Hub's names or plain ones: ``problem`` and ``answer``; for programs ``tests``, or
``test_code``, ``entry_point`` and ``starter``; ``id``, ``solution``, ``level`` and ``type`` if there are any.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rheostat.errors import ConfigError
from rheostat.tasks import prompts
from rheostat.tasks.base import Split
from rheostat.tasks.math import last_box
from rheostat.tasks.prompts import Style
from rheostat.tasks.records import Record, Source
from rheostat.types import Problem

Fields = tuple[str, str, dict[str, object]]
"""Question, answer, metadata."""

_SUBJECTS = "algebra,counting_and_probability,geometry,intermediate_algebra,number_theory,prealgebra,precalculus"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published data set.

    Attributes:
        hub: where each split lies; a data set that has no split for training is for evaluation alone.
        licence: of the data.
        judged_by: math (equal answers) or code (programs that pass tests).
        style: what is said beside the problem.
        max_tokens: the token budget b where a run names none (the paper's is 8,092, and 38,912 for AIME: section 3).
        fields: reads a row.
    """

    hub: Mapping[Split, Source]
    licence: str
    judged_by: Literal["math", "code"]
    style: Style
    max_tokens: int
    fields: Callable[[Record], Fields]


IDS = ("id", "task_id", "unique_id", "name")
"""The published data sets' fields that name a problem."""


def problem_of(record: Record, task: str, fields: Callable[[Record], Fields], ids: Sequence[str] = IDS) -> Problem:
    """A row as a problem; one without any of the fields ``ids`` is named by where it stands.

    Raises:
        ConfigError: a field is missing; names the row and the fields that it has.
    """
    question, answer, metadata = fields(record)
    row = record.fields
    name = next((str(row[key]) for key in ids if row.get(key) is not None), None)
    if not question.strip():
        raise ConfigError(f"{record.where}: the problem is empty")
    # not the whole path: the same file in another folder has the same problems, and draws
    return Problem(f"{task}/{name or record.where.rpartition('/')[2]}", task, task, question, answer, metadata)


def _described(record: Record, *names: str) -> dict[str, object]:
    return {name: record.fields[name] for name in names if record.fields.get(name) not in (None, "")}


def math_fields(record: Record) -> Fields:
    """``problem`` (or ``question``) and ``answer``, which is else the last box of ``solution``, or follows ``####``."""
    question = str(record.first("problem", "question", "prompt"))
    metadata = _described(record, "solution", "level", "type")
    if record.fields.get("subject"):
        metadata["type"] = record.fields["subject"]
    answer = record.fields.get("answer")
    if answer is None:
        solution = str(record.first("solution"))
        answer = last_box(solution)
        if not answer:
            raise ConfigError(f"{record.where}: neither an answer nor a box in its solution")
    answer = str(answer)
    if "####" in answer:
        metadata["solution"], _, answer = answer.rpartition("####")
    if not answer.strip():
        raise ConfigError(f"{record.where}: the answer is empty")
    return question, answer.strip(), metadata


def program_fields(record: Record) -> Fields:
    """Programs judged on standard input and output: ``problem`` (or ``description``) and ``tests``."""
    question = str(record.first("problem", "description"))
    if record.fields.get("tests") is None:  # CodeContests on the Hub
        tests = [
            test
            for name in ("public_tests", "private_tests", "generated_tests")
            for test in _tests(record.first(name), f"{record.where}: {name}")
        ]
    else:
        tests = _tests(record.fields["tests"], f"{record.where}: tests")
    if not tests:
        raise ConfigError(f"{record.where}: no tests")
    metadata = {"tests": tests} | _described(record, "solution", "level", "special_checker")
    if "solution" not in metadata and isinstance(record.fields.get("solutions"), Mapping):
        own = record.fields["solutions"]
        python_3 = [text for language, text in zip(own["language"], own["solution"], strict=True) if language == 3]
        metadata |= {"solution": python_3[0]} if python_3 else {}
    wanted = (
        f"{question}\n\nWrite a Python 3 program that reads the input from standard input and writes the output to "
        "standard output. Put it into one ```python block."
    )
    return wanted, "", metadata


def _tests(given: Any, where: str) -> list[dict[str, str]]:
    """Tests as a list, or as the Hub has them: a list of all inputs beside one of all outputs."""
    if isinstance(given, Mapping):
        inputs, outputs = given.get("input"), given.get("output")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise ConfigError(f"{where}: two lists of one length are wanted, 'input' and 'output'")
        given = [{"input": read, "output": wanted} for read, wanted in zip(inputs, outputs, strict=True)]
    if not isinstance(given, list) or not all(
        isinstance(test, Mapping) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str)
        for test in given
    ):
        raise ConfigError(f"{where}: a list of objects is wanted, each with the texts 'input' and 'output'")
    return [{"input": test["input"], "output": test["output"]} for test in given]


def function_fields(record: Record) -> Fields:
    """Functions judged by test code: HumanEval's and MBPP's fields, or the plain ones."""
    row = record.fields
    test_code = row.get("test_code")
    if test_code is None:
        tests = record.first("test", "test_list")
        example = tests if isinstance(tests, str) else "\n".join(map(str, tests))
        test_code = f"{row.get('test_setup_code') or ''}\n{example}"
    else:
        example = test_code
    if not str(example).strip():
        raise ConfigError(f"{record.where}: no tests")
    starter = str(row.get("starter") or (row["prompt"] if "entry_point" in row and "prompt" in row else ""))
    question = str(record.first("problem", "prompt", "text"))
    solution = str(row.get("solution") or row.get("canonical_solution") or row.get("code") or "")
    metadata: dict[str, object] = {"test_code": str(test_code), "starter": starter, "solution": solution}
    if row.get("entry_point"):
        metadata["entry_point"] = row["entry_point"]
    if starter:
        wanted = f"Complete this Python function. Write it whole, in one ```python block.\n\n{question}"
    else:
        first = str(example).strip().splitlines()[0]
        wanted = f"{question}\n\nPut your Python code into one ```python block. It must pass tests such as:\n{first}"
    return wanted, "", metadata


def _hub(train: str | None = None, validation: str | None = None, test: str | None = None) -> dict[Split, Source]:
    named = {Split.TRAIN: train, Split.VALIDATION: validation, Split.TEST: test}
    return {split: Source.parse(text) for split, text in named.items() if text is not None}


BENCHMARKS: dict[str, Benchmark] = {
    "math": Benchmark(
        _hub(train=f"EleutherAI/hendrycks_math/{_SUBJECTS}:train", test="HuggingFaceH4/MATH-500:test"),
        "MIT",
        "math",
        prompts.MATH,
        1024,
        math_fields,
    ),
    "gsm8k": Benchmark(
        _hub(train="openai/gsm8k/main:train", test="openai/gsm8k/main:test"),
        "MIT",
        "math",
        prompts.MATH,
        512,
        math_fields,
    ),
    "aime24": Benchmark(
        _hub(test="HuggingFaceH4/aime_2024:train"),
        "© MAA",
        "math",
        prompts.MATH,
        8192,
        math_fields,
    ),
    "aime25": Benchmark(
        _hub(test="opencompass/AIME2025/AIME2025-I,AIME2025-II:test"),
        "© MAA",
        "math",
        prompts.MATH,
        8192,
        math_fields,
    ),
    "codecontests": Benchmark(
        _hub(
            train="deepmind/code_contests:train",
            validation="deepmind/code_contests:valid",
            test="deepmind/code_contests:test",
        ),
        "CC BY 4.0",
        "code",
        prompts.CODE,
        2048,
        program_fields,
    ),
    "humaneval": Benchmark(
        _hub(test="openai/openai_humaneval:test"), "MIT", "code", prompts.CODE, 512, function_fields
    ),
    "mbpp": Benchmark(
        _hub(
            train="google-research-datasets/mbpp:train",
            validation="google-research-datasets/mbpp:validation",
            test="google-research-datasets/mbpp:test",
        ),
        "CC BY 4.0",
        "code",
        prompts.CODE,
        512,
        function_fields,
    ),
}
