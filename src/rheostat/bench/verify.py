"""`rheostat bench verify`: verdicts per second on mathematics and on programs, beside verdicts without our guard.

Answers and programs are made up, so that the right verdict is known. On mathematics the peer is math-verify, called as
its README does, with its own time limits, in a process of its own; ours asks it, too, wherever texts and integers do
not decide. A problem has eight completions. On programs the peer is one plain Python process per program. One verdict
at a time on all sides. Answers made to hang come apart: seconds until there is a verdict, or the peer is killed.
"""

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.environment import machine, versions
from rheostat.tasks import sandbox_connection
from rheostat.tasks.code import CodeVerifier, extract_program
from rheostat.tasks.math import MathVerifier
from rheostat.tasks.sandbox import missing_protections
from rheostat.types import Problem

_PROBLEMS, _SAMPLES = 40, 8
_PROGRAMS = 24
_PATIENCE = 30.0  # seconds for an answer made to hang; math-verify's own limits are 5 for each of its two steps
_HANGING = ("9^{9^{9^{9}}}", "((7!)!)!", "e^{e^{e^{e^{e}}}}", "(a+b+c+d+e+f)^{40}")


@dataclass(frozen=True, slots=True)
class Case:
    """One completion, and whether it is right."""

    problem: Problem
    completion: str
    is_right: bool


Judge = Callable[[Sequence[Case]], tuple[float, list[bool]]]
"""Seconds, start-up left out, and verdicts."""


def bench_verify(repeats: int, console: Console, hanging: bool = True) -> dict[str, Any]:
    """All sides, ``repeats`` times in turn, each time with new answers; medians, ranges, and median ratios of speed.

    Args:
        repeats: how often.
        console: says how far it is.
        hanging: with the answers that are made to hang, once; a minute.
    """
    math: dict[str, Judge] = {"verifier": by_math_verifier, "math-verify": by_math_verify}
    code: dict[str, Judge] = {"sandbox": in_sandbox, "sandbox anew": in_new_sandbox, "subprocess": in_subprocess}
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for name, make, sides in (("math", made_up_answers, math), ("programs", made_up_programs, code)):
        rates: dict[str, list[float]] = {side: [] for side in sides}
        verdicts: dict[str, list[bool]] = {side: [] for side in sides}
        truth: list[bool] = []
        with console.progress(name, repeats, "") as bar:
            for repeat in range(repeats):
                cases = make(repeat)
                truth += [case.is_right for case in cases]
                for side, judge in sides.items():
                    seconds, found = judge(cases)
                    rates[side].append(len(cases) / seconds)
                    verdicts[side] += found
                bar(repeat + 1, repeats, 0)
        *ours, peer = sides
        rows += [row(f"{name}: {side}", values, "verdicts/s") for side, values in rates.items()]
        rows += [row(f"{name}: right verdicts, {side}", [_share(verdicts[side], truth)], "share") for side in sides]
        for side in ours:
            rows.append(row(f"{name}: equal verdicts, {side}", [_share(verdicts[side], verdicts[peer])], "share"))
            pairs = zip(rates[side], rates[peer], strict=True)
            ratios[f"{name}: {side}/{peer}"] = round(statistics.median(a / b for a, b in pairs), 3)
    if hanging:
        rows += _made_to_hang(console)
    return {
        "bench": "verify",
        "machine": machine() | {"isolation": "none" if missing_protections() else "full"},
        "versions": versions(),
        "rows": rows,
        "ratios": ratios,
    }


def _share(verdicts: list[bool], others: list[bool]) -> float:
    return statistics.fmean(a == b for a, b in zip(verdicts, others, strict=True))


def _made_to_hang(console: Console) -> list[dict[str, Any]]:
    problem = Problem("hang", "made up", "made up", "", "7")
    cases = [Case(problem, f"So it is $\\boxed{{{written}}}$.", False) for written in _HANGING]
    seconds: dict[str, list[float]] = {"verifier": [], "math-verify": []}
    killed = 0
    with console.progress("made to hang", len(cases), "") as bar:
        for done, case in enumerate(cases):
            seconds["verifier"].append(by_math_verifier([case])[0])
            try:
                seconds["math-verify"].append(by_math_verify([case], _PATIENCE)[0])
            except subprocess.SubprocessError:  # killed by us, or for the memory that it took
                seconds["math-verify"].append(_PATIENCE)
                killed += 1
            bar(done + 1, len(cases), 0)
    rows = [row(f"math, made to hang: {side}", values, "s") for side, values in seconds.items()]
    return [*rows, row("math, made to hang: math-verify killed", [killed / len(cases)], "share")]


def by_math_verifier(cases: Sequence[Case]) -> tuple[float, list[bool]]:
    """Ours, in a worker that has started."""
    verifier = MathVerifier()
    try:
        verifier(_WARM.problem, _WARM.completion)
        start = time.perf_counter()
        verdicts = [verifier(case.problem, case.completion).correct is True for case in cases]
        return time.perf_counter() - start, verdicts
    finally:
        verifier.close()


_CHILD = "import json, sys; from rheostat.bench.verify import direct; print(json.dumps(direct(json.load(sys.stdin))))"


def by_math_verify(cases: Sequence[Case], patience: float | None = None) -> tuple[float, list[bool]]:
    """The peer, in a process that has started.

    Raises:
        subprocess.SubprocessError: it took longer than ``patience`` seconds, or died.
    """
    asked = [[case.problem.answer, case.completion] for case in (_WARM, *cases)]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=patience,
        check=True,
    )
    seconds, verdicts = json.loads(done.stdout)
    return seconds, verdicts


def direct(asked: list[tuple[str, str]]) -> tuple[float, list[bool]]:
    """In the peer's process: the verdicts on all but the first, which warms up, and their seconds."""
    import math_verify  # only here: it brings sympy

    def judge(answer: str, completion: str) -> bool:
        return bool(math_verify.verify(math_verify.parse(f"${answer}$"), math_verify.parse(completion)))

    judge(*asked[0])
    start = time.perf_counter()
    verdicts = [judge(answer, completion) for answer, completion in asked[1:]]
    return time.perf_counter() - start, verdicts


def in_sandbox(cases: Sequence[Case]) -> tuple[float, list[bool]]:
    """Ours: a process that has Python and common modules loaded forks each program's sandbox."""
    verifier = CodeVerifier(require_isolation=False)
    start = time.perf_counter()
    verdicts = [verifier(case.problem, case.completion).correct is True for case in cases]
    return time.perf_counter() - start, verdicts


def in_new_sandbox(cases: Sequence[Case]) -> tuple[float, list[bool]]:
    """The same without that process: it starts anew for every program."""
    verifier = CodeVerifier(require_isolation=False)
    seconds, verdicts = 0.0, []
    for case in cases:
        sandbox_connection._launcher.stop()
        start = time.perf_counter()
        verdicts.append(verifier(case.problem, case.completion).correct is True)
        seconds += time.perf_counter() - start
    return seconds, verdicts


def in_subprocess(cases: Sequence[Case]) -> tuple[float, list[bool]]:
    """The peer: Python on program and tests; neither isolation nor limits, save of time."""
    start = time.perf_counter()
    verdicts = []
    for case in cases:
        metadata = case.problem.metadata
        text = f"{extract_program(case.completion)}\n{metadata['test_code']}\ncheck({metadata['entry_point']})\n"
        done = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, timeout=30, check=False)
        verdicts.append(done.returncode == 0)
    return time.perf_counter() - start, verdicts


def made_up_answers(seed: int) -> list[Case]:
    """Problems of several kinds, each with completions of which half are right, in various forms."""
    draw = random.Random(seed)
    cases = []
    for number in range(_PROBLEMS):
        answer, right, wrong = _KINDS[number % len(_KINDS)](draw)
        problem = Problem(f"{seed}-{number}", "made up", "made up", "", answer)
        for sample in range(_SAMPLES):
            is_right = draw.random() < 0.5
            written = draw.choice(right if is_right else wrong)
            steps = " ".join(f"Step {n}: we get ${draw.randint(2, 99)} + x$." for n in range(draw.randint(2, 12)))
            ending = f"The answer is ${written}$." if sample == 0 else f"So the answer is $\\boxed{{{written}}}$."
            cases.append(Case(problem, f"{steps} {ending}", is_right))
    draw.shuffle(cases)
    return cases


Kind = Callable[[random.Random], tuple[str, list[str], list[str]]]
"""An answer, ways to write it, and other answers."""


def _integer(draw: random.Random) -> tuple[str, list[str], list[str]]:
    n = draw.randint(10, 99_999)
    return f"{n}", [f"{n}", f"{n}.0", f"{n - 7}+7"], [f"{n + 1}", f"-{n}", f"{n}.5"]


def _fraction(draw: random.Random) -> tuple[str, list[str], list[str]]:
    bottom = draw.choice((4, 5, 8, 20, 25))
    top = bottom * draw.randint(1, 40) + 1
    right = [
        f"\\frac{{{top}}}{{{bottom}}}",
        f"\\dfrac{{{3 * top}}}{{{3 * bottom}}}",
        f"{top}/{bottom}",
        f"{top / bottom}",
    ]
    return right[0], right, [f"\\frac{{{bottom}}}{{{top}}}", f"{top / bottom + 1}", f"\\frac{{{top + 1}}}{{{bottom}}}"]


def _root(draw: random.Random) -> tuple[str, list[str], list[str]]:
    k, n = draw.randint(2, 30), draw.choice((2, 3, 5, 6, 7, 10))
    right = [f"{k}\\sqrt{{{n}}}", f"\\sqrt{{{k * k * n}}}", f"\\frac{{{k * n}}}{{\\sqrt{{{n}}}}}"]
    return right[0], right, [f"\\sqrt{{{k * n}}}", f"{k}\\sqrt{{{n + 1}}}", f"{k * n}"]


def _polynomial(draw: random.Random) -> tuple[str, list[str], list[str]]:
    a, b = draw.randint(2, 20), draw.randint(21, 40)
    right = [f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})", f"x(x+{a + b})+{a * b}", f"{a * b}+{a + b}x+x^2"]
    return right[0], right, [f"x^2+{a * b}x+{a + b}", f"(x-{a})(x-{b})", f"(x+{a})(x+{b})x"]


def _angle(draw: random.Random) -> tuple[str, list[str], list[str]]:
    bottom = draw.choice((3, 4, 6, 12))
    top = bottom * draw.randint(1, 9) + 1
    right = [
        f"\\frac{{{top}\\pi}}{{{bottom}}}",
        f"\\frac{{{top}}}{{{bottom}}}\\pi",
        f"\\frac{{{2 * top}\\pi}}{{{2 * bottom}}}",
    ]
    return (
        right[0],
        right,
        [f"\\frac{{{top}}}{{{bottom}}}", f"\\frac{{\\pi}}{{{bottom}}}", f"\\frac{{{top + 1}\\pi}}{{{bottom}}}"],
    )


def _pair(draw: random.Random) -> tuple[str, list[str], list[str]]:
    a, b = draw.randint(2, 50), draw.randint(51, 99)
    right = [f"({a},\\frac{{1}}{{{b}}})", f"({a}, \\frac{{2}}{{{2 * b}}})", f"\\left({a},\\frac1{{{b}}}\\right)"]
    return right[0], right, [f"(\\frac{{1}}{{{b}}},{a})", f"({a},{b})", f"({a},\\frac{{1}}{{{b + 1}}})"]


def _length(draw: random.Random) -> tuple[str, list[str], list[str]]:
    n = draw.randint(2, 500)
    right = [f"{n}\\text{{ cm}}", f"{n}", f"x = {n}", f"{n}\\mbox{{ cm}}", f"\\frac{{{4 * n}}}{{4}}\\text{{ cm}}"]
    return right[0], right, [f"{n + 1}\\text{{ cm}}", f"{n}.1", f"x = {10 * n}"]


_KINDS: tuple[Kind, ...] = (_integer, _fraction, _root, _polynomial, _angle, _pair, _length)
_WARM = Case(Problem("warm", "made up", "made up", "", "y+1"), "So it is $\\boxed{1+y}$.", True)

_FUNCTIONS = {
    "multiples": (
        "def multiples(limit):\n    return sum(n for n in range(limit) if n % {n} == 0)\n",
        "def check(candidate):\n    for limit in range(200):\n"
        "        assert candidate(limit) == {n} * ((limit + {n} - 1) // {n}) * ((limit + {n} - 1) // {n} - 1) // 2\n",
    ),
    "rotate": (
        "from collections import deque\n\ndef rotate(items):\n    turned = deque(items)\n"
        "    turned.rotate({n})\n    return list(turned)\n",
        "def check(candidate):\n    for size in range({n} + 1, 60):\n        items = list(range(size))\n"
        "        assert candidate(items) == items[-{n}:] + items[:-{n}]\n    assert candidate([]) == []\n",
    ),
    "shift": (
        "def shift(text):\n    turned = {chr(97 + i): chr(97 + (i + {n}) % 26) for i in range(26)}\n"
        "    return ''.join(turned.get(letter, letter) for letter in text)\n",
        "def check(candidate):\n    assert candidate('a b') == chr(97 + {n}) + ' ' + chr(98 + {n})\n"
        "    assert candidate('') == ''\n    assert candidate(chr(122 - {n}) + 'Z') == 'zZ'\n",
    ),
}


def made_up_programs(seed: int) -> list[Case]:
    """Functions with tests as HumanEval's; of eight, one returns something else, one raises, one does not compile."""
    draw = random.Random(seed)
    cases = []
    for number in range(_PROGRAMS):
        name = list(_FUNCTIONS)[number % len(_FUNCTIONS)]
        n = str(draw.randint(2, 9))
        program, tests = (text.replace("{n}", n) for text in _FUNCTIONS[name])
        is_right = True
        if number % 8 in _BROKEN:
            program, is_right = program + _BROKEN[number % 8].format(name=name), False
        problem = Problem(f"{seed}-{number}", "made up", "made up", "", "", {"test_code": tests, "entry_point": name})
        cases.append(Case(problem, f"This does it:\n```python\n{program}```\n", is_right))
    return cases


_BROKEN = {
    2: "\ndef {name}(given):\n    return given\n",
    4: "\ndef {name}(given):\n    return {{}}[given]\n",
    7: "\ndef {name}(given:\n",
}
