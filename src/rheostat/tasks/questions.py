"""A task made of records: problems with their split, a prompt style, and a verifier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Protocol

from rheostat.errors import ConfigError
from rheostat.tasks.base import Split
from rheostat.tasks.prompts import Chat, Style, as_plain_text, conversation, mixed_cot, reference
from rheostat.types import Completion, Problem, Prompt, Verdict


class Verifier(Protocol):
    """Judges what a model wrote; several threads may call it at once."""

    def __call__(self, problem: Problem, completion: str, /) -> Verdict: ...


@dataclass(frozen=True)
class Asking:
    """How a run asks: the same for every problem.

    Attributes:
        cot: the share of prompts that ask for a chain of thought, in [0, 1].
        thinking: let a model that can think before it answers do so.
        shots: worked examples before the question, from the training split, whose problems they leave.
        seed: of the choice of prompts with a chain of thought.
        chat: the model's chat template; None: a base model.
    """

    cot: float = 0.0
    thinking: bool = False
    shots: int = 0
    seed: int = 0
    chat: Chat | None = None


@dataclass(frozen=True, eq=False)
class QuestionTask:
    """Problems from files or the Hub, behind the :class:`rheostat.tasks.base.Task` protocol.

    Its verdicts may be asked for by several threads at once (``verifies_concurrently``).

    Attributes:
        name: of the task.
        splits: all problems of each split, in the order in which they are handed out.
        style: what is said beside the problem.
        verifier: judges.
        max_tokens: the token budget b.
        asking: how the run asks.
        stop: strings that end a completion of a base model; chat models end their turn themselves.
        repeated: problems of the sources that were left out, because their split has the question already.
    """

    name: str
    splits: Mapping[Split, Sequence[Problem]]
    style: Style
    verifier: Verifier
    max_tokens: int
    asking: Asking = field(default_factory=Asking)
    stop: tuple[str, ...] = ("\n\nProblem:",)
    repeated: int = 0

    def __post_init__(self) -> None:
        train, shots = len(self.splits.get(Split.TRAIN, ())), self.asking.shots
        if shots and (shots >= train or len(self._shown) < shots):
            raise ConfigError(
                f"task {self.name}: {shots} worked examples come from the training split, which holds {train} "
                f"problems ({len(self._shown)} with an answer to show): give training data, or fewer shots"
            )

    verifies_concurrently = True

    @cached_property
    def _shown(self) -> dict[str, tuple[str, str]]:
        """The worked examples by their id: the first problems of the training split that have something to show."""
        shown: dict[str, tuple[str, str]] = {}
        for problem in self.splits.get(Split.TRAIN, ()):
            if len(shown) == self.asking.shots:
                break
            answer = f"\\boxed{{{problem.answer}}}" if self.style.boxed else problem.answer
            if answered := self.reference(problem) or answer:
                shown[problem.id] = problem.question, answered
        return shown

    def reference(self, problem: Problem) -> str | None:
        """The completion that the problem's own solution would be; None: it has none."""
        return reference(self.style, problem)

    @cached_property
    def _own(self) -> dict[Split, Sequence[Problem]]:
        """The problems that are asked: without those shown as worked examples."""
        return {split: [p for p in own if p.id not in self._shown] for split, own in self.splits.items()}

    @cached_property
    def _split_of(self) -> dict[str, Split]:
        return {problem.id: split for split, own in self._own.items() for problem in own}

    def size(self, split: Split) -> int:
        """How many problems of a split can be asked."""
        return len(self._own.get(split, ()))

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        """See :class:`rheostat.tasks.base.Task`."""
        own = self._own.get(split, ())
        if count < 1 or start < 0:
            raise ConfigError(f"task {self.name}: problems are counted from 0, at least one, got {count} from {start}")
        if start + count > len(own):
            there = ", ".join(f"{name} {len(problems)}" for name, problems in self._own.items())
            raise ConfigError(
                f"task {self.name}: the {split} split holds {len(own)} problems, {count} were asked for"
                f"{f' from {start}' if start else ''} (there are {there}): ask for fewer, or give more with --data"
            )
        return list(own[start : start + count])

    @cache  # noqa: B019  one task lives as long as its run
    def _cot(self, split: Split, epoch: int) -> frozenset[str]:
        return mixed_cot(self._own[split], self.asking.cot, self.asking.seed, epoch)

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        """See :class:`rheostat.tasks.base.Task`."""
        asking, chat = self.asking, self.asking.chat
        cot = asking.cot > 0 and problem.id in self._cot(self._split_of[problem.id], epoch)
        can_think = chat is not None and chat.can_think
        turns = conversation(self.style, problem.question, cot, asking.thinking, can_think, [*self._shown.values()])
        if chat is None:
            return Prompt(problem.id, as_plain_text(turns), self.stop, cot)
        text = chat.render(turns, asking.thinking if can_think else None)
        return Prompt(problem.id, text, (), cot, asking.thinking and can_think)

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        """The verifier's verdict on the text, as far as it came: one cut by the token budget may hold its answer."""
        return self.verifier(problem, completion.text)
