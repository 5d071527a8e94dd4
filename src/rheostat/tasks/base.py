"""What a task is: it yields problems by split, renders a prompt, and judges a completion."""

from enum import StrEnum
from typing import Protocol

from rheostat.types import Completion, Problem, Prompt, Verdict


class Split(StrEnum):
    """Adapters learn on ``train``; everything is chosen on ``validation``; ``test`` is for the final judgement."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Task(Protocol):
    """A verifiable task."""

    @property
    def name(self) -> str: ...

    @property
    def max_tokens(self) -> int:
        """The token budget b that an answer needs."""
        ...

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        """``count`` problems of a split, from position ``start`` on; no question stands in two splits.

        Raises:
            ConfigError: the split holds fewer.
        """
        ...

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        """How the problem is asked; a task that mixes prompt styles may ask otherwise in another epoch of training."""
        ...

    def verify(self, problem: Problem, completion: Completion) -> Verdict: ...
