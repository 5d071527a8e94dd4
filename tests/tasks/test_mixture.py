"""Several tasks as one: balanced, in order, each asked and judged by its own member."""

from dataclasses import dataclass

import pytest

from rheostat.errors import ConfigError
from rheostat.tasks.base import Split, Task
from rheostat.tasks.mixture import MixtureTask
from rheostat.tasks.procedural import procedural_task
from rheostat.types import Completion, FinishReason, Problem, Prompt, Verdict


@dataclass
class Own:
    """Remembers what it was asked."""

    name: str
    max_tokens: int = 8
    prefix: str = ""
    verifies_concurrently: bool = False

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        names = [f"{self.prefix or self.name}/{split}/{number}" for number in range(start, start + count)]
        return [Problem(name, self.name, "inner", f"{name}?", self.name, {"kept": name}) for name in names]

    def _check(self, problem: Problem) -> None:
        assert (problem.task, problem.member) == (self.name, "inner")
        assert problem.metadata == {"kept": problem.id}

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        self._check(problem)
        return Prompt(problem.id, f"{self.name} asks {problem.question} in {epoch}")

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        self._check(problem)
        return Verdict(completion.text == problem.answer, self.name)


@pytest.fixture
def mixture() -> MixtureTask:
    return MixtureTask([Own("a"), Own("b", 32), Own("c")])


@pytest.mark.parametrize("split", Split)
def test_each_member_has_as_many_problems_in_its_own_order(mixture: MixtureTask, split: Split) -> None:
    problems = mixture.problems(split, 12, start=6)
    assert [problem.member for problem in problems] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    for member in mixture.members:
        own = [(p.id, p.question, p.answer) for p in problems if p.member == member.name]
        assert own == [(p.id, p.question, p.answer) for p in member.problems(split, 4, start=2)]
    assert {problem.task for problem in problems} == {"a+b+c"}


def test_a_member_asks_and_judges_its_own_problems_as_it_does_alone(mixture: MixtureTask) -> None:
    for problem in mixture.problems(Split.TEST, 9):
        assert mixture.prompt(problem, 3) == Prompt(problem.id, f"{problem.member} asks {problem.question} in 3")
        for text in "abc":
            verdict = mixture.verify(problem, Completion(text, (1,), FinishReason.STOP))
            assert verdict == Verdict(text == problem.member, problem.member)


def test_its_budget_is_the_largest_and_it_is_concurrent_only_if_all_are(mixture: MixtureTask) -> None:
    assert (mixture.name, mixture.max_tokens) == ("a+b+c", 32)
    assert mixture.verifies_concurrently is False
    assert MixtureTask([Own("a", verifies_concurrently=True), Own("b")]).verifies_concurrently is False
    both = [Own(name, verifies_concurrently=True) for name in "ab"]
    assert MixtureTask(both).verifies_concurrently is True


@pytest.mark.parametrize(("count", "start"), [(4, 0), (3, 1), (1, 0), (-1, 0)])
def test_uneven_counts_are_refused(mixture: MixtureTask, count: int, start: int) -> None:
    with pytest.raises(ConfigError, match=rf"task a\+b\+c: .*multiples of its 3 members, got {count} from {start}"):
        mixture.problems(Split.TEST, count, start)


@pytest.mark.parametrize("names", ["", "a", "aa", "aba"])
def test_a_mixture_needs_two_tasks_of_different_names(names: str) -> None:
    with pytest.raises(ConfigError, match="two tasks or more of different names"):
        MixtureTask([Own(name) for name in names])


def test_members_that_share_a_problem_are_refused() -> None:
    shared: list[Task] = [Own("a", prefix="x"), Own("b", prefix="x")]
    with pytest.raises(ConfigError, match=r"a and b share the problem x/test/0: leave one out"):
        MixtureTask(shared).problems(Split.TEST, 2)


def test_a_mixture_may_hold_another() -> None:
    """``steps`` is itself one, whose prompts go by the member's name."""
    members = {name: procedural_task(name) for name in ("steps", "syllogism")}
    mixture = MixtureTask([*members.values()])
    problems = mixture.problems(Split.TEST, 24)
    alone = [problem for task in members.values() for problem in task.problems(Split.TEST, 12)]
    assert [problem.member for problem in problems] == ["steps"] * 12 + ["syllogism"] * 12
    for problem, own in zip(problems, alone, strict=True):
        task = members[problem.member]
        prompt = mixture.prompt(problem)
        assert prompt == task.prompt(own)
        answer = f"worked\nAnswer: {own.answer}" if prompt.cot else own.answer
        verdict = mixture.verify(problem, Completion(answer, (1,), FinishReason.STOP))
        assert verdict == Verdict(True, "score 1", own.answer)


def test_two_mixtures_that_ask_the_same_are_refused() -> None:
    mixture = MixtureTask([procedural_task("demo"), procedural_task("gcd")])
    with pytest.raises(ConfigError, match="demo and gcd share the problem gcd/"):
        mixture.problems(Split.TEST, 12)
