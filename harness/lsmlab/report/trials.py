"""What `lsmlab try` and `lsmlab doctor` print."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lsmlab.doctor import Finding
from lsmlab.lab import Lab
from lsmlab.terminal import clean
from lsmlab.trial import Question, TrialArm

STYLES = {"ran": "", "refused": "bold", "failed": "yellow", "error": "red"}


def trial_table(question: Question, lab: Lab, answers: Sequence[TrialArm]) -> RenderableType:
    """The five arms of one command, who refused it, and the kernel's records."""
    how = " as root" if question.as_root else ""
    how += f" in group {', '.join(question.groups)}" if question.groups else ""
    head = Text(f"{shlex.join(question.argv)}\n", style="bold")
    head.append(f"as {question.service}{how}, lab {lab.id}", style="not bold")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("arm", "result", "by", "ran in", "reason"):
        table.add_column(column, overflow="fold", header_style="dim")
    for answer in answers:
        result = Text(answer.result, style=STYLES[answer.result])
        words = (answer.by or "-", answer.domain or "-", answer.reason)
        table.add_row(answer.arm, result, *(Text(clean(w)) for w in words))
    parts: list[RenderableType] = [head, Text(), table]
    explained = next((a.dac for a in answers if a.dac is not None), None)
    if explained is not None:
        says = "permits it" if explained.permitted else "forbids it"
        parts += [Text(), Text(f"DAC {says}: {clean(explained.rule)}")]
    for answer in answers:
        record = next((d for d in answer.denials if d.effective), None)
        if record is not None:
            parts += [
                Text(f"\n{answer.arm}, the kernel's record:"),
                Padding(Text(clean(record.headline)), (0, 0, 0, 2)),
            ]
    ran = next((a for a in answers if a.result == "ran" and a.output.strip()), None)
    if ran is not None:
        lines = clean(ran.output).splitlines()
        more = f"\n... {len(lines) - 3} more lines" if len(lines) > 3 else ""
        parts += [Text(f"\n{ran.arm}, its output:"), Padding(Text("\n".join(lines[:3]) + more), (0, 0, 0, 2))]
    return Group(*parts)


def findings_table(findings: Sequence[Finding], ready: str, heading: str) -> RenderableType:
    """What `doctor` found, with what to do below each lack; `ready` says what is possible where nothing lacks."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = (
            Text("ok", "green") if finding.ok else Text("MISSING", "red") if finding.needed else Text("note", "yellow")
        )
        body = Text(clean(finding.found))
        if finding.advice:
            body.append(f"\n{finding.advice}", style="italic")
        table.add_row(mark, Text(finding.what), body)
    lacking = [f.what for f in findings if f.needed and not f.ok]
    end = f"Not ready: {', '.join(lacking)}." if lacking else f"Ready: {ready}."
    return Group(Text(f"{clean(heading)}\n"), table, Text(f"\n{end}", style="bold"))
