"""``--dry-run`` against what the commands then sample, and several ``--config`` files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from rheostat import cli
from rheostat.adapters.files import BaseModel, save_adapter
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.arguments import TrainSequence
from rheostat.config import merged
from rheostat.decoding.spaces import TABLE_13
from rheostat.engines.base import Request
from rheostat.engines.fake import FakeEngine
from rheostat.types import Completion

Capture = pytest.CaptureFixture[str]

SIZES = "--problems.validation 3 --problems.test 4 --samples.validation 8 --samples.test 16"
SEQUENCE = f"train sequence --model fake --task gcd --problems.train 5 --samples.train 8 --bandit.epochs 1 {SIZES}"
TOKEN = (
    "train token --model fake --task gcd --problems.train 8 --problems.validation 8 --problems.test 8 --samples 4 "
    "--budgets 1 2 --prompts 3 --group 4 --filter-samples 0 --validate-every 2 --validation-samples 1 --steps"
)
OF_TOKENS = TOKEN.partition("gcd ")[2].replace("--", "--token.")  # its task stays steps: one store serves both levels
DEMO = f"demo --model fake {SEQUENCE.partition('fake ')[2]} {OF_TOKENS}"
SELECT = "select --model fake --task digits.jsonl --verifier regex --max-tokens 4"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many completions the fake engine is asked for, call by call."""
    counts: list[int] = []
    generate = FakeEngine.generate

    def counting(self: FakeEngine, requests: Sequence[Request], *rest: Any, **named: Any) -> list[Completion]:
        counts.append(len(requests))
        return generate(self, requests, *rest, **named)

    monkeypatch.setattr(FakeEngine, "generate", counting)
    return counts


def plan_of(words: Sequence[str], capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([*words, "--dry-run", "--json"]) == 0, capsys.readouterr().err
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    "line",
    [
        SEQUENCE,
        f"{TOKEN} 1",  # a look before, and one after the last batch
        f"{TOKEN} 5",  # one in between as well, and one that the last batch brings forward
        f"{TOKEN} 4 --objective pass@1",
        f"evaluate --model fake --task gcd {SIZES}",
        "evaluate --model fake --task gcd --policy greedy T=1 --limit 5 --policy-samples 3",
        f"{DEMO} 3",
        f"{SELECT} --candidates T=0.5 T=1 --problems 6 --samples 4 --actions 1",
        f"{SELECT} --candidates grid --problems 6 --samples 8 --actions 2 --max-rollouts 6000",
    ],
)
def test_the_plan_counts_what_is_sampled(
    line: str, tmp_path: Path, asked: list[int], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = (json.dumps({"problem": f"Which digit is {n}?", "answer": f"[{n % 10}-9]"}) + "\n" for n in range(60))
    Path("digits.jsonl").write_text("".join(rows))
    words = [*line.split(), "--out", "run"]
    plan = plan_of(words, capsys)
    assert not asked
    assert cli.main(words) == 0, capsys.readouterr().err
    assert sum(asked) == plan["rollouts"]


@pytest.mark.parametrize(
    ("line", "sizes"),
    [
        (SEQUENCE, SIZES),
        (f"{TOKEN} 1", f"{SIZES} --budgets 1 2"),
        (f"{TOKEN} 1 --objective pass@1", f"{SIZES} --budgets 1 2"),  # sampled once for all budgets
    ],
)
def test_the_plan_of_an_evaluation_knows_the_adapters_that_are_there(
    line: str, sizes: str, tmp_path: Path, asked: list[int], capsys: Capture
) -> None:
    adapter = str(tmp_path / "trained" / "adapter")
    words = f"evaluate --model fake --task gcd {sizes} --out {tmp_path / 'judged'} --adapter {adapter}".split()
    before = plan_of(words, capsys)
    assert [adapter in note for note in before["notes"]] == [True]
    assert cli.main([*line.split(), "--out", str(tmp_path / "trained")]) == 0
    asked.clear()
    plan = plan_of(words, capsys)
    assert plan["notes"] == []
    assert cli.main(words) == 0, capsys.readouterr().err
    assert sum(asked) == plan["rollouts"]


@pytest.mark.parametrize("baselines", ["turn", "edt", "dynamic", "turn edt dynamic"])
def test_the_plan_of_an_evaluation_knows_its_baselines(
    baselines: str, tmp_path: Path, asked: list[int], capsys: Capture
) -> None:
    words = f"evaluate --model fake --task gcd {SIZES} --strategies T=0.35 --baselines {baselines} --out".split()
    plan = plan_of([*words, str(tmp_path)], capsys)
    assert cli.main([*words, str(tmp_path)]) == 0, capsys.readouterr().err
    assert sum(asked) == plan["rollouts"]  # no temperature of TURN's is 0.35


def test_a_temperature_of_turns_that_is_measured_anyway_is_planned_again(
    tmp_path: Path, asked: list[int], capsys: Capture
) -> None:
    strategies = " ".join(f"T={n / 10:g}" for n in range(1, 16))
    words = f"evaluate --model fake --task gcd {SIZES} --strategies {strategies} --baselines turn --out".split()
    plan = plan_of([*words, str(tmp_path)], capsys)
    assert cli.main([*words, str(tmp_path)]) == 0, capsys.readouterr().err
    assert 0.85 * plan["rollouts"] < sum(asked) < plan["rollouts"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("fake", "trained for own/model (hidden size 4), not for fake (hidden size 16): give --model own/model"),
        ("folder", "trained for own/model (hidden size 4), not for folder (hidden size 64)"),
        ("someone/else", None),
        ("own/model", ""),
    ],
)
def test_the_plan_of_an_evaluation_knows_whose_adapters_they_are(
    model: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """As far as that is known without loading a model: refused, noted, or nothing to say."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    Path("folder/tokenizer.json").write_text("{}")
    save_file({"norm": torch.ones(8)}, "folder/model.safetensors")
    adapter = SequenceAdapter(SequenceConfig(hidden_size=4, width=4, budgets=(1, 2)), TABLE_13, 0)
    save_adapter("mine", adapter, BaseModel("own/model", None, 4, "5f0c1e"), {"task": "demo"}, {})
    words = ["evaluate", "--adapter", "mine", "--model", model, "--dry-run"]
    assert cli.main([*words, "--json"]) == (2 if said else 0)
    captured = capsys.readouterr()
    if said:
        assert said in captured.err
        assert len(captured.err.strip().splitlines()) == 1
    else:
        noted = "adapter mine was trained for own/model: that someone/else is the same is checked when it is loaded"
        assert json.loads(captured.out)["notes"] == ([noted] if said is None else [])


def test_tokens_memory_and_hours_follow(capsys: Capture) -> None:
    plan = plan_of(f"{TOKEN} 5".split(), capsys)
    (level,) = plan["levels"]
    hidden, actions, most = FakeEngine().info.hidden_size, 4, 12
    assert level["max_tokens"] == most
    assert level["recorded_bytes_at_most"] == 3 * 4 * most * (2 * hidden + 8 * actions + 56)
    rollouts = {row["phase"]: row["rollouts"] for row in level["phases"]}
    looks = 1 + 2 + 1  # before, after batches 2 and 4, and after the last
    assert rollouts == {
        "pass rates of training prompts": 0,
        "training": 5 * 3 * 4,
        "validation": looks * 8 * (1 + 2),
    }
    assert plan["tokens_at_most"] == plan["rollouts"] * most
    assert plan["hours_at_most"]["1000"] == pytest.approx(plan["tokens_at_most"] / 3.6e6, abs=1e-3)


def test_online_training_is_bounded(tmp_path: Path, asked: list[int], capsys: Capture) -> None:
    words = [*SEQUENCE.split(), "--bandit.estimator", "online", "--bandit.epochs", "3", "--out", str(tmp_path)]
    plan = plan_of(words, capsys)
    assert cli.main(words) == 0
    assert plan["rollouts"] / 4 < sum(asked) <= plan["rollouts"]


def test_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run opens nothing")

    monkeypatch.setattr("rheostat.verbs.run.open_engine", refuse)
    monkeypatch.setattr("rheostat.verbs.run.RolloutStore", refuse)
    monkeypatch.chdir(tmp_path)
    for words in ("demo", "train sequence", "train token", "evaluate", "evaluate --policy T=1", "select"):
        one = ["--task", "gcd"] if "policy" in words else []
        assert cli.main([*words.split(), *one, "--model", "someone/something", "--dry-run"]) == 0, (
            capsys.readouterr().err
        )
        assert "in all at most" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_hub_is_not_read_and_files_are(tmp_path: Path, capsys: Capture) -> None:
    for task, most in (("math", 1024), ("math+codecontests", 2048), ("gcd+math", 1024)):
        plan = plan_of(["train", "sequence", "--task", task], capsys)
        assert plan["levels"][0]["max_tokens"] == most
        assert any("the Hub was not read" in note for note in plan["levels"][0]["notes"])
    hub = ["--task", "mine", "--data", "owner/name", "--verifier", "exact"]
    assert plan_of(["train", "sequence", *hub], capsys)["levels"][0]["max_tokens"] == 256

    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n} + 1", "answer": str(n + 1)}) + "\n" for n in range(40)))
    own = ["evaluate", "--task", str(file), "--verifier", "exact", "--problems.validation", "2"]
    plan = plan_of([*own, "--problems.test", "3"], capsys)
    assert not any("Hub was not read" in note for note in plan["levels"][0]["notes"])
    assert cli.main([*own, "--problems.test", "400", "--dry-run"]) == 2
    assert "test split holds" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--task chess", "--data nowhere.jsonl --task math", "--samples.test 3"])
def test_what_a_run_would_refuse_its_plan_refuses(words: str, capsys: Capture) -> None:
    assert cli.main(["train", "sequence", *words.split(), "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1


def test_of_several_config_files_later_ones_win_and_options_over_all(tmp_path: Path, capsys: Capture) -> None:
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text('model = "fake"\nseed = 3\n[problems]\nvalidation = 6\ntest = 12\n[bandit]\nepochs = 2\n')
    second.write_text("seed = 4\n[problems]\ntrain = 18\ntest = 24\n")
    words = ["--config", str(first), f"--config={second}", "--bandit.epochs", "7"]
    arguments = cli.parse("train sequence", words)
    assert isinstance(arguments, TrainSequence)
    assert (arguments.model, arguments.seed, arguments.bandit.epochs) == ("fake", 4, 7)
    assert (arguments.problems.train, arguments.problems.validation, arguments.problems.test) == (18, 6, 24)
    assert cli.main(["train", "sequence", *words, "--config"]) == 2
    assert "--config: name a file" in capsys.readouterr().err


def test_merged_leaves_its_arguments_alone() -> None:
    first: dict[str, Any] = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    second: dict[str, Any] = {"a": {"y": {"w": 4}}, "b": {"c": 5}}
    assert merged(first, second) == {"a": {"x": 1, "y": {"z": 2, "w": 4}}, "b": {"c": 5}}
    assert first == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    assert second == {"a": {"y": {"w": 4}}, "b": {"c": 5}}


def test_memory_of_a_model_that_is_here(tmp_path: Path, capsys: Capture) -> None:
    """Keys and values as transformers' own cache holds them, weights as they lie on disk."""
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    cache = model(torch.tensor([[1, 2, 3, 4, 5]]), use_cache=True).past_key_values
    kept = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    line = f"train sequence --model {tmp_path} --task gcd --problems.train 5 {SIZES} --max-tokens 5"
    (level,) = plan_of(line.split(), capsys)["levels"]
    assert level["answer_bytes_at_most"] == kept
    assert level["weights_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert level["recorded_bytes_at_most"] is None
    assert cli.main([*line.split(), "--dry-run"]) == 0
    assert "  memory      weights 0.0 MB, an answer's keys and values 0.0 MB (at most)" in capsys.readouterr().out


def test_memory_of_a_model_that_is_not_here(capsys: Capture) -> None:
    line = f"train sequence --model qwen2.5-coder-1.5b --task gcd --problems.train 5 {SIZES}"
    (level,) = plan_of(line.split(), capsys)["levels"]
    assert level["weights_bytes"] > 3e9
    assert level["answer_bytes_at_most"] is None
    assert any("qwen2.5-coder-1.5b" in note and "models pull" in note for note in level["notes"])
