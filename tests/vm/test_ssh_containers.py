"""Containers on an engine that is there already, against OpenSSH and Docker Engine in a real guest.

Somebody else's container runs beside: it has to be the same one afterwards. A decoy stands in the host's /etc/shadow,
which the container reads: nothing of it may come here.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import kill, lsmlab, outcomes, start
from ssh_relay import reached
from test_ssh_lab import DECOY, differing, environment, nowhere, wait_for

from lsmlab import discovery
from lsmlab.bench import Bench, open_bench
from lsmlab.channel.base import Channel
from lsmlab.container import install
from lsmlab.progress import Silent
from lsmlab.terms import Framework, Kernel

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.ssh, pytest.mark.container, pytest.mark.slow]

SCENARIO = "container-reads-host-shadow"
VERDICTS = {Framework.SELINUX: "CONTAINED", Framework.APPARMOR: "NOT_CONTAINED"}
SETTINGS = {key: value for key, value in install.SETTINGS.items() if key != "runtimes"}
ASK = """
import http.client, json, socket
def ask(method, target, body=None, kind="application/json"):
    link = http.client.HTTPConnection("engine", timeout=120)
    link.sock = socket.socket(socket.AF_UNIX)
    link.sock.connect("/run/docker.sock")
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    link.request(method, target, data, {"Content-Type": kind} if data else {})
    answer = link.getresponse()
    said = answer.read()
    assert answer.status < 300, (target, said)
    return said
"""
"""There is no `docker` command in the guest: lsmlab needs none either."""
PLAIN = f"""
set -e
printf 'decoy:$y$j9T$%s:20000:0:99999:7:::' {DECOY} >> /etc/shadow
auditctl -D > /dev/null
rm -rf /usr/local/bin/lsmlab-runtime
cat > /etc/docker/daemon.json
"""
THEIRS = """
import io, tarfile
ask("DELETE", "/images/lsmlab:latest")
buffer = io.BytesIO()
with tarfile.open(fileobj=buffer, mode="w") as tar:
    tar.add("/bin/busybox", "bin/busybox")
ask("POST", "/images/create?fromSrc=-&repo=theirs&tag=latest", buffer.getvalue(), "application/x-tar")
ask("POST", "/volumes/create", {"Name": "theirs"})
command = ["/bin/busybox", "sleep", "100000"]
wanted = {"Image": "theirs", "Cmd": command, "HostConfig": {"NetworkMode": "none", "Binds": ["theirs:/data"]}}
number = json.loads(ask("POST", "/containers/create?name=shop", wanted))["Id"]
ask("POST", f"/containers/{number}/start")
"""
"""Nothing of ours is left in the engine, and somebody else's container runs."""
LOOK = r"""
import hashlib, os, stat, subprocess
found = {}
def look(path, deep=True):
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return
    about = [there.st_mode, there.st_uid, there.st_gid]
    about += [there.st_mtime_ns] if deep else []
    names = os.listxattr(path, follow_symlinks=False)
    about.append({name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names})
    if stat.S_ISREG(there.st_mode):
        with open(path, "rb") as file:
            about.append(hashlib.sha256(file.read()).hexdigest())
    if stat.S_ISLNK(there.st_mode):
        about.append(os.readlink(path))
    found[path] = about
    if stat.S_ISDIR(there.st_mode) and deep:
        for name in os.listdir(path):
            look(path + "/" + name)
def said(*argv):
    return subprocess.run(argv, capture_output=True, check=True, text=True).stdout
for root in ("/etc", "/usr/local", "/var/lib/lsmlab", "/var/cache/apparmor", "/run/lsmlab-arm"):
    look(root)
for name in os.listdir("/var/lib/docker/volumes"):
    look("/var/lib/docker/volumes/" + name, deep=False)
for name in os.listdir("/var/lib/docker/overlay2") + os.listdir("/var/lib/docker/containers"):
    found["in the engine: " + name] = True
if os.path.exists("/sys/fs/selinux/enforce"):
    for name in os.listdir("/sys/fs/selinux/booleans"):
        with open("/sys/fs/selinux/booleans/" + name) as file:
            found["boolean " + name] = file.read()
else:
    with open("/sys/kernel/security/apparmor/profiles") as file:
        found["profiles"] = sorted(file)
    with open("/sys/module/apparmor/parameters/audit") as file:
        found["audit parameter"] = file.read()
found["audit rules"] = said("auditctl", "-l")
listed = json.loads(ask("GET", "/containers/json?all=1"))
found["containers"] = [[one["Id"], one["Names"], one["State"]] for one in listed]
found["images"] = json.loads(ask("GET", "/images/json?all=1"))
state = json.loads(ask("GET", "/containers/shop/json"))
found["theirs"] = [state["State"], state["RestartCount"]]
found["volumes"] = json.loads(ask("GET", "/volumes"))
about = json.loads(ask("GET", "/info"))
for name in ("Runtimes", "DefaultRuntime", "Labels", "SecurityOptions", "LiveRestoreEnabled", "Containers", "Images"):
    found["engine's " + name] = about[name]
found["engine"] = said("systemctl", "show", "--property=MainPID,InvocationID", "docker.service", "containerd.service")
found["group"] = said("systemctl", "show", "--property=ActiveState", "system-lsmlab.slice")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with open_bench(discovery.load_lab("docker-debian-13"), Silent()) as opened:
        yield opened


def look(channel: Channel) -> dict[str, Any]:
    """All that is to be the same afterwards, by name."""
    found: dict[str, Any] = json.loads(channel.run(["python3", "-c", ASK + LOOK], timeout=300).check().out)
    assert len(found) > 300 and found["theirs"][0]["Running"]
    return found


@contextlib.contextmanager
def like_others(bench: Bench, framework: Framework, home: Path) -> Iterator[tuple[Channel, str]]:
    """A machine with an engine that nothing of ours is in, and how it is reached over SSH."""
    with bench.guest(Kernel(framework.value), "ssh containers") as machine, reached(machine, home) as port:
        there = machine.channel
        there.run(["sh", "-c", PLAIN], stdin=json.dumps(SETTINGS).encode(), timeout=300).check()
        there.run(["systemctl", "restart", "docker.service"], timeout=300).check()
        there.run(["python3", "-c", ASK + THEIRS], timeout=300).check()
        yield there, f"root@127.0.0.1:{port}"


@pytest.mark.parametrize("framework", list(Framework))
def test_a_container_on_an_engine_that_is_there(bench: Bench, framework: Framework, tmp_path: Path) -> None:
    with like_others(bench, framework, tmp_path) as (there, host):
        before = look(there)
        env, asked = environment(tmp_path), ("run", SCENARIO, "--lab", f"ssh:{host}")
        doctor = lsmlab("doctor", "--ssh", host, env=env, code=None).stdout
        assert f"confines by {framework.display}" in doctor
        refused = lsmlab(*asked, env=env, code=4).stderr
        assert "/etc/docker/daemon.json has one more runtime" in refused
        done = lsmlab(*asked, "--allow-changes", "--json", str(tmp_path / "out.json"), env=env)
        assert differing(before, look(there)) == {}
        shown = lsmlab("show", "1", env=env).stdout
        nowhere(tmp_path, done.stdout, done.stderr, shown)
        _as_it_should_be(outcomes((tmp_path / "out.json").read_text())[SCENARIO, framework.value], framework)


OTHERS = {
    "container-makes-user-namespace": {"selinux": "CONTROL_BLOCKED", "apparmor": "CONTROL_BLOCKED"},
    "container-reads-host-shadow-as-spc": {"selinux": "NOT_CONTAINED"},
    "container-reads-host-shadow-own-profile": {"apparmor": "CONTAINED"},
    "container-reads-other-tenant": {"selinux": "CONTAINED", "apparmor": "NOT_CONTAINED"},
    "container-reads-other-tenant-same-level": {"selinux": "NOT_CONTAINED"},
    "container-serves-host-shadow": {"selinux": "CONTAINED", "apparmor": "NOT_CONTAINED"},
}


@pytest.mark.parametrize("framework", list(Framework))
def test_the_others_that_are_admitted_are_as_in_a_guest(bench: Bench, framework: Framework, tmp_path: Path) -> None:
    names = [name for name, expected in OTHERS.items() if framework.value in expected]
    with like_others(bench, framework, tmp_path) as (there, host):
        before = look(there)
        asked = ("run", *names, "--lab", f"ssh:{host}", "--allow-changes", "--json", str(tmp_path / "out.json"))
        done = lsmlab(*asked, env=environment(tmp_path))
        assert differing(before, look(there)) == {}
        nowhere(tmp_path, done.stdout, done.stderr)
        found = outcomes((tmp_path / "out.json").read_text())
        assert {name: one["verdict"] for (name, _), one in found.items()} == {
            name: OTHERS[name][framework.value] for name in names
        }  # fmt: skip


@pytest.mark.parametrize("framework", list(Framework))
def test_a_killed_run_leaves_what_an_undo_removes(bench: Bench, framework: Framework, tmp_path: Path) -> None:
    with like_others(bench, framework, tmp_path) as (there, host):
        before = look(there)
        env, asked = environment(tmp_path), ("run", SCENARIO, "--lab", f"ssh:{host}", "--allow-changes")
        interrupted = start(*asked, env=env)
        wait_for(interrupted, ": attack read-shadow")
        said = kill(interrupted, signal.SIGINT)
        assert interrupted.returncode == 2, said
        assert differing(before, look(there)) == {}
        process = start(*asked, env=env)
        wait_for(process, ": benign read-orders")
        said += kill(process, signal.SIGKILL)
        changed = differing(before, look(there))
        new = {"containers", "images", "engine's Runtimes", "/etc/docker/daemon.json", "/var/lib/lsmlab"}
        assert new <= changed.keys()
        assert "theirs" not in changed and "engine" not in changed
        done = lsmlab("undo", host, env=env)
        assert "put back: image lsmlab" in done.stdout and "put back: runtime lsmlab" in done.stdout
        assert differing(before, look(there)) == {}
        assert "nothing to undo" in lsmlab("undo", host, env=env).stderr
        nowhere(tmp_path, said, done.stdout, done.stderr)


def _as_it_should_be(found: dict[str, Any], framework: Framework) -> None:
    assert (found["verdict"], found["as_expected"]) == (VERDICTS[framework], True), found["reason"]
    assert found["environment"]["isolation"] == "by undo, verified"
    control = next(a for a in found["arms"][0]["attempts"] if a["attempt"] == "read-shadow")
    seen = control["observation"]
    assert (control["result"], seen["exit_code"]) == ("allowed", 0)
    assert seen["canary"] in seen["output"] and seen["withheld"] > 500
    assert "root:" not in seen["output"]
    firsts = {
        (arm["arm"], attempt["attempt"]): attempt["observation"]["subject_before"]["processes"][0]["pid"]
        for arm in found["arms"]
        for attempt in arm["attempts"]
    }
    assert len(firsts) == 6 and len(set(firsts.values())) == 6, "each attempt has a container of its own"
    if framework is Framework.SELINUX:
        attack = next(a for a in found["arms"][1]["attempts"] if a["attempt"] == "read-shadow")
        assert attack["attribution"]["denial"]["auid"] == attack["observation"]["auid"]
