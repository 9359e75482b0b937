"""What is known of each scenario: its file, and the newest outcome of each framework on each lab."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lsmlab import discovery
from lsmlab.outcome import Outcome
from lsmlab.scenario import Scenario
from lsmlab.terms import Framework, Verdict

LESSONS = {
    "dac": "File permissions decide",
    "mac-off": "Attacks on MAC itself",
    "overblocking": "Policies that stop too much",
    "policy-mistake": "Mistakes in a policy",
    "path-against-label": "Path against label",
    "labels": "Labels, and where they come from",
    "transition": "Domains, and how they are entered",
    "persistence": "To stay on the machine",
    "setuid": "Programs with more rights",
    "memory": "Other processes' memory",
    "kernel": "The kernel's own interfaces",
    "code-execution": "To run code",
    "execution": "To run code",
    "network": "The network",
    "database": "Databases",
    "credentials": "Credentials",
    "container": "Containers",
}
"""What a scenario teaches, by tag; the first that it has counts. Two tags may be one lesson."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An outcome, and whether the scenario is still what it was made from."""

    outcome: Outcome
    current: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One scenario, where it lies, and what was seen of it."""

    scenario: Scenario
    folder: Path
    seen: Mapping[tuple[Framework, str], Seen]
    """By framework and lab."""
    labs: tuple[str, ...] = ()
    """Where it is run, sorted."""

    def expected(self, framework: Framework, lab: str) -> Verdict | None:
        """The verdict that the scenario's file states for a lab; None where it states none."""
        known = framework in self.scenario.expected
        return self.scenario.expectation(framework, lab).verdict if known else None

    @property
    def group(self) -> str:
        """What it is listed under: the first of the lessons that its tags name, else its first tag."""
        lesson = next((LESSONS[tag] for tag in LESSONS if tag in self.scenario.tags), None)
        return lesson or f"Tag: {self.scenario.tags[0]}" if self.scenario.tags else "Without a tag"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every scenario, sorted by id, with what was seen of it."""

    entries: tuple[Entry, ...]
    labs: tuple[str, ...]
    strays: tuple[str, ...]
    """Scenarios that have outcomes and are not here: renamed, removed, or another folder's."""

    @property
    def groups(self) -> dict[str, list[Entry]]:
        """The entries by group: lessons in their order, then the rest."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.group, []).append(entry)
        order = [*dict.fromkeys(LESSONS.values()), *sorted(found)]
        return {group: found[group] for group in dict.fromkeys(order) if group in found}


def collect(outcomes: Iterable[Outcome]) -> Catalogue:
    """The scenarios of the current folder (where it has none, lsmlab's own) with the newest of `outcomes` of each kind.

    Raises DefinitionError for a scenario with a fault.
    """
    newest: dict[tuple[str, Framework, str], Outcome] = {}
    for outcome in sorted(outcomes, key=lambda o: o.recorded):
        newest[outcome.scenario, outcome.framework, outcome.lab] = outcome
    found = discovery.scenarios()
    files = found.own or found.built_in
    ran_on = {lab for _, _, lab in newest}
    known = {name: discovery.load_lab(name) for name in discovery.labs().ids}
    # A lab of a downloaded image is listed once something was seen there: nobody owes it a run
    labs = sorted({name for name, lab in known.items() if lab.cloud_image is None} | ran_on)
    entries = []
    for scenario in sorted(discovery.load_scenarios(str(path) for path in files.values()), key=lambda s: s.id):
        digest = scenario.digest()
        seen = {
            (framework, lab): Seen(outcome, current=outcome.scenario_digest == digest)
            for (name, framework, lab), outcome in sorted(newest.items())
            if name == scenario.id
        }
        ran = {lab for _, lab in seen}
        where = tuple(n for n in labs if n in ran or n not in known or scenario.belongs_to(known[n]))
        entries.append(Entry(scenario, files[scenario.id].parent, seen, where))
    return Catalogue(
        tuple(entries),
        tuple(labs),
        tuple(sorted({name for name, _, _ in newest} - {e.scenario.id for e in entries})),
    )


class Side(StrEnum):
    """Where an attack that both frameworks were asked about was stopped."""

    BOTH = "both"
    SELINUX = "selinux"
    APPARMOR = "apparmor"
    NEITHER = "neither"
    OTHER = "other"
    """At least one of the verdicts is neither CONTAINED nor NOT_CONTAINED."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One scenario on one lab, under both frameworks."""

    entry: Entry
    lab: str
    selinux: Seen
    apparmor: Seen

    @property
    def side(self) -> Side:
        """Who stopped the attack."""
        contained = {Verdict.CONTAINED: True, Verdict.NOT_CONTAINED: False}
        left, right = (contained.get(s.outcome.verdict) for s in (self.selinux, self.apparmor))
        if left is None or right is None:
            return Side.OTHER
        if left and right:
            return Side.BOTH
        return Side.SELINUX if left else Side.APPARMOR if right else Side.NEITHER


def pairs(catalogue: Catalogue) -> list[Pair]:
    """Every scenario and lab of which outcomes of both frameworks are there."""
    return [
        Pair(entry, lab, entry.seen[Framework.SELINUX, lab], entry.seen[Framework.APPARMOR, lab])
        for entry in catalogue.entries
        for lab in catalogue.labs
        if all((framework, lab) in entry.seen for framework in Framework)
    ]
