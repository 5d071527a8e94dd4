"""The paper's prompts word for word, chat and plain text, and an exact share of prompts with a chain of thought."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.tasks.prompts import CODE, MATH, PLAIN, Style, as_plain_text, conversation, mixed_cot, reference
from rheostat.types import Problem

BOX = "Provide the final answer within \\boxed{}."


def some(count: int, first: int = 0) -> list[Problem]:
    return [Problem(f"own/{number}", "own", "own", f"{number} + 1?", "") for number in range(first, first + count)]


@pytest.mark.parametrize(
    ("style", "thinking", "turns"),
    [
        (MATH, False, [("user", f"1 + 1?\n\n{BOX} /nothink")]),
        (MATH, True, [("user", f"1 + 1?\n\n{BOX} /think")]),
        (CODE, False, [("system", "You are a coding assistant. /nothink"), ("user", "1 + 1?")]),
        (
            CODE,
            True,
            [("system", "You are a coding assistant. Please reason step by step. /think"), ("user", "1 + 1?")],
        ),
        (PLAIN, False, [("user", "1 + 1?\n\n/nothink")]),
    ],
)
def test_a_model_that_can_think_reads_the_papers_text(
    style: Style, thinking: bool, turns: list[tuple[str, str]]
) -> None:
    """Appendix D.2."""
    found = conversation(style, "1 + 1?", cot=False, thinking=thinking, can_think=True)
    assert [(turn["role"], turn["content"]) for turn in found] == turns


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("style", [MATH, CODE, PLAIN])
def test_other_models_read_no_switch(style: Style, thinking: bool) -> None:
    turns = conversation(style, "1 + 1?", cot=False, thinking=thinking, can_think=False)
    assert "think" not in str(turns)


@pytest.mark.parametrize("style", [MATH, CODE, PLAIN])
def test_a_chain_of_thought_is_asked_for_in_words(style: Style) -> None:
    with_cot, without = (as_plain_text(conversation(style, "1 + 1?", cot, False, False)) for cot in (True, False))
    assert "Think step by step" in with_cot
    assert "Think step by step" not in without
    assert ("\\boxed{}" in with_cot) == ("\\boxed{}" in without) == style.boxed


def test_worked_examples_are_turns_that_ask_as_the_question_does() -> None:
    examples = [("2 + 2?", "\\boxed{4}"), ("3 + 3?", "\\boxed{6}")]
    turns = conversation(MATH, "1 + 1?", False, False, False, examples)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert [turn["content"] for turn in turns[::2]] == [f"{q}?\n\n{BOX}" for q in ("2 + 2", "3 + 3", "1 + 1")]
    assert [turn["content"] for turn in turns[1::2]] == ["\\boxed{4}", "\\boxed{6}"]
    code = conversation(CODE, "c", False, False, False, [("a", "b")])
    assert [(turn["role"], turn["content"]) for turn in code] == [
        ("system", "You are a coding assistant."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


def test_a_base_model_reads_plain_text_that_ends_where_the_answer_begins() -> None:
    turns = conversation(MATH, "1 + 1?", False, False, False, [("2 + 2?", "\\boxed{4}")])
    assert as_plain_text(turns) == (
        f"Problem: 2 + 2?\n\n{BOX}\n\nAnswer: \\boxed{{4}}\n\nProblem: 1 + 1?\n\n{BOX}\n\nAnswer:"
    )
    assert as_plain_text(conversation(CODE, "c", False, False, False)) == (
        "You are a coding assistant.\n\nProblem: c\n\nAnswer:"
    )


@settings(max_examples=150)
@given(
    count=st.integers(0, 130),
    ratio=st.sampled_from([0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.77, 1.0]) | st.floats(0, 1),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_the_share_with_a_chain_of_thought_is_exact(count: int, ratio: float, seed: int, epoch: int) -> None:
    problems = some(count)
    chosen = mixed_cot(problems, ratio, seed, epoch)
    assert chosen == mixed_cot(problems, ratio, seed, epoch)
    assert chosen <= {problem.id for problem in problems}
    assert len(chosen) == round(ratio * count)
    for first in range(0, count + 1, 10):
        assert sum(problem.id in chosen for problem in problems[:first]) == round(ratio * first)
    if ratio in (0.0, 1.0):
        assert len(chosen) == ratio * count


def test_another_epoch_or_seed_asks_others_and_all_in_the_long_run() -> None:
    problems = some(200)
    choices = [mixed_cot(problems, 0.3, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len(set(choices)) == 3
    often = {problem.id: 0 for problem in problems}
    for epoch in range(100):
        for name in mixed_cot(problems, 0.3, 0, epoch):
            often[name] += 1
    assert min(often.values()) > 10  # of 100 draws at 0.3: more than 4 standard deviations away
    assert max(often.values()) < 52


def test_the_choice_inside_a_block_of_ten_does_not_depend_on_the_others() -> None:
    chosen = mixed_cot(some(40), 0.3, 0, 0)
    other = mixed_cot([*some(20), *some(20, first=100)], 0.3, 0, 0)
    assert {name for name in chosen if int(name[4:]) < 20} == {name for name in other if int(name[4:]) < 20}


@pytest.mark.parametrize(
    ("style", "metadata", "written"),
    [
        (MATH, {}, None),
        (MATH, {"solution": " "}, None),
        (MATH, {"solution": "It is 2."}, "It is 2.\n\\boxed{2}"),
        (MATH, {"solution": "\\boxed{2}"}, "\\boxed{2}"),
        (MATH, {"solution": "\\fbox{2}"}, "\\fbox{2}"),
        (PLAIN, {"solution": "It is\n2"}, "It is\n2"),
        (CODE, {"solution": "print(2)", "tests": []}, "```python\nprint(2)\n```"),
        (
            CODE,
            {"solution": "  return 2", "test_code": "x", "starter": "def f():\n"},
            "```python\ndef f():\n  return 2\n```",
        ),
    ],
)
def test_a_solution_is_written_as_the_style_wants_it(
    style: Style, metadata: dict[str, object], written: str | None
) -> None:
    assert reference(style, Problem("own/1", "own", "own", "1 + 1?", "2", metadata)) == written
