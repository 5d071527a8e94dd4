"""A task made of records: what it hands out, how it asks, and that worked examples are never asked."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from rheostat.errors import ConfigError
from rheostat.tasks.base import Split, Task
from rheostat.tasks.prompts import CODE, MATH, PLAIN, Chat, Style, Turn
from rheostat.tasks.questions import Asking, QuestionTask
from rheostat.types import Completion, FinishReason, Problem, Verdict

SIZES = {Split.TRAIN: 40, Split.VALIDATION: 10, Split.TEST: 20}


def judged(problem: Problem, completion: str) -> Verdict:
    return Verdict(completion == problem.answer, "judged")


def make(asking: Asking | None = None, style: Style = MATH, solutions: bool = False) -> QuestionTask:
    splits = {
        split: [
            Problem(
                f"own/{split}/{number}",
                "own",
                "own",
                f"{split} {number} + 1?",
                str(number + 1),
                {"solution": f"Count on: {number + 1}."} if solutions else {},
            )
            for number in range(size)
        ]
        for split, size in SIZES.items()
    }
    return QuestionTask("own", splits, style, judged, 64, asking or Asking())


def spelled(turns: Sequence[Turn], thinking: bool | None) -> str:
    return f"<{thinking}>" + "".join(f"[{turn['role']}]{turn['content']}" for turn in turns) + "[assistant]"


def test_problems_are_handed_out_in_order_and_continue() -> None:
    task: Task = make()
    for split, size in SIZES.items():
        whole = task.problems(split, size)
        assert [problem.id for problem in whole] == [f"own/{split}/{number}" for number in range(size)]
        assert task.problems(split, 4) + task.problems(split, size - 4, start=4) == whole


@pytest.mark.parametrize(("count", "start"), [(21, 0), (1, 20), (11, 10)])
def test_more_problems_than_there_are_are_refused_with_what_there_is(count: int, start: int) -> None:
    with pytest.raises(ConfigError) as caught:
        make().problems(Split.TEST, count, start)
    told = str(caught.value)
    assert f"task own: the test split holds 20 problems, {count} were asked for" in told
    assert "there are train 40, validation 10, test 20" in told
    assert (f"from {start}" in told) == (start > 0)


@pytest.mark.parametrize(("count", "start"), [(0, 0), (-1, 3), (2, -2)])
def test_counts_below_one_are_refused(count: int, start: int) -> None:
    with pytest.raises(ConfigError, match=f"got {count} from {start}"):
        make().problems(Split.TEST, count, start)


def test_a_base_model_reads_plain_text_and_is_stopped_before_it_asks_itself() -> None:
    task = make()
    [problem] = task.problems(Split.TEST, 1)
    prompt = task.prompt(problem)
    assert prompt.text == "Problem: test 0 + 1?\n\nProvide the final answer within \\boxed{}.\n\nAnswer:"
    assert (prompt.problem_id, prompt.stop, prompt.cot) == (problem.id, ("\n\nProblem:",), False)


@pytest.mark.parametrize(
    ("can_think", "thinking", "told", "switch"),
    [
        (True, False, False, " /nothink"),
        (True, True, True, " /think"),
        (False, False, None, ""),
        (False, True, None, ""),
    ],
)
def test_a_chat_model_reads_its_template(can_think: bool, thinking: bool, told: bool | None, switch: str) -> None:
    task = make(Asking(thinking=thinking, chat=Chat(spelled, can_think)))
    prompt = task.prompt(task.problems(Split.TEST, 1)[0])
    instruction = f"Provide the final answer within \\boxed{{}}.{switch}"
    assert prompt.text == f"<{told}>[user]test 0 + 1?\n\n{instruction}[assistant]"
    assert prompt.stop == ()
    assert prompt.style == ("thinking" if thinking and can_think else "direct")


@pytest.mark.parametrize(
    ("style", "solutions", "answered"),
    [
        (MATH, False, "\\boxed{1}"),
        (MATH, True, "Count on: 1.\n\\boxed{1}"),
        (PLAIN, False, "1"),
        (PLAIN, True, "Count on: 1."),
    ],
)
def test_worked_examples_end_as_an_answer_must(style: Style, solutions: bool, answered: str) -> None:
    task = make(Asking(shots=1), style, solutions)
    text = task.prompt(task.problems(Split.TEST, 1)[0]).text
    assert text.startswith("Problem: train 0 + 1?\n\n")
    assert text.count(f"Answer: {answered}\n\nProblem: test 0 + 1?") == 1


@pytest.mark.parametrize("chat", [None, Chat(spelled)])
def test_worked_examples_leave_the_training_split_and_are_never_asked(chat: Chat | None) -> None:
    task = make(Asking(shots=3, chat=chat))
    asked = {problem.question for split, size in SIZES.items() for problem in task.problems(split, task.size(split))}
    assert [task.size(split) for split in Split] == [37, 10, 20]
    shown = {f"train {number} + 1?" for number in range(3)}
    assert asked.isdisjoint(shown)
    assert len(asked) == 67
    for split in Split:
        for problem in task.problems(split, 5):
            text = task.prompt(problem).text
            assert all(text.count(question) == 1 for question in (*shown, problem.question))
    with pytest.raises(ConfigError, match="the train split holds 37 problems"):
        task.problems(Split.TRAIN, 38)


def test_worked_examples_without_an_answer_are_passed_over() -> None:
    plain = make(style=CODE)
    train = [replace(problem, answer="") for problem in plain.splits[Split.TRAIN]]
    train[4] = replace(train[4], metadata={"solution": "print(5)", "tests": []})
    splits = {**plain.splits, Split.TRAIN: train}
    task = replace(plain, splits=splits, asking=Asking(shots=1))
    text = task.prompt(task.problems(Split.TEST, 1)[0]).text
    assert "Problem: train 4 + 1?\n\nAnswer: ```python\nprint(5)\n```" in text
    assert train[4] not in task.problems(Split.TRAIN, 39)
    with pytest.raises(ConfigError, match=r"40 problems \(1 with an answer to show\)"):
        replace(plain, splits=splits, asking=Asking(shots=2))


def test_more_worked_examples_than_problems_are_refused() -> None:
    assert make(Asking(shots=39)).size(Split.TRAIN) == 1
    for shots in (40, 41, 1000):
        with pytest.raises(ConfigError, match=f"task own: {shots} worked examples come from the training split"):
            make(Asking(shots=shots))
    without = {Split.TRAIN: [], Split.TEST: make().problems(Split.TEST, 2)}
    with pytest.raises(ConfigError, match=r"1 worked examples .* holds 0 problems"):
        QuestionTask("own", without, MATH, judged, 64, Asking(shots=1))
    assert QuestionTask("own", without, MATH, judged, 64).size(Split.TEST) == 2


@pytest.mark.parametrize("style", [MATH, CODE, PLAIN])
@pytest.mark.parametrize("shots", [0, 5])
def test_the_mark_of_a_prompt_says_if_it_asks_for_a_chain_of_thought(style: Style, shots: int) -> None:
    task = make(Asking(cot=0.3, shots=shots), style)
    for split in Split:
        for epoch in (0, 1):
            prompts = [task.prompt(problem, epoch) for problem in task.problems(split, task.size(split))]
            assert all(("Think step by step" in prompt.text) == prompt.cot for prompt in prompts)
            assert sum(prompt.cot for prompt in prompts) == round(0.3 * len(prompts))


def test_the_choice_of_prompts_with_a_chain_of_thought_belongs_to_seed_and_epoch() -> None:
    def marks(seed: int, epoch: int) -> list[bool]:
        task = make(Asking(cot=0.5, seed=seed))
        return [task.prompt(problem, epoch).cot for problem in task.problems(Split.TRAIN, 40)]

    assert marks(0, 0) == marks(0, 0)
    assert len({tuple(marks(*key)) for key in ((0, 0), (0, 1), (1, 0))}) == 3
    task = make(Asking(cot=0.5))
    [problem] = task.problems(Split.TRAIN, 1, start=17)
    assert task.prompt(problem) == task.prompt(problem, epoch=0)
    assert task.prompt(problem).cot == marks(0, 0)[17]


def test_the_verifier_reads_the_text_as_far_as_it_came() -> None:
    task = make()
    problem = task.problems(Split.TEST, 1)[0]
    for reason in FinishReason:
        assert task.verify(problem, Completion("1", (1,), reason)) == Verdict(True, "judged")
        assert task.verify(problem, Completion("2", (1,), reason)) == Verdict(False, "judged")
