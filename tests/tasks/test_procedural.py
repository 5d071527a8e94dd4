"""Splits that share no question, prompts, and verdicts that are right only at score 1."""

import pytest
import reasoning_gym
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rheostat.errors import ConfigError
from rheostat.tasks.base import Split, Task
from rheostat.tasks.procedural import MEMBERS, Member, ProceduralTask, procedural_task
from rheostat.types import Completion, FinishReason, Problem

COUNTS = {Split.TRAIN: 200, Split.VALIDATION: 90, Split.TEST: 130}


@pytest.fixture(scope="module")
def tasks() -> dict[str, ProceduralTask]:
    return {name: procedural_task(name) for name in (*MEMBERS, "demo")}


@pytest.fixture(scope="module")
def problems(tasks: dict[str, ProceduralTask]) -> dict[str, dict[Split, list[Problem]]]:
    """Hundreds of problems of each member."""
    return {name: {split: tasks[name].problems(split, count) for split, count in COUNTS.items()} for name in MEMBERS}


def written(text: str, reason: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(text, (1, 2), reason)


def shots_of(prompt: str) -> list[tuple[str, str]]:
    """Question and answer of each worked example of a prompt."""
    *shots, _ = prompt.split("\n\n")
    pairs = []
    for shot in shots:
        question, answer = shot.split("\n")
        pairs.append((question.removeprefix("Question: "), answer.removeprefix("Answer: ")))
    return pairs


@pytest.mark.parametrize("member", MEMBERS)
def test_no_question_stands_twice_in_or_between_splits(
    member: str, problems: dict[str, dict[Split, list[Problem]]]
) -> None:
    questions = [problem.question for split in Split for problem in problems[member][split]]
    assert len(questions) == len(set(questions)) == sum(COUNTS.values())


def test_ids_are_unique_over_members_and_splits(problems: dict[str, dict[Split, list[Problem]]]) -> None:
    ids = [problem.id for of_split in problems.values() for some in of_split.values() for problem in some]
    assert len(ids) == len(set(ids)) == len(MEMBERS) * sum(COUNTS.values())


@pytest.mark.parametrize("member", MEMBERS)
def test_prompt_has_worked_examples_of_no_split_and_ends_where_the_answer_begins(
    member: str, tasks: dict[str, ProceduralTask], problems: dict[str, dict[Split, list[Problem]]]
) -> None:
    task, of_split = tasks[member], problems[member]
    problem = of_split[Split.TRAIN][0]
    prompt = task.prompt(problem)
    assert (prompt.problem_id, prompt.stop) == (problem.id, ("\n",))
    assert prompt.text.endswith(f"\n\nQuestion: {problem.question}\nAnswer:")
    shots = shots_of(prompt.text)
    assert len(shots) == len({question for question, _ in shots}) == 4
    asked = {other.question for some in of_split.values() for other in some}
    assert asked.isdisjoint(question for question, _ in shots)
    other = task.prompt(of_split[Split.TEST][0])
    assert shots_of(other.text) == shots


@pytest.mark.parametrize("member", MEMBERS)
def test_answers_of_the_data_set_are_right_and_others_wrong(
    member: str, tasks: dict[str, ProceduralTask], problems: dict[str, dict[Split, list[Problem]]]
) -> None:
    for split in Split:
        answers = {problem.answer for problem in problems[member][split]}
        assert len(answers) > 1
        for problem in problems[member][split][:20]:
            assert (problem.task, problem.member) == (member, member)
            assert tasks[member].verify(problem, written(f" {problem.answer} ")).correct is True
            other = min(answers - {problem.answer})
            assert tasks[member].verify(problem, written(other)).correct is False
            assert tasks[member].verify(problem, written("")).correct is False


def test_what_votes_is_the_stripped_answer_of_a_completion_that_ended() -> None:
    task = procedural_task("gcd")
    problem = task.problems(Split.VALIDATION, 1)[0]
    for text, reason, answer in (
        (" 99", FinishReason.STOP, "99"),
        (f" {problem.answer} ", FinishReason.STOP, problem.answer),
        (" ", FinishReason.STOP, None),
        (" 99", FinishReason.LENGTH, None),
    ):
        assert task.verify(problem, Completion(text, (1,), reason)).answer == answer


def test_partial_credit_is_wrong() -> None:
    """reasoning-gym gives an answer that merely contains the right one a part of the score."""
    task = ProceduralTask("own", {"divisors": Member("gcd", {"min_value": 1, "max_value": 50})})
    [problem] = task.problems(Split.TEST, 1)
    entry = {"question": problem.question, "answer": problem.answer, "metadata": {}}
    answer = f"The answer is {problem.answer}"
    score = reasoning_gym.create_dataset("gcd", seed=0, size=1).score_answer(answer=answer, entry=entry)
    assert 0 < score < 1
    verdict = task.verify(problem, written(answer))
    assert verdict.correct is False
    assert verdict.detail == f"score {score:g}"


@pytest.mark.parametrize("member", MEMBERS)
def test_a_completion_cut_by_the_budget_is_wrong(
    member: str, tasks: dict[str, ProceduralTask], problems: dict[str, dict[Split, list[Problem]]]
) -> None:
    problem = problems[member][Split.TEST][0]
    verdict = tasks[member].verify(problem, written(problem.answer, FinishReason.LENGTH))
    assert verdict.correct is False
    assert "token budget" in verdict.detail


ODD = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["nan", "inf", "-inf", "1e999", "1,2", "+", "-", ".", "1/0", "１", "½", "1_0", "0x1", "−1", "\ud800"]
    ),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ODD)
def test_no_answer_trips_a_verifier(
    text: str, tasks: dict[str, ProceduralTask], problems: dict[str, dict[Split, list[Problem]]]
) -> None:
    for member in MEMBERS:
        assert tasks[member].verify(problems[member][Split.TEST][0], written(text)).correct in (True, False)


@pytest.mark.parametrize("split", Split)
@pytest.mark.parametrize("member", MEMBERS)
def test_start_continues_without_overlap(
    member: str, split: Split, tasks: dict[str, ProceduralTask], problems: dict[str, dict[Split, list[Problem]]]
) -> None:
    assert (
        tasks[member].problems(split, 50) + tasks[member].problems(split, 40, start=50) == problems[member][split][:90]
    )


def test_a_mixture_is_balanced_and_its_start_counts_all_members(tasks: dict[str, ProceduralTask]) -> None:
    demo: Task = tasks["demo"]
    size = len(MEMBERS)
    first, later = demo.problems(Split.TEST, 4 * size), demo.problems(Split.TEST, 3 * size, start=4 * size)
    assert [problem.member for problem in first] == [member for member in MEMBERS for _ in range(4)]
    together = demo.problems(Split.TEST, 7 * size)
    for member in MEMBERS:
        ours, rest, all_of = ([p for p in some if p.member == member] for some in (first, later, together))
        assert ours + rest == all_of


def test_a_member_asks_the_same_questions_alone_and_in_the_mixture(
    tasks: dict[str, ProceduralTask], problems: dict[str, dict[Split, list[Problem]]]
) -> None:
    for problem in tasks["demo"].problems(Split.TRAIN, 5 * len(MEMBERS)):
        alone = next(p for p in problems[problem.member][Split.TRAIN] if p.id == problem.id)
        assert (alone.question, alone.answer) == (problem.question, problem.answer)
        assert tasks["demo"].prompt(problem) == tasks[problem.member].prompt(alone)
        assert tasks["demo"].verify(problem, written(problem.answer)).correct is True


def test_problems_are_the_same_every_time(
    tasks: dict[str, ProceduralTask], problems: dict[str, dict[Split, list[Problem]]]
) -> None:
    for member in MEMBERS:
        fresh = procedural_task(member)
        again = fresh.problems(Split.VALIDATION, 30)
        assert again == problems[member][Split.VALIDATION][:30]
        assert fresh.prompt(again[0]) == tasks[member].prompt(again[0])


def test_unknown_task_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        procedural_task("gdc")
    told = str(caught.value)
    assert "'gdc'" in told
    assert all(name in told for name in ("demo", *MEMBERS))
    assert "\n" not in told


def test_exhausted_split_is_told_in_one_line() -> None:
    """Of 63 numbers a split gets some, never all."""
    task = ProceduralTask("own", {"bits": Member("count_bits", {"min_n": 1, "max_n": 63})})
    with pytest.raises(ConfigError) as caught:
        task.problems(Split.VALIDATION, 60)
    told = str(caught.value)
    assert all(part in told for part in ("own", "'bits'", "validation", "60"))
    assert "\n" not in told


@pytest.mark.parametrize(("count", "start"), [(3, 0), (2, 1), (0, 0), (-2, 0), (2, -2)])
def test_a_mixture_wants_multiples_of_its_members(count: int, start: int) -> None:
    own = ProceduralTask("own", {"bits": Member("count_bits"), "divisors": Member("gcd")})
    assert len(own.problems(Split.TRAIN, 4, start=2)) == 4
    with pytest.raises(ConfigError, match=f"multiples of its 2 members, got {count} from {start}"):
        own.problems(Split.TRAIN, count, start)
