"""How text is laid out: tables, lists, indentation."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from lsmlab.terminal import clean

GAP = 2
"""Blanks between columns."""
PADDING = 2
"""By how much tabulate makes a column at least wider than its header."""


def duration(seconds: float) -> str:
    """`4.2 s`, `41 s`, `2 min 05 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02} s"


def plain(headers: Sequence[str], rows: Iterable[Sequence[object]], width: int | None = None) -> str:
    """Aligned columns under a ruled header; readable on a terminal and in a pipe.

    What is wider than `width` is folded between words, in the widest columns first; no word is broken.
    """
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    if width is None:
        return _table(headers, cells, "simple")
    widths = _fitting(headers, cells, width)
    names = _folded(headers, [w - PADDING for w in widths])
    return _table(names, [_folded(row, widths) for row in cells], "simple")


def _fitting(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """How wide each column may be: `width` in all, as far as the longest word of each allows."""
    widths, least = list[int](), list[int]()
    for header, *cells in zip(headers, *rows, strict=True):
        widths.append(max(len(header) + PADDING, *map(len, cells), 0))
        words = [len(word) for cell in cells for word in cell.split()]
        least.append(max(*(len(word) + PADDING for word in header.split()), *words, 0))
    while sum(widths) + GAP * (len(widths) - 1) > width:
        slack, widest = max((w if w > least[n] else 0, n) for n, w in enumerate(widths))
        if not slack:
            break
        widths[widest] -= 1
    return widths


def _folded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        "\n".join(textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False))
        for cell, width in zip(row, widths, strict=True)
    ]


def markdown(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of GitHub's Markdown; `|` and line ends inside a cell are kept from ending it."""
    cells = [[clean(str(cell)).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return _table(headers, cells, "github")


def _table(headers: Sequence[str], rows: list[list[str]], style: str) -> str:
    # What looks like a number stays as it was written: a digest may be 1e5, an id 007.
    return tabulate(rows, headers=list(headers), tablefmt=style, disable_numparse=True)


@dataclass(frozen=True, slots=True)
class Block:
    """A part, indented. Without rich's blanks at the end of lines, which a pipe would carry."""

    part: RenderableType
    indent: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self.part, options.update(width=options.max_width - self.indent), pad=False):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
            yield from (Segment(" " * self.indent if line else ""), *line, Segment.line())


Shown = str | Text | Table | None
"""A str is cleaned where it is laid out; the others are made of cleaned text already."""


def facts(*pairs: tuple[str, Shown]) -> Table:
    """Names and what they stand for, aligned; the empty ones are left out."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=10)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        if value:
            grid.add_row(name, Text(clean(value)) if isinstance(value, str) else value)
    return grid


def bullets(items: Iterable[Text]) -> Table | None:
    """A list whose items may be longer than a line; None for none."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    for item in items:
        grid.add_row("-", item)
    return grid if grid.rows else None
