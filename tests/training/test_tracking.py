"""Metrics: always lines of JSON, and numbers for the services that are asked for."""

import importlib
import json
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rheostat.errors import ConfigError, StoreError
from rheostat.training.tracking import Tracker, Tracking

LINE = {
    "step": 3, "reward": 0.5, "skipped": "no reward variance", "actions": [0.25, 0.75],
    "validation": {"reward": 1, "by_budget": {"8": 0.75}}, "done": True,
}  # fmt: skip
NUMBERS = {"reward": 0.5, "validation/reward": 1.0, "validation/by_budget/8": 0.75}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_line_per_call(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    assert lines_of(tmp_path) == []
    tracker.log({"step": 0, "reward": 0.1 + 0.2})
    assert lines_of(tmp_path) == [{"step": 0, "reward": 0.1 + 0.2}]  # there at once, to be watched
    tracker.log(LINE)
    tracker.close()
    assert lines_of(tmp_path) == [{"step": 0, "reward": 0.1 + 0.2}, LINE]


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    first = Tracker(tmp_path)
    for step in range(4):
        first.log({"step": step, "run": 1})
    first.close()
    again = Tracker(tmp_path, history=lines_of(tmp_path)[:2])
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1]
    again.log({"step": 2, "run": 2})
    assert [(line["step"], line["run"]) for line in lines_of(tmp_path)] == [(0, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize("service", Tracking)
def test_a_missing_package_is_one_clear_line(
    service: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch.utils.tensorboard", "trackio", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    with pytest.raises(ConfigError, match=rf"^tracking: {service} is not installed: pip install {service}$"):
        Tracker(tmp_path, [service])


@pytest.mark.parametrize("service", [Tracking.TRACKIO, Tracking.WANDB])
def test_services_get_the_numbers(service: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    module = ModuleType(str(service))
    module.init = lambda **named: calls.append(("init", named))  # type: ignore[attr-defined]
    module.log = lambda numbers, step: calls.append(("log", (numbers, step)))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append(("finish", None))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, str(service), module)
    tracker = Tracker(tmp_path, [service])
    tracker.log(LINE)
    tracker.close()
    assert calls == [
        ("init", {"project": "rheostat", "name": tmp_path.name}), ("log", (NUMBERS, 3)), ("finish", None)
    ]  # fmt: skip
    assert lines_of(tmp_path) == [LINE]


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_service_that_fails_costs_no_training(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network\nand more about it")

    module = ModuleType("wandb")
    for name in ("init", "log", "finish"):
        setattr(module, name, fail if name == when else lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    if when == "init":
        with pytest.raises(ConfigError, match=r"^tracking: wandb does not start: no network$"):
            Tracker(tmp_path, [Tracking.WANDB])
        return
    tracker = Tracker(tmp_path, [Tracking.WANDB])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tracker.log(LINE)
        tracker.log(LINE)
        tracker.close()
    assert [re.sub("; .*/", "; ", str(one.message)) for one in told] == [
        "tracking: a service failed and gets no more metrics (no network); metrics.jsonl has them all"
    ]
    assert lines_of(tmp_path) == [LINE, LINE]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = Tracker(tmp_path, [Tracking.TENSORBOARD])
    tracker.log(LINE)
    tracker.close()
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]} == NUMBERS
    assert {events.Scalars(name)[0].step for name in NUMBERS} == {3}


def test_a_folder_that_refuses_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the folder does not exist; create it"):
        Tracker(tmp_path / "missing")
