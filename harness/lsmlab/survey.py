"""What a machine that is there already has and lacks for being a lab. Looks, and changes nothing.

All that it says is untrusted: read strictly, cut short, and shown as one harmless line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lsmlab import facts
from lsmlab.channel.agent import AgentChannel
from lsmlab.channel.ssh_login import Login
from lsmlab.container import kept
from lsmlab.doctor import Finding
from lsmlab.errors import ChannelError
from lsmlab.terminal import clean

AUDIT_LOG = "/var/log/audit/audit.log"
LOOK_SECONDS = 30.0
"""How long one command of the survey may take there."""
MOST_SHOWN = 200
"""Characters of the machine's own words in a finding."""
MOST_PROCESSES = 64
"""Of how many processes of a service the label is read."""
SSHD_UNITS = ("ssh.service", "sshd.service")
"""In no lab, and there on every machine that is reached over SSH."""
SECURITYFS = "The kernel says it below /sys/kernel/security: `mount -t securityfs none /sys/kernel/security`."
AUDITD = "The audit log is the evidence: install auditd (Fedora: audit), and `systemctl enable --now auditd`."
SELINUX_UNCONFINED = frozenset({"unconfined_t", "unconfined_service_t", "initrc_t", "init_t", "kernel_t"})
"""Domains of what runs without one of its own."""


def examine(channel: AgentChannel, login: Login, units: Iterable[str]) -> list[Finding]:
    """Every finding, in the order that a lab needs them. `units`: services whose confinement is looked at.

    Raises ChannelError where the connection breaks; what the machine refuses to say is a finding.
    """
    findings = [_ssh(login)]
    for what, needed, look, advice in (
        ("system", False, _system, ""),
        ("root", True, _root, ""),
        ("Python", True, _python, ""),
        ("frameworks", True, _frameworks, SECURITYFS),
        ("auditing", True, _auditing, AUDITD),
        ("services", False, lambda asked: _services(asked, units), ""),
        ("containers", False, _containers, ""),
    ):
        try:
            findings += look(channel)
        except ChannelError as error:
            if channel.fault:
                raise
            found = _line(error.message.removeprefix(f"{channel.name}: "))
            findings.append(Finding(what, ok=False, needed=needed, found=found, advice=advice))
    return findings


def _line(words: str) -> str:
    """The machine's words, harmless, on one line and not too long."""
    text = clean(" ".join(words[: 4 * MOST_SHOWN].split()))
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _said(channel: AgentChannel, *argv: str) -> str:
    return channel.run(argv, timeout=LOOK_SECONDS).check().out


def _ssh(login: Login) -> Finding:
    host_key = login.host_key if login.known else f"{login.host_key}, not checked: Vagrant makes it anew"
    found = f"{login.user} at {login.address} port {login.port}, key {login.key}; host key {host_key}"
    return Finding("SSH", ok=True, needed=True, found=clean(found))


def _system(channel: AgentChannel) -> Iterator[Finding]:
    kernel = _line(_said(channel, "uname", "-srm"))
    release = channel.run(["cat", "/etc/os-release"], timeout=LOOK_SECONDS)
    lines = (line.partition("=") for line in release.out.splitlines())
    name = next((value.strip("\"'") for key, _, value in lines if key == "PRETTY_NAME"), "unknown: no os-release")
    yield Finding("system", ok=True, needed=False, found=f"{_line(name)}, {kernel}")


def _root(channel: AgentChannel) -> Iterator[Finding]:
    uid = _line(_said(channel, "id", "-u"))
    by_sudo = channel.run(["printenv", "SUDO_USER"], timeout=LOOK_SECONDS).ok
    how = "by sudo, without a password" if by_sudo else "the login is root's"
    ok = uid == "0"
    advice = "" if ok else "Log in as root, or have sudo make this user root."
    yield Finding("root", ok=ok, needed=True, found=how if ok else f"the agent runs as uid {uid}", advice=advice)


def _python(channel: AgentChannel) -> Iterator[Finding]:
    yield Finding("Python", ok=True, needed=True, found=_line(_said(channel, "python3", "--version")))


def _frameworks(channel: AgentChannel) -> Iterator[Finding]:
    mode = facts.read(facts.ModeFacts, channel.ask("mode"))
    if mode.selinux_enforcing is not None:
        yield Finding("SELinux", ok=True, needed=True, found="enforcing" if mode.selinux_enforcing else "permissive")
    if mode.profiles is not None:
        yield _apparmor(mode.profiles, mode.apparmor_mode)
    if mode.selinux_enforcing is None and mode.profiles is None:
        yield Finding(
            "frameworks",
            ok=False,
            needed=True,
            found=f"neither SELinux nor AppArmor is in the kernel: {_line(', '.join(mode.lsm))}",
            advice="Boot it with one: `security=apparmor` or `security=selinux` on the kernel's command line.",
        )


def _apparmor(profiles: dict[str, str], whole: str | None) -> Finding:
    modes = list(profiles.values())
    counts = [f"{modes.count(one)} in {one}" for one in ("enforce", "complain")]
    others = len(modes) - sum(modes.count(one) for one in ("enforce", "complain"))
    counts += [f"{others} in another mode"] if others else []
    found = f"{len(modes)} profiles loaded: {', '.join(counts)}" if modes else "no profile is loaded"
    if whole == "enforce":
        return Finding("AppArmor", ok=True, needed=True, found=found)
    return Finding(
        "AppArmor",
        ok=False,
        needed=False,
        found=f"{found}; but for all of them {_line(str(whole))} holds",
        advice="See /sys/module/apparmor/parameters/mode: anything but enforce overrides each profile's own mode.",
    )


def _auditing(channel: AgentChannel) -> Iterator[Finding]:
    state = facts.read(facts.AuditState, channel.ask("audit_state"))
    on = "on" if state.enabled else "off"
    daemon = f"auditd is process {state.daemon_pid}" if state.daemon_pid else "no auditd takes the records"
    ok = bool(state.enabled and state.daemon_pid)
    advice = "" if ok else "`systemctl enable --now auditd`, and `auditctl -e 1`."
    yield Finding("auditing", ok=ok, needed=True, found=f"{on}, {daemon}, {state.lost} records lost", advice=advice)
    read = channel.run(["head", "-c", "1", AUDIT_LOG], timeout=LOOK_SECONDS)
    size = f"{AUDIT_LOG}, {state.size} bytes"
    yield Finding("audit log", ok=read.ok, needed=True, found=size if read.ok else f"{size}: {_line(read.err)}")


def _containers(channel: AgentChannel) -> Iterator[Finding]:
    found = kept.look(channel)
    why, advice = kept.problem(found)
    by = " and ".join(f.display for f in found.frameworks)
    words = _line(why) if why else f"Docker Engine {_line(found.version)} confines by {by or 'no framework'}"
    ok = not found.installed or not (why or not by)
    yield Finding("containers", ok=ok, needed=False, found=words, advice="" if ok else advice)


def _services(channel: AgentChannel, units: Iterable[str]) -> Iterator[Finding]:
    looked_for = sorted({*units, *SSHD_UNITS})
    running = [found for unit in looked_for if (found := _service(channel, unit))]
    yield from running
    if not running:
        yield Finding("services", ok=True, needed=False, found=f"none of these runs: {', '.join(looked_for)}")


def _service(channel: AgentChannel, unit: str) -> Finding | None:
    """How a unit's processes are confined; None where it has none."""
    pids = _pids(channel.ask("pids", unit=unit))
    if not pids:
        return None
    files = [f"/proc/{pid}/attr/current" for pid in pids[:MOST_PROCESSES]]
    # grep: one program for all of them; a process that has ended, or a kernel that gives no labels, is no line
    lines = channel.run(["grep", "-a", "-h", "-s", "", *files], timeout=LOOK_SECONDS).out.splitlines()
    labels = sorted({label for line in lines if (label := line.strip("\0 "))})
    if not labels:
        return Finding(unit, ok=True, needed=False, found="runs; the kernel gives its processes no label")
    loose = [label for label in labels if _is_loose(label)]
    advice = f"Nothing is contained in: {_line(', '.join(loose))}." if loose else ""
    return Finding(unit, ok=not loose, needed=False, found=_line(", ".join(labels)), advice=advice)


def _is_loose(label: str) -> bool:
    """Whether no policy holds who has this label: an unconfined domain, no profile, or one that only logs."""
    return (
        label == "unconfined"
        or label.endswith((" (complain)", " (unconfined)"))
        or facts.domain_of(label) in SELINUX_UNCONFINED
    )


def _pids(answer: Any) -> Sequence[int]:
    if type(answer) is list and all(type(pid) is int and 0 < pid < 1 << 31 for pid in answer):
        return answer
    raise ChannelError("the agent answered nonsense: what it calls processes are none")
