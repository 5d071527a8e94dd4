"""Sample and judge what is asked for, reuse what is stored, and lose at most the batch under way."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from rheostat.decoding.policy import NamedPolicy, TokenPolicy
from rheostat.decoding.recording import Recorder, Steps
from rheostat.decoding.strategy import Order
from rheostat.engines.base import Engine, EngineInfo, Request
from rheostat.errors import ConfigError, RheostatError, StoreError
from rheostat.rollouts.store import Rollout, RolloutStore
from rheostat.tasks.base import Task
from rheostat.types import Completion, Problem, Verdict

BATCH_SIZE = 768
"""About how many requests are generated in one call and stored in one shard: large enough to keep an engine busy to
the end of the batch, small enough that an interruption repeats minutes, not hours."""

MISSING_VERDICTS_LIMIT = 0.05
"""The largest share of a collection's rollouts that may lack a verdict."""

_KEY_VERSION = 1  # part of every key: change it whenever the fields that a key hashes change


class Progress(Protocol):
    """What :func:`collect` calls after each batch."""

    def __call__(self, done_requests: int, total: int, generated_tokens: int, /) -> None:
        """``done_requests`` of ``total`` are answered, stored ones included; ``generated_tokens`` counts the tokens
        that this collection has generated so far, stored ones excluded, so that a rate is the engine's own."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """A batch to be generated and judged together: request i answers problem i."""

    requests: tuple[Request, ...]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call.

    Attributes:
        steps: the recorded tokens, numbered as the call's requests are; None if nothing was recorded.
        start_RA: what an adapter that starts from a sequence-level one read of each request: log π of that level.
    """

    call: Call
    completions: list[Completion]
    verdicts: list[Verdict]
    steps: Steps | None = None
    start_RA: Float[Tensor, "R A"] | None = None


@runtime_checkable
class Crew(Protocol):
    """An engine that answers many calls at once, and has them judged.

    A policy reaches those who work wherever its own tensors are: give it some on the CPU.
    """

    @property
    def workers(self) -> int:
        """How many calls it works on at a time."""
        ...

    def answer(
        self, calls: Iterable[Call], order: Order, policy: TokenPolicy | None, recorder: Recorder | None = None
    ) -> Iterator[Answer]:
        """What came of each call, as it is ready; takes no more calls at a time than it can use.

        Every call is recorded by a copy of ``recorder``, a new one.
        """
        ...


def policy_device(engine: Engine) -> str:
    """Where the tensors of a policy for ``engine`` belong."""
    return "cpu" if isinstance(engine, Crew) else engine.info.device


@dataclass(frozen=True, slots=True)
class _Item:
    """One distinct rollout to be had: its key, the request to generate it with, and the problem it answers."""

    key: str
    request: Request
    problem: Problem


def rollout_key(info: EngineInfo, order: Order, request: Request, policy_key: str | None = None) -> str:
    """The content hash (32 hexadecimal digits) of everything that shapes a completion, and of nothing else.

    These are the base model's fingerprint; the engine's kind, dtype, device, threads and kernels; the order of the
    transforms; the prompt's text, stop strings and problem; the strategy's exact numbers, or the token policy's key and
    the parallel budget that it may look at; sample, seed and token budget. The model's name and path do not count: the
    same weights under another name give the same rollouts.

    Raises:
        ConfigError: a request without a strategy where there is no policy.
    """
    strategy = request.strategy
    if strategy is not None:
        how: list[object] = list(strategy.to_dict().values())
    elif policy_key is not None:
        how = [policy_key, request.parallel_budget]
    else:
        raise ConfigError("a request names no strategy: give it one, or give the call a token policy")
    parts = [
        _KEY_VERSION,
        info.identity,
        order.value,
        [request.prompt.problem_id, request.prompt.text, *request.prompt.stop],
        how,
        [request.sample, request.seed, request.max_tokens],
    ]
    return _digest(json.dumps(parts))


def collect(
    engine: Engine,
    task: Task,
    problems: Sequence[Problem],
    requests: Sequence[Request],
    store: RolloutStore,
    order: Order = Order.VLLM,
    progress: Progress | None = None,
    batch_size: int = BATCH_SIZE,
    policy: NamedPolicy | None = None,
) -> list[Rollout]:
    """The rollouts of ``requests``, taken from the store where they are there, else generated, judged and stored.

    The requests are composed into batches by :func:`compose`, from the whole list and never from what happens to be
    stored, so that an interrupted collection that is started again generates exactly the batches that an undisturbed
    one would have. A batch is stored in one step before the next begins; interrupting (Ctrl-C, SIGKILL) loses only
    the batch under way. Where a part of a batch is stored, from another list of requests, only the rest is generated.

    Greedy decoding has one outcome, whatever the sample: a greedy request with ``sample`` above 0 stands for the
    same request with sample 0, which is generated once and returned for each (its ``sample`` is 0). A request that
    stands in the list twice is generated once, too.

    A verifier that raises an exception gives no verdict: ``correct`` is None and ``detail`` holds the exception's
    type and message.

    Args:
        engine: samples under each request's own strategy, or under ``policy``.
        task: judges.
        problems: those that the requests ask for, by ``prompt.problem_id``; more do no harm.
        requests: what is wanted.
        store: open, reused and extended.
        order: the order of the transforms.
        progress: called after each batch.
        batch_size: about how many requests to generate at a time.
        policy: picks the sampling parameters at every token; the requests then name no strategy of their own.

    Returns:
        One rollout per request, in their order.

    Raises:
        ConfigError: a request for a problem that is not given, a batch size below one, or requests that name
            strategies beside a policy, or neither.
        StoreError: the disk refuses, or the store holds the same completions judged by another task.
        RheostatError: more than 5 % of the distinct rollouts have no verdict. The batch that passed the limit is not
            stored, so that it is judged anew when the verifier works again.
        ModelError: the engine's.
    """
    items = _items(engine.info, order, problems, requests, policy)
    distinct = list({item.key: item for item in items}.values())
    weights = Counter(item.key for item in items)
    found: dict[str, Rollout] = {}
    unjudged: list[Rollout] = []
    done = generated_tokens = 0

    def missing() -> Iterator[list[_Item]]:
        """What the store lacks, batch by batch; what it has is noted."""
        nonlocal done
        for batch in compose(distinct, batch_size):
            stored = store.find(item.key for item in batch)
            _check_task(batch, stored, store)
            unjudged.extend(rollout for rollout in stored.values() if rollout.correct is None)
            _check_verdicts(unjudged, len(distinct), "they are stored; use another folder to sample them anew")
            found.update(stored)
            done += sum(weights[key] for key in stored)
            if len(stored) < len(batch):
                yield [item for item in batch if item.key not in stored]
            elif progress is not None:
                progress(done, len(items), generated_tokens)

    policy_key = None if policy is None else policy.key  # a hash of all weights: once is enough
    for asked, completions, verdicts, seconds in _answered(engine, task, missing(), order, policy):
        fresh = _rollouts(asked, completions, verdicts, order, policy_key)
        unjudged += [rollout for rollout in fresh if rollout.correct is None]
        _check_verdicts(unjudged, len(distinct), "repair what the verifier needs and run again")
        store.append(fresh, {"engine": json.dumps(engine.info.to_dict()), "seconds": f"{seconds:.6f}"})
        found |= {rollout.key: rollout for rollout in fresh}
        done += sum(weights[item.key] for item in asked)
        generated_tokens += sum(rollout.tokens for rollout in fresh)
        if progress is not None:
            progress(done, len(items), generated_tokens)
    return [found[item.key] for item in items]


def _answered(
    engine: Engine, task: Task, batches: Iterable[list[_Item]], order: Order, policy: NamedPolicy | None
) -> Iterator[tuple[list[_Item], list[Completion], list[Verdict], float]]:
    """Each batch with its completions and verdicts, one batch after another or as a crew has them ready, and its
    seconds: of a crew those since the batch before was ready, so that they add up to the time on the clock."""
    if not isinstance(engine, Crew):
        for batch in batches:
            start = time.perf_counter()
            completions = engine.generate([item.request for item in batch], policy, order)
            verdicts = judge_all(task, [item.problem for item in batch], completions)
            yield batch, completions, verdicts, time.perf_counter() - start
        return
    asked: dict[int, list[_Item]] = {}

    def calls() -> Iterator[Call]:
        for batch in batches:
            call = Call(tuple(item.request for item in batch), tuple(item.problem for item in batch))
            asked[id(call)] = batch
            yield call

    start = time.perf_counter()
    for answer in engine.answer(calls(), order, policy):
        seconds = time.perf_counter() - start
        yield asked.pop(id(answer.call)), answer.completions, answer.verdicts, seconds
        start += seconds


def compose(items: Sequence[_Item], batch_size: int) -> list[list[_Item]]:
    """Batches of at most ``batch_size`` items, a function of the list alone.

    Prompts follow each other as they first appear; all items of one prompt share a batch (a prompt with more than
    ``batch_size`` items is a batch of its own), and a batch ends where the problem's ``member`` changes, since the
    prompts of one member share their few-shot prefix.

    Raises:
        ConfigError: a batch size below one.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    prompts: dict[object, list[_Item]] = {}
    for item in items:
        prompts.setdefault(item.request.prompt, []).append(item)
    batches: list[list[_Item]] = []
    for _, group in groupby(prompts.values(), key=lambda rows: rows[0].problem.member):
        batches.append([])
        for rows in group:
            if batches[-1] and len(batches[-1]) + len(rows) > batch_size:
                batches.append([])
            batches[-1] += rows
    return batches


def _items(
    info: EngineInfo,
    order: Order,
    problems: Sequence[Problem],
    requests: Sequence[Request],
    policy: NamedPolicy | None,
) -> list[_Item]:
    if policy is not None and any(request.strategy is not None for request in requests):
        raise ConfigError("a request names a strategy, but a token policy picks for the whole call: give one of both")
    by_id = {problem.id: problem for problem in problems}
    policy_key = None if policy is None else policy.key  # a hash of all weights: once is enough
    items = []
    for request in requests:
        problem = by_id.get(request.prompt.problem_id)
        if problem is None:
            raise ConfigError(
                f"a request asks for problem {request.prompt.problem_id!r}, which is not among the problems"
            )
        if request.strategy is not None and request.strategy.is_greedy and request.sample != 0:
            request = replace(request, sample=0)
        items.append(_Item(rollout_key(info, order, request, policy_key), request, problem))
    return items


def _rollouts(
    items: Sequence[_Item],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    order: Order,
    policy_key: str | None,
) -> list[Rollout]:
    """One rollout per item, generated in one call; they share the identifier of this composition."""
    batch = _digest("\n".join(item.key for item in items))
    rollouts = []
    for item, completion, verdict in zip(items, completions, verdicts, strict=True):
        rollouts.append(
            Rollout(
                key=item.key,
                problem_id=item.problem.id,
                task=item.problem.task,
                member=item.problem.member,
                strategy=_strategy_name(item.request, policy_key),
                order=order.value,
                sample=item.request.sample,
                seed=item.request.seed,
                max_tokens=item.request.max_tokens,
                text=completion.text,
                tokens=len(completion.token_ids),
                finish_reason=completion.finish_reason,
                correct=verdict.correct,
                detail=verdict.detail,
                answer=verdict.answer,
                batch=batch,
                cot=item.request.prompt.cot,
            )
        )
    return rollouts


def _strategy_name(request: Request, policy_key: str | None) -> str:
    return str(request.strategy) if policy_key is None else f"{policy_key}, B={request.parallel_budget}"


def judge(task: Task, problem: Problem, completion: Completion) -> Verdict:
    """The task's verdict; one that raised an exception is missing, with the exception as its detail."""
    try:
        return task.verify(problem, completion)
    except Exception as error:  # whatever a verifier trips over, it must not cost the batch
        message = f"{type(error).__name__}: {error}".encode(errors="replace").decode()  # it may quote broken text
        return Verdict(None, message)


def judge_all(task: Task, problems: Sequence[Problem], completions: Sequence[Completion]) -> list[Verdict]:
    """The verdict of each completion; equal completions of one problem are judged once.

    A task whose attribute ``verifies_concurrently`` is true is asked by as many threads as there are processors:
    its verifier waits for worker processes.
    """
    asked: dict[tuple[str, str, str], tuple[Problem, Completion]] = {}
    keys = []
    for problem, completion in zip(problems, completions, strict=True):
        keys.append((problem.id, completion.text, completion.finish_reason.value))
        asked.setdefault(keys[-1], (problem, completion))

    def verdict(pair: tuple[Problem, Completion]) -> Verdict:
        return judge(task, *pair)

    if getattr(task, "verifies_concurrently", False):
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            verdicts = list(threads.map(verdict, asked.values()))
    else:
        verdicts = list(map(verdict, asked.values()))
    found = dict(zip(asked, verdicts, strict=True))
    return [found[key] for key in keys]


def _check_task(batch: Sequence[_Item], stored: Mapping[str, Rollout], store: RolloutStore) -> None:
    """A verdict belongs to the task that gave it, which the key does not name."""
    for item in batch:
        if item.key in stored and stored[item.key].task != item.problem.task:
            raise StoreError(
                f"{store.folder} holds completions of problem {item.problem.id} judged by the task "
                f"{stored[item.key].task!r}, not {item.problem.task!r}; use another folder"
            )


def _check_verdicts(unjudged: Sequence[Rollout], total: int, advice: str) -> None:
    if len(unjudged) > MISSING_VERDICTS_LIMIT * total:
        first = unjudged[0]
        raise RheostatError(
            f"{len(unjudged)} of {total} rollouts have no verdict (at most {MISSING_VERDICTS_LIMIT:.0%} may lack one); "
            f"the first, problem {first.problem_id}: {first.detail}; {advice}"
        )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
