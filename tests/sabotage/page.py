"""The table of docs/verdicts.md, from the cases. `python tests/sabotage/page.py` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

from cases import CASES
from tabulate import tabulate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "verdicts.md"
BEGIN, END = "<!-- made by tests/sabotage/page.py -->\n", "<!-- end -->"


def table() -> str:
    """The cases as a Markdown table, in their order."""
    rows = [
        (
            case.breaks,
            case.role.value,
            ", ".join(framework.display for framework in case.frameworks),
            f"`{case.verdict}`",
        )
        for case in CASES
    ]
    head = ("what is broken", "in which arm", "frameworks", "what has to be said")
    count = sum(len(case.frameworks) for case in CASES)
    return (
        f"\n{len(CASES)} cases, {count} with both frameworks counted.\n\n{tabulate(rows, head, tablefmt='github')}\n\n"
    )


def renewed(page: str) -> str:
    """The page with the table as it is to be."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: the table's place is not marked")
    return before + begin + table() + end + after


def names(page: str) -> set[str]:
    """The verdicts that the page has a section for."""
    return set(re.findall(r"^### `([A-Z_]+)`$", page, re.MULTILINE))


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text("utf-8")), "utf-8")
