"""Engines, a task and an adapter that misbehave in the processes of workers, judges and trainers."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny import SPACE, TinyTask, tiny_engine

from rheostat.adapters.token import TokenAdapter, TokenInputs
from rheostat.decoding.policy import StepObserver, TokenPolicy
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Request
from rheostat.engines.fake import FakeEngine
from rheostat.errors import ModelError
from rheostat.types import Completion, Problem, Verdict


class Unlucky(FakeEngine):
    """Meets its end, once in all: whoever finds the folder without the mark leaves it there and does what it says.

    Args:
        folder: shared by all workers.
        end: ``kill`` (SIGKILL), ``stop`` (SIGSTOP: it hangs) or ``always`` (SIGKILL, every time).
    """

    def __init__(self, folder: Path, end: str) -> None:
        super().__init__()
        self._folder, self._end = folder, end

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        (self._folder / f"call-{time.monotonic_ns()}-{os.getpid()}").touch()
        if self._end == "always" or self._is_first():
            os.kill(os.getpid(), signal.SIGSTOP if self._end == "stop" else signal.SIGKILL)
        return super().generate(requests, policy, order, observer)

    def _is_first(self) -> bool:
        try:
            (self._folder / "mark").touch(exist_ok=False)  # of two at the same time, one succeeds
        except FileExistsError:
            return False
        return True


def another_dtype(folder: Path) -> FakeEngine:
    """An engine that differs from the first in the same folder."""
    engine = Unlucky(folder, "never")
    if not engine._is_first():
        engine.info = replace(engine.info, dtype="bfloat16")
    return engine


def missing_model() -> FakeEngine:
    raise ModelError("there is no model on this node: pull it there")


MISFORTUNES = "RHEOSTAT_TEST_MISFORTUNES"  # the variable that names a folder


def meet(misfortune: str) -> None:
    """SIGKILL to this process, if a file of that name lies in the folder; of several processes, to one."""
    if MISFORTUNES not in os.environ:
        return
    try:
        (Path(os.environ[MISFORTUNES]) / misfortune).unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal:
    """The tiny world's engine; slow, where the folder says so."""

    def __init__(self) -> None:
        self._engine = tiny_engine()
        self.info, self.embed, self.chat_template = self._engine.info, self._engine.embed, None

    def generate(self, requests: Sequence[Request], *others: Any) -> list[Completion]:
        if len(others) == 3:  # with a recorder
            meet("worker")
        time.sleep(float(os.environ.get("RHEOSTAT_TEST_SLOW", "0")))
        return self._engine.generate(requests, *others)


class MortalTask(TinyTask):
    """The tiny world's task. Whoever runs a test has no folder, and lives."""

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        meet("judge")
        return super().verify(problem, completion)


class MortalAdapter(TokenAdapter):
    """Its process may end in the middle of an update, after the first gradient step; the second rank's only."""

    passes = 0

    def forward(self, inputs: TokenInputs) -> Any:
        self.passes += 1
        if self.passes == 2 and os.environ.get("RANK") == "1":
            meet("trainer")
        return super().forward(inputs)


def mortal_adapter(one: TokenAdapter) -> MortalAdapter:
    """With the weights of a new one."""
    return MortalAdapter(one.config, SPACE)
