"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

import pytest

from rheostat.cli import main

Capture = pytest.CaptureFixture[str]

ROOT = Path(__file__).parent.parent


def test_the_examples_of_the_api_page_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 10
    names: dict[str, object] = {}
    for block in blocks:  # each goes on from the one before
        exec(compile(block, "docs/api.md", "exec"), names)
    assert {"rewards", "history", "token_history", "traces", "result"} <= set(names)


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_task_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """The commands of docs/tasks.md that name the example, with the fake model and a folder of their own."""
    monkeypatch.chdir(ROOT)
    commands = [
        line for line in (ROOT / "docs" / "tasks.md").read_text().splitlines() if "examples/own_task/pro" in line
    ]
    lines = [line for line in commands if line.startswith("rheostat ")]
    assert len(lines) == 2
    for line in lines:
        words = line.replace("smollm2", "fake").replace("runs/own", str(tmp_path)).split()
        assert main(words[1:]) == 0, line
    shown = capsys.readouterr().err
    assert "accepted 60 (100.00 %)" in shown
    assert (tmp_path / "results.json").exists()
