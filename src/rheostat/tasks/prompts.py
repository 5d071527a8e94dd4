"""From a problem to the text that the model reads: instructions, chat template, chain of thought, worked examples.

The paper's prompts (Appendix D.2) are one sentence each, and a switch:

* MATH: "Provide the final answer within \\boxed{}. /nothink", or "/think"
* CodeContests: "You are a coding assistant. /nothink", or "You are a coding assistant. Please reason step by step.
  /think"

Qwen3's own switch is ``/no_think``, which the paper's text is not, so that ``enable_thinking`` is set beside it where a
chat template knows that word; where it does not, the switch would be noise to the model and is left out. The paper's
chain-of-thought template is unpublished; ours is :data:`MATH` ``.cot`` and :data:`CODE` ``.cot``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rheostat.seeding import derive_seed
from rheostat.tasks.math import last_box
from rheostat.types import Problem

Turn = dict[str, str]
"""``role`` (system, user or assistant) and ``content``."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A model's chat template.

    Attributes:
        render: the text of a conversation, up to where the assistant's answer begins; the second argument says if the
            model may think first, None leaves it to the template.
        can_think: whether the template knows ``enable_thinking``.
    """

    render: Callable[[Sequence[Turn], bool | None], str]
    can_think: bool = False


@dataclass(frozen=True, slots=True)
class Style:
    """What is said to the model beside the problem.

    Attributes:
        direct: the instruction of a plain prompt.
        cot: the instruction of a prompt that asks for a chain of thought.
        thinking: the instruction where the model thinks before it answers (paper, Appendix D.2).
        as_system: the instruction is the system's message, not the end of the user's.
        boxed: the answer is wanted in a box.
    """

    direct: str
    cot: str
    thinking: str
    as_system: bool = False
    boxed: bool = False


MATH = Style(
    direct="Provide the final answer within \\boxed{}.",
    cot="Think step by step: write each step on its own line, check it, and only then provide the final answer within "
    "\\boxed{}.",
    thinking="Provide the final answer within \\boxed{}.",
    boxed=True,
)
CODE = Style(
    direct="You are a coding assistant.",
    cot="You are a coding assistant. Think step by step: say how the program will work, then write it.",
    thinking="You are a coding assistant. Please reason step by step.",
    as_system=True,
)
PLAIN = Style(direct="", cot="Think step by step, then give the answer.", thinking="")


def reference(style: Style, problem: Problem) -> str | None:
    """The completion that a problem's own solution would be: programs in a fence, answers in a box where they are not.

    None: the problem has none.
    """
    solution = str(problem.metadata.get("solution") or "")
    if not solution.strip():
        return None
    if "tests" in problem.metadata or "test_code" in problem.metadata:
        return f"```python\n{problem.metadata.get('starter', '')}{solution}\n```"
    if not style.boxed or last_box(solution) is not None:
        return solution
    return f"{solution}\n\\boxed{{{problem.answer}}}"


def conversation(
    style: Style,
    question: str,
    cot: bool,
    thinking: bool,
    can_think: bool,
    examples: Sequence[tuple[str, str]] = (),
) -> list[Turn]:
    """The turns that ask a question, after worked examples (question and answer each)."""
    instruction = style.thinking if thinking else style.cot if cot else style.direct
    if can_think:
        instruction = f"{instruction} {'/think' if thinking else '/nothink'}".strip()
    turns: list[Turn] = []
    if style.as_system and instruction:
        turns.append({"role": "system", "content": instruction})
    for asked, answered in (*examples, (question, None)):
        content = asked if style.as_system or not instruction else f"{asked}\n\n{instruction}"
        turns.append({"role": "user", "content": content})
        if answered is not None:
            turns.append({"role": "assistant", "content": answered})
    return turns


def as_plain_text(turns: Sequence[Turn]) -> str:
    """The same for a base model, which has no chat template."""
    names = {"system": "", "user": "Problem: ", "assistant": "Answer: "}
    return "\n\n".join(names[turn["role"]] + turn["content"] for turn in turns) + "\n\nAnswer:"


def mixed_cot(problems: Sequence[Problem], ratio: float, seed: int, epoch: int) -> frozenset[str]:
    """The ids of the problems that are asked with a chain of thought in this epoch (paper, section 3.1: ratio 0.3).

    The same number of every ten consecutive problems, by a choice that is a function of seed, epoch and problem: the
    ratio is exact over the whole, and over any first part that is a multiple of ten long (to within rounding).

    Args:
        problems: of one split, in its order.
        ratio: in [0, 1].
        seed: of the run.
        epoch: passes over the problems before this one.
    """
    chosen: set[str] = set()
    for start in range(0, len(problems), 10):
        block = sorted(problems[start : start + 10], key=lambda p: derive_seed("cot", seed, epoch, p.id))
        quota = round(ratio * (start + len(block))) - round(ratio * start)
        chosen.update(problem.id for problem in block[:quota])
    return frozenset(chosen)
