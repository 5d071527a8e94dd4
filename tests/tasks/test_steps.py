"""Chain-of-thought prompts: worked steps that lead to the answer, a fixed share of prompts, one prefix for all."""

import re
from math import gcd

import pytest
import reasoning_gym
from scipy.stats import binomtest

from rheostat.tasks import steps
from rheostat.tasks.base import Split
from rheostat.tasks.procedural import STEPS, ProceduralTask, procedural_task
from rheostat.types import Completion, FinishReason, Problem, Prompt, Verdict

COUNTS = {Split.TRAIN: 480, Split.VALIDATION: 180, Split.TEST: 300}
_UNABLE = ("gcd", "countdown")  # data sets without worked steps


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


def test_binary_digits_are_the_number_and_count_to_the_answer() -> None:
    spec = STEPS["count_bits"]
    for item in reasoning_gym.create_dataset(spec.dataset, seed=5, size=300, **spec.settings):
        digits = steps.binary_digits(item["metadata"]).split(" ")
        asked = re.fullmatch(r"How many 1 bits has (\d+) in binary\?", steps.ask_bits(item["metadata"]))
        assert asked is not None
        assert int("".join(digits), 2) == int(asked[1])
        assert digits[0] == "1"
        assert str(digits.count("1")) == item["answer"]


def test_what_countdown_asks_for_can_be_made() -> None:
    spec = STEPS["countdown"]
    for item in reasoning_gym.create_dataset(spec.dataset, seed=8, size=200, **spec.settings):
        asked = re.fullmatch(r"Make (\d+) from (\d+) and (\d+)\.", steps.ask_countdown(item["metadata"]))
        assert asked is not None
        target, first, second = map(int, asked.groups())
        made = {first + second, first - second, second - first, first * second}
        made |= {a // b for a, b in ((first, second), (second, first)) if b and a % b == 0}
        assert target in made


@pytest.mark.parametrize(
    "answer", ["9**9**9**9", "9 ** 9", "__import__('os').system('true')", "factorial(9999999)", "5 + 17 = 22", ""]
)
def test_countdown_evaluates_plain_expressions_only(task: ProceduralTask, answer: str) -> None:
    [problem] = [p for p in task.problems(Split.TRAIN, 4) if p.member == "countdown"]
    assert task.verify(problem, written(answer)) == Verdict(False, "not of the answer's form", answer or None)
    assert task.verify(problem, written(problem.answer)).correct


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
        pairs = list(zip(prompts[split], problems[split], strict=True))
        able = [prompt.cot for prompt, p in pairs if p.member not in _UNABLE]
        assert binomtest(sum(able), len(able), 0.3).pvalue > 1e-3
        assert not any(prompt.cot for prompt, p in pairs if p.member in _UNABLE)


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
    counted = 0
    for example in prompts[Split.TEST][0].text.split("\n\n")[:-1]:
        question, *worked, answer = example.split("\n")
        if worked and (asked := re.search(r"How many 1 bits has (\d+)", question)):
            digits = worked[0].removeprefix("Steps: ").split()
            assert int("".join(digits), 2) == int(asked[1])
            assert answer == f"Answer: {digits.count('1')}"
            counted += 1
    assert counted == 2


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
        if prompt.cot and problem.member == "count_bits":
            digits = f"{int(re.findall(r'[0-9]+', problem.question)[1]):b}"
            text = f" {' '.join(digits)}\nAnswer: {digits.count('1')}"
            assert task.verify(problem, written(text)).correct
            judged += 1
    assert judged > 20
