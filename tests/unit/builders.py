"""Small, complete records for the tests: facts, observations, denials, arms, outcomes; records as the kernel writes
them, and answers as the agent in a guest gives them."""

from __future__ import annotations

import base64
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsmlab import facts
from lsmlab.attempt import Observation
from lsmlab.definition import Strict
from lsmlab.evidence import Denial, denials, parse
from lsmlab.outcome import ArmRecord, AttemptRecord, Environment, Outcome
from lsmlab.scenario import Attempt, Scenario
from lsmlab.terms import Arm, AttemptKind, Framework, Result, SourceState, Verdict
from lsmlab.verdict import Attribution, JudgedArm, JudgedAttempt

SAMPLES = Path(__file__).with_name("samples")
WORD = "6a6a10e1bc95c1ea"
"""The canary of every observation here."""
AUID = 0x40001234
"""The audit user id of every `run` attempt here."""
UNSET = 4294967295
HTTPD = "system_u:system_r:httpd_t:s0"
SHADOW = "system_u:object_r:shadow_t:s0"
INODE = 589
LSM = {
    None: ("lockdown", "capability", "yama"),
    Framework.SELINUX: ("lockdown", "capability", "yama", "selinux"),
    Framework.APPARMOR: ("lockdown", "capability", "yama", "apparmor"),
}


def sample(name: str) -> str:
    """A piece of an audit log."""
    return (SAMPLES / name).read_text(encoding="utf-8")


# What the kernel writes


def untrusted(value: bytes) -> str:
    """As audit_log_untrustedstring() writes it: quoted, or in hexadecimal where it holds what could be mistaken."""
    if any(byte == 0x22 or byte < 0x21 or byte > 0x7E for byte in value):
        return value.hex().upper()
    return f'"{value.decode("ascii")}"'


def avc(
    *permissions: str,
    stamp: str = "1795509852.188",
    serial: int = 147,
    verb: str = "denied",
    pid: int = 482,
    comm: bytes = b"nginx",
    name: bytes = b"shadow",
    key: str = "name",
    dev: str = "vda",
    ino: int = INODE,
    source: str = HTTPD,
    target: str = SHADOW,
    tclass: str = "file",
    permissive: int = 0,
) -> str:
    """An SELinux record, as security/selinux/avc.c and security/lsm_audit.c write it."""
    return (
        f"type=AVC msg=audit({stamp}:{serial}): avc:  {verb}  {{ {' '.join(permissions or ('read',))} }} for "
        f" pid={pid} comm={untrusted(comm)} {key}={untrusted(name)} dev={untrusted(dev.encode())} ino={ino}"
        f" scontext={source} tcontext={target} tclass={tclass} permissive={permissive}"
    )


def apparmor(
    *,
    stamp: str = "1795509850.164",
    serial: int = 216,
    kind: str = "DENIED",
    operation: str = "open",
    rule_class: str | None = "file",
    profile: bytes = b"nginx",
    name: bytes = b"/etc/shadow",
    pid: int = 482,
    mask: str = "r",
) -> str:
    """An AppArmor record, as security/apparmor/audit.c writes it; kernels before 6.5 write no class."""
    middle = f' class="{rule_class}"' if rule_class else ""
    return (
        f'type=AVC msg=audit({stamp}:{serial}): apparmor="{kind}" operation="{operation}"{middle}'
        f' profile={untrusted(profile)} name={untrusted(name)} pid={pid} comm="nginx"'
        f' requested_mask="{mask}" denied_mask="{mask}" fsuid=33 ouid=0'
    )


def syscall(
    *,
    stamp: str = "1795509852.188",
    serial: int = 147,
    number: int = 257,
    success: str = "no",
    result: int = -13,
    ppid: int = 481,
    pid: int = 482,
    auid: int = UNSET,
    subject: str = HTTPD,
    key: str = '"lsmlab-denied"',
) -> str:
    """The SYSCALL record of an event, with auditd's translations behind it."""
    return (
        f"type=SYSCALL msg=audit({stamp}:{serial}): arch=c000003e syscall={number} success={success} exit={result}"
        f" a0=ffffffffffffff9c a1=55630d2b8874 a2=800 a3=0 items=1 ppid={ppid} pid={pid} auid={auid} uid=33 gid=33"
        f' euid=33 suid=33 fsuid=33 egid=33 sgid=33 fsgid=33 tty=(none) ses={UNSET} comm="nginx"'
        f' exe="/usr/sbin/nginx" subj={subject} key={key}\x1dARCH=x86_64 SYSCALL=openat AUID="unset" UID="www-data"'
    )


def path_record(name: bytes, inode: int, *, stamp: str = "1795509852.188", serial: int = 147) -> str:
    """A PATH record of an event."""
    return (
        f"type=PATH msg=audit({stamp}:{serial}): item=0 name={untrusted(name)} inode={inode} dev=fe:00 mode=0100640"
        f" ouid=0 ogid=42 rdev=00:00 obj={SHADOW} nametype=NORMAL cap_fp=0 cap_fi=0 cap_fe=0 cap_fver=0 cap_frootid=0"
        f'\x1dOUID="root" OGID="shadow"'
    )


def exec_record(*, subject: str = HTTPD, success: str = "yes", auid: int = AUID, pid: int = 700) -> str:
    """The record of the exec that starts a `run` attempt's program."""
    return syscall(
        stamp="1795509852.100", serial=146, number=59, success=success, result=0 if success == "yes" else -13,
        ppid=699, pid=pid, auid=auid, subject=subject, key='"lsmlab-subject"',
    )  # fmt: skip


def user_record(word: str, *, stamp: str = "1795509853.196", serial: int = 149) -> str:
    """The record of a message that a program sent through the audit queue: a sentinel, if it holds the right word."""
    return (
        f"type=USER msg=audit({stamp}:{serial}): pid=300 uid=0 auid={UNSET} ses={UNSET}"
        f' subj=system_u:system_r:init_t:s0 msg=\'{word}\'\x1dUID="root" AUID="unset"'
    )


# What the agent answers


def encoded(text: str | bytes) -> str:
    """Bytes as the agent sends them."""
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def ended(out: str | bytes = "", err: str | bytes = "", *, code: int | None = 0, **changes: Any) -> dict[str, Any]:
    """How a command ended."""
    base = {"exit_code": code, "signal": None, "timed_out": False, "too_much": False, "seconds": 0.12345}
    return {**base, "out": encoded(out), "err": encoded(err), **changes}


def visited(status: int | None = 200, out: str | bytes = "", err: str = "", **changes: Any) -> dict[str, Any]:
    """What came of a request."""
    base = {"status": status, "timed_out": False, "too_much": False, "seconds": 0.12345}
    return {**base, "out": encoded(out), "err": encoded(err), **changes}


def audit_state(**changes: Any) -> dict[str, Any]:
    """The audit subsystem as it should be."""
    return {
        "enabled": 1, "daemon_pid": 344, "lost": 0, "backlog": 0, "log": "65024:1183", "size": 85220, **changes,
    }  # fmt: skip


def wire(record: Strict) -> dict[str, Any]:
    """A record as the agent sends it."""
    sent: dict[str, Any] = record.model_dump(mode="json")
    return sent


# Facts


def process(pid: int = 482, *, main: bool = False, label: str = HTTPD) -> facts.Process:
    """A process of nginx: the master (root) or a worker (www-data, in group shadow)."""
    uid = 0 if main else 33
    return facts.Process(
        pid=pid,
        ppid=1 if main else 481,
        name="nginx",
        main=main,
        exe="/usr/sbin/nginx",
        label=label,
        uids=(uid, uid, uid, uid),
        gids=(uid, uid, uid, uid),
        groups=() if main else (33, 42),
        cap_permitted=(1 << 41) - 1 if main else 0,
        cap_effective=(1 << 41) - 1 if main else 0,
        cap_bounding=(1 << 41) - 1,
        no_new_privs=False,
        seccomp=0,
        initial_userns=True,
    )


def subject(*processes: facts.Process, active: str = "active", label: str = HTTPD) -> facts.SubjectFacts:
    """nginx and its processes: a master and one worker where none are given."""
    service = facts.ServiceState(active=active, sub="running", result="success", main_pid=481)
    found = processes or (process(481, main=True, label=label), process(label=label))
    return facts.SubjectFacts(service=service, processes=found)


def nobody(active: str = "failed") -> facts.SubjectFacts:
    """A service without processes."""
    return subject(active=active).model_copy(update={"processes": ()})


def target(path: str = "/etc/shadow", *, exists: bool = True, ino: int = INODE) -> facts.ObjectFacts:
    """The object: /etc/shadow, root:shadow 0640 on vda."""
    entry = facts.PathEntry(
        path=path, mode=stat.S_IFREG | 0o640, uid=0, gid=42, user="root", group="shadow", dev="fe00", ino=ino, acl=()
    )
    return facts.ObjectFacts(
        path=path,
        exists=exists,
        real=path if exists else "",
        label=SHADOW,
        read_only=False,
        device="vda" if exists else "",
        chain=(entry,) if exists else (),
    )


def mode(
    arm: Arm,
    *,
    lsm: tuple[str, ...] | None = None,
    enforcing: bool | None = None,
    profiles: Mapping[str, str] | None = None,
) -> facts.ModeFacts:
    """What the kernel says in `arm`, where all is as it should be; or what is given."""
    framework = arm.framework
    return facts.ModeFacts(
        lsm=lsm if lsm is not None else LSM[framework],
        selinux_enforcing=(
            enforcing if enforcing is not None else not arm.logging if framework is Framework.SELINUX else None
        ),
        profiles=(
            dict(profiles)
            if profiles is not None
            else {}
            if arm.unconfined
            else {"nginx": "enforce" if arm.enforcing else "complain"}
            if framework is Framework.APPARMOR
            else None
        ),
        apparmor_mode="enforce" if framework is Framework.APPARMOR else None,
    )


def label_in(arm: Arm) -> str:
    """What /proc/PID/attr/current says of nginx in `arm`."""
    return {
        Arm.DAC: "",
        Arm.APPARMOR_COMPLAIN: "nginx (complain)",
        Arm.APPARMOR_ENFORCE: "nginx (enforce)",
        Arm.SELINUX_UNCONFINED: "system_u:system_r:init_t:s0",
        Arm.APPARMOR_UNCONFINED: "unconfined",
    }.get(arm, HTTPD)


def source(state: SourceState = SourceState.FETCHED, detail: str = "5 records, none lost") -> facts.SourceReading:
    """How the audit log was read."""
    return facts.SourceReading(name="audit log", state=state, detail=detail)


def observation(arm: Arm = Arm.SELINUX_ENFORCING, *lines: str, **changes: Any) -> Observation:
    """A visitor's request that nginx refused with 403 in `arm`; `lines` are the window, `changes` any other facts."""
    base: dict[str, Any] = {
        "attempt": "read-shadow",
        "command": ("GET", "http://127.0.0.1:80/static../etc/shadow"),
        "exit_code": None,
        "signal": None,
        "timed_out": False,
        "output": "<h1>403 Forbidden</h1>",
        "errors": "",
        "http_status": 403,
        "canary": WORD,
        "canary_planted": True,
        "effect_before": None,
        "effect_after": None,
        "seconds": 0.4,
        "subject_before": subject(label=label_in(arm)),
        "subject_after": subject(label=label_in(arm)),
        "object": target(),
        "mode_before": mode(arm),
        "mode_after": mode(arm),
        "source": source(),
        "log": "\n".join(lines),
        "auid": None,
    }
    return Observation(**{**base, **changes})


def run_observation(arm: Arm = Arm.SELINUX_ENFORCING, *lines: str, **changes: Any) -> Observation:
    """A command as the subject that said `Permission denied` in `arm`."""
    base: dict[str, Any] = {
        "command": ("cat", "/etc/shadow"),
        "exit_code": 1,
        "output": "",
        "errors": "cat: /etc/shadow: Permission denied\n",
        "http_status": None,
        "auid": AUID,
    }
    return observation(arm, *lines, **{**base, **changes})


# Definitions


def http_attempt(**changes: Any) -> Attempt:
    """A visitor's attack on /etc/shadow."""
    base: dict[str, Any] = {
        "id": "read-shadow",
        "kind": "attack",
        "http": {"path": "/static../etc/shadow"},
        "canary": {"file": "/etc/shadow", "line": "lsmlab-{canary}:!:::::::"},
        "allowed_if": {"status": 200, "output": "lsmlab-{canary}:"},
        "blocked_if": [{"status": 403}],
    }
    return _attempt({**base, **changes})


def run_attempt(**changes: Any) -> Attempt:
    """A command's attack on /etc/shadow, as the subject."""
    base: dict[str, Any] = {
        "id": "read-shadow",
        "kind": "attack",
        "run": ["cat", "/etc/shadow"],
        "canary": {"file": "/etc/shadow"},
        "allowed_if": {"output": "{canary}"},
    }
    return _attempt({**base, **changes})


def _attempt(data: Mapping[str, Any]) -> Attempt:
    return Attempt.model_validate({k: v for k, v in data.items() if v is not None}, strict=False)


def scenario(**changes: Any) -> Scenario:
    """nginx reads /etc/shadow, under both frameworks."""
    base: dict[str, Any] = {
        "kind": "lsmlab/scenario",
        "id": "nginx-reads-shadow",
        "title": "nginx reads /etc/shadow",
        "story": "A location lacks its closing slash.",
        "technique": "T1003.008",
        "subject": {"service": "nginx", "selinux": "httpd_t", "apparmor": "nginx"},
        "object": {"path": "/etc/shadow", "class": "file", "selinux": "shadow_t"},
        "dac": {"opened_by": "www-data is in group shadow"},
        "attempts": [http_attempt().model_dump(by_alias=True)],
        "expected": {
            "selinux": {
                "verdict": "CONTAINED",
                "because": "no rule",
                "denials": [{"attempt": "read-shadow", "permissions": ["read", "open"]}],
            },
            "apparmor": {
                "verdict": "CONTAINED",
                "because": "no rule",
                "denials": [{"attempt": "read-shadow", "permissions": ["r"], "operation": "open"}],
            },
        },
    }
    return Scenario.model_validate({**base, **changes}, strict=False)


# What was judged


def denial(*, logged: bool = False, framework: Framework = Framework.SELINUX, spoilt: bool = False) -> Denial:
    """One denial: effective, only logged, or (spoilt) neither, as its call succeeded."""
    if framework is Framework.SELINUX:
        record = avc(permissive=int(logged))
        call = syscall(success="yes" if logged or spoilt else "no")
    else:
        record = apparmor(kind="ALLOWED" if logged else "DENIED")
        success = "yes" if logged or spoilt else "no"
        call = syscall(stamp="1795509850.164", serial=216, success=success, subject="nginx")
    return denials(parse(f"{record}\n{call}"))[0]


def judged(
    name: str = "read-shadow",
    result: Result = Result.ALLOWED,
    *,
    kind: AttemptKind = AttemptKind.ATTACK,
    denied: Denial | None = None,
    attributed: bool = False,
    **changes: Any,
) -> JudgedAttempt:
    """One attempt, judged. `attributed`: `denied` accounts for the block."""
    return JudgedAttempt(
        attempt=name,
        kind=kind,
        result=result,
        reason=changes.pop("reason", f"it was {result}"),
        denials=(denied,) if denied else (),
        attribution=Attribution(denial=denied if attributed else None, misses=()) if denied or attributed else None,
        **changes,
    )


def judged_arm(arm: Arm, *attempts: JudgedAttempt, **changes: Any) -> JudgedArm:
    """One arm and its attempts."""
    return JudgedArm(arm=arm, attempts=attempts, **changes)


def outcome(number: int = 0, **changes: Any) -> Outcome:
    """A small outcome with one arm and one attempt; `number` makes its id."""
    attempt = AttemptRecord(
        attempt="read-shadow",
        kind=AttemptKind.ATTACK,
        result=Result.BLOCKED,
        reason="HTTP 403",
        denials=(denial(),),
        attribution=Attribution(denial=denial(), misses=()),
        observation=observation(Arm.SELINUX_ENFORCING, avc(), syscall()),
    )
    base: dict[str, Any] = {
        "id": f"{number:012x}",
        "recorded": "2026-11-24T08:44:40+00:00",
        "scenario": "nginx-reads-shadow",
        "scenario_digest": "bd" * 32,
        "title": "nginx reads /etc/shadow",
        "technique": "T1003.008",
        "lab": "debian-13",
        "framework": Framework.SELINUX,
        "verdict": Verdict.CONTAINED,
        "expected": Verdict.CONTAINED,
        "because": "no rule",
        "reason": "DAC permits read-shadow; SELinux denies httpd_t { read } on shadow",
        "environment": Environment(
            lsmlab="0.1.0",
            image="86" * 32,
            kernel="6.12.117+deb13-cloud-amd64",
            packages={"nginx": "1.26.3-3+deb13u11"},
            qemu="QEMU emulator version 7.2.22",
            accelerator="tcg",
            memory_mib=768,
        ),
        "arms": (ArmRecord(arm=Arm.SELINUX_ENFORCING, attempts=(attempt,), seconds=13.8),),
    }
    return Outcome(**{**base, **changes})
