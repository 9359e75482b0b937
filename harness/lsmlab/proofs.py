"""What was proved of labs on the image that their distribution publishes: the committed record `docs/real-images.json`.

A machine with KVM and the network adds to it, by `scripts/real_images.py` in `.github/workflows/real-images.yml`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from lsmlab import discovery
from lsmlab.definition import Strict
from lsmlab.errors import DefinitionError
from lsmlab.outcome import Report
from lsmlab.terms import Framework, Verdict

FILE = Path("docs", "real-images.json")
"""Below the library."""


class Proof(Strict):
    """One run on a real image in which every verdict was the expected one."""

    date: str
    """UTC, ISO 8601: when the last of its outcomes was recorded."""
    image: str
    """SHA-256 of the disk."""
    kernel: str
    accelerator: str
    lsmlab: str
    verdicts: dict[str, dict[Framework, Verdict]]
    """By scenario."""
    run: str
    """Where it ran: an address, or words."""

    def words(self) -> str:
        """The verdicts, for people."""
        return ", ".join(f"{f.display} {v}" for found in self.verdicts.values() for f, v in found.items())


class Ledger(Strict):
    """Every lab that is to be proved on a real image; None: it never was."""

    schema_: Literal[1] = 1
    labs: dict[str, Proof | None]

    def to_json(self) -> str:
        """The file's text."""
        labs = {name: proof.model_dump(mode="json") if proof else None for name, proof in sorted(self.labs.items())}
        return json.dumps({"schema": self.schema_, "labs": labs}, indent=1) + "\n"

    def proved(self, report: Report, run: str) -> Ledger:
        """This ledger with what `report` proves. Raises DefinitionError where it proves nothing of a lab in here."""
        of = sorted({o.lab for o in report.outcomes})
        if len(of) != 1 or of[0] not in self.labs:
            raise DefinitionError(
                f"a report of {', '.join(of) or 'no lab'}: expected one lab of {', '.join(sorted(self.labs))}"
            )
        wrong = [f"{o.scenario} under {o.framework.display}: {o.verdict}" for o in report.outcomes if not o.as_expected]
        if wrong:
            raise DefinitionError(f"{of[0]} is not proved: {'; '.join(wrong)}")
        return self.model_copy(update={"labs": {**self.labs, of[0]: _proof(report, run)}})


def _proof(report: Report, run: str) -> Proof:
    verdicts: dict[str, dict[Framework, Verdict]] = {}
    for outcome in report.outcomes:
        verdicts.setdefault(outcome.scenario, {})[outcome.framework] = outcome.verdict
    last = max(report.outcomes, key=lambda o: o.recorded)
    return Proof(
        date=last.recorded,
        image=_the_one(o.environment.image for o in report.outcomes),
        kernel=last.environment.kernel,
        accelerator=last.environment.accelerator,
        lsmlab=last.environment.lsmlab,
        verdicts=verdicts,
        run=run,
    )


def _the_one(images: Iterable[str]) -> str:
    found = set(images)
    if len(found) != 1:
        raise DefinitionError(f"a report of {len(found)} images: expected one", hint="Record a run of one scenario.")
    return found.pop()


def read(file: Path | None = None) -> Ledger:
    """The ledger in `file`, or the library's. Raises DefinitionError."""
    file = file or discovery.library() / FILE
    try:
        document = json.loads(file.read_text("utf-8"))
        return Ledger.model_validate_json(json.dumps({"schema_": document["schema"], "labs": document["labs"]}))
    except OSError as error:
        raise DefinitionError(f"{file}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise DefinitionError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DefinitionError(f"{file}: no record of proofs", hint="git has the last good one.") from error
