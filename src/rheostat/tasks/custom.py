"""A user's own task: a class in a Python file, or a file of problems with a verifier.

A verifier of one's own is a plain function in a Python file::

    def verify(problem: dict, completion: str) -> float | bool | None: ...

``problem`` has ``id``, ``question``, ``answer`` and ``metadata`` (the row's other fields). True or 1 is right, anything
below 1 is wrong, None means that no verdict can be given. The function runs in worker processes that are killed when
it hangs: a completion that hangs or crashes it is wrong. An exception is no verdict: the run counts it and goes on.
"""

import importlib.util
import re
import sys
from pathlib import Path
from typing import cast

from rheostat.errors import ConfigError, RheostatError
from rheostat.tasks.base import Task
from rheostat.tasks.benchmarks import Fields
from rheostat.tasks.records import Record
from rheostat.tasks.workers import CallFailed, Raised, WorkerPool
from rheostat.types import Problem, Verdict

_TIMEOUT = 10.0  # seconds for one verdict of a user's function


def is_file_target(text: str) -> bool:
    """Whether a text reads ``path/to/file.py:name``."""
    path, colon, name = text.rpartition(":")
    return bool(colon) and path.endswith(".py") and name.isidentifier()


def load_task(target: str) -> Task:
    """The task ``name`` of ``path/to/file.py:name``; a class, or a function without arguments, is called.

    Raises:
        ConfigError: no such file or name, or it is no task.
    """
    path, _, name = target.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"rheostat_task_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(f"--task {target}: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    if (folder := str(Path(path).resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)  # it may import its neighbours, as a script does
    try:
        spec.loader.exec_module(module)
        found = getattr(module, name)
        task = found() if callable(found) else found
    except AttributeError as error:
        raise ConfigError(f"--task {target}: {error}") from error
    except RheostatError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file raises, it is the file's
        raise ConfigError(f"--task {target}: {type(error).__name__}: {error}") from error
    missing = [part for part in ("name", "max_tokens", "problems", "prompt", "verify") if not hasattr(task, part)]
    if missing:
        raise ConfigError(f"--task {target}: no task, it lacks {', '.join(missing)} (see docs/tasks.md)")
    return cast(Task, task)


def plain_fields(record: Record) -> Fields:
    """``problem`` (or ``question``, ``prompt``) and ``answer``; all other fields are metadata."""
    question = str(record.first("problem", "question", "prompt"))
    answer = record.fields.get("answer")
    shown = {"problem", "question", "prompt", "answer", "id"}
    return (
        question,
        "" if answer is None else str(answer),
        {name: value for name, value in record.fields.items() if name not in shown},
    )


def answered_fields(record: Record) -> Fields:
    """The same, of rows that must have an answer.

    Raises:
        ConfigError: this one has none, or an empty one.
    """
    if not str(record.first("answer")).strip():
        raise ConfigError(f"{record.where}: the answer is empty")
    return plain_fields(record)


class ExactVerifier:
    """Right when the completion, or its last line, is the answer, spaces aside."""

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        wanted = " ".join(problem.answer.split())
        lines = completion.strip().splitlines() or [""]
        last = " ".join(lines[-1].split())
        return Verdict(wanted in (" ".join(completion.split()), last), answer=last or None)


class FunctionVerifier:
    """A function of a file, or of a package, in worker processes; see the module's text.

    Args:
        target: ``path/to/file.py:function`` or ``package.module:function``.

    Raises:
        ConfigError: there is no such file.
    """

    def __init__(self, target: str) -> None:
        path, _, _ = target.rpartition(":")
        if is_file_target(target) and not Path(path).expanduser().is_file():
            raise ConfigError(f"--verifier {target}: there is no file {path}")
        self._target = target
        self._pool = WorkerPool(target, timeout=_TIMEOUT)
        self._pool.check()

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        shown = {
            "id": problem.id,
            "question": problem.question,
            "answer": problem.answer,
            "metadata": dict(problem.metadata),
        }
        try:
            result = self._pool.call(shown, completion)
        except CallFailed as error:
            return Verdict(False, str(error))
        if isinstance(result, Raised):
            return Verdict(None, f"{self._target}: {result.type}: {result.message}")
        if result is None:
            return Verdict(None, f"{self._target} gave no verdict")
        if not isinstance(result, bool | int | float):
            return Verdict(None, f"{self._target} returned {type(result).__name__}, not a number, a bool or None")
        return Verdict(result >= 1, f"score {float(result):g}")


def matches(problem: dict[str, str], completion: str) -> bool:
    """Whether the answer, a regular expression, is found in the completion; runs in a worker: patterns can hang."""
    return re.search(problem["answer"], completion) is not None
