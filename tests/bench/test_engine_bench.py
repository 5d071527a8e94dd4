"""What `rheostat bench engine` prints."""

import json
from pathlib import Path

import pytest

from rheostat import cli
from rheostat.bench import draws, engine, roofline


@pytest.mark.model
def test_bench_engine_prints_what_benchmarks_promise(
    smollm2_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"_ROWS": 2, "_TOKENS": 12, "_PREFIX_TOKENS": 12, "_QUEUE_TOKENS": 12}
    for name, value in small.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(draws, "_ROWS", 3)
    monkeypatch.setattr(draws, "_TOKENS", 4)
    for name, value in {"_ROWS": (1, 2), "_TOKENS": 4, "_MATRIX_ROWS": (2,), "_COPY_BYTES": 1 << 20}.items():
        monkeypatch.setattr(roofline, name, value)
    assert cli.main(["bench", "engine", "--model", str(smollm2_path), "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"bench", "machine", "versions", "rows", "ratios"} <= set(result)
    cases = {f"{case}: local/generate" for case in ("uniform 2", "shared prefix 8x8", "queue 256")}
    steps = {f"step of {rows}: local/roofline" for rows in (1, 2)}
    shares = {f"draw/step, {mix}" for mix in draws._MIXES}
    assert set(result["ratios"]) == cases | steps | shares | {"adapted/static", "recorded/static"}
    assert all(0 < result["ratios"][share] < 1 for share in shares)
    assert all({"case", "value", "unit", "low", "high"} == set(row) for row in result["rows"])
    assert all(row["low"] <= row["value"] <= row["high"] for row in result["rows"])
