"""`rheostat tasks`: what can be asked, what it looks like, and whether its verifier accepts its own solutions."""

from math import lcm
from typing import Any

from rheostat.errors import ConfigError
from rheostat.rollouts.collect import judge_all
from rheostat.tasks.base import Split, Task
from rheostat.tasks.benchmarks import BENCHMARKS
from rheostat.tasks.choose import TaskChoice, make_task
from rheostat.tasks.mixture import MixtureTask
from rheostat.tasks.procedural import PROCEDURAL
from rheostat.tasks.questions import QuestionTask
from rheostat.types import Completion, FinishReason

_SHOWN = 20  # failing references listed; all are counted


def list_tasks() -> list[dict[str, str]]:
    """Every task that has a name, its licence, how it is judged, and where its problems come from."""
    every = ", ".join(Split)
    found = [
        {"task": name, "judged_by": "answer", "splits": every, "licence": "generated", "source": "reasoning-gym"}
        for name in PROCEDURAL
    ]
    for name, benchmark in BENCHMARKS.items():
        splits = {split.value for split in benchmark.hub}
        if Split.TRAIN in benchmark.hub:
            splits.add("validation")  # two tenths of train where the Hub has none
        found.append(
            {
                "task": name,
                "judged_by": benchmark.judged_by,
                "splits": ", ".join(split for split in Split if split in splits),
                "licence": benchmark.licence,
                "source": ", ".join(dict.fromkeys(source.location for source in benchmark.hub.values())),
            }
        )
    return found


def show_task(choice: TaskChoice, samples: int = 2) -> dict[str, Any]:
    """Counts by split, that no question stands in two, and problems as the model reads them (as a base model does)."""
    task = make_task(choice)
    shown: dict[str, Any] = {"task": task.name, "max_tokens": task.max_tokens}
    if choice.task in BENCHMARKS:
        shown["licence"] = BENCHMARKS[choice.task].licence
    if isinstance(task, QuestionTask):
        shown["problems"] = {split.value: len(own) for split, own in task.splits.items()}
        shown["repeated_and_left_out"] = task.repeated
    shown["in_two_splits"] = 0  # a task with such problems is refused
    split, count = Split.TEST, samples * _unit(task)
    if isinstance(task, QuestionTask):
        split = next((s for s in (Split.TEST, Split.VALIDATION, Split.TRAIN) if task.size(s)), Split.TEST)
        count = min(samples, task.size(split))
    shown["samples"] = [
        {"id": problem.id, "prompt": task.prompt(problem).text, "answer": problem.answer}
        for problem in (task.problems(split, count) if count else ())
    ]
    return shown


def _unit(task: Task) -> int:
    """The numbers of problems that a task hands out are multiples of this."""
    if isinstance(task, MixtureTask):
        return len(task.members) * lcm(*map(_unit, task.members))
    return len(getattr(task, "members", (task,)))


def check_task(choice: TaskChoice) -> dict[str, Any]:
    """Every reference solution through the verifier; those that fail are counted, and the first of them listed.

    Raises:
        ConfigError: a task whose problems carry no reference solutions.
    """
    task = make_task(choice)
    if not isinstance(task, QuestionTask):
        raise ConfigError(
            f"task {task.name}: its problems carry no solutions to check; take a benchmark or your own file"
        )
    problems = [problem for own in task.splits.values() for problem in own]
    referenced = [(problem, text) for problem in problems if (text := task.reference(problem)) is not None]
    if not referenced:
        raise ConfigError(f"task {task.name}: no problem has a field 'solution' to check")
    verdicts = judge_all(
        task,
        [problem for problem, _ in referenced],
        [Completion(text, (), FinishReason.STOP) for _, text in referenced],
    )
    failing = [(p, v) for (p, _), v in zip(referenced, verdicts, strict=True) if v.correct is False]
    missing = [(p, v) for (p, _), v in zip(referenced, verdicts, strict=True) if v.correct is None]
    return {
        "task": task.name,
        "problems": len(problems),
        "with_solution": len(referenced),
        "accepted": len(referenced) - len(failing) - len(missing),
        "failed": len(failing),
        "without_verdict": len(missing),
        "first_failing": [{"id": p.id, "why": v.detail} for p, v in (*failing, *missing)[:_SHOWN]],
    }
