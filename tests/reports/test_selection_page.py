"""The page of a selection: what it claims, the map of the pool, and what it does with results that lack a part."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_page import Page, page_of

from rheostat.decoding.spaces import GREEDY, candidate_grid
from rheostat.decoding.strategy import Strategy
from rheostat.reports.figures.svg import THEME
from rheostat.reports.page import sentence

CHOSEN = ["greedy", "T=0.5", "T=1,p=0.9", "T=1.25,k=5,p=0.9,m=0.2", "T=1.25", "T=0.3,k=50"]
TOP = ["greedy", "T=0.3", "T=0.3,k=50", "T=0.3,k=5", "T=0.3,k=10", "T=0.5"]


def fake_selection(
    difference: tuple[float, float, float] = (0.022, 0.008, 0.036),
    pool: tuple[Strategy, ...] = (*candidate_grid(), GREEDY),
) -> dict[str, Any]:
    """A halved search as ``rheostat select`` writes it; the argument is the difference that the headline rests on."""
    draw = np.random.default_rng(7)
    heat = [
        {
            "strategy": str(strategy),
            "temperature": strategy.temperature,
            "truncation": str(strategy).partition(",")[2],
            "reward": round(0.4 - 0.15 * strategy.temperature + 0.01 * draw.standard_normal(), 6),
            "rollouts": 1920 if str(strategy) in CHOSEN else 480,
            "round": 2 if str(strategy) in CHOSEN else 1,
        }
        for strategy in pool
    ]
    greedy = [[0.34 + 0.02 * n, 0.30 + 0.02 * n, 0.38 + 0.02 * n] for n in range(6)]
    top = [[0.34 + 0.01 * n, 0.30 + 0.01 * n, 0.38 + 0.01 * n] for n in range(6)]
    coverage = [0.345, 0.401, 0.423, 0.436, 0.442, 0.447]
    return {
        "format": 1,
        "kind": "selection",
        "model": {"model": "smollm2", "fingerprint": "5f0c1e"},
        "task": "demo",
        "order": "vllm",
        "strategies": CHOSEN,
        "seeds": {"run": 0},
        "versions": {"rheostat": "0.1.0"},
        "machine": {"cpu": "a processor"},
        "counts": {"rollouts": 100_531, "tokens": 4_000_000, "truncated": 1234, "without_verdict": 0},
        "objective": "mean reward",
        "problems": 240,
        "samples": 8,
        "plan": [[181, 240, 2], [90, 240, 8]],
        "rollouts_asked": 216_480,
        "full_sweep": 347_520,
        "greedy": {"strategies": CHOSEN, "coverage": coverage, "held_out": None, "cells_without_estimate": 0},
        "top": {"strategies": TOP, "coverage": coverage, "held_out": None, "cells_without_estimate": 0},
        "held_out": {"greedy": greedy, "top": top, "difference": [*([[0.0, 0.0, 0.0]] * 5), list(difference)]},
        "held_out_problems": {"chosen_on": 119, "valued_on": 121},
        "chosen_in_resamples": dict.fromkeys(CHOSEN, 0.91) | {"T=0.75": 0.44, "T=1.25,m=0.1": 0.03},
        "heat": heat,
        "config": {"parallel_budget": None, "actions": 6},
        "wall_seconds": {"rollouts": 1200.5},
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return page_of(fake_selection(), tmp_path_factory.mktemp("selection"))


def cells_of(text: str) -> list[list[tuple[str, str]]]:
    """Class and content of every cell of the map, row by row."""
    [body] = re.findall(r'<table class="heat">.*?<tbody>(.*?)</tbody>', text, flags=re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", body, flags=re.DOTALL)
    return [
        [
            (kind.strip(), re.sub(r"<[^>]*>", "", content).strip())
            for kind, content in re.findall(r'<td(?: colspan="\d+")?(?: class="([^"]*)"[^>]*)?>(.*?)</td>', row)
        ]
        for row in rows
    ]


def test_is_well_formed_and_complete(written: tuple[str, Page]) -> None:
    text, page = written
    assert page.tags.count("h1") == 1
    assert len(page.headings) == 5
    assert page.tags.count("svg") == 2  # for a desktop and for a phone
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|src=\"", text)
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert len(text.encode()) < 500_000
    for number in ("100 531", "4 000 000", "1 234", "216 480", "347 520", "5f0c1e", "62 %"):
        assert number in " ".join(page.words.split()), number
    for row in ([1, 181, 240, 2, "86\u202f880"], [2, 90, 240, 8, "129\u202f600"]):  # 181·480; 90·(1,920 − 480)
        assert "".join(f"<td>{value}</td>" for value in row) in text


def test_the_map_holds_every_candidate_once(written: tuple[str, Page]) -> None:
    text, _ = written
    results = fake_selection()
    greedy, *grid = cells_of(text)
    assert [len(row) for row in grid] == [5] * 36
    by_name = {entry["strategy"]: entry for entry in results["heat"]}
    limits = list(itertools.product((math.inf, 50, 10, 5), (1.0, 0.95, 0.9), (0, 0.1, 0.2)))  # from loose to tight
    for (k, p, m), row in zip(limits, grid, strict=True):
        for temperature, (kind, content) in zip((0.3, 0.5, 0.75, 1.0, 1.25), row, strict=True):
            name = str(Strategy(temperature, None if k == math.inf else int(k), p, m))
            place = str(CHOSEN.index(name) + 1) if name in CHOSEN else ""
            assert content == f"{place}{100 * by_name[name]['reward']:.1f}"
            assert kind == ("chosen" if place else "early"), name
    assert greedy == [("chosen", f"1{100 * by_name['greedy']['reward']:.1f}")]


def test_a_pool_that_is_no_grid_leaves_cells_empty(tmp_path: Path) -> None:
    pool = tuple(map(Strategy.parse, ("T=0.5", "T=1,p=0.9", "T=1,m=0.05", "T=2", "T=2,k=3")))
    text, page = page_of(fake_selection(pool=pool), tmp_path)
    filled = [[bool(content) for _, content in row] for row in cells_of(text)]
    assert filled == [  # no truncation; m=0.05; p=0.9; k=3
        [True, False, True],
        [False, True, False],
        [False, True, False],
        [False, False, True],
    ]
    assert "The 5 candidates as a list" in page.words
    only = page_of(fake_selection(pool=(GREEDY,)), tmp_path)[0]
    assert len(cells_of(only)) == 1


def test_text_is_legible_on_every_cell(written: tuple[str, Page]) -> None:
    """WCAG asks for a contrast of 4.5, on a light page and on a dark one."""

    def luminance(rgb: list[float]) -> float:
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def channels(colour: str) -> list[float]:
        return [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]

    depths = [float(depth) / 100 for depth in re.findall(r"--depth:([\d.]+)%", written[0])]
    assert len(depths) == 181
    for side in (0, 1):
        ink, paper, accent = (channels(THEME[name][side]) for name in ("ink", "paper", "accent"))
        for depth in (min(depths), max(depths)):
            ground = [depth * a + (1 - depth) * b for a, b in zip(accent, paper, strict=True)]
            light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 4.5


def test_the_headline_claims_only_what_the_interval_allows() -> None:
    gain = sentence(fake_selection())
    assert gain.startswith("Six strategies chosen together cover 2.2 points more than the six best by themselves.")
    assert "Chosen on 119 problems and valued on 121 others, six strategies cover 44.0 %" in gain
    assert "the six with the highest mean reward 39.0 %" in gain
    assert "(95 % interval +0.8 to +3.6)" in gain
    assert "asked for 216\u202f480 rollouts, 62 % of the full sweep’s 347\u202f520" in gain
    assert gain.endswith("; ".join(CHOSEN) + ".")
    for low, high in ((-0.004, 0.03), (0.0, 0.03), (-0.03, 0.0)):
        told = sentence(fake_selection(((low + high) / 2, low, high)))
        assert "whether they cover more than the six best by themselves is open" in told
        assert "which includes zero" in told
    assert "they cover as much as the six best by themselves." in sentence(fake_selection((0.0, 0.0, 0.0)))
    assert "cover 2.2 points less" in sentence(fake_selection((-0.022, -0.036, -0.008)))


def test_the_full_sweep_is_called_so() -> None:
    results = fake_selection() | {"rollouts_asked": 347_520}
    assert "The search was the full sweep: 347\u202f520 rollouts." in sentence(results)


def test_one_action_is_the_best_strategy(tmp_path: Path) -> None:
    results = fake_selection()
    for name in ("greedy", "top"):
        results[name] = {"strategies": ["T=0.5"], "coverage": [0.4], "held_out": None}
    results["held_out"] = {name: [[0.4, 0.3, 0.5]] for name in ("greedy", "top")} | {"difference": [[0.0, 0.0, 0.0]]}
    assert sentence(results).startswith("One strategy is chosen, the best by its mean reward: T=0.5.")
    page_of(results, tmp_path)


def test_the_choice_is_told_step_by_step(written: tuple[str, Page]) -> None:
    _, page = written
    words = " ".join(page.words.split())
    assert "1 greedy34.5+34.5" in words
    assert "2 T=0.540.1+5.6" in words
    assert "Not chosen, but by many resamples: T=0.75 (44 %)." in words
    assert "644.0 (40.0 to 48.0)39.0 (35.0 to 43.0)+2.2 (+0.8 to +3.6)" in words


def test_a_choice_for_pass_at_b_shows_both_halves(tmp_path: Path) -> None:
    results = fake_selection() | {"objective": "pass@4", "bounds": {"missing_wrong": 0.4401, "missing_right": 0.4512}}
    results["config"]["parallel_budget"] = 4
    results["greedy"] = results["greedy"] | {"held_out": [0.311, 0.312, 0.313, 0.314, 0.315, 0.316]}
    _, page = page_of(results, tmp_path)
    for text in ("by the other samples", "31.6", "44.0 to 45.1 %", "highest pass@4"):
        assert text in page.words
    assert "flatters both lines" not in page.words


def test_results_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    results = fake_selection()
    for entry in results["heat"]:
        for name in ("strategy", "rollouts", "round"):
            del entry[name]
    for name in ("held_out_problems", "counts"):
        del results[name]
    text, page = page_of(results, tmp_path)
    assert sum(kind == "chosen" for row in cells_of(text) for kind, _ in row) == 6
    assert "In italics" not in page.words
    assert "Chosen on one half of the problems and valued on the other" in page.words


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    whole = fake_selection()
    for name in set(whole) - {"format", "kind"}:
        page_of(whole | {name: None}, tmp_path)
    text, page = page_of({"format": 1, "kind": "selection"}, tmp_path)
    assert page.headings == ["How it was measured"]
    assert "<svg" not in text


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_missing_numbers_do_not_crash(value: float | None, tmp_path: Path) -> None:
    results = fake_selection()
    results["heat"][3]["reward"] = results["heat"][5]["rollouts"] = results["heat"][7]["round"] = value
    results["held_out"]["top"][2][1] = results["greedy"]["coverage"][1] = value
    results["plan"][0][1] = results["chosen_in_resamples"]["T=0.5"] = value
    text, page = page_of(results, tmp_path)
    assert not {"nan", "inf", "None"} & set(re.findall(r"\w+", page.words))
    assert "–" in page.words
    assert "svg" not in page.tags
    assert "T=0.3,k=5,p=0.95,m=0.1: no estimate" in text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "</script><script>alert('$x^$&amp;')</script>"
    results = fake_selection()
    results["task"] = results["model"]["model"] = results["greedy"]["strategies"][1] = hostile
    results["heat"][2] |= {"strategy": hostile, "truncation": hostile}
    results["objective"] = hostile
    text, page = page_of(results, tmp_path)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in text
    assert hostile in page.words


def test_equal_rewards_are_drawn(tmp_path: Path) -> None:
    results = fake_selection()
    for entry in results["heat"]:
        entry["reward"] = 0.25
    for curve in results["held_out"].values():
        curve[:] = [[0.25, 0.25, 0.25]] * 6
    assert page_of(results, tmp_path)[0] == page_of(results, tmp_path)[0]
