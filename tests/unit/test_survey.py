"""What `doctor --ssh` makes of a machine's answers, which may be anything; and of this machine, by the real agent."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lsmlab import survey
from lsmlab.channel.agent import AgentChannel
from lsmlab.channel.ssh import open_ssh
from lsmlab.channel.ssh_login import Login
from lsmlab.container import kept
from lsmlab.doctor import Finding
from lsmlab.errors import ChannelError
from ssh_server import ssh_home

LOGIN = Login("admin", "192.0.2.7", 22, "ssh-ed25519 /home/me/.ssh/id", "ssh-ed25519 SHA256:abc", known=True)
AUDIT: dict[str, Any] = {"enabled": 1, "daemon_pid": 411, "lost": 0, "backlog": 0, "log": "fe01:77", "size": 5120}
SELINUX: dict[str, Any] = {
    "lsm": ["capability", "selinux"], "selinux_enforcing": True, "profiles": None, "apparmor_mode": None,
}  # fmt: skip
APPARMOR: dict[str, Any] = {
    "lsm": ["capability", "apparmor"], "selinux_enforcing": None, "apparmor_mode": "enforce",
    "profiles": {"nginx": "enforce", "named": "complain", "cupsd": "enforce", "lsb_release": "kill"},
}  # fmt: skip
UNITS = ("nginx.service", "named.service")
NO_ENGINE: dict[str, Any] = {"installed": False, "pid": 0, "runc": "", "busybox": ""}
ENGINE: dict[str, Any] = {
    "installed": True, "pid": 700, "runc": "/usr/sbin/runc", "busybox": "/bin/busybox", "program": "dockerd",
    "options": ["-H"], "api": "1.45", "version": "26.1.5", "security": ["name=seccomp,profile=builtin", "name=selinux"],
    "cgroups": "systemd 2", "data": "/var/lib/docker", "knows_runtime": False, "has_image": False,
    "settings_problem": "", "settings_unread": False,
}  # fmt: skip
CUT = object()
"""Instead of an answer: the connection ends."""

Answers = dict[str, Any]
"""By operation, or by a command's program: the answer, or output; a callable is given the question."""


def good() -> Answers:
    return {
        "mode": SELINUX,
        "audit_state": AUDIT,
        "engine_state": NO_ENGINE,
        "pids": lambda question: [611, 612] if question["unit"] == "nginx.service" else [],
        "uname": "Linux 6.12.9 x86_64\n",
        "cat": 'ID=debian\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n',
        "id": "0\n",
        "printenv": "admin\n",
        "python3": "Python 3.13.1\n",
        "head": "t",
        "grep": "system_u:system_r:httpd_t:s0\0\nsystem_u:system_r:httpd_t:s0\0\n",
    }


def ended(out: Any) -> Any:
    """A command's answer: its output, or its exit status."""
    if type(out) not in {str, int}:
        return out
    text = out.encode() if type(out) is str else b""
    return {
        "exit_code": out if type(out) is int else 0, "signal": None, "out": base64.b64encode(text).decode(),
        "err": base64.b64encode(b"Permission denied" if type(out) is int else b"").decode(), "timed_out": False,
        "too_much": False, "seconds": 0.1,
    }  # fmt: skip


def serve(end: socket.socket, answers: Answers) -> None:
    with contextlib.suppress(OSError), end, end.makefile("rb") as lines:
        for line in lines:
            question = json.loads(line)
            is_run = question["do"] == "run"
            found = answers[question["argv"][0] if is_run else question["do"]]
            if callable(found):
                found = found(question)
            if found is CUT:
                return
            kind = "error" if isinstance(found, ChannelError) else "answer"
            reply = found.message if isinstance(found, ChannelError) else ended(found) if is_run else found
            end.sendall(json.dumps({"id": question["id"], kind: reply}).encode() + b"\n")


def surveyed(login: Login = LOGIN, units: tuple[str, ...] = UNITS, **changed: Any) -> list[Finding]:
    """What is found on a machine that is as it should be, but for `changed`."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs, good() | changed))
    thread.start()
    channel = AgentChannel(ours, "machine")
    channel.connect()
    try:
        return survey.examine(channel, login, units)
    finally:
        channel.close()
        thread.join(20)
        assert not thread.is_alive()


def of(findings: list[Finding], what: str) -> Finding:
    (found,) = [f for f in findings if f.what == what]
    return found


def test_a_machine_that_could_be_a_lab() -> None:
    findings = surveyed()
    assert {f.what: f.found for f in findings} == {
        "SSH": "admin at 192.0.2.7 port 22, key ssh-ed25519 /home/me/.ssh/id; host key ssh-ed25519 SHA256:abc",
        "system": "Debian GNU/Linux 13 (trixie), Linux 6.12.9 x86_64",
        "root": "by sudo, without a password",
        "Python": "Python 3.13.1",
        "SELinux": "enforcing",
        "auditing": "on, auditd is process 411, 0 records lost",
        "audit log": "/var/log/audit/audit.log, 5120 bytes",
        "nginx.service": "system_u:system_r:httpd_t:s0",
        "containers": "there is no Docker Engine (docker.service)",
    }
    assert all(f.ok and not f.advice for f in findings)


def test_a_host_key_that_was_not_checked_is_said() -> None:
    found = surveyed(Login("vagrant", "127.0.0.1", 2222, "a key", "ssh-ed25519 SHA256:abc", known=False))
    assert of(found, "SSH").found.endswith("host key ssh-ed25519 SHA256:abc, not checked: Vagrant makes it anew")


def test_a_permissive_machine() -> None:
    assert of(surveyed(mode=SELINUX | {"selinux_enforcing": False}), "SELinux").found == "permissive"


def test_apparmor_with_its_profiles() -> None:
    found = of(surveyed(mode=APPARMOR), "AppArmor")
    assert (found.ok, found.found) == (True, "4 profiles loaded: 2 in enforce, 1 in complain, 1 in another mode")
    assert of(surveyed(mode=APPARMOR | {"profiles": {}}), "AppArmor").found == "no profile is loaded"


def test_apparmor_that_only_logs_as_a_whole() -> None:
    found = of(surveyed(mode=APPARMOR | {"apparmor_mode": "complain"}), "AppArmor")
    assert (found.ok, found.needed) == (False, False)
    assert found.found.endswith("but for all of them complain holds")
    assert "/sys/module/apparmor/parameters/mode" in found.advice


def test_no_framework() -> None:
    plain = {"lsm": ["capability", "yama"], "selinux_enforcing": None, "profiles": None, "apparmor_mode": None}
    found = of(surveyed(mode=plain), "frameworks")
    assert (found.ok, found.needed) == (False, True)
    assert found.found == "neither SELinux nor AppArmor is in the kernel: capability, yama"
    assert "security=apparmor" in found.advice


def test_a_kernel_that_does_not_say() -> None:
    found = of(surveyed(mode=ChannelError("/sys/kernel/security/lsm: No such file")), "frameworks")
    assert (found.ok, found.needed) == (False, True)
    assert found.found == "mode: /sys/kernel/security/lsm: No such file"
    assert "mount -t securityfs" in found.advice


def test_who_is_not_root() -> None:
    assert of(surveyed(printenv=1), "root").found == "the login is root's"
    found = of(surveyed(id="1000\n"), "root")
    assert (found.ok, found.needed, found.found) == (False, True, "the agent runs as uid 1000")


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"enabled": 0}, "off, auditd is process 411, 0 records lost"),
        ({"daemon_pid": 0}, "on, no auditd takes the records, 0 records lost"),
        ({"enabled": 0, "daemon_pid": 0, "lost": 7}, "off, no auditd takes the records, 7 records lost"),
    ],
)
def test_auditing_that_is_off(state: dict[str, int], words: str) -> None:
    found = of(surveyed(audit_state=AUDIT | state), "auditing")
    assert (found.ok, found.needed, found.found) == (False, True, words)
    assert "systemctl enable --now auditd" in found.advice


def test_lost_records_are_said_and_no_lack() -> None:
    found = of(surveyed(audit_state=AUDIT | {"lost": 7}), "auditing")
    assert (found.ok, found.found) == (True, "on, auditd is process 411, 7 records lost")


def test_a_machine_without_auditd() -> None:
    findings = surveyed(audit_state=ChannelError("/var/log/audit/audit.log: No such file or directory"))
    found = of(findings, "auditing")
    assert (found.ok, found.needed) == (False, True)
    assert "audit.log: No such file or directory" in found.found
    assert "install auditd" in found.advice
    assert not [f for f in findings if f.what == "audit log"]


def test_a_log_that_cannot_be_read() -> None:
    found = of(surveyed(head=1), "audit log")
    assert (found.ok, found.needed) == (False, True)
    assert found.found == "/var/log/audit/audit.log, 5120 bytes: Permission denied"


@pytest.mark.parametrize(
    ("labels", "ok", "words"),
    [
        ("nginx (enforce)\n", True, "nginx (enforce)"),
        ("nginx (complain)\n", False, "nginx (complain)"),
        ("unconfined\n", False, "unconfined"),
        ("chrome (unconfined)\n", False, "chrome (unconfined)"),
        ("system_u:system_r:unconfined_service_t:s0\0\n", False, "system_u:system_r:unconfined_service_t:s0"),
        ("system_u:system_r:initrc_t:s0\0\n", False, "system_u:system_r:initrc_t:s0"),
        ("nginx (enforce)\nunconfined\nnginx (enforce)\n", False, "nginx (enforce), unconfined"),
        ("", True, "runs; the kernel gives its processes no label"),
        (2, True, "runs; the kernel gives its processes no label"),
    ],
)
def test_how_a_service_is_confined(labels: str | int, ok: bool, words: str) -> None:
    found = of(surveyed(grep=labels), "nginx.service")
    assert (found.ok, found.needed, found.found) == (ok, False, words)
    assert bool(found.advice) is not ok


def test_the_loose_labels_are_named() -> None:
    found = of(surveyed(grep="nginx (enforce)\nunconfined\n"), "nginx.service")
    assert found.advice == "Nothing is contained in: unconfined."


def test_sshd_is_looked_at_though_no_lab_has_it() -> None:
    findings = surveyed(pids=lambda question: [7] if question["unit"] == "ssh.service" else [], units=())
    assert of(findings, "ssh.service").ok


def test_no_service_that_runs() -> None:
    found = of(surveyed(pids=[]), "services")
    assert found.found == "none of these runs: named.service, nginx.service, ssh.service, sshd.service"


def test_a_service_of_many_processes_is_asked_in_bounds() -> None:
    asked: list[int] = []

    def grep(question: dict[str, Any]) -> str:
        asked.append(len([word for word in question["argv"] if word.startswith("/proc/")]))
        return "unconfined\n"

    surveyed(pids=list(range(1, 5000)), grep=grep)
    assert set(asked) == {survey.MOST_PROCESSES}


def test_whether_the_container_engine_will_do_is_one_line() -> None:
    found = of(surveyed(engine_state=ENGINE), "containers")
    assert (found.ok, found.found, found.advice) == (True, "Docker Engine 26.1.5 confines by SELinux", "")
    found = of(surveyed(engine_state=ENGINE | {"security": ["name=rootless", "name=selinux"]}), "containers")
    assert not found.ok and not found.needed and "is rootless" in found.found and found.advice


# A machine that says anything


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"mode": "nonsense"}, "frameworks"),
        ({"mode": SELINUX | {"selinux_enforcing": 1}}, "frameworks"),
        ({"mode": SELINUX | {"more": 1}}, "frameworks"),
        ({"audit_state": AUDIT | {"enabled": -1}}, "auditing"),
        ({"audit_state": AUDIT | {"size": "big"}}, "auditing"),
        ({"audit_state": []}, "auditing"),
        ({"pids": ["../../etc/shadow"]}, "services"),
        ({"pids": [True]}, "services"),
        ({"pids": [-1]}, "services"),
        ({"pids": {"a": 1}}, "services"),
        ({"uname": {"exit_code": "x"}}, "system"),
        ({"id": None}, "root"),
        ({"python3": 1}, "Python"),
        ({"engine_state": []}, "containers"),
        ({"engine_state": ENGINE | {"cgroups": 2}}, "containers"),
    ],
)
def test_nonsense_is_a_finding_and_the_rest_is_looked_at(changed: dict[str, Any], what: str) -> None:
    findings = surveyed(**changed)
    assert not of(findings, what).ok
    assert len(findings) >= 6
    assert [f.what for f in findings if not f.ok] == [what]


@pytest.mark.parametrize("word", ["\x1b[2Jgone", "a\rb", "\u202eback", "\x9b31m"])
@pytest.mark.parametrize("answer", ["uname", "cat", "python3", "grep", "id"])
def test_what_a_terminal_would_obey_is_made_visible(answer: str, word: str) -> None:
    changed: Answers = {answer: f'PRETTY_NAME="{word}"\n' if answer == "cat" else f"{word}\n"}
    for finding in surveyed(**changed):
        for text in (finding.found, finding.advice):
            assert text.isprintable(), text


def test_long_words_are_cut() -> None:
    long = "x" * 100_000
    findings = surveyed(uname=long, cat=f"PRETTY_NAME={long}", grep=long, python3=long, id=long)
    assert max(len(f.found) for f in findings) < 3 * survey.MOST_SHOWN


@pytest.mark.parametrize("answer", ["uname", "mode", "audit_state", "head", "pids", "grep"])
def test_a_connection_that_breaks_is_an_error_and_no_finding(answer: str) -> None:
    changed: Answers = {answer: CUT}
    with pytest.raises(ChannelError, match="closed"):
        surveyed(**changed)


# The real agent


@pytest.fixture
def over_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[Finding]]]:
    """What is found on this machine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with ssh_home(tmp_path) as home:
        home.sudo_that_obeys()

        def look() -> list[Finding]:
            with contextlib.closing(open_ssh("machine", kept.PARTS)) as channel:
                return survey.examine(channel, channel.login, UNITS)

        yield look


def test_this_machine(over_ssh: Callable[[], list[Finding]]) -> None:
    findings = over_ssh()
    assert [f.what for f in findings][:4] == ["SSH", "system", "root", "Python"]
    assert of(findings, "SSH").found.startswith("tester at 127.0.0.1 port ")
    assert Path("/proc/sys/kernel/osrelease").read_text().strip() in of(findings, "system").found
    assert of(findings, "Python").found.startswith("Python 3.")
    assert {f.what for f in findings} & {"frameworks", "SELinux", "AppArmor"}
    assert {f.what for f in findings} & {"auditing"}
