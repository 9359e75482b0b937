"""The Vagrantfile, read by Vagrant itself: it validates, and its machines are what the labs need and no more."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lsmlab import discovery, run, ssh_lab
from lsmlab.channel import ssh_host
from lsmlab.channel.ssh import SshChannel
from lsmlab.errors import HostError
from lsmlab.lab import Lab
from lsmlab.terms import Framework
from real_vagrant import PLUGINS, REPO, Vagrant, real_vagrant

NEEDED = {
    "fedora": "python3 audit nginx curl acl selinux-policy-targeted policycoreutils-python-utils checkpolicy",
    "ubuntu": "python3 auditd nginx curl acl apparmor apparmor-utils",
}
"""The packages of what `lsmlab doctor --ssh` asks for, and of the service that the flagship attacks."""
INSTALLERS = {"fedora": "dnf install -y", "ubuntu": "apt-get install -y"}
UNITS = "systemctl enable --now nginx auditd"
SH = "/bin/sh"
STUB = f"""#!{SH}
call="${{0##*/}} $*"
echo "$call" >> "$CALLS"
test "$call" != "$FAILS"
"""
FAULTS = {
    "a key that libvirt does not have": ("libvirt.memory =", "libvirt.memories =", "libvirt: The following"),
    "a key that VirtualBox does not have": ("virtualbox.cpus =", "virtualbox.cups =", "virtualbox: The following"),
    "a key that no machine has": ("node.vm.hostname =", "node.vm.hostnames =", "hostnames"),
    "no Ruby": ("MACHINES.each do |name, machine|", "MACHINES.each do |name, machine", "syntax"),
    "an undefined name": ("libvirt.cpus = CPUS", "libvirt.cpus = CPU", "CPU"),
    "no box": ("node.vm.box = machine[:box]", "", "A box must be specified"),
    "a box of another system": ('"bento/ubuntu-24.04"', '"bento/debian-13"', "ubuntu: box"),
    "one machine": ('"fedora" => {', '"ubuntu" => {', "machines"),
    "a machine too small": ("MEMORY_MIB = 2048", "MEMORY_MIB = 512", "memory"),
    "hardware of one provider alone": ("virtualbox.memory = MEMORY_MIB", "", "virtualbox: hardware"),
    "a folder of the host": ("disabled: true", "disabled: false", "folder"),
    "a port of the host": (
        "node.vm.hostname =", 'node.vm.network "forwarded_port", guest: 80, host: 80; node.vm.hostname =', "network",
    ),
    "a network with the host": (
        "node.vm.hostname =", 'node.vm.network "private_network", ip: "10.9.8.7"; node.vm.hostname =', "network",
    ),
    "without Python": ("python3 auditd", "auditd", "ubuntu: python3"),
    "without SELinux's tools": ("policycoreutils-python-utils", "", "fedora: policycoreutils-python-utils"),
    "auditd that does not run": ("--now nginx auditd", "--now nginx", "units"),
    "a failure that is passed over": ("set -eu", "set -u", "goes on"),
    "a file that scenarios expect otherwise": ('"chmod 0640 /etc/shadow",', "", "fedora: not prepared"),
    "no shell": ("set -eu", "set -eu; if true", "syntax"),
}  # fmt: skip
"""What is done to the Vagrantfile, and what is then said of it: each of the assertions can fail."""


@pytest.fixture(scope="module")
def vagrant(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Vagrant]:
    there = (REPO / ".vagrant").exists()
    yield real_vagrant(tmp_path_factory.mktemp("vagrant"), request.config)
    assert (REPO / ".vagrant").exists() is there


@pytest.fixture(scope="module")
def read(vagrant: Vagrant, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What Vagrant makes of the Vagrantfile as it is, under an empty name, and of each broken copy."""
    folders = {"": REPO}
    for name, (old, new, _) in FAULTS.items():
        folders[name] = tmp_path_factory.mktemp("broken")
        text = (REPO / "Vagrantfile").read_text("utf-8")
        assert old in text, f"{name}: {old!r} is not in the Vagrantfile any more"
        (folders[name] / "Vagrantfile").write_text(text.replace(old, new, 1), "utf-8")
    found = vagrant.machines(*folders.values())
    return {name: found[folder] for name, folder in folders.items()}


@pytest.mark.parametrize("provider", PLUGINS)
def test_vagrant_validates_it_and_lists_its_machines(vagrant: Vagrant, provider: str) -> None:
    chosen = {"VAGRANT_DEFAULT_PROVIDER": provider}
    valid = vagrant.run("validate", more=chosen)
    assert (valid.returncode, valid.stderr) == (0, ""), valid
    listed = vagrant.run("status", "--machine-readable", more=chosen).stdout.splitlines()
    rows = [line.split(",")[1:] for line in listed]
    assert [row for row in rows if row[1] == "provider-name"] == [[n, "provider-name", provider] for n in NEEDED]
    assert [row for row in rows if row[1] == "state"] == [[n, "state", "not_created"] for n in NEEDED]


def test_validation_sees_a_mistake(vagrant: Vagrant, tmp_path: Path) -> None:
    text = (REPO / "Vagrantfile").read_text("utf-8")
    (tmp_path / "Vagrantfile").write_text(text.replace("libvirt.memory =", "libvirt.memories =", 1), "utf-8")
    refused = vagrant.run("validate", cwd=tmp_path)
    assert refused.returncode == 1
    assert "Libvirt Provider:\n* The following settings shouldn't exist: memories\n" in refused.stderr


def test_its_machines_are_what_the_labs_need(read: dict[str, dict[str, Any]]) -> None:
    assert list(wrong_with(read[""])) == []


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_seen(read: dict[str, dict[str, Any]], name: str) -> None:
    words = FAULTS[name][2]
    said = list(wrong_with(read[name]))
    assert any(words in line for line in said), said


def wrong_with(machines: dict[str, Any]) -> Iterator[str]:
    """What is not as it has to be."""
    if "refused" in machines:
        yield str(machines["refused"])
        return
    if list(machines) != list(NEEDED):
        yield f"machines: {list(machines)}"
    for name in NEEDED:
        for provider in PLUGINS:
            if name in machines:
                yield from (f"{name}: {provider}: {line}" for line in wrong_with_one(machines[name][provider]))
                yield from (f"{name}: {line}" for line in wrong_for(name, machines[name][provider]))


def wrong_with_one(machine: dict[str, Any]) -> Iterator[str]:
    """What no machine may be like."""
    yield from machine["faults"]
    hardware = machine["hardware"]
    if not ((hardware["memory"] or 0) >= 1024 and (hardware["cpus"] or 0) >= 1):
        yield f"hardware: too little memory, or no processor: {hardware}"
    if machine["synced_folders"]:
        yield f"a folder of the host is shared: {machine['synced_folders']}"
    # The one that Vagrant adds by itself, to log in by
    if [(kind, o.get("guest"), o.get("host_ip")) for kind, o in machine["networks"]] != [
        ("forwarded_port", 22, "127.0.0.1")
    ]:
        yield f"network: {machine['networks']}"
    if [(step["type"], step["as_root"]) for step in machine["provision"]] != [("shell", True)]:
        yield f"provisioned otherwise: {machine['provision']}"


def wrong_for(name: str, machine: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the machine of one distribution."""
    box = re.fullmatch(rf"[\w-]+/{name}-([\d.]+)", str(machine["box"]))
    if box is None:
        yield f"box {machine['box']}: not one of {name}"
    if machine["hostname"] != f"lsmlab-{name}":
        yield f"hostname {machine['hostname']}"
    for step in machine["provision"]:
        yield from wrong_script(name, step["script"], prepared(name, box[1]) if box else ())


def lab_of(name: str, version: str) -> Lab:
    """The lab that a machine of this release is run with."""
    channel = cast("SshChannel", SimpleNamespace(name=f"vagrant:{name}"))
    release = {"ID": name, "VERSION_ID": version}
    return ssh_lab.lab_for(ssh_lab.Found(channel, release, "", "", (Framework.SELINUX,)), None)


def prepared(name: str, version: str) -> Iterator[str]:
    """What is done to a guest of that lab before anything else."""
    cloud = lab_of(name, version).cloud_image
    assert cloud is not None
    return (shlex.join(step) for step in cloud.prepare)


@pytest.mark.parametrize("provider", PLUGINS)
def test_each_box_is_a_lab(read: dict[str, dict[str, Any]], provider: str) -> None:
    boxes = {name: machine[provider]["box"] for name, machine in read[""].items()}
    found = {name: lab_of(name, box.rpartition("-")[2]) for name, box in boxes.items()}
    assert {name: lab.os_release["ID"] for name, lab in found.items()} == {name: name for name in NEEDED}
    for lab in found.values():
        run.cases(discovery.load_scenarios(["nginx-reads-shadow"]), lab, unconfined=True)


def wrong_script(name: str, script: str, preparing: Iterable[str]) -> Iterator[str]:
    """What is wrong with the script that a machine is provisioned by: read by the shell, then run among stubs."""
    if parsed := subprocess.run([SH, "-n"], input=script, capture_output=True, text=True, check=False).stderr:
        yield f"syntax: {parsed}"
        return
    calls = called(script, "")
    installed = {word for call in calls if call.startswith(INSTALLERS[name]) for word in call.split()[3:]}
    yield from (f"{package} is not installed" for package in NEEDED[name].split() if package not in installed)
    yield from (f"not prepared as its lab's guests are: {line}" for line in preparing if line not in calls)
    if calls[-1:] != [UNITS]:
        yield f"units: the last command is {calls[-1:]}"
    for number, call in enumerate(calls, 1):
        if called(script, call) != calls[:number]:
            yield f"it goes on where this fails: {call}"


def called(script: str, failing: str) -> list[str]:
    """The programs that a script calls, each with its arguments, on a machine where the call `failing` fails."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("apt-get", "chgrp", "chmod", "dnf", "groupadd", "mkdir", "systemctl"):
            stub = Path(folder, name)
            stub.write_text(STUB)
            stub.chmod(0o755)
        calls = Path(folder, "calls")
        calls.touch()
        done = subprocess.run(
            [SH, "-c", script], env={"PATH": folder, "CALLS": str(calls), "FAILS": failing}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        said = calls.read_text().splitlines()
    assert "not found" not in done.stderr, done.stderr
    assert done.returncode == (1 if failing and said[-1] == failing else 0), done
    return said


def test_shellcheck_finds_nothing_in_the_scripts(read: dict[str, dict[str, Any]]) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not found (apt-get install shellcheck)")
    scripts = [step["script"] for machine in read[""].values() for step in machine["libvirt"]["provision"]]
    assert len(scripts) == len(NEEDED)
    for script in scripts:
        done = subprocess.run(
            ["shellcheck", "--shell=sh", "-"], input=script, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout


# Its answer to `vagrant ssh-config`


def test_where_vagrant_says_that_a_machine_is(
    vagrant: Vagrant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("a key")
    key.chmod(0o600)
    vagrant.up("ubuntu", 45678, key)
    for name, value in vagrant.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(REPO)
    found = ssh_host.find("vagrant:ubuntu")
    assert (found.user, found.address, found.port) == ("vagrant", "127.0.0.1", 45678)
    assert (found.only_these_keys, found.proxy, found.new_key) == (True, (), True)
    (used,) = found.keys
    assert used.read_text() == "a key"
    assert used.is_relative_to(vagrant.folder) and stat.S_IMODE(used.stat().st_mode) == 0o600
    assert Path("/dev/null") not in found.known_hosts
    with pytest.raises(HostError, match="not yet ready for SSH"):
        ssh_host.find("vagrant:fedora")
    with pytest.raises(HostError, match="was not found"):
        ssh_host.find("vagrant:debian")
