"""Change the code that judges, one small change at a time, and see whether its unit tests notice: `make mutants`.

mutmut does it, configured in pyproject.toml, in a copy below build/mutants: it wants to find the package below `src`.
Ends with 1 where a change survived that docs/mutants.md does not explain.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
COPY = REPO / "build" / "mutants"
PAGE = REPO / "docs" / "mutants.md"
NAMES = ("lsmlab.verdict.*", "lsmlab.evidence.*", "lsmlab.attempt.x_read_window__*")
"""What is changed. Names of one's own, behind the command, take their place."""

NOTICED = frozenset({"killed", "timeout"})
"""A change that makes a test run on and on is noticed as well."""


def main(names: list[str]) -> int:
    """Make the copy, run mutmut, tell the score and the survivors."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(REPO / "harness", COPY / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "tests", COPY / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", COPY)
    wanted = names or list(NAMES)
    children = str(os.cpu_count() or 1)
    mutmut("run", "--max-children", children, *wanted, shown=True)
    found = dict(line.split(": ") for line in mutmut("results", "--all", "true").split("\n") if ": " in line)
    results = {name.strip(): status for name, status in found.items() if status != "not checked"}
    if not results:
        print(f"No mutant is called {' or '.join(wanted)}.")
        return 1
    for module in sorted({name.rpartition(".")[0] for name in results}):
        count = Counter(status for name, status in results.items() if name.startswith(f"{module}."))
        print(f"{module}: {sum(count[status] for status in NOTICED)} of {count.total()} killed; {dict(count)}")
    left = [name for name, status in results.items() if status not in NOTICED]
    unexplained = [name for name in left if not explained(difference(name))]
    print(f"all: {len(results) - len(left)} of {len(results)} killed; {len(left)} left, {len(unexplained)} unexplained")
    for name in unexplained:
        print(f"\n{name}: {results[name]}\n{difference(name)}")
    return 1 if unexplained else 0


def mutmut(*arguments: str, shown: bool = False) -> str:
    """What mutmut says; or, shown as it comes, nothing."""
    # An entry for the harness would come before the copy's
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(
        command, cwd=COPY, env=environment, stdout=None if shown else subprocess.PIPE, text=True, check=True
    )
    return done.stdout or ""


def difference(name: str) -> str:
    """The lines that a mutant takes out and puts in."""
    lines = mutmut("show", name).splitlines()
    return "\n".join(line for line in lines if line[:1] in {"-", "+"} and line[:3] not in {"---", "+++"})


def explained(change: str) -> bool:
    """Whether the page shows every line that the change puts in."""
    page = PAGE.read_text("utf-8") if PAGE.exists() else ""
    return all(line[1:].strip() in page for line in change.splitlines() if line.startswith("+"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
