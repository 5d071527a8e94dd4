"""What each verb of the `rheostat` command does: one function for each, which runs it and prints what it found."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel
from rich import box
from rich.table import Column, Table

from rheostat.arguments import (
    Bench,
    Demo,
    Evaluate,
    Generate,
    Models,
    Push,
    Report,
    Select,
    Serve,
    Tasks,
    TrainAutoDeco,
    TrainSequence,
    TrainToken,
)
from rheostat.config import (
    AutoDecoRunConfig,
    DemoConfig,
    EvaluateConfig,
    PolicyRunConfig,
    RunConfig,
    SelectConfig,
    TokenRunConfig,
    build,
)
from rheostat.console import Console
from rheostat.decoding.spaces import strategies_named
from rheostat.errors import ConfigError

if TYPE_CHECKING:
    from rheostat.adapters.files import LoadedAdapter
    from rheostat.engines.base import Engine
    from rheostat.training.update import Updater
    from rheostat.verbs.judge import Rivals

Config = TypeVar("Config", bound=BaseModel)


@contextlib.contextmanager
def _engines(arguments: TrainSequence | TrainToken | Evaluate | Select) -> Iterator["Engine | None"]:
    """As many engines as were asked for, as one; None where the command opens its own."""
    trainers = arguments.trainers if isinstance(arguments, TrainToken) else 1
    if arguments.workers == trainers == 1 and arguments.address is None:
        yield None
        return
    from rheostat.adapters.files import load_adapter
    from rheostat.training.distributed import RayEngine
    from rheostat.verbs.run import open_engine

    task = arguments.task
    if isinstance(arguments, Evaluate) and task is None:
        task = _task_of([load_adapter(name) for name in arguments.adapter])
    choice = arguments.model_copy(update={"task": task}).task_choice(arguments.seed)
    opened = partial(open_engine, arguments.model, arguments.engine)
    with RayEngine(opened, choice, arguments.workers, arguments.address, trainers) as engine:
        yield engine


def _trainers(arguments: TrainToken) -> contextlib.AbstractContextManager["Updater | None"]:
    """Who shares updates, beside the engines; None where the command makes them itself."""
    if arguments.trainers == 1:
        return contextlib.nullcontext()
    from rheostat.training.distributed import Trainers

    return Trainers(arguments.trainers)


def _part(model: type[Config], arguments: BaseModel) -> Config:
    """The fields of ``arguments`` that shape the numbers."""
    return model(**{name: getattr(arguments, name) for name in model.model_fields})


def _demo(arguments: Demo, console: Console) -> object:
    from rheostat.verbs.demo import demo

    results = demo(_part(DemoConfig, arguments), arguments.out, console)
    _show(results, arguments.out, console)
    return results


def _train_sequence(arguments: TrainSequence, console: Console) -> object:
    from rheostat.verbs.sequence import train_sequence

    with _engines(arguments) as engine:
        config = _part(RunConfig, arguments)
        summary = train_sequence(config, arguments.out, console, arguments.with_budget, engine)
    console.say(
        f"validation reward {summary['validation_reward']:.3f}, best single strategy "
        f"{summary['validation_best_single_strategy']:.3f}; adapter in {summary['adapter']}"
    )
    return summary


def _train_token(arguments: TrainToken, console: Console) -> object:
    from rheostat.verbs.token import train_token_level

    with _engines(arguments) as engine, _trainers(arguments) as updater:
        summary = train_token_level(_part(TokenRunConfig, arguments), arguments.out, console, engine, updater)
    console.say(
        f"validation reward {summary['validation_reward']:.3f} (batch {summary['kept_step']}), at the start "
        f"{summary['validation_reward_of_the_uniform_policy']:.3f}; adapter in {summary['adapter']}"
    )
    return summary


def _train_autodeco(arguments: TrainAutoDeco, console: Console) -> object:
    from rheostat.verbs.autodeco import train_autodeco_heads

    summary = train_autodeco_heads(_part(AutoDecoRunConfig, arguments), arguments.out, console)
    console.say(
        f"validation loss {summary['validation_loss']:.3f} (epoch {summary['kept_epoch']}), at the start "
        f"{summary['validation_loss_at_the_start']:.3f}; adapter in {summary['adapter']}"
    )
    return summary


def _evaluate(arguments: Evaluate, console: Console) -> object:
    from rheostat.adapters.files import load_adapter
    from rheostat.rollouts.collect import policy_device
    from rheostat.verbs.judge import evaluate
    from rheostat.verbs.run import base_of, open_engine

    _check(arguments)
    if arguments.policy:
        return _evaluate_policies(arguments, console)
    with _engines(arguments) as engines:
        engine = engines or open_engine(arguments.model, arguments.engine)
        loaded = {name: load_adapter(name, base=base_of(engine.info)) for name in arguments.adapter}
        config, rivals = _judged(arguments, loaded, policy_device(engine))
        results = evaluate(config, arguments.out, console, rivals, engine)
    _show(results, arguments.out, console)
    return results


def _check(arguments: Evaluate) -> None:
    """What cannot be is refused before a model is loaded."""
    from rheostat.verbs.run import require_own_results

    require_own_results(arguments.out, "policies" if arguments.policy else "sequence")
    given = [f"--{name}" for name in ("baselines", "budgets", "strategies") if getattr(arguments, name)]
    if arguments.policy and given:
        raise ConfigError(
            f"--policy judges fixed strategies as they are: leave out {' '.join(given)}, or give the strategies as "
            "--strategies, which are compared with each other and with baselines"
        )


def _judged(
    arguments: Evaluate, loaded: Mapping[str, "LoadedAdapter[Any]"], device: str = "cpu"
) -> tuple[EvaluateConfig, "Rivals"]:
    """The configuration of an evaluation, which follows its adapters, and who is judged."""
    from rheostat.verbs.judge import Rivals

    fields = arguments.model_dump(include=set(EvaluateConfig.model_fields))
    fields["task"] = arguments.task or _task_of(loaded.values())
    rivals = Rivals.of({name: item.adapter for name, item in loaded.items()}, device, arguments.commit)
    if rivals.space is not None:
        more = strategies_named(arguments.strategies) if arguments.strategies else ()
        measured = dict.fromkeys(map(str, (*rivals.space, *more)))
        fields |= {"strategies": tuple(measured), "order": rivals.space.order}
        fields["budgets"] = arguments.budgets or rivals.budgets
    return build(EvaluateConfig, fields, "evaluate"), rivals


def _task_of(loaded: Iterable["LoadedAdapter[Any]"]) -> str:
    """What the first adapter was trained on."""
    return next((str(item.training["task"]) for item in loaded if "task" in item.training), "demo")


def _policies(arguments: Evaluate) -> PolicyRunConfig:
    if arguments.adapter:
        raise ConfigError("give --adapter or --policy, not both: an adapter is compared with all of its strategies")
    shared = set(PolicyRunConfig.model_fields) & set(EvaluateConfig.model_fields) - {"task", "strategies", "samples"}
    fields = arguments.model_dump(include=shared) | {"limit": arguments.limit, "strategies": arguments.policy}
    fields |= {"task": arguments.task or "demo", "samples": arguments.policy_samples}
    return build(PolicyRunConfig, fields, "evaluate")


def _evaluate_policies(arguments: Evaluate, console: Console) -> object:
    from rheostat.reports.terminal import policy_table
    from rheostat.verbs.policies import evaluate_policies

    results = evaluate_policies(_policies(arguments), arguments.out, console)
    console.rich.print(policy_table(results))
    console.say(str(arguments.out / "results.json"))
    return results


def _show(results: dict[str, Any], out: Path, console: Console) -> None:
    from rheostat.reports.page import sentence
    from rheostat.reports.terminal import summary_table

    console.rich.print(summary_table(results))
    console.say(sentence(results))
    if "token" in results:
        console.say("")
        console.say("Token level:")
        console.rich.print(summary_table(results["token"]))
        console.say(sentence(results["token"]))
    console.say(f"{out / 'results.json'}, {out / 'report.html'}")


def _generate(arguments: Generate, console: Console) -> object:
    from rheostat.generate import generate

    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    result = generate(
        text,
        model=arguments.model,
        engine=arguments.engine,
        adapter=arguments.adapter,
        strategy=arguments.strategy,
        budget=arguments.budget,
        max_tokens=arguments.max_tokens,
        stop=arguments.stop,
        chat=arguments.chat,
        seed=arguments.seed,
        commit=arguments.commit,
        trace=arguments.trace,
    )
    if arguments.trace:
        from rheostat.reports.trace import render_trace, write_trace

        write_trace(result["traces"], arguments.trace_out)
        for trace in result["traces"]:
            console.rich.print(render_trace(trace))
        console.say(f"{arguments.trace_out}")
    if not arguments.json_output and not arguments.trace:
        if result["probabilities"]:
            shares = ", ".join(f"{name} {share:.2f}" for name, share in result["probabilities"].items())
            print(f"# strategy {result['strategy']} (of {shares})")
        for completion in result["completions"]:
            print(completion["text"].strip("\n"))
    return result


def _select(arguments: Select, console: Console) -> object:
    from rheostat.reports.page import sentence
    from rheostat.reports.terminal import selection_table
    from rheostat.verbs.select import select

    with _engines(arguments) as engine:
        results = select(_part(SelectConfig, arguments), arguments.out, console, engine)
    console.rich.print(selection_table(results))
    console.say(sentence(results))
    console.say(f"{arguments.out / 'results.json'}, {arguments.out / 'report.html'}")
    console.say(f"{arguments.out / 'action_space.toml'}: give it to 'rheostat train sequence' as --strategies")
    return results


def _report(arguments: Report, console: Console) -> object:
    from rheostat.verbs.report import report

    result = report(arguments.run, arguments.out)
    for folder in result["partial"]:
        console.say(
            f"{folder} has no results, or those of a run before the interrupted one: the page shows what is there"
        )
    console.say(f"{result['report']}, {len(result['figures'])} files in {Path(result['report']).parent / 'figures'}")
    return result


def _serve(arguments: Serve, console: Console) -> object:
    from rheostat.serving.server.app import Server
    from rheostat.serving.server.models import Models as ServedModels
    from rheostat.serving.server.models import open_engine
    from rheostat.serving.server.run import address, bind, run

    key = arguments.api_key if arguments.api_key is not None else os.environ.get("RHEOSTAT_API_KEY")
    listening = bind(arguments.host, arguments.port, key)

    def load() -> ServedModels:
        return ServedModels(open_engine(arguments.model, arguments.engine), arguments.adapter)

    with listening:
        # Loading leaves a team of OpenMP threads behind for as long as its own thread lives; beside it, those of the
        # server's engine would sleep where they should spin, which costs a third of its speed.
        with ThreadPoolExecutor(1) as thread:
            models = thread.submit(load).result()
        server = Server(models, key)
        names = ", ".join(models.by_id)
        run(server, listening, arguments.grace, lambda: console.say(f"serving {names} at {address(listening)}/v1"))
    return None


def _tasks(arguments: Tasks, console: Console) -> object:
    from rheostat.reports.terminal import check_page, task_page
    from rheostat.tasks.choose import TaskChoice
    from rheostat.verbs import tasks

    if arguments.action == "list":
        found = tasks.list_tasks()
        name, source = Column("task", no_wrap=True), Column("source", overflow="fold")
        table = Table(name, "judged", "splits", "licence", source, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for row in found:
            splits = row["splits"].replace("train, validation, test", "all")
            table.add_row(row["task"], row["judged_by"], splits, row["licence"], row["source"].replace(", ", "\n"))
        if not arguments.json_output:
            console.rich.print(table)
            console.say("Problems of your own: --task FILE.jsonl --verifier math|exact|regex|FILE.py:FUNCTION.")
        return found
    if not arguments.task:
        raise ConfigError(f"tasks {arguments.action}: name a task, as 'rheostat tasks list' shows them")
    choice = TaskChoice(**arguments.model_dump(exclude={"action", "json_output"}))
    if arguments.action == "show":
        shown = tasks.show_task(choice)
        if not arguments.json_output:
            console.rich.print(task_page(shown))
        return shown
    checked = tasks.check_task(choice)
    if not arguments.json_output:
        console.rich.print(check_page(checked))
    return checked


def _models(arguments: Models, console: Console) -> object:
    from rheostat.engines import models

    if arguments.action == "list":
        known = models.known_models()
        table = Table("name", "size", "licence", "cached", "what it is")
        for model in known:
            cached = str(model.path) if model.path else "no"
            table.add_row(model.name, f"{model.bytes / 1e9:.1f} GB", model.licence, cached, model.description)
        if not arguments.json_output:
            console.rich.print(table)
            console.say("Any Hugging Face Hub id or local folder works as well.")
        return [{"name": m.name, "bytes": m.bytes, "licence": m.licence, "path": str(m.path or "")} for m in known]
    if not arguments.name:
        raise ConfigError(f"models {arguments.action}: name a model, as 'rheostat models list' shows them")
    folder = models.pull(arguments.name) if arguments.action == "pull" else models.path(arguments.name)
    if not arguments.json_output:
        print(folder)
    return {"name": arguments.name, "path": str(folder)}


def _push(arguments: Push, console: Console) -> object:
    from rheostat.adapters.files import push_adapter

    url = push_adapter(arguments.folder, arguments.repo, private=arguments.private)
    console.say(f"pushed to {url}")
    return {"url": url}


def _bench(arguments: Bench, console: Console) -> object:
    name, model, repeats = arguments.name, arguments.model, arguments.repeats
    own = {
        "engine": (model, repeats),
        "estimator": (model, repeats),
        "vllm": (model, repeats),
        "serve": (model, arguments.seconds),
        "check": (),
    }
    run = getattr(importlib.import_module(f"rheostat.bench.{name}"), f"bench_{name}")
    result = run(*own.get(name, (repeats,)), console)
    if not arguments.json_output:
        for name, ratio in result["ratios"].items():
            print(f"{name}: {ratio:.2f}")
    return result


VERBS: dict[str, tuple[type[BaseModel], Callable[..., object]]] = {
    "demo": (Demo, _demo),
    "train sequence": (TrainSequence, _train_sequence),
    "train token": (TrainToken, _train_token),
    "train autodeco": (TrainAutoDeco, _train_autodeco),
    "select": (Select, _select),
    "evaluate": (Evaluate, _evaluate),
    "report": (Report, _report),
    "generate": (Generate, _generate),
    "serve": (Serve, _serve),
    "models": (Models, _models),
    "tasks": (Tasks, _tasks),
    "push": (Push, _push),
    "bench": (Bench, _bench),
}


def plan_of(arguments: BaseModel) -> object:
    """``--dry-run``: what the command would sample."""
    from rheostat.adapters.files import load_adapter
    from rheostat.verbs import plan

    match arguments:
        case Demo():
            made = plan.plan_demo(_part(DemoConfig, arguments))
        case TrainSequence():
            made = plan.plan_train_sequence(_part(RunConfig, arguments))
        case TrainToken():
            made = plan.plan_train_token(_part(TokenRunConfig, arguments))
        case TrainAutoDeco():
            made = plan.plan_train_autodeco(_part(AutoDecoRunConfig, arguments))
        case Select():
            made = plan.plan_select(_part(SelectConfig, arguments))
        case Evaluate() if arguments.policy:
            _check(arguments)
            made = plan.plan_policies(_policies(arguments))
        case Evaluate():
            _check(arguments)
            here = [name for name in arguments.adapter if (Path(name) / "adapter.json").is_file()]
            loaded = {name: load_adapter(name) for name in here}
            config, rivals = _judged(arguments, loaded)
            absent = [name for name in arguments.adapter if name not in here]
            made = plan.plan_evaluate(config, rivals, absent, {name: item.base for name, item in loaded.items()})
        case _:
            raise AssertionError(f"{type(arguments).__name__} has no plan")
    if not getattr(arguments, "json_output", False):
        print(plan.text(made))
    return made
