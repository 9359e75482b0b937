"""Container engines of the tests' own: one says what it is told to say, one really runs what it is asked to."""

from __future__ import annotations

import json
import os
import re
import socketserver
import struct
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from fakes import ScriptedChannel
from lsmlab.errors import ChannelError
from lsmlab.guest import agent

Answer = tuple[int, Any]
Routes = dict[str, Answer | Callable[[dict[str, Any]], Answer]]


class AgentChannel(ScriptedChannel):
    """A channel to the real agent's `exchange`, in this process."""

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        if operation != "exchange":
            return super().ask(operation, within=within, **arguments)
        try:
            return json.loads(json.dumps(agent.exchange(**arguments)))
        except OSError as error:  # as the agent's `_reply` does
            raise ChannelError(f"guest: exchange: {error}") from error


class FakeEngine:
    """An HTTP server on a Unix socket: answers by method and path, and keeps what it was sent."""

    def __init__(self, path: Path, routes: Routes) -> None:
        self.path, self.routes = str(path), routes
        self.asked: list[tuple[str, Any]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                line = f"{self.command} {re.sub(r'^/v[0-9.]+', '', self.path.partition('?')[0])}"
                given: Any = (
                    json.loads(body) if self.headers.get_content_type() == "application/json" and body else body
                )
                fake.asked.append((line, given))
                found = fake.routes.get(line, (404, {"message": f"no such thing: {line}"}))
                status, said = found(given) if callable(found) else found
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/octet-stream" if said is data else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer  # noqa: N815 - the names are http.server's

            def log_message(self, *_: Any) -> None: ...

        self._server = socketserver.ThreadingUnixStreamServer(self.path, Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sent(self, line: str) -> Any:
        """The one body that was sent to `line`."""
        (body,) = [body for asked, body in self.asked if asked == line]
        return body


def frame(stream: int, data: bytes) -> bytes:
    return struct.pack(">BxxxI", stream, len(data)) + data


class LocalEngine(FakeEngine):
    """Its containers are folders, and their commands processes of this machine, with nothing around them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder / "engine.sock",
            {
                "GET /version": (200, {"ApiVersion": "1.45"}),
                "GET /info": (200, {"SecurityOptions": ["name=apparmor"]}),
                "POST /containers/create": self._create,
            },
        )
        self._folder = folder
        self._main: list[subprocess.Popen[bytes]] = []
        self._count = 0

    def close(self) -> None:
        super().close()
        for process in self._main:
            process.kill()
            process.wait()

    def _create(self, asked: dict[str, Any]) -> Answer:
        self._count += 1
        name, root = f"c{self._count}", self._folder / f"c{self._count}"
        root.mkdir()
        log = root.with_suffix(".log")
        started: list[subprocess.Popen[bytes]] = []

        def start(_: Any) -> Answer:
            with log.open("wb") as out:
                process = subprocess.Popen(
                    asked["Cmd"], cwd=root, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
                )
            started.append(process)
            self._main.append(process)
            return 204, b""

        def state(_: Any) -> Answer:
            code = started[0].poll()
            state = {"Running": code is None, "ExitCode": code or 0}
            return 200, {"Id": name, "State": state, "Config": {"Tty": False}}

        self.routes |= {
            f"POST /containers/{name}/start": start,
            f"GET /containers/{name}/json": state,
            f"GET /containers/{name}/logs": lambda _: (200, frame(1, log.read_bytes())),
            f"POST /containers/{name}/exec": lambda given: self._exec(root, given["Cmd"]),
        }
        return 201, {"Id": name}

    def _exec(self, root: Path, argv: list[str]) -> Answer:
        self._count += 1
        number = f"e{self._count}"
        ended: list[int] = []

        def start(_: Any) -> Answer:
            env = {**os.environ, "LC_ALL": "C"}
            done = subprocess.run(argv, cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
            ended.append(done.returncode if done.returncode >= 0 else 128 - done.returncode)
            return 200, frame(1, done.stdout) + frame(2, done.stderr)

        self.routes |= {
            f"POST /exec/{number}/start": start,
            f"GET /exec/{number}/json": lambda _: (200, {"ExitCode": ended[0] if ended else None}),
        }
        return 201, {"Id": number}
