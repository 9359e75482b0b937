"""The real agent in a process of this machine, loaded by the stub of the images, behind a channel of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from importlib import resources
from pathlib import Path
from typing import Self

import pytest

from lsmlab.channel.agent import AgentChannel
from lsmlab.channel.base import Channel
from lsmlab.channel.ssh import open_ssh
from lsmlab.errors import MachineError
from ssh_server import ssh_home

STUB = Path(str(resources.files("lsmlab") / "image/overlay/usr/lib/lsmlab/agent"))
MARK = "LSMLAB_LOCAL_AGENT"
"""In the environment of the agent and of all that it starts: whose it is."""
LAUNCHER = """
import os, sys
stub, port, real = sys.argv[1], int(sys.argv[2]), os.open
def open_port(path, flags):
    assert (path, flags) == ("/dev/virtio-ports/lsmlab.agent", os.O_RDWR)
    os.open = real
    return port
with open(stub) as file:
    text = file.read()
os.open = open_port
exec(compile(text, stub, "exec"))
"""
"""Runs the stub with a socket in place of the virtio-serial port."""


def python_3_9() -> str | None:
    """The oldest Python that a guest may have, where this machine has it."""
    for program in ("python3.9", *map(str, Path.home().glob(".pyenv/versions/3.9.*/bin/python"))):
        with contextlib.suppress(OSError):
            version = [program, "-c", "import sys; print(sys.version_info[:2])"]
            if subprocess.run(version, capture_output=True, check=False).stdout.strip() == b"(3, 9)":
                return program
    return None


class NoMachine:
    """What an agent alone cannot do."""

    running = True
    stays = False

    def snapshot(self, name: str) -> None:
        """See `Machine.snapshot`."""
        raise MachineError(f"no snapshot {name!r}: this is no machine")

    def restore(self, name: str) -> None:
        """See `Machine.restore`."""
        raise MachineError(f"no snapshot {name!r}: this is no machine")


class LocalAgent(NoMachine):
    """The agent as a machine that knows no snapshots. It is root where the tests are."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        ours, theirs = socket.socketpair()
        self._mark = uuid.uuid4().hex
        self._errors = folder / "errors"
        with theirs, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, "-I", "-c", LAUNCHER, str(STUB), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                cwd=folder,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", MARK: self._mark},
            )
        self._agent = AgentChannel(ours, "local")
        self._agent.connect()
        self._agent.bootstrap(30)

    @property
    def channel(self) -> Channel:
        """See `Machine.channel`."""
        return self._agent

    @property
    def pid(self) -> int:
        """The agent's process."""
        return self._process.pid

    def console_tail(self, lines: int = 15) -> str:
        """See `Machine.console_tail`. What the agent wrote to its standard error, whole."""
        return self._errors.read_text("utf-8", "backslashreplace")

    def stop(self) -> None:
        """See `Machine.stop`."""
        self._process.kill()
        self._process.wait()
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
        self._agent.close()


class AgentOverSsh(NoMachine):
    """The agent behind an SSH server of this process, which logs in to a home in an empty `folder`."""

    def __init__(self, folder: Path) -> None:
        with contextlib.ExitStack() as held:
            home = held.enter_context(ssh_home(folder))
            if os.geteuid() != 0:  # then the agent is not root either, as everywhere in these tests
                home.sudo_that_obeys()
            environment = held.enter_context(pytest.MonkeyPatch.context())
            environment.setenv("HOME", str(folder))
            environment.delenv("SSH_AUTH_SOCK", raising=False)
            self._agent = open_ssh("machine")
            held.callback(self._agent.close)
            environment.undo()
            self._server = home.server
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def channel(self) -> Channel:
        """See `Machine.channel`."""
        return self._agent

    def console_tail(self, lines: int = 15) -> str:
        """See `Machine.console_tail`; there is none."""
        return ""

    def stop(self) -> None:
        """See `Machine.stop`: the connection is cut first, as by a machine that loses its power."""
        self._server.drop()
        self._held.close()
