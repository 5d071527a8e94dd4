"""The guard against regressions: silent within the noise, one line for a ratio beyond it, a second try for bad luck."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rheostat.bench import check
from rheostat.bench.check import Known, bench_check, complaints, record
from rheostat.cli import main
from rheostat.console import Console
from rheostat.errors import RheostatError

KNOWN = {"a: x/y": Known(10.0, 9.0), "b: x/y": Known(1.0, 0.5), "c: size": Known(4.0, 4.0)}


def test_three_times_the_noise_by_hand() -> None:
    assert Known(10.0, 9.0).least == pytest.approx(7.29)
    assert Known(1.0, 0.5).least == pytest.approx(0.125)
    assert Known(4.0, 4.0).least == pytest.approx(3.8)  # at least 5 %


def test_a_ratio_within_the_noise_or_better_is_no_complaint() -> None:
    assert complaints({"a: x/y": 7.3, "b: x/y": 0.13, "c: size": 4.0}, KNOWN) == []
    assert complaints({"a: x/y": 70, "b: x/y": 1.3, "c: size": 5.0}, KNOWN) == []


def test_each_ratio_beyond_the_noise_has_its_line() -> None:
    assert complaints({"a: x/y": 7.28, "b: x/y": 0.12, "c: size": 4.0}, KNOWN) == [
        "a: x/y: 7.28, below 7.29 (committed: 10, lowest run 9)",
        "b: x/y: 0.12, below 0.125 (committed: 1, lowest run 0.5)",
    ]
    assert complaints({"c: size": 3.79}, {"c: size": KNOWN["c: size"]}) == [
        "c: size: 3.79, below 3.8 (committed: 4, lowest run 4)"
    ]


def test_a_ratio_that_only_one_side_has_is_a_complaint() -> None:
    assert complaints({"a: x/y": 10, "b: x/y": 1, "d: new": 1}, KNOWN) == [
        "c: size: not measured any more",
        "d: new: no committed ratio",
    ]


def committed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *measured: float) -> list[float]:
    """Ratios that one benchmark will find, run after run; returns those that are left."""
    left = list(measured)
    monkeypatch.setattr(check, "_BENCHMARKS", {"a": lambda console: {"ratios": {"x/y": left.pop(0)}}})
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps({"machine": {"cpu": "ours"}, "ratios": {"a: x/y": {"median": 10.0, "lowest": 9.0}}}))
    monkeypatch.setattr(check, "_FILE", path)
    return left


def test_what_is_fine_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = committed(monkeypatch, tmp_path, 8.0, 1.0)
    result = bench_check(Console(quiet=True))
    assert result["ratios"] == {"a: x/y": 8.0}
    assert left == [1.0]


def test_bad_luck_gets_a_second_try(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    committed(monkeypatch, tmp_path, 1.0, 11.0)
    result = bench_check(Console(quiet=True))
    assert result["rows"] == [{"case": "a: x/y", "value": 11.0, "unit": "ratio", "low": 1.0, "high": 11.0}]


def test_worse_both_times_fails_in_a_line_per_ratio(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    committed(monkeypatch, tmp_path, 6.0, 7.0)
    with pytest.raises(RheostatError, match=r"^1 of 1 ratios are not as committed \(ours\); find what"):
        bench_check(Console())
    assert "a: x/y: 7, below 7.29 (committed: 10, lowest run 9)\n" in capsys.readouterr().err
    committed(monkeypatch, tmp_path, 6.0, 7.0)
    assert main(["bench", "check"]) == 2
    assert capsys.readouterr().err.count("\n") == 3  # once more; the ratio; the error


def test_a_record_holds_median_and_lowest(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Iterator[dict[str, Any]] = iter([{"ratios": {"x/y": value}} for value in (3.0, 1.0, 2.5, 9.0, 2.0)])
    monkeypatch.setattr(check, "_BENCHMARKS", {"a": lambda console: next(found)})
    made = record(5, Console(quiet=True))
    assert made["ratios"] == {"a: x/y": {"median": 2.5, "lowest": 1.0}}
    assert made["runs"] == 5
    assert {"cpu", "cores", "threads", "load"} <= set(made["machine"])


def test_without_committed_ratios_it_says_how_to_make_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "_FILE", tmp_path / "none.json")
    assert main(["bench", "check"]) == 2
    assert "none.json is missing: make it with 'python -m rheostat.bench.check 5" in capsys.readouterr().err


def test_the_committed_file_can_be_checked_against() -> None:
    committed = json.loads(check._FILE.read_text())
    assert committed["runs"] >= 5
    known = [Known(**values) for values in committed["ratios"].values()]
    assert all(0 < one.least <= one.lowest <= one.median for one in known)
    assert {name.split(":")[0] for name in committed["ratios"]} == set(check._BENCHMARKS)
