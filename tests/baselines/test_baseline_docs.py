"""The examples of docs/baselines.md run as they stand."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent.parent / "docs" / "baselines.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:  # each goes on from the one before
        exec(compile(block, "docs/baselines.md", "exec"), names)
    assert "best" in names
