"""The agent on a machine that is there already, over SSH: the same program, the same lines, and no file written there.

The remote command is a python3 that reads the agent from its standard input, as the stub of our images does from the
port; by sudo where the user is not root. It ends with the connection.
"""

from __future__ import annotations

import base64
import contextlib
import shlex
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import paramiko

from lsmlab.channel import ssh_host
from lsmlab.channel.agent import AgentChannel, agent_source
from lsmlab.channel.ssh_host import Place
from lsmlab.channel.ssh_login import Connection, Login, log_in
from lsmlab.errors import ChannelError

SESSION_SECONDS = 60.0
"""How long a session's start may take: for who is not there yet, systemd starts his own manager first."""
START_SECONDS = 60.0
"""How long the agent may take from the command to its first word: sudo may look into a directory service."""
END_SECONDS = 5.0
"""How long the remote process may take to end before the connection is closed all the same."""
ERROR_BYTES = 2000
"""As much of the remote process's last errors is kept."""
START = "import base64,sys;exec(base64.b64decode(sys.argv[1]))"
AS_SERVICE = (
    "systemd-run", "--quiet", "--pipe", "--wait", "--collect", "--property=SELinuxContext=-system_u:system_r:init_t:s0",
    "--property=OOMScoreAdjust=-1000", "--setenv=LC_ALL=C.UTF-8",
    "--setenv=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
)  # fmt: skip
"""In a guest of ours: the agent as the service that it is in images of ours, and not as part of a login's session."""
LOADER = """
import base64, os, sys, types
if sys.version_info < (3, 9):
    sys.exit("lsmlab: its python3 is %d.%d, and the agent takes 3.9 or later" % sys.version_info[:2])
if os.geteuid() != 0 and len(sys.argv) < 3:
    os.environ["LC_ALL"] = "C"
    try:
        again = ["python3", "-I", "-B", "-c", START, sys.argv[1], "as root"]
        os.execvp("sudo", ["sudo", "-n", "--", *BEHIND_SUDO, *again])
    except OSError as error:
        sys.exit("lsmlab: sudo does not start: " + error.strerror)
kept = b""
while b"\\n" not in kept:
    part = os.read(0, 1 << 16)
    if not part:
        sys.exit("lsmlab: the agent did not arrive")
    kept += part
guest = sys.modules["lsmlab.guest"] = types.ModuleType("lsmlab.guest")
for part in kept.split():
    name, text = part.decode().split(":")
    module = sys.modules["lsmlab.guest." + name] = types.ModuleType("lsmlab.guest." + name)
    setattr(guest, name, module)
    exec(compile(base64.b64decode(text), name, "exec"), module.__dict__)
    guest.agent.OPERATIONS.update(getattr(module, "OPERATIONS", ()))
agent = guest.agent
os.write(1, b"\\nready\\n")
agent.serve(0, 1)
for _ in range(20):
    children = []
    for thread in os.listdir("/proc/self/task"):
        try:
            children += agent.text_of("/proc/self/task/" + thread + "/children").split()
        except OSError:
            if os.path.exists("/proc/self/task/" + thread):
                raise
    for child in children:
        agent._end_session(int(child))
    if not children:
        break
os._exit(0)
"""
"""Runs as the login user, then once more by sudo. What is still running when the connection ends is ended with it."""


def _command(behind_sudo: Sequence[str] = ()) -> str:
    """One line and plain words, for whatever shell the user has there. -B: not even a cache of Python's is written."""
    program = f"START, BEHIND_SUDO = {START!r}, {list(behind_sudo)!r}\n{LOADER}"
    return shlex.join(["python3", "-I", "-B", "-c", START, base64.b64encode(program.encode()).decode()])


@dataclass(frozen=True, slots=True)
class Access:
    """How a guest of ours is logged in to, wherever its port is. Its host key was made by us: nothing is asked."""

    user: str
    key: Path
    known_hosts: Path
    """Knows the guest as `HOST_NAME`."""

    HOST_NAME = "lsmlab-guest"

    def place(self, name: str, port: int) -> Place:
        """The guest called `name`, at a port of this machine."""
        return Place(
            asked=name, user=self.user, address="127.0.0.1", port=port, known_as=self.HOST_NAME,
            known_hosts=(self.known_hosts,), keys=(self.key,), only_these_keys=True, proxy=(),
        )  # fmt: skip


class SshChannel(AgentChannel):
    """A channel to a machine over SSH. Safe for all threads. See `open_ssh`."""

    def __init__(self, connection: Connection, remote: paramiko.Channel, parts: Sequence[str] = ()) -> None:
        ours, self._theirs = socket.socketpair()
        super().__init__(ours, connection.place.asked)
        self._connection = connection
        self._remote = remote
        self._parts = ("agent", *parts)
        self._why = ""
        self._errors = bytearray()
        names = ("errors", "answers", "questions")
        work = (self._read_errors, self._pass_answers, self._pass_questions)
        self._pumps = [
            threading.Thread(target=do, name=f"lsmlab-ssh-{name}", daemon=True)
            for do, name in zip(work, names, strict=True)
        ]
        for pump in self._pumps:
            pump.start()

    @property
    def login(self) -> Login:
        """As whom we are in."""
        return self._connection.login

    def _program(self) -> bytes:
        return b" ".join(part.encode() + b":" + base64.b64encode(agent_source(part)) for part in self._parts)

    def _read_errors(self) -> None:
        while data := self._remote.recv_stderr(1 << 16):
            self._errors = (self._errors + data)[-ERROR_BYTES:]

    def _pass_answers(self) -> None:
        with contextlib.suppress(OSError):  # closed on our side
            while data := self._remote.recv(1 << 16):
                self._theirs.sendall(data)
        self._remote.status_event.wait(END_SECONDS)
        self._pumps[0].join(END_SECONDS)
        self._why = self._how_it_ended()
        with contextlib.suppress(OSError):
            self._theirs.shutdown(socket.SHUT_RDWR)

    def _pass_questions(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while data := self._theirs.recv(1 << 16):
                self._remote.sendall(data)
            self._remote.shutdown_write()

    def _how_it_ended(self) -> str:
        words = self._words()
        status = self._remote.exit_status
        how = "the connection was lost" if status < 0 else f"the agent ended with exit status {status}"
        return f"{how}: {words}" if words else how

    def _words(self) -> str:
        return self._errors.decode("utf-8", "backslashreplace").strip()

    def _lost(self, fault: str) -> None:
        super()._lost(self._why or fault)

    def bootstrap(self, timeout: float) -> None:
        """See `AgentChannel.bootstrap`. Raises ChannelError that says what the machine lacks."""
        try:
            super().bootstrap(timeout)
        except ChannelError as error:
            raise self._not_started(error) from None

    def _not_started(self, error: ChannelError) -> ChannelError:
        words, user = self._words(), self.login.user
        last = words.rpartition("\n")[2]
        if self._remote.exit_status == 127:
            return ChannelError(
                f"{self._name}: no python3 is found for {user}: {last}",
                hint="Install Python 3.9 or later there (Debian, Ubuntu and Fedora: the package python3).",
            )
        if last.startswith("lsmlab: its python3"):
            return ChannelError(f"{self._name}: {last.removeprefix('lsmlab: ')}", hint="Install a later one there.")
        if "sudo: " in words:
            return ChannelError(
                f"{self._name}: {user} is not root there and may not become it without a password: {last}",
                hint=f"Log in as root, or give {user} a line in sudoers: `{user} ALL=(ALL) NOPASSWD: ALL`. "
                "sudo says the same to a user who is in no line of sudoers at all.",
            )
        return error

    def drop(self) -> None:
        """Close the connection at once: the machine at its other end is about to be another. Never raises."""
        with contextlib.suppress(Exception):
            self._remote.close()
        self._connection.close()
        super().close()
        for pump in self._pumps:
            pump.join(END_SECONDS)
        self._theirs.close()

    def close(self) -> None:
        """End the agent, all that it runs, and the connection. Never raises, and may be called twice."""
        super().close()
        self._remote.status_event.wait(END_SECONDS)
        self._connection.close()
        for pump in self._pumps:
            pump.join(END_SECONDS)
        self._theirs.close()


def open_ssh(name: str, parts: Sequence[str] = ()) -> SshChannel:
    """Log in to the machine that `name` stands for, and start the agent there as root; the caller closes it.

    `parts`: the programs of `guest/` that add to the agent, by name, each after those that it needs.

    Raises DefinitionError for what is no name, HostError for what is wrong with this machine's own SSH files, and
    ChannelError that says which step failed and what to do.
    """
    return open_place(ssh_host.find(name), parts=parts)


def open_place(place: Place, *, parts: Sequence[str] = (), as_service: bool = False) -> SshChannel:
    """The same for a machine that is known already. `as_service`: see AS_SERVICE."""
    connection = log_in(place)
    try:
        remote = _start(connection, _command(AS_SERVICE if as_service else ()))
    except BaseException:
        connection.close()
        raise
    channel = SshChannel(connection, remote, parts)
    try:
        channel.connect()
        channel.bootstrap(START_SECONDS)
    except BaseException:
        channel.close()
        raise
    return channel


def _start(connection: Connection, command: str) -> paramiko.Channel:
    """Start the remote command."""
    late = threading.Event()

    def give_up() -> None:  # exec_command() itself waits for ever
        late.set()
        connection.transport.close()

    limit = threading.Timer(SESSION_SECONDS, give_up)
    limit.start()
    try:
        remote = connection.transport.open_session(timeout=SESSION_SECONDS)
        remote.exec_command(command)
    except (paramiko.SSHException, EOFError, OSError) as error:
        user = f"{connection.place.asked}: {connection.login.user} is let in"
        if late.is_set():
            raise ChannelError(
                f"{user}, and no session has started within {SESSION_SECONDS:.0f} s",
                hint="See what holds it up there: `journalctl -u systemd-logind`, pam's modules.",
            ) from None
        raise ChannelError(
            f"{user}, and may run no command: {str(error) or 'it hung up'}",
            hint="See what sshd there allows this user: ForceCommand, a restricted key, MaxSessions.",
        ) from None
    finally:
        limit.cancel()
    return remote
