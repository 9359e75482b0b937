"""The way of the Docker SDK to an engine inside a guest: one HTTP exchange on its Unix socket is one question to our
agent. There is no port and no network; what the engine answers is a guest's word, and not trusted."""

from __future__ import annotations

import base64
import http.client
import io
from typing import Any

import requests
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict

from lsmlab.channel.base import Channel
from lsmlab.errors import ChannelError, EngineError

ENGINE_SECONDS = 120.0
"""How long the engine may take for one answer: a container's start is some seconds under emulation."""
OURS = frozenset({"host", "connection", "accept-encoding"})
"""Headers that are set here, whatever the SDK asks for: each exchange has a connection of its own."""


class ChannelAdapter(BaseAdapter):
    """What requests sends goes through `channel` to the Unix socket `socket` in the guest."""

    def __init__(self, channel: Channel, socket: str) -> None:
        super().__init__()
        self._channel, self._socket = channel, socket

    def send(
        self, request: requests.PreparedRequest, stream: bool = False, timeout: Any = None, *_: Any, **__: Any
    ) -> requests.Response:
        """The whole answer. Raises EngineError where there is none, or it is none of HTTP."""
        seconds = timeout[-1] if isinstance(timeout, tuple) else timeout
        seconds = seconds if isinstance(seconds, (int, float)) else ENGINE_SECONDS
        what = f"{request.method} {request.path_url.partition('?')[0]}"
        try:
            answer = self._channel.ask(
                "exchange", within=seconds + 30, path=self._socket, timeout=seconds,
                data=base64.b64encode(message(request)).decode(),
            )  # fmt: skip
        except ChannelError as error:
            raise EngineError(
                f"no container engine answers on {self._socket}: {error.message}",
                hint="`systemctl status docker` in the guest says more.",
            ) from error
        response = read_response(carried(answer, what), what)
        response.request, response.url = request, request.url or ""
        return response

    def close(self) -> None:
        """Nothing is kept open."""


def message(request: requests.PreparedRequest) -> bytes:
    """A request as it goes over the wire. Raises EngineError for a body that is no plain bytes."""
    given: Any = request.body
    body = given.encode() if isinstance(given, str) else given or b""
    if not isinstance(body, bytes):
        raise EngineError(f"{request.method} {request.path_url}: a body that comes in pieces cannot be carried")
    headers: dict[str, Any] = {name: value for name, value in request.headers.items() if name.lower() not in OURS}
    headers |= {"Host": "engine", "Connection": "close", "Content-Length": str(len(body))}
    lines = [f"{request.method} {request.path_url} HTTP/1.1"]
    for name, value in headers.items():
        lines.append(f"{name}: {value.decode('latin-1') if isinstance(value, bytes) else value}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def carried(answer: Any, what: str) -> bytes:
    """The bytes that the agent's `exchange` brought. Raises EngineError."""
    try:
        data = base64.b64decode(answer["out"], validate=True)
        timed_out, too_much = answer["timed_out"], answer["too_much"]
    except (TypeError, ValueError, KeyError) as error:
        raise EngineError(f"{what}: the agent answered nonsense: {error!r:.200}") from error
    if timed_out or too_much:
        raise EngineError(f"{what}: {'no answer in time' if timed_out else 'a longer answer than the agent carries'}")
    return data


def read_response(data: bytes, what: str) -> requests.Response:
    """An HTTP answer from its bytes. Raises EngineError where it is none, or not whole."""
    if not data:
        raise EngineError(f"{what}: the container engine closed the connection without an answer")
    source = http.client.HTTPResponse(_Bytes(data))  # type: ignore[arg-type] # all that it asks of a socket
    try:
        source.begin()
        body = source.read()
    except (http.client.HTTPException, ValueError, OverflowError, OSError) as error:  # a chunk of no size there is
        raise EngineError(f"{what}: the container engine's answer is no whole HTTP: {error!r:.200}") from error
    if source.length:  # http.client takes a body that ends early, where it was read to its end
        raise EngineError(f"{what}: the container engine's answer ended {source.length} bytes early")
    response = requests.Response()
    response.status_code, response.reason = source.status, source.reason
    response.headers = CaseInsensitiveDict(source.getheaders())
    response.raw = io.BytesIO(body)
    return response


class _Bytes:
    """A socket that has received `data`, and no more."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: Any) -> io.BytesIO:
        return io.BytesIO(self._data)
