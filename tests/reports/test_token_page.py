import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from rich.console import Console
from test_page import Page, fake_results, page_of, rows_of, softmax

from rheostat.reports import reading
from rheostat.reports.figures import forest, lines, token, training
from rheostat.reports.folders import Run
from rheostat.reports.page import render, sentence, write_report
from rheostat.reports.terminal import summary_table

ACTIONS = ["T=1", "greedy", "T=1.25", "T=0.5"]  # not in the order of randomness
BUDGETS = [1, 2, 4, 8]
MEMBERS = ["steps_sum", "steps_gcd"]
EDGES = [0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, 6.3]
POLICIES = ["adapter with budget", "adapter without budget", "entropy-only adapter", "BEST", "MIXED", *ACTIONS]
WORDS = [
    "First",
    ",",
    " 12",
    " +",
    " 30",
    " =",
    " 42",
    ".",
    "\n",
    " so",
    " the",
    " sum",
    " is",
    "  ",
    "\t",
    " <b>42</b>",
]


def fake_rows(draw: random.Random, n: int, **extra: object) -> list[dict[str, Any]]:
    """Rows as at the sequence level, of the policies of this one."""
    renamed = dict(zip(dict.fromkeys(row["policy"] for row in rows_of(random.Random(0), n)), POLICIES, strict=False))
    rows = [row | {"policy": renamed[row["policy"]]} for row in rows_of(draw, n, **extra) if row["policy"] in renamed]
    for row in rows:
        kind = "adapter" if "adapter" in row["policy"] else "static" if row["policy"] in ACTIONS else None
        row["kind"] = kind or row["policy"].lower()
        row["chosen"] = "T=0.5" if row["policy"] == "BEST" and row["k"] != "mean" else None
    return rows


def fake_history(draw: random.Random, styles: bool = True) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(61):
        progress = 1 - math.exp(-step / 15)
        shares = softmax([0.2 + draw.gauss(0, 0.1), 1.5 * progress, -1.5 * progress, 0.9 * progress])
        line: dict[str, Any] = {"step": step}
        if step:
            line |= {"reward": 0.4, "actions": shares, "entropy": 1.2, "recorded": 900}
            if styles and step % 7:
                line |= {"actions_cot": shares, "actions_direct": shares[::-1]}
        if step % 10 == 0:
            reward = 0.41 + 0.06 * progress
            line["validation"] = {"reward": reward, "by_budget": {"1": reward}}
            if styles:
                line["validation"] |= {"reward_cot": reward + 0.1, "reward_direct": reward - 0.1}
        lines.append(line)
    return lines


def fake_trace(draw: random.Random, length: int = 90, correct: bool = True) -> dict[str, Any]:
    tokens = []
    for t in range(length):
        p_max = min(0.2 + draw.random() * 1.1, 0.9999)
        pi = [round(share, 4) for share in softmax([draw.gauss(0, 1) for _ in ACTIONS])]
        tokens.append(
            {
                "text": WORDS[t % len(WORDS)],
                "action": draw.choices(range(4), pi)[0],
                "pi": pi,
                "entropy": round(-2.5 * math.log(p_max), 4),
                "p_max": round(p_max, 4),
                "probability": round(p_max * draw.random(), 4),
                "remaining": 128 - t,
            }
        )
    return {
        "prompt": "Question: What is 12 + 30?\nThink step by step, then answer.\n",
        "policy": "adapter with budget",
        "actions": ACTIONS,
        "budget": 128,
        "parallel_budget": 8,
        "finish_reason": "stop" if correct else "length",
        "correct": correct,
        "text": "".join(str(token["text"]) for token in tokens),
        "tokens": tokens,
    }


def fake_token(estimate: float = 0.013, low: float = 0.002, high: float = 0.024) -> dict[str, Any]:
    """The token level of a run, as ``results["token"]`` or on its own."""
    draw = random.Random(11)
    rows = fake_rows(draw, 300)
    differences = []
    for baseline, strategy in (("best single strategy", "T=0.5"), ("BEST", None), ("MIXED", None)):
        for policy in POLICIES[:3]:
            for k in [*BUDGETS, "mean"]:
                ends = {"estimate": estimate, "low": low, "high": high, "n_problems": 300}
                names = {"policy": policy, "baseline": baseline, "baseline_strategy": strategy, "k": k}
                differences.append(names | ends)
    decay = [5200, 420, 510, 700, 820, 640, 260, 90, 17]
    by_action = [[round(n * share) for n in decay] for share in (0.2, 0.45, 0.1)]
    by_action.append([n - sum(row[i] for row in by_action) for i, n in enumerate(decay)])
    tops: list[float | None] = [*EDGES[1:-1], None]
    grid = []
    for bucket, (bottom, top) in enumerate(zip(EDGES[:-1], tops, strict=True)):
        pi = softmax([0.2 * bucket, 2.0 - bucket / 3, 0.1, 1.0])
        for first, last in ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0)):
            if (bucket, first) != (8, 0.5):
                n = 40 * bucket + 7 + round(8 * first)
                grid.append({"entropy": [bottom, top], "position": [first, last], "n": n, "pi": pi})
    lengths = {}
    for index, name in enumerate([*ACTIONS, *POLICIES[:3]]):
        counts = [round(60 * math.exp(-(((i - 45 - 3 * index) / 20) ** 2))) for i in range(129)]
        counts[-1] += 40 if name == "T=1.25" else 5
        lengths[name] = counts
    return {
        "format": 1,
        "kind": "token",
        "model": {"model": "smollm2", "device": "cpu"},
        "task": "steps",
        "members": MEMBERS,
        "order": "vllm",
        "strategies": ACTIONS,
        "budgets": BUDGETS,
        "rows": rows,
        "by_member": [row for member in MEMBERS for row in fake_rows(draw, 150, member=member)],
        "by_style": [row for style in ("cot", "direct") for row in fake_rows(draw, 150, style=style)],
        "differences": differences,
        "choices": [],
        "training": {
            "adapter with budget": {"kept_step": 40, "history": fake_history(draw)},
            "entropy-only adapter": {"kept_step": 0, "history": fake_history(draw, styles=False)},
        },
        "lengths": lengths,
        "entropy": {
            "edges": EDGES,
            "static": {"policy": "T=1", "counts": [4100, 530, 640, 820, 960, 700, 330, 130, 41]},
            "adapted": {"policy": "adapter with budget", "counts": decay},
            "by_action": by_action,
            "grid": grid,
        },
        "frequent_tokens": {
            name: [
                [f" {word}", 0.2 - 0.011 * n]
                for n, word in enumerate(["the", "of", "so\n", "1", "(", "then", "answer", "is", "we", "thus", "x"])
            ]
            for name in ACTIONS
        },
        "traces": [fake_trace(draw), fake_trace(draw, 128, correct=False)],
        "counts": {"rollouts": 31000, "tokens": 2100000, "truncated": 310, "without_verdict": 0},
        "config": {"steps": 60},
        "wall_seconds": {"training": 300.5},
    }


MIXED_NAMES = ("runs/s/adapter", "runs/t/adapter", "runs/b/adapter", "runs/heads")
MIXED_GAINS = ((-0.03, -0.05, -0.01), (0.004, -0.01, 0.02), (0.025, 0.01, 0.04), (-0.002, -0.02, 0.015))


def fake_mixed(p: tuple[float, ...] = (0.003, 0.6, 0.004, 0.5)) -> dict[str, Any]:
    """Adapters of either level, of both, and AutoDeco heads, judged together and called by their folders; ``p`` are the
    p-values of their differences."""
    results = fake_token()
    names = dict(zip(POLICIES[:3], MIXED_NAMES, strict=False))
    kinds = ("sequence", "token", "both")
    for key in ("rows", "by_member", "by_style", "differences"):
        rows = [row | {"policy": names.get(row["policy"], row["policy"])} for row in results[key]]
        heads = [
            row | {"policy": "runs/heads", "kind": "baseline"} for row in rows if row["policy"] == "runs/b/adapter"
        ]
        results[key] = rows + heads
    gains = dict(zip(MIXED_NAMES, MIXED_GAINS, strict=True))
    ends = ("estimate", "low", "high")
    results["differences"] = [
        row | dict(zip(ends, gains[row["policy"]], strict=True)) | {"p": p[MIXED_NAMES.index(row["policy"])]}
        for row in results["differences"]
    ]
    results["adapters"] = {
        name: {"kind": kind, "features": "hidden", "with_budget": True, "actions": 4}
        for name, kind in zip(MIXED_NAMES, kinds, strict=False)
    } | {"runs/heads": {"kind": "autodeco"}}
    results["entropy"]["adapted"]["policy"] = MIXED_NAMES[1]
    results["lengths"] = {names.get(name, name): n for name, n in results["lengths"].items() if name != POLICIES[0]}
    results["training"] = {}
    return results


def fake_demo() -> dict[str, Any]:
    return fake_results() | {"token": fake_token()}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return page_of(fake_demo(), tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return page_of(fake_token(), tmp_path_factory.mktemp("alone"))


def test_both_levels_stand_on_one_page(both: tuple[str, Page]) -> None:
    text, page = both
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("h1") == page.tags.count("nav") == page.tags.count("script") == 1
    assert page.headings.count("Every policy, every budget") == 2
    assert page.headings.index("The token-level adapter gains 1.3 points over the best single strategy") == 12
    targets = re.findall(r'href="#([^"]+)"', re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    assert len(targets) == 26  # two levels, their 12 and 11 sections, and how it was measured
    assert set(targets) <= set(page.ids)
    assert "://" not in text
    assert len(text.encode()) < 2_000_000


def test_every_reference_inside_a_figure_has_its_target(both: tuple[str, Page]) -> None:
    text, page = both
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(page.ids)


def test_a_token_page_shows_the_token_level_only(alone: tuple[str, Page]) -> None:
    _, page = alone
    assert page.headings == [
        "What was compared",
        "Accuracy against parallel budget",
        "Each adapter minus its rivals, problem by problem",
        "Every policy, every budget",
        "How the policy took shape",
        "By prompt style",
        "Each adapter and BEST, by kind of problem",
        "Where it acts: entropy and position",
        "Which tokens it draws with which action",
        "How long the answers are",
        "Two answers, token by token",
        "How it was measured",
    ]
    assert "entropy-only” adapter" in page.words
    assert "picks one of four ways" in page.words


def test_the_numbers_are_those_of_the_results(alone: tuple[str, Page]) -> None:
    _, page = alone
    results = fake_token()
    for row in [*results["rows"], *results["by_member"], *results["by_style"]]:
        if row["policy"] in (*POLICIES[:3], "BEST"):
            shown = f"{100 * row['low']:.1f}–{100 * row['high']:.1f}"
            assert f"{100 * row['estimate']:.1f}{shown}" in page.words
    entropy = results["entropy"]
    shown = re.sub(r"\s+", " ", page.words.replace("\u202f", ""))
    order = [1, 3, 0, 2]  # from greedy to hot
    for bucket, low in enumerate(EDGES[:-1]):
        counts = [entropy["static"]["counts"], entropy["adapted"]["counts"], *(entropy["by_action"][a] for a in order)]
        assert f"{low:g} to {EDGES[bucket + 1]:g}" + "".join(str(row[bucket]) for row in counts) in shown
    for name, counts in results["lengths"].items():
        mean = sum(length * n for length, n in enumerate(counts)) / sum(counts)
        assert token.mean_length(counts) == pytest.approx(mean)
        assert shown.count(f"mean {mean:.1f}") >= 2, name  # for a desktop and for a phone
    for text in ("31\u202f000", "310 (1 %)", "batch 40, which was kept", "No batch did better on validation", "over 5"):
        assert text in page.words


def test_the_grid_keeps_its_cells_in_their_places(alone: tuple[str, Page]) -> None:
    text, _ = alone
    table = text[text.index('<table class="grid">') :]
    table = table[: table.index("</table>")]
    rows = [row.split("<td>")[1:] for row in table[table.index("<tbody>") :].split("</tr>")[:-1]]
    cells = {(cell["entropy"][0], cell["position"][0]): cell for cell in fake_token()["entropy"]["grid"]}
    assert len(rows) == 9
    for low, row in zip(EDGES, rows, strict=False):
        for first, html in zip((0.0, 0.25, 0.5), row, strict=True):
            cell = cells.get((low, first))
            if cell is None:
                assert "no token" in html
                continue
            assert f"<small>{cell['n']}</small>" in html
            widths = {int(place): float(width) for width, place in re.findall(r"width:([\d.]+)%;.*?--s(\d)", html)}
            assert widths == pytest.approx({p: 100 * cell["pi"][a] for p, a in enumerate([1, 3, 0, 2])}, abs=0.01)


def test_the_training_figure_has_a_panel_for_each_style() -> None:
    drawn = {policy: str(training.token_training(fake_token(), policy, 780, "x")) for policy in POLICIES[:3]}
    titles = ("chain of thought", "answer only", "all prompts")
    assert [drawn["adapter with budget"].count(f">{title}<") for title in titles] == [1, 1, 1]
    assert [drawn["entropy-only adapter"].count(f">{title}<") for title in titles] == [0, 0, 1]
    assert drawn["adapter without budget"] == "None"


def test_the_sentence_judges_the_token_level_by_the_same_rules() -> None:
    assert sentence(fake_token()).startswith("The token-level adapter gains 1.3 points over the best single strategy.")
    assert sentence(fake_token()).endswith("It most often decodes greedily (45 % of tokens).")
    assert sentence(fake_token(0.01, 0.0, 0.02)).startswith("No gain: the token-level adapter cannot be told apart")
    assert sentence(fake_token(-0.02, -0.03, -0.01)).startswith("The token-level adapter is 2.0 points worse")


def test_an_adapter_of_another_name_is_judged_where_it_is_alone() -> None:
    results = fake_token()
    for key in ("rows", "differences"):
        results[key] = [row for row in results[key] if row["policy"] not in POLICIES[:2]]
    assert sentence(results).startswith("The entropy-only adapter gains 1.3 points")
    assert "greedily" not in sentence(results)  # what is known of the actions is another adapter's
    row = reading.find(results["rows"], policy="entropy-only adapter", k="mean")
    assert f"It solves {100 * row['estimate']:.1f} % of problems" in sentence(results)


def test_of_several_what_correction_does_not_leave_is_not_claimed() -> None:
    """Holm by hand: 4 × 0.003, 3 × 0.02, 2 × 0.5 and 0.6."""
    said = sentence(fake_mixed((0.003, 0.6, 0.02, 0.5)))
    assert said.startswith(
        "Of four learned policies, three cannot be told apart from the best single strategy and one is"
    )
    assert "No gain: the adapter of both levels runs/b/adapter cannot be told apart" in said
    assert said.count("after correction for four comparisons") == 1
    assert "p = 0.06 after correction for four comparisons)" in said
    assert "adapter runs/s/adapter is 3.0 points worse" in said


def test_a_mixed_page_says_of_each_what_it_is_and_how_it_does(tmp_path: Path) -> None:
    text, page = page_of(fake_mixed(), tmp_path)
    words = " ".join(page.words.split()).replace("\u00a0", " ")
    title = (
        "Of four learned policies, one gains over the best single strategy, two cannot be told apart from it and one is"
    )
    for said in (
        f"{title} worse than it",
        "The sequence-level adapter runs/s/adapter is 3.0 points worse than the best single strategy (",
        "95 % interval −5.0 to −1.0)",
        "No gain: the token-level adapter runs/t/adapter cannot be told apart from the best single strategy (",
        "paired difference +0.4 points, 95 % interval −1.0 to +2.0)",
        "The adapter of both levels runs/b/adapter gains 2.5 points over the best single strategy (",
        "No gain: the AutoDeco heads runs/heads cannot be told apart",
        "runs/s/adapter: sequence-level adapter; reads the model’s hidden state, and the budget B; picks one of four",
        "runs/b/adapter: adapter of both levels",
        "runs/heads: AutoDeco heads",
        "Both levelsone strategy for each answer, or one strategy at every token: a gain for one, no gain for two",
        "learning how to sample from smollm2 on steps",
        "Before it answers a problem, a small policy, the sequence-level adapter, reads",
        "another, the token-level adapter, reads",
    ):
        assert said in words, said
    assert "runs/s/adapter" in page.words.replace("\u200b", "")
    assert "Runs/" not in text
    for name, drawing in (("forest", forest.forest), ("curve", lines.curve)):
        drawn = str(drawing(fake_mixed(), 780, name))
        assert all(drawn.count(f">{one}</text>") == 1 for one in MIXED_NAMES), name


def test_earlier_results_tell_levels_by_their_lengths() -> None:
    results = fake_mixed()
    del results["adapters"]
    natures = ["sequence", "token", "token", "autodeco"]
    assert reading.learned(results) == dict(zip(MIXED_NAMES, natures, strict=True))
    assert reading.levels(results) == ["sequence", "token"]
    assert reading.levels(fake_token()) == ["token"]
    assert reading.levels(fake_results()) == ["sequence"]


def test_figures_of_a_mixed_page_are_of_no_single_level(tmp_path: Path) -> None:
    mixed = fake_mixed()
    mixed["training"] = {
        "a": fake_results()["training"]["adapter with budget"] | {"strategies": fake_results()["strategies"]},
        "b": fake_token()["training"]["adapter with budget"],
    }
    found = render([Run(tmp_path, mixed, [], [], {}, None)]).drawings
    names = ["curve", "forest", "training-1", "token-training-2", "token-entropy", "token-frequent-tokens"]
    assert [drawing.name for drawing in found] == [*names, "token-lengths"]


def test_one_budget_is_no_curve(tmp_path: Path) -> None:
    results = fake_token()
    results["budgets"] = [1]
    _, page = page_of(results, tmp_path)
    assert "Accuracy against parallel budget" not in page.headings
    assert "with one sample each, on 300 test problems" in page.words


def test_anything_absent_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (forest, lines, token, training):  # the writing of figures takes most of a page's time
        monkeypatch.setattr(module, "to_svg", lambda *given: Markup("<svg></svg>"))
    page_of({"format": 1, "token": {"lengths": {}}}, tmp_path)
    full = fake_token()
    for key in ("strategies", "budgets", "rows", "entropy", "lengths", "everything"):
        results: dict[str, Any] = {"format": 1, "kind": "token"} if key == "everything" else full | {key: None}
        write_report(results, tmp_path / "report.html")
        page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert ("How long the answers are" in page.headings) == (key not in ("lengths", "everything"))
        assert ("Where it acts: entropy and position" in page.headings) == (key not in ("entropy", "everything"))


@pytest.mark.parametrize("value", [None, math.nan, "x"])
def test_missing_numbers_are_no_crash(value: object, tmp_path: Path) -> None:
    results = fake_token()
    results["entropy"]["static"]["counts"][2] = results["entropy"]["by_action"][1][3] = value
    results["entropy"]["grid"][0]["pi"][1] = results["entropy"]["grid"][1]["entropy"][0] = value
    results["lengths"]["T=1"][4] = results["training"][POLICIES[0]]["history"][3]["actions"][0] = value
    results["training"][POLICIES[0]]["history"][0]["validation"]["reward"] = value
    for name in ("entropy", "p_max", "pi", "action"):
        results["traces"][0]["tokens"][3][name] = value
    text, page = page_of(results, tmp_path)
    assert ">nan" not in text.lower()
    assert page.headings.count("Two answers, token by token") == 1


def test_hostile_names_and_tokens_are_text(tmp_path: Path) -> None:
    hostile = "</script><script>alert('$x^$&amp;\"')</script>"
    results = json.loads(json.dumps(fake_token()).replace('"T=1.25"', json.dumps(hostile)))
    results["traces"][0]["tokens"][0]["text"] = results["traces"][0]["prompt"] = hostile
    results["frequent_tokens"][hostile][0][0] = hostile
    text, page = page_of({"format": 1, "token": results}, tmp_path)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in text
    assert hostile in page.words


def test_the_terminal_table_serves_the_token_level() -> None:
    console = Console(width=100, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(summary_table(fake_token()))
    assert "Token level: problems solved" in capture.get()
    assert "T=0.5 *" in capture.get()
    assert reading.table(fake_token()).lines[0].cells[-1].interval in capture.get()
    assert max(map(len, capture.get().splitlines())) <= 100
