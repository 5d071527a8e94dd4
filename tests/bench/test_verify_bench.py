"""The verifiers' benchmark: what it makes up is as right or wrong as it says, and every side gives its own verdicts."""

import subprocess
from fractions import Fraction

import pytest

from rheostat.bench import verify
from rheostat.bench.verify import (
    Case,
    bench_verify,
    by_math_verifier,
    by_math_verify,
    in_new_sandbox,
    in_sandbox,
    in_subprocess,
    made_up_answers,
    made_up_programs,
)
from rheostat.console import Console
from rheostat.tasks import sandbox_connection
from rheostat.types import Problem


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_PROBLEMS", 7)
    monkeypatch.setattr(verify, "_PROGRAMS", 8)


def test_made_up_answers_are_half_right_and_new_every_time() -> None:
    cases = [case for seed in range(20) for case in made_up_answers(seed)]
    assert len(cases) == 20 * 7 * 8
    assert 0.4 < sum(case.is_right for case in cases) / len(cases) < 0.6
    assert len({case.completion for case in cases}) > 0.99 * len(cases)
    assert made_up_answers(3) == made_up_answers(3) != made_up_answers(4)


def test_both_sides_find_made_up_answers_as_right_as_they_are() -> None:
    cases = made_up_answers(5)
    truth = [case.is_right for case in cases]
    for judge in (by_math_verifier, by_math_verify):
        seconds, verdicts = judge(cases)
        assert seconds > 0
        assert sum(a == b for a, b in zip(verdicts, truth, strict=True)) >= 0.95 * len(truth)
    written = {case.completion.split("boxed{")[-1].rstrip("}$.") for case in cases if case.is_right}
    assert len(written) > 15


def case(answer: str, written: str) -> Case:
    return Case(Problem("p", "t", "t", "", answer), f"so it is $\\boxed{{{written}}}$", True)


def test_the_peer_is_math_verify_alone() -> None:
    cases = [case("\\frac{1}{2}", "0.5"), case("7", "8"), case("12_8", "12_7")]  # the last: a rule of ours
    assert by_math_verifier(cases)[1] == [True, False, False]
    assert by_math_verify(cases)[1] == [True, False, True]


def test_the_peer_can_be_killed() -> None:
    with pytest.raises(subprocess.SubprocessError):
        by_math_verify([case("7", "8")], 0.05)


def test_programs_are_as_right_as_they_say_on_every_side() -> None:
    cases = made_up_programs(0)
    truth = [case.is_right for case in cases]
    assert truth == [True, True, False, True, False, True, True, False]
    for judge in (in_sandbox, in_new_sandbox, in_subprocess):
        seconds, verdicts = judge(cases)
        assert seconds > 0
        assert verdicts == truth


def test_every_new_sandbox_has_a_launcher_of_its_own() -> None:
    launchers = []
    cases = made_up_programs(0)[:3]
    launcher = sandbox_connection._launcher
    start = launcher._start
    try:
        launcher._start = lambda: (start(), launchers.append(launcher._process))[0]  # type: ignore[method-assign]
        in_new_sandbox(cases)
        assert len(launchers) >= 3
        count = len(launchers)
        in_sandbox(cases)
        assert len(launchers) == count
    finally:
        del launcher._start  # type: ignore[misc]


def test_rows_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(seconds: float, wrong: int) -> verify.Judge:
        def judged(cases: object) -> tuple[float, list[bool]]:
            assert isinstance(cases, list)
            return seconds, [case.is_right != (number < wrong) for number, case in enumerate(cases)]

        return judged

    monkeypatch.setattr(verify, "by_math_verifier", judge(2.0, 0))
    monkeypatch.setattr(verify, "by_math_verify", judge(3.0, 14))
    monkeypatch.setattr(verify, "in_sandbox", judge(4.0, 0))
    monkeypatch.setattr(verify, "in_new_sandbox", judge(8.0, 2))
    monkeypatch.setattr(verify, "in_subprocess", judge(1.0, 2))
    result = bench_verify(3, Console(quiet=True), hanging=False)
    assert result["ratios"] == {
        "math: verifier/math-verify": 1.5,
        "programs: sandbox/subprocess": 0.25,
        "programs: sandbox anew/subprocess": 0.125,
    }
    value = {row["case"]: row["value"] for row in result["rows"]}
    assert value["math: verifier"] == 56 / 2
    assert value["math: right verdicts, verifier"] == 1
    assert (
        value["math: right verdicts, math-verify"] == value["math: equal verdicts, verifier"] == float(Fraction(3, 4))
    )
    assert value["programs: equal verdicts, sandbox"] == 0.75
    assert value["programs: equal verdicts, sandbox anew"] == 1

    monkeypatch.setattr(verify, "by_math_verify", lambda cases, patience=None: _fail())
    rows = {row["case"]: row["value"] for row in verify._made_to_hang(Console(quiet=True))}
    assert rows == {
        "math, made to hang: verifier": 2,
        "math, made to hang: math-verify": 30,
        "math, made to hang: math-verify killed": 1,
    }


def _fail() -> tuple[float, list[bool]]:
    raise subprocess.TimeoutExpired("peer", 30)
