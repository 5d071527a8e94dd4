"""AutoDeco heads, the learned rival of the token level: draw answers, train on the right ones, write the adapter."""

import json
from pathlib import Path

from rheostat.adapters.autodeco import AutoDeco, AutoDecoConfig
from rheostat.adapters.files import save_adapter
from rheostat.config import AutoDecoRunConfig
from rheostat.console import Console
from rheostat.engines.base import Engine
from rheostat.files import atomic_write
from rheostat.tasks.base import Split
from rheostat.training.autodeco import AutoDecoTrainingConfig, RightAnswers, collect_right_answers, train_autodeco
from rheostat.verbs.run import Run, base_of, open_run


def _answers(run: Run, config: AutoDecoRunConfig, split: Split) -> RightAnswers:
    problems = run.splits[split]
    total, what = len(problems) * config.samples, f"answers for {split}"
    with run.phase(what), run.console.progress(what, total, "tokens") as bar:
        return collect_right_answers(run.engine, run.task, problems, config.samples, config.seed, bar)


def train_autodeco_heads(
    config: AutoDecoRunConfig, out: Path, console: Console, engine: Engine | None = None
) -> dict[str, object]:
    """`rheostat train autodeco`: train heads into ``out/adapter``; returns what ``training.json`` says.

    Raises:
        RheostatError: no answer of the training or of the validation problems is right.
    """
    training = AutoDecoTrainingConfig.model_validate(
        config.model_dump(include=set(AutoDecoTrainingConfig.model_fields))
    )
    with open_run(config, out, console, engine) as run:
        info = run.engine.info
        train, validation = (_answers(run, config, split) for split in (Split.TRAIN, Split.VALIDATION))
        adapter = AutoDeco(AutoDecoConfig(info.hidden_size, config.width), config.seed).to(info.device)
        with run.phase("training"), console.progress("training AutoDeco heads", config.epochs, "") as bar:
            history, kept = train_autodeco(adapter, train.tokens, validation.tokens, training, config.seed, bar)
        summary = {
            "task": config.task,
            "seed": config.seed,
            "problems": train.problems,
            "rollouts": train.rollouts,
            "right": train.right,
            "tokens": len(train.tokens),
            "kept_epoch": kept,
            "validation_loss": round(history[kept]["validation_loss"], 6),
        }
        save_adapter(run.out / "adapter", adapter, base_of(info), summary, {})
        results = summary | {
            "adapter": str(run.out / "adapter"),
            "validation_loss_at_the_start": round(history[0]["validation_loss"], 6),
            "history": history,
            "wall_seconds": dict(run.wall_seconds),
            "config": config.model_dump(mode="json"),
        }
        atomic_write(run.out / "training.json", json.dumps(results, indent=1))
        return results
