"""Where lsmlab keeps things on the host: XDG base directories, or below $LSMLAB_HOME where that is set."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from lsmlab.errors import HostError


def cache() -> Path:
    """Images and saved machine states: can be deleted at any time, costs a rebuild."""
    home = os.environ.get("LSMLAB_HOME")
    return Path(home).expanduser().absolute() / "cache" if home else Path(platformdirs.user_cache_dir("lsmlab"))


def state() -> Path:
    """The outcome store and what was learnt of this machine."""
    home = os.environ.get("LSMLAB_HOME")
    return Path(home).expanduser().absolute() / "state" if home else Path(platformdirs.user_state_dir("lsmlab"))


def make(folder: Path) -> Path:
    """Create `folder` and return it. Raises HostError with what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"{folder}: cannot be made: {error.strerror or error}",
            hint="Set LSMLAB_HOME to a folder that can be written, or XDG_CACHE_HOME and XDG_STATE_HOME.",
        ) from error
    if not os.access(folder, os.W_OK):
        raise HostError(
            f"{folder}: cannot be written", hint="Set LSMLAB_HOME to a folder that can be written, such as ~/lsmlab."
        )
    return folder
