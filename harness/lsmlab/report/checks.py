"""What `lsmlab check` prints: one line a file with what was checked, and below it what is wrong."""

from __future__ import annotations

from collections import Counter

from lsmlab.check.findings import Checked, Findings
from lsmlab.terminal import clean

WORDS = {"sound": "ok", "faulty": "FAULTY", "unchecked": "UNCHECKED"}


def findings_text(findings: Findings) -> str:
    """All of it, for a terminal or a pipe: each fault on a line of its own, its file and line in front."""
    width = max((len(f.name) for f in findings.files), default=0)
    lines = [line for entry in findings.files for line in _entry(entry, width)]
    lines += [f"FAULTY     {fault}" for fault in findings.faults]
    lines += [f"note       {note}" for note in findings.notes]
    return clean("\n".join([*lines, "", _summary(findings)]))


def _entry(entry: Checked, width: int) -> list[str]:
    head = f"{WORDS[entry.status]:<9}  {entry.kind:<8}  {entry.name:<{width}}  {_looked_at(entry)}".rstrip()
    below = [f"    {line}" for fault in entry.faults for line in fault.splitlines()]
    below += [f"    {words}" for words in entry.unchecked]
    return [head, *below, *(f"    note: {note}" for note in entry.notes)]


def _looked_at(entry: Checked) -> str:
    """`keys, 2 files; debian-13, debian-12: nginx.apparmor, types`."""
    labs: dict[str, list[str]] = {}
    for what, lab in entry.looked_at:
        labs.setdefault(what, []).append(lab)
    alike: dict[str, list[str]] = {}
    for what, names in labs.items():
        alike.setdefault(", ".join(filter(None, names)), []).append(what)
    return "; ".join(f"{names}: {', '.join(what)}" if names else ", ".join(what) for names, what in alike.items())


def _summary(findings: Findings) -> str:
    kinds = Counter(f.kind for f in findings.files)
    statuses = Counter(f.status for f in findings.files)
    files = " and ".join(f"{n} {kind}{'s' * (n != 1)}" for kind, n in sorted(kinds.items(), reverse=True))
    found = [f"{statuses['sound']} ok", f"{statuses['faulty']} faulty", f"{statuses['unchecked']} not checked in full"]
    shown = [words for words in found if not words.startswith("0 ")] or ["nothing to check"]
    if findings.faults:
        shown.append(f"and {len(findings.faults)} more fault{'s' * (len(findings.faults) != 1)}")
    left_out = "" if findings.compiled else "; policies were not compiled, as asked"
    return f"{files or 'no files'}: {', '.join(shown)}{left_out}"
