"""Markdown of what people wrote: escaped, linked, laid out. The same input gives the same text, without times."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lsmlab.catalogue import Catalogue, Entry, Seen
from lsmlab.selection import verdict_words
from lsmlab.terminal import clean
from lsmlab.terms import Control, Framework

MADE = "<!-- Made by `lsmlab catalogue`: change the scenarios and run them, not this page. -->"
_CODE = re.compile(r"(`[^`\n]+`)")
_SPECIAL = re.compile(r"[\\`*\[\]<>~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
_OPENS = re.compile(r"^(?=[#+>=-])|^(\d+)(?=[.)])")


def prose(text: str) -> str:
    """`text` as it was written, on one line: nothing in it acts as Markdown or HTML, but for `code`."""
    line = " ".join(clean(text).split())
    parts = (p if _CODE.fullmatch(p) else _SPECIAL.sub(lambda m: f"\\{m[0]}", p) for p in _CODE.split(line))
    return _OPENS.sub(lambda m: f"{m[1]}\\" if m[1] else "\\", "".join(parts))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of GitHub's Markdown, not aligned: one changed cell changes one line of a page that is kept in git."""
    lines = [headers, ["---"] * len(headers), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def technique_link(technique: str) -> str:
    """A link to MITRE's page of a technique."""
    return f"[{technique}](https://attack.mitre.org/techniques/{technique.replace('.', '/')}/)"


def folder_link(entry: Entry, out: Path, words: str) -> str:
    """A link from a page in `out` to the scenario's folder."""
    target = Path(os.path.relpath(entry.folder.resolve(), out.resolve())).as_posix()
    return f"[{words}](<{target}>)" if re.search(r"[\s()<>]", target) else f"[{words}]({target})"


def verdict_seen(entry: Entry, framework: Framework, lab: str) -> str:
    """What was seen on a lab; another verdict than the expected one is bold."""
    expected, seen = entry.expected(framework, lab), entry.seen.get((framework, lab))
    if expected is None:
        return "-"
    if seen is None:
        return "not run"
    verdict = str(seen.outcome.verdict)
    return f"{verdict if seen.outcome.verdict is expected else f'**{verdict}**'}{age(seen)}"


def age(seen: Seen) -> str:
    """What is added where the scenario was changed since."""
    return "" if seen.current else " (of an older version)"


def catalogue_page(catalogue: Catalogue, out: Path) -> str:
    """`catalogue.md`: every scenario, grouped by what it teaches."""
    parts = [MADE, "# Scenarios", _introduction(catalogue, out), *_overview(catalogue)]
    for group, entries in catalogue.groups.items():
        parts.append(f"## {prose(group)}")
        parts += [part for entry in entries for part in _scenario(entry, out)]
    return "\n\n".join(parts) + "\n"


def _introduction(catalogue: Catalogue, out: Path) -> str:
    frameworks = [(e, f) for e in catalogue.entries for f in Framework if f in e.scenario.expected]
    cells = [(e, f, lab) for e, f in frameworks for lab in e.labs]
    ran = [(e, f, lab) for e, f, lab in cells if (f, lab) in e.seen]
    verdicts = Counter(str(e.seen[f, lab].outcome.verdict) for e, f, lab in ran)
    other = sum(e.seen[f, lab].outcome.verdict is not e.expected(f, lab) for e, f, lab in ran)
    old = sum(not e.seen[f, lab].current for e, f, lab in ran)
    counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(verdicts.items()))
    said = [
        f"{len(catalogue.entries)} scenarios on {len(catalogue.labs)} labs: {len(cells)} outcomes are expected,",
        f"{len(ran)} were seen{f' ({counts})' if counts else ''}, {len(cells) - len(ran)} were not run.",
        "Every verdict below was seen in a run; what is expected is only set beside it.",
        "A verdict in bold is not the expected one.",
    ]
    if other:
        said.append(f"{other} of those seen are not as expected.")
    if old:
        said.append(f"{old} of them are of an older version of their scenario.")
    said.append("Who contains what is in [comparison.md](comparison.md).")
    if (out / "design.md").is_file():
        said.append("What a verdict means is in [design.md](design.md#from-attempts-to-a-verdict).")
    return " ".join(said)


def _overview(catalogue: Catalogue) -> Iterator[str]:
    rows = []
    for group, entries in catalogue.groups.items():
        for entry in entries:
            seen = [_across(entry, framework) for framework in Framework]
            name = entry.scenario.id
            where = f"[{prose(group)}](#{anchor(group)})"
            rows.append((f"[{name}](#{anchor(name)})", where, entry.scenario.difficulty, *seen))
    yield "## Overview"
    yield table(("scenario", "lesson", "difficulty", *(f"{f.display}, seen" for f in Framework)), rows)
    tags: dict[str, list[str]] = {}
    for entry in catalogue.entries:
        for tag in entry.scenario.tags:
            tags.setdefault(tag, []).append(f"[{entry.scenario.id}](#{anchor(entry.scenario.id)})")
    yield "## Tags"
    yield table(("tag", "scenarios"), [(prose(tag), ", ".join(links)) for tag, links in sorted(tags.items())])


def _across(entry: Entry, framework: Framework) -> str:
    """What was seen on its labs, in one cell: once where it is the same on all."""
    by_lab = {lab: verdict_seen(entry, framework, lab) for lab in entry.labs}
    if len(set(by_lab.values())) == 1:
        return next(iter(by_lab.values()))
    return "; ".join(f"{lab}: {verdict}" for lab, verdict in by_lab.items())


def _scenario(entry: Entry, out: Path) -> Iterable[str]:
    one = entry.scenario
    yield f"### {one.id}"
    about = [
        folder_link(entry, out, prose(one.title)),
        technique_link(one.technique),
        str(one.difficulty),
        prose(one.subject.name),
        ", ".join(prose(tag) for tag in one.tags),
        "compared with the same service unconfined" if one.control is Control.UNCONFINED else "",
    ]
    yield " · ".join(part for part in about if part)
    yield prose(one.story)
    rows = []
    for framework in Framework:
        if framework in one.expected:
            seen = (verdict_seen(entry, framework, lab) for lab in entry.labs)
            rows.append((framework.display, verdict_words(one, framework), *seen))
    yield table(("framework", "expected", *entry.labs), rows)
