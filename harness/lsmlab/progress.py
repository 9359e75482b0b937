"""How long work says where it is. The engine reports; whoever shows it is another's business."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """Told of each step; called from several threads."""

    def step(self, task: str, text: str) -> None:
        """`task` (an arm, an image) is now doing `text`."""
        ...

    def done(self, task: str) -> None:
        """`task` has ended."""
        ...

    def note(self, text: str) -> None:
        """Something that a person should know, and that stays on the screen."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Stand aside for as long as the block lasts: somebody else uses the terminal."""
        ...


class Silent:
    """Tells nobody."""

    def step(self, task: str, text: str) -> None:
        """See `Progress.step`."""

    def done(self, task: str) -> None:
        """See `Progress.done`."""

    def note(self, text: str) -> None:
        """See `Progress.note`."""

    def paused(self) -> AbstractContextManager[None]:
        """See `Progress.paused`."""
        return nullcontext()
