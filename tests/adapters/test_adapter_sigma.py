"""Adapters whose action space has top-nσ, and files from before there was one."""

import json
from pathlib import Path

import pytest

from rheostat.adapters.files import DESCRIPTION, BaseModel, load_adapter, save_adapter
from rheostat.adapters.token import AdaptiveDecoding, TokenAdapter, TokenConfig
from rheostat.decoding.strategy import ActionSpace, Strategy
from rheostat.errors import AdapterError

BASE = BaseModel("owner/base-model", None, 4, "f00d")


def adapter_of(*strategies: Strategy) -> TokenAdapter:
    return TokenAdapter(TokenConfig(4, width=3, budget_width=2), ActionSpace(strategies))


def test_round_trip(tmp_path: Path) -> None:
    saved = adapter_of(Strategy(1.5, top_n_sigma=1.0), Strategy(0.5), Strategy(0))
    save_adapter(tmp_path / "a", saved, BASE, training={}, metrics={})
    loaded = load_adapter(tmp_path / "a", base=BASE).adapter
    assert isinstance(loaded, TokenAdapter)
    assert loaded.space == saved.space
    assert AdaptiveDecoding(loaded).key == AdaptiveDecoding(saved).key
    assert AdaptiveDecoding(saved).key != AdaptiveDecoding(adapter_of(Strategy(1.5), Strategy(0.5), Strategy(0))).key


def test_a_file_from_before_it_loads(tmp_path: Path) -> None:
    saved = adapter_of(Strategy(1.5, 5), Strategy(0.5))
    save_adapter(tmp_path / "a", saved, BASE, training={}, metrics={})
    file = tmp_path / "a" / DESCRIPTION
    content = json.loads(file.read_text())
    for fields in content["action_space"]["strategies"]:
        fields.pop("top_n_sigma", None)
    file.write_text(json.dumps(content))
    loaded = load_adapter(tmp_path / "a", base=BASE).adapter
    assert isinstance(loaded, TokenAdapter)
    assert loaded.space == saved.space
    content["action_space"]["strategies"][0]["top_n_sigma"] = -1
    file.write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="top_n_sigma"):
        load_adapter(tmp_path / "a", base=BASE)
