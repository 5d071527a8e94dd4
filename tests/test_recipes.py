"""The recipes: every command of every page parses, and its dry run says what it would take."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from rheostat import cli

ROOT = Path(__file__).parent.parent
FOLDERS = [*(f"table{n}" for n in range(1, 10)), *(f"figure{n}" for n in range(2, 9))]
PICTURES = [f"figure{n}" for n in (2, 3, 4, 5, 7, 8)]  # the paper gives no numbers, and so the picture is the result
Capture = pytest.CaptureFixture[str]


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, in which `rheostat` only notes down what it was called with."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    stub = tmp_path / "bin" / "rheostat"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>"{tmp_path}/log"\nprintf "\\0" >>"{tmp_path}/log"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(stub.parent), prepend=":")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls_of(line: str, workplace: Path) -> list[list[str]]:
    """What a line calls `rheostat` with."""
    log = workplace / "log"
    log.unlink(missing_ok=True)
    subprocess.run(["sh", "-eu", "-c", line], check=True)
    return [call.splitlines() for call in log.read_text().split("\0")[:-1]]


def _without_names(words: list[str]) -> list[str]:
    """Without what seeds and folders are called, in which calls of one recipe differ."""
    kept, skipping = [], False
    for word in words:
        skipping = word in ("--seed", "--out", "--adapter") if word.startswith("--") else skipping
        kept += [] if skipping else [word]
    return kept


def test_every_table_and_figure_has_a_page_which_the_index_lists_with_its_status() -> None:
    index = (ROOT / "recipes" / "README.md").read_text()
    assert sorted(path.name for path in (ROOT / "recipes").iterdir() if path.is_dir()) == sorted(FOLDERS)
    for name in FOLDERS:
        text = (ROOT / "recipes" / name / "README.md").read_text()
        for heading in ("## Commands", "## The paper", "## Ours"):
            assert f"\n{heading}\n" in text, f"{name}: {heading}"
        ours = text.partition("\n## Ours\n")[2].partition("\n## ")[0]
        (line,) = [line for line in index.splitlines() if f"({name}/README.md)" in line]
        more = ("](smollm2.png)",) if name in PICTURES else ("test problems", "95 %")
        is_run = all(word in ours for word in ("commit", "seed", *more))
        assert ("| run: " in line, "| not run |" in line) == (is_run, not is_run), line
        assert "not run" in ours, name


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "recipes").rglob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("name", [".", *FOLDERS])
def test_every_command_of_a_page_parses_and_its_dry_run_says_what_it_takes(
    name: str, workplace: Path, capsys: Capture
) -> None:
    lines = commands(Path("recipes") / name / "README.md")
    calls = [call for line in lines for call in calls_of(line, workplace)]
    assert len(calls) >= len(lines) > 0
    for words in dict.fromkeys(tuple(_without_names(call)) for call in calls):
        assert cli.main([word for word in words if word != "--dry-run"] + ["--dry-run"]) == 0, capsys.readouterr().err
        assert "in all at most" in capsys.readouterr().out
    assert not list(workplace.rglob("*.parquet"))


def test_every_configuration_is_used_by_a_command(workplace: Path) -> None:
    lines = [line for name in FOLDERS for line in commands(Path("recipes") / name / "README.md")]
    calls = [call for line in lines for call in calls_of(line, workplace)]
    used = {call[index + 1] for call in calls for index, word in enumerate(call) if word == "--config"}
    assert used == {str(path) for path in Path("recipes").rglob("*.toml")}


def test_the_recipes_cover_the_papers_models_lengths_and_transfers() -> None:
    files = (ROOT / "recipes").rglob("*.toml")
    settings = {path.relative_to(ROOT): tomllib.loads(path.read_text()) for path in files}
    assert {8092, 38912} <= {setting.get("max_tokens") for setting in settings.values()}
    for name in ("table1", "table2", "table3", "table4", "table5"):
        models = {settings[Path("recipes", name, f"{scale}.toml")]["model"] for scale in ("paper", "smollm2")}
        assert models == {"Qwen/Qwen3-4B", "smollm2"}
        assert settings[Path("recipes", name, "qwen2.5-coder-1.5b.toml")]["model"] == "qwen2.5-coder-1.5b"
    assert settings[Path("recipes/table3/paper.toml")]["samples"]["test"] == 30
    asked = {name: " ".join(commands(ROOT / "recipes" / name / "README.md")) for name in FOLDERS}
    assert "--model Qwen/Qwen3-8B" in asked["table6"]
    assert "--model Qwen/Qwen3-8B" in asked["table7"]
    assert "--model Qwen/Qwen2.5-Math-1.5B" in asked["table8"]
    assert all("--cot 0.3" in asked[f"table{n}"] for n in (1, 2, 4, 5, 6, 7, 8))


def test_a_killed_recipe_goes_on_with_what_it_lacks(workplace: Path) -> None:
    """Adapters that are there are not trained again."""
    done = workplace / "out" / "seed-0" / "with-budget"
    done.mkdir(parents=True)
    (done / "adapter.json").write_text("{}")
    calls = calls_of("SEEDS=0 recipes/sequence.sh out recipes/table1/smollm2.toml", workplace)
    assert [call[:2] for call in calls] == [["train", "sequence"], ["evaluate", "--config"]]
    assert "--no-with-budget" in calls[0]
