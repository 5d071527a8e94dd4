"""The report in a real browser: nothing fails, everything is drawn, and what should answer to a reader answers."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rheostat import cli

pytestmark = pytest.mark.browser
_HERE, _WANTED = "RHEOSTAT_CHROMIUM", "RHEOSTAT_TEST_BROWSER"
_KINDS = ("demo", "select", "evaluate", "partial")

_VERIFIER = """
def verify(problem, completion):
    return (len(completion) + int(problem["answer"])) % 3 == 0
"""
_OUTSIDE = """
() => [...document.querySelectorAll("svg[role=img]")].filter(svg => svg.checkVisibility()).flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const size = path => path.getBBox().width + path.getBBox().height;
  if (frame.width < 50 || frame.height < 50) return [`${svg.ariaLabel} is empty`];
  if ([...svg.querySelectorAll("path")].filter(path => size(path) > 1).length < 3) return [`${svg.ariaLabel} is bare`];
  return [...svg.querySelectorAll("text")].filter(text => {
    const box = text.getBoundingClientRect();
    const across = box.left < frame.left - 2 || box.right > frame.right + 2;
    return across || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
  }).map(text => `${svg.ariaLabel} “${text.textContent}” lies outside`);
})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: that of RHEOSTAT_CHROMIUM, of the system, or Playwright's own; else skips, and fails where
    RHEOSTAT_TEST_BROWSER=1 says that it must be there."""
    missing = pytest.fail if os.environ.get(_WANTED, "0") not in ("", "0") else pytest.skip
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("needs Playwright: pip install playwright")
        raise
    system = os.environ.get(_HERE) or shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        path = system or playwright.chromium.executable_path
        if not Path(path).exists():
            missing(f"needs Chromium: install it, name it in {_HERE}, or run `playwright install chromium`")
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a demo, a selection, both levels judged with baselines, and an interrupted run, of the fake engine."""
    folder = tmp_path_factory.mktemp("runs")
    questions = [json.dumps({"problem": f"What is {n}?", "answer": str(n), "level": n % 3}) for n in range(160)]
    (folder / "some.jsonl").write_text("\n".join(questions))
    (folder / "judge.py").write_text(_VERIFIER)
    task = ["--task", str(folder / "some.jsonl"), "--verifier", f"{folder / 'judge.py'}:verify", "--max-tokens", "12"]
    token_task = [word.replace("--", "--token.") for word in task]
    fake, few = ["--model", "fake", *task], ["--problems.validation", "12", "--problems.test", "12"]
    samples = ["--samples.validation", "8", "--samples.test", "16"]
    training = ["--budgets", "1", "2", "--steps", "3", "--prompts", "3", "--group", "4", "--filter-samples", "0"]
    training += ["--validation-samples", "1", "--width", "16", "--samples", "4"]
    training += ["--problems.train", "8", "--problems.validation", "8", "--problems.test", "8"]
    token = [word.replace("--", "--token.") for word in training]
    sequence = [*few, *samples, *token_task, "--problems.train", "12", "--samples.train", "8", "--bandit.epochs", "3"]
    runs = {
        "demo": ["demo", *fake, *sequence, *token],
        "select": ["select", *fake, "--problems", "24", "--samples", "4", "--actions", "3"],
        "evaluate": ["evaluate", *fake, *few, *samples, "--baselines", "turn", "edt", "dynamic"],
    }
    for name, words in runs.items():
        adapters = [str(folder / "demo" / own / "adapter") for own in ("token", ".")]
        extra = ["--adapter", *adapters] if name == "evaluate" else []
        assert cli.main([*words, *extra, "--out", str(folder / name)]) == 0
    shutil.copytree(folder / "demo", folder / "partial")
    (folder / "partial" / "results.json").unlink()
    for name in _KINDS:
        assert cli.main(["report", str(folder / name)]) == 0
    return {name: folder / name / "report" / "report.html" for name in _KINDS}


def opened(browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, and a list that what goes wrong on it is added to."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    return page, wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("name", _KINDS)
def test_a_page_is_drawn_in_full(name: str, width: int, scheme: str, browser: Any, pages: dict[str, Path]) -> None:
    page, wrong = opened(browser, pages[name], width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_OUTSIDE) == []
    shown = page.locator("svg[role=img]:visible").count()
    assert shown == page.locator("svg[role=img]").count() / 2 >= 1  # each for a desktop or for a phone
    assert wrong == []
    page.close()


def test_dark_is_dark_and_light_is_light(browser: Any, pages: dict[str, Path]) -> None:
    brightness = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    shades = []
    for scheme in ("light", "dark"):
        page, _ = opened(browser, pages["demo"], scheme=scheme)
        shades.append(sum(page.evaluate(brightness)))
        ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill.match(/\\d+/g).map(Number)")
        assert abs(sum(ink) - shades[-1]) > 150  # letters in figures stand out from the page
        page.close()
    assert shades[0] > 600 > 200 > shades[1]


def test_hover_on_a_token_shows_its_probabilities(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["demo"])
    trace = page.locator(".trace").first
    assert trace.locator(".numbers-of-token").is_hidden()
    tokens = trace.locator(".t")
    tokens.nth(0).hover()
    assert trace.locator(".which code").inner_text().strip()
    shares = [float(text.split()[0]) for text in trace.locator(".card .share").all_inner_texts()]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert 0 <= float(trace.locator("[data-key=p_max]").inner_text().split()[0]) <= 100
    page.close()


def test_every_table_sorts_on_a_click(browser: Any, pages: dict[str, Path]) -> None:
    for name in _KINDS:
        page, wrong = opened(browser, pages[name])
        tables = page.locator("table.sortable")
        assert tables.count() >= 1
        for number in range(tables.count()):
            table = tables.nth(number)
            for column in range(table.locator("thead button").count()):
                button = table.locator("thead button").nth(column)
                cells = f"table => [...table.tBodies[0].rows].map(row => row.cells[{column}].dataset.v)"
                orders = []
                for _ in range(2):
                    button.click()
                    orders.append([value for value in table.evaluate(cells) if value != ""])
                assert orders[0] == orders[1][::-1], (name, number, column)
                try:
                    values = [float(value) for value in orders[0]]
                except ValueError:
                    continue
                assert values in (sorted(values), sorted(values, reverse=True)), (name, number, column)
        assert wrong == []
        page.close()


def test_links_of_the_contents_lead_to_their_sections(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["demo"])
    links = page.locator("nav.contents a")
    assert links.count() > 10
    for href in links.evaluate_all("links => links.map(link => link.getAttribute('href'))"):
        assert page.locator(f"[id='{href[1:]}']").count() == 1, href
    page.close()
