"""What the verbs of the command line take: one model for each; field descriptions are its help."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from rheostat.config import (
    AutoDecoRunConfig,
    DemoConfig,
    EngineName,
    EvaluateConfig,
    RunConfig,
    SelectConfig,
    TokenRunConfig,
)

Flag = tyro.conf.FlagCreatePairsOff[bool]


class Arguments(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    json_output: Annotated[Flag, tyro.conf.arg(name="json")] = Field(False, description="print the result as JSON")


class Demo(DemoConfig):
    """Train adapters of both levels, with and without budget, on a small real model, judge them on held-out problems,
    and write results.json, report.html and the adapters. An interrupted run continues when it is started again."""

    out: Path = Field(Path("runs/demo"), description="folder for everything that the run writes")
    dry_run: Flag = Field(False, description="print what would be sampled, and what it takes at most, and stop")
    json_output: Annotated[Flag, tyro.conf.arg(name="json")] = Field(False, description="print the result as JSON")


class TrainSequence(RunConfig):
    """Train a sequence-level adapter: one strategy per prompt, from its embedding and the parallel budget."""

    out: Path = Field(Path("runs/sequence"), description="folder for rollouts, training history and adapter")
    with_budget: bool = Field(True, description="let the policy see the parallel budget")
    workers: int = Field(1, ge=1, description="engines that sample at the same time, on Ray (an extra: rheostat[ray])")
    address: str | None = Field(
        None, description="Ray cluster to work on: auto, or ray://HOST:PORT (default: one here)"
    )
    dry_run: Flag = Field(False, description="print what would be sampled, and what it takes at most, and stop")
    json_output: Annotated[Flag, tyro.conf.arg(name="json")] = Field(False, description="print the result as JSON")


class TrainToken(TokenRunConfig):
    """Train a token-level adapter: one action at every token, from the hidden state and the token budget.
    An interrupted run continues when it is started again."""

    out: Path = Field(Path("runs/token"), description="folder for rollouts, checkpoint, metrics.jsonl and adapter")
    workers: int = Field(1, ge=1, description="engines that sample at the same time, on Ray (an extra: rheostat[ray])")
    trainers: int = Field(1, ge=1, description="processes that share each update, on Ray; 1: this one alone")
    address: str | None = Field(
        None, description="Ray cluster to work on: auto, or ray://HOST:PORT (default: one here)"
    )
    dry_run: Flag = Field(False, description="print what would be sampled, and what it takes at most, and stop")
    json_output: Annotated[Flag, tyro.conf.arg(name="json")] = Field(False, description="print the result as JSON")


class TrainAutoDeco(AutoDecoRunConfig):
    """Train AutoDeco heads, a rival: a temperature and a top-p at every token, by cross-entropy on right answers."""

    out: Path = Field(Path("runs/autodeco"), description="folder for training history and adapter")
    dry_run: Flag = Field(False, description="print what would be sampled, and what it takes at most, and stop")
    json_output: Annotated[Flag, tyro.conf.arg(name="json")] = Field(False, description="print the result as JSON")


class Evaluate(EvaluateConfig):
    """Judge adapters of either level against each other and against static strategies on the test split."""

    task: str | None = Field(None, description="by default the one that the first adapter was trained on")  # type: ignore[assignment]
    commit: bool | None = Field(
        None, description="take the most probable action instead of drawing one (default: at the sequence level only)"
    )
    adapter: tuple[str, ...] = Field((), description="adapter folders or Hub ids; none: static strategies only")
    policy: tuple[str, ...] = Field(
        (), description="judge these fixed strategies as they are, like greedy T=0.7,p=0.9; no split but test is read"
    )
    limit: int = Field(120, ge=1, description="problems of the test split (with --policy)")
    policy_samples: int = Field(1, ge=1, description="completions per problem and strategy (with --policy)")
    out: Path = Field(Path("runs/evaluate"), description="folder for rollouts, results.json and report.html")
    workers: int = Field(1, ge=1, description="engines that sample at the same time, on Ray (an extra: rheostat[ray])")
    address: str | None = Field(
        None, description="Ray cluster to work on: auto, or ray://HOST:PORT (default: one here)"
    )
    dry_run: Flag = Field(False, description="print what would be sampled, and what it takes at most, and stop")
    json_output: Annotated[Flag, tyro.conf.arg(name="json")] = Field(False, description="print the result as JSON")


class Select(SelectConfig):
    """Choose a compact action space for a model and a task from a sweep over candidate strategies."""

    out: Path = Field(Path("runs/select"), description="folder for rollouts, action space, results and report")
    workers: int = Field(1, ge=1, description="engines that sample at the same time, on Ray (an extra: rheostat[ray])")
    address: str | None = Field(
        None, description="Ray cluster to work on: auto, or ray://HOST:PORT (default: one here)"
    )
    dry_run: Flag = Field(False, description="print what would be sampled, and what it takes at most, and stop")
    json_output: Annotated[Flag, tyro.conf.arg(name="json")] = Field(False, description="print the result as JSON")


class Report(Arguments):
    """Write the report of one run or several: a page that needs no network, its figures as SVG and PNG, model cards."""

    run: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")] = Field(
        min_length=1, description="folders that demo, train, evaluate or select wrote; an interrupted run is marked so"
    )
    out: Path | None = Field(
        None, description="folder to write into (default: report inside the only RUN, else report in this folder)"
    )


class Generate(Arguments):
    """Complete a prompt under an adapter or a fixed strategy."""

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")] = Field(
        description="text to complete; - reads it from stdin"
    )
    model: str = Field("smollm2", description="base model: a name, a folder, or a Hub id")
    engine: EngineName = Field("local", description="what runs the model: local, or vllm (an extra: rheostat[vllm])")
    adapter: str | None = Field(None, description="adapter folder or Hub id; it picks the strategy")
    strategy: str | None = Field(None, description="a fixed strategy instead, like greedy or T=0.7,p=0.9 (default T=1)")
    budget: int = Field(1, description="parallel budget B: how many completions")
    commit: Flag = Field(
        False, description="a token-level adapter takes its most probable action, instead of drawing one"
    )
    trace: Flag = Field(
        False, description="show each token coloured by its action, and write trace.html (token-level adapters)"
    )
    trace_out: Path = Field(Path("trace.html"), description="where --trace writes its page")
    max_tokens: int = Field(64, description="token budget b of each completion")
    stop: tuple[str, ...] = Field((), description="strings that end a completion")
    chat: Flag = Field(False, description="wrap the prompt in the model's chat template")
    seed: int = Field(0, description="every draw is a function of it")


class Serve(BaseModel):
    """Serve a model and its adapters over HTTP, as OpenAI's API does. Ctrl-C or SIGTERM ends it once answers that are
    under way are finished."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("smollm2", description="base model: a name, a folder, or a Hub id")
    adapter: tuple[str, ...] = Field(
        (), description="adapter folders or Hub ids, each served as MODEL:NAME; NAME=DIR names one yourself"
    )
    engine: EngineName = Field("local", description="what runs the model: local, or vllm (an extra: rheostat[vllm])")
    host: str = Field("127.0.0.1", description="address to listen on; others can reach any but this machine's own")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: str | None = Field(
        None, description="key that clients must send; RHEOSTAT_API_KEY does the same, unseen by 'ps'"
    )
    grace: float = Field(25.0, ge=0, description="seconds that running answers have to finish when it is told to stop")


class Models(Arguments):
    """List the models that need no hub, pull one into the cache, or print where it lies."""

    action: tyro.conf.Positional[Literal["list", "pull", "path"]] = Field("list", description="what to do")
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[NAME]")] = Field(
        "", description="a name, a folder, or a Hub id"
    )


class Push(Arguments):
    """Push an adapter folder to the Hugging Face Hub."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")] = Field(description="adapter folder")
    repo: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REPO")] = Field(
        description="owner/name on the Hub"
    )
    private: Flag = Field(False, description="make a new repository private")


class Bench(Arguments):
    """Measure: the speed of the engine, the server, many workers, the verifiers or the store, the variance of the token
    gradient, the choice of actions, or the report; or check that nothing has become slower than its peer."""

    name: tyro.conf.Positional[
        Literal[
            "engine", "estimator", "select", "report", "sampler", "scale", "serve", "store", "verify", "vllm", "check"
        ]
    ] = Field(
        "engine",
        description="engine: tokens per second beside transformers'; estimator: variances of the gradient; "
        "select: seconds and memory of the choice of an action space; report: those of a report on 100,000 rollouts; "
        "sampler: milliseconds of a draw beside one that sorts; scale: what up to 32 workers on Ray are kept busy; "
        "serve: 64 clients of a server beside the offline engine; store: rollouts per second beside JSON lines; "
        "verify: verdicts per second beside bare ones; vllm: tokens per second adapted and not; "
        "check: the ratios of sampler, select, store and verify against the committed ones",
    )
    model: str = Field("smollm2", description="model to measure with (engine, estimator, serve, vllm)")
    repeats: int = Field(5, ge=1, description="estimator: times 24 prompts; others: repetitions (check has its own)")
    seconds: float = Field(180.0, ge=5, description="serve: how long the clients ask")


class Tasks(Arguments):
    """List the tasks that have a name, show what one asks, or check its verifier with its own solutions."""

    action: tyro.conf.Positional[Literal["list", "show", "check"]] = Field("list", description="what to do")
    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[TASK]")] = Field(
        "", description="a name, several joined by +, FILE.jsonl (and --verifier), or FILE.py:NAME"
    )
    data: tuple[str, ...] = Field((), description="problems from here instead of the Hub, as for 'rheostat evaluate'")
    verifier: str | None = Field(None, description="math, exact, regex, or FILE.py:FUNCTION")
    cot: float = Field(0.0, ge=0, le=1, description="share of prompts that ask for a chain of thought")
    shots: int = Field(0, ge=0, description="worked examples before the question")
    require_isolation: Flag = Field(False, description="refuse a system that lacks a protection of the sandbox")
