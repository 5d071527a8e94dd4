"""`rheostat bench scale`: how much of many workers' time the driver of a Ray cluster can fill; what an update costs.

A worker's engine sleeps as a GPU would be busy: a batch takes as long as its longest rollout has tokens, and lengths
are uneven. So it is the handing out, the verifying and the storing that is measured, on whatever machine this runs.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter, TokenConfig
from rheostat.bench.rows import row
from rheostat.console import Console
from rheostat.decoding.policy import StepObserver, TokenPolicy
from rheostat.decoding.recording import Steps
from rheostat.decoding.spaces import TABLE_14
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines.base import EngineInfo, Pooling, Request
from rheostat.environment import machine, versions
from rheostat.rollouts.collect import collect
from rheostat.rollouts.store import RolloutStore
from rheostat.seeding import derive_seed
from rheostat.tasks.base import Split
from rheostat.tasks.choose import TaskChoice, make_task
from rheostat.training.distributed import RayEngine
from rheostat.training.surrogate import surrogate_loss
from rheostat.training.token_config import TokenTrainingConfig
from rheostat.types import Completion, FinishReason, Prompt

_WORKERS = (1, 2, 4, 8, 16, 32)
_TASK = TaskChoice("demo")
_MOST = 512  # tokens of a rollout
_SAMPLES = 16  # rollouts in a batch, all of one problem
_BATCHES = 12  # for each worker
_STEP = 0.008  # seconds
_HIDDEN = (576, 2560)  # of SmolLM2 135M and of Qwen3 4B
_CHUNK = 16_384  # recorded tokens at once
_TOKENS = (1_000, 10_000, 100_000)  # recorded, for one update


class SleepingEngine:
    """Writes nonsense of lognormal length (median 150 tokens) at the pace of a GPU."""

    chat_template = None

    def __init__(self) -> None:
        self.info = EngineInfo("sleeping", "sleeping", "0" * 32, 16, 1 << 20, "float32", "cpu", 1)

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        """See :meth:`rheostat.engines.base.Engine.generate`."""
        lengths = [length_of(request) for request in requests]
        time.sleep(max(lengths) * _STEP)
        return [Completion("word " * n, (7,) * n, FinishReason.STOP) for n in lengths]

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling = Pooling.LAST) -> Float[Tensor, "P H"]:
        """Nothing to see."""
        return torch.zeros(len(prompts), self.info.hidden_size)

    def chat_text(self, turns: Sequence[Mapping[str, str]], thinking: bool | None = None) -> str:
        """The last turn."""
        return turns[-1]["content"]

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The same for every token."""
        return ["word "] * len(token_ids)


def length_of(request: Request) -> int:
    """How many tokens the sleeping engine writes."""
    draw = np.random.default_rng(derive_seed(request.seed, request.prompt.problem_id, request.sample, "length"))
    return int(min(max(draw.lognormal(np.log(150), 0.8), 4), request.max_tokens))


def bench_scale(repeats: int, console: Console) -> dict[str, Any]:
    """Efficiency by number of workers, ``repeats`` times in turn, and seconds of one update by recorded tokens."""
    runs: dict[int, list[Filled]] = {workers: [] for workers in _WORKERS}
    with console.progress("workers", repeats * sum(_WORKERS), "") as bar:
        done = 0
        for _ in range(repeats):
            for workers in _WORKERS:
                runs[workers].append(fill(workers))
                done += workers
                bar(done, repeats * sum(_WORKERS), 0)
    rows = []
    for workers, own in runs.items():
        for name, unit in (("efficiency", "share"), ("driver", "processors"), ("rollouts", "1/s"), ("broadcast", "s")):
            rows.append(row(f"{workers} workers: {name}", [getattr(run, name) for run in own], unit))
    for size in _HIDDEN:
        for tokens in _TOKENS:
            seconds = [update_seconds(size, tokens) for _ in range(repeats)]
            rows.append(row(f"one gradient step, hidden size {size}, {tokens} recorded tokens", seconds, "s"))
    return {
        "bench": "scale",
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "ratios": {
            f"efficiency at {workers} workers": round(statistics.median(run.efficiency for run in own), 3)
            for workers, own in runs.items()
        },
    }


@dataclass(frozen=True)
class Filled:
    """A run of :func:`fill`.

    Attributes:
        efficiency: share of the workers' time in which they are busy.
        driver: processors that the driver takes.
        rollouts: per second.
        broadcast: seconds until every worker has answered a short batch under a policy that it has not seen.
    """

    efficiency: float
    driver: float
    rollouts: float
    broadcast: float


def fill(workers: int) -> Filled:
    """Give every worker a dozen batches."""
    task = make_task(_TASK)
    problems = task.problems(Split.TRAIN, workers * _BATCHES)
    strategy = Strategy(temperature=1.0)
    requests = [
        Request(task.prompt(problem), strategy, sample, 0, _MOST) for problem in problems for sample in range(_SAMPLES)
    ]
    busy = _STEP * sum(
        max(length_of(request) for request in requests[first : first + _SAMPLES])
        for first in range(0, len(requests), _SAMPLES)
    )
    first, second = (AdaptiveDecoding(TokenAdapter(TokenConfig(max(_HIDDEN)), TABLE_14, seed)) for seed in (0, 1))
    short = [Request(task.prompt(problem), None, 0, 0, 4) for problem in problems[:workers]]
    with tempfile.TemporaryDirectory() as folder, RayEngine(SleepingEngine, _TASK, workers) as engine:
        with RolloutStore(f"{folder}/short") as store:
            collect(engine, task, problems, short, store, batch_size=1, policy=first)  # imports what it needs
            start = time.perf_counter()
            collect(engine, task, problems, short, store, batch_size=1, policy=second)
            broadcast = time.perf_counter() - start
        with RolloutStore(f"{folder}/rollouts") as store:
            start, used = time.perf_counter(), time.process_time()
            collect(engine, task, problems, requests, store, batch_size=_SAMPLES)
            seconds, used = time.perf_counter() - start, time.process_time() - used
    return Filled(busy / (workers * seconds), used / seconds, len(requests) / seconds, broadcast)


def update_seconds(hidden: int, tokens: int) -> float:
    """One gradient step of a token-level adapter on random recorded tokens."""
    adapter, actions = TokenAdapter(TokenConfig(hidden), TABLE_14), len(TABLE_14)
    steps = Steps(
        torch.randn(tokens, hidden, dtype=torch.bfloat16),
        torch.arange(tokens) // 100,
        torch.arange(tokens) % 100,
        torch.full((tokens,), 100),
        torch.ones(tokens, dtype=torch.int64),
        torch.randint(actions, (tokens,)),
        torch.zeros(tokens, actions).log_softmax(1),
        torch.randn(tokens, actions).log_softmax(1),
        torch.rand(tokens),
        torch.rand(tokens),
    )
    config = TokenTrainingConfig()
    start = time.perf_counter()
    for index_N in torch.split(torch.arange(tokens), _CHUNK):
        loss, _ = surrogate_loss(adapter, steps[index_N], torch.randn(len(index_N)), tokens // 100, config)
        loss.backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start
