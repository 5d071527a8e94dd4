"""What a sequence-level adapter reads of prompts, against the fake engine's known distribution."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from rheostat import cli
from rheostat.adapters.sequence import PromptFeatures, SequenceAdapter, SequenceConfig
from rheostat.decoding.strategy import ActionSpace, Strategy
from rheostat.engines.base import Pooling
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.errors import ModelError
from rheostat.training.bandit import BanditConfig, BanditData, expected_reward, train_bandit
from rheostat.training.prompts import prompt_entropy, represent
from rheostat.types import Prompt

ENTROPY = PromptFeatures.ENTROPY


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(text, text) for text in texts]


def test_the_entropy_is_that_of_the_distribution_after_the_prompt() -> None:
    engine = FakeEngine()
    prompts = prompts_of("12+3=", "a", "12+3=", "zebra")  # one stands twice
    p_PV = np.array([engine.logits(prompt.text).double().softmax(0).numpy() for prompt in prompts])
    found_P2 = prompt_entropy(engine, prompts)
    assert found_P2.dtype == torch.float32
    np.testing.assert_allclose(found_P2[:, 0].numpy(), scipy.stats.entropy(p_PV, axis=1), atol=1e-6)
    np.testing.assert_allclose(found_P2[:, 1].numpy(), p_PV.max(1), atol=1e-6)
    assert len({round(float(value), 6) for value in found_P2[:, 0]}) == 3  # the prompts differ
    assert prompt_entropy(engine, []).shape == (0, 2)
    with pytest.raises(ModelError, match="empty"):
        prompt_entropy(engine, prompts_of(""))


def test_an_adapter_gets_what_it_reads() -> None:
    engine, prompts = FakeEngine(hidden_size=5), prompts_of("12", "345")
    for config in (SequenceConfig(5), SequenceConfig(5, pooling="mean")):
        assert torch.equal(represent(engine, prompts, config), engine.embed(prompts, Pooling(config.pooling)))
    assert torch.equal(represent(engine, prompts, SequenceConfig(5, features=ENTROPY)), prompt_entropy(engine, prompts))


def test_where_the_right_action_follows_the_entropy_the_adapter_finds_it() -> None:
    """Half of the prompts are followed by one likely token: there the first action is right, elsewhere the second."""

    def logits(text: str, _: tuple[int, ...]) -> list[float]:
        return [5.0 if text[0] == "s" else 0.5, 0.0, int(text[1:]) / 100]

    engine = FakeEngine((EOS, "a", "b"), logits, hidden_size=3)
    prompts = prompts_of(*(f"{kind}{number}" for number in range(40) for kind in "sf"))
    config = SequenceConfig(3, with_budget=False, width=16, budgets=(1,), features=ENTROPY)
    reward_1PA = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 40)[None]
    data = BanditData(represent(engine, prompts, config), reward_1PA)
    adapter = SequenceAdapter(config, ActionSpace((Strategy(0), Strategy(1.0))))
    train_bandit(adapter, data, data, BanditConfig(budgets=(1,), epochs=30, learning_rate=1e-2), seed=0)
    assert expected_reward(adapter, data, (1,))[0] > 0.95  # either action alone: 0.5


SMALL = [
    *("--problems.train", "12", "--problems.validation", "12", "--problems.test", "12"),
    *("--samples.train", "8", "--samples.validation", "8", "--samples.test", "16", "--bandit.epochs", "3"),
]


def test_the_commands_train_and_use_an_entropy_only_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    words = ["train", "sequence", "--model", "fake", "--features", "entropy", *SMALL, "--out", out, "--json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["features"] == "entropy"
    described = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert described["features"]["features"] == "entropy"
    words = ["generate", "12", "--model", "fake", "--adapter", f"{out}/adapter", "--budget", "2", "--json"]
    assert cli.main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["completions"]) == 2
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    hidden = str(tmp_path / "hidden")
    assert cli.main(["train", "sequence", "--model", "fake", *SMALL, "--out", hidden]) == 0
    words = ["evaluate", "--model", "fake", "--adapter", f"{out}/adapter", f"{hidden}/adapter", "--budgets", "1", "2"]
    words += ["--problems.validation", "12", "--problems.test", "12", "--samples.validation", "2"]
    assert cli.main([*words, "--samples.test", "4", "--out", str(tmp_path / "judged"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["policy"] for row in rows} >= {f"{out}/adapter", f"{hidden}/adapter", "BEST"}
    assert cli.main(["train", "sequence", "--model", "fake", "--features", "hidden+entropy"]) == 2
    assert "Expected one of ('hidden', 'entropy')" in capsys.readouterr().err
