"""`comparison.md`: where SELinux and AppArmor were both asked, who stopped the attack, and by which rule."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lsmlab.catalogue import Catalogue, Entry, Pair, Seen, Side, pairs
from lsmlab.evidence import Denial
from lsmlab.report.pages import MADE, age, folder_link, prose, table
from lsmlab.terminal import clean
from lsmlab.terms import ENFORCING_ARM, Framework, Verdict

SECTIONS = {
    Side.BOTH: ("Both contain it", "SELinux's policy refuses it by label, and AppArmor's profile has no rule for it."),
    Side.SELINUX: ("Only SELinux contains it", "SELinux's policy refuses it by label; AppArmor's profile permits it."),
    Side.APPARMOR: ("Only AppArmor contains it", "AppArmor's profile has no rule for it; SELinux's policy permits it."),
    Side.NEITHER: ("Neither contains it", "Both policies permit it."),
    Side.OTHER: (
        "Something else was seen",
        "At least one verdict is neither CONTAINED nor NOT_CONTAINED: who contains the attack is not shown.",
    ),
}
INTRODUCTION = (
    "The same attack, by the same service, on the same disk, with a kernel that has one framework or the other. "
    "SELinux decides by labels: the type of the process, the type of the object, the class. AppArmor decides by the "
    "profile and the path. Below is where both ran: what each did, why, and what the kernel recorded. "
    "Every scenario is in [catalogue.md](catalogue.md)."
)
_PID = re.compile(r"(?<=/proc/)\d+|(?<=\[)\d+(?=\])")
"""Differs from run to run."""


def comparison_page(catalogue: Catalogue, out: Path) -> str:
    """The page. Made from outcomes alone: what was expected and not seen is not in it."""
    found = pairs(catalogue)
    parts = [
        MADE,
        "# SELinux against AppArmor",
        INTRODUCTION,
        "## In numbers",
        _numbers(catalogue, found),
    ]
    for side, (heading, meaning) in SECTIONS.items():
        rows = [row for row in _rows(found, out) if row[0] is side]
        if rows:
            parts += [f"## {heading}", meaning, table(_COLUMNS, [row[1:] for row in rows])]
    left_out = list(_not_compared(catalogue))
    if left_out:
        parts += ["## Not compared", table(("scenario", "why"), left_out)]
    return "\n\n".join(parts) + "\n"


_COLUMNS = ("scenario", "labs", "SELinux, by label", "AppArmor, by path")


def _numbers(catalogue: Catalogue, found: Sequence[Pair]) -> str:
    rows = []
    for lab in catalogue.labs:
        sides = [pair.side for pair in found if pair.lab == lab]
        rows.append((lab, *(sides.count(side) for side in Side), len(sides)))
    heads = ("both contain", "only SELinux", "only AppArmor", "neither", "something else", "both ran")
    return table(("lab", *heads), rows)


def _rows(found: Sequence[Pair], out: Path) -> Iterator[tuple[Side, str, str, str, str]]:
    """One row for each scenario and answer; labs that answer alike share one."""
    alike: dict[tuple[Side, str, str, str], list[str]] = {}
    for pair in found:
        name = folder_link(pair.entry, out, pair.entry.scenario.id)
        who = f"{name}: {prose(pair.entry.scenario.title)}"
        cells = (_cell(pair, Framework.SELINUX, pair.selinux), _cell(pair, Framework.APPARMOR, pair.apparmor))
        alike.setdefault((pair.side, who, *cells), []).append(pair.lab)
    for (side, who, selinux, apparmor), labs in alike.items():
        yield side, who, ", ".join(labs), selinux, apparmor


def _cell(pair: Pair, framework: Framework, seen: Seen) -> str:
    outcome, expected = seen.outcome, pair.entry.expected(framework, pair.lab)
    parts = [f"{outcome.verdict}{age(seen)}"]
    if outcome.as_expected:
        parts.append(prose(outcome.because))
    else:
        parts.append(f"{expected or outcome.expected} was expected")
    if outcome.verdict in {Verdict.CONTAINED, Verdict.OVERBLOCKED}:
        denied = [d for arm, _, d in outcome.accounted if arm is ENFORCING_ARM[framework]]
        parts += dict.fromkeys(f"denied: {record_words(d)}" for d in denied)
    return "\n".join(parts)


def record_words(denial: Denial) -> str:
    """A denial in the words of its framework: types and class, or profile and path. Nothing that differs by run."""
    name = _PID.sub("PID", " ".join(clean(denial.name).split())).replace("`", "'")
    if denial.framework is Framework.SELINUX:
        words = f"{denial.subject_domain} {{ {denial.access} }} {denial.object_type}:{denial.tclass}"
    else:
        words = " ".join(
            filter(None, (denial.subject_domain, f"{{ {denial.access} }}", name or denial.tclass or denial.operation))
        )
    return f"`{words}`"


def _not_compared(catalogue: Catalogue) -> Iterator[tuple[str, str]]:
    for entry in catalogue.entries:
        lacking = [f"{framework.display} on {lab}" for framework, lab in _lacking(entry)]
        only = [f for f in Framework if f in entry.scenario.expected]
        if len(only) == 1:
            yield entry.scenario.id, f"it is about {only[0].display} alone"
        elif lacking:
            yield entry.scenario.id, f"not run: {', '.join(lacking)}"


def _lacking(entry: Entry) -> list[tuple[Framework, str]]:
    return [(f, lab) for f in Framework for lab in entry.labs if (f, lab) not in entry.seen]
