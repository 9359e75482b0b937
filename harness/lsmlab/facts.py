"""Raw facts read on a guest, as frozen records; and the reading of what the guest scripts print.

Nothing here judges. What cannot be read is None or an error, never a default.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator

from lsmlab.definition import Strict
from lsmlab.errors import ChannelError
from lsmlab.terms import SourceState


class Process(Strict):
    """One process of the subject's service, from /proc/PID. Capability sets are bit masks (capabilities(7))."""

    pid: int
    ppid: int
    name: str
    main: bool
    exe: str
    label: str
    """/proc/PID/attr/current: an SELinux context, an AppArmor profile with its mode, or empty without a framework."""
    uids: tuple[int, int, int, int]
    """Real, effective, saved, file system."""
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    cap_permitted: int
    cap_effective: int
    cap_bounding: int
    no_new_privs: bool
    seccomp: int
    initial_userns: bool

    @property
    def domain(self) -> str:
        """The SELinux type, or the AppArmor profile without its mode."""
        return domain_of(self.label)


class PathEntry(Strict):
    """One component on the way to an object: stat(2) and its ACL entries in numeric form."""

    path: str
    mode: int
    """st_mode, with the file type."""
    uid: int
    gid: int
    user: str
    group: str
    dev: str
    """Device number, hexadecimal, as stat(1) prints it."""
    ino: int
    acl: tuple[str, ...]
    """All entries where there are extended ones: `user::rw-`, `user:1000:r--`, `group::r--`, `mask::r--`, `other::---`;
    empty where the mode bits say it all."""

    @property
    def permissions(self) -> str:
        """As ls(1) prints them."""
        return stat.filemode(self.mode)


class ObjectFacts(Strict):
    """The object of a scenario, as found before an attempt."""

    path: str
    exists: bool
    real: str
    label: str
    """SELinux context; `?` where the kernel gives none."""
    read_only: bool
    device: str
    """The mounted device's name without /dev/, which is what an AVC calls `dev`."""
    chain: tuple[PathEntry, ...]
    """From / to the object itself."""

    @property
    def ino(self) -> int | None:
        """The object's inode number."""
        return self.chain[-1].ino if self.chain else None


class ModeFacts(Strict):
    """What the kernel says of its frameworks."""

    lsm: tuple[str, ...]
    selinux_enforcing: bool | None
    """None: no SELinux in this kernel."""
    profiles: dict[str, str] | None
    """AppArmor profiles and their modes; None: no AppArmor in this kernel."""


class AuditState(Strict):
    """`auditctl -s` and the log's identity and size in bytes."""

    enabled: int
    daemon_pid: int
    lost: int
    backlog: int
    log: str
    """Device and inode: a rotated log is another one."""
    size: int


class ServiceState(Strict):
    """What systemd says of the subject's service."""

    active: str
    sub: str
    result: str
    main_pid: int


class SourceReading(Strict):
    """How one source of evidence was read."""

    name: str
    state: SourceState
    detail: str


class SubjectFacts(Strict):
    """The service's processes at one moment."""

    service: ServiceState
    processes: tuple[Process, ...]

    @property
    def workers(self) -> tuple[Process, ...]:
        """The processes that do the work: all but the main one, or the main one where it is alone."""
        return tuple(p for p in self.processes if not p.main) or self.processes


def domain_of(label: str) -> str:
    """`system_u:system_r:httpd_t:s0` -> `httpd_t`; `nginx (enforce)` -> `nginx`; `unconfined` stays."""
    parts = label.split(":")
    if len(parts) >= 4 and parts[1].endswith("_r"):
        return parts[2]
    return re.sub(r" \((?:enforce|complain|kill|unconfined|mixed|user)\)$", "", label)


class Sections:
    """What a guest script printed, cut at the lines that carry its nonce."""

    def __init__(self, text: str, nonce: str) -> None:
        self._parts: dict[str, str] = {}
        pieces = re.split(rf"\n@@{re.escape(nonce)} (\S+)\n", text)
        for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
            self._parts[name] = body
        if "end" not in self._parts:
            raise ChannelError("the guest's answer was cut short", hint=f"Last section: {['none', *self._parts][-1]}.")

    def __getitem__(self, name: str) -> str:
        try:
            return self._parts[name]
        except KeyError:
            raise ChannelError(f"the guest's answer has no section {name!r}") from None

    def get(self, name: str) -> str | None:
        """The section, or None."""
        return self._parts.get(name)

    def words(self, name: str) -> dict[str, str]:
        """A section of `key value` lines."""
        return {key: value for key, _, value in (line.partition(" ") for line in self[name].split("\n")) if key}


def mode_facts(sections: Sections) -> ModeFacts:
    """The frameworks' state. Raises ChannelError on nonsense."""
    enforce = sections["enforce"].strip()
    if enforce not in {"", "0", "1"}:
        raise ChannelError(f"/sys/fs/selinux/enforce holds {enforce!r}; expected 0 or 1")
    lsm = tuple(sections["lsm"].strip().split(","))
    profiles: dict[str, str] | None = None
    if "apparmor" in lsm:
        profiles = {}
        for line in sections["profiles"].split("\n"):
            match = re.fullmatch(r"(.+) \((\w+)\)", line)
            if match:
                profiles[match[1]] = match[2]
    return ModeFacts(lsm=lsm, selinux_enforcing=enforce == "1" if enforce else None, profiles=profiles)


def audit_state(sections: Sections) -> AuditState:
    """The audit subsystem's state. Raises ChannelError where auditctl or the log could not be read."""
    fields = sections.words("auditctl")
    identity, _, size = sections["log"].strip().rpartition(" ")
    try:
        return AuditState(
            enabled=int(fields["enabled"]),
            daemon_pid=int(fields["pid"]),
            lost=int(fields["lost"]),
            backlog=int(fields["backlog"]),
            log=identity,
            size=int(size),
        )
    except (KeyError, ValueError) as error:
        found = (sections["auditctl"].strip() + " / " + sections["log"].strip())[:300]
        raise ChannelError(f"the audit subsystem's state cannot be read: {found}") from error


def subject_facts(sections: Sections) -> SubjectFacts:
    """The service and its processes. Raises ChannelError on nonsense."""
    properties = dict(line.split("=", 1) for line in sections["service"].split("\n") if "=" in line)
    root_userns = sections["rootns"].strip()
    try:
        service = ServiceState(
            active=properties["ActiveState"],
            sub=properties["SubState"],
            result=properties["Result"],
            main_pid=int(properties["MainPID"]),
        )
        processes = tuple(_process(record, root_userns) for record in _records(sections["processes"], "pid"))
    except (KeyError, ValueError, IndexError) as error:
        raise ChannelError(f"the subject's processes cannot be read: {error!r}") from error
    return SubjectFacts(service=service, processes=processes)


def _records(text: str, first: str) -> Iterator[dict[str, list[str]]]:
    record: dict[str, list[str]] = {}
    for line in text.split("\n"):
        key, tab, value = line.partition("\t")
        if not tab:
            continue
        if key == first and record:
            yield record
            record = {}
        record.setdefault(key, []).append(value)
    if record:
        yield record


def _process(record: dict[str, list[str]], root_userns: str) -> Process:
    status = {key: value.strip(" \t") for key, _, value in (s.partition(":") for s in record["status"])}
    uids, gids = ([int(n) for n in status[key].split()] for key in ("Uid", "Gid"))
    return Process(
        pid=int(record["pid"][0]),
        ppid=int(status["PPid"]),
        name=status["Name"],
        main="main" in record,
        exe=record["exe"][0],
        label=record["label"][0],
        uids=(uids[0], uids[1], uids[2], uids[3]),
        gids=(gids[0], gids[1], gids[2], gids[3]),
        groups=tuple(int(g) for g in status["Groups"].split()),
        cap_permitted=int(status["CapPrm"], 16),
        cap_effective=int(status["CapEff"], 16),
        cap_bounding=int(status["CapBnd"], 16),
        no_new_privs=status["NoNewPrivs"] == "1",
        seccomp=int(status["Seccomp"]),
        initial_userns=record["userns"][0] == root_userns,
    )


def object_facts(sections: Sections, path: str) -> ObjectFacts:
    """The object and every directory on the way. Raises ChannelError on nonsense."""
    lines = [line.split("\t", 1) for line in sections["object"].split("\n") if "\t" in line]
    values = {key: value for key, value in lines if key in {"missing", "real", "label", "mount"}}
    if "missing" in values:
        return ObjectFacts(path=path, exists=False, real="", label="?", read_only=False, device="", chain=())
    try:
        options, _, source = values["mount"].partition(" ")
        text = "\n".join("\t".join(line) for line in lines)
        acls = {_unescaped(r["aclfile"][0]): r.get("acl", []) for r in _records(text, "aclfile") if "aclfile" in r}
        chain = tuple(_path_entry(r, acls) for r in _records(text, "path") if "stat" in r)
        return ObjectFacts(
            path=path,
            exists=True,
            real=values["real"],
            label=values.get("label", "?"),
            read_only="ro" in options.split(","),
            device=source.strip().partition("[")[0].removeprefix("/dev/"),
            chain=chain,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ChannelError(f"the object's facts cannot be read: {error!r}") from error


def _unescaped(name: str) -> str:
    """getfacl writes control characters, spaces and backslashes in file names as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), name)


def _path_entry(record: dict[str, list[str]], acls: dict[str, list[str]]) -> PathEntry:
    mode, uid, gid, dev, ino, user, group = record["stat"][0].split(" ")
    entries = [a.split("#")[0].strip() for a in acls.get(record["path"][0], ())]
    return PathEntry(
        path=record["path"][0],
        mode=int(mode, 16),
        uid=int(uid),
        gid=int(gid),
        user=user,
        group=group,
        dev=dev,
        ino=int(ino),
        acl=tuple(e for e in entries if e and not e.startswith("default:")),
    )
