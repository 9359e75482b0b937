"""A real SSH server in the tests' own process, on 127.0.0.1: it runs what it is asked to by a shell, with pipes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko
from paramiko.common import AUTH_FAILED, AUTH_PARTIALLY_SUCCESSFUL, AUTH_SUCCESSFUL, OPEN_SUCCEEDED


@dataclass(slots=True)
class Behaviour:
    """What the server does; tests change it."""

    authorised: list[bytes]
    """Public keys that may log in."""
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"})
    options: dict[str, Any] = field(default_factory=dict)
    """For Popen: another user, another folder."""
    auth: str = "publickey"
    more: bool = False
    """A key is not enough."""
    other_keys: list[paramiko.PKey] = field(default_factory=list)
    """Host keys besides the first."""
    answers_keys: bool = True
    answers_exec: bool = True
    refuses_exec: bool = False


class _Session(paramiko.ServerInterface):
    def __init__(self, server: SshServer) -> None:
        self._server = server

    def get_allowed_auths(self, username: str) -> str:
        return self._server.does.auth

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self._server.users.append(username)
        if not self._server.does.answers_keys:
            self._server.stopped.wait(60)
        if "publickey" not in self._server.does.auth or key.asbytes() not in self._server.does.authorised:
            return AUTH_FAILED
        return AUTH_PARTIALLY_SUCCESSFUL if self._server.does.more else AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        if not self._server.does.answers_exec:
            self._server.stopped.wait(60)
            return False
        if self._server.does.refuses_exec:
            return False
        self._server.execute(channel, command.decode())
        return True


class SshServer:
    """Listens on a port of its own. At the end nothing of it is left, and no process that it started."""

    def __init__(self, host_key: paramiko.PKey, does: Behaviour) -> None:
        self.host_key = host_key
        self.does = does
        self.users: list[str] = []
        self.commands: list[str] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.stopped = threading.Event()
        self._transports: list[paramiko.Transport] = []
        self._threads: list[threading.Thread] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._go(self._accept)

    def _go(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                transport = paramiko.Transport(sock)
                for key in (self.host_key, *self.does.other_keys):
                    transport.add_server_key(key)
                self._transports.append(transport)
                with contextlib.suppress(paramiko.SSHException, EOFError):
                    transport.start_server(threading.Event(), server=_Session(self))

    def execute(self, channel: paramiko.Channel, command: str) -> None:
        """Run `command` as sshd does: by a shell, its output and errors apart, and tell its exit status."""
        self.commands.append(command)
        self._go(self._run, channel, command)

    def _run(self, channel: paramiko.Channel, command: str) -> None:
        # Not before the client's first bytes: a command that ends at once would close the channel before paramiko has
        # told the client that it was accepted, which sshd never does
        first = channel.recv(1 << 16)
        if not first:
            return
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=self.does.environment, start_new_session=True, bufsize=0, **self.does.options,
        )  # fmt: skip
        self.processes.append(process)
        self._go(self._input, channel, process, first)
        errors = threading.Thread(target=self._output, args=(process.stderr, channel.sendall_stderr), daemon=True)
        errors.start()
        self._go(self._output_and_end, channel, process, errors)

    @staticmethod
    def _input(channel: paramiko.Channel, process: subprocess.Popen[bytes], data: bytes) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError), process.stdin:
            while data:
                left = memoryview(data)
                while left:
                    left = left[process.stdin.write(left) :]
                data = channel.recv(1 << 16)

    @staticmethod
    def _output(stream: Any, send: Callable[[bytes], None]) -> None:
        with contextlib.suppress(OSError), stream:
            while data := stream.read(1 << 16):
                send(data)

    def _output_and_end(
        self, channel: paramiko.Channel, process: subprocess.Popen[bytes], errors: threading.Thread
    ) -> None:
        self._output(process.stdout, channel.sendall)
        errors.join()
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            channel.send_exit_status(process.wait() % 256)
            channel.close()

    def drop(self) -> None:
        """Cut every connection, as a machine does that loses its power."""
        for transport in self._transports:
            with contextlib.suppress(OSError):
                transport.sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """End it, and every process that it started."""
        self.stopped.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for transport in self._transports:
            transport.close()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), thread


@dataclass(frozen=True, slots=True)
class SshHome:
    """A user's home with a key and an SSH config that has the server as `machine`, whose key is known."""

    folder: Path
    server: SshServer
    key: Path

    @property
    def known_hosts(self) -> Path:
        return self.folder / ".ssh/known_hosts"

    def config(self, *lines: str, user: str = "tester") -> None:
        """What the config says of `machine`: `lines` go before the usual ones."""
        usual = ("HostName 127.0.0.1", f"Port {self.server.port}", f"User {user}", f"IdentityFile {self.key}")
        text = "\n  ".join(("Host machine", *lines, *usual))
        (self.folder / ".ssh/config").write_text(f"{text}\n")

    def know(self, key: paramiko.PKey, marker: str = "") -> None:
        """Have known_hosts say that the server's key is `key`."""
        line = f"{marker}[127.0.0.1]:{self.server.port} {key.get_name()} {key.get_base64()}\n"
        self.known_hosts.write_text(line)

    def sudo_that_obeys(self) -> None:
        """Have the server find a sudo that asks nobody, and changes no user."""
        program = self.folder / "obeys/sudo"
        program.parent.mkdir()
        program.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
        program.chmod(0o755)
        self.server.does.environment["PATH"] = f"{program.parent}:{os.environ['PATH']}"


@contextlib.contextmanager
def ssh_home(folder: Path) -> Iterator[SshHome]:
    """A home in `folder`, and its server while the block lasts. Whoever uses it sets HOME."""
    (folder / ".ssh").mkdir(mode=0o700)
    key = folder / ".ssh/id_ecdsa"
    own = paramiko.ECDSAKey.generate()
    own.write_private_key_file(str(key))
    server = SshServer(paramiko.ECDSAKey.generate(), Behaviour([own.asbytes()]))
    try:
        home = SshHome(folder, server, key)
        home.config()
        home.know(server.host_key)
        yield home
    finally:
        server.stop()
