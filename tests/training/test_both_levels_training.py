"""Training a token-level adapter that starts from a sequence-level one: what it reaches, and what it never touches."""

import json
from pathlib import Path

import pytest
import torch

from rheostat import cli
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.adapters.token import TokenAdapter, TokenConfig
from rheostat.decoding.strategy import ActionSpace, Strategy
from rheostat.engines.fake import EOS, FakeEngine
from rheostat.errors import StoreError
from rheostat.tasks.base import Split
from rheostat.training.token import TokenHistory, TokenTraining, train_token
from rheostat.training.token_config import Objective, TokenTrainingConfig
from rheostat.types import Completion, Problem, Prompt, Verdict

SPACE = ActionSpace((Strategy(0), Strategy(2.0)))


class GreedyThenHot:
    """Right: the likelier token first, the less likely one after it. No action is right for both."""

    name, max_tokens = "greedy-then-hot", 2

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        return [Problem(f"{split}-{i}", self.name, self.name, f"{i}:", "") for i in range(start, start + count)]

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        return Prompt(problem.id, problem.question)

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        return Verdict(completion.text == "ab")


def engine() -> FakeEngine:
    def features(_: str, tokens: tuple[int, ...]) -> list[float]:
        return [float(len(tokens)), 1.0]

    return FakeEngine(("a", "b", EOS), lambda *_: [1.0, 0.0, -1e4], features, hidden_size=2)


def sequence_of(hot: float) -> SequenceAdapter:
    """Chooses the hot action with one probability, whatever the prompt."""
    adapter = SequenceAdapter(SequenceConfig(2, with_budget=False, width=4, budgets=(1,)), SPACE)
    with torch.no_grad():
        adapter.output.bias.copy_(torch.tensor([1 - hot, hot]).log())
    return adapter


def trained(folder: Path, adapter: TokenAdapter, steps: int) -> TokenHistory:
    folder.mkdir(exist_ok=True)
    config = TokenTrainingConfig(
        objective=Objective.PASS_1, steps=steps, prompts=8, group=8, filter_samples=0, mask_above=1, width=16,
        validate_every=2, validation_samples=40, learning_rate=1e-2, dropout=0,
    )  # fmt: skip
    task = GreedyThenHot()
    problems = [task.problems(split, 12) for split in (Split.TRAIN, Split.VALIDATION)]
    return train_token(adapter, TokenTraining(engine(), task, problems[0], problems[1], config, folder, 0))


def both_levels(hot: float) -> TokenAdapter:
    return TokenAdapter.starting_from(sequence_of(hot), TokenConfig(2, width=16, dropout=0.0))


def test_it_begins_where_the_sequence_level_ends_and_goes_on(tmp_path: Path) -> None:
    adapter = both_levels(hot=0.7)
    assert adapter.start is not None
    before = {name: tensor.clone() for name, tensor in adapter.start.state_dict().items()}
    history = trained(tmp_path, adapter, steps=25)
    b = float(torch.tensor([0.5, 0.0]).softmax(0)[1])  # of the hot action
    start = (0.3 + 0.7 * (1 - b)) * 0.7 * b
    assert history.lines[0]["validation"]["reward"] == pytest.approx(start, abs=0.06)  # 480 samples
    assert history.validation_reward > 0.8 * b > start + 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.start.state_dict().items())


def test_a_checkpoint_is_continued_with_the_same_start_only(tmp_path: Path) -> None:
    whole, parts = both_levels(hot=0.7), both_levels(hot=0.7)
    trained(tmp_path / "whole", whole, steps=4)
    trained(tmp_path / "parts", parts, steps=2)
    with pytest.raises(StoreError, match="belongs to a run with other settings"):
        trained(tmp_path / "parts", both_levels(hot=0.6), steps=4)
    again = both_levels(hot=0.7)
    trained(tmp_path / "parts", again, steps=4)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


SMALL = [
    *("--problems.train", "12", "--problems.validation", "12", "--problems.test", "12"),
    *("--samples.train", "2", "--samples.validation", "2", "--samples.test", "4", "--bandit.epochs", "2"),
]
TOKEN = [
    *("--budgets", "1", "2", "--steps", "2", "--prompts", "3", "--group", "4", "--filter-samples", "0"),
    *("--validation-samples", "1", "--width", "16", "--samples", "4", "--task", "demo"),
    *("--problems.train", "12", "--problems.validation", "12", "--problems.test", "12"),
]


def test_the_commands_train_and_judge_both_levels_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequence, both = str(tmp_path / "sequence" / "adapter"), str(tmp_path / "both" / "adapter")
    words = ["train", "sequence", "--model", "fake", *SMALL, "--bandit.budgets", "1", "2", "--strategies", "table14"]
    assert cli.main([*words, "--out", str(tmp_path / "sequence")]) == 0
    words = ["train", "token", "--model", "fake", *TOKEN, "--start", sequence, "--out", str(tmp_path / "both")]
    assert cli.main([*words, "--strategies", "table13"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--start {sequence}: both levels need the same actions: give --strategies " in said
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "adapter of both levels"
    assert json.loads(Path(both, "adapter.json").read_text())["features"]["start"]["budgets"] == [1, 2]
    words = ["generate", "12", "--model", "fake", "--adapter", both, "--budget", "2", "--trace", "--json"]
    assert cli.main([*words, "--trace-out", str(tmp_path / "trace.html")]) == 0
    assert len(json.loads(capsys.readouterr().out)["traces"]) == 2
    assert cli.main(["train", "token", "--model", "fake", *TOKEN, "--start", both, "--out", str(tmp_path / "x")]) == 2
    assert "a sequence-level adapter is needed" in capsys.readouterr().err
