"""Programs taken out of completions, and the verdicts on them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from rheostat.tasks.code import CodeVerifier, extract_program
from rheostat.tasks.sandbox import Limits, missing_protections
from rheostat.types import Problem

isolated = pytest.mark.skipif(bool(missing_protections()), reason="programs cannot be isolated here")


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("First\n```\na\n```\nthen\n```py\nb\n```\ndone", "b\n"),
        ("```python3\na\n```\n```bash\nrm\n```", "a\n"),
        ("```Python\na\n```\nExample:\n```text\n1\n```", "a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("  ```python\n  a\n  ```", "  a\n"),
        ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''\n"),
        ("```python title=x\na\n```", "a\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        ("text\n```python\nwhile True:\n    pa", "while True:\n    pa"),
        ("```python\na\n```\nand\n```python\n", "a\n"),
        ("print(1)\n```", "print(1)\n"),
        ("print(1)\n```\n\n", "print(1)\n"),
        ("print(1)", None),
        ("", None),
        ("```\n```", None),
        ("```python\n   \n```", None),
        ("```cpp\nint main() {}\n```", None),
        ("Use `x = 1` and ```y``` inline", None),
    ],
)
def test_extraction(completion: str, program: str | None) -> None:
    assert extract_program(completion) == program


@pytest.fixture(scope="module")
def verifier() -> CodeVerifier:
    return CodeVerifier(Limits(cpu_seconds=1, wall_seconds=4.0, memory_bytes=256 << 20))


def problem(**metadata: object) -> Problem:
    return Problem("p", "code", "m", "question", "", metadata)


SUMS = problem(tests=[{"input": "1 2\n", "output": "3\n"}, {"input": "4 5", "output": "9  \n"}])


@isolated
@pytest.mark.parametrize(
    ("code", "correct", "detail"),
    [
        ("print(sum(map(int, input().split())))", True, "2 of 2 tests passed"),
        ("print('', sum(map(int, input().split())), '', sep='\\n')", True, "2 of 2 tests passed"),
        ("print(3)", False, "test 2 of 2: wrong output"),
        ("print(3.0)", False, "test 1 of 2: wrong output"),
        ("print(3, 3)", False, "test 1 of 2: wrong output"),
        ("", False, "no code"),
        ("while True: pass", False, "test 1 of 2: timed out"),
        ("x = 9**9**9", False, "test 1 of 2: timed out"),
        ("x = " + "(" * 5000 + ")" * 5000, False, "test 1 of 2: SyntaxError: too many nested parentheses"),
        ("x = " + "-" * 100_000 + "1", False, "test 1 of 2: over memory"),
        ("print(3)\0", False, "test 1 of 2: SyntaxError: source code string cannot contain null bytes"),
        ("print(3); raise SystemExit", False, "test 2 of 2: wrong output"),
        ("print(3); raise SystemExit(1)", False, "test 1 of 2: exit code 1"),
        ("import os; os.abort()", False, "test 1 of 2: killed by signal 6"),
        ("print('\ud800')", False, "test 1 of 2: UnicodeEncodeError"),
        ("while True: print('3' * 100_000)", False, "test 1 of 2: over output"),
    ],
)
def test_outputs(verifier: CodeVerifier, code: str, correct: bool, detail: str) -> None:
    verdict = verifier(SUMS, f"Here it is:\n```python\n{code}\n```\n")
    assert (verdict.correct, verdict.detail[: len(detail)]) == (correct, detail)
    assert len(verdict.detail) < 300


@isolated
def test_every_test_counts(verifier: CodeVerifier) -> None:
    """One wrong token, in whichever test, is a wrong verdict."""
    echo = "```python\nprint(input())\n```"
    right = [{"input": f"{n} x", "output": f"{n} x"} for n in range(4)]
    assert verifier(problem(tests=right), echo).correct is True
    for changed in range(4):
        tests = [test | ({"output": "0 y"} if number == changed else {}) for number, test in enumerate(right)]
        verdict = verifier(problem(tests=tests), echo)
        assert (verdict.correct, verdict.detail) == (False, f"test {changed + 1} of 4: wrong output")


STARTER = 'import math\n\ndef helper(x):\n    return x + 1\n\ndef double(x: int) -> int:\n    """Twice x."""\n'
CHECK = "def check(candidate):\n    assert candidate(2) == helper(3)\n    assert math.isclose(candidate(0.5), 1)\n"
DOUBLE = problem(starter=STARTER, test_code=CHECK, entry_point="double", tests=[{"input": "2", "output": "4"}])


@isolated
@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        ("    return 2 * x\n", True),
        ("    return 3 * x\n", False),
        ("```python\ndef double(x):\n    return 2 * x\n```", True),
        ("```python\ndef double(x):\n    return helper(x) + x - 1\n```", True),
        ("```python\n    return 2 * x\n```", True),
        ("", False),
        ("    pass\ndef helper(x): return None\n", False),
        ("    return None\nclass math:\n    isclose = lambda *a: True\n", False),
        ("    import os\n    os._exit(0)\n", False),
        ("```cpp\nreturn 2 * x;\n```", False),
    ],
)
def test_functions_with_a_starter(verifier: CodeVerifier, completion: str, correct: bool) -> None:
    assert verifier(DOUBLE, completion).correct is correct


@isolated
def test_functions_without_a_starter(verifier: CodeVerifier) -> None:
    asked = problem(test_code="assert sum(2, 3) == 6\nassert sum(1, 1) == 1", entry_point="sum")
    assert verifier(asked, "```python\ndef sum(a, b): return a * b\n```").correct is True
    wrong = verifier(asked, "```python\ndef sum(a, b): return a + b\n```")
    assert (wrong.correct, wrong.detail) == (False, "tests: AssertionError")
    missing = verifier(asked, "```python\ndef product(a, b): return a * b\n```")
    assert (missing.correct, missing.detail) == (False, "tests: NameError: name 'sum' is not defined")
    assert verifier(asked, "def sum(a, b): return a * b").detail == "no code"
    opened = problem(test_code="assert f() == 1", entry_point="f", starter="")
    assert verifier(opened, "def f(): return 1").correct is True


@isolated
def test_a_problem_without_tests_is_an_error(verifier: CodeVerifier) -> None:
    with pytest.raises(ValueError, match="problem p has no tests"):
        verifier(problem(tests=[]), "```\nprint(1)\n```")


@isolated
def test_threads_share_a_verifier(verifier: CodeVerifier) -> None:
    def judge(number: int) -> bool | None:
        tests = [{"input": str(number), "output": str(number * 2)}]
        return verifier(problem(tests=tests), f"```\nprint(int(input()) * {2 + number % 2})\n```").correct

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(judge, range(1, 13))) == [number % 2 == 0 for number in range(1, 13)]
