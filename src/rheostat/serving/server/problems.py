"""Problems that the playground asks and judges: those that need no network and no files. Runs in a worker process,
because whoever reaches the server may send any text to be judged."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from rheostat.tasks.base import Split
from rheostat.tasks.procedural import ProceduralTask, procedural_task
from rheostat.types import Completion, FinishReason, Problem


def consult(what: str, *arguments: Any) -> dict[str, object]:
    """``ask`` (task, number) or ``judge`` (task, number, text, finish reason); see below."""
    calls: dict[str, Callable[..., dict[str, object]]] = {"ask": ask, "judge": judge}
    return calls[what](*arguments)


def ask(task: str, number: int) -> dict[str, object]:
    """A problem of the test split, as the task asks it.

    Args:
        task: a name of ``rheostat.tasks.procedural.PROCEDURAL``.
        number: of the problem, from 1; a mixture's members take turns.
    """
    problem, asked = _problem(task, number), _task(task)
    prompt = asked.prompt(problem)
    return {
        "task": task,
        "number": number,
        "member": problem.member,
        "question": problem.question,
        "answer": problem.answer,
        "prompt": prompt.text,
        "stop": list(prompt.stop),
        "max_tokens": asked.max_tokens,
    }


def judge(task: str, number: int, text: str, finish_reason: str) -> dict[str, object]:
    """The verdict on a completion (without its stop string) of a problem: ``correct`` and ``detail``."""
    verdict = _task(task).verify(_problem(task, number), Completion(text, (), FinishReason(finish_reason)))
    return {"correct": verdict.correct, "detail": verdict.detail}


@cache
def _task(name: str) -> ProceduralTask:
    return procedural_task(name)


@lru_cache(64)
def _problem(task: str, number: int) -> Problem:
    members = len(_task(task).members)
    turn, member = divmod(number - 1, members)
    return _task(task).problems(Split.TEST, members, turn * members)[member]
