"""A machine that was there already and is kept, behind the protocol of a guest: a restore undoes, an end undoes all.

What was is in a journal there, written before anything is changed: guest/undo.py. Of what services give away only
canaries come here: guest/canaries.py.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import socket
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from lsmlab import __version__
from lsmlab.admission import Changes
from lsmlab.channel.base import Channel, CommandResult
from lsmlab.channel.ssh import SshChannel, open_ssh
from lsmlab.container import install, kept
from lsmlab.errors import ChannelError, LsmlabError, MachineError

PARTS = ("files", "kernel", "engine", "undo", "canaries")
"""What adds to the agent there, in the order of their imports."""
UNDO_SECONDS = 600.0
"""How long a look at all that is kept, and putting it back, may take there."""
RULES = "image/overlay/etc/audit/rules.d/audit.rules"
VEHICLE = (install.VEHICLE, install.VEHICLE_THERE)
"""Where the program of a command run as a service is copied to: in our images, and on a machine that is kept."""


def audit_rules() -> list[list[str]]:
    """What auditing has to record for evidence, as our images have it: arguments of `auditctl -A`."""
    lines = resources.files("lsmlab").joinpath(RULES).read_text("utf-8").splitlines()
    return [line.replace(*VEHICLE).split()[1:] for line in lines if line.startswith("-a ")]


def undo_hint(name: str) -> str:
    """What to do about a journal that is still there."""
    return f"`lsmlab undo {shlex.quote(name)}` puts back what was."


class _Guarded:
    """The channel for as long as the run goes on: an interrupted one asks nothing more, and what it did is undone."""

    def __init__(self, machine: SshMachine) -> None:
        self._machine = machine

    def _open(self) -> SshChannel:
        try:
            return self._machine.open_channel()
        except MachineError as error:
            raise ChannelError(error.message) from None

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """See `Channel.run`."""
        return self._open().run(argv, stdin=stdin, timeout=timeout)

    def write_file(self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None) -> None:
        """See `Channel.write_file`."""
        self._open().write_file(path, data, mode=mode, owner=owner)

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        """See `Channel.ask`."""
        return self._open().ask(operation, within=within, **arguments)


class SshMachine:
    """See `Machine`. Everything of one journal happens between `begin` and `stop`."""

    def __init__(self, connection: SshChannel) -> None:
        self._connection = connection
        self._channel = _Guarded(self)
        self._interrupted = False
        self._ended = False
        self._who = f"{getpass.getuser()} at {socket.gethostname()}, lsmlab {__version__}, process {os.getpid()}"
        self.problem = ""
        """Why it is not known that all is as it was; set by `stop`."""

    @property
    def name(self) -> str:
        """As the user calls the machine."""
        return self._connection.name

    def open_channel(self) -> SshChannel:
        """The connection, while the run goes on. Raises MachineError."""
        if self._interrupted or self._ended:
            raise MachineError(f"{self.name}: the run was interrupted")
        return self._connection

    @property
    def channel(self) -> Channel:
        """See `Machine.channel`."""
        return self._channel

    @property
    def running(self) -> bool:
        """See `Machine.running`."""
        return not (self._interrupted or self._ended or self._connection.fault)

    @property
    def stays(self) -> bool:
        """See `Machine.stays`."""
        return True

    def interrupt(self) -> None:
        """Let nothing be asked any more but to undo; from another thread."""
        self._interrupted = True

    def begin(self, changes: Changes) -> None:
        """Have the journal written; then auditing records what evidence needs.

        Raises MachineError: whether it was done is not known then, and `stop` has to follow.
        """
        with self._undoing():
            self._connection.ask("subjects", names=list(changes.subjects))
            self._connection.ask(
                "begin", within=UNDO_SECONDS,
                who=self._who, trees=list(changes.trees), units=list(changes.units), profiles=list(changes.profiles),
                rules=audit_rules(), new=list(changes.new),
                container_engine=kept.for_journal(kept.look(self._connection)) if changes.engine else None,
            )  # fmt: skip
            if changes.engine:
                from lsmlab.container.engine import Engine  # noqa: PLC0415 - its library takes a moment

                Engine(self._connection).load_image()

    @contextlib.contextmanager
    def _undoing(self) -> Iterator[None]:
        try:
            yield
        except ChannelError as error:
            hint = error.hint
            if "the journal of another run" in error.message:
                hint = undo_hint(self.name)
            raise MachineError(error.message, hint=hint) from None

    def snapshot(self, name: str) -> None:
        """See `Machine.snapshot`: remembers how all is."""
        self.open_channel()
        with self._undoing():
            self._connection.ask("mark", within=UNDO_SECONDS, name=name)

    def restore(self, name: str) -> None:
        """See `Machine.restore`: puts back what differs, and sees that nothing does. Raises MachineError."""
        self.open_channel()
        with self._undoing():
            self._connection.ask("restore", within=UNDO_SECONDS, name=name)

    def console_tail(self, lines: int = 15) -> str:
        """See `Machine.console_tail`: of this one there is none."""
        return ""

    def stop(self) -> None:
        """Undo everything. See `Machine.stop`; `problem` says what went wrong."""
        if self._ended:
            return
        self._ended = True
        try:
            self._undo_all()
        except LsmlabError as error:
            self.problem = error.message

    def _undo_all(self) -> None:
        try:
            if not self._connection.fault:
                self._connection.ask("end", within=UNDO_SECONDS)
                return
        except ChannelError:
            if not self._connection.fault:
                raise
        with contextlib.closing(open_ssh(self.name, PARTS)) as again:  # it was lost: once more, by the journal
            again.ask("undo", within=UNDO_SECONDS, who=self._who)
