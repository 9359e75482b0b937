"""Choosing scenarios by what they are about: one kind of condition beside another narrows, two of one kind widen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

from lsmlab.definition import unknown_name
from lsmlab.errors import DefinitionError
from lsmlab.scenario import Difficulty, Scenario
from lsmlab.terms import Framework, Verdict

_TECHNIQUE = re.compile(r"T\d{4}(\.\d{3})?")


def verdicts_of(scenario: Scenario, framework: Framework) -> dict[str, Verdict]:
    """The verdicts that one framework is expected to give, by lab; that of any other lab under an empty name."""
    expectation = scenario.expected.get(framework)
    if expectation is None:
        return {}
    return {"": expectation.verdict, **{lab: other.verdict for lab, other in expectation.labs.items()}}


def verdict_words(scenario: Scenario, framework: Framework) -> str:
    """The verdicts expected of one framework, in a cell: that of a lab behind, where it is another; `-` for none."""
    verdicts = verdicts_of(scenario, framework)
    shown = {lab: verdict for lab, verdict in verdicts.items() if not lab or verdict is not verdicts[""]}
    return ", ".join(f"{lab}: {verdict}" if lab else verdict for lab, verdict in shown.items()) or "-"


@dataclass(frozen=True, slots=True)
class Selection:
    """Conditions on scenarios. Of each kind that is given, one must hold."""

    frameworks: tuple[Framework, ...] = ()
    """An expectation of one of these frameworks; `verdicts` are then looked for there alone."""
    techniques: tuple[str, ...] = ()
    """ATT&CK techniques; one without a sub-technique takes all of its sub-techniques."""
    services: tuple[str, ...] = ()
    difficulties: tuple[Difficulty, ...] = ()
    tags: tuple[str, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def takes(self, scenario: Scenario) -> bool:
        """True where `scenario` meets a condition of each kind that is given."""
        looked_at = [f for f in scenario.expected if f in (self.frameworks or tuple(Framework))]
        expected = {v for f in looked_at for v in verdicts_of(scenario, f).values()}
        answers = (
            (self.frameworks, bool(looked_at)),
            (self.techniques, any(_within(scenario.technique, t) for t in self.techniques)),
            (self.services, scenario.subject.name in self.services),
            (self.difficulties, scenario.difficulty in self.difficulties),
            (self.tags, bool(set(scenario.tags) & set(self.tags))),
            (self.verdicts, bool(expected & set(self.verdicts))),
        )
        return all(holds for wanted, holds in answers if wanted)


def _within(technique: str, wanted: str) -> bool:
    return technique == wanted or technique.startswith(f"{wanted}.")


def values(scenarios: Iterable[Scenario]) -> dict[str, list[str]]:
    """What `scenarios` have of each kind, sorted: what there is to choose from."""
    found: dict[str, set[str]] = {"technique": set(), "service": set(), "tag": set()}
    for one in scenarios:
        found["technique"] |= {one.technique, one.technique.partition(".")[0]}
        found["service"].add(one.subject.name)
        found["tag"] |= set(one.tags)
    return {
        **{kind: sorted(names) for kind, names in found.items()},
        "framework": [f.value for f in Framework],
        "difficulty": [d.value for d in Difficulty],
        "verdict": [v.value for v in Verdict],
    }


def read(scenarios: Sequence[Scenario], **wanted: Sequence[str] | None) -> Selection:
    """The selection of what was typed: `framework`, `technique`, `service`, `difficulty`, `tag`, `verdict`.

    Raises DefinitionError with the nearest value for one that no scenario could have or that none has.
    """
    there = values(scenarios)

    def known(kind: str, shape: Callable[[str], str] = str) -> tuple[str, ...]:
        names = tuple(shape(name) for name in wanted.get(kind) or ())
        for name in names:
            if kind == "technique" and not _TECHNIQUE.fullmatch(name):
                raise DefinitionError(f"--technique {name}: expected a technique such as T1003 or T1003.008")
            if name not in there[kind]:
                raise unknown_name(kind, name, there[kind])
        return names

    return Selection(
        frameworks=tuple(Framework(name) for name in known("framework", str.lower)),
        techniques=known("technique", str.upper),
        services=known("service"),
        difficulties=tuple(Difficulty(name) for name in known("difficulty", str.lower)),
        tags=known("tag"),
        verdicts=tuple(Verdict(name) for name in known("verdict", lambda n: n.upper().replace("-", "_"))),
    )
