"""The report's table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rheostat.reports import reading
from rheostat.reports.reading import Results

_NAME_WIDTH = 25


def summary_table(results: Results) -> Table:
    """Policies down, budgets across: percent solved and below it the 95 % interval, the best of each column in bold.

    Fits 100 columns with up to four budgets and their mean.
    """
    content = reading.table(results)
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left", caption_justify="left")
    level = "Token level: p" if reading.levels(results) == ["token"] else "P"
    out.title = f"{level}roblems solved with B samples, in %, and the 95 % interval"
    out.caption = "bold: best of its column   *: the best single strategy on validation"
    out.add_column("policy", max_width=_NAME_WIDTH, overflow="fold")
    columns = [k for k in content.columns if k != "area"]  # it is on the page, which has more room
    for k in columns:
        out.add_column("mean" if k == "mean" else f"B = {k}", justify="right", no_wrap=True)
    section = None
    for line in content.lines:
        group = "static" if line.kind == "static" else "other"
        if section not in (None, group):
            out.add_section()
        section = group
        name = escape(line.policy) + (" *" if line.single else "")
        name = f"[bold]{name}[/bold]" if line.kind == "adapter" else name
        name += f"\n[dim]{line.what}[/dim]" if line.what else ""
        name += "\n[dim]unreachable (hindsight)[/dim]" if line.kind == "oracle" else ""
        out.add_row(name, *map(_cell, line.cells[: len(columns)]))
    return out


def _cell(cell: reading.Cell) -> str:
    text = reading.percent(cell.estimate)
    text = f"[bold]{text}[/bold]" if cell.best else text
    return f"{text}\n[dim]{cell.interval}[/dim]" if cell.interval else text


def policy_table(results: Results) -> Table:
    """Fixed strategies: percent solved with k samples, the 95 % interval, cut answers, tokens."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left", caption_justify="left")
    counts = results["counts"]
    out.title = f"{results['task']}, test split: problems solved with k samples, in %"
    out.caption = f"{counts['rollouts']} completions, {counts['truncated']} cut by the token budget, " + (
        f"{counts['without_verdict']} without a verdict (counted as wrong)"
    )
    for name in ("policy", "problems of", "k", "solved", "95 %", "n", "cut", "tokens"):
        out.add_column(name, justify="left" if name in ("policy", "problems of") else "right", overflow="fold")
    for row in results["rows"]:
        out.add_row(
            escape(row["policy"]),
            row["group"],
            str(row["k"]),
            reading.percent(row["estimate"]),
            reading.interval(row["low"], row["high"]),
            str(row["problems"]),
            f"{100 * row['truncated']:.0f} %",
            f"{row['tokens']:.0f}",
        )
    return out


def selection_table(results: Results) -> Table:
    """The chosen strategies in order, beside the best by mean, and what the first 1, 2, … cover on other problems."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left", caption_justify="left")
    out.title = f"{results['task']}, validation: chosen by greedy coverage of {results['objective']}"
    out.caption = "coverage in %, the last two with 95 % intervals, on problems that the choice has not seen"
    for name in ("", "chosen", "covers", "top by mean", "greedy, others", "top, others"):
        out.add_column(name, justify="left" if name in ("chosen", "top by mean") else "right")
    pairs = zip(results["greedy"]["strategies"], results["top"]["strategies"], strict=True)
    for number, (greedy, top) in enumerate(pairs):
        held = [results["held_out"][name][number] for name in ("greedy", "top")]
        shown = [f"{reading.percent(mean)} ({reading.interval(low, high)})" for mean, low, high in held]
        covers = f"{100 * results['greedy']['coverage'][number]:.1f}"
        out.add_row(str(number + 1), escape(greedy), covers, escape(top), *shown)
    return out


def task_page(shown: Mapping[str, Any]) -> Group:
    """What `rheostat tasks show` prints."""
    lines = [f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in shown.items() if name != "samples"]
    samples = [
        Panel(
            Text(f"{sample['prompt']}"), title=escape(sample["id"]), subtitle=escape(f"answer: {sample['answer']}"[:90])
        )
        for sample in shown["samples"]
    ]
    return Group(*map(Text, lines), *samples)


def check_page(checked: Mapping[str, Any]) -> Group:
    """What `rheostat tasks check` prints."""
    share = checked["accepted"] / checked["with_solution"]
    lines = [
        f"{checked['task']}: {checked['with_solution']} of {checked['problems']} problems carry a solution",
        f"accepted {checked['accepted']} ({100 * share:.2f} %), failed {checked['failed']}, "
        f"without a verdict {checked['without_verdict']}",
    ]
    return Group(*map(Text, lines), *(Text(f"  {row['id']}: {row['why']}") for row in checked["first_failing"]))


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return str(value)
