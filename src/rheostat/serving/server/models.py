"""The models of a server: the bare one, and one for each adapter."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from rheostat.adapters.autodeco import AutoDeco, AutoDecoding
from rheostat.adapters.files import Adapter, BaseModel, load_adapter
from rheostat.adapters.sequence import PromptFeatures, SequenceAdapter
from rheostat.adapters.token import AdaptiveDecoding
from rheostat.decoding.policy import TokenPolicy
from rheostat.decoding.recording import row_statistics
from rheostat.decoding.strategy import Order, Strategy
from rheostat.engines import models
from rheostat.engines.fake import FakeEngine
from rheostat.engines.jobs import Job, PromptState, ServedEngine
from rheostat.engines.local import LocalEngine
from rheostat.engines.machine import use_usable_cores
from rheostat.errors import ConfigError
from rheostat.serving.server.schemas import Mode, ModelCard, ModelInfo

# What the fake model's conversations look like.
_FAKE_CHAT = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}assistant:"


def open_engine(model: str, engine: Literal["local", "vllm"] = "local") -> ServedEngine:
    """The engine of a model name, folder or Hub id; ``fake`` needs no weights.

    Raises:
        ModelError: no such model.
        ConfigError: vLLM is wanted, and not installed or of an unsupported version.
    """
    if engine == "vllm":
        from rheostat.engines.vllm import VllmEngine

        return VllmEngine(models.locate(model), name=model)
    if model == "fake":
        return FakeEngine(chat_template=_FAKE_CHAT)
    use_usable_cores()
    return LocalEngine(models.locate(model), name=model)


@dataclass(eq=False)
class ServedModel:
    """A model name that requests may use; ``policies`` are those of a token-level adapter, by mode."""

    id: str
    name: str | None = None
    adapter: Adapter | None = None
    policies: Mapping[Mode, TokenPolicy] = field(default_factory=dict)

    @property
    def level(self) -> Literal["sequence", "token", "autodeco"] | None:
        if self.adapter is None:
            return None
        if isinstance(self.adapter, SequenceAdapter):
            return "sequence"
        return "autodeco" if isinstance(self.adapter, AutoDeco) else "token"

    @property
    def actions(self) -> list[str] | None:
        if self.adapter is None or isinstance(self.adapter, AutoDeco):
            return None
        return [str(strategy) for strategy in self.adapter.space]

    def adapt(self, job: Job, mode: Mode) -> dict[str, float]:
        """Let the adapter decide for ``job``; returns its actions' probabilities, empty until it read the prompt."""
        probabilities: dict[str, float] = {}
        if isinstance(self.adapter, SequenceAdapter):
            adapter = self.adapter
            job.order = adapter.space.order
            job.choose = lambda state: _choose(adapter, state, job.parallel_budget, probabilities)
        else:
            assert self.adapter is not None
            job.policy = self.policies[mode]
            job.order = Order.VLLM if isinstance(self.adapter, AutoDeco) else self.adapter.space.order
        return probabilities

    def card(self, engine: ServedEngine, created: int) -> ModelCard:
        config = None if self.adapter is None else self.adapter.config
        info = ModelInfo(
            adapter=self.name,
            level=self.level,
            actions=self.actions,
            budgets=None if config is None else list(config.budgets),
            context_length=engine.info.context_length,
            chat=engine.chat_template is not None,
        )
        return ModelCard(id=self.id, object="model", created=created, owned_by="rheostat", rheostat=info)


def _choose(adapter: SequenceAdapter, state: PromptState, budget: int, found: dict[str, float]) -> Strategy:
    """The most probable strategy, as ``rheostat generate`` takes it; ``found`` gets the probabilities of all."""
    if adapter.config.features is PromptFeatures.ENTROPY:
        statistics = row_statistics(state.logits_V[None])
        read_PZ = torch.stack([statistics.entropy_B, statistics.p_max_B], dim=1)
    else:
        read_PZ = (state.last_H if adapter.config.pooling == "last" else state.mean_H)[None]
    budget_P = torch.tensor([budget])
    pi_A = adapter.probabilities(read_PZ, budget_P)[0].tolist()
    found.update({str(strategy): round(share, 6) for strategy, share in zip(adapter.space, pi_A, strict=True)})
    return adapter.space.strategies[int(adapter.choose(read_PZ, budget_P))]


class Models:
    """The bare model and its adapters, by the names that requests use.

    Args:
        engine: the frozen model.
        adapters: folders or Hub ids, each with its name in front where it is not to be the folder's: ``NAME=DIR``.

    Raises:
        AdapterError: no adapter, or one for another model.
        ConfigError: two adapters of one name.
    """

    def __init__(self, engine: ServedEngine, adapters: Sequence[str] = ()) -> None:
        self.engine = engine
        self.created = int(time.time())
        given = engine.info.model
        # of a folder, the last part: where weights lie is nobody's business
        self.base = Path(given).resolve().name if Path(given).is_dir() else given
        self.by_id = {self.base: ServedModel(self.base)}
        for named in adapters:
            name, folder = _name(named)
            if f"{self.base}:{name}" in self.by_id:
                raise ConfigError(f"two adapters are called '{name}': write --adapter NAME={folder} to tell them apart")
            model = _load(engine, f"{self.base}:{name}", name, folder)
            self.by_id[model.id] = model

    def cards(self) -> list[ModelCard]:
        return [model.card(self.engine, self.created) for model in self.by_id.values()]


def _name(named: str) -> tuple[str, str]:
    """The adapter's name, and where it is. A folder called adapter goes by the name of the folder around it."""
    name, equals, folder = named.partition("=")
    if equals and not Path(named).exists():
        if not name or not folder:
            raise ConfigError(f"--adapter {named}: write a folder, a Hub id, or NAME=DIR")
        return name, folder
    path = Path(named).expanduser().resolve() if Path(named).expanduser().is_dir() else Path(named)
    return (path.parent.name if path.name == "adapter" and path.parent.name else path.name), named


def _load(engine: ServedEngine, model_id: str, name: str, folder: str) -> ServedModel:
    info = engine.info
    base = BaseModel(info.model, None, info.hidden_size, info.fingerprint)
    adapter = load_adapter(folder, base=base).adapter
    if isinstance(adapter, SequenceAdapter):
        return ServedModel(model_id, name, adapter)
    adapter = adapter.to(info.device)
    if isinstance(adapter, AutoDeco):
        heads = AutoDecoding(adapter)
        return ServedModel(model_id, name, adapter, {"adapt": heads, "commit": heads})
    policies: dict[Mode, TokenPolicy] = {
        "adapt": AdaptiveDecoding(adapter),
        "commit": AdaptiveDecoding(adapter, commit=True),
    }
    return ServedModel(model_id, name, adapter, policies)
