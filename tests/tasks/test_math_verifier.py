"""Mathematical answers: what counts as equal, where the answer stands, and answers made to hang the verifier."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rheostat.errors import RheostatError
from rheostat.tasks.math import MathVerifier, last_box
from rheostat.tasks.workers import WorkerPool
from rheostat.types import Problem

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def verify() -> Iterator[MathVerifier]:
    verifier = MathVerifier()
    yield verifier
    verifier.close()


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: WorkerPool, *args: object) -> object:
        raise AssertionError(f"asked a worker about {args}")

    monkeypatch.setattr(WorkerPool, "call", call)


def problem(answer: str) -> Problem:
    return Problem("p", "math", "math", "?", answer)


def boxed(answer: str) -> str:
    return rf"We get $3$, then 4, and so $\boxed{{{answer}}}$."


EQUAL = [
    ("0", "0"),
    ("007", "7"),
    (r"\frac12", "1/2"),
    (r"\dfrac{3}{4}", "0.75"),
    ("0.5", ".5"),
    (r"\frac{1}{3}", "0.333333"),
    (r"-\frac{5}{3}.", r"\frac{-5}{3}"),
    (r"6\frac{1}{2}", "6.5"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("a + b + c", "c+a+b"),
    (r"\sin^2 t", r"\sin^2(t)"),
    ("3 + 4i", "4i+3"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y=2x+3", "y = 3+2x"),
    ("10\\%", "10"),
    ("90^\\circ", "90"),
    ("30^\\circ.", "30°"),
    ("\\$32", "32.00"),
    ("12,345", "12345"),
    (r"362,\!880", "362{,}880"),
    (r"\frac{2469}{20,\!000}", r"\frac{2469}{20000}"),
    ("6,8,10", "10, 8, 6"),
    (r"6, 8\text{, and }10", "6,8,10"),
    (r"-12 \text{ or } -30", "-30,-12"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19},1-\sqrt{19}"),
    ("(3, -1)", r"\left(3,-1\right)"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"x \in [-2,7]", r"-2 \le x \le 7"),
    (r"(-\infty, 0) \cup (0, \infty)", r"(-\infty,0)\cup(0,\infty)"),
    (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}.", r"\begin{bmatrix}\frac12\\2\end{bmatrix}"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{Evelyn}", r"\textbf{evelyn}"),
    (r"\text{(C)}", "C"),
    (r"\text{(E)},", "(E)"),
    ("2516_8", "2516_{8}"),
    ("43_5.", "43"),
    (r"\text{A5}_{11}", "A5_{11}"),
    ("5", r"5 \text{ cm}^2"),
    (r"7\text{ hours}.", "7"),
    (r"164 \pi \mbox{ square feet}", r"164\pi"),
    ("18", "18 dollars"),
    (r"\approx 8.24 \text{ mph}", "8.24"),
    (r"8\!:\!34 \text{ p.m.}", r"8:34 \text{ PM}"),
    (r"\emptyset", r"\varnothing"),
    (r"2^{2008} -2", r"-2 + 2^{2008}"),
    (r"\text{an answer sympy cannot read}", "an answer sympy cannot read"),
    ("9^{9^{9}}", "9^{ 9^{9} }"),
]

DIFFERENT = [
    ("5", "6"),
    ("5", "-5"),
    ("12", "1 2"),
    ("1,000", "1"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("[1,2)", "[1,2]"),
    ("[1,2]", "1 < x < 2"),
    (r"\frac12", r"\frac13"),
    ("10\\%", "1"),
    ("2516_8", "2516_7"),
    (r"\text{Evelyn}", r"\text{Evan}"),
    (r"\text{even}", r"\text{odd}"),
    (r"\text{(A)}", r"\text{(B)}"),
    ("6,8,10", "6,8"),
    ("6,8,10", "6,8,11"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"8:34 \text{ p.m.}", r"8:34 \text{ a.m.}"),
    ("3+4i", "3-4i"),
    ("x=5", "y=5"),
    ("x<5", r"x\le5"),
    (r"\sqrt2", "1.414"),
    (r"\pi", "3.14"),
    ("3x+2t", "3x+2"),  # math-verify's removal of units takes the t for one
    ("a + b + c", "a + b + d"),
    ("5", "the value is 7 or maybe 5"),
    ("5", "{"),
    ("5", "}{"),
    ("5", "\\"),
    ("5", "\0"),
    ("5", "\ud800"),
    ("5", "٦"),
    ("5", "答案是六"),
    ("5", " "),
]


@pytest.mark.parametrize(("answer", "written"), EQUAL)
def test_equal(verify: MathVerifier, answer: str, written: str) -> None:
    assert verify(problem(answer), boxed(written)).correct is True


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (boxed(r"\frac{1}{2}"), r"\frac{1}{2}"),
        (boxed("7 cm."), "7"),
        ("We add them. The answer is 12.", "12"),
        ("So $x = 4$, and then $x = 6$.", "x = 6"),
        (boxed("9**9**9**9"), "9**9**9**9"),
        (boxed(""), None),
        ("I do not know.", None),
    ],
)
def test_what_votes_is_the_answer_as_it_was_read(verify: MathVerifier, completion: str, answer: str | None) -> None:
    assert verify(problem("12"), completion).answer == answer


@pytest.mark.parametrize(("answer", "written"), DIFFERENT)
def test_different(verify: MathVerifier, answer: str, written: str) -> None:
    verdict = verify(problem(answer), boxed(written))
    assert verdict.correct is False
    assert verdict.detail


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("none here", None),
        ("", None),
        (r"\boxedness{5}", None),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"first \boxed{4}, then \boxed{5}, by 6", "5"),
        (r"\boxed{4} \fbox{5}", "5"),
        (r"\boxed{4} but \boxed{}", ""),
        (r"\boxed{\frac{1}{2}} {x}", r"\frac{1}{2}"),
        (r"\boxed{\left\{ 1 \right.} }", r"\left\{ 1 \right."),
        (r"\boxed{\begin{matrix}1\\{2}\end{matrix}}", r"\begin{matrix}1\\{2}\end{matrix}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"$\boxed 5$ and", "5"),
        (r"\boxed{4} then \boxed{5", ""),
        (r"\boxed", ""),
    ],
)
def test_the_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        ("She makes 9 * 2 = $18 every day.\n#### 18", True),
        ("So the answer is 18.", True),
        ("The final answer is $18$. I hope it is correct.", True),
        (r"Hence \[x = \frac{36}{2}.\]", True),
        ("Therefore it is 18", True),
        ("Therefore it is 19", False),
        ("18 is wrong, the answer is 19.", False),
        ("I do not know", False),
        ("", False),
        (" \n ", False),
        ("18" + " and so on" * 100_000, False),
        ("so on and " * 100_000 + "the answer is 18", True),
    ],
    ids=range(12),
)
def test_without_a_box_math_verify_looks_for_the_answer(verify: MathVerifier, completion: str, correct: bool) -> None:
    assert verify(problem("18"), completion).correct is correct


def test_a_megabyte_is_judged_at_once(verify: MathVerifier) -> None:
    start = time.monotonic()
    assert verify(problem("18"), "x {" * 350_000 + r"\boxed{18}").correct is True
    assert verify(problem("18"), r"\boxed{" * 150_000 + "18").correct is False
    assert verify(problem("18"), r"\boxed{" + "1" * 1_000_000 + "}").detail == "the answer is too long"
    assert verify(problem("18"), r"\boxed{" + " " * 1_000_000 + "}").correct is False
    assert time.monotonic() - start < 10


@pytest.mark.usefixtures("no_workers")
def test_equal_text_and_integers_take_no_worker(verify: MathVerifier) -> None:
    assert verify(problem(r"\frac{1}{2}"), boxed(r"\dfrac{1} {2}")).correct is True
    assert verify(problem("18"), boxed("18.")).correct is True
    assert verify(problem("18"), boxed("19")).correct is False


HOPELESS = {
    "tower": "9^{9^{9^{9}}}",
    "power of a power": "(9^9)^{9^9}",
    "exponent": "7^{123456789}",
    "factorial": "99999999!",
    "factorials": "((5!)!)!",
    "binomial": r"\binom{100000000}{50000000}",
    "braces": "{" * 30 + "1" + "}" * 30,
    "parentheses": "(" * 200 + "1" + ")" * 200,
    "digits": "9" * 5000,
}


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize("written", HOPELESS.values(), ids=HOPELESS)
def test_the_commonest_hangs_take_no_worker(verify: MathVerifier, written: str) -> None:
    assert "too" in verify(problem("7"), boxed(written)).detail


def test_a_small_tower_is_a_number(verify: MathVerifier) -> None:
    assert verify(problem("256"), boxed("2^{2^{3}}")).correct is True


def test_a_poisoned_batch_ends_with_the_rest_right(verify: MathVerifier) -> None:
    hanging = ["e^{e^{e^{e^{e}}}}", "(a+b+c+d+e+f)^{40}"]
    written = [hanging.pop() if n in (7, 23) else f"{n} + x" for n in range(40)]
    with ThreadPoolExecutor(16) as threads:
        verdicts = list(threads.map(lambda n: verify(problem(f"x+{n}"), boxed(written[n])), range(40)))
    assert [n for n in range(40) if not verdicts[n].correct] == [7, 23]
    assert all("longer than 5 s" in verdicts[n].detail for n in (7, 23))


def test_a_verifier_that_cannot_start_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    verifier = MathVerifier()
    with pytest.raises(RheostatError, match=r"^rheostat.tasks.equality:equal cannot be called"):
        verifier(problem("x"), boxed("y"))


def test_sympy_stays_out_of_this_process() -> None:
    code = "import sys, rheostat.tasks.math; assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
