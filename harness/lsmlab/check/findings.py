"""What `lsmlab check` finds: file by file. What could not be looked at is said, and is no success."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsmlab import definition
from lsmlab.errors import LsmlabError


@dataclass(slots=True)
class Checked:
    """One file, and what was found. A file with neither faults nor anything left unchecked is sound."""

    kind: str
    """scenario or lab."""
    name: str
    file: Path
    looked_at: list[tuple[str, str]] = field(default_factory=list)
    """What was found to be in order, and with which lab's tools; an empty name: with none."""
    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """What could not be looked at, with the reason and what to do."""
    notes: list[str] = field(default_factory=list)
    """What is no fault, and may surprise."""

    def at(self, loc: definition.Location, words: str) -> str:
        """A fault at the place of a key, or of the nearest one around it that this file itself has."""
        origin = definition.read_raw(self.file).origin(loc, self.file)
        return f"{origin}: {'.'.join(map(str, loc))}: {words}"

    @property
    def status(self) -> str:
        """`faulty`, `unchecked` or `sound`."""
        return "faulty" if self.faults else "unchecked" if self.unchecked else "sound"


@dataclass(slots=True)
class Findings:
    """What `check` found: file by file, and what concerns no single one."""

    files: list[Checked]
    faults: list[str]
    notes: list[str]
    compiled: bool
    """False where policies were not to be compiled."""

    @property
    def faulty(self) -> bool:
        """True where something has to be mended."""
        return bool(self.faults) or any(f.faults for f in self.files)

    @property
    def incomplete(self) -> bool:
        """True where something could not be looked at."""
        return any(f.unchecked for f in self.files)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        rows = [
            {
                "kind": f.kind, "id": f.name, "file": str(f.file), "status": f.status,
                "checked": [f"{what} ({lab})" if lab else what for what, lab in f.looked_at],
                "faults": f.faults, "unchecked": f.unchecked, "notes": f.notes,
            }
            for f in self.files
        ]  # fmt: skip
        return {"schema": 1, "files": rows, "faults": self.faults, "notes": self.notes, "compiled": self.compiled}


def faults_of(error: LsmlabError) -> list[str]:
    """An error as faults, one a line; what to do stands behind the last."""
    lines = error.message.splitlines()
    return [*lines[:-1], f"{lines[-1]} ({error.hint})"] if error.hint else lines
