"""Chain-of-thought prompts: worked steps that lead to the answer, a fixed share of prompts, one prefix for all."""

import re
from math import gcd

import pytest
import reasoning_gym
from scipy.stats import binomtest

from rheostat.tasks import steps
from rheostat.tasks.base import Split
from rheostat.tasks.procedural import STEPS, ProceduralTask, procedural_task
from rheostat.types import Completion, FinishReason, Problem, Prompt

COUNTS = {Split.TRAIN: 480, Split.VALIDATION: 180, Split.TEST: 300}
_SUM = re.compile(r"(-?\d+) ([+-]) (-?\d+) = (-?\d+)")


@pytest.fixture(scope="module")
def task() -> ProceduralTask:
    return procedural_task("steps")


@pytest.fixture(scope="module")
def problems(task: ProceduralTask) -> dict[Split, list[Problem]]:
    return {split: task.problems(split, count) for split, count in COUNTS.items()}


@pytest.fixture(scope="module")
def prompts(task: ProceduralTask, problems: dict[Split, list[Problem]]) -> dict[Split, list[Prompt]]:
    return {split: [task.prompt(problem) for problem in some] for split, some in problems.items()}


def written(text: str) -> Completion:
    return Completion(text, (1, 2), FinishReason.STOP)


@pytest.mark.parametrize("terms", [2, 4])
def test_partial_sums_are_true_and_end_with_the_answer(terms: int) -> None:
    data = reasoning_gym.create_dataset(
        "chain_sum", seed=5, size=300, min_terms=terms, max_terms=terms, min_digits=1, max_digits=2
    )
    for item in data:
        shown = [_SUM.fullmatch(line) for line in steps.partial_sums(item["metadata"]).split(", ")]
        assert len(shown) == terms - 1
        total = None
        for line in shown:
            assert line is not None
            left, sign, right, value = line.groups()
            assert total in (None, left)  # goes on from the line before
            assert int(value) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
            total = value
        assert total == item["answer"]
        assert steps.ask_sum(item["metadata"]) == f"{item['metadata']['expression']} = ?"


def test_what_is_kept_is_the_answer() -> None:
    spec = STEPS["number_filtering"]
    for item in reasoning_gym.create_dataset(spec.dataset, seed=6, size=300, **spec.settings):
        shown = [line.split() for line in steps.keep_or_remove(item["metadata"]).split(", ")]
        limit = re.search(r"(larger|smaller) than (-?[\d.]+)", item["question"])
        asked = re.search(r"(keep|remove) all numbers", item["question"].lower())
        assert limit is not None
        assert asked is not None
        for number, verdict in shown:
            inside = float(number) > float(limit[2]) if limit[1] == "larger" else float(number) < float(limit[2])
            assert (verdict == "keep") == (inside == (asked[1] == "keep"))
        kept = [number for number, verdict in shown if verdict == "keep"]
        assert [number for number, _ in shown] == item["metadata"]["original_numbers"]
        assert str(kept) == item["answer"]


def test_the_short_question_about_divisors_has_the_answer() -> None:
    spec = STEPS["gcd"]
    for item in reasoning_gym.create_dataset(spec.dataset, seed=7, size=100, **spec.settings):
        numbers = [int(number) for number in re.findall(r"\d+", steps.ask_gcd(item["metadata"]))]
        assert len(numbers) == 2
        assert str(gcd(*numbers)) == item["answer"]


def test_three_tenths_of_the_prompts_that_can_ask_for_steps(
    problems: dict[Split, list[Problem]], prompts: dict[Split, list[Prompt]]
) -> None:
    for split in Split:
        able = [prompt.cot for prompt, p in zip(prompts[split], problems[split], strict=True) if p.member != "gcd"]
        assert binomtest(sum(able), len(able), 0.3).pvalue > 1e-3
        assert not any(
            prompt.cot for prompt, p in zip(prompts[split], problems[split], strict=True) if p.member == "gcd"
        )


def test_the_choice_is_the_same_every_time(
    problems: dict[Split, list[Problem]], prompts: dict[Split, list[Prompt]]
) -> None:
    fresh = procedural_task("steps")
    assert [fresh.prompt(problem) for problem in problems[Split.TEST]] == prompts[Split.TEST]


def test_all_prompts_share_one_prefix_and_end_where_the_model_goes_on(
    task: ProceduralTask, problems: dict[Split, list[Problem]], prompts: dict[Split, list[Prompt]]
) -> None:
    prefixes = set()
    for problem, prompt in zip(problems[Split.TEST], prompts[Split.TEST], strict=True):
        prefix, question, end = prompt.text.rpartition(f"Question: {problem.question}\n")
        assert question
        assert (end, prompt.stop) == (("Steps:", ("\n\n",)) if prompt.cot else ("Answer:", ("\n",)))
        prefixes.add(prefix)
    [prefix] = prefixes
    examples = prefix.strip().split("\n\n")
    assert len(examples) == 4 * len(STEPS)
    assert sum("\nSteps: " in example for example in examples) == 4  # half of those that can, in turn


def test_the_worked_examples_answer_themselves(prompts: dict[Split, list[Prompt]]) -> None:
    """The steps that a prompt shows are those of its own question."""
    sums = 0
    for example in prompts[Split.TEST][0].text.split("\n\n")[:-1]:
        question, *worked, answer = example.split("\n")
        if worked and (shown := _SUM.search(worked[0])):
            assert question == f"Question: {shown[1]} {shown[2]} {shown[3]} = ?"
            assert answer == f"Answer: {shown[4]}"
            sums += 1
    assert sums == 2


def test_splits_share_no_question(problems: dict[Split, list[Problem]]) -> None:
    questions = [(p.member, p.question) for some in problems.values() for p in some]
    assert len(questions) == len(set(questions)) == sum(COUNTS.values())


def test_the_answer_stands_after_the_last_marker(
    task: ProceduralTask, problems: dict[Split, list[Problem]], prompts: dict[Split, list[Prompt]]
) -> None:
    pairs = list(zip(problems[Split.TEST], prompts[Split.TEST], strict=True))
    for problem, prompt in pairs[:: len(pairs) // 60]:
        right = problem.answer

        def correct(text: str, problem: Problem = problem) -> bool | None:
            return task.verify(problem, written(text)).correct

        if not prompt.cot:
            assert correct(f" {right}")
            continue
        assert correct(f" think\nAnswer: {right}")
        assert correct(f" think\nAnswer: 12345\nAnswer: {right}")
        assert not correct(f" think\nAnswer: {right}\nAnswer: 12345")
        assert not correct(f" {right}")
        assert not correct(f" Answer: {right}")  # steps come first, on a line of their own
        assert task.verify(problem, written(f" {right}")).detail == "steps without an answer"
        cut = Completion(f" think\nAnswer: {right}", (1,), FinishReason.LENGTH)
        assert not task.verify(problem, cut).correct
    assert any(prompt.cot for _, prompt in pairs[:: len(pairs) // 60])


def test_steps_that_stand_in_the_examples_are_judged_right(
    task: ProceduralTask, problems: dict[Split, list[Problem]], prompts: dict[Split, list[Prompt]]
) -> None:
    """A model that imitates the examples exactly is right: format of the prompt and verifier agree."""
    judged = 0
    for problem, prompt in zip(problems[Split.TRAIN], prompts[Split.TRAIN], strict=True):
        if prompt.cot and problem.member == "chain_sum":
            left, sign, right = problem.question.removesuffix(" = ?").split()
            value = int(left) + int(right) if sign == "+" else int(left) - int(right)
            text = f" {left} {sign} {right} = {value}\nAnswer: {value}"
            assert task.verify(problem, written(text)).correct
            judged += 1
    assert judged > 20
