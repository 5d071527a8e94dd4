"""The report's table for the terminal."""

from rich import box
from rich.markup import escape
from rich.table import Table

from rheostat.reports import reading
from rheostat.reports.reading import MISSING, Results

_NAME_WIDTH = 25


def summary_table(results: Results) -> Table:
    """Policies down, budgets across: percent solved ± half of the 95 % interval, the best of each column in bold.

    Fits 100 columns with up to four budgets and their mean.
    """
    content = reading.table(results)
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left", caption_justify="left")
    level = "Token level: p" if reading.is_token(results) else "P"
    out.title = f"{level}roblems solved with B samples, in % ± half of the 95 % interval"
    out.caption = "bold: best of its column   *: the best single strategy on validation"
    out.add_column("policy", max_width=_NAME_WIDTH, overflow="fold")
    for k in content.columns:
        out.add_column("mean" if k == "mean" else f"B = {k}", justify="right", no_wrap=True)
    section = None
    for line in content.lines:
        group = "static" if line.kind == "static" else "other"
        if section not in (None, group):
            out.add_section()
        section = group
        name = escape(line.policy) + (" *" if line.single else "")
        name = f"[bold]{name}[/bold]" if line.kind == "adapter" else name
        cells = [MISSING if cell.estimate is None else cell.text for cell in line.cells]
        marked = [f"[bold]{text}[/bold]" if cell.best else text for text, cell in zip(cells, line.cells, strict=True)]
        out.add_row(name, *marked)
    return out
