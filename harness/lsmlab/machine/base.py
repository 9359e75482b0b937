"""What every machine gives: a channel into it, snapshots, and an end."""

from __future__ import annotations

from typing import Protocol

from lsmlab.channel.base import Channel


class Machine(Protocol):
    """A running guest."""

    @property
    def channel(self) -> Channel:
        """The way into the guest, as root."""
        ...

    @property
    def running(self) -> bool:
        """False once it has ended, or is lost."""
        ...

    @property
    def stays(self) -> bool:
        """True for a machine that was there before and is kept: a restore puts back what was changed, and takes neither
        its logs nor its processes back in time; and what a service gives away does not leave it."""
        ...

    def snapshot(self, name: str) -> None:
        """Keep the whole state, memory and disk, under `name`. Raises MachineError."""
        ...

    def restore(self, name: str) -> None:
        """Return to the state kept under `name`; the channel answers again. Raises MachineError."""
        ...

    def console_tail(self, lines: int = 15) -> str:
        """The last lines of the console."""
        ...

    def stop(self) -> None:
        """End the guest at once. Never raises; may be called twice."""
        ...
