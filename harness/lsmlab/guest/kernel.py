"""What a run changes of a machine that is kept, besides files: booleans, profiles, audit rules, services.

Each is read, compared and put back. Runs there, beside the agent: see undo.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
from collections.abc import Callable
from typing import Any

from lsmlab.guest.agent import Refused, pids, text_of
from lsmlab.guest.files import Problems

SELINUX = "/sys/fs/selinux"
APPARMOR = "/sys/kernel/security/apparmor"
APPARMOR_AUDIT = "/sys/module/apparmor/parameters/audit"
PROGRAM_SECONDS = 180
STRAY_TASK_RULES = ("-a never,task", "-a task,never")
"""Fedora's default: no call of any process is audited."""

State = dict[str, Any]
Save = Callable[[bytes], str]
"""Keeps a content; the name by which `Load` finds it."""
Load = Callable[[str], bytes]


def program(*argv: str) -> str:
    """Run a program that has to succeed; what it printed. Raises Refused."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROGRAM_SECONDS, check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"{' '.join(argv)}: {getattr(error, 'strerror', None) or 'not done in time'}") from None
    if done.returncode != 0:
        words = (done.stderr or done.stdout).decode("utf-8", "backslashreplace").strip()
        raise Refused(f"{' '.join(argv)}: exit status {done.returncode}: {words[-500:]}")
    return done.stdout.decode("utf-8", "backslashreplace")


# SELinux


def selinux(*, policy: bool) -> State | None:
    """Mode and booleans, and where asked the digest of the loaded policy; None where the kernel has no SELinux."""
    if not os.path.exists(f"{SELINUX}/enforce"):
        return None
    folder = f"{SELINUX}/booleans"
    booleans = {name: text_of(f"{folder}/{name}").split(" ")[0] for name in sorted(os.listdir(folder))}
    state: State = {"enforce": text_of(f"{SELINUX}/enforce"), "booleans": booleans}
    if policy:
        made = hashlib.sha256()
        with open(f"{SELINUX}/policy", "rb", buffering=0) as source:
            while chunk := source.read(1 << 24):
                made.update(chunk)
        state["policy"] = made.hexdigest()
    return state


def put_selinux_back(was: State, now: State, problems: Problems) -> list[str]:
    """Have mode, booleans and policy be as they were."""
    done = []
    if "policy" in was and was["policy"] != now.get("policy") and was["booleans"] == now["booleans"]:
        with problems.going_on("the SELinux policy"):
            program("load_policy")
            done.append("the SELinux policy")
    wrong = [name for name, value in was["booleans"].items() if now["booleans"].get(name) not in {None, value}]
    for name in wrong:
        with problems.going_on(f"boolean {name}"):
            _write(f"{SELINUX}/booleans/{name}", was["booleans"][name].encode())
            done.append(f"boolean {name}")
    if wrong:
        with problems.going_on("the booleans"):
            _write(f"{SELINUX}/commit_pending_bools", b"1")
    if was["enforce"] != now["enforce"]:
        with problems.going_on("the mode of SELinux"):
            _write(f"{SELINUX}/enforce", was["enforce"].encode())
            done.append("the mode of SELinux")
    return done


# AppArmor


def apparmor(save: Save | None) -> State | None:
    """Every profile with its mode and digest, and how much AppArmor says; None where the kernel has no AppArmor.

    `save`: keep what each was loaded from as well, where the kernel gives it.
    """
    if not os.path.exists(f"{APPARMOR}/profiles"):
        return None
    profiles: dict[str, Any] = {}
    _profiles(f"{APPARMOR}/policy/profiles", "", profiles, save)
    return {"profiles": profiles, "audit": text_of(APPARMOR_AUDIT)}


def _profiles(folder: str, above: str, into: dict[str, Any], save: Save | None) -> None:
    for entry in sorted(os.listdir(folder)):
        here = f"{folder}/{entry}"
        try:
            name = text_of(f"{here}/name")
            full = f"{above}//{name}" if above and not name.startswith(f"{above}//") else name
            digest = next((text_of(f"{here}/{kind}") for kind in ("sha256", "sha1") if _there(f"{here}/{kind}")), "")
            blob = "" if save is None or above else _blob(here, save)
            into[full] = {"mode": text_of(f"{here}/mode"), "digest": digest, "parent": above, "blob": blob}
            if os.path.isdir(f"{here}/profiles"):
                _profiles(f"{here}/profiles", full, into, save)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ESTALE}:  # removed meanwhile
                raise


def _there(path: str) -> bool:
    return os.path.exists(path)


def _blob(folder: str, save: Save) -> str:
    try:
        with open(f"{folder}/raw_data", "rb") as source:
            return save(source.read())
    except OSError:
        return ""  # this kernel does not give it: see `put_apparmor_back`


def not_kept(state: State | None, names: list[str]) -> list[str]:
    """Those of the profiles `names` that are loaded and could not be put back, or not be seen to be."""
    loaded = state["profiles"] if state else {}
    return [
        full for full, profile in loaded.items()
        if (full if not profile["parent"] else full.partition("//")[0]) in names
        and not (profile["digest"] and (profile["blob"] or profile["parent"]))
    ]  # fmt: skip


def put_apparmor_back(was: State, now: State, load: Load, problems: Problems) -> list[str]:
    """Have the kernel hold the profiles that it held, each from the very content that it was loaded from."""
    done = []
    for name, profile in now["profiles"].items():
        if name not in was["profiles"] and not (profile["parent"] and profile["parent"] not in was["profiles"]):
            with problems.going_on(f"profile {name}"):
                _write(f"{APPARMOR}/.remove", name.encode())
                done.append(f"profile {name}")
    blobs: dict[str, str] = {}
    for name, profile in was["profiles"].items():
        there = now["profiles"].get(name)
        if there is not None and (there["mode"], there["digest"]) == (profile["mode"], profile["digest"]):
            continue
        top = name if not profile["parent"] else name.partition("//")[0]
        blob = was["profiles"].get(top, profile)["blob"]
        if blob:
            blobs[blob] = name
        else:
            problems.words.append(f"profile {name}: was changed, and this kernel does not give what it was loaded from")
    for blob, name in blobs.items():
        with problems.going_on(f"profile {name}"):
            _write(f"{APPARMOR}/.replace", load(blob))
            done.append(f"profile {name}")
    if was["audit"] != now["audit"]:
        with problems.going_on("AppArmor's audit parameter"):
            _write(APPARMOR_AUDIT, was["audit"].encode())
            done.append("AppArmor's audit parameter")
    return done


def differences(was: State, now: State) -> list[str]:
    """What the frameworks have otherwise than they had, in words."""
    words = []
    before, after = was["selinux"] or {}, now["selinux"] or {}
    words += [f"SELinux: another {key}" for key in ("enforce", "policy") if before.get(key) != after.get(key)]
    words += _others("boolean", before.get("booleans", {}), after.get("booleans", {}))
    before, after = was["apparmor"] or {}, now["apparmor"] or {}
    words += ["AppArmor: another audit parameter"] if before.get("audit") != after.get("audit") else []
    essence = (
        {name: (one["mode"], one["digest"]) for name, one in state.get("profiles", {}).items()}
        for state in (before, after)
    )
    return words + _others("profile", *essence)


def _others(what: str, before: State, after: State) -> list[str]:
    return [f"{what} {name}: another" for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)]  # fmt: skip


def users_of(profiles: list[str], units: list[str]) -> str:
    """A process outside `units` that one of `profiles` confines, in words; empty where there is none."""
    if not profiles:
        return ""
    own = {pid for unit in units for pid in pids(unit)}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        with contextlib.suppress(OSError):
            label = text_of(f"/proc/{pid}/attr/current").partition(" (")[0]
            if label in profiles and pid not in own:
                return f"process {pid} ({text_of(f'/proc/{pid}/comm')}) runs under {label}"
    return ""


# Auditing


def audit_rules() -> list[str]:
    """The rules of the kernel, as auditctl writes them."""
    lines = program("auditctl", "-l").split("\n")
    return [line.strip() for line in lines if line.strip() and line.strip() != "No rules"]


def audit_as_needed(rules: list[list[str]]) -> None:
    """Put `rules` before all others, so that theirs are the keys of the records, and take away what silences all."""
    for line in audit_rules():
        if line.startswith(STRAY_TASK_RULES):
            program("auditctl", "-d", *line.split()[1:])
    for rule in reversed(rules):
        try:
            program("auditctl", "-A", *rule)
        except Refused as error:
            if "Rule exists" not in str(error):
                raise


def put_audit_back(was: list[str], now: list[str], problems: Problems) -> list[str]:
    """Have the kernel hold the rules that it held, and no others."""
    more, fewer = _without(now, was), _without(was, now)
    for line in more:
        words = line.split()
        with problems.going_on(line):
            program("auditctl", *(["-W", *words[1:]] if words[0] == "-w" else ["-d", *words[1:]]))
    for line in fewer:
        with problems.going_on(line):
            program("auditctl", *line.split())
    return [f"{len(more) + len(fewer)} audit rules"] if more or fewer else []


def _without(these: list[str], others: list[str]) -> list[str]:
    left = list(others)
    found = []
    for line in these:
        if line in left:
            left.remove(line)
        else:
            found.append(line)
    return found


# Services

STOPPED_ALONG = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
"""Properties of a unit that name those that systemd stops with it, and does not start again."""


def stopped_along(names: list[str]) -> list[str]:
    """The active units besides `names` that a stop of one of these stops as well."""
    others: dict[str, None] = {}
    for name in names:
        shown = program("systemctl", "show", f"--property={','.join(STOPPED_ALONG)}", name)
        for line in shown.split("\n"):
            key, _, value = line.partition("=")
            if key in STOPPED_ALONG:
                others |= dict.fromkeys(value.split())
    found = [name for name in others if name not in names]
    return [name for name, state in units(found).items() if state["active"]]


def units(names: list[str]) -> dict[str, State]:
    """Whether each unit is active, and as which invocation."""
    found = {}
    for name in names:
        shown = program("systemctl", "show", "--property=LoadState,ActiveState,InvocationID", name)
        said = dict(line.partition("=")[::2] for line in shown.split("\n") if line)
        active = said.get("ActiveState", "") in {"active", "reloading", "activating"}
        found[name] = {"active": active, "invocation": said.get("InvocationID", "") if active else ""}
    return found


def stop_changed(was: dict[str, State], now: dict[str, State], problems: Problems) -> list[str]:
    """Stop each unit that runs and did not, or that was started anew; what was stopped."""
    done = []
    for name, state in was.items():
        if now[name]["active"] and now[name] != state:
            with problems.going_on(name):
                program("systemctl", "stop", name)
                done.append(name)
    return done


def start_again(was: dict[str, State], now: dict[str, State], problems: Problems) -> list[str]:
    """Start each unit that ran; what was started. `was` learns the new invocations."""
    done = []
    for name in was:
        if not now[name]["active"]:
            with contextlib.suppress(Refused):  # not failed: nothing to forget
                program("systemctl", "reset-failed", name)
    for name, state in was.items():
        if state["active"] and not now[name]["active"]:
            with problems.going_on(name):
                program("systemctl", "start", name)
                state.update(units([name])[name])
                done.append(name)
    return done


def _write(path: str, data: bytes) -> None:
    """In one call: the kernel's files take what is written at once, or not at all."""
    there = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if os.write(there, data) != len(data):
            raise Refused(f"{path}: was not taken whole")
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    finally:
        os.close(there)
