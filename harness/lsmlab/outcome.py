"""The record that is kept: verdict, attempts, evidence, and everything needed to repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, computed_field

from lsmlab.attempt import Observation
from lsmlab.container.spec import ImageRecord
from lsmlab.definition import Strict
from lsmlab.errors import DefinitionError
from lsmlab.evidence import Denial
from lsmlab.terms import CONTROL, UNCONFINED_ARM, Arm, AttemptKind, Framework, Verdict
from lsmlab.verdict import JudgedArm, JudgedAttempt

SCHEMA: Literal[1] = 1
"""Version of the record. A reader refuses what it does not know."""


class AttemptRecord(JudgedAttempt):
    """One attempt in one arm: judged, with the raw facts that the judgement rests on."""

    observation: Observation | None = None


class ArmRecord(JudgedArm):
    """One arm. `seconds` is wall time; the first arm in a guest has the guest's start and the set-up in its own.

    What an arm took that was made anew, see `switched`, is in none.
    """

    lsm: tuple[str, ...] = ()
    command_line: str = ""
    started_in: Arm | None = None
    """The arm that the service was started in, where it was another one: only the mode was switched since."""
    switched: tuple[AttemptRecord, ...] = ()
    """Attempts with the processes of the enforcing arm, not all allowed: so the arm started the service itself."""
    images: tuple[ImageRecord, ...] = ()
    """What its containers were made of, where that is not BusyBox alone."""
    seconds: float = 0.0
    attempts: tuple[AttemptRecord, ...] = ()


class Environment(Strict):
    """What the experiment ran on."""

    lsmlab: str
    lab_digest: str = ""
    """SHA-256 of the lab's definition; empty in records of 0.1.0's first days."""
    image: str
    """SHA-256 of the disk."""
    kernel: str
    packages: dict[str, str]
    policies: dict[str, str] = Field(default_factory=dict)
    """By framework, a policy that is not the distribution's: what it is called, and its digest."""
    qemu: str
    accelerator: str
    memory_mib: int
    machine: str = ""
    """A machine that was there already, as it was reached and what it is; then image, QEMU and memory say nothing.
    Empty: a guest of lsmlab's own."""
    isolation: str = "snapshots"
    """What keeps attempts apart."""
    names: str = ""
    """Of a machine that was there already: the lab whose names and expectations were used. Where that lab is of another
    release than the machine, it says so."""


class Falsification(Strict):
    """Whether the experiment could have come out otherwise: see falsify.py."""

    rules: tuple[str, ...]
    """What was added to the policy, or the files that took its place."""
    verdict: Verdict
    """Under the weakened policy; NOT_CONTAINED where the attacks succeed."""
    reason: str
    misled: Verdict = Verdict.ERROR
    """With another denial expected; UNATTRIBUTED where the record counts."""

    @property
    def falsifiable(self) -> bool:
        """True where both came out otherwise: then the scenario proves something."""
        return self.verdict is Verdict.NOT_CONTAINED and self.misled is Verdict.UNATTRIBUTED


class Outcome(Strict):
    """One scenario, on one lab, under one framework."""

    record: Literal[1] = SCHEMA
    id: str
    recorded: str
    """UTC, ISO 8601."""
    scenario: str
    scenario_digest: str
    title: str
    technique: str
    lab: str
    framework: Framework
    verdict: Verdict
    expected: Verdict
    because: str
    reason: str
    environment: Environment
    arms: tuple[ArmRecord, ...]
    falsification: Falsification | None = None
    """None: nobody asked, there was nothing to falsify, or it was interrupted."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def as_expected(self) -> bool:
        """True where the verdict is the one that the scenario's file states."""
        return self.verdict is self.expected

    @property
    def control(self) -> ArmRecord | None:
        """The record of the arm that the enforcing one is compared with."""
        return next((a for a in self.arms if a.arm in {CONTROL, UNCONFINED_ARM[self.framework]}), None)

    @property
    def images(self) -> tuple[ImageRecord, ...]:
        """What its containers were made of, each once."""
        found = {(one.image, one.sha256): one for arm in self.arms for one in arm.images}
        return tuple(found.values())

    def arm(self, name: Arm) -> ArmRecord | None:
        """The record of one arm."""
        return next((a for a in self.arms if a.arm is name), None)

    @property
    def attempts(self) -> tuple[tuple[str, AttemptKind], ...]:
        """Every attempt's id and kind, in the scenario's order."""
        found: dict[str, AttemptKind] = {}
        for arm in self.arms:
            found |= {a.attempt: a.kind for a in arm.attempts}
        return tuple(found.items())

    @property
    def accounted(self) -> tuple[tuple[Arm, str, Denial], ...]:
        """The denials that account for blocks: arm, attempt, denial."""
        return tuple(
            (arm.arm, attempt.attempt, attempt.attribution.denial)
            for arm in self.arms
            for attempt in arm.attempts
            if attempt.attribution is not None and attempt.attribution.denial is not None
        )

    @property
    def unexpected(self) -> tuple[tuple[Arm, str, Denial], ...]:
        """Denials in benign work, even where it works: policy authors want them."""
        return tuple(
            (arm.arm, attempt.attempt, denial)
            for arm in self.arms
            for attempt in arm.attempts
            if attempt.kind is AttemptKind.BENIGN
            for denial in attempt.denials
        )


class Report(Strict):
    """What `--json` writes."""

    schema_: Literal[1] = SCHEMA
    outcomes: tuple[Outcome, ...]

    def to_json(self) -> str:
        """JSON text: `{"schema": 1, "outcomes": [...]}`."""
        body = ",".join(o.model_dump_json(exclude={"record"}) for o in self.outcomes)
        return f'{{"schema": {self.schema_}, "outcomes": [{body}]}}\n'

    @classmethod
    def read(cls, path: Path) -> Report:
        """The report in a file. Raises DefinitionError."""
        try:
            return cls.from_json(path.read_text("utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise DefinitionError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error

    @classmethod
    def from_json(cls, text: str, source: str) -> Report:
        """What `to_json` wrote. Raises DefinitionError that names `source`."""
        try:
            document: Any = json.loads(text)
            if document["schema"] != SCHEMA:
                raise DefinitionError(
                    f"{source}: a report of version {document['schema']}; this lsmlab reads {SCHEMA}",
                    hint="Use the lsmlab that wrote it.",
                )
            rows = [{k: v for k, v in row.items() if k != "as_expected"} for row in document["outcomes"]]
            return cls(schema_=SCHEMA, outcomes=tuple(Outcome.model_validate_json(json.dumps(row)) for row in rows))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DefinitionError(
                f"{source}: outcomes that this lsmlab cannot read: {place}: {first['msg']}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DefinitionError(
                f"{source}: no report of outcomes", hint="`lsmlab run --json FILE` writes one."
            ) from error
