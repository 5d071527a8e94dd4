"""The paper's tables, written out by hand."""

from itertools import combinations
from pathlib import Path

import pytest

from rheostat.decoding.spaces import GREEDY, NAMED_SPACES, candidate_grid, read_space, strategies_named
from rheostat.decoding.strategy import Order, Strategy
from rheostat.errors import ConfigError

OFF = None

# (temperature, top_k, top_p, min_p), do_sample=false as temperature 0
TABLES = {
    "table11": [
        (0.75, OFF, 0.9, 0.1),
        (1.0, OFF, 0.9, OFF),
        (1.25, 10, 0.9, OFF),
        (1.0, 5, 0.9, OFF),
        (1.25, 50, 0.9, OFF),
        (1.25, OFF, OFF, OFF),
    ],
    "table12": [
        (1.25, OFF, 0.95, 0.1),
        (1.25, OFF, 0.95, 0.2),
        (1.0, OFF, 0.95, 0.2),
        (1.25, 50, 0.9, 0.1),
        (1.25, 5, 0.9, OFF),
        (0.75, 5, OFF, 0.1),
    ],
    "table13": [
        (0.5, OFF, OFF, OFF),
        (1.0, OFF, OFF, OFF),
        (1.25, OFF, OFF, OFF),
        (0.75, 10, OFF, OFF),
        (0.75, 10, 0.95, 0.1),
        (0.0, OFF, OFF, OFF),
    ],
    "table14": [(0.0, OFF, OFF, OFF), (0.5, OFF, OFF, OFF), (1.0, OFF, OFF, OFF), (1.25, OFF, OFF, OFF)],
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_11_to_14(name: str) -> None:
    space = NAMED_SPACES[name]
    assert [(s.temperature, s.top_k, s.top_p, s.min_p) for s in space] == TABLES[name]
    assert space.order is Order.VLLM
    assert strategies_named((name,)) == space.strategies


def test_all_tables_are_named() -> None:
    assert set(NAMED_SPACES) == {*TABLES, "demo"}


def test_the_demos_space_is_the_one_that_was_chosen() -> None:
    chosen = Path(__file__).parents[2] / "docs" / "results" / "action_space-smollm2-demo.toml"
    assert read_space(chosen) == NAMED_SPACES["demo"]


def test_candidate_grid_is_table_10() -> None:
    grid = candidate_grid()
    assert len(grid) == len(set(grid)) == len({str(s) for s in grid}) == 180
    assert {s.temperature for s in grid} == {0.3, 0.5, 0.75, 1.0, 1.25}
    assert {s.top_k for s in grid} == {5, 10, 50, None}
    assert {s.top_p for s in grid} == {0.9, 0.95, None}
    assert {s.min_p for s in grid} == {0.1, 0.2, None}
    assert strategies_named(("grid",)) == grid


def test_a_file_may_cross_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("[grid]\ntemperature = [1, 2.0]\ntop_k = [5, 0]\nmin_p = [0.1]\ntop_n_sigma = [0, 1.5]\n")
    expected = [Strategy(t, k, None, 0.1, s) for t in (1, 2) for k in (5, None) for s in (None, 1.5)]
    assert list(read_space(path)) == expected


def test_table_entries_come_from_the_grid_or_are_greedy() -> None:
    grid = {*candidate_grid(), GREEDY}
    for space in NAMED_SPACES.values():
        assert set(space) <= grid
    for left, right in combinations(NAMED_SPACES.values(), 2):
        assert left != right


def test_written_strategies() -> None:
    assert [str(s) for s in strategies_named(("greedy", "T=0.5", "T=1,k=5"))] == ["greedy", "T=0.5", "T=1,k=5"]


def test_names_may_be_mixed() -> None:
    assert strategies_named(("grid", "greedy")) == (*candidate_grid(), GREEDY)
    assert strategies_named(("T=0.9", "table14"))[1:] == NAMED_SPACES["table14"].strategies


@pytest.mark.parametrize("names", [("table15",), ("T=1", "tables"), ("grid", "")])
def test_unknown_names(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"table11.*grid"):
        strategies_named(names)
