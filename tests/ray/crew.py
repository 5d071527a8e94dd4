"""Engines that misbehave in the processes of workers, and a task for them."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from rheostat.decoding.policy import StepObserver, TokenPolicy
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Request
from rheostat.engines.fake import FakeEngine
from rheostat.errors import ModelError
from rheostat.types import Completion


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


def missing_model() -> FakeEngine:
    raise ModelError("there is no model on this node: pull it there")
