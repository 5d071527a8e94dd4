"""Commands that end in ``results.json`` and ``report.html``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rheostat.adapters.sequence import SequenceAdapter
from rheostat.adapters.token import TokenAdapter
from rheostat.config import DemoConfig, RunConfig, TokenRunConfig
from rheostat.console import Console
from rheostat.engines.base import Engine
from rheostat.files import atomic_write
from rheostat.reports.page import write_report
from rheostat.tasks.base import Split
from rheostat.verbs import sequence, token
from rheostat.verbs.run import open_run, pose


def _write(results: dict[str, Any], out: Path) -> dict[str, Any]:
    atomic_write(out / "results.json", json.dumps(results, indent=1))
    write_report(results, out / "report.html")
    return results


def demo(config: DemoConfig, out: Path, console: Console, engine: Engine | None = None) -> dict[str, Any]:
    """`rheostat demo`: both levels, trained and judged; writes adapters, results and report."""
    shared = {"model": config.model, "order": config.order, "seed": config.seed}
    token_config = TokenRunConfig(**config.token.model_dump(), **shared)
    pose(token_config)  # what the second level cannot have is refused before the first is paid for
    with open_run(config, out, console, engine) as run:
        console.say("sequence level: one strategy per prompt")
        results = sequence.train_and_judge(run)
        console.say("token level: one action at every token")
        with open_run(token_config, out, console, run.engine, run.store) as token_run:
            results["token"] = token.train_and_judge(token_run, run.out / "token")
        return _write(results, run.out)


def evaluate(
    config: RunConfig | TokenRunConfig,
    out: Path,
    console: Console,
    adapters: Mapping[str, SequenceAdapter] | Mapping[str, TokenAdapter],
    engine: Engine | None = None,
) -> dict[str, Any]:
    """`rheostat evaluate`: adapters of one level, that of ``config``; without any, static strategies alone."""
    with open_run(config, out, console, engine, splits=(Split.VALIDATION, Split.TEST)) as run:
        if isinstance(config, TokenRunConfig):
            return _write(token.judge(run, adapters, {}), run.out)  # type: ignore[arg-type]
        return _write(sequence.evaluate_sequence(run, dict(adapters)), run.out)  # type: ignore[arg-type]
