"""`rheostat report`: one page of one run or several, its figures as files, and the model cards of their adapters."""

import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from rheostat.adapters.files import write_card
from rheostat.files import atomic_write, make_folder
from rheostat.reports.cards import measured_of
from rheostat.reports.figures.files import write_figures
from rheostat.reports.folders import adapters_of, read_run
from rheostat.reports.page import render


def report(folders: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Write ``report.html`` and ``figures/`` into ``out``; returns the paths of all that was written.

    An adapter inside the folder of its run gets its model card there, one from elsewhere in ``out/cards/``.

    Args:
        folders: what demo, train, evaluate or select wrote, interrupted or not; at least one.
        out: by default ``report`` inside the only folder, or ``report`` of the current one.

    Raises:
        ConfigError: runs that cannot stand on one page.
        StoreError: a folder that is no run, a damaged ``results.json``, a disk that refuses.
    """
    runs = [read_run(folder) for folder in folders]
    page = render(runs)
    out = make_folder(out or (folders[0] / "report" if len(folders) == 1 else Path("report")))
    atomic_write(out / "report.html", page.html)
    figures = write_figures(page.drawings, out / "figures")
    cards: list[Path] = []
    for run in runs:
        for folder, (results, policy) in adapters_of(run).items():
            is_inside = folder.resolve().is_relative_to(run.path.resolve())
            card = None if is_inside else _card(out / "cards", policy, cards)
            cards.append(write_card(folder, measured_of(results, policy), card))
    return {
        "report": str(out / "report.html"),
        "figures": [str(path) for path in figures],
        "cards": [str(path) for path in cards],
        "partial": [str(run.path) for run in runs if run.results is None or run.is_outdated],
    }


def _card(folder: Path, policy: str, taken: Sequence[Path]) -> Path:
    """A file of its own for the card of an adapter in whose folder nobody asked to write: its path in one word."""
    name = re.sub(r"[^\w.-]+", "-", policy).strip("-.") or "adapter"
    names = (f"{name}{'' if n == 1 else f'-{n}'}.md" for n in count(1))
    make_folder(folder)
    return next(path for path in (folder / one for one in names) if path not in taken)
