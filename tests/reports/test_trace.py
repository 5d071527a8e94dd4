import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_page import Page
from test_token_page import fake_trace

from rheostat.errors import StoreError
from rheostat.reports.figures import svg
from rheostat.reports.trace import render_trace, visible, write_trace

ACTIONS = ["T=1", "greedy", "T=0.5"]  # from greedy to hot: 1, 2, 0


def token(text: str, action: int, p_max: float = 0.5, **extra: object) -> dict[str, Any]:
    numbers = {"entropy": 1.25, "p_max": p_max, "probability": 0.25, "remaining": 8}
    return {"text": text, "action": action, "pi": [0.25, 0.7, 0.05]} | numbers | extra


def trace(*tokens: dict[str, Any], **extra: object) -> dict[str, Any]:
    named = {"prompt": "What is it?\n", "policy": "adapter with budget", "actions": ACTIONS, "budget": 16}
    rest = {"parallel_budget": 4, "finish_reason": "stop", "correct": True, "text": "", "tokens": list(tokens)}
    return named | rest | extra


def written(traces: Any, folder: Path) -> tuple[str, Page]:
    write_trace(traces, folder / "trace.html")
    text = (folder / "trace.html").read_text(encoding="utf-8")
    return text, Page(text)


class Tokens(Page):
    """The (text, colour now, colour of the next) of every token, and the data of the card."""

    def __init__(self, text: str) -> None:
        self.found: list[list[str | None]] = []
        self.data: list[list[Any]] = []
        super().__init__(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        given = dict(attrs)
        if given.get("data-tokens"):
            self.data = json.loads(str(given["data-tokens"]))
        if given.get("class") == "t":
            colours = re.fullmatch(r"--c:(.*);--n:(.*)", str(given["style"]))
            assert colours
            self.found.append(["", colours[1], colours[2]])

    def handle_data(self, data: str) -> None:
        super().handle_data(data)
        if self.open and self.open[-1] == "span" and self.found and "".join(self.open).endswith("divspan"):
            self.found[-1][0] = str(self.found[-1][0]) + data


def printed(content: dict[str, Any], **options: Any) -> str:
    console = Console(width=80, **options)
    with console.capture() as capture:
        console.print(render_trace(content))
    return capture.get()


SHOWN = trace(token("12", 1), token(" is", 0, p_max=0.96), token(" the\n", 2), token("  ", 0), token("x", 1))


def test_each_token_has_the_colour_of_its_action_and_of_the_next(tmp_path: Path) -> None:
    page = Tokens(written(SHOWN, tmp_path)[0])
    none = "transparent"
    assert page.found == [
        ["12", "var(--s0)", none],  # what follows is sure: the action hardly matters
        [" is", none, "var(--s1)"],
        [" the↵\n", "var(--s1)", "var(--s2)"],
        ["␣␣", "var(--s2)", "var(--s0)"],
        ["x", "var(--s0)", none],
    ]


def test_the_card_has_the_numbers_of_its_token(tmp_path: Path) -> None:
    content = trace(token(" a", 2, remaining=1, probability=0.0001), token("b", 0, p_max=0.951))
    page = Tokens(written(content, tmp_path)[0])
    pi = [70.0, 5.0, 25.0]  # in percent, from greedy to hot
    assert page.data == [
        ["␣a", 1, 2, "1.25 nats", "50.0 %", "< 0.1 %", "1 token", pi, False],
        ["b", 2, None, "1.25 nats", "95.1 %", "25.0 %", "8 tokens", pi, True],
    ]
    text = written(content, tmp_path)[1].words
    for fact in ("answer right", "ended by itself after 2 tokens", "token budget 16", "parallel budget B = 4"):
        assert fact in text


def test_a_page_needs_no_network_and_escapes(tmp_path: Path) -> None:
    hostile = "</script><script>alert('&amp;\"')</script>"
    content = trace(token(hostile, 0), prompt=hostile, policy=hostile, actions=[hostile, *ACTIONS[1:]])
    text, page = written([content, SHOWN], tmp_path)
    assert page.tags.count("script") == 1
    assert page.tags.count("article") == 2
    assert "<script>alert" not in text
    assert page.words.count(hostile) >= 4
    assert "://" not in text
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))


def test_empty_and_short_traces(tmp_path: Path) -> None:
    assert "No tokens were written." in written(trace(), tmp_path)[1].words
    assert "Token trace" in written([], tmp_path)[1].words
    assert "ended by itself after 1 token ·" in written(trace(token("a", 0)), tmp_path)[1].words
    written([{}, {"tokens": [{}]}, trace(token("a", 7, pi=[0.5])), trace(token("", -1, p_max=None))], tmp_path)
    assert printed(trace(), color_system=None).count("(no tokens)") == 2
    for content in ({}, {"tokens": [{}]}, trace(token("a", 7)), trace(token("", 0))):
        printed(content, color_system=None)
        printed(content, color_system="truecolor", force_terminal=True)
    with pytest.raises(StoreError):
        write_trace(trace(), tmp_path / "missing" / "trace.html")


@pytest.mark.parametrize("options", [{"color_system": None}, {"no_color": True, "force_terminal": True}])
def test_without_colour_actions_are_marked_by_their_number(options: dict[str, Any]) -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", printed(SHOWN, **options))
    assert "₀ T=1   ₁ greedy   ₂ T=0.5" in text
    current, following = text.split("Marked by the current action")[1].split("Marked by the next action")
    assert current.strip() == "12₁ is the↵₂\n␣␣₀x₁"
    assert following.strip() == "12 is₂ the↵₀\n␣␣₁x"
    assert text.index("What is it?") < text.index("Marked by")


def test_with_colour_actions_have_a_background() -> None:
    text = printed(SHOWN, color_system="truecolor", force_terminal=True)
    greedy = ";".join(str(int(svg.strategy_colours(3)[0][1][i : i + 2], 16)) for i in (1, 3, 5))
    assert re.search(rf"\x1b\[[\d;]*48;2;{greedy}m12\x1b\[0m is", text.split("current action")[1])
    assert "₁" not in text
    assert "\x1b[2m" in text  # the prompt


def test_nothing_in_a_token_steers_the_terminal(tmp_path: Path) -> None:
    content = trace(token("\x1b[31m\u202e\x9b", 0), prompt="\x1b]0;x\x07", policy="\x1bc", actions=["\x1b[2J"] * 3)
    text = printed(content, color_system=None)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "⟨001B⟩[31m⟨202E⟩⟨009B⟩₀" in text
    assert "\x1b" not in written(content, tmp_path)[0]


def test_whitespace_can_be_seen() -> None:
    assert [visible(text) for text in (" ", "  a", " a b", "\n\n", "\t", "")] == [
        "␣",
        "␣␣a",
        " a b",
        "↵\n↵\n",
        "⇥\t",
        "∅",
    ]


def luminance(tint: tuple[float, ...]) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in tint)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def rgb(text: str) -> tuple[float, ...]:
    return tuple(float(int(text[i : i + 2], 16)) for i in (1, 3, 5))


def test_letters_stand_out_from_every_colour(tmp_path: Path) -> None:
    text, _ = written(SHOWN, tmp_path)
    mixed = re.search(r"\.t \{[^}]*color-mix\(in srgb, var\(--t\) (\d+)%", text)
    assert mixed
    share = int(mixed[1]) / 100
    for size, side in itertools.product(range(1, 9), (0, 1)):
        for pair in svg.strategy_colours(size):
            paper, ink = rgb(svg.THEME["paper"][side]), rgb(svg.THEME["ink"][side])
            tinted = tuple(share * a + (1 - share) * b for a, b in zip(rgb(pair[side]), paper, strict=True))
            assert contrast(ink, tinted) > 4.5


def test_letters_stand_out_in_the_terminal() -> None:
    for size in range(1, 9):
        names = [f"T={0.1 * (index + 1):.1f}" for index in range(size)]
        view = render_trace(trace(actions=names))
        for action in range(size):
            style = view._style(action)
            assert style.color
            assert style.bgcolor
            assert contrast(tuple(style.color.get_truecolor()), tuple(style.bgcolor.get_truecolor())) > 4.5


def test_writing_is_repeatable(tmp_path: Path) -> None:
    content = fake_trace(random.Random(3))
    assert written(content, tmp_path)[0] == written([content], tmp_path)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.html"]
