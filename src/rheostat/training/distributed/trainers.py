"""Updates by many ranks at once: Ray Train's torch trainer, whose ranks stay for a whole run and take job after job.

A job carries all state. So a rank that dies costs no more than the update under way: Ray starts the ranks again, and
the job is done again from its beginning, with the same result.
"""

import asyncio
import contextlib
import importlib
import tempfile
import threading
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Self

import torch

from rheostat.errors import RheostatError
from rheostat.training.distributed.cluster import has_gpus, line, ray
from rheostat.training.update import Lesson, Rank, Update, Updated, update

_LIVES = 3  # starts of the ranks that a job may take, before it is the job's fault
_STARTS = 2  # that may find no room on the cluster, a minute each
_LOOK = 1.0  # seconds between two looks whether Ray still tries
_GOODBYE = 2.0  # seconds to end by themselves; who does not ends with the connection


@dataclass(frozen=True, slots=True)
class _Job:
    """References, so that a rank fetches its own share of the tokens alone."""

    update: Any
    lessons: list[Any]


class _Mailbox:
    """Where the driver leaves a job, ranks find it, and the first of them leaves what came of it."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._number, self._lives = 0, _LIVES
        self._job: _Job | None = None
        self._outcome: Updated | RheostatError | None = None
        self._is_open, self._accident = True, "a process was killed"

    async def post(self, job: _Job) -> int:
        """Returns the job's number."""
        async with self._changed:
            self._number, self._job, self._outcome, self._lives = self._number + 1, job, None, _LIVES
            self._changed.notify_all()
            return self._number

    async def next(self, rank: int, done: int) -> tuple[int, _Job | None]:
        """The job after number ``done``, once there is one; None: there will be no more."""
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: not self._is_open or self._awaits(done))
                if not self._is_open:
                    return done, None
                if rank == 0:
                    self._lives -= 1
                if self._lives >= 0:
                    return self._number, self._job
                self._outcome = RheostatError(
                    f"an update ended {_LIVES} groups of trainers, the last by: {self._accident}; "
                    "take more trainers, or give each more memory"
                )
                self._changed.notify_all()

    def _awaits(self, done: int) -> bool:
        return self._number > done and self._outcome is None

    async def finish(self, number: int, outcome: Updated | RheostatError) -> None:
        async with self._changed:
            if number == self._number and self._outcome is None:
                self._outcome, self._job = outcome, None
                self._changed.notify_all()

    async def outcome(self) -> Updated | RheostatError:
        """Of the job that was posted last."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._outcome is not None)
            assert self._outcome is not None
            return self._outcome

    async def note(self, accident: str) -> None:
        self._accident = accident

    async def close(self) -> None:
        async with self._changed:
            self._is_open = False
            self._changed.notify_all()


def _work(config: dict[str, Any]) -> None:
    """What every rank does until the run is over."""
    mailbox, number = config["mailbox"], ray.train.get_context().get_world_rank()
    rank = Rank(number, ray.train.torch.get_device(), torch.distributed.all_reduce)
    done = 0
    while True:
        done, job = ray.get(mailbox.next.remote(number, done))
        if job is None:
            return
        outcome: Updated | RheostatError
        try:
            if config["version"] != version("rheostat"):
                raise RheostatError(
                    f"--trainers: the nodes have different versions of rheostat: {config['version']} and "
                    f"{version('rheostat')}"
                )
            outcome = update(ray.get(job.update), ray.get(job.lessons[number]), rank)
        except RheostatError as error:  # a result like any other: to try again would give the same
            outcome = error
        except Exception as error:
            ray.get(mailbox.note.remote(line(error)))
            raise
        if number == 0:
            ray.get(mailbox.finish.remote(done, outcome))


class Trainers:
    """Ranks that make updates together: call it with one. The cluster must be connected (:class:`RayEngine`).

    Gradients of tokens are summed within a rank and then over ranks, by gloo on processors and NCCL on GPUs. The result
    is that of one process but for rounding and the draws of dropout.

    Args:
        ranks: two or more processes, one processor each, and a GPU each where the cluster has any.
    """

    def __init__(self, ranks: int) -> None:
        train = importlib.import_module("ray.train")
        torch_train = importlib.import_module("ray.train.torch")
        self._ranks = ranks
        node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._mailbox = ray.remote(num_cpus=0, scheduling_strategy=node)(_Mailbox).remote()
        self._folder = tempfile.TemporaryDirectory(prefix="rheostat-trainers-", ignore_cleanup_errors=True)
        gpus = has_gpus()
        self._trainer = torch_train.TorchTrainer(
            _work,
            train_loop_config={"mailbox": self._mailbox, "version": version("rheostat")},
            scaling_config=train.ScalingConfig(num_workers=ranks, use_gpu=gpus),
            torch_config=torch_train.TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=train.RunConfig(
                name="trainers",
                storage_path=self._folder.name,
                failure_config=train.FailureConfig(max_failures=-1, controller_failure_limit=_STARTS),
            ),
        )
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self._end = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._mailbox.close.remote(), timeout=_GOODBYE)
            self._thread.join(_GOODBYE)
        ray.kill(self._mailbox)
        self._folder.cleanup()

    def __call__(self, job: Update, lesson: Lesson) -> Updated:
        """The same as :func:`rheostat.training.update.update`.

        Raises:
            RheostatError: what the update raises; or it ended several groups of ranks; or there is no room for them.
        """
        shares = [ray.put(lesson.share(rank, self._ranks)) for rank in range(self._ranks)]
        given = ray.put(job)
        ray.get(self._mailbox.post.remote(_Job(given, shares)))
        asked = self._mailbox.outcome.remote()
        while not ray.wait([asked], timeout=_LOOK)[0]:
            if not self._thread.is_alive():
                cause = "they stopped" if self._end is None else line(self._end)
                raise RheostatError(f"--trainers {self._ranks}: the trainers cannot be started: {cause}")
        try:
            outcome = ray.get(asked)
        except ray.exceptions.RayError as error:
            raise RheostatError(f"--trainers {self._ranks}: the trainers are gone: {line(error)}") from error
        if isinstance(outcome, RheostatError):
            raise outcome
        assert isinstance(outcome, Updated)
        return outcome
