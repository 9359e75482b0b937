"""Which machine a name stands for in SSH, and by which key it is known: OpenSSH's own files, read and never written.

Of the user: `~/.ssh/config` and `known_hosts`. `vagrant:NAME` is a machine of Vagrant, which answers for itself.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import hashlib
import hmac
import ipaddress
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paramiko
from paramiko.config import ConfigParseError, CouldNotCanonicalize

from lsmlab import host
from lsmlab.errors import DefinitionError, HostError

VAGRANT = "vagrant:"
SPELLED = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.@\\-]*)@)?"
    r"(?:\[(?P<address>[0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\]|(?P<name>[A-Za-z0-9_.][A-Za-z0-9_.-]*))"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
"""Without anything that a shell would obey: a ProxyCommand of the user's is given these words."""
VAGRANT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
USER_KNOWN_HOSTS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
GLOBAL_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a machine is reached, as whom, and where its key would be known."""

    asked: str
    """As the user wrote it."""
    user: str
    address: str
    port: int
    known_as: str
    """Its name in known_hosts."""
    known_hosts: tuple[Path, ...]
    keys: tuple[Path, ...]
    """Files of private keys to log in with; not all need be there."""
    only_these_keys: bool
    """IdentitiesOnly: none else of the agent's."""
    proxy: tuple[str, ...]
    """The command that the connection goes through; empty for none."""
    new_key: bool = False
    """No key can be known: a machine of Vagrant on this machine or in a private network."""

    @property
    def by_hand(self) -> str:
        """The command by which a person logs in there."""
        if self.asked.startswith(VAGRANT):
            return f"vagrant ssh {self.asked.removeprefix(VAGRANT)}"
        return f"ssh {shlex.quote(f'ssh://{self.asked}' if ':' in self.asked else self.asked)}"


@dataclass(frozen=True, slots=True)
class KnownKey:
    """One line of known_hosts."""

    names: str
    kind: str
    blob: bytes
    revoked: bool

    def fits(self, name: str) -> bool:
        """Whether the line is about `name`: hashed, or patterns with * and ?, of which ! takes away."""
        if self.names.startswith("|1|"):
            with contextlib.suppress(ValueError):
                salt, digest = (base64.b64decode(part) for part in self.names.split("|")[2:])
                return hmac.compare_digest(hmac.digest(salt, name.encode(), hashlib.sha1), digest)
            return False
        patterns = self.names.lower().split(",")
        if any(p.startswith("!") and _matches(p[1:], name) for p in patterns):
            return False
        return any(_matches(p, name) for p in patterns)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), name) is not None


def find(name: str) -> Place:
    """What `name` stands for: an alias, `[USER@]HOST[:PORT]`, or `vagrant:NAME`.

    Raises DefinitionError for what is none of these, HostError where the config cannot be read or vagrant fails.
    """
    if name.startswith(VAGRANT):
        return _of_vagrant(name)
    found = SPELLED.fullmatch(name)
    if found is None or not 0 < int(found["port"] or 22) < 65536:
        raise DefinitionError(
            f"--ssh {name!r}: no name of a machine",
            hint="Expected an alias of ~/.ssh/config, [USER@]HOST[:PORT] with IPv6 in brackets, or vagrant:NAME.",
        )
    said = "".join(f"{key} {found[group]}\n" for key, group in (("User", "user"), ("Port", "port")) if found[group])
    file = Path("~/.ssh/config").expanduser()
    try:
        text = file.read_text("utf-8") if file.exists() else ""
    except (OSError, ValueError) as error:
        raise HostError(f"{file}: cannot be read: {error}") from None
    # What is said in the name goes before the file: the first value of a key counts
    return _place(name, _options(said + text, found["address"] or found["name"], str(file)))


def _of_vagrant(asked: str) -> Place:
    name = asked.removeprefix(VAGRANT)
    if not VAGRANT_NAME.fullmatch(name):
        raise DefinitionError(f"--ssh {asked!r}: {name!r} is no name of a machine of Vagrant")
    answer = host.run(
        [host.need("vagrant"), "ssh-config", name], what=f"asking vagrant how {name} is reached", timeout=120
    )
    options = _options(answer.decode("utf-8", "replace"), name, "the answer of vagrant ssh-config")
    return _place(asked, options, of_vagrant=True)


def _options(text: str, name: str, source: str) -> dict[str, Any]:
    """What an OpenSSH config says of `name`. `Include` is not followed: paramiko does not."""
    try:
        return dict(paramiko.SSHConfig.from_text(text).lookup(name))
    except (ConfigParseError, CouldNotCanonicalize, ImportError, ValueError, KeyError) as error:
        raise HostError(f"{source}: cannot be read for {name}: {error}") from None


def _place(asked: str, options: Mapping[str, Any], *, of_vagrant: bool = False) -> Place:
    address = options["hostname"]
    try:
        port = int(options.get("port", 22))
    except ValueError:
        raise HostError(f"{asked}: Port {options['port']}: expected a number") from None
    named = options.get("hostkeyalias") or (address if port == 22 else f"[{address}]:{port}")
    proxy = _proxy(options, address, port)
    user_files = options.get("userknownhostsfile", USER_KNOWN_HOSTS)
    files = f"{user_files} {options.get('globalknownhostsfile', GLOBAL_KNOWN_HOSTS)}".split()
    # A machine of Vagrant makes its key when it first boots. Nobody else is taken at his word: not behind a proxy,
    # where a private address is another network's
    new_key = (
        of_vagrant
        and options.get("stricthostkeychecking") == "no"
        and user_files == "/dev/null"
        and _is_near(address)
        and not proxy
    )
    return Place(
        asked=asked,
        user=options.get("user") or getpass.getuser(),
        address=address,
        port=port,
        known_as=named.lower(),
        known_hosts=tuple(Path(f).expanduser() for f in files if f not in {"none", "/dev/null"}),
        keys=tuple(Path(f).expanduser() for f in options.get("identityfile", DEFAULT_KEYS)),
        only_these_keys=options.get("identitiesonly", "no") == "yes",
        proxy=proxy,
        new_key=new_key,
    )


def _is_near(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.is_loopback or found.is_private


def _proxy(options: Mapping[str, Any], address: str, port: int) -> tuple[str, ...]:
    """ProxyCommand, by a shell as ssh does it, or the command that ProxyJump stands for."""
    if command := options.get("proxycommand"):
        return ("sh", "-c", f"exec {command}")
    jumps = options.get("proxyjump", "none")
    if jumps == "none":
        return ()
    *before, last = (j if j.startswith("ssh://") else f"ssh://{j}" for j in jumps.replace(" ", "").split(","))
    through = ("-J", ",".join(before)) if before else ()
    return ("ssh", "-o", "BatchMode=yes", *through, "-W", f"[{address}]:{port}", "--", last)


def known_keys(place: Place) -> list[KnownKey]:
    """Every key that known_hosts has for this machine, revoked ones included. Raises HostError."""
    return [key for file in place.known_hosts for key in _read(file) if key.fits(place.known_as)]


def _read(file: Path) -> Iterator[KnownKey]:
    try:
        lines = file.read_text("utf-8", "replace").splitlines() if file.exists() else []
    except OSError as error:
        raise HostError(f"{file}: cannot be read: {error.strerror}") from None
    for line in lines:
        fields = line.split()
        marker = fields.pop(0) if line.startswith("@") else ""
        if marker in {"", "@revoked"} and len(fields) >= 3 and not line.startswith("#"):
            with contextlib.suppress(ValueError):
                yield KnownKey(fields[0], fields[1], base64.b64decode(fields[2]), marker == "@revoked")
