"""The templates of the pages, and what they may call."""

import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rheostat.reports.figures import svg
from rheostat.reports.headline import in_words
from rheostat.reports.reading import count, interval, percent, points, titled


def render(template: str, **values: object) -> str:
    """A page. Values are escaped; a name that the template needs and does not get is an error."""
    environment = Environment(
        loader=PackageLoader("rheostat", "reports/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, points=points, count=count, interval=interval, in_words=in_words)
    environment.filters.update(tight=_tight, breakable=_breakable, titled=titled)
    return environment.get_template(template).render(theme=svg.THEME, **values)


def palettes(sizes: set[int]) -> dict[int, list[tuple[str, str]]]:
    """The colours of every number of strategies that a page shows."""
    return {size: svg.strategy_colours(size) for size in sorted(sizes)}


def _tight(text: str) -> str:
    """Keep a number and its percent sign on one line."""
    return text.replace(" %", "\u00a0%")


def _breakable(name: str) -> Markup:
    """Let a long name break after its commas, underscores and slashes."""
    return Markup("<wbr>").join(re.findall(r"[^,_/]*[,_/]?", name))
