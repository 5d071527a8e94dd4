"""Rollouts by many engines at once, on Ray; the only file that imports it.

A :class:`RayEngine` is an engine to everybody else. Behind it stand workers, one engine each, and judges, which verify
what the workers write. Batches wait in one queue: whoever is free takes the next, so that nobody waits for the slowest.
A worker that dies or hangs is replaced, and what it had is given out again; only the driver writes to the store, so
that nothing stands in it twice.
"""

import contextlib
import importlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.decoding.policy import NamedPolicy, StepObserver, TokenPolicy
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Engine, EngineInfo, Pooling, Request
from rheostat.errors import ConfigError, RheostatError
from rheostat.rollouts.collect import Call, judge_all
from rheostat.tasks.choose import TaskChoice, make_task
from rheostat.types import Completion, Problem, Prompt, Verdict

ray: Any = None  # an extra, untyped in parts
with contextlib.suppress(ImportError):
    ray = importlib.import_module("ray")
    importlib.import_module("ray.util.scheduling_strategies")

OLDEST, NEXT = (2, 50), (3, 0)  # versions of Ray
_AHEAD = 2  # batches that a worker has: one that it runs, one that waits for it
_HEARTBEAT = 5.0  # seconds between two looks at the workers
_SILENCE = 120.0  # seconds after which a worker that does not answer counts as hanging
_LOADING = 900.0  # seconds more, until it has answered for the first time: a model must be loaded
_LIVES = 3  # workers that a batch may end, before it is the batch's fault
_PATIENCE = 15.0  # seconds to reach a cluster

OpenEngine = Callable[[], Engine]


class Worker:
    """An engine in a process of its own."""

    def __init__(self, open_engine: OpenEngine) -> None:
        self._fault: RheostatError | None = None
        try:
            self._engine = open_engine()
        except RheostatError as error:  # raised here, it would reach nobody as it is
            self._fault = error

    def describe(self) -> tuple[str, EngineInfo, str | None]:
        """Version of rheostat, and what the engine says about itself."""
        if self._fault is not None:
            raise self._fault
        return version("rheostat"), self._engine.info, self._engine.chat_template

    def alive(self) -> tuple[int, str]:
        """Answers while another thread generates: its process, and the node that this runs on."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def generate(self, requests: Sequence[Request], policy: TokenPolicy | None, order: Order) -> list[Completion]:
        return self._engine.generate(requests, policy, order)

    def watch(
        self, requests: Sequence[Request], policy: TokenPolicy | None, order: Order, observer: StepObserver
    ) -> tuple[list[Completion], StepObserver]:
        return self._engine.generate(requests, policy, order, observer), observer

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling) -> Tensor:
        return self._engine.embed(prompts, pooling)

    def chat_text(self, turns: Sequence[Mapping[str, str]], thinking: bool | None) -> str:
        return self._engine.chat_text(turns, thinking)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return self._engine.pieces(token_ids)


class Judge:
    """A task's verifier in a process of its own."""

    def __init__(self, choice: TaskChoice) -> None:
        self._task = make_task(choice)

    def judge(
        self, problems: Sequence[Problem], completions: Sequence[Completion]
    ) -> tuple[list[Completion], list[Verdict]]:
        return list(completions), judge_all(self._task, problems, completions)


@dataclass(eq=False)
class _Work:
    """A batch that is out: who has it, and what will hold its completions, and these with their verdicts."""

    call: Call
    worker: int = -1
    completions: Any = None
    answer: Any = None
    lives: int = _LIVES


@dataclass(eq=False)
class _Member:
    """A worker, when it last showed that it lives (in the future while it may be loading), and where it does so."""

    actor: Any
    heard: float
    question: Any = None
    place: tuple[int, str] | None = None


class RayEngine:
    """Engines on a Ray cluster behind the protocol of one (:class:`rheostat.engines.base.Engine`).

    Args:
        open_engine: opens the engine of a worker, there.
        choice: the task that judges make for themselves, there.
        workers: engines, one processor each, and a GPU each where the cluster has any.
        address: of a cluster, like ``auto`` or ``ray://host:10001``; None starts one here, which ends with this.

    Raises:
        ConfigError: no Ray, another version of it or of rheostat, nobody at the address, or too few resources.
        RheostatError: what opening an engine raises there.
    """

    def __init__(self, open_engine: OpenEngine, choice: TaskChoice, workers: int, address: str | None = None) -> None:
        _connect(address, workers)
        gpus = ray.cluster_resources().get("GPU", 0) > 0
        _require_resources(workers, gpus)
        self._worker_options = {"num_cpus": 1, "num_gpus": int(gpus), "concurrency_groups": {"watch": 1}}
        self._open_engine, self._choice = open_engine, choice
        self._members = [self._new_member() for _ in range(workers)]
        self._judges = [self._new_judge() for _ in range(max(1, workers // 4))]
        try:
            found = self._asked("describe", [()] * workers)
            for member in self._members:
                member.place, member.heard = ray.get(member.actor.alive.remote()), time.monotonic()
        except BaseException:
            self.close()
            raise
        versions = {own for own, _, _ in found} | {version("rheostat")}
        if len(versions) > 1:
            self.close()
            raise ConfigError(
                f"--workers: the nodes have different versions of rheostat: {', '.join(sorted(versions))}"
            )
        _, self.info, self.chat_template = found[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_member(self) -> _Member:
        actor = ray.remote(**self._worker_options)(Worker).remote(self._open_engine)
        return _Member(actor, time.monotonic() + _LOADING)

    def _new_judge(self) -> Any:
        return ray.remote(Judge).options(num_cpus=0).remote(self._choice)

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        for member in self._members:
            ray.kill(member.actor)
        for judge in self._judges:
            ray.kill(judge)
        ray.shutdown()

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling = Pooling.LAST) -> Float[Tensor, "P H"]:
        """See :meth:`rheostat.engines.base.Engine.embed`; every worker takes a part."""
        size = max(1, -(-len(prompts) // len(self._members)))
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        if not parts:
            return torch.empty(0, self.info.hidden_size)
        return torch.cat(self._asked("embed", [(part, pooling) for part in parts]))

    def chat_text(self, turns: Sequence[Mapping[str, str]], thinking: bool | None = None) -> str:
        """See :meth:`rheostat.engines.base.Engine.chat_text`."""
        return str(self._asked("chat_text", [(list(turns), thinking)])[0])

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """See :meth:`rheostat.engines.base.Engine.pieces`."""
        return list(self._asked("pieces", [(list(token_ids),)])[0])

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        """See :meth:`rheostat.engines.base.Engine.generate`; one worker does it. An observer watches there, and
        what it has seen comes back."""
        if observer is not None:
            completions, watched = self._asked("watch", [(list(requests), policy, order, observer)])[0]
            vars(observer).update(vars(watched))
            return list(completions)
        return list(self._asked("generate", [(list(requests), policy, order)])[0])

    def _asked(self, method: str, arguments: Sequence[tuple[object, ...]]) -> list[Any]:
        """What worker i says to ``arguments[i]``; workers that end meanwhile are replaced, and all are asked again."""
        for life in range(_LIVES):
            asked = [getattr(m.actor, method).remote(*own) for m, own in zip(self._members, arguments, strict=False)]
            try:
                return list(ray.get(asked))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                if life == _LIVES - 1:
                    raise RheostatError(f"workers end again and again, the last by: {_line(error)}") from error
                for number, reference in enumerate(asked):
                    if _failed(reference):
                        self._renew(number)
        raise AssertionError

    def answer(
        self, calls: Iterable[Call], order: Order, policy: NamedPolicy | None
    ) -> Iterator[tuple[Call, list[Completion], list[Verdict]]]:
        """Completions and verdicts of each call, as they are ready: see :class:`rheostat.rollouts.collect.Crew`.

        Raises:
            RheostatError: what an engine or a verifier raises; or a call ended several processes.
        """
        waiting, fresh = deque[_Work](), iter(calls)
        shared = ray.put(policy)
        out: list[_Work] = []
        while True:
            for number in range(len(self._members)):
                while sum(work.worker == number for work in out) < _AHEAD:
                    work = waiting.popleft() if waiting else next((_Work(call) for call in fresh), None)
                    if work is None:
                        break
                    self._give(work, number, shared, order)
                    out.append(work)
            if not out:
                return
            ready, _ = ray.wait([work.answer for work in out], num_returns=1, timeout=_HEARTBEAT)
            for work in [work for work in out if work.answer in ready]:
                if work not in out:
                    continue  # its worker was replaced meanwhile
                try:
                    completions, verdicts = ray.get(work.answer)
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(
                        cause, ray.exceptions.RayError
                    ):
                        raise cause or error from None  # no accident: what an engine or a verifier has to say
                    waiting.extend(self._recover(work, out, error))
                else:
                    out.remove(work)
                    yield work.call, completions, verdicts
            for number in self._silent():
                held = next((work for work in out if work.worker == number), None)
                if held is not None:
                    waiting.extend(self._replace(held, out, TimeoutError(f"no sign of life for {_SILENCE:.0f} s")))
                else:
                    self._renew(number)

    def _give(self, work: _Work, number: int, policy: Any, order: Order) -> None:
        work.worker = number
        work.completions = self._members[number].actor.generate.remote(list(work.call.requests), policy, order)
        self._give_to_judge(work)

    def _give_to_judge(self, work: _Work) -> None:
        judge = self._judges[work.worker % len(self._judges)]
        work.answer = judge.judge.remote(work.call.problems, work.completions)

    def _recover(self, work: _Work, out: list[_Work], error: Exception) -> list[_Work]:
        """After a process ended: a new one in its place; returns what a worker had, to be given out again."""
        if _failed(work.completions):
            return self._replace(work, out, error)
        place = work.worker % len(self._judges)
        ray.kill(self._judges[place])
        self._judges[place] = self._new_judge()
        self._count(work, error)
        for item in out:
            if item.worker % len(self._judges) == place:
                self._give_to_judge(item)
        return []

    def _replace(self, work: _Work, out: list[_Work], error: Exception) -> list[_Work]:
        """A new worker in the place of one that ended, and what that had, to be given out again."""
        self._count(work, error)
        self._renew(work.worker)
        lost = [item for item in out if item.worker == work.worker]
        for item in lost:
            out.remove(item)
        return lost

    def _renew(self, number: int) -> None:
        member = self._members[number]
        ray.kill(member.actor)
        if member.place is not None:  # a process that hangs does not hear Ray, and would keep its processor
            process, node = member.place
            there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
            kill = ray.remote(num_cpus=0, scheduling_strategy=there, max_retries=0)(_kill)
            ray.wait([kill.remote(process)], timeout=_PATIENCE)
        self._members[number] = self._new_member()

    def _count(self, work: _Work, error: Exception) -> None:
        work.lives -= 1
        if work.lives == 0:
            raise RheostatError(
                f"a batch of {len(work.call.requests)} requests ended {_LIVES} processes, the last by: {_line(error)}; "
                "lower max_tokens, or give each worker more memory"
            )

    def _silent(self) -> list[int]:
        """Workers that have not answered for too long."""
        now, silent = time.monotonic(), []
        for number, member in enumerate(self._members):
            if member.question is None:
                member.question = member.actor.alive.options(concurrency_group="watch").remote()
            with contextlib.suppress(ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
                member.place = ray.get(member.question, timeout=0)
                member.heard, member.question = now, None
            if now - member.heard > _SILENCE:
                silent.append(number)
        return silent


def _connect(address: str | None, workers: int) -> None:
    if ray is None:
        raise ConfigError("--workers needs Ray: pip install 'rheostat[ray]'")
    found = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if not OLDEST <= found < NEXT:
        raise ConfigError(
            f"--workers: Ray {ray.__version__} is not supported, {OLDEST[0]}.{OLDEST[1]} to below {NEXT[0]} is: "
            "pip install 'rheostat[ray]'"
        )
    quiet = {"log_to_driver": False, "logging_level": "error"}
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # what a batch given out again had come to
    if address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15, which starves them where anything else runs
        ray.init(num_cpus=workers, include_dashboard=False, **quiet)
        return
    if address != "auto":
        _require_listener(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--address {address}: no Ray cluster answers there ({_line(error)})") from error


def _require_listener(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--address {address}: give auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        raise ConfigError(f"--address {address}: nobody answers there ({error.strerror or error})") from error


def _require_resources(workers: int, gpus: bool) -> None:
    have = ray.cluster_resources()
    for kind, what in (("GPU", "GPUs"), ("CPU", "processors")) if gpus else (("CPU", "processors"),):
        if have.get(kind, 0) < workers:
            ray.shutdown()
            raise ConfigError(
                f"--workers {workers}: the cluster has {have.get(kind, 0):g} {what}, and each worker needs one"
            )


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _failed(reference: Any) -> bool:
    """Whether there will be no such object, because who was to make it has ended."""
    try:
        ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:
        return True
    return False


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
