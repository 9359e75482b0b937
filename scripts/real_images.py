"""What the flagship proved on real images, for `.github/workflows/real-images.yml`: see docs/real-images.json.

    real_images.py labs                          the labs to prove that are here, as a job's output: labs=["fedora-44"]
    real_images.py record --run WHERE REPORT...  adds what reports of `lsmlab run --json` prove; prints Markdown

`record` ends with 1 where a report proves nothing; what the others prove is in the file all the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lsmlab import discovery, proofs
from lsmlab.errors import LsmlabError
from lsmlab.outcome import Report
from lsmlab.report import tables

FILE = Path(__file__).resolve().parents[1] / proofs.FILE


def labs() -> int:
    """Print the labs of the ledger that have a file."""
    here = set(discovery.labs().ids)
    print(f"labs={json.dumps(sorted(here & set(proofs.read(FILE).labs)))}")
    return 0


def record(reports: list[Path], run: str, file: Path) -> int:
    """Add each report to the ledger in `file`; the exit status."""
    ledger = proofs.read(file)
    faults = []
    for path in reports:
        try:
            ledger = ledger.proved(Report.read(path), run)
        except LsmlabError as error:
            faults.append(f"{path}: {error}")
    file.write_text(ledger.to_json(), "utf-8")
    rows = [
        (lab, *((proof.date[:10], proof.accelerator, proof.words()) if proof else ("never", "", "")))
        for lab, proof in ledger.labs.items()
    ]
    print(tables.markdown(("lab", "proved on the real image", "under", "verdicts"), rows))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults or not reports else 0


def main() -> int:
    """Do what the command line says; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("labs")
    recorder = commands.add_parser("record")
    recorder.add_argument("--run", required=True)
    recorder.add_argument("--file", type=Path, default=FILE)
    recorder.add_argument("reports", nargs="*", type=Path)
    asked = parser.parse_args()
    return labs() if asked.command == "labs" else record(asked.reports, asked.run, asked.file)


if __name__ == "__main__":
    sys.exit(main())
