"""lsmlab's own agent in a guest (guest/agent.py), asked over any byte stream: a virtio-serial port here.

A virtio-serial port needs no network and is alive across a restored snapshot. Lines of JSON, see guest/agent.py. What
comes from the guest is not trusted: an answer is bounded in length and time, and nonsense is a ChannelError.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import math
import reprlib
import secrets
import socket
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from lsmlab import portal
from lsmlab.channel.base import CommandResult
from lsmlab.definition import digest_of
from lsmlab.errors import ChannelError, CommandTimeoutError

ANSWER_SECONDS = 30.0
"""How long the agent may take to answer what does not wait for anything in the guest."""
ANSWER_BYTES = 64 << 20
"""The longest answer that is read; a longer one is an error for who asked, and the channel goes on behind it. The agent
carries 16 MiB of output and of errors, in base64, and 8 MiB of log."""
READY = b"ready"


def agent_source(part: str = "agent") -> bytes:
    """The program that runs in the guest, or another part of it."""
    return resources.files("lsmlab").joinpath("guest", f"{part}.py").read_bytes()


def agent_digest() -> str:
    """Of the agent's source: a saved guest fits the agent that runs in it."""
    return digest_of(agent_source())


class _Lines(asyncio.Protocol):
    """The guest's bytes, which may be anything, as lines of at most ANSWER_BYTES; lives in the portal's event loop."""

    def __init__(
        self, hear: Callable[[bytearray], None], skip: Callable[[str], None], lost: Callable[[str], None]
    ) -> None:
        self._hear, self._skip, self._lost = hear, skip, lost
        self._line = bytearray()
        self._too_long = False

    def data_received(self, data: bytes) -> None:
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._take(end)
            if self._line:
                self._hear(self._line)
                self._line = bytearray()
            self._too_long = False
        self._take(rest)

    def _take(self, part: bytes) -> None:
        if self._too_long:
            return
        if len(self._line) + len(part) > ANSWER_BYTES:
            self._too_long, self._line = True, bytearray()
            self._skip(f"an answer of more than {ANSWER_BYTES >> 20} MiB")
        else:
            self._line += part

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost(str(exc) if exc else "the channel was closed")


class AgentChannel:
    """A channel over one end of a socket pair: at its other end is QEMU's virtio-serial port, or what passes on to SSH.

    Safe for all threads.
    """

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._name = name
        self._socket = sock
        self._transport: asyncio.Transport | None = None
        self._ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        # Not from 1: a guest from a saved state may still answer what another channel asked
        self._numbers = itertools.count(secrets.randbits(48))
        self._fault = "not connected"

    @property
    def name(self) -> str:
        """Whose channel it is; every error begins with it."""
        return self._name

    @property
    def fault(self) -> str:
        """Why nothing can be asked, for good once it was connected; empty while all is well."""
        return self._fault

    def connect(self) -> None:
        """Attach to the socket; says nothing of the guest yet."""
        portal.call(self._connect(), ANSWER_SECONDS)

    async def _connect(self) -> None:
        self._fault = ""
        self._transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: _Lines(self._hear, self._fail, self._lost), sock=self._socket
        )

    def _hear(self, line: bytearray) -> None:
        if line == READY:
            self._ready.set()
            return
        if not self._pending:
            return
        try:
            reply = json.loads(line.decode())
        except (ValueError, RecursionError):  # what a restored snapshot cut short, or nonsense
            return
        number = reply.get("id") if isinstance(reply, dict) else None
        waiting = self._pending.get(number) if type(number) is int else None
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)

    def _fail(self, fault: str) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_result({"error": fault})

    def _lost(self, fault: str) -> None:
        self._fault = fault
        self._fail(fault)
        self._ready.set()
        self._gone.set()

    def close(self) -> None:
        """Detach; who waits for an answer is told. Never raises, and may be called twice."""
        with contextlib.suppress(Exception):
            portal.call(self._close(), 5)

    def drop(self) -> None:
        """The same, without a word to the other end: it is about to be another. Never raises."""
        self.close()

    async def _close(self) -> None:
        if self._transport is None:
            self._socket.close()
            return
        self._transport.abort()
        await self._gone.wait()

    def bootstrap(self, timeout: float) -> None:
        """Send a freshly booted guest its agent and wait until it runs, at most `timeout` seconds."""
        try:
            portal.call(self._bootstrap(), timeout)
        except TimeoutError:
            raise ChannelError(f"{self._name}: the agent did not answer within {timeout:.0f} s") from None
        if self._fault:
            raise ChannelError(f"{self._name}: {self._fault}")

    async def _bootstrap(self) -> None:
        # Bytes sent before the guest opens its port wait in the port's buffer
        self._send(self._program())
        await self._ready.wait()

    def _program(self) -> bytes:
        """The first line: what runs in the guest."""
        return base64.b64encode(agent_source())

    def _send(self, line: bytes) -> None:
        if self._fault or self._transport is None:
            raise ChannelError(f"{self._name}: {self._fault}")
        self._transport.write(line + b"\n")

    def wait_until_up(self, timeout: float) -> None:
        """Block until the agent of a guest from a saved state answers, at most `timeout` seconds."""
        self.ask("ping", within=timeout)

    def ask(self, operation: str, *, within: float = ANSWER_SECONDS, **arguments: Any) -> Any:
        """See `Channel.ask`."""
        try:
            reply = portal.call(self._ask(operation, arguments), within)
        except TimeoutError:
            raise ChannelError(f"{self._name}: {operation}: no answer from the agent in {within:.0f} s") from None
        if "answer" in reply:
            return reply["answer"]
        raise ChannelError(f"{self._name}: {operation}: {_printable(reply.get('error', 'nonsense'))}")

    async def _ask(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(json.dumps({"id": number, "do": operation, **arguments}).encode())
            reply: dict[str, Any] = await future
            return reply
        finally:
            del self._pending[number]

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """See `Channel.run`."""
        words = base64.b64encode(stdin).decode()
        answer = self.ask("run", within=timeout + ANSWER_SECONDS, argv=list(argv), stdin=words, timeout=timeout)
        result = command_result(answer, tuple(argv), self._name)
        if answer["timed_out"]:
            raise CommandTimeoutError(f"{self._name}: {' '.join(argv)[:200]}: not done after {timeout:.0f} s")
        return result

    def write_file(self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None) -> None:
        """See `Channel.write_file`."""
        self.ask("write", path=path, data=base64.b64encode(data).decode(), mode=mode, owner=owner)


def command_result(answer: Any, argv: tuple[str, ...], name: str) -> CommandResult:
    """What the agent says of a command that ended, or was ended for its time. Raises ChannelError on nonsense."""
    try:
        out, err = (base64.b64decode(answer[key], validate=True) for key in ("out", "err"))
        exit_code, signal = _one_of(range(256), answer["exit_code"]), _one_of(range(1, 65), answer["signal"])
        too_much, timed_out, seconds = answer["too_much"], answer["timed_out"], answer["seconds"]
    except (TypeError, ValueError, KeyError) as error:
        raise ChannelError(f"{name}: the agent answered nonsense: {error!r:.200}: {reprlib.repr(answer)}") from error
    plain = type(too_much) is type(timed_out) is bool and type(seconds) is float and math.isfinite(seconds)
    ways = (exit_code is not None) + (signal is not None)
    if not plain or ways > 1 or not (ways or timed_out or too_much):
        raise ChannelError(f"{name}: the agent answered nonsense: {reprlib.repr(answer)}")
    if too_much:
        raise ChannelError(f"{name}: {' '.join(argv)[:200]}: more output than the agent carries")
    return CommandResult(argv, exit_code, signal, out, err, seconds)


def _one_of(numbers: range, value: Any) -> int | None:
    if value is None or (type(value) is int and value in numbers):
        return value
    raise ValueError("no exit status, or no signal")


def _printable(words: Any) -> str:
    """What a guest says, fit for a terminal, and not too much of it."""
    text = words if type(words) is str else reprlib.repr(words)
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text[:2000])
