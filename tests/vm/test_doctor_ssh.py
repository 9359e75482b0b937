"""`lsmlab doctor --ssh` against OpenSSH in a real guest: what it says is so, and it leaves nothing behind.

The guest has no network: its console, made raw, carries the bytes between a port of the tests and its own port 22.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import paramiko
import pytest
from command import lsmlab

from lsmlab import discovery
from lsmlab.bench import Bench, open_bench
from lsmlab.channel.base import Channel
from lsmlab.machine.qemu import QemuMachine
from lsmlab.progress import Silent
from lsmlab.terms import Kernel
from real_vagrant import real_vagrant

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.ssh]

RELAY = """
import os, socket, threading, tty
console = os.open("/dev/hvc0", os.O_RDWR | os.O_NOCTTY)
tty.setraw(console)
link = socket.create_connection(("127.0.0.1", 22))
os.write(console, b"!")
def out():
    while data := link.recv(4096):
        while data:
            data = data[os.write(console, data):]
threading.Thread(target=out, daemon=True).start()
while data := os.read(console, 4096):
    link.sendall(data)
"""
PREPARE = """
set -e
systemctl unmask --quiet ssh.service
ssh-keygen -A
mkdir -p -m 700 /root/.ssh
cat > /root/.ssh/authorized_keys
useradd --non-unique --uid 0 --home-dir /root vagrant # Vagrant's user, who may be root without sudo, which is not here
if [ -e /sys/fs/selinux/enforce ]; then restorecon -RF /etc/ssh /root/.ssh; fi
systemctl start ssh.service
touch /run/before
until [ /run/after -nt /run/before ]; do touch /run/after; done # a file's time is that of the kernel's last tick
"""
CHANGED = "find / -xdev -newer /run/before ! -type d -not -path '/var/log/*' -print; echo end"


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with open_bench(discovery.load_lab("debian-13"), Silent()) as opened:
        yield opened


@contextlib.contextmanager
def reached(machine: QemuMachine, home: Path) -> Iterator[int]:
    """The port of this machine at which the guest's sshd answers, to who has `home`'s key and knows the guest's."""
    channel = machine.channel
    own = paramiko.ECDSAKey.generate()
    (home / ".ssh").mkdir(mode=0o700)
    own.write_private_key_file(str(home / ".ssh" / "id_ecdsa"))
    public = f"{own.get_name()} {own.get_base64()}\n".encode()
    channel.run(["sh", "-c", PREPARE], stdin=public, timeout=120).check()
    channel.run(["systemd-run", "--quiet", "python3", "-c", RELAY], timeout=60).check()
    console = machine.terminal_socket
    assert console is not None
    console.settimeout(60)
    while console.recv(1) != b"!":
        pass
    console.settimeout(None)
    host_key = channel.run(["cat", "/etc/ssh/ssh_host_ed25519_key.pub"]).check().out
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
        threading.Thread(target=carry, args=(listener, console), daemon=True).start()
        yield port


def carry(listener: socket.socket, console: socket.socket) -> None:
    """One connection, both ways, until it ends."""
    with contextlib.suppress(OSError), listener.accept()[0] as link:
        back = threading.Thread(target=pump, args=(console, link), daemon=True)
        back.start()
        pump(link, console)


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes until there is no more."""
    with contextlib.suppress(OSError):
        while data := source.recv(4096):
            target.sendall(data)


def survey(name: str, home: Path, more: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """The findings about the machine called `name`, by what they are about."""
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "LSMLAB_HOME": str(home / "lsmlab"), "LANG": "C.UTF-8"}
    done = lsmlab("doctor", "--ssh", name, "--lab", "debian-13", "--json", "-", env={**env, **(more or {})})
    return {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}


def changed(channel: Channel) -> list[str]:
    """Files outside the logs that were made or changed since the guest was prepared."""
    *found, end = channel.run(["sh", "-c", CHANGED], timeout=120).check().out.splitlines()
    assert end == "end"
    return found


@pytest.mark.parametrize("kernel", [Kernel.SELINUX, Kernel.APPARMOR])
def test_what_is_said_of_a_machine_is_so_and_nothing_is_left_there(
    bench: Bench, kernel: Kernel, tmp_path: Path
) -> None:
    with bench.guest(kernel, "survey") as machine, reached(machine, tmp_path) as port:
        found = survey(f"root@127.0.0.1:{port}", tmp_path)
        left = changed(machine.channel)
        agents = machine.channel.run(["pgrep", "--full", "sys.argv"]).out.split()
        machine.channel.run(["touch", "/etc/proof-that-it-is-seen"]).check()
        assert changed(machine.channel) == [*left, "/etc/proof-that-it-is-seen"]
    assert (left, agents) == ([], [])
    assert all(f["ok"] for f in found.values() if f["needed"]), found
    assert found["SSH"]["found"].startswith("root at 127.0.0.1 port ")
    assert "host key ssh-ed25519 SHA256:" in found["SSH"]["found"]
    assert found["system"]["found"].startswith("Debian GNU/Linux 13 (trixie), Linux 6.")
    assert found["root"]["found"] == "the login is root's"
    assert found["auditing"]["found"].startswith("on, auditd is process ")
    if kernel is Kernel.SELINUX:
        assert found["SELinux"]["found"] == "enforcing"
        assert found["nginx.service"]["found"] == "system_u:system_r:httpd_t:s0"
        assert "system_u:system_r:sshd_t:s0" in found["ssh.service"]["found"]
    else:
        assert " profiles loaded: " in found["AppArmor"]["found"]
        assert (found["nginx.service"]["found"], found["nginx.service"]["ok"]) == ("unconfined", False)


@pytest.mark.parametrize(("kernel", "name"), [(Kernel.SELINUX, "fedora"), (Kernel.APPARMOR, "ubuntu")])
def test_a_machine_is_found_by_the_answer_of_vagrant(
    bench: Bench, kernel: Kernel, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The Vagrantfile and `vagrant ssh-config` are real; Vagrant takes the guest for VirtualBox's."""
    vagrant = real_vagrant(tmp_path / "vagrant", request.config)
    home = tmp_path / "home"
    home.mkdir()
    with bench.guest(kernel, "vagrant") as machine, reached(machine, home) as port:
        (home / ".ssh" / "known_hosts").unlink()  # nobody knows the key of a new machine
        vagrant.up(name, port, home / ".ssh" / "id_ecdsa")
        found = survey(f"vagrant:{name}", home, vagrant.env | {"HOME": str(home)})
    assert all(f["ok"] for f in found.values() if f["needed"]), found
    login = found["SSH"]["found"]
    assert login.startswith(f"vagrant at 127.0.0.1 port {port}, key ")
    assert f"/machines/{name}/virtualbox/private_key; host key ssh-ed25519 SHA256:" in login
    assert login.endswith(", not checked: Vagrant makes it anew")
    assert found["auditing"]["found"].startswith("on, auditd is process ")
    assert ("SELinux" if kernel is Kernel.SELINUX else "AppArmor") in found
