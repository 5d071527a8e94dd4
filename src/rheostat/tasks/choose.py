"""From a task's name, and the data that a user gives, to the task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rheostat.errors import ConfigError
from rheostat.tasks import prompts
from rheostat.tasks.base import Split, Task
from rheostat.tasks.benchmarks import BENCHMARKS, IDS, Fields, problem_of
from rheostat.tasks.code import CodeVerifier
from rheostat.tasks.custom import (
    ExactVerifier,
    FunctionVerifier,
    answered_fields,
    is_file_target,
    load_task,
    plain_fields,
)
from rheostat.tasks.math import MathVerifier
from rheostat.tasks.mixture import MixtureTask
from rheostat.tasks.procedural import PROCEDURAL, procedural_task
from rheostat.tasks.prompts import Chat
from rheostat.tasks.questions import Asking, QuestionTask, Verifier
from rheostat.tasks.records import Record, Source, read, sources_of, split_problems
from rheostat.types import Problem

CUSTOM_TOKENS = 256  # the token budget of a user's own problems, where none is given


@dataclass(frozen=True, slots=True)
class TaskChoice:
    """What a run says about its task; the fields are those of the command line.

    Attributes:
        task: a name, names joined by ``+`` (a mixture), ``FILE.jsonl``, ``FILE.py:NAME``, or any name for one's own
            ``data`` and ``verifier``.
        data: sources instead of the Hub's, ``SPLIT=SOURCE`` each, or one for all splits.
        verifier: of a user's own problems: math, exact, regex, or ``FILE.py:FUNCTION``.
        max_tokens: the token budget b; None: the task's own.
        cot, thinking, shots: see :class:`rheostat.tasks.questions.Asking`.
        seed: of the choice of prompts with a chain of thought.
        require_isolation: refuse to run programs where the system lacks a protection.
    """

    task: str
    data: tuple[str, ...] = ()
    verifier: str | None = None
    max_tokens: int | None = None
    cot: float = 0.0
    thinking: bool = False
    shots: int = 0
    seed: int = 0
    require_isolation: bool = False


def make_task(choice: TaskChoice) -> Task:
    """The task of a run; problems from files and from the Hub are read here.

    Raises:
        ConfigError: no such task, data that cannot be read, or a field that the task does not take.
    """
    names = choice.task.split("+")
    if len(names) > 1 and not Path(choice.task).is_file():
        if choice.data or choice.verifier:
            raise ConfigError("--data and --verifier belong to one task; the members of a mixture bring their own")
        return MixtureTask([make_task(replace(choice, task=name)) for name in names])
    if choice.task in PROCEDURAL:
        _refuse(choice, "data", "verifier", "cot", "thinking", "shots")
        return procedural_task(choice.task, choice.max_tokens)
    if is_file_target(choice.task):
        _refuse(choice, "data", "verifier", "max_tokens", "cot", "thinking", "shots")
        return load_task(choice.task)
    if choice.task in BENCHMARKS:
        return _benchmark(choice)
    if choice.data or choice.task.endswith((".jsonl", ".json")):
        return _own_problems(choice)
    raise ConfigError(
        f"unknown task {choice.task!r}: use {', '.join((*PROCEDURAL, *BENCHMARKS))}, several joined by +, problems of "
        "your own (FILE.jsonl, or any name with --data; and --verifier), or a task of your own (FILE.py:NAME)"
    )


def _refuse(choice: TaskChoice, *fields: str) -> None:
    given = [name for name in fields if getattr(choice, name)]
    if given:
        raise ConfigError(f"task {choice.task} brings its own prompts and problems: leave out {', '.join(given)}")


def with_chat(task: Task, chat: Chat | None) -> Task:
    """The same task, asking in a model's chat template where it asks in one at all."""
    if isinstance(task, QuestionTask):
        return replace(task, asking=replace(task.asking, chat=chat))
    if isinstance(task, MixtureTask):
        return MixtureTask([with_chat(member, chat) for member in task.members])
    return task


def _asking(choice: TaskChoice) -> Asking:
    if choice.thinking and choice.cot:
        raise ConfigError("thinking and cot are two ways of asking for steps: give one of them")
    return Asking(choice.cot, choice.thinking, choice.shots, choice.seed)


def _benchmark(choice: TaskChoice) -> QuestionTask:
    benchmark = BENCHMARKS[choice.task]
    if choice.verifier:
        raise ConfigError(f"task {choice.task} has a verifier of its own: leave out --verifier")
    sources: dict[Split | None, Source] = sources_of(choice.data)
    if not sources:
        sources.update(benchmark.hub.items())
    splits, repeated = _read(sources, choice.task, benchmark.fields)
    return QuestionTask(
        choice.task,
        splits,
        benchmark.style,
        MathVerifier() if benchmark.judged_by == "math" else CodeVerifier(require_isolation=choice.require_isolation),
        choice.max_tokens or benchmark.max_tokens,
        _asking(choice),
        repeated=repeated,
    )


def _read(
    sources: Mapping[Split | None, Source], task: str, fields: Callable[[Record], Fields], ids: Sequence[str] = IDS
) -> tuple[dict[Split, list[Problem]], int]:
    is_published = not any(source.is_file for source in sources.values())
    rank = [Split.TEST, Split.VALIDATION, Split.TRAIN, None]  # what judges keeps a question that trains as well
    return split_problems(
        {
            split: [(problem_of(row, task, fields, ids), row.where) for row in read(sources[split])]
            for split in sorted(sources, key=rank.index)
        },
        refuse_shared=not is_published,
    )


def _own_problems(choice: TaskChoice) -> QuestionTask:
    if choice.verifier is None:
        raise ConfigError(
            f"task {choice.task}: say how an answer is judged: --verifier math, exact, regex, or FILE.py:FUNCTION"
        )
    is_file = choice.task.endswith((".jsonl", ".json"))
    if is_file and choice.data:
        raise ConfigError(f"--task {choice.task} holds all problems: leave out --data, or give the task another name")
    name = Path(choice.task).stem if is_file else choice.task
    sources: Mapping[Split | None, Source] = {None: Source(choice.task)} if is_file else sources_of(choice.data)
    verifier = _verifier(choice.verifier)
    fields = plain_fields if is_file_target(choice.verifier) else answered_fields
    splits, repeated = _read(sources, name, fields, ("id",))
    style = prompts.MATH if choice.verifier == "math" else prompts.PLAIN
    return QuestionTask(
        name,
        splits,
        style,
        verifier,
        choice.max_tokens or CUSTOM_TOKENS,
        _asking(choice),
        repeated=repeated,
    )


def _verifier(name: str) -> Verifier:
    if name == "math":
        return MathVerifier()
    if name == "exact":
        return ExactVerifier()
    if name == "regex":
        return FunctionVerifier("rheostat.tasks.custom:matches")
    if is_file_target(name):
        return FunctionVerifier(name)
    raise ConfigError(f"--verifier {name}: use math, exact, regex, or FILE.py:FUNCTION")
