"""Token traces: one generation, its tokens coloured by the action that drew them and by the action that follows
(paper, appendix B.3), on a page and in the terminal.

A trace is plain data, as ``rheostat.evaluation.behaviour.trace`` makes it: ``prompt``, ``policy``, ``actions`` (names),
``budget`` (tokens), ``parallel_budget``, ``finish_reason``, ``correct``, ``text``, and ``tokens``, each with ``text``,
``action``, ``pi`` (of every action), ``entropy`` (nats), ``p_max``, ``probability`` (μ of the token) and ``remaining``
(tokens). What is missing is shown as missing.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.color import Color
from rich.console import Console, ConsoleOptions
from rich.style import Style
from rich.text import Text

from rheostat.files import atomic_write
from rheostat.reports import reading, template
from rheostat.reports.figures import svg
from rheostat.reports.reading import MISSING, count, number, percent

Trace = Mapping[str, Any]

SURE = 0.95  # of p_max: above it every action draws nearly the same token
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_LONG_PROMPT = 600  # characters; a longer prompt is folded on the page


def write_trace(traces: Trace | Sequence[Trace], path: Path) -> None:
    """Render one trace, or several, as one HTML file that needs no network, and write it atomically.

    Args:
        traces: as described above.
        path: the file to write; its folder must exist.

    Raises:
        StoreError: the file cannot be written.
    """
    found = [traces] if isinstance(traces, Mapping) else list(traces)
    views = [view(trace) for trace in found]
    palettes = template.palettes({len(one["legend"]) for one in views})
    atomic_write(path, template.render("trace_page.html.jinja", traces=views, palettes=palettes))


def view(trace: Trace) -> dict[str, Any]:
    """What the page shows of a trace; actions are ordered from greedy to hot, as everywhere in the report."""
    names = [str(name) for name in trace.get("actions") or ()]
    order = reading.by_randomness(names)
    place = {action: index for index, action in enumerate(order)}
    tokens = reading.items(trace, "tokens")
    current, following = _coloured(tokens, len(names)), _next(tokens, len(names))
    used = [sum(action == index for action in current) for index in order]
    prompt = str(trace.get("prompt") or "")
    return {
        "title": safe(trace.get("policy") or "unnamed policy"),
        "facts": _facts(trace, len(tokens)),
        "prompt": safe(prompt),
        "is_long": len(prompt) > _LONG_PROMPT,
        "legend": [(safe(names[index]), amount) for index, amount in zip(order, used, strict=True)],
        "sure": sum(_is_sure(token) for token in tokens),
        "tokens": [
            (visible(token.get("text")), None if a is None else place[a], None if b is None else place[b])
            for token, a, b in zip(tokens, current, following, strict=True)
        ],
        "data": json.dumps([_detail(tokens, index, names, order) for index in range(len(tokens))]),
    }


def safe(text: object) -> str:
    """Text in which no character steers the terminal or the direction of writing: such a one is shown as its number."""
    return "".join(f"⟨{ord(character):04X}⟩" if _steers(character) else character for character in str(text or ""))


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character not in "\n\t\u200c\u200d"


def visible(text: object) -> str:
    """A token's text in which line ends, tabs, and spaces that stand alone or in rows can be seen."""
    text = safe(text)
    if not text:
        return "∅"
    text = re.sub(r"^ +$|  +", lambda spaces: "␣" * len(spaces[0]), text)
    return text.replace("\n", "↵\n").replace("\t", "⇥\t")


def _is_sure(token: Mapping[str, Any]) -> bool:
    p_max = number(token.get("p_max"))
    return p_max is not None and p_max > SURE


def _action(token: Mapping[str, Any], size: int) -> int | None:
    action = number(token.get("action"))
    return int(action) if action is not None and 0 <= action < size else None


def _coloured(tokens: Sequence[Mapping[str, Any]], size: int) -> list[int | None]:
    """The action of each token, None where it hardly matters."""
    return [None if _is_sure(token) else _action(token, size) for token in tokens]


def _next(tokens: Sequence[Mapping[str, Any]], size: int) -> list[int | None]:
    """The action of the token that follows each; whether it matters is decided where it acts."""
    return [*_coloured(tokens, size)[1:], None] if tokens else []


def _facts(trace: Trace, length: int) -> list[str]:
    """Verdict, end, and budgets, in words."""
    correct = trace.get("correct")
    tokens = f"{count(length)} token{'' if length == 1 else 's'}"
    end = {"stop": f"ended by itself after {tokens}", "length": f"cut off after {tokens}"}
    budget, parallel = number(trace.get("budget")), number(trace.get("parallel_budget"))
    facts = [
        "answer right" if correct is True else "answer wrong" if correct is False else "answer not judged",
        end.get(str(trace.get("finish_reason")), tokens),
        f"token budget {count(budget)}" if budget is not None else "",
        f"parallel budget B = {count(parallel)}" if parallel is not None else "",
    ]
    return [fact for fact in facts if fact]


def _detail(tokens: Sequence[Mapping[str, Any]], index: int, names: Sequence[str], order: Sequence[int]) -> list[Any]:
    """One token's card: text, action, next action, rows of (name, value), probabilities of the actions in percent."""
    token = tokens[index]
    own = _action(token, len(names))
    following = _action(tokens[index + 1], len(names)) if index + 1 < len(tokens) else None
    pi = reading.probabilities(token.get("pi"), len(names))
    entropy, remaining = number(token.get("entropy")), number(token.get("remaining"))
    return [
        visible(token.get("text")).replace("\n", "").replace("\t", "").replace(" ", "␣"),
        None if own is None else order.index(own),
        None if following is None else order.index(following),
        MISSING if entropy is None else f"{entropy:.2f} nats",
        _share(token.get("p_max")),
        _share(token.get("probability")),
        MISSING if remaining is None else f"{count(remaining)} token{'' if remaining == 1 else 's'}",
        None if pi is None else [round(100 * pi[action], 1) for action in order],
        _is_sure(token),
    ]


def _share(value: object) -> str:
    """A probability in percent; one that is not zero is not written as zero."""
    known = number(value)
    if known is None:
        return MISSING
    return "< 0.1 %" if 0 < known < 0.0005 else f"{percent(known)} %"


def render_trace(trace: Trace) -> "TerminalTrace":
    """The trace as something that ``rich`` prints."""
    return TerminalTrace(trace)


class TerminalTrace:
    """Prompt, legend, and the text twice: coloured by the current action, then by the next.

    A terminal without colours (a pipe, NO_COLOR) gets the number of the action after each token that has one.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._names = [str(name) for name in trace.get("actions") or ()]
        order = reading.by_randomness(self._names)
        palette = [dark for _, dark in svg.strategy_colours(len(order))]
        self._tints = {action: palette[place] for place, action in enumerate(order)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """What is printed, in order."""
        is_plain = console.no_color or console.color_system is None
        tokens = reading.items(self._trace, "tokens")
        title = Text(safe(self._trace.get("policy") or "unnamed policy"), style="bold")
        yield title.append(": " + ", ".join(_facts(self._trace, len(tokens))), style="not bold")
        yield self._legend(is_plain)
        prompt = str(self._trace.get("prompt") or "")
        if prompt:
            yield Text("\n" + safe(prompt), style="dim")
        size = len(self._names)
        for what, actions in (("current", _coloured(tokens, size)), ("next", _next(tokens, size))):
            yield Text(f"\n{'Marked' if is_plain else 'Coloured'} by the {what} action", style="bold")
            yield self._text(tokens, actions, is_plain)

    def _legend(self, is_plain: bool) -> Text:
        out = Text()
        for action, name in enumerate(self._names):
            name = safe(name)
            if is_plain:
                out.append(f"{_mark(action)} {name}   ")
            else:
                out.append(f" {action} {name} ", self._style(action)).append("  ")
        what = "unmarked" if is_plain else "uncoloured"
        return out.append(f"{what}: one token has more than {100 * SURE:.0f} %, the action hardly matters")

    def _text(self, tokens: Sequence[Mapping[str, Any]], actions: Sequence[int | None], is_plain: bool) -> Text:
        out = Text()
        for token, action in zip(tokens, actions, strict=True):
            if action is None:
                out.append(safe(token.get("text")))
                continue
            text = visible(token.get("text"))
            if is_plain:
                body = text.rstrip("\n")
                out.append(body + _mark(action) + text[len(body) :])
            else:
                out.append(text, self._style(action))
        return out if out.plain else Text("(no tokens)", style="dim")

    def _style(self, action: int) -> Style:
        """Dark or light letters on the action's colour: legible whatever the terminal's own background is."""
        tint = Color.parse(self._tints[action])
        weights = (0.2126, 0.7152, 0.0722)
        luminance = sum(w * (part / 255) ** 2.2 for w, part in zip(weights, tint.get_truecolor(), strict=True))
        return Style(color="#000000" if luminance > 0.179 else "#ffffff", bgcolor=tint)  # equal contrast to both


def _mark(action: int) -> str:
    return str(action).translate(_SUBSCRIPTS)
