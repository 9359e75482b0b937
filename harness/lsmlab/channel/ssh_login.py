"""Logging in over SSH: the machine's key is checked, ours are offered, nobody is asked, and no file is written.

A key that is not known, a passphrase or a password that would be asked for: each is an error that says what to do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import paramiko
from paramiko.pkey import PublicBlob, UnknownKeyType

from lsmlab import host
from lsmlab.channel.ssh_host import Place, known_keys
from lsmlab.errors import ChannelError

SECONDS = 15.0
"""How long each step may take: to connect, the server's banner, the exchange of keys, each key that is offered."""
ALIVE = {
    socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4, socket.TCP_USER_TIMEOUT: 60_000,
}  # fmt: skip
"""A machine that was cut off, or lost its power, says no more: the kernel gives such a connection up after a minute or
so, and not after 15 or never. In seconds, probes and milliseconds: tcp(7)."""
RSA = ("rsa-sha2-512", "rsa-sha2-256")
"""The signatures that an `ssh-rsa` key makes today."""

logging.getLogger("paramiko").addHandler(logging.NullHandler())  # what it has to say comes as an exception too


@dataclass(frozen=True, slots=True)
class Login:
    """As whom we are in, and what showed that it is the right machine."""

    user: str
    address: str
    port: int
    key: str
    """Type and place of the key that was accepted."""
    host_key: str
    """Type and SHA256 fingerprint."""
    known: bool
    """Whether the host key is in known_hosts; False only for machines of Vagrant."""


class Connection:
    """An SSH connection that is logged in, with all that it holds open."""

    def __init__(self, place: Place, login: Login, transport: paramiko.Transport, held: contextlib.ExitStack) -> None:
        self.place = place
        self.login = login
        self.transport = transport
        self._held = held

    def close(self) -> None:
        """End it, and its proxy. May be called twice."""
        self._held.close()


def log_in(place: Place) -> Connection:
    """Connect to `place`, see that it is the machine that known_hosts knows, and log in with a key.

    Raises ChannelError that says which step failed and what to do, HostError where known_hosts cannot be read.
    """
    with contextlib.ExitStack() as held:
        words, sock = _reach(place, held)
        transport = paramiko.Transport(sock)
        held.callback(transport.close)
        key = _exchange_keys(place, transport, words)
        known = _identify(place, key)
        accepted = _authenticate(place, transport)
        login = Login(place.user, place.address, place.port, accepted, _shown(key), known)
        return Connection(place, login, transport, held.pop_all())


Words = Callable[[], str]
"""What the proxy, where there is one, has to say about a failure."""


def _reach(place: Place, held: contextlib.ExitStack) -> tuple[Words, socket.socket]:
    if place.proxy:
        return _through_proxy(place, held)
    where = f"{place.asked}: connecting to {place.address} port {place.port}"
    try:
        sock = socket.create_connection((place.address, place.port), SECONDS)
    except socket.gaierror as error:
        raise ChannelError(
            f"{place.asked}: no machine is called {place.address!r}: {error.strerror}",
            hint="See that the name is right, here or in ~/.ssh/config, and that it resolves.",
        ) from None
    except TimeoutError:
        raise ChannelError(f"{where}: no answer within {SECONDS:.0f} s") from None
    except OSError as error:
        raise ChannelError(
            f"{where}: {error.strerror or error}", hint="See that the machine is up, and sshd listens on this port."
        ) from None
    held.enter_context(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return lambda: "", sock


def _through_proxy(place: Place, held: contextlib.ExitStack) -> tuple[Words, socket.socket]:
    ours, theirs = socket.socketpair()
    held.enter_context(ours)
    errors = os.memfd_create("errors")
    held.callback(os.close, errors)
    with theirs:
        try:
            process = subprocess.Popen(
                place.proxy,
                env=host.environment(),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise ChannelError(
                f"{place.asked}: {place.proxy[0]}, its proxy, does not start: {error.strerror}"
            ) from None
    held.callback(process.wait)
    held.callback(_end, process)

    def words() -> str:
        said = os.pread(errors, 2000, 0).decode("utf-8", "backslashreplace").strip()
        return f"\n  its proxy, {shlex.join(place.proxy)[:300]}: {said}"

    return words, ours


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a proxy, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _exchange_keys(place: Place, transport: paramiko.Transport, words: Words) -> paramiko.PKey:
    transport.banner_timeout = transport.auth_timeout = SECONDS
    options = transport.get_security_options()
    # The server shows one key of those that it has: a kind that we know, where there is one
    kinds = {kind for key in known_keys(place) for kind in (RSA if key.kind == "ssh-rsa" else (key.kind,))}
    options.key_types = sorted(options.key_types, key=lambda kind: kind not in kinds)
    try:
        transport.start_client(timeout=SECONDS)
        return transport.get_remote_server_key()
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise ChannelError(
            f"{place.asked}: {place.address} port {place.port} does not answer as an SSH server: "
            f"{str(error)[:300] or 'it hung up'}{words()}",
            hint="See that sshd is what listens there, and that it is not too old for today's key exchange.",
        ) from None


def _shown(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.fingerprint}"


def _identify(place: Place, key: paramiko.PKey) -> bool:
    """Whether the machine's key is known; False for one that cannot be. Raises ChannelError for a wrong one."""
    known = known_keys(place)
    same = [k for k in known if k.blob == key.asbytes()]
    if any(k.revoked for k in same):
        raise ChannelError(
            f"{place.asked}: the host key of {place.known_as} is revoked in known_hosts: {_shown(key)}",
            hint="Do not log in: somebody else may have this key. Ask whoever runs the machine.",
        )
    if same:
        return True
    if place.new_key:
        return False
    if known:
        raise ChannelError(
            f"{place.asked}: the host key of {place.known_as} has CHANGED: it is {_shown(key)}, and known_hosts has "
            "another",
            hint="The machine was made anew, or somebody stands between. Ask whoever runs it, and only then: "
            f"`ssh-keygen -R {shlex.quote(place.known_as)}`, and `{place.by_hand}` once.",
        )
    raise ChannelError(
        f"{place.asked}: the host key of {place.known_as} is not known: {_shown(key)}",
        hint="Compare it with what `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` prints there. Then log in once "
        f"by `{place.by_hand}`, or: `ssh-keyscan -p {place.port} {place.address} >> ~/.ssh/known_hosts`.",
    )


def _authenticate(place: Place, transport: paramiko.Transport) -> str:
    """Offer one key after the other; the one that was accepted. Raises ChannelError that says what became of each."""
    refused: list[str] = []
    locked: list[Path] = []
    with contextlib.ExitStack() as held:
        for what, key in _offers(place, held, locked):
            try:
                more = transport.auth_publickey(place.user, key)
            except paramiko.BadAuthenticationType as error:
                raise ChannelError(
                    f"{place.asked}: no key may log in as {place.user}: sshd takes {', '.join(error.allowed_types)}",
                    hint="Have sshd take keys (PubkeyAuthentication yes): lsmlab gives no password.",
                ) from None
            except (paramiko.SSHException, EOFError, OSError) as error:
                refused.append(f"{what} ({str(error)[:100].rstrip('.')})")
                if not transport.is_active():  # too many for its MaxAuthTries
                    break
                continue
            if not more:
                return what
            raise ChannelError(
                f"{place.asked}: {what} is accepted for {place.user}, and sshd asks for more: {', '.join(more)[:200]}",
                hint="lsmlab logs in with a key alone.",
            )
    return _not_in(place, refused, locked)


def _not_in(place: Place, refused: list[str], locked: list[Path]) -> NoReturn:
    tried = f"refused: {', '.join(refused)}" if refused else "there is no other to try"
    if locked:
        raise ChannelError(
            f"{place.asked}: {', '.join(map(str, locked))} is encrypted, and no agent has it; {tried}",
            hint=f"`ssh-add {shlex.quote(str(locked[0]))}`; lsmlab asks for no passphrase.",
        )
    hint = f"`{place.by_hand}` has to work without a question, or see IdentityFile in ~/.ssh/config."
    if refused:
        raise ChannelError(f"{place.asked}: {place.user} is not let in; {tried}", hint=hint)
    looked = ", ".join(map(str, place.keys))
    raise ChannelError(f"{place.asked}: no key to log in with, neither in an agent nor in {looked}", hint=hint)


def _offers(place: Place, held: contextlib.ExitStack, locked: list[Path]) -> Iterator[tuple[str, paramiko.PKey]]:
    """The keys to offer, each with what it is called: those of the agent, the files' own first; then the files'.

    Files that are encrypted and in no agent go to `locked`.
    """
    named = {blob for path in place.keys if (blob := _public(path))}
    agent = _agent(held)
    for key in sorted(agent, key=lambda k: k.asbytes() not in named):
        if key.asbytes() in named or not place.only_these_keys:
            yield f"{_shown(key)} of the agent", key
    offered = {key.asbytes() for key in agent}
    for path in place.keys:
        if not path.is_file() or _public(path) in offered:
            continue
        try:
            own = paramiko.PKey.from_path(path)
        except (paramiko.PasswordRequiredException, TypeError):  # TypeError is cryptography's word for it
            locked.append(path)
        except (OSError, ValueError, paramiko.SSHException, UnknownKeyType):
            continue
        else:
            yield f"{own.get_name()} {path}", own


def _agent(held: contextlib.ExitStack) -> tuple[paramiko.AgentKey, ...]:
    found: list[paramiko.Agent] = []

    def ask() -> None:  # without a limit of its own, and an agent that is stale may never answer
        with contextlib.suppress(paramiko.SSHException, OSError):
            found.append(paramiko.Agent())

    asking = threading.Thread(target=ask, name="lsmlab-ssh-agent", daemon=True)
    asking.start()
    asking.join(SECONDS)
    for agent in found:
        held.callback(agent.close)
    return tuple(key for agent in found for key in agent.get_keys())


def _public(path: Path) -> bytes | None:
    """The public key beside a private one, where there is one."""
    with contextlib.suppress(OSError, ValueError, paramiko.SSHException):
        return PublicBlob.from_file(f"{path}.pub").key_blob
    return None
