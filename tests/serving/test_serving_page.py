"""The examples of the serving pages run as they stand, against a server of the fake model."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import Running  # type: ignore[import-not-found]

ROOT = Path(__file__).parent.parent.parent


def here(text: str, server: Running) -> str:
    return text.replace("http://127.0.0.1:8000", server.url).replace("smollm2", "fake")


def test_the_python_examples(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(here(block, server), "docs/serving.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert lines[4].startswith(("T=", "greedy"))


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("page", ["docs/serving.md", "README.md"])
def test_the_curl_examples(server: Running, page: str) -> None:
    commands = re.findall(r"^(curl http://127.*?\n\}')", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert commands
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", here(command, server) + " -sS"], capture_output=True, text=True, check=True
        )
        answer = json.loads(done.stdout)
        assert answer["rheostat"]["mode"] == "adapt"
        assert len(answer["choices"]) == 4
