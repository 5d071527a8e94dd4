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
from rheostat.rollouts.store import RolloutStore

SMALL = [
    *("--problems.train", "12", "--problems.validation", "12", "--problems.test", "12"),
    *("--samples.train", "8", "--samples.validation", "8", "--samples.test", "16", "--bandit.epochs", "3"),
]


def run(*words: str | Path) -> int:
    return cli.main([str(word) for word in words])


def fake_demo(out: Path, *more: str) -> list[str]:
    return ["demo", "--model", "fake", "--out", str(out), *SMALL, *more]


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name != "wall_seconds"}


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
    assert isinstance(arguments, cli.Demo)
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
    assert {row["k"] for row in printed["rows"]} == {1, 2, 4, 8, "mean"}

    assert run("generate", "12", "--model", "fake", "--adapter", out / "adapter", "--budget", "4", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["completions"]) == 4
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)

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
    assert found[0]["rows"] != found[2]["rows"]


def test_training_online_runs_and_is_reproducible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "sequence", "--model", "fake", *SMALL, "--bandit.estimator", "online", "--json"]
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
    process = subprocess.Popen(command(tmp_path), stderr=subprocess.PIPE, text=True)
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


@pytest.mark.model
def test_a_small_demo_on_the_real_model(smollm2_path: Path, tmp_path: Path) -> None:
    words = ["demo", "--model", str(smollm2_path), "--out", str(tmp_path), *SMALL]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "rheostat.cli", *words], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    mixed = next(row["estimate"] for row in results["rows"] if row["policy"] == "MIXED" and row["k"] == 8)
    assert 0.1 < mixed < 0.95  # neither hopeless nor perfect
    assert results["counts"]["without_verdict"] == 0


@pytest.mark.model
def test_bench_engine_prints_what_benchmarks_promise(
    smollm2_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rheostat.bench import engine

    monkeypatch.setattr(engine, "_ROWS", 2)
    monkeypatch.setattr(engine, "_TOKENS", 12)
    monkeypatch.setattr(engine, "_PREFIX_TOKENS", 12)
    assert run("bench", "engine", "--model", smollm2_path, "--repeats", "1", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert {"bench", "machine", "versions", "rows", "ratios"} <= set(result)
    assert set(result["ratios"]) == {"uniform 2: local/generate", "shared prefix 8x8: local/generate"}
    assert all({"case", "value", "unit", "low", "high"} == set(row) for row in result["rows"])
    assert all(row["low"] <= row["value"] <= row["high"] for row in result["rows"])
