"""The playground in a real browser, of ``rheostat serve`` with the fake model and an adapter of each level."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_report_browser import browser  # type: ignore[import-not-found]  # noqa: F401  (a fixture)

from rheostat.adapters.files import BaseModel, save_adapter
from rheostat.adapters.sequence import SequenceAdapter, SequenceConfig
from rheostat.adapters.token import TokenAdapter, TokenConfig
from rheostat.decoding.spaces import TABLE_14
from rheostat.engines.fake import FakeEngine
from rheostat.reports.figures import svg
from rheostat.reports.reading import by_randomness
from rheostat.reports.trace import SURE, visible
from rheostat.tasks.base import Split
from rheostat.tasks.procedural import procedural_task
from rheostat.types import Completion, FinishReason

pytestmark = pytest.mark.browser
NAMES = [str(strategy) for strategy in TABLE_14]
Open = Callable[..., Any]

# The command, with a fake model that is slow enough to be looked at, never ends a "long" prompt, answers a task's
# problem with one digit of two, and writes markup.
SERVE = """
import sys, time
from rheostat.engines import fake
own, pieces = fake.FakeEngine.logits, fake.FakeEngine.pieces
def logits(self, text, tokens=()):
    time.sleep(0.003)
    found = own(self, text, tokens)
    if "long" in text:
        found[0] = -100
    if text.endswith("Answer:"):
        found[:] = -100
        found[[4, 5] if not tokens else 0] = 0
    return found
fake.FakeEngine.logits = logits
fake.FakeEngine.pieces = lambda self, ids: ["<img src=x>" if one == 3 else pieces(self, [one])[0] for one in ids]
from rheostat.cli import main
sys.exit(main(sys.argv[1:]))
"""


def started(*options: str) -> Iterator[str]:
    command = [sys.executable, "-c", SERVE, "serve", "--model", "fake", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert line.startswith("serving fake"), line
        yield line.split()[-1].removesuffix("/v1")
    finally:
        process.terminate()
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.stderr.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine, root = FakeEngine(), tmp_path_factory.mktemp("adapters")
    size = engine.info.hidden_size
    base = BaseModel("fake", None, size, engine.info.fingerprint)
    made = {
        "demo": SequenceAdapter(SequenceConfig(size), TABLE_14),
        "token": TokenAdapter(TokenConfig(size, budgets=(1, 2, 4)), TABLE_14),
    }
    for name, adapter in made.items():
        torch.nn.init.normal_(adapter.output.weight, generator=torch.Generator().manual_seed(4))
        save_adapter(root / name, adapter, base, {}, {})
    yield from started("--adapter", *(str(root / name) for name in made))


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:  # noqa: F811
    """Opens pages, on which nothing may go wrong and nobody else is asked for anything."""
    pages: list[tuple[Any, list[str]]] = []

    def open_page(url: str, width: int = 1280, scheme: str = "light", ready: bool = True) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda sent: None if sent.url.startswith((url, "data:")) else wrong.append(sent.url))
        page.set_default_timeout(30_000)
        page.goto(url)
        if ready:
            page.locator("#model option").first.wait_for(state="attached")
            pages.append((page, wrong))
        return page

    yield open_page
    for page, wrong in pages:
        page.close()
        assert wrong == []


def slide(page: Any, name: str, value: int) -> None:
    script = "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }"
    page.locator(f"#{name}").evaluate(script, value)


def ask(page: Any, model: str, prompt: str | None = "12 ", n: int = 3, b: int = 9, seed: int = 5) -> None:
    """Fill the form in and run it from the keyboard."""
    page.select_option("#model", model)
    if prompt is not None:
        page.fill("#prompt", prompt)
    slide(page, "n", n)
    slide(page, "b", b)
    page.fill("#seed", str(seed))
    page.locator("#status").evaluate("status => { status.textContent = ''; }")  # that of an earlier run is not to count
    page.keyboard.press("Control+Enter")


def done(page: Any) -> str:
    page.locator("#status", has_text=re.compile("Done|Stopped")).wait_for()
    assert page.inner_text("#error") == ""
    return str(page.inner_text("#status"))


def completed(url: str, path: str = "completions", **fields: Any) -> Any:
    body = {"prompt": "12 ", "n": 3, "max_tokens": 9, "seed": 5, "rheostat": {"mode": "adapt", "trace": True}} | fields
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


def side(page: Any, title: str) -> Any:
    return page.locator(f"section.side[aria-label={title}]")


def texts(of: Any) -> list[str]:
    return [visible_as(text) for text in of.locator(".t").all_text_contents()]


def visible_as(text: str) -> str:
    return text.replace("\n", "")


def written(answer: Any) -> list[str]:
    return [visible_as(visible(token["text"])) for choice in answer["choices"] for token in choice["rheostat"]["trace"]]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (375, "light"), (375, "dark")])
def test_a_prompt_is_answered_by_streaming(width: int, scheme: str, url: str, opened: Open) -> None:
    page = opened(url, width, scheme)
    ask(page, "fake:token", "a long one", n=2, b=60)
    side(page, "Fixed").locator(".t").nth(3).wait_for()
    early = page.locator(".t").count()
    assert page.inner_text("#status") == "Running …"
    assert early < 240
    assert page.locator("#run").is_disabled()
    done(page)
    assert page.locator(".t").count() == 2 * 2 * 60
    assert page.locator("#stop").is_disabled()
    page.locator(".t").nth(100).focus()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".t img").count() == 0  # what the model writes is text


@pytest.mark.parametrize("side_of_theme", [0, 1])
def test_colours_are_those_of_the_trace(side_of_theme: int, url: str, opened: Open) -> None:
    page = opened(url, scheme=("light", "dark")[side_of_theme])
    ask(page, "fake:token")
    done(page)
    palette = svg.strategy_colours(len(NAMES))
    place = {action: index for index, action in enumerate(by_randomness(NAMES))}
    answer = completed(url, model="fake:token")
    tokens = [token for choice in answer["choices"] for token in choice["rheostat"]["trace"]]
    adapted = side(page, "Adapted")
    assert texts(adapted) == written(answer)
    shadows = adapted.locator(".t").evaluate_all("tokens => tokens.map(token => getComputedStyle(token).boxShadow)")
    wanted = [rgb(palette[place[t["action"]]][side_of_theme]) if t["p_max"] <= SURE else "none" for t in tokens]
    assert [shadow.split(" 0px")[0] for shadow in shadows] == wanted
    assert len(set(wanted)) > 2
    counts = [sum(one == rgb(colours[side_of_theme]) for one in wanted) for colours in palette]
    shown = adapted.locator(".legend li").all_inner_texts()
    assert [line.split() for line in shown[:-1]] == [
        [NAMES[action], str(count)] for action, count in zip(by_randomness(NAMES), counts, strict=True)
    ]
    chips = adapted.locator(".legend .chip.tinted").evaluate_all(
        "all => all.map(c => getComputedStyle(c).backgroundColor)"
    )
    assert chips == [rgb(colours[side_of_theme]) for colours in palette]


def card(page: Any) -> dict[str, str]:
    rows = zip(*(page.locator(f"#card {tag}").all_inner_texts() for tag in ("dt", "dd")), strict=True)
    return dict(rows)


def test_a_token_shows_its_numbers(url: str, opened: Open) -> None:
    """By hover, and by the arrow keys."""
    page = opened(url)
    ask(page, "fake:token")
    done(page)
    tokens = completed(url, model="fake:token")["choices"][0]["rheostat"]["trace"]
    spans = side(page, "Adapted").locator(".sample").first.locator(".t")
    assert page.locator(".numbers-of-token").is_hidden()

    def check(token: Any) -> None:
        found = card(page)
        assert found["action"] == NAMES[token["action"]]
        assert found["temperature"] == ("0, greedy" if token["temperature"] == 0 else f"{token['temperature']:g}")
        assert float(found["entropy"].removesuffix(" nats")) == pytest.approx(token["entropy"], abs=0.0051)
        assert float(found["likeliest token"].removesuffix(" %")) == pytest.approx(100 * token["p_max"], abs=0.051)
        assert found["remaining budget"] == f"{token['remaining']} token{'' if token['remaining'] == 1 else 's'}"
        bars = (page.locator(f"#card li {part}").all_inner_texts() for part in (".name", ".share"))
        shares = dict(zip(*bars, strict=True))
        for name, share in zip(NAMES, token["pi"], strict=True):
            shown = 0.05 if shares[name].startswith("<") else float(shares[name].removesuffix(" %"))
            assert shown == pytest.approx(100 * share, abs=0.051)

    for index, token in enumerate(tokens):
        spans.nth(index).hover()
        check(token)
    page.mouse.move(2, 2)
    assert page.locator(".numbers-of-token").is_hidden()
    spans.first.focus()
    for token in tokens:
        check(token)
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    check(tokens[0])
    assert spans.first.get_attribute("aria-selected") == "true"
    page.keyboard.press("Escape")
    assert page.locator(".numbers-of-token").is_hidden()


def test_another_adapter_another_trace(url: str, opened: Open) -> None:
    page = opened(url)
    ask(page, "fake:token")
    done(page)
    by_token, fixed = texts(side(page, "Adapted")), texts(side(page, "Fixed"))
    assert side(page, "Adapted").locator(".chart").is_hidden()
    ask(page, "fake:demo", n=2)
    done(page)
    answer = completed(url, model="fake:demo", n=2)
    info, adapted = answer["rheostat"], side(page, "Adapted")
    assert texts(adapted) == written(answer) != by_token
    assert info["strategy"] in adapted.locator("> .note").inner_text()
    rows = adapted.locator(".chart li")
    for row, action in zip(rows.all(), by_randomness(NAMES), strict=True):
        name, share = row.locator(".name").inner_text(), row.locator(".share").inner_text()
        assert name == NAMES[action]
        assert (row.get_attribute("class") == "chosen") == (name == info["strategy"])
        drawn = row.locator("i").evaluate("bar => bar.getBoundingClientRect().width / bar.parentNode.clientWidth")
        assert drawn == pytest.approx(info["probabilities"][name], abs=0.01)
        if not share.startswith("<"):
            assert float(share.removesuffix(" %")) == pytest.approx(100 * info["probabilities"][name], abs=0.051)
    adapted.locator(".t").first.focus()
    assert page.locator("#card .shares").is_hidden()
    ask(page, "fake")
    done(page)
    assert side(page, "Adapted").count() == 0
    assert texts(side(page, "Fixed")) == fixed
    static = completed(url, model="fake", temperature=1, rheostat={"mode": "static", "trace": True})
    assert fixed == written(static)


def test_a_conversation_and_another_fixed_strategy(url: str, opened: Open) -> None:
    page = opened(url)
    page.check("#chat")
    page.fill("#fixed", "T=0.5,k=3,p=0.9,m=0.01")
    bodies = []
    page.on("request", lambda sent: bodies.append(sent.post_data_json))
    ask(page, "fake:token", "hello")
    done(page)
    common = {"model": "fake:token", "n": 3, "max_tokens": 9, "seed": 5, "stream": True}
    common["messages"] = [{"role": "user", "content": "hello"}]
    own = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.01}
    assert bodies == [
        {**common, "rheostat": {"mode": "adapt", "trace": True}},
        {**common, **own, "rheostat": {"mode": "static", "trace": True}},
    ]
    fields = {"prompt": None, "messages": [{"role": "user", "content": "hello"}]}
    adapted = completed(url, "chat/completions", model="fake:token", **fields)
    assert texts(side(page, "Adapted")) == written(adapted)
    fixed = completed(url, "chat/completions", model="fake", **fields, **own, rheostat={"trace": True})
    assert texts(side(page, "Fixed")) == written(fixed)


def test_a_problem_is_asked_and_judged(url: str, opened: Open) -> None:
    """The fake model answers 3 or 4."""
    task = procedural_task("count_bits")
    number = next(i for i, p in enumerate(task.problems(Split.TEST, 50), start=1) if p.answer == "4")
    problem = task.problems(Split.TEST, 1, number - 1)[0]
    prompt = task.prompt(problem)
    page = opened(url)
    page.select_option("#task", "count_bits")
    page.locator("#about", has_text="problem 1.").wait_for()
    page.fill("#number", str(number))
    page.keyboard.press("Control+Enter")  # from within the field: the prompt is that of the number even so
    done(page)
    assert page.input_value("#prompt") == prompt.text
    assert page.input_value("#b") == str(task.max_tokens)
    assert page.locator("#chat").is_disabled()
    ask(page, "fake:demo", None, n=8, b=12, seed=5)
    status = done(page)
    fields = {"prompt": prompt.text, "stop": list(prompt.stop), "n": 8, "max_tokens": 12}
    answers = {
        "Adapted": completed(url, model="fake:demo", **fields),
        "Fixed": completed(url, model="fake", temperature=1, rheostat={"mode": "static"}, **fields),
    }
    for title, answer in answers.items():
        wanted = []
        for choice in answer["choices"]:
            completion = Completion(choice["text"], (), FinishReason(choice["finish_reason"]))
            wanted.append(bool(task.verify(problem, completion).correct))
        right = sum(wanted)
        badges = side(page, title).locator(".badge").all_inner_texts()
        assert badges == ["✓ right" if one else "✗ wrong" for one in wanted]
        outcome = side(page, title).locator(".outcome").inner_text()
        assert outcome.startswith(f"{right} of 8 right · pass@8 of this run: {int(right > 0)}")
        assert f"{title}: {right} of 8 right." in status
    assert 0 < right < 8
    page.select_option("#task", "")
    ask(page, "fake:demo", n=1)
    assert done(page) == "Done."
    assert page.locator(".badge:not(:empty)").count() == 0


def test_stop_ends_both_runs(url: str, opened: Open) -> None:
    page = opened(url)
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
        ask(page, "fake:token", "a long one", n=4, b=500)
        side(page, "Fixed").locator(".t").nth(3).wait_for()
        stop()
        assert done(page) == "Stopped."
        assert page.locator(".t").count() < 4000
        end = time.monotonic() + 10
        while json.load(urllib.request.urlopen(f"{url}/health"))["running"]:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("fixed", "hot", "“hot” is not understood"),
        ("fixed", "T=1,T=2", "written twice"),
        ("fixed", "T=1,s=2", "“s=2” is not understood"),
        ("seed", "1.5", "Seed: write a whole number"),
    ],
)
def test_what_is_wrong_is_said_in_words(field: str, value: str, words: str, url: str, opened: Open) -> None:
    page = opened(url)
    page.fill("#prompt", "12 ")
    page.fill(f"#{field}", value)
    page.click("#run")
    page.locator("#error", has_text=words).wait_for()
    assert page.locator("#results").is_hidden()
    page.fill("#fixed", "0.5")
    page.fill("#seed", "1")
    page.click("#run")
    done(page)


def test_the_servers_errors_are_shown(url: str, opened: Open) -> None:
    page = opened(url, ready=False)  # the browser logs every answer of 400
    page.fill("#prompt", "12 ")
    page.fill("#fixed", "T=99")
    page.click("#run")
    page.locator("#error", has_text="temperature: Input should be less than or equal to 10").wait_for()
    page.fill("#fixed", "T=1")
    page.fill("#prompt", "1" * 4090)
    page.click("#run")
    page.locator("#error", has_text="the model's context holds 4096").wait_for()
    assert page.locator("#run").is_enabled()
    page.close()


def test_a_key_is_asked_for_where_it_is_needed(opened: Open) -> None:
    servers = started("--api-key", "sesame")
    page = opened(next(servers), ready=False)
    page.locator("#error", has_text="asks for its API key").wait_for()
    page.fill("#key", "wrong")
    page.keyboard.press("Tab")
    page.locator("#error", has_text="wrong or missing API key").wait_for()
    page.fill("#key", "sesame")
    page.keyboard.press("Tab")
    page.locator("#model option").first.wait_for(state="attached")
    ask(page, "fake")
    done(page)
    assert page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])") == '[{},{},""]'
    page.close()
    next(servers, None)


def test_every_field_has_a_name(url: str, opened: Open) -> None:
    page = opened(url)
    names = {"slider": ["Samples, B", "Tokens for each, b"], "combobox": ["Model", "Problem of a task"]}
    names |= {"textbox": ["Prompt", "Seed", "Fixed strategy"], "radio": ["text to continue", "a message to answer"]}
    for role, labels in names.items():
        assert page.get_by_role(role).count() == len(labels)
        for label in labels:
            assert page.get_by_role(role, name=label).count() == 1, label
    unnamed = "all => all.filter(field => !field.labels.length || !field.labels[0].textContent.trim()).length"
    assert page.locator("input, select, textarea").evaluate_all(unnamed) == 0
    assert page.locator("[role=status]").count() == page.locator("[role=alert]").count() == 1
