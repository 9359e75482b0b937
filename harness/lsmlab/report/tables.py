"""Lists of labs, scenarios and images, as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from lsmlab.report.text import clean


def plain(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns under a ruled header; readable on a terminal and in a pipe."""
    return _table(headers, [[clean(str(cell)) for cell in row] for row in rows], "simple")


def markdown(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of GitHub's Markdown; `|` and line ends inside a cell are kept from ending it."""
    cells = [[clean(str(cell)).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return _table(headers, cells, "github")


def _table(headers: Sequence[str], rows: list[list[str]], style: str) -> str:
    # What looks like a number stays as it was written: a digest may be 1e5, an id 007.
    return tabulate(rows, headers=list(headers), tablefmt=style, disable_numparse=True)
