"""From a matplotlib figure to an inline ``<svg>`` that serves light and dark pages: its colours are CSS variables.

A figure is drawn in stand-in colours, which ``to_svg`` swaps for the variables of the page. Text stays text, in the
page's font.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# name of the CSS variable: (on a light page, on a dark page)
THEME = {
    "paper": ("#fcfcfa", "#15171b"),
    "ink": ("#1d2026", "#e7e6e1"),
    "muted": ("#676b73", "#a2a6ae"),
    "faint": ("#a3a7ad", "#6d727b"),
    "rule": ("#dddcd6", "#32363d"),
    "accent": ("#0b63a8", "#6bb3f0"),
    "second": ("#b4571a", "#f0a06a"),
    "third": ("#00805f", "#4fc9a4"),
    "fourth": ("#a3457f", "#e294c8"),
}
_HUES = ("accent", "second", "third", "fourth")  # after Okabe and Ito: the colour-blind can tell them apart
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
MARKS = [  # of up to twelve adapters: (colour, marker, dash), no two alike in colour and marker
    (_HUES[index % 4], "os^DvPXp<>hd"[index], _DASHES[index // 4]) for index in range(12)
]
_SEQUENCE = {  # from greedy to hot; blue to red over pale blue and yellow, told apart by lightness and by hue
    "light": ("#2b4a8b", "#4f86c6", "#93bfdd", "#f0c24f", "#e8823a", "#a92c2c"),
    "dark": ("#4a6fc4", "#6aa3e0", "#a9d0ea", "#f3cd6b", "#ee9152", "#cf4a43"),
}
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rheostat",  # the same results, the same file
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 12.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
}


def strategy_colours(size: int) -> list[tuple[str, str]]:
    """``size`` colours for strategies ordered from greedy to hot, each for a light and for a dark page."""
    return [(_blend(_SEQUENCE["light"], index, size), _blend(_SEQUENCE["dark"], index, size)) for index in range(size)]


def _blend(anchors: Sequence[str], index: int, size: int) -> str:
    place = index * (len(anchors) - 1) / max(size - 1, 1)
    start = min(int(place), len(anchors) - 2)
    rest = place - start
    ends = [[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors[start : start + 2]]
    return "#" + "".join(f"{round((1 - rest) * a + rest * b):02x}" for a, b in zip(*ends, strict=True))


_STAND_INS = {name: f"#0101{index:02x}" for index, name in enumerate(THEME, start=1)}  # swapped for the variables


def colour(name: str) -> str:
    """The stand-in of a variable of ``THEME``, or of ``s0``, ``s1``, … for the strategies."""
    return _STAND_INS[name] if name in _STAND_INS else f"#0102{int(name.removeprefix('s')):02x}"


def to_svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as one element without scripts, metadata, namespaces or fixed colours; ids start with ``name``."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    variables = {stand_in: variable for variable, stand_in in _STAND_INS.items()}
    body = re.sub(r"#0101[0-9a-f]{2}", lambda m: f"var(--{variables[m[0]]})", body)
    body = re.sub(r"#0102([0-9a-f]{2})", lambda m: f"var(--s{int(m[1], 16)})", body)
    width, height = (size[1], size[2]) if size else ("760", "400")
    opening = (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{escape(label)}">'
    )
    return Markup(opening + body.strip() + "</svg>")  # matplotlib escapes every text it writes


def new_figure(width: int, height: float) -> Figure:
    """A figure in CSS pixels."""
    return Figure(figsize=(width / 72, height / 72))


def quiet(axes: Any, grid: str = "y") -> None:
    """Thin rules, no frame, muted tick labels."""
    for side in axes.spines.values():
        side.set_color(colour("rule"))
    axes.tick_params(length=0, pad=5, colors=colour("muted"), labelsize=11)
    if grid:
        axes.grid(axis=grid, color=colour("rule"), linewidth=0.8)
    axes.set_axisbelow(True)


_WIDE, _NARROW = 780, 356  # a desktop column and a phone screen, in CSS pixels
_LETTER = 7.4  # pixels of a letter of a legend, rather too many than too few


@dataclass(frozen=True, slots=True)
class Drawing:
    """One figure of a page.

    Attributes:
        name: unique on the page; that of its files.
        wide: for a desktop.
        narrow: for a phone.
        strategies: whose colours it has, from the least to the most random.
    """

    name: str
    wide: Markup
    narrow: Markup
    strategies: tuple[str, ...] = ()

    @classmethod
    def of(cls, draw: Callable[[int, str], Markup | None], name: str, strategies: Sequence[str] = ()) -> Self | None:
        """``draw`` takes a width and the name; None where it has nothing to draw."""
        wide, narrow = draw(_WIDE, name), draw(_NARROW, name)
        return None if wide is None or narrow is None else cls(name, wide, narrow, tuple(strategies))

    @property
    def palette(self) -> int:
        """How many colours the strategies of its part of the page have."""
        return max(len(self.strategies), 1)

    @property
    def file(self) -> str:
        """The desktop's drawing as a file of its own: the colours of a light page, on its paper, and what they mean."""
        ((width, drawn),) = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', self.wide)
        legend, room = self._legend(float(width), float(drawn))
        height = f"{float(drawn) + room:g}"
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        )
        text = re.sub(r'^<svg viewBox="[^"]*"', opening, self.wide)
        paper = f'<rect width="{width}" height="{height}" fill="var(--paper)"/>'
        text = text.replace(">", f">{paper}", 1).removesuffix("</svg>") + f"{legend}</svg>\n"
        return re.sub(r"var\(--(\w+)\)", lambda match: self._light(match[1]), text)

    def _legend(self, width: float, top: float) -> tuple[str, float]:
        """A square and a name for each strategy, below the drawing, and the room they take; nothing where the drawing
        itself names every strategy, or has none of their colours.
        """
        if "var(--s0)" not in self.wide or all(f">{escape(name)}<" in self.wide for name in self.strategies):
            return "", 0.0
        x, y, parts = 4.0, top + 12, []
        for place, name in enumerate(self.strategies):
            step = 32 + _LETTER * len(name)
            if x > 4 and x + step > width:
                x, y = 4.0, y + 20
            parts.append(
                f'<rect x="{x:g}" y="{y - 10:g}" width="11" height="11" fill="var(--s{place})"/>'
                f'<text x="{x + 17:g}" y="{y:g}" font-size="12" fill="var(--ink)">{escape(name)}</text>'
            )
            x += step
        return f'<g font-family="DejaVu Sans, sans-serif">{"".join(parts)}</g>', y + 12 - top

    def _light(self, variable: str) -> str:
        place = re.fullmatch(r"s(\d+)", variable)
        return strategy_colours(self.palette)[int(place[1])][0] if place else THEME[variable][0]
