"""The QEMU guest agent over virtio-serial: no network, alive across a restored snapshot.

Protocol: https://www.qemu.org/docs/master/interop/qemu-ga-ref.html
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import socket
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from qemu.qmp import QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from lsmlab import portal
from lsmlab.channel.base import CommandResult
from lsmlab.errors import ChannelError, CommandTimeoutError

T = TypeVar("T")

WRITE_CHUNK = 1 << 20
"""Bytes a guest-file-write; the agent takes far more, and a smaller one keeps its memory low."""
ANSWER_SECONDS = 30.0
"""How long the agent may take to answer one command that does not wait for anything in the guest."""
ANSWER_BYTES = 64 << 20
"""The longest answer that is read. The agent carries 16 MiB of output and of errors, in base64."""
POLL_FIRST, POLL_MOST = 0.004, 0.1
"""guest-exec has no completion event: the status is asked for at growing distances, seconds."""


class AgentChannel:
    """A channel over one end of a socket pair whose other end is QEMU's virtio-serial port."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._name = name
        self._socket = sock
        self._client = QMPClient(f"agent-{name}", readbuflen=ANSWER_BYTES)
        self._client.await_greeting = False
        self._client.negotiate = False
        self._client.logger.disabled = True
        self._connected = False

    def connect(self) -> None:
        """Attach to the socket; says nothing of the guest yet."""
        portal.call(self._client.connect(self._socket), ANSWER_SECONDS)
        self._connected = True

    def close(self) -> None:
        """Detach. Never raises."""
        if self._connected and self._client.runstate is not Runstate.IDLE:
            with contextlib.suppress(Exception):
                portal.call(self._client.disconnect(), 5)
        self._connected = False

    def wait_until_up(self, timeout: float) -> None:
        """Block until the agent answers, at most `timeout` seconds. Raises ChannelError."""
        try:
            # Bytes sent before the agent opens its port wait in the port's buffer: one question, one answer.
            self._execute("guest-ping", timeout=timeout)
        except TimeoutError:
            raise ChannelError(f"{self._name}: the guest agent did not answer within {timeout:.0f} s") from None

    def command(self, name: str, timeout: float = ANSWER_SECONDS, **arguments: Any) -> Any:
        """One agent command. Raises ChannelError on its error, on silence and on a closed channel."""
        try:
            return self._execute(name, arguments or None, timeout)
        except TimeoutError:
            raise ChannelError(f"{self._name}: {name}: no answer from the guest agent in {timeout:.0f} s") from None

    def _execute(self, name: str, arguments: dict[str, Any] | None = None, timeout: float = ANSWER_SECONDS) -> Any:
        try:
            return portal.call(self._client.execute(name, arguments), timeout)
        except TimeoutError:  # an OSError too, but not one of the socket's
            raise
        except (QMPError, OSError, EOFError, asyncio.CancelledError) as error:
            raise ChannelError(f"{self._name}: {name}: {str(error) or type(error).__name__}") from error

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """See `Channel.run`."""
        arguments: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
        if stdin:
            arguments["input-data"] = base64.b64encode(stdin).decode()
        start = time.monotonic()
        try:
            pid = self._field(self.command("guest-exec", **arguments), "pid", int)
        except ChannelError as error:
            if "Failed to execute child process" in str(error) or "No such file" in str(error):
                return CommandResult(tuple(argv), 127, None, b"", f"{argv[0]}: {error}".encode(), 0.0)
            raise
        pause = POLL_FIRST
        while True:
            status = self.command("guest-exec-status", pid=pid)
            elapsed = time.monotonic() - start
            if self._field(status, "exited", bool):
                return self._result(tuple(argv), status, elapsed)
            if elapsed > timeout:
                raise CommandTimeoutError(f"{self._name}: {' '.join(argv)[:200]}: not done after {timeout:.0f} s")
            time.sleep(min(pause, max(0.0, timeout - elapsed) + POLL_FIRST))
            pause = min(pause * 1.3, POLL_MOST)

    def _field(self, answer: Any, key: str, kind: type[T]) -> T:
        found = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(found, kind):
            raise ChannelError(f"{self._name}: the guest agent answered nonsense: no {key} in {str(answer)[:200]}")
        return found

    def _result(self, argv: tuple[str, ...], status: dict[str, Any], seconds: float) -> CommandResult:
        try:
            out = base64.b64decode(status.get("out-data", ""), validate=True)
            err = base64.b64decode(status.get("err-data", ""), validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise ChannelError(f"{self._name}: the guest agent answered nonsense: {error}") from error
        if status.get("out-truncated") or status.get("err-truncated"):
            raise ChannelError(f"{self._name}: {' '.join(argv)[:200]}: more output than the agent carries")
        exit_code, signal = (self._field(status, key, int) if key in status else None for key in ("exitcode", "signal"))
        if (exit_code is None) == (signal is None):
            raise ChannelError(f"{self._name}: the guest agent gave neither exit status nor signal")
        return CommandResult(argv, exit_code, signal, out, err, seconds)

    def write_file(self, path: str, data: bytes) -> None:
        """See `Channel.write_file`."""
        handle = self.command("guest-file-open", path=path, mode="w")
        try:
            for start in range(0, len(data), WRITE_CHUNK):
                chunk = base64.b64encode(data[start : start + WRITE_CHUNK]).decode()
                written = self._field(self._write(handle, chunk), "count", int)
                if written != len(data[start : start + WRITE_CHUNK]):
                    raise ChannelError(f"{self._name}: {path}: only {written} bytes of a piece were written")
        finally:
            self.command("guest-file-close", handle=handle)

    def _write(self, handle: Any, chunk: str) -> Any:
        try:
            return self._execute("guest-file-write", {"handle": handle, "buf-b64": chunk})
        except TimeoutError:
            raise ChannelError(f"{self._name}: guest-file-write: no answer in {ANSWER_SECONDS:.0f} s") from None
