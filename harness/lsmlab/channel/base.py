"""What every channel into a guest gives: run an argument list, get one kind of result."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lsmlab.errors import ChannelError


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command in a guest did. Exactly one of `exit_code` and `signal` is set. `seconds` is wall time."""

    argv: tuple[str, ...]
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    seconds: float

    @property
    def ok(self) -> bool:
        """True for exit status 0."""
        return self.exit_code == 0

    @property
    def out(self) -> str:
        """Standard output as text; bytes that are not UTF-8 become backslash escapes."""
        return self.stdout.decode("utf-8", "backslashreplace")

    @property
    def err(self) -> str:
        """Standard error as text."""
        return self.stderr.decode("utf-8", "backslashreplace")

    def ended(self) -> str:
        """How it ended, in words."""
        return f"exit status {self.exit_code}" if self.signal is None else f"signal {self.signal}"

    def check(self) -> CommandResult:
        """Itself where the exit status is 0; else ChannelError with command, status and output."""
        if self.ok:
            return self
        words = (self.err.strip() or self.out.strip())[-2000:]
        raise ChannelError(f"in the guest: {shlex.join(self.argv)[:300]}: {self.ended()}\n  {words}")


class Channel(Protocol):
    """A way into one guest, as root."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """Run `argv` (no shell) and wait. `timeout` in seconds.

        Raises CommandTimeoutError when it does not end in time and ChannelError when the guest does not answer;
        a command that fails is a result.
        """
        ...

    def write_file(self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None) -> None:
        """Make `path` hold `data`, in place where it exists; `owner` is `USER:GROUP`. Raises ChannelError."""
        ...

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        """One operation of guest/agent.py, and its answer. `within` in seconds. Raises ChannelError.

        What the guest answers is not trusted: who asks validates it.
        """
        ...
