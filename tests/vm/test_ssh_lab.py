"""A machine that is there already as the lab, against OpenSSH in a real guest: the flagship, and all as it was before.

What was and what is is compared by a look of the tests' own. A decoy stands in the object: nothing of it may come here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from command import kill, lsmlab, outcomes, start
from ssh_relay import reached

from lsmlab.bench import Bench
from lsmlab.channel.base import Channel
from lsmlab.machine.qemu import QemuMachine
from lsmlab.terms import Framework, Kernel

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.ssh, pytest.mark.slow]

FLAGSHIP = "nginx-reads-shadow"
DECOY = "DecoyOfALeak7f3a9c51"
PLAIN = f"""
set -e
printf 'decoy:$y$j9T$%s:20000:0:99999:7:::' {DECOY} >> /etc/shadow # no newline: a canary then shares its line
auditctl -D > /dev/null
auditctl -a always,exit -F arch=b64 -S execve -F key=of-this-machine > /dev/null
if [ -e /sys/fs/selinux/enforce ]; then
    setsebool httpd_can_network_connect on
else
    printf '%s\n' 'profile nginx /usr/sbin/nginx flags=(complain) {{ }}' > /etc/apparmor.d/of-this-machine
    apparmor_parser --replace /etc/apparmor.d/of-this-machine # another of the scenario's name
fi
systemctl enable --quiet --now nginx.service
systemctl start systemd-logind.service # which others start at boot, and here the first login
"""
"""Makes a guest a machine like others: with a secret, with audit rules of its own and none of ours."""
LOOK = r"""
import hashlib, json, os, stat, subprocess, sys
found = {}
def look(path):
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return
    about = [there.st_mode, there.st_uid, there.st_gid, there.st_mtime_ns]
    names = os.listxattr(path, follow_symlinks=False)
    about.append({name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names})
    if stat.S_ISREG(there.st_mode):
        with open(path, "rb") as file:
            about += [there.st_nlink, hashlib.sha256(file.read()).hexdigest()]
    if stat.S_ISLNK(there.st_mode):
        about.append(os.readlink(path))
    found[path] = about
    if stat.S_ISDIR(there.st_mode):
        for name in os.listdir(path):
            look(path + "/" + name)
def text(path):
    with open(path, "rb") as file:
        return file.read()
for root in ("/etc", "/srv", "/var/www", "/usr/sbin", "/var/lib/lsmlab", "/var/cache/apparmor", "/run/lsmlab-arm"):
    look(root)
if os.path.exists("/sys/fs/selinux/policy"):
    found["policy"] = hashlib.sha256(text("/sys/fs/selinux/policy")).hexdigest()
    found["enforce"] = text("/sys/fs/selinux/enforce").decode()
    for name in os.listdir("/sys/fs/selinux/booleans"):
        found["boolean " + name] = text("/sys/fs/selinux/booleans/" + name).decode()
else:
    found["profiles"] = sorted(text("/sys/kernel/security/apparmor/profiles").decode().splitlines())
    found["audit parameter"] = text("/sys/module/apparmor/parameters/audit").decode()
    for folder, _, names in os.walk("/sys/kernel/security/apparmor/policy/profiles"):
        for name in {"sha1", "sha256"} & set(names):
            found["digest of " + text(folder + "/name").decode() + name] = text(folder + "/" + name).decode()
def said(*argv):
    return subprocess.run(argv, capture_output=True, check=True, text=True).stdout
found["audit rules"] = said("auditctl", "-l")
found["status"] = [line for line in said("auditctl", "-s").splitlines() if line.split()[0] in {"enabled", "failure"}]
for line in said("systemctl", "list-units", "--all", "--type=service", "--plain", "--no-legend").splitlines():
    name, *states = line.split()[:4]
    if states[0] != "not-found" and not name.startswith(("user@", "user-runtime-dir@", "run-")):
        found["unit " + name] = states
for line in said("systemctl", "list-unit-files", "--plain", "--no-legend").splitlines():
    name, *states = line.split()
    if states[0] != "transient":
        found["unit file " + name] = states
nginx = said("systemctl", "show", "--property=MainPID", "--value", "nginx.service").strip()
found["label of nginx"] = text("/proc/" + nginx + "/attr/current").decode()
print(json.dumps(found))
"""


def look(channel: Channel) -> dict[str, Any]:
    """All that is to be the same afterwards, by name."""
    found: dict[str, Any] = json.loads(channel.run(["python3", "-c", LOOK], timeout=300).check().out)
    assert len(found) > 500
    return found


def differing(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {k: (before.get(k), after.get(k)) for k in before.keys() | after.keys() if before.get(k) != after.get(k)}


def environment(home: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"], "HOME": str(home), "LSMLAB_HOME": str(home / "lsmlab"), "LANG": "C.UTF-8",
        "COLUMNS": "100",
    }  # fmt: skip


def nowhere(home: Path, *texts: str) -> None:
    """See that the decoy is in no file of ours and in none of `texts`, and that something was looked at."""
    files = [path for path in home.rglob("*") if path.is_file()]
    assert any(path.name == "outcomes.sqlite" for path in files)
    for path in files:
        assert DECOY.encode() not in path.read_bytes(), path
    for words in texts:
        assert DECOY not in words


def wait_for(process: Any, words: str, seconds: float = 240) -> str:
    """Read the command's progress until it says `words`; all that it said."""
    said, deadline = "", time.monotonic() + seconds
    while words not in said:
        assert time.monotonic() < deadline, said
        line = process.stderr.readline()
        assert line, said
        said += line
    return said


@pytest.mark.parametrize("framework", list(Framework))
def test_the_flagship_on_a_machine_that_stays(bench: Bench, framework: Framework, tmp_path: Path) -> None:
    with bench.guest(Kernel(framework.value), "ssh lab") as machine, reached(machine, tmp_path) as port:
        machine.channel.run(["sh", "-c", PLAIN], timeout=120).check()
        before = look(machine.channel)
        env, lab = environment(tmp_path), f"ssh:vagrant@127.0.0.1:{port}"  # by sudo
        if framework is Framework.SELINUX:
            _refused_without_leave(lab, env)
            _interrupted(lab, env)
            assert differing(before, look(machine.channel)) == {}
        done = lsmlab("run", FLAGSHIP, "--lab", lab, "--allow-changes", "--json", str(tmp_path / "out.json"), env=env)
        found = outcomes((tmp_path / "out.json").read_text())[FLAGSHIP, framework.value]
        assert differing(before, look(machine.channel)) == {}
        shown = lsmlab("show", "1", env=env).stdout
        nowhere(tmp_path, done.stdout, done.stderr, shown)
        _as_it_should_be(found, framework, lab, done.stdout)
        _killed_and_undone(machine, before, tmp_path, lab, env)


def _interrupted(lab: str, env: dict[str, str]) -> None:
    process = start("run", FLAGSHIP, "--lab", lab, "--allow-changes", env=env)
    wait_for(process, ": benign front-page")
    said = kill(process, signal.SIGINT)
    assert process.returncode == 2, said
    assert "interrupted" in said


def _refused_without_leave(lab: str, env: dict[str, str]) -> None:
    said = lsmlab("run", FLAGSHIP, "--lab", lab, env=env, code=4).stderr
    assert "say `--allow-changes` to allow this" in said
    assert "www-data is made a member of the group shadow" in said
    assert "is labelled bin_t" in said
    said = lsmlab("run", FLAGSHIP, "--lab", lab, "-f", "apparmor", "--allow-changes", env=env, code=4).stderr
    assert "has no AppArmor; it has: selinux" in said
    said = lsmlab("run", "shop-loads-policy", "--lab", lab, "--allow-changes", env=env, code=4).stderr
    assert "is not run on a machine that is kept" in said
    said = lsmlab("run", "container-reads-host-shadow", "--lab", lab, "--allow-changes", env=env, code=3).stderr
    assert "there is no Docker Engine (docker.service)" in said and "Install Docker Engine there" in said


def _as_it_should_be(found: dict[str, Any], framework: Framework, lab: str, printed: str) -> None:
    assert (found["verdict"], found["as_expected"], found["lab"]) == ("CONTAINED", True, lab), found["reason"]
    assert [arm["arm"] for arm in found["arms"]] == [f"{framework.value}-unconfined", _enforcing(framework)]
    assert found["environment"]["isolation"] == "by undo, verified"
    assert re.match(r"vagrant at 127\.0\.0\.1 port \d+: Debian GNU/Linux 13", found["environment"]["machine"])
    assert found["environment"]["names"] == "debian-13"
    assert "where the service is not confined" in found["reason"]
    assert "by undo, verified" in printed
    control = next(a for a in found["arms"][0]["attempts"] if a["attempt"] == "read-shadow")
    seen = control["observation"]
    assert control["result"] == "allowed"
    assert seen["canary"] in seen["output"] and seen["withheld"] > 500
    assert "root:" not in seen["output"]


def _enforcing(framework: Framework) -> str:
    return "selinux-enforcing" if framework is Framework.SELINUX else "apparmor-enforce"


def _killed_and_undone(machine: QemuMachine, before: dict[str, Any], home: Path, lab: str, env: dict[str, str]) -> None:
    process = start("run", FLAGSHIP, "--lab", lab, "--allow-changes", env=env)
    wait_for(process, ": benign front-page")
    kill(process)
    changed = differing(before, look(machine.channel))
    assert {"/etc/group", "/srv/www/logo.svg", "/var/lib/lsmlab", "audit rules"} <= changed.keys()
    host = lab.removeprefix("ssh:")
    said = lsmlab("run", FLAGSHIP, "--lab", lab, "--allow-changes", env=env, code=3).stderr
    assert "the journal of another run is there" in said and f"lsmlab undo {host}" in said
    done = lsmlab("undo", host, env=env)
    assert "put back: /etc/group" in done.stdout
    assert differing(before, look(machine.channel)) == {}
    assert "nothing to undo" in lsmlab("undo", host, env=env).stderr
    nowhere(home, said, done.stdout, done.stderr)
