"""What the commands say on the terminal: progress with rate and remaining time, and plain lines where there is none."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_EVERY = 10.0  # seconds between plain lines


class Step(Protocol):
    """Called with what is done, the total, and a count whose rate is shown (tokens generated so far)."""

    def __call__(self, done: int, total: int, counted: int, /) -> None: ...


class Console:
    """Talks on stderr, so that stdout holds results only.

    Args:
        quiet: say nothing but errors.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.rich = RichConsole(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        self.rich.print(line, markup=False)

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Step]:
        """A bar (a line every ten seconds where stderr is no terminal) with rate and remaining time."""
        start = time.monotonic()
        if self.rich.is_terminal and not self.rich.quiet:
            columns = (
                TextColumn("{task.description:<26}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
            )
            with Progress(*columns, console=self.rich) as bar:
                task = bar.add_task(what, total=total, rate="")
                yield lambda done, total, counted: bar.update(
                    task, completed=done, total=total, rate=_rate(counted, unit, start)
                )
            return
        yield _plain(self.say, what, unit, start)
        self.say(f"{what}: {total} done in {timedelta(seconds=round(time.monotonic() - start))}")


def _rate(counted: int, unit: str, start: float) -> str:
    seconds = time.monotonic() - start
    return f"{counted / seconds:,.0f} {unit}/s" if counted and seconds > 0 else ""


def _plain(say: Callable[[str], None], what: str, unit: str, start: float) -> Step:
    last = start

    def step(done: int, total: int, counted: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY and done < total:
            last = now
            left = timedelta(seconds=round((now - start) / max(done, 1) * (total - done)))
            say(
                ", ".join(
                    part for part in (f"{what}: {done}/{total}", _rate(counted, unit, start), f"{left} left") if part
                )
            )

    return step
