"""The channel over SSH, against a real server on 127.0.0.1 in this process; what it runs is the real agent."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest

from descriptors import descriptors
from lsmlab import portal
from lsmlab.channel import ssh, ssh_host, ssh_login
from lsmlab.channel.ssh import SshChannel, open_ssh
from lsmlab.errors import ChannelError, DefinitionError, HostError
from ssh_server import SshHome, ssh_home

pytestmark = pytest.mark.ssh
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can have the server run commands as another user")


async def _nothing() -> None:
    """Has the portal's loop, with its descriptors, started."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshHome]:
    """The user's home is a made-up one, without an agent of SSH. At the end no thread and no descriptor is left."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    portal.call(_nothing())
    before, threads = descriptors(), set(threading.enumerate())
    with ssh_home(tmp_path) as made:
        yield made
    left = set(threading.enumerate()) - threads
    for thread in left:
        thread.join(10)
    assert not [t for t in left if t.is_alive()]
    assert descriptors() <= before


@pytest.fixture
def channel(home: SshHome) -> Iterator[SshChannel]:
    """A channel to the server."""
    opened = open_ssh("machine")
    yield opened
    opened.close()


def refused(name: str = "machine") -> str:
    """The one error of what cannot be opened."""
    with pytest.raises(ChannelError) as caught:
        open_ssh(name).close()
    return str(caught.value)


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# What a name stands for


def place(text: str, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> ssh_host.Place:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("LOGNAME", "me")
    (folder / ".ssh").mkdir(exist_ok=True)
    (folder / ".ssh/config").write_text(text)
    return ssh_host.find(name)


@pytest.mark.parametrize(
    ("name", "user", "address", "port", "known_as"),
    [
        ("web", "me", "web", 22, "web"),
        ("Web.Example", "me", "Web.Example", 22, "web.example"),
        ("alice@web", "alice", "web", 22, "web"),
        ("web:2200", "me", "web", 2200, "[web]:2200"),
        ("alice@web:2200", "alice", "web", 2200, "[web]:2200"),
        ("alice@corp@web", "alice@corp", "web", 22, "web"),
        ("10.0.0.1:22", "me", "10.0.0.1", 22, "10.0.0.1"),
        ("[::1]", "me", "::1", 22, "::1"),
        ("alice@[fe80::1%eth0]:2200", "alice", "fe80::1%eth0", 2200, "[fe80::1%eth0]:2200"),
    ],
)
def test_a_name_without_a_config(
    name: str, user: str, address: str, port: int, known_as: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = place("", name, monkeypatch, tmp_path)
    assert (found.user, found.address, found.port, found.known_as) == (user, address, port, known_as)
    assert not found.new_key
    assert found.known_hosts[0] == tmp_path / ".ssh/known_hosts"
    assert tmp_path / ".ssh/id_ed25519" in found.keys


@pytest.mark.parametrize(
    "name",
    ["", "-oProxyCommand=id", "a b", "web:0", "web:70000", "web:x", "::1", "@web", "-x@web", "we$(id)b", "a;b", "a\nb"],
)
def test_what_is_no_name_is_wrong_usage(name: str, home: SshHome) -> None:
    with pytest.raises(DefinitionError, match="no name of a machine"):
        ssh_host.find(name)


def test_the_users_config_counts_and_the_name_goes_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (
        "Host web\n HostName web.example.org\n User admin\n Port 2200\n IdentityFile ~/.ssh/web\n IdentitiesOnly yes\n"
        " UserKnownHostsFile ~/.ssh/known_web\n HostKeyAlias web-key\n"
    )
    found = place(text, "web", monkeypatch, tmp_path)
    assert (found.user, found.address, found.port) == ("admin", "web.example.org", 2200)
    assert (found.known_as, found.known_hosts[0]) == ("web-key", tmp_path / ".ssh/known_web")
    assert (found.keys, found.only_these_keys, found.proxy) == ((tmp_path / ".ssh/web",), True, ())
    named = place(text, "root@web:22", monkeypatch, tmp_path)
    assert (named.user, named.address, named.port) == ("root", "web.example.org", 22)


@pytest.mark.parametrize(
    ("line", "proxy"),
    [
        ("ProxyCommand nc %h %p", ("sh", "-c", "exec nc web 22")),
        ("ProxyCommand none", ()),
        ("ProxyJump none", ()),
        ("ProxyJump gate", ("ssh", "-o", "BatchMode=yes", "-W", "[web]:22", "--", "ssh://gate")),
        (
            "ProxyJump a, me@b:2200,c",
            ("ssh", "-o", "BatchMode=yes", "-J", "ssh://a,ssh://me@b:2200", "-W", "[web]:22", "--", "ssh://c"),
        ),
    ],
)
def test_proxies(line: str, proxy: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert place(f"Host web\n {line}\n", "web", monkeypatch, tmp_path).proxy == proxy


@pytest.mark.parametrize(
    "text", ["Host web\n Port many\n", "Match exec\n User x\n", "nonsense\n", "Host web\n CanonicalizeHostname yes\n"]
)
def test_a_config_that_cannot_be_read_is_told(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"web|config"):
        place(text, "web", monkeypatch, tmp_path)


VAGRANT_SAYS = """Host default
  HostName {address}
  User vagrant
  Port 2222
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking {strict}
  IdentityFile /somewhere/private_key
  IdentitiesOnly yes
  {more}
"""


@pytest.mark.parametrize(
    ("address", "strict", "more", "new_key"),
    [
        ("127.0.0.1", "no", "", True),
        ("192.168.121.7", "no", "", True),
        ("198.51.100.7", "yes", "", False),
        ("8.8.8.8", "no", "", False),
        ("web.example.org", "no", "", False),
        ("127.0.0.1", "yes", "", False),
        ("192.168.121.7", "no", "ProxyCommand ssh elsewhere nc %h %p", False),
    ],
)
def test_vagrant_is_believed_for_near_machines_only(
    address: str, strict: str, more: str, new_key: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = VAGRANT_SAYS.format(address=address, strict=strict, more=more)
    stub_vagrant(tmp_path, monkeypatch, said)
    found = ssh_host.find("vagrant:default")
    assert (found.user, found.address, found.port, found.new_key) == ("vagrant", address, 2222, new_key)
    assert found.keys == (Path("/somewhere/private_key"),)
    assert (tmp_path / "asked").read_text() == "ssh-config default\n"
    assert found.by_hand == "vagrant ssh default"


def test_the_users_own_config_never_switches_the_check_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "Host *\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
    assert not place(text, "127.0.0.1:2222", monkeypatch, tmp_path).new_key


def test_vagrant_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub_vagrant(tmp_path, monkeypatch, "", "echo 'no machine is up' >&2; exit 1")
    with pytest.raises(HostError, match="no machine is up"):
        ssh_host.find("vagrant:default")
    with pytest.raises(DefinitionError, match="no name of a machine of Vagrant"):
        ssh_host.find("vagrant:--help")


def stub_vagrant(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, body: str = "") -> None:
    (folder / "said").write_text(said)
    program = folder / "vagrant"
    program.write_text(f'#!/bin/sh\necho "$*" > "{folder}/asked"\n{body}\ncat "{folder}/said"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


# Host keys


def hashed(name: str) -> str:
    salt = b"s" * 20
    digest = hmac.digest(salt, name.encode(), hashlib.sha1)
    return "|1|" + "|".join(base64.b64encode(part).decode() for part in (salt, digest))


@pytest.mark.parametrize(
    ("names", "fits"),
    [
        ("web", True),
        ("other,web", True),
        ("WEB", True),
        ("w*", True),
        ("w?b", True),
        ("*,!web", False),
        ("webb", False),
        ("w.b", False),
        ("[web]:22", False),
        (hashed("web"), True),
        (hashed("other"), False),
        ("|1|nonsense", False),
    ],
)
def test_which_lines_of_known_hosts_are_about_a_machine(names: str, fits: bool) -> None:
    assert ssh_host.KnownKey(names, "ssh-ed25519", b"", revoked=False).fits("web") is fits


def test_a_port_of_its_own_is_part_of_the_name() -> None:
    assert ssh_host.KnownKey("[web]:2200", "ssh-ed25519", b"", revoked=False).fits("[web]:2200")
    assert not ssh_host.KnownKey("web", "ssh-ed25519", b"", revoked=False).fits("[web]:2200")


def test_the_login_says_who_and_which_keys(home: SshHome, channel: SshChannel) -> None:
    assert (channel.login.user, channel.login.port, channel.login.known) == ("tester", home.server.port, True)
    assert channel.login.key == f"ecdsa-sha2-nistp256 {home.key}"
    fingerprint = base64.b64encode(hashlib.sha256(home.server.host_key.asbytes()).digest()).decode().rstrip("=")
    assert channel.login.host_key == f"ecdsa-sha2-nistp256 SHA256:{fingerprint}"


def test_an_unknown_host_key_is_shown_and_nothing_is_offered(home: SshHome) -> None:
    home.known_hosts.unlink()
    words = refused()
    assert "is not known: ecdsa-sha2-nistp256 SHA256:" in words
    assert home.server.host_key.fingerprint in words
    assert "Then log in once by `ssh machine`" in words
    assert f"ssh-keyscan -p {home.server.port} 127.0.0.1" in words
    assert home.server.users == [], "a key was offered to a machine that nobody knows"
    assert not home.known_hosts.exists()


def test_a_changed_host_key_is_an_error_of_its_own(home: SshHome) -> None:
    home.know(paramiko.ECDSAKey.generate())
    words = refused()
    assert "has CHANGED" in words
    assert f"ssh-keygen -R '[127.0.0.1]:{home.server.port}'" in words
    assert home.server.users == []


def test_a_key_of_another_kind_than_the_known_one_is_changed_too(home: SshHome) -> None:
    home.know(paramiko.RSAKey.generate(2048))
    assert "has CHANGED" in refused()


def test_of_several_host_keys_the_known_one_is_asked_for(home: SshHome) -> None:
    other = paramiko.RSAKey.generate(2048)  # which nobody prefers
    home.server.does.other_keys = [other]
    home.know(other)
    opened = open_ssh("machine")
    assert opened.login.host_key == f"ssh-rsa {other.fingerprint}"
    opened.close()


def test_a_revoked_host_key_is_refused(home: SshHome) -> None:
    good = home.known_hosts.read_text()
    home.know(home.server.host_key, "@revoked ")
    home.known_hosts.write_text(good + home.known_hosts.read_text())
    assert "is revoked" in refused()
    assert home.server.users == []


def test_a_switched_off_check_in_the_config_is_not_obeyed(home: SshHome) -> None:
    home.config("StrictHostKeyChecking no", "UserKnownHostsFile /dev/null")
    assert "is not known" in refused()


def test_a_near_machine_of_vagrant_needs_no_known_key(
    home: SshHome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home.known_hosts.unlink()
    said = VAGRANT_SAYS.format(address="127.0.0.1", strict="no", more="")
    said = said.replace("2222", str(home.server.port)).replace("/somewhere/private_key", str(home.key))
    stub_vagrant(tmp_path, monkeypatch, said)
    opened = open_ssh("vagrant:default")
    assert not opened.login.known
    opened.close()
    home.know(home.server.host_key, "@revoked ")  # Vagrant's word does not go before this
    monkeypatch.setattr(
        ssh_login, "known_keys", lambda asked: ssh_host.known_keys(replace(asked, known_hosts=(home.known_hosts,)))
    )
    assert "is revoked" in refused("vagrant:default")


# Connecting


def test_an_unknown_name(home: SshHome) -> None:
    words = refused("no-such-machine.invalid")
    assert "no machine is called 'no-such-machine.invalid'" in words


def test_nothing_listens(home: SshHome) -> None:
    home.server.stop()
    assert f"connecting to 127.0.0.1 port {home.server.port}: Connection refused" in refused()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 200, None])
def test_what_listens_is_no_ssh_server(home: SshHome, monkeypatch: pytest.MonkeyPatch, said: bytes | None) -> None:
    monkeypatch.setattr(ssh_login, "SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = threading.Event()

        def serve() -> None:
            with listening.accept()[0] as sock:
                if said is None:  # says nothing at all
                    done.wait(20)
                else:
                    sock.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        start = time.monotonic()
        words = refused(f"127.0.0.1:{listening.getsockname()[1]}")
        done.set()
        thread.join()
    assert "does not answer as an SSH server" in words
    assert time.monotonic() - start < 5


def test_a_machine_that_answers_nothing(home: SshHome, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", late)
    assert "no answer within 15 s" in refused()


RELAY = """
import socket, sys, threading
link = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
here = socket.socket(fileno=0)
def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)
threading.Thread(target=copy, args=(here, link), daemon=True).start()
copy(link, here)
"""


def test_an_agent_that_never_answers_is_no_agent(
    home: SshHome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ssh_login, "SECONDS", 0.5)
    with socket.socket(socket.AF_UNIX) as stale, contextlib.ExitStack() as held:
        stale.bind(str(tmp_path / "stale"))
        stale.listen()
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "stale"))
        assert ssh_login._agent(held) == ()


def test_a_proxy_command(home: SshHome) -> None:
    relay = home.folder / "relay.py"
    relay.write_text(RELAY)
    home.config(f"ProxyCommand {sys.executable} {relay} %p", "HostKeyAlias aliased")
    home.known_hosts.write_text(home.known_hosts.read_text().replace(f"[127.0.0.1]:{home.server.port}", "aliased"))
    opened = open_ssh("machine")
    assert opened.run(["echo", "through"]).out == "through\n"
    opened.close()
    words = subprocess.run(["pgrep", "-f", str(relay)], capture_output=True, text=True, check=False).stdout
    assert words == "", "the proxy goes on"


@pytest.mark.parametrize("command", ["echo no way through >&2; exit 1", "no-such-program-at-all"])
def test_a_proxy_that_fails_is_quoted(home: SshHome, command: str) -> None:
    home.config(f"ProxyCommand sh -c '{command}'")
    words = refused()
    assert "its proxy, sh -c" in words
    assert re.search("no way through|not found", words.rpartition("its proxy")[2])


# Logging in


def test_a_key_that_is_refused(home: SshHome) -> None:
    home.server.does.authorised = []
    words = refused()
    assert f"tester is not let in; refused: ecdsa-sha2-nistp256 {home.key}" in words
    assert "`ssh machine` has to work" in words


def test_a_server_that_never_answers_a_key(home: SshHome, monkeypatch: pytest.MonkeyPatch) -> None:
    home.server.does.answers_keys = False
    monkeypatch.setattr(ssh_login, "SECONDS", 2.0)
    start = time.monotonic()
    assert "(Authentication timeout)" in refused()
    assert time.monotonic() - start < 15


def test_no_key_at_all(home: SshHome) -> None:
    home.key.unlink()
    assert f"no key to log in with, neither in an agent nor in {home.key}" in refused()


def test_a_file_that_is_no_key(home: SshHome) -> None:
    home.key.write_text("not a key\n")
    assert "no key to log in with" in refused()


@pytest.mark.parametrize("modern", [False, True])
def test_an_encrypted_key_without_an_agent(home: SshHome, modern: bool) -> None:
    paramiko.ECDSAKey.generate().write_private_key_file(str(home.key), "secret")
    if modern:
        subprocess.run(
            ["ssh-keygen", "-q", "-p", "-P", "secret", "-N", "secret", "-f", str(home.key)],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        assert "OPENSSH" in home.key.read_text()
    words = refused()
    assert f"{home.key} is encrypted, and no agent has it" in words
    assert f"`ssh-add {home.key}`" in words


def test_an_agent_has_the_key_that_the_file_locks(home: SshHome, monkeypatch: pytest.MonkeyPatch) -> None:
    own = paramiko.ECDSAKey.from_private_key_file(str(home.key))
    clear, socket_file = home.folder / "clear", home.folder / "agent"
    shutil.copy(home.key, clear)
    own.write_private_key_file(str(home.key), "secret")
    Path(f"{home.key}.pub").write_text(f"{own.get_name()} {own.get_base64()}\n")
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket_file)], stdout=subprocess.DEVNULL)
    try:
        until(socket_file.exists, "the agent does not start")
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket_file))
        subprocess.run(["ssh-add", "-q", str(clear)], check=True, timeout=60)
        opened = open_ssh("machine")
        assert opened.login.key.endswith(" of the agent")
        opened.close()
        home.config("IdentitiesOnly yes")
        open_ssh("machine").close()
        allowed, home.server.does.authorised = home.server.does.authorised, []
        words = refused()
        assert re.search(
            r"is not let in; refused: \S+ \S+ of the agent \(Authentication failed\)$", words, re.MULTILINE
        )
        home.server.does.authorised = allowed
        Path(f"{home.key}.pub").unlink()  # then nothing says that it is this file's key
        assert "is encrypted, and no agent has it; there is no other to try" in refused()
    finally:
        agent.terminate()
        agent.wait()


def test_a_server_that_takes_no_keys(home: SshHome) -> None:
    home.server.does.auth = "password"
    assert "no key may log in as tester: sshd takes password" in refused()


def test_a_server_that_wants_more_than_a_key(home: SshHome) -> None:
    home.server.does.more = True
    home.server.does.auth = "publickey,keyboard-interactive"
    assert "asks for more: publickey, keyboard-interactive" in refused()


# Starting the agent


def test_a_session_may_take_longer_to_start_than_a_step_of_the_login() -> None:
    assert ssh.SESSION_SECONDS >= 4 * ssh_login.SECONDS


def test_a_user_who_may_run_nothing(home: SshHome) -> None:
    home.server.does.refuses_exec = True
    assert "may run no command" in refused()


def test_a_server_that_never_answers_a_command(home: SshHome, monkeypatch: pytest.MonkeyPatch) -> None:
    home.server.does.answers_exec = False
    monkeypatch.setattr(ssh, "SESSION_SECONDS", 0.5)
    start = time.monotonic()
    assert "is let in, and no session has started within 0 s" in refused()
    assert time.monotonic() - start < 10


@pytest.fixture
def programs() -> Iterator[Path]:
    """A folder of programs that every user of this machine can execute."""
    folder = Path(tempfile.mkdtemp(prefix="lsmlab-programs-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_no_python(home: SshHome, programs: Path) -> None:
    home.server.does.environment["PATH"] = str(programs)
    words = refused()
    assert "no python3 is found for tester: " in words
    assert "not found" in words
    assert "Install Python 3.9 or later there" in words


def test_a_python_that_is_too_old(home: SshHome, programs: Path) -> None:
    program(
        programs, "python3", f'shift 3; code=$1; shift; exec {sys.executable} -I -B -c "import sys; '
        'sys.version_info = (3, 8, 1, \\"final\\", 0); $code" "$@"',
    )  # fmt: skip
    home.server.does.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    assert "its python3 is 3.8, and the agent takes 3.9 or later" in refused()


def test_an_account_that_may_not_log_in(home: SshHome, programs: Path) -> None:
    program(programs, "python3", "echo 'This account is currently not available.'; echo 'bye' >&2; exit 1")
    home.server.does.environment["PATH"] = str(programs)
    assert "the agent ended with exit status 1: bye" in refused()


def ordinary_user(home: SshHome, programs: Path) -> None:
    """Have the server run commands as a user without rights, who finds `programs` first."""
    plain = "/usr/local/bin:/usr/bin:/bin"
    if not shutil.which("python3", path=plain):
        pytest.skip("needs a python3 that other users can execute")
    home.server.does.environment["PATH"] = f"{programs}:{plain}"
    home.server.does.options = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/"}


@needs_root
def test_sudo_that_wants_a_password(home: SshHome, programs: Path) -> None:
    ordinary_user(home, programs)
    program(programs, "sudo", '[ "$1" = -n ] && echo "sudo: a password is required" >&2; exit 1')
    words = refused()
    assert "tester is not root there and may not become it without a password: sudo: a password is required" in words
    assert "NOPASSWD" in words


@needs_root
def test_a_machine_without_sudo(home: SshHome, programs: Path) -> None:
    ordinary_user(home, programs)
    found = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
    assert found
    (programs / "python3").symlink_to(found)
    home.server.does.environment["PATH"] = str(programs)
    assert "sudo does not start: No such file or directory" in refused()


@needs_root
def test_who_is_not_root_goes_through_sudo(home: SshHome, programs: Path) -> None:
    ordinary_user(home, programs)
    program(
        programs, "sudo", 'test "$1 $2 $3" = "-n -- python3" || exit 9; shift 2; SUDO_USER=tester; export SUDO_USER;'
        'exec "$@"',
    )  # fmt: skip
    opened = open_ssh("machine")
    assert opened.run(["printenv", "SUDO_USER"]).out == "tester\n"
    assert opened.run(["id", "-u"]).out == f"{NOBODY}\n"
    opened.close()


def test_chatter_of_a_login_shell_does_no_harm(home: SshHome, programs: Path) -> None:
    program(
        programs, "python3", f'echo "Welcome!"; printf "no newline"; echo "watch out" >&2; exec {sys.executable} "$@"'
    )
    home.server.does.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    opened = open_ssh("machine")
    assert opened.run(["echo", "all the same"]).out == "all the same\n"
    opened.close()


# While it lasts, and its end


def test_nothing_is_written_there(home: SshHome) -> None:
    there = home.folder / "there"
    there.mkdir()
    home.server.does.options = {"cwd": there}
    home.server.does.environment |= {"HOME": str(there), "TMPDIR": str(there)}
    opened = open_ssh("machine")
    opened.ask("ping")
    opened.run(["true"])
    opened.close()
    assert list(there.iterdir()) == []
    assert "-B" in home.server.commands[0].split()


def test_the_command_is_plain_words_for_any_shell() -> None:
    plain = r"python3 -I -B -c '[a-z0-9 ,;.()\[\]]+' [A-Za-z0-9+/=]+"
    assert re.fullmatch(plain, ssh._command())
    assert re.fullmatch(plain, ssh._command(ssh.AS_SERVICE))


def test_a_machine_that_drops_ends_what_waits(home: SshHome, channel: SshChannel) -> None:
    marker = home.folder / "started"
    asked: list[BaseException] = []

    def ask() -> None:
        try:
            channel.run(["sh", "-c", f"touch {marker}; exec sleep 60"], timeout=60)
        except ChannelError as error:
            asked.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(marker.exists, "the command does not start")
    start = time.monotonic()
    home.server.drop()
    thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - start < 10
    assert "machine: run: the connection was lost" in str(asked[0])
    with pytest.raises(ChannelError, match="the connection was lost"):
        channel.ask("ping")
    assert channel.fault


def test_an_agent_that_is_killed_is_told_with_its_last_words(home: SshHome, channel: SshChannel) -> None:
    with pytest.raises(ChannelError, match=r"machine: run: the agent ended with exit status 137: last words"):
        channel.run(["sh", "-c", "echo last words > /proc/$PPID/fd/2; kill -9 $PPID"], timeout=60)


def test_errors_are_bounded_and_drained(home: SshHome, channel: SshChannel) -> None:
    size = 4 << 20  # more than the window of a channel, which output and errors share
    channel.run(["sh", "-c", f"head -c {size} /dev/zero | tr '\\0' x > /proc/$PPID/fd/2"]).check()
    assert channel.run(["echo", "still here"]).out == "still here\n"
    assert len(channel._errors) <= ssh.ERROR_BYTES


def test_much_output_comes_through(channel: SshChannel) -> None:
    assert len(channel.run(["head", "-c", str(12 << 20), "/dev/zero"]).check().stdout) == 12 << 20


def test_close_ends_the_agent_and_what_it_runs(home: SshHome, channel: SshChannel) -> None:
    marker = home.folder / "pid"
    script = f"echo $$ > {marker}.new; mv {marker}.new {marker}; exec sleep 60"
    errors: list[ChannelError] = []

    def ask() -> None:
        try:
            channel.run(["sh", "-c", script], timeout=60)
        except ChannelError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    until(marker.exists, "the command does not start")
    process = home.server.processes[0]
    channel.close()
    channel.close()
    thread.join(20)
    assert errors and "closed" in str(errors[0])
    assert not channel._connection.transport.is_active()
    assert process.wait(20) == 0
    until(lambda: not alive(int(marker.read_text())), "what the agent ran goes on")


def test_close_ends_all_that_runs_beside_threads_that_wait(home: SshHome, channel: SshChannel) -> None:
    def run(script: str) -> None:
        with contextlib.suppress(ChannelError):
            channel.run(["sh", "-c", script], timeout=60)

    def start(scripts: Sequence[str]) -> list[threading.Thread]:
        threads = [threading.Thread(target=run, args=(script,)) for script in scripts]
        for thread in threads:
            thread.start()
        return threads

    for thread in start(["sleep 0.3"] * 4):
        thread.join(20)
    pids = [home.folder / f"pid-{number}" for number in range(2)]
    running = start([f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60" for pid in pids])
    until(lambda: all(pid.exists() for pid in pids), "the commands do not start")
    channel.ask("ping")
    channel.close()
    for thread in running:
        thread.join(20)
    assert home.server.processes[0].wait(20) == 0
    until(lambda: not any(alive(int(pid.read_text())) for pid in pids), "what the agent ran goes on")


def test_a_machine_that_says_no_more_is_given_up_within_minutes(channel: SshChannel) -> None:
    link = channel._connection.transport.sock
    assert isinstance(link, socket.socket)
    assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    idle, between, probes, unheard = (
        link.getsockopt(socket.IPPROTO_TCP, option)
        for option in (
            socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT,
        )
    )  # fmt: skip
    assert 30 <= idle + between * probes <= 120, "seconds, where nothing is on its way"
    assert 30_000 <= unheard <= 120_000, "milliseconds, where something is"


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_users_files_are_not_changed(home: SshHome, channel: SshChannel) -> None:
    files = {p: (p.read_bytes(), stat.S_IMODE(p.stat().st_mode)) for p in (home.folder / ".ssh").iterdir()}
    open_ssh("machine").close()
    assert {p: (p.read_bytes(), stat.S_IMODE(p.stat().st_mode)) for p in (home.folder / ".ssh").iterdir()} == files
