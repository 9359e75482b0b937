"""What this process holds open, for tests of what is left behind."""

from __future__ import annotations

import contextlib
from pathlib import Path


def descriptors() -> set[tuple[str, Path]]:
    """Each number and what it is open on, without the listing's own, which would take any number that is free."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add((entry.name, entry.readlink()))
    return found
