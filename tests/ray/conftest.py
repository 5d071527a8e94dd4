"""Everything here runs a real Ray on this machine; skipped where it is not installed."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TINY = HERE.parent / "training"  # where the tiny world is
sys.path.insert(0, str(TINY))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("ray")
            if not os.environ.get("RHEOSTAT_TEST_RAY") or find_spec("ray") is None:
                item.add_marker(pytest.mark.skip(reason="starts a Ray cluster for every test (make test-ray)"))


@pytest.fixture(autouse=True)
def _workers_find_what_stands_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{TINY}")
