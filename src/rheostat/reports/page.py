"""``report.html``: one self-contained page that says what a run learned or chose, and how it was measured."""

from pathlib import Path

from rheostat.errors import StoreError
from rheostat.files import atomic_write
from rheostat.reports import reading, selection, template
from rheostat.reports.headline import headline
from rheostat.reports.level import details, level
from rheostat.reports.reading import Results

FORMAT = 1  # of results.json


def sentence(results: Results) -> str:
    """What was learned or chosen, in plain words, with the numbers and their interval; also of ``results["token"]``."""
    return str(selection.headline(results) if _is_selection(results) else headline(results))


def _is_selection(results: Results) -> bool:
    return results.get("kind") == "selection"


def write_report(results: Results, path: Path) -> None:
    """Render the results of a run as one HTML file that needs no network, and write it atomically.

    Args:
        results: the content of ``results.json``, of a selection or of either level; the token level may also stand
            under ``token``.
        path: the file to write; its folder must exist.

    Raises:
        StoreError: the results have another format, or the file cannot be written.
    """
    atomic_write(path, render(results))


def render(results: Results) -> str:
    """The page as text; what the results lack is left out."""
    if results.get("format") != FORMAT:
        raise StoreError(
            f"results: format {results.get('format')!r} is not the format {FORMAT} that this rheostat reads; "
            "write the report with the version that made the results"
        )
    if _is_selection(results):
        return selection.render(results)
    token = reading.mapping(results, "token")
    shared = {key: results.get(key) for key in ("model", "task", "order")}
    levels = [level(results)] + ([level(shared | dict(token) | {"kind": "token"})] if token else [])
    sizes = {one.palette for one in levels} | {len(trace["legend"]) for one in levels for trace in one.traces}
    return template.render(
        "page.html.jinja", levels=levels, palettes=template.palettes(sizes), details=details(results)
    )
