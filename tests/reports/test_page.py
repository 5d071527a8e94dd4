import itertools
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rheostat.errors import StoreError
from rheostat.reports import grids, reading
from rheostat.reports.figures import lines
from rheostat.reports.page import sentence, write_report
from rheostat.reports.terminal import summary_table

STRATEGIES = ["T=0.5", "T=1", "T=1.25", "T=0.75,k=10", "T=0.75,k=10,p=0.95,m=0.1", "greedy"]
MEMBERS = ["basic_arithmetic", "chain_sum", "gcd", "lcm", "letter_counting", "prime_factorization"]
BUDGETS = [1, 2, 4, 8]
ADAPTERS = ("adapter with budget", "adapter without budget")
LEVELS = {  # pass@1 and the gain per doubling of the budget
    "adapter with budget": (0.354, 0.076),
    "adapter without budget": (0.347, 0.072),
    "BEST": (0.351, 0.074),
    "TURN": (0.340, 0.070),
    "MIXED": (0.300, 0.086),
    "oracle": (0.400, 0.090),
    "T=0.5": (0.338, 0.068),
    "T=1": (0.262, 0.095),
    "T=1.25": (0.171, 0.090),
    "T=0.75,k=10": (0.318, 0.080),
    "T=0.75,k=10,p=0.95,m=0.1": (0.331, 0.074),
    "greedy": (0.351, 0.0),
}


def rows_of(draw: random.Random, n: int, **extra: object) -> list[dict[str, Any]]:
    rows = []
    for policy, (start, step) in LEVELS.items():
        kind = {"BEST": "best", "MIXED": "mixed", "TURN": "baseline", "oracle": "oracle"}.get(policy, "static")
        kind = "adapter" if policy in ADAPTERS else kind
        shift = draw.gauss(0, 0.12) if extra else 0.0
        values = [start + step * i * (1 - 0.06 * i) + shift + draw.gauss(0, 0.004) for i in range(4)]
        values = [min(max(value, 0.01), 0.99) for value in values]
        for k, value in zip([*BUDGETS, "mean"], [*values, sum(values) / 4], strict=True):
            half = 1.96 * math.sqrt(value * (1 - value) / n)
            chosen = {1: "greedy", 2: "T=0.5", 4: "T=0.5", 8: "T=0.75,k=10"}.get(k) if kind == "best" else None
            row = {"policy": policy, "kind": kind, "k": k, "estimate": value, "low": value - half, "high": value + half}
            rows.append({**row, "n_problems": n, "n_samples": 16, "chosen": chosen, **extra})
    return rows


def softmax(logits: list[float]) -> list[float]:
    sizes = [math.exp(value) for value in logits]
    return [size / sum(sizes) for size in sizes]


def preference(budget: int, with_budget: bool, member: int = 0) -> list[float]:
    heat = math.log2(budget) / 3 if with_budget else 0.35
    return [1.1, 1.9 * heat - 0.4, 1.2 * heat - 1.6, 0.9 * heat + 0.1 * member, 0.6, 2.4 - 3.4 * heat - 0.25 * member]


def history(draw: random.Random, with_budget: bool) -> list[dict[str, Any]]:
    out = []
    for epoch in range(25):
        progress = 1 - math.exp(-epoch / 7)
        shares = {str(b): softmax([1.3 * progress * x for x in preference(b, with_budget)]) for b in BUDGETS}
        reward = 0.38 + 0.055 * progress + draw.gauss(0, 0.004)
        entropy = 1.79 - 0.5 * progress
        entry = {"epoch": epoch, "loss": -reward, "entropy": entropy, "validation_reward": reward}
        out.append({**entry, "action_probability": shares})
    return out


def fake_results(estimate: float = 0.021, low: float = 0.008, high: float = 0.034) -> dict[str, Any]:
    """A run as ``rheostat demo`` writes it; the arguments are the difference that the headline rests on."""
    draw = random.Random(7)
    differences = []
    baselines = {"best single strategy": (0.0, "T=0.5"), "BEST": (-0.008, None), "MIXED": (0.03, None)}
    baselines |= {"TURN": (0.011, None)}
    for baseline, (shift, strategy) in baselines.items():
        for k in [*BUDGETS, "mean"]:
            size = 1.0 if k == "mean" else 1.5
            middle = estimate + shift + (0 if k == "mean" else draw.gauss(0, 0.008))
            row = {"policy": "adapter with budget", "baseline": baseline, "baseline_strategy": strategy, "k": k}
            ends = {"low": middle - size * (estimate - low), "high": middle + size * (high - estimate)}
            if (baseline, k) == ("best single strategy", "mean"):
                ends = {"low": low, "high": high}
            p = {"p": draw.random() / 10, "p_holm": draw.random(), "p_sign": draw.random()}
            differences.append({**row, "estimate": middle, **ends, "n_problems": 600, **p})
    training = {
        name: {"estimator": "full_information", "history": history(draw, name == ADAPTERS[0]), "kept_epoch": 17}
        for name in ADAPTERS
    }
    choices = [
        {"member": member, "budget": b, "probability": softmax([1.3 * x for x in preference(b, True, index)])}
        for index, member in enumerate(MEMBERS)
        for b in BUDGETS
    ]
    return {
        "format": 1,
        "kind": "sequence",
        "model": {"model": "smollm2", "fingerprint": "5f0c1e", "dtype": "bfloat16", "device": "cpu", "threads": 2},
        "task": "demo",
        "members": MEMBERS,
        "order": "vllm",
        "strategies": STRATEGIES,
        "budgets": BUDGETS,
        "rows": rows_of(draw, 600),
        "by_member": [row for member in MEMBERS for row in rows_of(draw, 100, member=member)],
        "by_level": [row for level in ("1", "5") for row in rows_of(draw, 50, level=level)],
        "differences": differences,
        "majority": {"rows": rows_of(draw, 600, by="majority"), "differences": differences[:5]},
        "costs": [
            {
                "policy": policy,
                "k": k,
                "tokens": 31.5 * k,
                "tokens_per_solved": [91.234 + k, 80.1, None],
                "equal_to": [1.271 * k, 1.1 * k, None] if policy in (*ADAPTERS, "TURN") else None,
            }
            for policy in LEVELS
            if policy != "oracle"
            for k in BUDGETS
        ],
        "within": [
            {"policy": policy, "tokens": [4, 8, 16], "accuracy": [0.1, 0.1 + step, start], "area": [0.211, 0.2, 0.223]}
            for policy, (start, step) in LEVELS.items()
            if policy != "oracle"
        ],
        "milliseconds_per_token": {"strategies on test": 2.5},
        "tuned": {"TURN": {"chosen": "T = 0.7", "temperatures": [0.1, 0.7], "entropy": [0.125, 0.75]}},
        "bounds": {"1": {"missing_wrong": 0.311, "missing_right": 0.333}},
        "training": training,
        "choices": choices,
        "counts": {"rollouts": 120000, "tokens": 4000000, "truncated": 1234, "without_verdict": 0},
        "config": {
            "task": {"train": 1200, "validation": 400, "test": 600},
            "training": {"lr": 0.001, "hidden": [256, 256]},
        },
        "seeds": {"task": 0, "rollouts": 1, "training": 2},
        "versions": {"rheostat": "0.1.0", "torch": "2.13.0", "python": "3.12.3"},
        "machine": {"cpu": "a processor", "cores": 2},
        "wall_seconds": {"rollouts": 200.1, "training": 20.0, "evaluation": 3.4},
    }


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps text, tags and attributes."""

    VOID = ("meta", "br", "link", "img", "hr", "wbr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def page_of(results: dict[str, Any], folder: Path) -> tuple[str, Page]:
    path = folder / "report.html"
    write_report(results, path)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return page_of(fake_results(), tmp_path_factory.mktemp("report"))


def test_is_well_formed_and_complete(written: tuple[str, Page]) -> None:
    text, page = written
    assert page.tags.count("h1") == 1
    assert len(page.headings) == 13
    assert page.tags.count("svg") == 10  # five figures, each for a desktop and for a phone
    assert len(page.ids) == len(set(page.ids))
    assert len(text.encode()) < 2_000_000


def test_needs_no_network(written: tuple[str, Page]) -> None:
    text, page = written
    assert "http://" not in text
    assert "https://" not in text
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert "@import" not in text
    assert "src=" not in text.replace("-src ", "")


def test_shows_every_number_of_the_rows(written: tuple[str, Page]) -> None:
    _, page = written
    results = fake_results()
    for row in results["rows"] + results["by_member"]:
        if "member" in row and row["policy"] not in (*ADAPTERS, "BEST"):
            continue
        assert f"{100 * row['estimate']:.1f}{100 * row['low']:.1f}–{100 * row['high']:.1f}" in page.words
    for row in results["differences"]:
        assert f"{100 * abs(row['estimate']):.1f}" in page.words
        assert all(reading.p_value(row[name]) in page.words for name in ("p", "p_holm", "p_sign"))
    for text in ("600", "120\u202f000", "1\u202f234", "train 1\u202f200", "200.1", "training.lr", "256, 256", "5f0c1e"):
        assert text in page.words


def test_shows_costs_curves_tuning_and_bounds(written: tuple[str, Page]) -> None:
    _, page = written
    for text in (
        "92.280.1–∞",  # tokens per solved problem, an interval without end
        "231200–∞",  # the same at 2.5 milliseconds a token
        "1.271.10–∞",  # worth so many samples of the best single strategy
        "21.120.0–22.3",  # the area under accuracy within so many tokens
        "oracleunreachable (hindsight)",
        "TURNbaseline",
        "T = 0.1: 0.125 nats, T = 0.7: 0.75 nats",
        "31.1 to 33.3 %",
        "by level of difficulty",
    ):
        assert text in page.words, text


def test_the_oracle_tops_no_column_and_is_no_rival() -> None:
    content = reading.table(fake_results())
    oracle = next(line for line in content.lines if line.kind == "oracle")
    assert content.lines[-1] is oracle
    assert oracle.cells[0].estimate == max(line.cells[0].estimate or 0 for line in content.lines)
    assert not any(cell.best for cell in oracle.cells)


def test_the_sentence_claims_a_gain_only_beyond_zero() -> None:
    gain = sentence(fake_results(0.021, 0.008, 0.034))
    assert gain.startswith("The adapter gains 2.1 points over the best single strategy.")
    assert "95 % interval +0.8 to +3.4)" in gain
    assert "600 test problems" in gain
    for low, high in ((-0.004, 0.030), (0.0, 0.030), (-0.030, 0.0)):
        assert sentence(fake_results((low + high) / 2, low, high)).startswith("No gain:")
    worse = sentence(fake_results(-0.021, -0.034, -0.008))
    assert worse.startswith("The adapter is 2.1 points worse than the best single strategy.")


def test_groups_stand_in_their_natural_order_with_every_adapter() -> None:
    results = fake_results()
    draw = random.Random(1)
    results["by_level"] = [row for level in ("10", "2", "1") for row in rows_of(draw, 50, level=level)]
    gap = {"group": "level", "value": "2", "policy": ADAPTERS[0], "k": 4}
    results["by_group"] = [gap | {"estimate": 0.0123, "low": -0.0031, "high": 0.0277}]
    found = grids.groups(results, "by_level", "level")
    names = [row[0].text for row in found.rows]
    assert names == [f"{level} · {policy}" for level in (1, 2, 10) for policy in (*ADAPTERS, "BEST")]
    cells = [row[3] for row in found.rows[3:6]]  # level 2 at B = 4
    for policy, cell in zip((*ADAPTERS, "BEST"), cells, strict=True):
        row = reading.find(results["by_level"], policy=policy, level="2", k=4)
        ends = f"{100 * row['low']:.1f}–{100 * row['high']:.1f}"
        told = "\n+1.2\n−0.3 to +2.8" if policy == ADAPTERS[0] else ""
        assert (cell.text, cell.small) == (f"{100 * row['estimate']:.1f}", ends + told)
    results["by_group"] = None  # as earlier versions wrote it: a difference without an interval
    earlier = grids.groups(results, "by_level", "level").rows[3][3]
    ours, best = (
        reading.find(results["by_level"], policy=p, level="2", k=4)["estimate"] for p in (ADAPTERS[0], "BEST")
    )
    assert earlier.small.splitlines()[1] == reading.points(ours - best)


def without_adapters(results: dict[str, Any], baselines: bool) -> dict[str, Any]:
    """The same run with static strategies alone, or with baselines."""
    gone = ADAPTERS if baselines else (*ADAPTERS, "TURN")
    for key in ("rows", "by_member", "by_level", "costs", "within"):
        results[key] = [row for row in results[key] if row["policy"] not in gone]
    rival = [row | {"policy": "TURN"} for row in results["differences"] if row["baseline"] != "TURN"]
    results["differences"] = rival if baselines else []
    return results | {"choices": [], "training": None, "majority": None}


def test_a_page_without_an_adapter_speaks_of_none(tmp_path: Path) -> None:
    results = without_adapters(fake_results(), baselines=False)
    for row in results["rows"]:
        row["chosen"] = "T=0.5" if row["policy"] == "BEST" else None
    results["rows"] += [row | {"policy": "best single strategy", "kind": "best"} for row in results["rows"][-5:]]
    _, page = page_of(results, tmp_path)
    words = " ".join(page.words.split())
    assert "No adapter was judged: six strategies on 600 test problems" in words
    assert "Nothing was learned here" in words
    for untrue in ("small policy", "no complete comparison", "It competes", "retraining", "he adapter", "decides"):
        assert untrue not in words, untrue
    assert "The best single strategy and BEST, by kind of problem" in page.headings


def test_a_page_of_baselines_judges_them(tmp_path: Path) -> None:
    _, page = page_of(without_adapters(fake_results(), baselines=True), tmp_path)
    words = " ".join(page.words.split())
    assert "TURN gains 2.1 points over the best single strategy" in words
    assert "solved by TURN, mean over the budgets" in words
    assert "The baseline minus its rivals, problem by problem" in page.headings
    for untrue in ("small policy", "The adapter", "the adapter"):
        assert untrue not in words, untrue


def test_a_bound_close_to_zero_is_not_written_as_zero() -> None:
    assert "+0.04 to +2.00)" in sentence(fake_results(0.01, 0.0004, 0.02))


def test_the_sentence_says_what_the_policy_does() -> None:
    results = fake_results()
    assert "With one sample it mostly decodes greedily (" in sentence(results)
    assert "with eight samples it most often samples with T=1 (" in sentence(results)
    for choice in results["choices"]:
        choice["probability"] = [0.9, 0.02, 0.02, 0.02, 0.02, 0.02]
    text = sentence(results)
    assert "It mostly samples with T=0.5 with few samples and with many: 90 % of the time with one sample" in text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "</script><script>alert('$x^$&amp;')</script>"
    results = fake_results()
    results["strategies"] = [hostile, *STRATEGIES[1:]]
    results["members"] = [hostile, *MEMBERS[1:]]
    results["task"] = results["model"]["model"] = hostile
    results["versions"][hostile] = hostile
    for row in [*results["rows"], *results["by_member"], *results["differences"], *results["choices"]]:
        for name, value in row.items():
            if value in ("T=0.5", MEMBERS[0]):
                row[name] = hostile
    text, page = page_of(results, tmp_path)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in text
    assert hostile in page.words
    Console(width=100, file=(tmp_path / "table.txt").open("w")).print(summary_table(results))


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    results = fake_results()
    names = ("majority", "costs", "within", "tuned", "bounds", "by_level")
    for name in (*names, "training", "choices", "by_member", "counts", "config", "seeds", "machine", "wall_seconds"):
        results[name] = None
    results["differences"] = []
    _, page = page_of(results, tmp_path)
    assert "How the policy took shape" not in page.headings
    assert page.tags.count("svg") == 2
    assert "holds no complete comparison" in page.words
    page_of({"format": 1}, tmp_path)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_missing_numbers_do_not_crash(value: float | None, tmp_path: Path) -> None:
    results = fake_results()
    results["rows"][0]["estimate"] = results["rows"][7]["low"] = value
    results["by_member"][3]["estimate"] = results["differences"][2]["high"] = value
    results["differences"][4]["low"] = value
    results["training"][ADAPTERS[0]]["history"][3]["validation_reward"] = value
    results["training"][ADAPTERS[0]]["history"][5]["action_probability"]["2"] = [value] * 6
    results["training"][ADAPTERS[1]]["history"] = results["training"][ADAPTERS[1]]["history"][:1]
    results["choices"][0]["probability"][2] = value
    results["costs"][0]["tokens_per_solved"][1] = results["costs"][1]["tokens"] = value
    results["within"][0]["accuracy"][1] = results["within"][1]["area"][0] = value
    results["bounds"]["1"]["missing_wrong"] = results["differences"][1]["p_holm"] = value
    results["majority"]["rows"][2]["low"] = value
    results["counts"]["truncated"] = results["wall_seconds"]["training"] = value
    text, page = page_of(results, tmp_path)
    assert ">nan" not in text.lower()
    assert "–" in page.words
    summary_table(results)


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="format 2"):
        write_report(fake_results() | {"format": 2}, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_writing_is_atomic_and_repeatable(tmp_path: Path) -> None:
    first, _ = page_of(fake_results(), tmp_path)
    assert page_of(fake_results(), tmp_path)[0] == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(StoreError):
        write_report(fake_results(), tmp_path / "missing" / "report.html")


def test_the_best_of_a_column_is_marked() -> None:
    content = reading.table(fake_results())
    assert [sum(line.cells[column].best for line in content.lines) for column in range(5)] == [1] * 5
    assert [line.policy for line in content.lines if line.single] == ["T=0.5"]


def test_the_best_single_strategy_is_not_listed_twice() -> None:
    results = fake_results()
    own = [row for row in results["rows"] if row["policy"] == "T=0.5"]
    results["rows"] += [row | {"policy": "best single strategy", "kind": "best", "chosen": "T=0.5"} for row in own]
    assert reading.table(results) == reading.table(fake_results())


def test_a_run_that_solved_nothing_is_drawn(tmp_path: Path) -> None:
    results = fake_results(0.0, 0.0, 0.0)
    for row in [
        *(row for name in ("rows", "by_member", "by_level", "differences") for row in results[name]),
        *results["majority"]["rows"],
    ]:
        row["estimate"] = row["low"] = row["high"] = 0.0
    text, page = page_of(results, tmp_path)
    assert page.words.count("No gain") == 2  # title and heading
    assert "e−1" not in text  # no axis in powers of ten
    assert "1e-" not in page.words


def test_labels_are_pushed_apart() -> None:
    places = lines._push_apart([10.0, 11.0, 12.0, 90.0], [14.0] * 4, 100.0)
    assert all(b - a > 13.9 for a, b in itertools.pairwise(places))
    assert places[-1] == pytest.approx(90.0)


def test_short_names_keep_what_tells_them_apart() -> None:
    names = [f"runs/table5/smollm2/{kind}-budget-{seed}/adapter" for kind in ("with", "without") for seed in range(3)]
    for wrap in (False, True):
        found = [lines.short(name, wrap) for name in names]
        assert len(set(found)) == 6
        assert all(name.endswith(f"-{n % 3}") for n, name in enumerate(found))
        assert max(len(line) for name in found for line in name.split("\n")) <= (14 if wrap else 25)
    assert lines.short("runs/a/adapter") == "runs/a/adapter"
    assert lines.short("T=0.75,k=10,p=0.95,m=0.1,s=1") == "T=0.75,k=10,p=0.95,m=0.1…"


def test_the_terminal_table_fits_100_columns() -> None:
    console = Console(width=100, record=True, force_terminal=True)
    with console.capture() as capture:
        console.print(summary_table(fake_results()))
    plain = Console(width=100, no_color=True, force_terminal=False)
    with plain.capture() as text:
        plain.print(summary_table(fake_results()))
    assert max(map(len, text.get().splitlines())) <= 100
    assert "…" not in text.get()
    assert "T=0.5 *" in text.get()
    assert "\x1b[1m" in capture.get()
    best = reading.table(fake_results()).lines[0].cells[-1]
    assert reading.percent(best.estimate) in text.get()
    assert best.interval in text.get()
