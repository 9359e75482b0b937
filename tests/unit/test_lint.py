"""The linters, run as tests: one command checks everything."""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def _passes(*module: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *module],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{' '.join(module)} exited with {result.returncode}:\n{result.stdout}"


def test_ruff_finds_nothing() -> None:
    _passes("ruff", "check")


def test_the_code_is_formatted() -> None:
    _passes("ruff", "format", "--check")


def test_mypy_finds_nothing() -> None:
    _passes("mypy")
