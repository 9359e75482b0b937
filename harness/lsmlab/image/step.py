"""A long step on this machine of making an image."""

from __future__ import annotations

from collections.abc import Sequence

from lsmlab import host
from lsmlab.errors import HostError, ImageError

SECONDS = 1800.0


def run(argv: Sequence[str], what: str) -> None:
    """Run a program that has to succeed; it dies with us. Raises ImageError with its last words."""
    try:
        host.run(argv, what=what, timeout=SECONDS)
    except HostError as error:
        raise ImageError(error.message, hint=error.hint) from error
