"""The model card of an adapter, made from what was measured and nothing else."""

import json
import math
import re
from collections.abc import Mapping, Sequence

from rheostat.adapters.autodeco import AutoDecoConfig
from rheostat.adapters.description import Config
from rheostat.adapters.sequence import PromptFeatures, SequenceConfig
from rheostat.decoding.strategy import ActionSpace

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_OFF = "–"


def model_card(
    base_id: str,
    config: Config,
    space: ActionSpace | None,
    training: Mapping[str, object],
    metrics: Mapping[str, object],
) -> str:
    """``README.md`` with the Hub's front matter.

    Args:
        base_id: the base model; a local path is left out of the front matter, which names Hub models only.
        config: what the adapter reads.
        space: what it chooses from; None: any temperature and top-p.
        training: shown as a table where a value is a number, a text or a list of these.
        metrics: ``rows``, ``differences`` and ``costs``, lists of mappings as ``results.json`` has them, each become a
            table; other numbers and texts are listed below them.
    """
    name = _cell(base_id)
    parts = [
        _front_matter(base_id),
        f"# Decoding adapter for {name}",
        f"{_nature(config, 0 if space is None else len(space))} The base model itself stays as it is. The method is "
        f"that of {_method(config)}, as implemented by Rheostat.",
        *([] if space is None else _strategies(space)),
        "## Results",
        *_results(metrics),
    ]
    if shown := [(key, value) for key, value in training.items() if _is_plain(value)]:
        parts += ["## Training", _table(("what", "value"), shown)]
    parts += ["## How to use it", _usage(base_id, config)]
    return "\n\n".join(parts) + "\n"


def _method(config: Config) -> str:
    if isinstance(config, AutoDecoConfig):
        return "AutoDeco (Wang et al., 2025, arXiv:2510.26697)"
    return "*Learning Adaptive LLM Decoding* (Su et al., 2026, arXiv:2603.09065)"


def _strategies(space: ActionSpace) -> list[str]:
    header = ("#", "temperature", "top-k", "top-p", "min-p", "top-nσ")
    rows = [
        (i, "greedy" if s.is_greedy else s.temperature, s.top_k, s.top_p, s.min_p, s.top_n_sigma)
        for i, s in enumerate(space)
    ]
    return ["## Strategies", _table(header, rows), f"The transforms apply in the order of {space.order}."]


def _nature(config: Config, actions: int) -> str:
    """What the adapter reads and what it picks."""
    if isinstance(config, AutoDecoConfig):
        return (
            "AutoDeco heads: before every token they read the model's last hidden state, and predict the temperature "
            "and the top-p of that token."
        )
    budgets = ", ".join(map(str, config.budgets))
    if isinstance(config, SequenceConfig):
        reads = [f"the {config.pooling} hidden state of the prompt"]
        if config.features is PromptFeatures.ENTROPY:
            reads = ["the entropy and the largest probability of the model's next-token distribution after the prompt"]
        if config.with_budget:
            reads.append(f"the parallel budget B (trained for B = {budgets})")
        return (
            f"A sequence-level decoding adapter: it reads {_listed(reads)}, and picks one of {actions} decoding "
            "strategies for the whole completion."
        )
    seen = {
        "the model's last hidden state": config.reads_hidden,
        "the entropy of the model's next-token distribution": config.reads_entropy,
        "the remaining and the total token budget": config.with_budget,
        f"the parallel budget B (trained for pass@B with B = {budgets})": bool(budgets),
    }
    start = (
        " It starts from what a sequence-level adapter, a part of it, chooses for the prompt, and reads that choice."
        if config.start is not None
        else ""
    )
    blind = "" if budgets else " It was trained for pass@1 and does not see how many completions are sampled."
    return (
        "A token-level decoding adapter: before every token it reads "
        f"{_listed([name for name, is_seen in seen.items() if is_seen])}, and picks one of {actions} decoding "
        f"strategies for that token.{start}{blind}"
    )


def _listed(parts: Sequence[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _front_matter(base_id: str) -> str:
    lines = ["library_name: rheostat", "license: apache-2.0"]
    if _HUB_NAME.fullmatch(base_id):
        lines += [f"base_model: {json.dumps(base_id)}", "base_model_relation: adapter"]
    tags = "".join(f"\n- {tag}" for tag in ("rheostat", "decoding", "sampling", "reinforcement-learning"))
    return "\n".join(["---", *lines, f"tags:{tags}", "---"])


def _rows(metrics: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    rows = metrics.get(key)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list | tuple) else []


def _results(metrics: Mapping[str, object]) -> list[str]:
    parts = []
    if found := _rows(metrics, "rows"):
        parts.append(
            _table(
                ("policy", "k", "pass@k", "95 % interval", "problems"),
                [
                    (
                        row.get("policy"),
                        row.get("k"),
                        _fraction(row.get("estimate")),
                        f"{_fraction(row.get('low'))} to {_fraction(row.get('high'))}",
                        row.get("n_problems"),
                    )
                    for row in found
                ],
            )
        )
    if found := _rows(metrics, "differences"):
        parts.append("Paired differences over the same problems; p is corrected after Holm:")
        parts.append(_table(("minus", "k", "difference", "95 % interval", "p"), [_difference(row) for row in found]))
    if found := _rows(metrics, "costs"):
        parts.append(
            "What it costs: tokens of k samples, tokens per solved problem, and how many samples of the best single "
            "strategy solve as many problems:"
        )
        header = ("policy", "k", "tokens", "tokens per solved problem", "equal to samples")
        parts.append(_table(header, [_cost(row) for row in found]))
    if others := [(key, value) for key, value in metrics.items() if _is_plain(value)]:
        parts.append(_table(("what", "value"), others))
    return parts or ["No results were stored with this adapter."]


def _difference(row: Mapping[str, object]) -> tuple[object, ...]:
    strategy = row.get("baseline_strategy")
    rival = row.get("baseline") if strategy is None else f"{row.get('baseline')} ({strategy})"
    interval = f"{_signed(row.get('low'))} to {_signed(row.get('high'))}"
    p = row.get("p_holm")
    shown = f"{p:.2g}" if isinstance(p, int | float) else _OFF
    return rival, row.get("k"), _signed(row.get("estimate")), interval, shown


def _cost(row: Mapping[str, object]) -> tuple[object, ...]:
    tokens = row.get("tokens")
    shown = f"{tokens:.4g}" if isinstance(tokens, int | float) else _OFF
    return row.get("policy"), row.get("k"), shown, _three(row.get("tokens_per_solved")), _three(row.get("equal_to"))


def _three(value: object) -> str:
    """Estimate and interval; an end that is missing has no bound."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return ""
    estimate, low, high = (f"{part:.4g}" if isinstance(part, int | float) else "∞" for part in value)
    return f"{estimate} ({low} to {high})"


def _usage(base_id: str, config: Config) -> str:
    # one strategy for the whole completion is a result; one for each token is not
    shown = 'result["strategy"], ' if isinstance(config, SequenceConfig) else ""
    model = json.dumps(base_id, ensure_ascii=False)
    return f"""`DIR` is this folder, or its id on the Hub (`owner/name`).

```sh
rheostat generate "What is 12 * 7?" --model {model} --adapter DIR --budget 4
```

```python
from rheostat.generate import generate

result = generate("What is 12 * 7?", model={model}, adapter="DIR", budget=4)
print({shown}[completion["text"] for completion in result["completions"]])
```"""


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, str | int | float) for item in value)
    return isinstance(value, str | int | float)


def _fraction(value: object) -> str:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.3f}" if is_number else _OFF


def _signed(value: object) -> str:
    return f"{value:+.3f}" if isinstance(value, int | float) and math.isfinite(value) else _OFF


def _table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    """``value`` on one line that ends no cell of a table."""
    if value is None:
        return _OFF
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return " ".join(str(value).split()).replace("|", "\\|")
