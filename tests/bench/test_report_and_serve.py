"""The benchmarks of the report and of the server, run small: they count what they say, and nothing goes wrong."""

from typing import Any

import pytest

from rheostat.bench import report
from rheostat.bench.report import bench_report
from rheostat.bench.serve import bench_serve
from rheostat.console import Console


def values(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(row["case"], row["unit"]): row["value"] for row in result["rows"]}


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_PROBLEMS", {"validation": 7, "test": 13})
    result = bench_report(1, Console(quiet=True))
    found = values(result)
    assert result["rollouts"] == 20 * 6 * 16
    for case in ("report 100k", "report 100k, interrupted"):
        assert 0 < found[case, "s"] < 120
        assert 20 < found[case, "MiB peak"] < 2000
        assert 0.01 < found[case, "MiB page"] < 10


def test_serve() -> None:
    result = bench_serve("fake", 6.0, Console(quiet=True))
    found = values(result)
    outcomes = {case.removeprefix("requests: "): n for (case, unit), n in found.items() if unit == "requests"}
    assert set(outcomes) == {"answered", "dropped by the client", "malformed, refused"}
    assert outcomes["answered"] > outcomes["dropped by the client"] > 0
    assert outcomes["malformed, refused"] > 0
    assert found["rows left", "rows"] == found["connections left", "files"] == found["exit code after SIGTERM", ""] == 0
    assert 0 < found["time to first token, p50", "s"] <= found["time to first token, p95", "s"] < 6
    assert result["ratios"]["served/offline"] == pytest.approx(
        found["served", "tokens/s"] / found["offline", "tokens/s"], rel=0.01
    )
