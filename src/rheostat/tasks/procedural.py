"""reasoning-gym data sets as tasks: few-shot prompts, disjoint splits, a verdict right only at score 1.

Every member of a mixture is one reasoning-gym data set with one seed. reasoning-gym seeds item i with
``seed + i``, so two data sets with neighbouring seeds share their items; splits are therefore disjoint index
ranges of one seed. Where the space of questions is small an index range alone would still repeat questions, so
each question belongs to one split by a hash of its text, and no split repeats a question.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count as count_from

import reasoning_gym

from rheostat.errors import ConfigError
from rheostat.seeding import derive_seed
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
    """One data set of a mixture: reasoning-gym's name, its settings, and the tokens that an answer needs."""

    dataset: str
    settings: Mapping[str, object] = field(default_factory=dict)


class ProceduralTask:
    """A balanced mixture of reasoning-gym data sets with few-shot prompts.

    Args:
        name: the task's name.
        members: data sets by the name that results show.
        shots: worked examples before the question; they are in no split.
        max_tokens: the token budget b of an answer.
    """

    def __init__(self, name: str, members: Mapping[str, Member], shots: int = 4, max_tokens: int = 12) -> None:
        self.name, self.max_tokens = name, max_tokens
        self._members = dict(members)
        self._data = {
            member: reasoning_gym.create_dataset(spec.dataset, seed=_SEED, size=4 * _RANGE, **spec.settings)
            for member, spec in self._members.items()
        }
        self._shots = {member: self._take(member, None, shots, frozenset()) for member in self._members}
        self._prefix = {
            member: "".join(f"Question: {p.question}\nAnswer: {p.answer}\n\n" for p in examples)
            for member, examples in self._shots.items()
        }

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
            question = " ".join(item["question"].split())
            tenth = derive_seed("split", member, question) % 10
            if question in seen or (split is not None and tenth not in _TENTHS[split]):
                continue
            seen.add(question)
            last_new = index
            problem_id = f"{member}/{index}"
            found.append(Problem(problem_id, self.name, member, question, str(item["answer"]), {"index": index}))
        return found

    def prompt(self, problem: Problem) -> Prompt:
        """Worked examples, then the question; an answer ends with its line."""
        return Prompt(problem.id, f"{self._prefix[problem.member]}Question: {problem.question}\nAnswer:", ("\n",))

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        """Right when reasoning-gym scores the stripped answer at exactly 1; an answer cut by the budget is wrong."""
        if completion.finish_reason is FinishReason.LENGTH:
            return Verdict(False, "cut by the token budget")
        data = self._data[problem.member]
        score = data.score_answer(answer=completion.text.strip(), entry=data[problem.metadata["index"]])
        return Verdict(score == 1.0, f"score {score:g}")


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
"""The demo's data sets: small arithmetic in which SmolLM2 is neither hopeless nor perfect."""


def procedural_task(name: str) -> ProceduralTask:
    """``demo``, the mixture of all members, or one member by its name.

    Raises:
        ConfigError: no such task.
    """
    if name == "demo":
        return ProceduralTask("demo", MEMBERS)
    if name in MEMBERS:
        return ProceduralTask(name, {name: MEMBERS[name]})
    raise ConfigError(f"unknown task {name!r}: use demo (a mixture), or one of {', '.join(MEMBERS)}")
