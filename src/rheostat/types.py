"""The values that travel between the rooms, and the letters that name the axes of arrays.

Array names carry their shape letters, jaxtyping annotations use the same ones:

=====  ============================================================
B      rows of a batch (active rows of the engine)
S      sequences being generated, or samples of one problem
T      steps
V      vocabulary
H      hidden size
A      actions
P      problems
K      rows of a parameter table, or candidates of a truncation
=====  ============================================================
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class FinishReason(StrEnum):
    """Why a completion ended: its own end (EOS or a stop string), or the token budget."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Problem:
    """One question of a task. ``id`` is unique over all splits; ``member`` names the data set inside a mixture."""

    id: str
    task: str
    member: str
    question: str
    answer: str
    metadata: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Prompt:
    """The text that the model reads for one problem, where its answer ends, if it asks for a chain of thought, and if
    the model thinks before it answers."""

    problem_id: str
    text: str
    stop: tuple[str, ...] = ()
    cot: bool = False
    thinking: bool = False

    @property
    def style(self) -> str:
        """``thinking``, ``cot`` or ``direct``."""
        return "thinking" if self.thinking else "cot" if self.cot else "direct"


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote: ``text`` without the stop string, ``token_ids`` with the tokens that ended it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says about a completion.

    Attributes:
        correct: None when the infrastructure failed to give a verdict; a hanging answer is False.
        detail: what it has to say about it.
        answer: what it took for the answer, which votes in self-consistency (maj@k); None: nothing that could vote.
    """

    correct: bool | None
    detail: str = ""
    answer: str | None = None
