"""The figures of a page as files: what a paper or a slide takes."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from rheostat.files import atomic_write, make_folder
from rheostat.reports.figures.svg import Drawing


def write_figures(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """``NAME.svg`` and ``NAME.png`` (of twice the size) of every drawing; returns the paths.

    Raises:
        StoreError: the folder cannot be made or written.
    """
    import resvg_py  # here: the one place that needs it

    fonts = [str(Path(matplotlib.get_data_path()) / "fonts" / "ttf")]  # text is drawn on a machine without fonts
    written = []
    for drawing in drawings:
        image = resvg_py.svg_to_bytes(
            svg_string=drawing.file, zoom=2, font_dirs=fonts, font_family="DejaVu Sans", sans_serif_family="DejaVu Sans"
        )
        make_folder(folder)
        for suffix, content in ((".svg", drawing.file), (".png", bytes(image))):
            written.append(folder / f"{drawing.name}{suffix}")
            atomic_write(written[-1], content)
    return written
