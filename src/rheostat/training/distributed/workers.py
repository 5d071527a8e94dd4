"""Rollouts by many engines at once.

Batches wait in one queue: whoever has written one gets the next, so that nobody waits for the slowest. A worker that
dies or hangs is replaced, and what it had is given out again; only the driver writes to the store, so that nothing
stands in it twice.
"""

import contextlib
import io
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.adapters.token import AdaptiveDecoding
from rheostat.decoding.policy import StepObserver, TokenPolicy
from rheostat.decoding.recording import Recorder, Steps
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Engine, EngineInfo, Pooling, Request
from rheostat.errors import ConfigError, RheostatError
from rheostat.rollouts.collect import Answer, Call, judge_all
from rheostat.tasks.choose import TaskChoice, make_task
from rheostat.training.distributed.cluster import PATIENCE, connect, failed, has_gpus, line, ray
from rheostat.types import Completion, Problem, Prompt, Verdict

_BEHIND = 2  # batches of a worker that may wait for their judge, before it gets no more
_HEARTBEAT = 5.0  # seconds between two looks at the workers
_SILENCE = 120.0  # seconds after which a worker that does not answer counts as hanging
_LOADING = 900.0  # seconds more, until it has answered for the first time: a model must be loaded
_LIVES = 3  # workers that a batch may end, before it is the batch's fault

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

    def generate(self, requests: Sequence[Request], policy: bytes | None, order: Order) -> list[Completion]:
        return self._engine.generate(requests, self._unpacked(policy), order)

    def record(
        self, requests: Sequence[Request], policy: bytes | None, order: Order, recorder: Recorder
    ) -> tuple[list[Completion], tuple[Steps | None, Tensor | None]]:
        """What was written, for a judge, and what was recorded, for the driver alone."""
        own = self._unpacked(policy)
        completions = self._engine.generate(requests, own, order, recorder)
        start_RA = own.start_RA if isinstance(own, AdaptiveDecoding) else None
        return completions, (recorder.steps(), None if start_RA is None else start_RA.cpu())

    def watch(
        self, requests: Sequence[Request], policy: bytes | None, order: Order, observer: StepObserver
    ) -> tuple[list[Completion], StepObserver]:
        return self._engine.generate(requests, self._unpacked(policy), order, observer), observer

    def _unpacked(self, policy: bytes | None) -> TokenPolicy | None:
        if policy is None:
            return None
        own: TokenPolicy = torch.load(io.BytesIO(policy), map_location=self._engine.info.device, weights_only=False)
        return own

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling) -> Tensor:
        return self._engine.embed(prompts, pooling)

    def chat_text(self, turns: Sequence[Mapping[str, str]], thinking: bool | None) -> str:
        return self._engine.chat_text(turns, thinking)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return self._engine.pieces(token_ids)


if ray is not None:
    ray.method(concurrency_group="watch")(Worker.alive)


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
    actor: Any = None
    is_written: bool = False
    completions: Any = None
    recorded: Any = None
    answer: Any = None
    lives: int = _LIVES


@dataclass(eq=False)
class _Member:
    """A worker, what it was asked to show that it lives, and when; where it does so, once it has said so."""

    actor: Any
    question: Any = None
    asked: float = 0.0
    place: tuple[int, str] | None = None


def _difference(infos: Sequence[EngineInfo]) -> str | None:
    """What engines differ in, whose rollouts would then not be those of one; their names for the model do not count."""
    for field in fields(EngineInfo):
        values = sorted({str(getattr(info, field.name)) for info in infos})
        if len(values) > 1 and field.name != "model":
            return f"engines, whose {field.name} is {' or '.join(values)}: give all of them the same model and hardware"
    return None


class RayEngine:
    """Engines on a Ray cluster behind the protocol of one (:class:`rheostat.engines.base.Engine`).

    Args:
        open_engine: opens the engine of a worker, there.
        choice: the task that judges make for themselves, there.
        workers: engines, one processor each, and a GPU each where the cluster has any.
        trainers: that the cluster must have room for beside them (:class:`Trainers`); 1: none.
        address: of a cluster, like ``auto`` or ``ray://host:10001``; None starts one here, which ends with this.

    Raises:
        ConfigError: no Ray, another version of it or of rheostat, nobody at the address, too few resources, or engines
            that differ.
        RheostatError: what opening an engine raises there.
    """

    def __init__(
        self,
        open_engine: OpenEngine,
        choice: TaskChoice,
        workers: int,
        address: str | None = None,
        trainers: int = 1,
    ) -> None:
        connect(address, workers, trainers)
        self._worker_options = {"num_cpus": 1, "num_gpus": int(has_gpus()), "concurrency_groups": {"watch": 1}}
        self._open_engine, self._choice = open_engine, choice
        self._members = [self._new_member() for _ in range(workers)]
        self._judges = [self._new_judge() for _ in range(max(1, workers // 4))]
        try:
            found = self._asked("describe", [()] * workers)
            for member in self._members:
                member.place = ray.get(member.actor.alive.remote())
        except BaseException:
            self.close()
            raise
        versions = {own for own, _, _ in found} | {version("rheostat")}
        if len(versions) > 1:
            difference: str | None = f"versions of rheostat: {', '.join(sorted(versions))}"
        else:
            difference = _difference([info for _, info, _ in found])
        if difference:
            self.close()
            raise ConfigError(f"--workers: the nodes have different {difference}")
        _, self.info, self.chat_template = found[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_member(self) -> _Member:
        return _Member(ray.remote(**self._worker_options)(Worker).remote(self._open_engine))

    def _new_judge(self) -> Any:
        return ray.remote(Judge).options(num_cpus=0).remote(self._choice)

    @property
    def workers(self) -> int:
        """See :class:`rheostat.rollouts.collect.Crew`."""
        return len(self._members)

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
            completions, watched = self._asked("watch", [(list(requests), _packed(policy), order, observer)])[0]
            vars(observer).update(vars(watched))
            return list(completions)
        return list(self._asked("generate", [(list(requests), _packed(policy), order)])[0])

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
                    raise RheostatError(f"workers end again and again, the last by: {line(error)}") from error
                for number, reference in enumerate(asked):
                    if failed(reference):
                        self._renew(number)
        raise AssertionError

    def answer(
        self, calls: Iterable[Call], order: Order, policy: TokenPolicy | None, recorder: Recorder | None = None
    ) -> Iterator[Answer]:
        """What came of each call, as it is ready: see :class:`rheostat.rollouts.collect.Crew`.

        Raises:
            RheostatError: what an engine or a verifier raises; or a call ended several processes.
        """
        waiting, fresh = deque[_Work](), iter(calls)
        shared = ray.put(_packed(policy))
        out: list[_Work] = []
        look = time.monotonic()
        while True:
            for number in self._idle(out):
                work = waiting.popleft() if waiting else next((_Work(call) for call in fresh), None)
                if work is None:
                    break
                self._give(work, number, shared, order, recorder)
                out.append(work)
            if not out:
                return
            awaited = [work.answer if work.is_written else work.completions for work in out]
            ready, _ = ray.wait(awaited, num_returns=1, timeout=_HEARTBEAT, fetch_local=False)
            for work in out:
                work.is_written |= work.completions in ready
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
                    continue
                try:
                    steps, start_RA = (None, None) if work.recorded is None else ray.get(work.recorded)
                except ray.exceptions.RayError as error:  # lost with the worker's machine
                    waiting.extend(self._replace(work, out, error))
                    continue
                out.remove(work)
                yield Answer(work.call, completions, verdicts, steps, start_RA)
            if time.monotonic() < look:
                continue
            look = time.monotonic() + _HEARTBEAT
            for number in self._silent():
                held = next((work for work in out if work.worker == number and not work.is_written), None)
                if held is not None:
                    waiting.extend(self._replace(held, out, TimeoutError(f"no sign of life for {_SILENCE:.0f} s")))
                else:
                    self._renew(number)

    def _idle(self, out: list[_Work]) -> list[int]:
        """Workers that write nothing."""
        writing = {work.worker for work in out if not work.is_written}
        had = Counter(work.worker for work in out)
        return [number for number in range(len(self._members)) if number not in writing and had[number] < _BEHIND]

    def _give(self, work: _Work, number: int, policy: Any, order: Order, recorder: Recorder | None) -> None:
        actor, requests = self._members[number].actor, list(work.call.requests)
        work.worker, work.actor, work.is_written = number, actor, False
        if recorder is None:
            work.completions = actor.generate.remote(requests, policy, order)
        else:
            asked = actor.record.options(num_returns=2).remote(requests, policy, order, recorder)
            work.completions, work.recorded = asked
        self._give_to_judge(work)

    def _give_to_judge(self, work: _Work) -> None:
        judge = self._judges[work.worker % len(self._judges)]
        work.answer = judge.judge.remote(work.call.problems, work.completions)

    def _recover(self, work: _Work, out: list[_Work], error: Exception) -> list[_Work]:
        """After a process ended: a new one in its place; returns what a worker had, to be given out again."""
        if failed(work.completions):
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
        if work.actor is self._members[work.worker].actor:
            self._renew(work.worker)
        lost = [item for item in out if item is work or (item.actor is work.actor and not item.is_written)]
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
            ray.wait([kill.remote(process)], timeout=PATIENCE)
        self._members[number] = self._new_member()

    def _count(self, work: _Work, error: Exception) -> None:
        work.lives -= 1
        if work.lives == 0:
            raise RheostatError(
                f"a batch of {len(work.call.requests)} requests ended {_LIVES} processes, the last by: {line(error)}; "
                "lower max_tokens, or give each worker more memory"
            )

    def _silent(self) -> list[int]:
        """Workers that have not answered for too long."""
        silent = []
        for number, member in enumerate(self._members):
            if member.question is None:
                member.question, member.asked = member.actor.alive.remote(), time.monotonic()
            with contextlib.suppress(ray.exceptions.GetTimeoutError, ray.exceptions.RayError):
                member.place = ray.get(member.question, timeout=0)
                member.question = None
                continue
            if time.monotonic() - member.asked > _SILENCE + (_LOADING if member.place is None else 0):
                silent.append(number)
        return silent


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _packed(policy: TokenPolicy | None) -> bytes | None:
    """So that its tensors can be unpacked on another device than they are on; classes as Ray packs them."""
    if policy is None:
        return None
    buffer = io.BytesIO()
    torch.save(policy, buffer, pickle_module=ray.cloudpickle)
    return buffer.getvalue()
