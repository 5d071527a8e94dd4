"""``--dry-run``: what a command would sample, and what that takes at most. No model is loaded, no store opened."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rheostat.adapters.files import BaseModel
from rheostat.baselines import Baseline
from rheostat.baselines.turn import TEMPERATURES
from rheostat.config import (
    AutoDecoRunConfig,
    DemoConfig,
    EvaluateConfig,
    PolicyRunConfig,
    RunConfig,
    SelectConfig,
    TokenRunConfig,
)
from rheostat.decoding.recording import bytes_per_token
from rheostat.decoding.strategy import ActionSpace
from rheostat.engines.fake import FakeEngine
from rheostat.errors import AdapterError
from rheostat.tasks.base import Split
from rheostat.tasks.benchmarks import BENCHMARKS
from rheostat.tasks.choose import CUSTOM_TOKENS, TaskChoice, make_task
from rheostat.tasks.records import sources_of
from rheostat.training.bandit import Estimator
from rheostat.verbs.baselines import DYNAMIC, EDT, TURN_PROMPTS, TURN_SAMPLES
from rheostat.verbs.judge import Rivals
from rheostat.verbs.run import Config, pose
from rheostat.verbs.select import rounds_of
from rheostat.verbs.sizes import sizes_of

Plan = dict[str, Any]
Phases = list[tuple[str, int]]
"""Names and rollouts."""

RATES = (1_000, 10_000)  # tokens per second, for examples: neither is a measurement
_TRACED = 48  # problems whose completions are looked at token by token where token-level adapters are judged


def plan_demo(config: DemoConfig) -> Plan:
    """Of ``rheostat demo``: both levels."""
    shared = {"model": config.model, "engine": config.engine, "order": config.order, "seed": config.seed}
    token = TokenRunConfig(**config.token.model_dump(), **shared)
    judged = [
        ("static strategies, validation", _sweep(token.problems.validation, token.space, token.samples)),
        ("static strategies, test", _sweep(token.problems.test, token.space, token.samples)),
        *_token_policies(token.problems.test, token.samples, token.budgets, [bool(token.seen_budgets)]),
    ]
    on_test = ("test", _sweep(config.problems.test, config.space, config.samples.test))
    levels = [
        _level("sequence", config, [*_bandit(config), on_test]),
        _level("token", token, [*_training(token), *judged], max(_batch(token), _traces(token.problems.test))),
    ]
    return _whole("demo", levels)


def plan_train_sequence(config: RunConfig) -> Plan:
    """Of ``rheostat train sequence``."""
    return _whole("train sequence", [_level("sequence", config, _bandit(config))])


def plan_train_token(config: TokenRunConfig) -> Plan:
    """Of ``rheostat train token``."""
    return _whole("train token", [_level("token", config, _training(config), _batch(config))])


def plan_train_autodeco(config: AutoDecoRunConfig) -> Plan:
    """Of ``rheostat train autodeco``."""
    splits = (Split.TRAIN, Split.VALIDATION)
    phases = [(split.value, getattr(config.problems, split.value) * config.samples) for split in splits]
    return _whole("train autodeco", [_level("token", config, phases, splits=splits)])


def plan_evaluate(
    config: EvaluateConfig, rivals: Rivals, absent: Sequence[str], bases: Mapping[str, BaseModel]
) -> Plan:
    """Of ``rheostat evaluate`` with adapters, or with static strategies alone.

    Args:
        config: what is judged.
        rivals: who is judged, of the adapters that are there.
        absent: adapters that are not there yet.
        bases: what those that are there were trained for, by their names.

    Raises:
        AdapterError: one was trained for another model, as far as that is known without loading one.
    """
    doubts = _check_bases(config.model, bases)
    problems, samples = config.problems, config.samples
    phases = [
        ("validation", _sweep(problems.validation, config.space, samples.validation)),
        ("test", _sweep(problems.test, config.space, samples.test)),
        *_baselines(config),
    ]
    seen = rivals.see_budgets
    if seen:
        phases += _token_policies(problems.test, samples.test, config.judged_budgets, seen)
    level = _level("evaluation", config, phases, _traces(problems.test) if seen else 0, (Split.VALIDATION, Split.TEST))
    notes = [
        f"adapter {name} is not there: its strategies, and a token-level one's own rollouts, are not in the plan"
        for name in absent
    ]
    return _whole("evaluate", [level], [*notes, *doubts])


def plan_policies(config: PolicyRunConfig) -> Plan:
    """Of ``rheostat evaluate --policy``."""
    return _whole(
        "evaluate", [_level("strategies", config, [("test", _sweep(config.limit, config.space, config.samples))])]
    )


def plan_select(config: SelectConfig) -> Plan:
    """Of ``rheostat select``.

    Raises:
        ConfigError: ``max_rollouts`` are too few.
    """
    rounds = rounds_of(len(config.space), config.problems, config.samples, config.actions, config.max_rollouts)
    phases: Phases = []
    before = 0
    for number, item in enumerate(rounds, start=1):
        cells = item.problems * item.samples
        name = f"round {number}: {item.strategies} strategies × {item.problems} problems × {item.samples}"
        phases.append((name, item.strategies * (cells - before)))
        before = cells
    notes = [] if config.max_time is None else [f"max_time: cut to {config.max_time:g} minutes at the rate of a batch"]
    return _whole("select", [_level("selection", config, phases)], notes)


def _sweep(problems: int, space: ActionSpace, samples: int) -> int:
    """Rollouts of every strategy on every problem; greedy decoding is asked once."""
    return problems * sum(1 if strategy.is_greedy else samples for strategy in space)


def _bandit(config: RunConfig) -> Phases:
    problems, bandit = config.problems, config.bandit
    if bandit.estimator is Estimator.FULL_INFORMATION:
        train = _sweep(problems.train, config.space, config.samples.train)
    else:
        train = bandit.epochs * problems.train * bandit.group * max(bandit.budgets)
    return [("train", train), ("validation", _sweep(problems.validation, config.space, config.samples.validation))]


def _batch(config: TokenRunConfig) -> int:
    return min(config.prompts, config.problems.train) * config.group


def _training(config: TokenRunConfig) -> Phases:
    looks = 1 + config.steps // config.validate_every + (config.steps % config.validate_every > 0)
    look = config.problems.validation * sum(max(k, config.validation_samples) for k in config.seen_budgets or (1,))
    return [
        ("pass rates of training prompts", config.problems.train * config.filter_samples),
        ("training", config.steps * _batch(config)),
        ("validation", looks * look),
    ]


def _token_policies(problems: int, samples: int, budgets: Sequence[int], see_budgets: Sequence[bool]) -> Phases:
    """What policies that choose at every token sample on test problems, MIXED per token included."""
    own = sum(sum(max(2 * k, samples) for k in budgets) if sees else samples for sees in see_budgets)
    return [
        ("MIXED per token, test", problems * samples),
        ("token-level policies, test", problems * own),
        ("traces", _traces(problems)),
    ]


def _baselines(config: EvaluateConfig) -> Phases:
    """What baselines sample: TURN's temperatures on validation prompts, and the two that it finds on both splits unless
    they are measured anyway; the settings of the others on validation, and the best on test."""
    problems, samples = config.problems, config.samples
    validation, test = problems.validation * samples.validation, problems.test * samples.test
    phases: Phases = []
    if Baseline.TURN in config.baselines:
        watched = len(TEMPERATURES) * min(TURN_PROMPTS, problems.validation) * TURN_SAMPLES
        phases += [("TURN, entropies", watched), ("TURN's strategies, validation and test", 2 * (validation + test))]
    for baseline, name, settings in ((Baseline.EDT, "EDT", EDT), (Baseline.DYNAMIC, "dynamic temperature", DYNAMIC)):
        if baseline in config.baselines:
            phases += [(f"{name}, validation", len(settings) * validation), (f"{name}, test", test)]
    return phases


def _traces(problems: int) -> int:
    """Completions looked at token by token, of the adapter and of a static strategy."""
    return 2 * min(_TRACED, problems)


def _level(
    kind: str,
    config: Config,
    phases: Phases,
    recorded: int = 0,
    splits: Sequence[Split] = tuple(Split),
) -> Plan:
    """One level; ``recorded`` rollouts are held with their hidden states at once."""
    problems, most, notes = _problems(config, splits)
    sizes = sizes_of(config.model)
    if sizes.why:
        notes.append(f"memory of keys, values and recorded tokens is not known: {sizes.why}")
    of_recorded = None
    if recorded and sizes.hidden is not None:
        of_recorded = recorded * most * bytes_per_token(sizes.hidden, len(config.space))
    rows = [{"phase": name, "rollouts": count, "tokens_at_most": count * most} for name, count in phases]
    return {
        "level": kind,
        "model": config.model,
        "engine": config.engine,
        "task": config.task,
        "problems": problems,
        "order": str(config.order),
        "strategies": [str(strategy) for strategy in config.space],
        "max_tokens": most,
        "phases": rows,
        "weights_bytes": sizes.weights,
        "answer_bytes_at_most": None if sizes.token is None else most * sizes.token,
        "recorded_bytes_at_most": of_recorded,
        "notes": notes,
    }


def _problems(config: Config, splits: Sequence[Split]) -> tuple[dict[str, int], int, list[str]]:
    """Problems by split, the token budget, and what could not be checked."""
    choice = config.task_choice(config.seed)
    if not _on_hub(choice):
        task, posed = pose(config, splits)
        return {split.value: len(own) for split, own in posed.items()}, task.max_tokens, []
    if isinstance(config, PolicyRunConfig):
        asked = {Split.TEST.value: config.limit}
    elif isinstance(config, SelectConfig):
        asked = {Split.VALIDATION.value: config.problems}
    else:
        asked = {split.value: getattr(config.problems, split.value) for split in splits}
    note = f"the Hub was not read: that {config.task} has so many problems is not checked"
    return asked, _budget(choice), [note]


def _members(choice: TaskChoice) -> list[TaskChoice]:
    names = [choice.task] if Path(choice.task).is_file() else choice.task.split("+")
    return [replace(choice, task=name) for name in names]


def _on_hub(choice: TaskChoice) -> bool:
    """Whether problems come from the Hub, those of any member of a mixture."""
    members = _members(choice)
    if len(members) > 1:
        return not (choice.data or choice.verifier) and any(map(_on_hub, members))
    sources = sources_of(choice.data).values()
    if choice.task in BENCHMARKS:
        return not sources or not all(source.is_file for source in sources)
    return choice.verifier is not None and not all(source.is_file for source in sources)


def _budget(choice: TaskChoice) -> int:
    """The token budget of a task whose problems are not read."""
    members = _members(choice)
    if len(members) > 1:
        return max(_budget(member) if _on_hub(member) else make_task(member).max_tokens for member in members)
    return choice.max_tokens or (BENCHMARKS[choice.task].max_tokens if choice.task in BENCHMARKS else CUSTOM_TOKENS)


def _check_bases(model: str, bases: Mapping[str, BaseModel]) -> list[str]:
    """What loading the model will have to check."""
    hidden = sizes_of(model).hidden if bases else None
    fingerprint = FakeEngine().info.fingerprint if model == "fake" else None
    notes = []
    for name, base in bases.items():
        if (fingerprint or base.fingerprint) != base.fingerprint or (hidden or base.hidden_size) != base.hidden_size:
            raise AdapterError(
                f"{name}: this adapter was trained for {base} (hidden size {base.hidden_size}), not for {model} "
                f"(hidden size {hidden}): give --model {base} or an adapter of {model}"
            )
        if model not in ("fake", base.id):
            notes.append(
                f"adapter {name} was trained for {base}: that {model} is the same is checked when it is loaded"
            )
    return notes


def _whole(verb: str, levels: Sequence[Plan], notes: Sequence[str] = ()) -> Plan:
    rows = [row for level in levels for row in level["phases"]]
    tokens = sum(row["tokens_at_most"] for row in rows)
    return {
        "dry_run": verb,
        "levels": list(levels),
        "rollouts": sum(row["rollouts"] for row in rows),
        "tokens_at_most": tokens,
        "hours_at_most": {str(rate): round(tokens / rate / 3600, 3) for rate in RATES},
        "notes": list(notes),
    }


def text(plan: Plan) -> str:
    """A plan as the terminal shows it."""
    lines = [f"rheostat {plan['dry_run']}, dry run: nothing was loaded, sampled or written"]
    for level in plan["levels"]:
        strategies = level["strategies"]
        shown = strategies if len(strategies) <= 8 else [*strategies[:3], f"… {len(strategies)} in all"]
        problems = ", ".join(f"{split} {count:,}" for split, count in level["problems"].items())
        lines += [
            "",
            f"{level['level']}: {level['model']} ({level['engine']}) on {level['task']}",
            f"  problems    {problems}",
            f"  strategies  {' '.join(shown)} (order: {level['order']})",
            f"  answers     up to {level['max_tokens']:,} tokens",
        ]
        lines += [f"  {row['rollouts']:>12,} rollouts  {row['phase']}" for row in level["phases"]]
        lines += _memory(level)
        lines += [f"  note: {note}" for note in level["notes"]]
    hours = ", ".join(f"{plan['hours_at_most'][str(rate)]:,.2f} h at {rate:,} tokens/s" for rate in RATES)
    lines += [
        "",
        f"in all at most {plan['rollouts']:,} rollouts, {plan['tokens_at_most']:,} tokens: {hours}",
        "(what the run's folder holds already is not sampled again; few answers use their whole token budget)",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in plan["notes"])])


def _memory(level: Plan) -> list[str]:
    """The line about memory, of what is known."""
    named = ("weights", "weights_bytes"), ("an answer's keys and values", "answer_bytes_at_most")
    known = [(name, level[key]) for name, key in (*named, ("recorded tokens", "recorded_bytes_at_most")) if level[key]]
    shown = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in known)
    return [f"  memory      {shown} (at most)"] if known else []
