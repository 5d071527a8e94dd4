"""reasoning-gym data sets as tasks: few-shot prompts, disjoint splits, a verdict right only at score 1.

Every member of a mixture is one reasoning-gym data set with one seed. reasoning-gym seeds item i with
``seed + i``, so two data sets with neighbouring seeds share their items; splits are therefore disjoint index
ranges of one seed. Where the space of questions is small an index range alone would still repeat questions, so
each question belongs to one split by a hash of its text, and no split repeats a question.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count as count_from
from typing import Any

import reasoning_gym

from rheostat.errors import ConfigError
from rheostat.seeding import derive_seed
from rheostat.tasks import steps
from rheostat.tasks.base import Split
from rheostat.types import Completion, FinishReason, Problem, Prompt, Verdict

_SEED = 2603_09065
_RANGE = 10_000_000  # indices that belong to one split
_FIRST = {Split.TRAIN: 0, Split.VALIDATION: _RANGE, Split.TEST: 2 * _RANGE}
_SHOTS_FROM = 3 * _RANGE
_TENTHS = {Split.TRAIN: range(0, 5), Split.VALIDATION: range(5, 7), Split.TEST: range(7, 10)}
_PATIENCE = 5_000  # items without a new question after which a split counts as exhausted


@dataclass(frozen=True, slots=True)
class Member:
    """One data set of a mixture.

    Attributes:
        dataset: reasoning-gym's name.
        settings: its settings.
        question: a shorter question than reasoning-gym's, from an item's metadata.
        steps: worked steps towards the answer, from an item's metadata; without them there is no chain of thought.
        answer: what an answer must look like, a regular expression; others are wrong without reasoning-gym's seeing
            them (countdown's answers are evaluated: a tower of powers would never end).
    """

    dataset: str
    settings: Mapping[str, object] = field(default_factory=dict)
    question: Callable[[Mapping[str, Any]], str] | None = None
    steps: Callable[[Mapping[str, Any]], str] | None = None
    answer: str | None = None


class ProceduralTask:
    """A balanced mixture of reasoning-gym data sets with few-shot prompts.

    Args:
        name: the task's name.
        members: data sets by the name that results show.
        shots: worked examples of each member before the question; they are in no split.
        max_tokens: the token budget b of an answer.
        cot: the share of prompts that ask for worked steps (paper, section 3.1: mixed CoT), by a seeded choice per
            problem, among the members that have steps. Above 0, all prompts show the same examples, those of every
            member in turn, without and with steps: one prefix for an engine to compute, whatever is asked.
    """

    def __init__(
        self, name: str, members: Mapping[str, Member], shots: int = 4, max_tokens: int = 12, cot: float = 0.0
    ) -> None:
        self.name, self.max_tokens = name, max_tokens
        self._cot = cot
        self._members = dict(members)
        self._data = {
            member: reasoning_gym.create_dataset(spec.dataset, seed=_SEED, size=4 * _RANGE, **spec.settings)
            for member, spec in self._members.items()
        }
        self._shots = {member: self._take(member, None, shots, frozenset()) for member in self._members}
        if cot:
            turns = [p for examples in zip(*self._shots.values(), strict=True) for p in examples]
            shown = self._shown(turns, [(number // len(members)) % 2 == 1 for number in range(len(turns))])
            self._prefix = dict.fromkeys(members, shown)
        else:
            self._prefix = {m: self._shown(examples, [False] * shots) for m, examples in self._shots.items()}

    @property
    def members(self) -> tuple[str, ...]:
        """The names of its data sets."""
        return tuple(self._members)

    def _shown(self, examples: Sequence[Problem], cot: Sequence[bool]) -> str:
        """Worked examples, one after the other."""
        pairs = zip(examples, cot, strict=True)
        return "".join(f"{self._asked(problem, steps)} {problem.answer}\n\n" for problem, steps in pairs)

    def _asked(self, problem: Problem, cot: bool) -> str:
        """A worked example up to its answer."""
        steps = self._members[problem.member].steps
        if not cot or steps is None:
            return f"Question: {problem.question}\nAnswer:"
        worked = steps(self._data[problem.member][problem.metadata["index"]]["metadata"])
        return f"Question: {problem.question}\nSteps: {worked}\nAnswer:"

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        """``count`` problems from position ``start`` of the split on: as many of each member, one member after another.

        Raises:
            ConfigError: ``count`` is no multiple of the number of members, or a member's split holds fewer.
        """
        members = len(self._members)
        if count % members or start % members or count < 1 or start < 0:
            raise ConfigError(
                f"task {self.name}: problems come in multiples of its {members} members, got {count} from {start}"
            )
        found: list[Problem] = []
        for member in self._members:
            shots = frozenset(problem.question for problem in self._shots[member])
            found += self._take(member, split, (start + count) // members, shots)[start // members :]
        return found

    def _take(self, member: str, split: Split | None, count: int, excluded: frozenset[str]) -> list[Problem]:
        """The first ``count`` questions of a member that belong to ``split`` (None: the worked examples)."""
        data, seen = self._data[member], set(excluded)
        found: list[Problem] = []
        first = _SHOTS_FROM if split is None else _FIRST[split]
        last_new = first
        for index in count_from(first):
            if len(found) == count:
                break
            if index - last_new > _PATIENCE:
                raise ConfigError(
                    f"task {self.name}: the {split or 'shots'} split of {member!r} holds only {len(found)} distinct "
                    f"questions, {count} were asked for: ask for fewer problems"
                )
            item = data[index]
            ask = self._members[member].question
            question = " ".join((ask(item["metadata"]) if ask else item["question"]).split())
            tenth = derive_seed("split", member, question) % 10
            if question in seen or (split is not None and tenth not in _TENTHS[split]):
                continue
            seen.add(question)
            last_new = index
            problem_id = f"{member}/{index}"
            found.append(Problem(problem_id, self.name, member, question, str(item["answer"]), {"index": index}))
        return found

    def _has_steps(self, problem: Problem) -> bool:
        chance = derive_seed("cot", problem.member, problem.question) % 1000 / 1000
        return self._members[problem.member].steps is not None and chance < self._cot

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        """Worked examples, then the question; an answer ends with its line, one with steps with an empty line.

        It is the same in every epoch."""
        cot = self._has_steps(problem)
        text = f"{self._prefix[problem.member]}Question: {problem.question}\n{'Steps:' if cot else 'Answer:'}"
        return Prompt(problem.id, text, ("\n\n",) if cot else ("\n",), cot)

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        """Right when reasoning-gym scores the stripped answer at exactly 1; an answer cut by the budget is wrong."""
        if completion.finish_reason is FinishReason.LENGTH:
            return Verdict(False, "cut by the token budget")
        answer = completion.text
        if self._has_steps(problem):
            _, marker, answer = answer.rpartition("\nAnswer:")
            if not marker:
                return Verdict(False, "steps without an answer")
        answer = answer.strip()
        data, pattern = self._data[problem.member], self._members[problem.member].answer
        if pattern is not None and not re.fullmatch(pattern, answer):
            return Verdict(False, "not of the answer's form", answer or None)
        score = data.score_answer(answer=answer, entry=data[problem.metadata["index"]])
        return Verdict(score == 1.0, f"score {score:g}", answer or None)


MEMBERS = {
    "count_bits": Member("count_bits", {"min_n": 1, "max_n": 1000}),
    "family_relationships": Member("family_relationships"),
    "gcd": Member("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 50}),
    "needle_haystack": Member("needle_haystack", {"min_num_statements": 3, "max_num_statements": 6}),
    "number_filtering": Member(
        "number_filtering",
        {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 0, "max_value": 20},
    ),
    "syllogism": Member("syllogism"),
}
"""The demo's data sets for the sequence level: small tasks in which SmolLM2 is neither hopeless nor perfect."""

STEPS = {
    "countdown": Member(
        "countdown",
        {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 20, "min_target": 2, "max_target": 60},
        steps.ask_countdown,
        answer=r"(?:[\d\s()+/-]|\*(?!\*))+",
    ),
    "number_filtering": Member(
        "number_filtering",
        {"min_numbers": 3, "max_numbers": 3, "max_decimals": 0, "min_value": 0, "max_value": 20},
        None,
        steps.keep_or_remove,
    ),
    "gcd": Member("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 50}, steps.ask_gcd),
    "count_bits": Member("count_bits", {"min_n": 1, "max_n": 1000}, steps.ask_bits, steps.binary_digits),
}
"""The data sets for the token level: answers of several tokens, and worked steps for a part of the prompts."""


PROCEDURAL = ("demo", "steps", *MEMBERS)
"""The names that :func:`procedural_task` knows."""


def procedural_task(name: str, max_tokens: int | None = None) -> ProceduralTask:
    """``demo`` and ``steps``, mixtures, or a member of ``demo`` by its name.

    ``steps`` asks 30 % of its prompts with a chain of thought, the paper's ratio.

    Args:
        name: of the task.
        max_tokens: the token budget b; None: 32 for ``steps``, 12 for the others.

    Raises:
        ConfigError: no such task.
    """
    if name == "steps":
        return ProceduralTask("steps", STEPS, max_tokens=max_tokens or 32, cot=0.3)
    if name not in PROCEDURAL:
        raise ConfigError(
            f"unknown task {name!r}: use demo or steps (mixtures), or one of the demo's members, {', '.join(MEMBERS)}"
        )
    return ProceduralTask(name, MEMBERS if name == "demo" else {name: MEMBERS[name]}, max_tokens=max_tokens or 12)
