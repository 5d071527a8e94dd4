"""The command line: help, one-line errors, exit codes, and whole runs with the fake engine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rheostat import cli
from rheostat.arguments import Demo
from rheostat.decoding.spaces import TABLE_13, TABLE_14
from rheostat.reports import grids
from rheostat.reports.reading import MISSING
from rheostat.rollouts.store import RolloutStore

SMALL = [
    *("--problems.train", "12", "--problems.validation", "12", "--problems.test", "12"),
    *("--samples.train", "8", "--samples.validation", "8", "--samples.test", "16"),
]
EPOCHS = ["--bandit.epochs", "3"]

TRAINING = [
    *("--budgets", "1", "2", "--steps", "3", "--prompts", "3", "--group", "4", "--filter-samples", "0"),
    *("--validation-samples", "1", "--width", "16"),
]
SPLITS = ["--problems.train", "8", "--problems.validation", "8", "--problems.test", "8"]
TOKEN = [*TRAINING, *SPLITS, "--samples", "4"]
CLOCKS = ("wall_seconds", "tokens_per_second", "milliseconds_per_token", "seconds", "in_this_run")
DEMO = [word.replace("--", "--token.") for word in TOKEN]


def run(*words: str | Path) -> int:
    return cli.main([str(word) for word in words])


def fake_demo(out: Path, *more: str) -> list[str]:
    return ["demo", "--model", "fake", "--out", str(out), *SMALL, *EPOCHS, *DEMO, *more]


def train_token(out: Path, *more: str) -> list[str]:
    return ["train", "token", "--model", "fake", "--out", str(out), *TOKEN, *more]


def without_times(results: Any) -> Any:
    """Results of any depth without what a clock says."""
    if isinstance(results, dict):
        return {name: without_times(value) for name, value in results.items() if name not in CLOCKS}
    return [without_times(value) for value in results] if isinstance(results, list) else results


def test_help_lists_every_verb_and_every_field_has_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for name, (verb, _) in cli.VERBS.items():
        assert name in text
        for field, info in verb.model_fields.items():
            assert info.description or hasattr(info.annotation, "model_fields"), f"{name}: {field} says nothing"
        assert run(*name.split(), "--help") == 0
        assert "usage: rheostat" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fly"], "unknown verb 'fly'"),
        (["train"], "rheostat train sequence"),
        (["demo", "--sede", "1"], "Unrecognized options: --sede"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["demo", "--task", "chess"], "unknown task 'chess'"),
        (["demo", "--strategies", "T=-1", "greedy"], "temperature must be 0"),
        (["demo", "--strategies", "p=1.5", "greedy"], "top_p must lie in (0, 1]"),
        (["demo", "--strategies", "heat=2", "greedy"], "unknown part 'heat=2'"),
        (["demo", "--strategies", "greedy"], "at least two"),
        (["demo", "--bandit.budgets", "0"], "bandit.budgets"),
        (["demo", "--samples.test", "8"], "samples.test must be at least twice"),
        (["demo", "--model", "fake", "--problems.test", "7"], "multiples of its 6 members"),
        (["demo", "--model", "fake", "--problems.test", "60000"], "holds only"),
        (["demo", "--config", "absent.toml"], "absent.toml"),
        (["generate", "hello", "--model", "fake", "--budget", "0"], "budget must be"),
        (["generate", "hello", "--model", "fake", "--max-tokens", "-3"], "max_tokens must be at least 1"),
        (["generate", "x" * 5000, "--model", "fake"], "context"),
        (["generate", "hello", "--model", "fake", "--adapter", "nowhere/at/all"], "nowhere/at/all"),
        (["evaluate", "--model", "fake", "--adapter", "."], "adapter"),
        (
            ["evaluate", "--model", "fake", "--problems.validation", "0"],
            "--problems.validation: BEST and the baselines are chosen on validation problems: at least 2 are needed",
        ),
        (["demo", "--model", "fake", "--token.problems.test", "7"], "multiples of its 4 members"),
        (["demo", "--token.task", "chess"], "unknown task 'chess'"),
        (["demo", "--token.group", "8"], "token: group must exceed the largest parallel budget, 8"),
        (["train", "token", "--objective", "best"], "'--objective'. Expected one of ('pass@1', 'pass@k')"),
        (
            ["train", "token", "--features", "eyes"],
            "'--features'. Expected one of ('hidden', 'entropy', 'hidden+entropy')",
        ),
        (["train", "token", "--group", "2"], "group must exceed the largest parallel budget, 8"),
        (["train", "token", "--strategies", "greedy"], "at least two"),
        (["train", "token", "--samples", "3"], "samples must be at least twice the largest budget, 16"),
        (["train", "token", "--budgets", "2", "1"], "--budgets: parallel budgets must be whole numbers"),
        (["train", "token", "--mask-above", "2"], "--mask-above: should be less than or equal to 1"),
        (
            ["train", "token", "--tracking", "mlflow"],
            "'--tracking'. Expected one of ('tensorboard', 'trackio', 'wandb')",
        ),
        (["generate", "hello", "--model", "fake", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["generate", "hello", "--model", "fake", "--trace"], "need --adapter with a token-level adapter"),
        (
            ["generate", "hello", "--model", "fake", "--commit", "--strategy", "T=1"],
            "need --adapter with a token-level",
        ),
        (["evaluate", "--adapter", "a", "--adapter", "b"], "--adapter is given twice"),
        (["serve", "--model", "fake", "--adapter=a", "--adapter", "b"], "--adapter is given twice"),
        (["models", "pull"], "name a model"),
        (["push", "absent", "me/mine"], "absent"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err
    assert not list(tmp_path.rglob("*.parquet"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from rheostat.errors import ConfigError

    with pytest.raises(ConfigError):
        run("demo", "--task", "chess", "--out", tmp_path, "--debug")


def test_a_config_file_sets_fields_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "fake"\nseed = 3\n[bandit]\nepochs = 2\n')
    arguments = cli.parse("demo", ["--config", str(file), "--seed", "5"])
    assert isinstance(arguments, Demo)
    assert (arguments.model, arguments.seed, arguments.bandit.epochs) == ("fake", 5, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeed = 3\n", "seeed"),
        ("[bandit]\nepoks = 2\n", "bandit.epoks"),
        ("seed = \n", "line 1"),
        ("seed = 'x'", "seed"),
    ],
)
def test_a_bad_config_file_is_named_with_the_key(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert run("demo", "--config", file) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "run.toml" in message


def test_the_demo_writes_results_report_and_adapters_and_they_are_usable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(*fake_demo(out), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "results.json").read_text())
    assert "<html" in (out / "report.html").read_text()
    policies = {row["policy"] for row in printed["rows"]}
    assert {"adapter with budget", "adapter without budget", "BEST", "MIXED", "greedy"} <= policies
    assert {row["k"] for row in printed["rows"]} == {1, 2, 4, 8, "mean", "area"}
    token = printed["token"]
    assert (printed["kind"], token["kind"]) == ("sequence", "token")
    assert {row["policy"] for row in token["rows"]} >= {"adapter with budget", "BEST", "MIXED", "greedy"}
    assert {row["k"] for row in token["rows"]} == {1, 2, "mean", "area"}
    assert [line["step"] for line in token["training"]["adapter with budget"]["history"]] == [0, 1, 2, 3]
    assert (token["config"]["seed"], token["config"]["model"]) == (0, "fake")
    assert token["wall_seconds"]["training"] > 0

    assert run("generate", "12", "--model", "fake", "--adapter", out / "adapter", "--budget", "4", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["completions"]) == 4
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)

    assert set(printed["milliseconds_per_token"]) >= {"strategies on train", "strategies on test"}
    assert min(printed["milliseconds_per_token"].values()) > 0
    judged = tmp_path / "judged"
    assert run("evaluate", "--model", "fake", "--adapter", out / "adapter", "--out", judged, *SMALL, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    name = str(out / "adapter")
    ours = [row["estimate"] for row in again["rows"] if row["policy"] == name]
    assert ours == [row["estimate"] for row in printed["rows"] if row["policy"] == "adapter with budget"]


def test_the_same_seed_gives_the_same_results_and_another_seed_others(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(*fake_demo(tmp_path / name, "--seed", seed)) == 0
        found.append(without_times(json.loads((tmp_path / name / "results.json").read_text())))
    assert found[0] == found[1]
    assert found[0]["costs"] != found[2]["costs"]


def test_training_online_runs_and_is_reproducible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "sequence", "--model", "fake", *SMALL, *EPOCHS, "--bandit.estimator", "online", "--json"]
    summaries = []
    for name in ("a", "b"):
        assert run(*words, "--out", tmp_path / name) == 0
        summaries.append(json.loads(capsys.readouterr().out)["training"])
    assert summaries[0] == summaries[1]
    assert summaries[0]["estimator"] == "online"
    assert run(*words, "--out", tmp_path / "c", "--no-with-budget") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "adapter without budget"


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "rheostat.cli", *fake_demo(out)]


def test_killed_at_any_moment_and_started_again_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    subprocess.run(command(undisturbed), check=True, capture_output=True)
    for shards in (1, 4, 9, 14):  # kill once so many batches are stored
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(killed.glob("rollouts/*.parquet"))) < shards:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(killed), check=True, capture_output=True)
    results = [json.loads((out / "results.json").read_text()) for out in (undisturbed, killed)]
    assert without_times(results[0]) == without_times(results[1])
    with RolloutStore(killed / "rollouts") as store, RolloutStore(undisturbed / "rollouts") as other:
        distinct = "SELECT count(*), count(DISTINCT key) FROM rollouts"
        assert store.query(distinct).fetchall() == other.query(distinct).fetchall()
        rows, keys = store.query(distinct).fetchall()[0]
        assert rows == keys > 0


def test_ctrl_c_exits_1_and_keeps_what_is_stored(tmp_path: Path) -> None:
    lasts_long = ["--bandit.epochs", "5000"]
    process = subprocess.Popen(
        [*command(tmp_path), *lasts_long],
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts background jobs with SIGINT ignored, and Python leaves it so
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(tmp_path.glob("rollouts/*.parquet")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted" in said
    assert "Traceback" not in said
    with RolloutStore(tmp_path / "rollouts") as store:
        assert len(store) > 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(*fake_demo(tmp_path / "file" / "run")) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RolloutStore(tmp_path / "rollouts"):
        assert run(*fake_demo(tmp_path)) == 2
    assert "another" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each level, and a token-level one that does not see B."""
    out = tmp_path_factory.mktemp("trained")
    assert run(*train_token(out / "token")) == 0
    assert run(*train_token(out / "blind", "--objective", "pass@1", "--no-with-budget")) == 0
    assert run("train", "sequence", "--model", "fake", "--out", out / "sequence", *SMALL, *EPOCHS) == 0
    return out


def test_a_token_adapter_is_trained_and_says_how(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*train_token(trained / "token"), "--json") == 0  # everything is there already
    summary = json.loads(capsys.readouterr().out)
    assert summary["adapter"] == str(trained / "token" / "adapter")
    assert summary["kind"] == "adapter with budget"
    assert 0 <= summary["validation_reward_of_the_uniform_policy"] <= summary["validation_reward"] <= 1
    lines = [json.loads(line) for line in (trained / "token" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    description = json.loads((trained / "token" / "adapter" / "adapter.json").read_text())
    assert description["training"]["rollouts"] == sum(line.get("rollouts", 0) for line in lines) == 3 * 3 * 4
    assert description["training"]["task"] == "steps"


def test_another_runs_checkpoint_and_a_filter_that_leaves_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(*train_token(trained / "token", "--seed", "1")) == 2
    said = capsys.readouterr().err.strip()
    assert "belongs to a run with other settings" in said
    assert len(said.splitlines()) == 1
    assert run(*train_token(tmp_path, "--filter-low", "0.9", "--filter-high", "0.1")) == 2
    assert "filter_low must lie below filter_high, got 0.9 and 0.1" in capsys.readouterr().err
    assert run(*train_token(tmp_path, "--filter-samples", "1", "--filter-low", "0.5")) == 2
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert "none of 8 prompts has an initial pass rate between 0.5 and 1" in said
    assert not (tmp_path / "adapter").exists()


def test_training_killed_after_a_checkpoint_ends_as_if_undisturbed(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    words = ["--steps", "5", "--prompts", "6", "--group", "12", "--objective", "pass@1"]
    assert run(*train_token(undisturbed, *words)) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "rheostat.cli", *train_token(killed, *words)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (killed / "checkpoint.pt").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "adapter").exists(), "killed too late to show anything"
    assert run(*train_token(killed, *words)) == 0
    for name in ("adapter.safetensors", "adapter.json"):
        assert (killed / "adapter" / name).read_bytes() == (undisturbed / "adapter" / name).read_bytes()
    histories = [
        [without_times(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (undisturbed, killed)
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 6


def test_token_adapters_are_evaluated_alone_and_together(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(trained / kind / "adapter") for kind in ("token", "blind")]
    words = ["evaluate", "--model", "fake", "--out", tmp_path, *SPLITS, "--samples.test", "16", "--json", "--adapter"]
    found = []
    for chosen in (names[:1], names):
        capsys.readouterr()
        assert run(*words, *chosen) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert json.loads((tmp_path / "results.json").read_text()) == found[1]
    assert "<html" in (tmp_path / "report.html").read_text()
    alone, both = (results["rows"] for results in found)
    assert found[0]["kind"] == "token"
    assert found[0]["task"] == "steps"  # the one that the adapter was trained on
    assert {row["k"] for row in alone} == {1, 2, "mean", "area"}
    assert {row["policy"] for row in both} == {row["policy"] for row in alone} | {names[1]}
    assert alone == [row for row in both if row["policy"] != names[1]]
    most = 32  # the token budget of "steps"
    assert set(found[1]["lengths"]) == {*names, "greedy", "T=0.5", "T=1", "T=1.25"}
    assert all(len(counts) == most + 1 for counts in found[1]["lengths"].values())
    # 8 problems × 16 samples, under each B that the policy sees: one sweep serves the blind one at every k
    assert [sum(found[1]["lengths"][name]) for name in names] == [2 * 128, 128]


def test_adapters_of_two_levels_are_judged_together(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(trained / kind / "adapter") for kind in ("sequence", "token")]
    capsys.readouterr()
    words = ["evaluate", "--model", "fake", "--task", "gcd", "--out", tmp_path, *SPLITS, "--json"]
    words += ["--budgets", "1", "3", "--adapter", *names]
    assert run(*words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert run(*words, "--strategies", "T=0.9", "--baselines", "turn") == 0
    results = json.loads(capsys.readouterr().out)
    of_the_paper = {"MIXED": TABLE_13, "MIXED per token": TABLE_14}  # each level's own actions
    assert results["mixed"] == {name: [str(strategy) for strategy in space] for name, space in of_the_paper.items()}
    for name in of_the_paper:
        rows = [[row for row in found["rows"] if row["policy"] == name] for found in (plain, results)]
        assert rows[0] == rows[1]
        assert {row["k"] for row in rows[0]} == {1, 3, "mean", "area"}
    assert results["budgets"] == [1, 3]  # budgets that neither was trained for
    assert {row["policy"] for row in results["rows"]} >= {*names, "oracle", "T=0.9", "T=1.25"}
    assert (names[1], names[0]) in {(d["policy"], d["baseline"]) for d in results["differences"]}
    assert {cost["policy"] for cost in results["costs"]} >= {*names, "BEST", "MIXED"}
    # whatever was sampled in which run, its time is known, that of strategies to all who apply them
    timed = {row[0].text for row in grids.costs(results).milliseconds.rows}
    assert timed >= {*names, "BEST", "MIXED", "MIXED per token", "TURN"}
    assert all(cell.text != MISSING for row in grids.costs(results).milliseconds.rows for cell in row)
    own = f"{names[1]}, B = 1"
    assert (plain["sampled"][own]["in_this_run"], results["sampled"][own]["in_this_run"]) == (8 * 16, 0)
    assert results["sampled"][own]["seconds"] == plain["sampled"][own]["seconds"] > 0
    assert results["milliseconds_per_token"][own] == plain["milliseconds_per_token"][own]
    assert sum(item["tokens"] for item in results["sampled"].values()) == results["counts"]["tokens"]
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_evaluation_needs_samples_for_the_largest_budget(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "--model", "fake", "--adapter", trained / "blind" / "adapter"]
    capsys.readouterr()
    assert run(*words, "--samples.test", "15") == 2
    assert "samples.test must be at least twice the largest budget, 16" in capsys.readouterr().err


def test_generate_under_a_token_adapter_and_its_trace(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "f.html"
    words = ["generate", "12", "--model", "fake", "--adapter", trained / "token" / "adapter", "--budget", "2"]
    words += ["--max-tokens", "5"]
    capsys.readouterr()
    assert run(*words, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["strategy"] is None
    assert len(plain["completions"]) == 2
    assert run(*words, "--json", "--trace", "--trace-out", page) == 0
    traced = json.loads(capsys.readouterr().out)
    assert traced["completions"] == plain["completions"]
    assert [trace["text"] for trace in traced["traces"]] == [done["text"] for done in plain["completions"]]
    assert "<html" in page.read_text()
    assert run(*words) == 0
    assert capsys.readouterr().out.splitlines() == [done["text"] for done in plain["completions"]]
    assert run(*words, "--commit", "--json") == 0
    assert json.loads(capsys.readouterr().out) != plain


def test_a_trace_needs_a_token_adapter(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    page = tmp_path / "f.html"
    words = ["generate", "12", "--model", "fake", "--adapter", trained / "sequence" / "adapter"]
    assert run(*words, "--trace", "--trace-out", page) == 2
    said = capsys.readouterr().err.strip()
    assert "need --adapter with a token-level adapter" in said
    assert len(said.splitlines()) == 1
    assert not page.exists()


@pytest.mark.model
@pytest.mark.timeout(900)
def test_a_small_demo_on_the_real_model(smollm2_path: Path, tmp_path: Path) -> None:
    words = ["demo", "--model", str(smollm2_path), "--out", str(tmp_path), *SMALL, *EPOCHS, *DEMO]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "rheostat.cli", *words], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    mixed = next(row["estimate"] for row in results["rows"] if row["policy"] == "MIXED" and row["k"] == 8)
    assert 0.1 < mixed < 0.95  # neither hopeless nor perfect
    assert results["counts"]["without_verdict"] == 0
