"""`lsmlab doctor --ssh` against OpenSSH in a real guest: what it says is so, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command import lsmlab
from ssh_relay import reached

from lsmlab.bench import Bench
from lsmlab.channel.base import Channel
from lsmlab.terms import Kernel
from real_vagrant import real_vagrant

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.ssh]

CHANGED = "find / -xdev -newer /run/before ! -type d -not -path '/var/log/*' -print; echo end"


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
    with bench.guest(kernel, "survey") as machine, contextlib.ExitStack() as link:
        machine.channel.run(["systemctl", "start", "nginx.service"]).check()  # before the time that is noted
        port = link.enter_context(reached(machine, tmp_path))
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
        left = changed(machine.channel)
    assert (left, found["root"]["found"]) == ([], "by sudo, without a password")
    assert all(f["ok"] for f in found.values() if f["needed"]), found
    login = found["SSH"]["found"]
    assert login.startswith(f"vagrant at 127.0.0.1 port {port}, key ")
    assert f"/machines/{name}/virtualbox/private_key; host key ssh-ed25519 SHA256:" in login
    assert login.endswith(", not checked: Vagrant makes it anew")
    assert found["auditing"]["found"].startswith("on, auditd is process ")
    assert ("SELinux" if kernel is Kernel.SELINUX else "AppArmor") in found
