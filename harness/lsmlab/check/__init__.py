"""`lsmlab check`: everything that can be wrong with scenarios, labs and policies, found without booting a guest.

Faults are collected, not raised: whoever mends a file wants to see them all.
"""

from __future__ import annotations

from collections.abc import Sequence

from lsmlab.check import definitions, policies
from lsmlab.check.findings import Checked, Findings
from lsmlab.progress import Progress
from lsmlab.scenario import Scenario

__all__ = ["Checked", "Findings", "check"]


def check(names: Sequence[str], labs: Sequence[str], progress: Progress, *, compiling: bool = True) -> Findings:
    """Check the scenarios called `names` (where there are none: all of `./scenarios`, or lsmlab's own), and every lab.

    Policies are compiled with the tools of the images of `labs`, which takes seconds each. Raises DefinitionError for a
    name that stands for nothing.
    """
    search = definitions.Search.everywhere()
    found = Findings([], [*search.twice()], [], compiling)
    search.pass_over(found)
    paths = search.chosen(names, found)
    machines = definitions.check_labs(found, labs)
    ready: list[tuple[Checked, Scenario]] = []
    for path in paths:
        entry = Checked("scenario", path.parent.name, path)
        found.files.append(entry)
        one = search.load(entry)
        if one is not None:
            ready.append((entry, one))
    for machine in machines:
        for entry, one in ready:
            definitions.check_on_lab(entry, one, machine)
        if compiling:
            own = [e for e in found.files if e.kind == "lab" and e.name == machine.id]
            there = [(e, one) for e, one in ready if one.subject.container is None or machine.engine is not None]
            policies.check_policies(machine, own, there, progress)
    if compiling:
        progress.done(policies.TASK)
    return found
