"""`rheostat demo`: both levels on a small real model, from problems to a report."""

from pathlib import Path
from typing import Any

from rheostat.config import DemoConfig, TokenRunConfig
from rheostat.console import Console
from rheostat.engines.base import Engine
from rheostat.verbs import sequence, token
from rheostat.verbs.run import open_run, pose, require_own_results


def demo(config: DemoConfig, out: Path, console: Console, engine: Engine | None = None) -> dict[str, Any]:
    """Train adapters of both levels, judge them, write them and what was found out."""
    shared = {"model": config.model, "engine": config.engine, "order": config.order, "seed": config.seed}
    token_config = TokenRunConfig(**config.token.model_dump(), **shared)
    pose(token_config)  # what the second level cannot have is refused before the first is paid for
    require_own_results(out, "sequence")
    with open_run(config, out, console, engine) as run, run.under_way():
        console.say("sequence level: one strategy per prompt")
        results = sequence.train_and_judge(run)
        console.say("token level: one action at every token")
        with open_run(token_config, out, console, run.engine, run.store) as token_run:
            results["token"] = token.train_and_judge(token_run, run.out / "token")
        return run.write(results)
