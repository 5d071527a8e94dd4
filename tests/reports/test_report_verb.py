"""`rheostat report`: what it writes, what it refuses, and what it says of an interrupted run."""

import json
import re
import shutil
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from test_page import Page, fake_results
from test_selection_page import fake_selection
from test_token_page import fake_demo, fake_history, fake_mixed, fake_token

from rheostat import cli
from rheostat.adapters.autodeco import AutoDeco, AutoDecoConfig
from rheostat.adapters.files import BaseModel, load_adapter, save_adapter
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.decoding.spaces import strategies_named
from rheostat.decoding.strategy import ActionSpace, Order
from rheostat.reports.figures.svg import Drawing, strategy_colours
from rheostat.reports.folders import read_run
from rheostat.reports.page import render
from rheostat.rollouts.store import Rollout, RolloutStore
from rheostat.types import FinishReason

Capture = pytest.CaptureFixture[str]


def report(*words: str | Path) -> int:
    return cli.main(["report", *map(str, words)])


def refusal(capsys: Capture, *words: str | Path) -> str:
    """The one line that a refused report ends with."""
    assert report(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def page_in(folder: Path) -> tuple[str, Page]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def run_of(folder: Path, results: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def seeded(seed: int, estimate: float = 0.02, **more: Any) -> dict[str, Any]:
    """A run that differs from others in its seed, and in what came of it."""
    split = {"test": {"n": 600, "hash": "0a1b2c3d4e5f"}, "validation": {"n": 90, "hash": "1111"}}
    own = fake_results(estimate, estimate - 0.01, estimate + 0.01)
    config = own["config"] | {"seed": seed}
    return own | {"seeds": {"run": seed}, "config": config, "splits": split} | more


def stored(folder: Path, verdicts: list[tuple[str, bool | None]]) -> None:
    """A store with one rollout for each pair of a strategy and a verdict."""
    with RolloutStore(folder / "rollouts") as store:
        rollouts = [
            Rollout(
                key=str(number),
                problem_id=f"p{number // 2}",
                task="steps",
                member="gcd",
                strategy=strategy,
                order="vllm",
                sample=0,
                seed=3,
                max_tokens=8,
                text="x",
                tokens=number,
                finish_reason=FinishReason.LENGTH if number == 8 else FinishReason.STOP,
                correct=correct,
                detail="",
                answer=None,
                batch="b",
            )
            for number, (strategy, correct) in enumerate(verdicts)
        ]
        store.append(rollouts, {"engine": json.dumps({"model": "smollm2", "fingerprint": "5f0c1e"})})


def saved_adapter(folder: Path) -> None:
    space = ActionSpace(strategies_named(("table13",)), Order.VLLM)
    config = SequenceConfig(hidden_size=4, width=4, budgets=(1, 2))
    base = BaseModel("smollm2", None, 4, "5f0c1e")
    save_adapter(folder, SequenceAdapter(config, space, 0), base, {"task": "demo"}, {})


def test_a_page_and_its_figures_as_files(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", fake_demo())
    assert report(run) == 0
    text, page = page_in(run / "report")
    figures = sorted(path.name for path in (run / "report" / "figures").iterdir())
    names = ("curve", "forest", "within", "training-1", "training-2", "token-curve", "token-forest", "token-training-1")
    more = ("token-training-2", "token-entropy", "token-frequent-tokens", "token-lengths")
    assert figures == sorted(f"{name}{end}" for name in (*names, *more) for end in (".svg", ".png"))
    assert page.tags.count("svg") == len(figures)  # each figure for a desktop and for a phone
    for path in (run / "report" / "figures").glob("*.svg"):
        drawing = path.read_text(encoding="utf-8")
        assert "var(" not in drawing
        assert "currentColor" not in drawing
        root = ElementTree.fromstring(drawing)
        width, height = (float(root.attrib[side]) for side in ("width", "height"))
        png = path.with_suffix(".png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert struct.unpack(">II", png[16:24]) == pytest.approx((2 * width, 2 * height), abs=2)
    training, curve = (
        (run / "report" / "figures" / f"{name}.svg").read_text(encoding="utf-8") for name in ("training-1", "curve")
    )
    for name in fake_demo()["strategies"]:  # whose colour is whose; a curve names its lines itself
        assert [training.count(f">{name}</text>"), curve.count(f">{name}</text>")] == [1, 1], name
    assert "problems solved, %" in curve
    assert "#0b63a8" in curve  # the accent of a light page
    assert len(text.encode()) < 2_000_000


def test_recipes_name_figures_that_are_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines = [json.dumps(line) for line in fake_token()["training"]["adapter with budget"]["history"]]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    runs = [run_of(tmp_path / str(n), one) for n, one in enumerate((fake_demo(), fake_selection()))]
    written = {one.name for path in (*runs, tmp_path / "run") for one in render([read_run(path)]).drawings}
    named = {
        name
        for page in (Path(__file__).parents[2] / "recipes").glob("*/README.md")
        for name in re.findall(r"figures/([\w-]+)\.svg", page.read_text(encoding="utf-8"))
    }
    assert len(named) == 6
    assert named <= written


def test_what_the_colours_of_a_file_mean_is_below_the_drawing() -> None:
    svg = Markup('<svg viewBox="0 0 780 300" role="img"><path fill="var(--s0)"/>{}</svg>')
    names = ("greedy", "T<1", *(f"T=1.25,k={k},p=0.95,m=0.1" for k in range(9)))
    text = Drawing("a", svg, svg, names).file
    root = ElementTree.fromstring(text)
    words = [
        (float(one.attrib["x"]), float(one.attrib["y"]), one.text) for one in root.iter() if one.tag.endswith("text")
    ]
    assert [word for *_, word in words] == list(names)
    assert all(300 < y < float(root.attrib["height"]) and 0 < x < 780 for x, y, _ in words)
    assert len({y for _, y, _ in words}) == 3  # lines: of 5, 3 and 3 names
    squares = [one.attrib["fill"] for one in root.iter() if one.tag.endswith("rect")][1:]
    assert squares == [light for light, _ in strategy_colours(len(names))]
    named = svg.format(Markup("").join(Markup("<text>{}</text>").format(name) for name in names))
    assert Drawing("a", named, named, names).file.count("<rect") == 1  # its paper alone
    plain = Markup('<svg viewBox="0 0 780 300"><path/></svg>')
    assert Drawing("a", plain, plain, names).file.count("<rect") == 1


def test_text_is_in_the_png(tmp_path: Path) -> None:
    """A figure without its text has another picture."""
    import resvg_py

    run = run_of(tmp_path / "run", fake_results())
    assert report(run) == 0
    path = run / "report" / "figures" / "curve.svg"
    silent = re.sub(r"<text.*?</text>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    without = bytes(resvg_py.svg_to_bytes(svg_string=silent, zoom=2))
    assert len(path.with_suffix(".png").read_bytes()) > 1.1 * len(without)


def test_several_seeds_stand_side_by_side_and_are_never_pooled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gains = {0: 0.021, 1: -0.034, 2: 0.003}
    runs = [run_of(tmp_path / f"seed-{seed}", seeded(seed, gain)) for seed, gain in gains.items()]
    assert report(*runs) == 0
    text, page = page_in(tmp_path / "report")
    assert "Three runs that differ in their seed alone: 0, 1, 2" in page.words
    assert "a gain in one, no gain in one, a loss in one" in page.words
    table = text[text.index('aria-label="Each run by itself"') :]
    rows = re.findall(r"<tr>.*?</tr>", table[: table.index("</table>")], flags=re.DOTALL)[1:]
    assert len(rows) == 3
    for row, gain in zip(rows, gains.values(), strict=True):
        assert f">{100 * gain:+.1f}".replace("-", "−") in row
    assert page.tags.count("h1") == 1
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r'href="#(run[^"]+)"', text)) <= set(page.ids)
    assert (tmp_path / "report" / "figures" / "run3-curve.png").is_file()


def test_runs_that_differ_in_more_than_the_seed_say_in_what(tmp_path: Path) -> None:
    a, b = seeded(0), seeded(1)
    b["config"] = b["config"] | {"training": {"lr": 0.5, "hidden": [256, 256]}}
    assert report(run_of(tmp_path / "a", a), run_of(tmp_path / "b", b), "--out", tmp_path / "out") == 0
    _, page = page_in(tmp_path / "out")
    assert "Two runs side by side" in page.words
    assert "The runs differ in training.lr, seed" in " ".join(page.words.split())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": {"model": "other", "fingerprint": "777777"}}, ("the model", "smollm2 (5f0c1e)", "other (777777)")),
        ({"task": "math"}, ("the task", "demo", "math")),
        ({"order": "transformers"}, ("the order", "vllm", "transformers")),
        (
            {"splits": {"test": {"n": 599, "hash": "ffff"}}},
            ("the test problems", "600 (hash 0a1b2c3d)", "599 (hash ffff)"),
        ),
        (
            {"splits": seeded(0)["splits"] | {"validation": {"n": 40, "hash": "2222"}}},
            ("the validation problems", "90 (hash 1111)", "40 (hash 2222)"),
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(
    change: dict[str, Any], told: tuple[str, ...], tmp_path: Path, capsys: Capture
) -> None:
    a, b = run_of(tmp_path / "a", seeded(0)), run_of(tmp_path / "b", seeded(1) | change)
    line = refusal(capsys, a, b, "--out", tmp_path / "out")
    assert all(text in line for text in (*told, str(a), str(b)))
    assert not (tmp_path / "out").exists()


def test_validation_problems_of_the_token_level_are_compared_where_both_are_known(
    tmp_path: Path, capsys: Capture
) -> None:
    splits = [{"validation": {"n": 9, "hash": word}} for word in ("aaaa", "bbbb")]
    runs = [
        run_of(tmp_path / str(seed), seeded(seed) | {"token": fake_token() | {"splits": own}})
        for seed, own in enumerate(splits)
    ]
    line = refusal(capsys, *runs)
    assert "the validation problems of the token level 9 (hash aaaa) and 9 (hash bbbb)" in line
    earlier = run_of(tmp_path / "earlier", seeded(2, splits={"test": seeded(0)["splits"]["test"]}))
    assert report(runs[0], earlier, "--out", tmp_path / "out") == 0


def test_a_folder_given_twice_is_refused(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path / "a", seeded(0))
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    for other in ("a", "../" + tmp_path.name + "/a", "link"):
        assert f"a and {other} are the same folder; name each run once" in refusal(capsys, "a", other)
    assert not (tmp_path / "report").exists()
    shutil.copytree(run, tmp_path / "b")
    assert report("a", "b") == 0
    assert "differ in their seed" not in page_in(tmp_path / "report")[1].words


def test_a_level_beside_a_selection_is_refused(tmp_path: Path, capsys: Capture) -> None:
    a, b = run_of(tmp_path / "a", fake_results()), run_of(tmp_path / "b", fake_selection())
    assert "the kind sequence and selection" in refusal(capsys, a, b)


def test_the_token_level_is_compared_as_well(tmp_path: Path, capsys: Capture) -> None:
    a, b = (seeded(seed) | {"token": fake_token()} for seed in (0, 1))
    b["token"]["task"] = "gcd"
    line = refusal(capsys, run_of(tmp_path / "a", a), run_of(tmp_path / "b", b))
    assert "the task of the token level steps and gcd" in line


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    assert "absent is no folder" in refusal(capsys, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "empty is no run: it holds no results.json" in refusal(capsys, tmp_path / "empty")
    run = run_of(tmp_path / "cut", fake_results())
    whole = (run / "results.json").read_text()
    (run / "results.json").write_text(whole[: len(whole) // 2])
    assert "results.json is no valid JSON" in refusal(capsys, run)
    (run / "results.json").write_text("[1]")
    assert "holds no object" in refusal(capsys, run)
    (run / "results.json").write_text(json.dumps({"format": 7}))
    assert "has the format 7 and this rheostat reads 1" in refusal(capsys, run)
    assert refusal(capsys)


def test_an_interrupted_run_shows_what_is_there_and_what_is_missing(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    verdicts = [("greedy", True), ("greedy", False), ("greedy", None), *[("T=1", True)] * 5, ("T=1", False)]
    stored(run, verdicts)
    assert report(run, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["partial"] == [str(run)]
    assert "no results" in printed.err
    text, page = page_in(run / "report")
    assert "Partial: results.json is missing" in page.words
    assert "smollm2 on steps" in page.words
    row = r"<tr><th[^>]*>{}.*?</tr>"
    greedy, warm = (re.search(row.format(name), text, re.DOTALL) for name in ("greedy", "T=<wbr>1|T=1"))
    assert greedy is not None
    assert warm is not None
    assert re.findall(r"<td[^>]*>([^<]*)", greedy[0]) == ["3", "2", "50.0", "1.0", "0", "1"]
    assert re.findall(r"<td[^>]*>([^<]*)", warm[0]) == ["6", "4", "83.3", "5.5", "1", "0"]
    assert "rollouts so far9" in re.sub(r"\s", "", page.words).replace("rolloutssofar", "rollouts so far")


def test_results_of_the_run_before_an_interrupted_one_say_so(tmp_path: Path, capsys: Capture) -> None:
    run = run_of(tmp_path / "run", fake_results())
    assert report(run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["partial"] == []
    told = "These are the results of an earlier run. A later one in this folder was interrupted"
    assert told not in page_in(run / "report")[1].words
    (run / "unfinished.json").write_text("{}")
    assert report(run, "--json") == 0
    assert json.loads(capsys.readouterr().out)["partial"] == [str(run)]
    words = page_in(run / "report")[1].words
    assert told in words
    assert words.index(told) < words.index("It solves")


def test_a_damaged_shard_is_left_out_and_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stored(run, [("greedy", True)])
    (run / "rollouts" / "cut.parquet").write_bytes((run / "rollouts" / "b.parquet").read_bytes()[:200])
    assert report(run) == 0
    assert "1 of the store’s files cannot be read" in page_in(run / "report")[1].words
    assert (run / "rollouts" / "cut.parquet").is_file()


def test_training_that_was_killed_is_drawn_as_far_as_it_came(tmp_path: Path) -> None:
    import random

    run = tmp_path / "run"
    (run / "token").mkdir(parents=True)
    history = fake_history(random.Random(1))
    lines = [json.dumps(line) for line in history]
    (run / "token" / "metrics.jsonl").write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])
    assert report(run) == 0
    _, page = page_in(run / "report")
    assert "Partial: the adapter and results.json are missing" in page.words
    assert "batches of the token level so far8" in page.words.replace("\n", "")
    assert page.tags.count("svg") == 2
    assert "action 4" in page.words


def test_a_training_that_ended_is_not_called_partial(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved_adapter(run / "adapter")
    results = fake_results()
    history = results["training"]["adapter with budget"]
    (run / "training.json").write_text(json.dumps({"kind": "adapter with budget", "training": history}))
    card = (run / "adapter" / "README.md").read_bytes()
    assert report(run) == 0
    _, page = page_in(run / "report")
    assert "Trained, and not judged yet" in page.words
    assert "Partial" not in page.words
    assert page.tags.count("svg") == 2
    assert "T=1.25" in page.words  # the legend has the adapter's own strategies
    assert (run / "adapter" / "README.md").read_bytes() == card  # nothing was measured


def test_two_trainings_in_one_folder_are_both_drawn(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for kind, history in fake_results()["training"].items():
        saved_adapter(run / kind.replace(" ", "-"))
        (run / kind.replace(" ", "-") / "training.json").write_text(json.dumps({"kind": kind, "training": history}))
    assert report(run) == 0
    files = sorted(path.name for path in (run / "report" / "figures").glob("*.svg"))
    assert files == ["sequence-training-1.svg", "sequence-training-2.svg"]
    first, second = ((run / "report" / "figures" / name).read_text() for name in files)
    assert first != second


def test_the_model_card_is_made_from_the_same_numbers(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", fake_results(0.021, 0.008, 0.034))
    saved_adapter(run / "adapter")
    before = load_adapter(run / "adapter")
    assert report(run) == 0
    card = (run / "adapter" / "README.md").read_text()
    results = fake_results(0.021, 0.008, 0.034)
    row = next(r for r in results["rows"] if (r["policy"], r["k"]) == ("adapter with budget", 4))
    ends = f"{row['estimate']:.3f} | {row['low']:.3f} to {row['high']:.3f} | 600 |"
    assert f"| adapter with budget | 4 | {ends}" in card
    assert "| best single strategy (T=0.5) | mean | +0.021 | +0.008 to +0.034 |" in card
    assert "| adapter with budget | 2 | 63 | 93.23 (80.1 to ∞) | 2.542 (2.2 to ∞) |" in card
    assert "MIXED" not in card
    assert load_adapter(run / "adapter").metrics == before.metrics  # the adapter stays as it is


def test_fixed_strategies_have_a_page(tmp_path: Path) -> None:
    row = {"policy": "T=1", "group": "all", "k": 1, "estimate": 0.25, "low": 0.2, "high": 0.31, "problems": 40}
    results = {
        "format": 1,
        "kind": "policies",
        "task": "math",
        "rows": [row | {"samples": 2, "truncated": 0.125, "tokens": 90.5}],
    }
    run = run_of(tmp_path / "run", results)
    assert report(run) == 0
    text, _ = page_in(run / "report")
    assert re.findall(r"<td[^>]*>([^<]*)", text) == ["all", "1", "25.0", "40", "2", "12.5", "90.5"]


def test_a_selection_is_reported(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", fake_selection())
    assert report(run) == 0
    assert sorted(path.name for path in (run / "report" / "figures").iterdir()) == ["best-of-n.png", "best-of-n.svg"]


def test_a_judged_run_whose_store_is_of_another_version_is_reported(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", fake_results())
    (run / "rollouts").mkdir()
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1]}), run / "rollouts" / "old.parquet")
    assert report(run) == 0
    assert "What the rollout store holds is not shown" in page_in(run / "report")[1].words
    (run / "results.json").unlink()
    shutil.rmtree(run / "report")
    assert report(run) == 2


def test_adapters_judged_by_their_folders_bring_their_training_and_get_their_cards(tmp_path: Path) -> None:
    """As `recipes/sequence.sh` lays a run out."""
    run = tmp_path / "seed-0"
    results = fake_results()
    histories = results.pop("training")
    names = {kind: str(run / kind.removeprefix("adapter ").replace(" ", "-")) for kind in histories}
    for key in ("rows", "differences"):
        results[key] = [row | {"policy": names.get(row["policy"], row["policy"])} for row in results[key]]
    run_of(run, results)
    for kind, folder in names.items():
        saved_adapter(Path(folder))
        (Path(folder) / "training.json").write_text(json.dumps({"kind": kind, "training": histories[kind]}))
    assert report(run) == 0
    assert (run / "report" / "figures" / "training-2.png").is_file()
    card = (run / "without-budget" / "README.md").read_text()
    assert f"| {run / 'without-budget'} | 8 |" in card
    assert f"| {run / 'with-budget'} | 8 |" not in card


def test_adapters_from_elsewhere_get_their_cards_beside_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Of a sequence-level adapter, of AutoDeco heads, and of two whose paths make the same word."""
    monkeypatch.chdir(tmp_path)
    results = fake_mixed()
    moved = {"runs/t/adapter": "runs-s/adapter", "runs/b/adapter": "gone/adapter"}
    for key in ("rows", "differences"):
        results[key] = [row | {"policy": moved.get(row["policy"], row["policy"])} for row in results[key]]
    for folder in ("runs/s/adapter", "runs-s/adapter"):
        saved_adapter(tmp_path / folder)
    heads = AutoDeco(AutoDecoConfig(hidden_size=4, width=4))
    save_adapter(tmp_path / "runs" / "heads", heads, BaseModel("smollm2", None, 4, "5f0c1e"), {"task": "steps"}, {})
    before = {path: path.read_bytes() for path in tmp_path.glob("runs*/**/*") if path.is_file()}
    run = run_of(tmp_path / "judged", results)
    assert report("judged", "--json") == 0
    cards = [Path(path) for path in json.loads(capsys.readouterr().out)["cards"]]
    names = ["runs-s-adapter.md", "runs-s-adapter-2.md", "runs-heads.md"]
    assert [path.resolve() for path in cards] == [run / "report" / "cards" / name for name in names]
    assert all(path.read_bytes() == content for path, content in before.items())
    sequence, other, decoded = (path.read_text() for path in cards)
    assert "A sequence-level decoding adapter" in sequence
    assert "| best single strategy (T=0.5) | mean | -0.030 | -0.050 to -0.010 |" in sequence
    assert "| runs-s/adapter | 8 |" in other
    assert "AutoDeco (Wang et al., 2025" in decoded
    assert "| runs/heads | mean |" in decoded
    assert "| best single strategy (T=0.5) | mean | -0.002 | -0.020 to +0.015 |" in decoded


def test_a_link_inside_a_run_does_not_lead_a_card_out_of_it(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", fake_results())
    saved_adapter(tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_bytes()
    (run / "adapter").symlink_to(tmp_path / "mine")
    assert report(run) == 0
    assert (tmp_path / "mine" / "README.md").read_bytes() == card
    assert "+0.021" in (run / "report" / "cards" / "adapter-with-budget.md").read_text()


def test_heads_inside_the_run_get_their_card_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    results = fake_mixed()
    for key in ("rows", "differences"):
        results[key] = [
            row | {"policy": row["policy"].replace("runs/heads", str(run / "heads"))} for row in results[key]
        ]
    del results["adapters"]  # as earlier versions wrote it
    run_of(run, results)
    heads = AutoDeco(AutoDecoConfig(hidden_size=4, width=4))
    save_adapter(run / "heads", heads, BaseModel("smollm2", None, 4, "5f0c1e"), {"task": "steps"}, {})
    assert report(run) == 0
    assert f"| {run / 'heads'} | mean |" in (run / "heads" / "README.md").read_text()
    assert not (run / "report" / "cards").exists()


def test_the_training_of_autodeco_heads_is_drawn(tmp_path: Path) -> None:
    run = tmp_path / "run"
    heads = AutoDeco(AutoDecoConfig(hidden_size=4, width=4))
    save_adapter(run / "adapter", heads, BaseModel("smollm2", None, 4, "5f0c1e"), {"task": "steps"}, {})
    history = [{"epoch": n, "loss": None, "validation_loss": 1.4 - n / 10, "temperature": 1 + n / 8} for n in range(4)]
    (run / "training.json").write_text(json.dumps({"task": "steps", "kept_epoch": 3, "history": history}))
    assert report(run) == 0
    drawn = (run / "report" / "figures" / "autodeco-training-1.svg").read_text()
    assert "validation loss, nats" in drawn
    assert "mean temperature" in drawn
    assert "mean top-p" not in drawn  # what is not there is left out
    words = page_in(run / "report")[1].words
    assert "Training: AutoDeco heads" in words
    assert "Dotted: epoch 3, which was kept." in words
