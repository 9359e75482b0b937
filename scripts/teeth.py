"""Does the sabotage suite bite? Each known-bad piece is put into the harness, and the suite has to turn red for it.

Prints a table; ends 1 where a piece is not caught, or where the suite is red without any. Boots guests: 5 minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

from tabulate import tabulate

REPO = Path(__file__).resolve().parents[1]
SUITE = REPO / "tests" / "sabotage"
sys.path.insert(0, str(SUITE))

from teeth import TEETH  # noqa: E402 - it lies beside the suite


def run(cases: Iterable[str], *options: str) -> tuple[int, list[str]]:
    """Run the suite's `cases`: how many tests there were, and which of them said that a verdict is wrong.

    Raises SystemExit where the run ended in any other way than with passed or failed tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        names = " or ".join(f"[{case}-selinux] or [{case}-apparmor]" for case in cases)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "teeth", "--require=vm", "-m", "sabotage",
             "-q", f"--junitxml={report}", *options, str(SUITE), "-k", names],
            cwd=REPO, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode not in {0, 1}:
            raise SystemExit(f"the suite did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        tests = list(ET.parse(report).getroot().iter("testcase"))  # noqa: S314 - pytest has just written it
    if not tests:
        raise SystemExit(f"the suite has no case of {', '.join(cases)}")
    broken = [test.get("name", "") for test in tests if test.find("error") is not None]
    if broken:
        raise SystemExit(f"the suite broke in {broken[0]}:\n{done.stdout[-3000:]}")
    return len(tests), [name for test in tests if test.find("failure") is not None and (name := test.get("name"))]


def main() -> int:
    """Run the suite once as it is and once for each piece; the exit status."""
    everything = sorted({case for tooth in TEETH.values() for case in tooth.cases})
    count, red = run(everything)
    if red:
        print(f"Red without a bad piece: {', '.join(red)}")
        return 1
    print(f"Without a bad piece: {count} green.", flush=True)
    rows = []
    for name, tooth in TEETH.items():
        count, red = run(tooth.cases, "--tooth", name)
        rows.append((name, tooth.what, f"{len(red)} of {count} red" if red else "NOT CAUGHT"))
        print(f"{name}: {rows[-1][2]}", flush=True)
    print()
    print(tabulate(rows, headers=("piece", "what it does", "the suite"), tablefmt="github"))
    return 1 if any(row[2] == "NOT CAUGHT" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
