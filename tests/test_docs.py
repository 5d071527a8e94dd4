"""The examples of the documentation run as they stand."""

import re
from pathlib import Path

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
