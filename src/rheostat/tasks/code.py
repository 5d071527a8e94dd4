"""Verdicts on programs: the code in a completion, and whether it passes a problem's tests."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rheostat.tasks.sandbox import Ending, Limits, Outcome, Sandbox
from rheostat.types import Problem, Verdict

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_PYTHON = ("python", "python3", "py", "py3", "")
_DETAIL_CHARACTERS = 200


def extract_program(completion: str) -> str | None:
    """The last fenced block that is Python's: tagged ``python``, ``python3``, ``py`` or ``py3``, or not at all.

    A block without an end reaches to the end of the completion. A fence without a tag that ends the completion and
    opens nothing closes a block that the prompt has opened. None where there is no such block, or nothing in it.
    """
    program, tag, start, opened = None, "", 0, ""
    for fence in _FENCE.finditer(completion):
        if not opened:
            rest = completion[fence.end() :]
            if fence[2] == "" and program is None and not rest.strip():
                return _text(completion[: fence.start()])
            opened, tag, start = fence[1], fence[2].lower(), fence.end() + 1
        elif fence[2] == "" and fence[1].startswith(opened):
            if tag in _PYTHON:
                program = _text(completion[start : fence.start()]) or program
            opened = ""
    if opened and tag in _PYTHON:
        program = _text(completion[start:]) or program
    return program


def _text(code: str) -> str | None:
    return code if code.strip() else None


class CodeVerifier:
    """Judges completions by running their program on a problem's tests; one object serves any number of threads.

    A problem's metadata holds either

    - ``tests``: dictionaries with ``input`` and ``output``. The program reads standard input and has to print the
      same tokens, separated by white space, as the output: CodeContests' exact match.
    - ``test_code``: Python text that calls the program's functions, trusted, as in MBPP. Where it defines ``check``,
      as HumanEval's does, ``check(entry_point)`` is called, ``entry_point`` being metadata too.

    ``starter``, where it is there, is what the prompt has shown of the program: it comes before the completion's code,
    and a completion without a fence is code as a whole. A prompt that ends inside a fence has an empty starter.

    Args:
        limits: of each run.
        require_isolation: refuse on systems where programs cannot be isolated; otherwise warn.

    Raises:
        RheostatError: isolation is required and missing.
    """

    def __init__(self, limits: Limits | None = None, require_isolation: bool = True) -> None:
        self._sandbox = Sandbox(limits, require_isolation)

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """Right if every test passes; the first that does not is named.

        Raises:
            RheostatError: the sandbox failed, so that there is no verdict.
            ValueError: the problem has no tests.
        """
        metadata = problem.metadata
        starter = metadata.get("starter")
        code = extract_program(completion)
        if code is None and isinstance(starter, str) and completion.strip() and not _FENCE.search(completion):
            code = completion
        if code is None:
            return Verdict(False, "no code")
        program = f"{starter or ''}{code}"
        if metadata.get("test_code"):
            return _judge_calls(self._sandbox.test(program, _test_text(metadata), str(metadata.get("entry_point", ""))))
        tests: Any = metadata.get("tests")
        if not tests:
            raise ValueError(f"problem {problem.id} has no tests")
        return self._judge_outputs(program, tests)

    def _judge_outputs(self, program: str, tests: Sequence[Mapping[str, str]]) -> Verdict:
        outcomes = self._sandbox.run(program, (test["input"] for test in tests))
        for number, (test, outcome) in enumerate(zip(tests, outcomes, strict=False), start=1):
            if outcome.ending is not Ending.EXITED:
                return Verdict(False, f"test {number} of {len(tests)}: {_how(outcome)}")
            if outcome.output.split() != test["output"].split():
                return Verdict(False, f"test {number} of {len(tests)}: wrong output")
        return Verdict(True, f"{len(tests)} of {len(tests)} tests passed")


def _judge_calls(outcome: Outcome) -> Verdict:
    passed = outcome.ending is Ending.EXITED
    return Verdict(passed, "tests passed" if passed else f"tests: {_how(outcome)}")


def _test_text(metadata: Mapping[str, object]) -> str:
    """The tests with what the starter defines for them, save the function to be tested, which is the program's."""
    starter, test_code, entry_point = metadata.get("starter"), str(metadata["test_code"]), metadata.get("entry_point")
    if not re.search(r"^def check\(", test_code, re.MULTILINE):
        return test_code
    return f"{starter or f'def {entry_point}(): pass'}\ndel {entry_point}\n{test_code}\ncheck({entry_point})\n"


def _how(outcome: Outcome) -> str:
    if outcome.ending is not Ending.CRASHED:
        return outcome.ending.value
    if outcome.exit_code < 0:
        return f"killed by signal {-outcome.exit_code}"
    return outcome.error[:_DETAIL_CHARACTERS] or f"exit code {outcome.exit_code}"
