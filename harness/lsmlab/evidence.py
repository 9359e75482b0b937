"""The kernel's own records: reading the audit log, and what one denial says.

Record formats: https://github.com/linux-audit/audit-documentation/wiki and the kernel's security/selinux/avc.c and
security/apparmor/audit.c. Values that a process can choose are quoted, or hex-encoded when they hold a space, a quote
or a control character (kernel/audit.c, audit_string_contains_control).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from lsmlab.definition import Strict
from lsmlab.facts import domain_of
from lsmlab.terms import Framework

ENRICHMENT = "\x1d"
"""auditd separates its own translations of numbers (log_format=ENRICHED) from the kernel's fields by this byte."""

ENCODED_FIELDS = frozenset(
    {"name", "path", "comm", "exe", "cwd", "proctitle", "profile", "key", "target", "peer", "info"}
)
KERNEL_TYPES = frozenset({"AVC", *(f"APPARMOR_{w}" for w in ("DENIED", "ALLOWED", "KILL", "STATUS", "AUDIT", "ERROR"))})
"""Record types that AppArmor's messages come in; a process with CAP_AUDIT_WRITE can only write others (USER_*)."""
OBJECT_MANAGER_CLASSES = frozenset({"dbus", "service", "system", "passwd", "nscd"})
"""Classes that a program decides about, and not the kernel: D-Bus, systemd, passwd, databases (db_*), X (x_*)."""
MODE_CHANGES = frozenset({"MAC_STATUS", "MAC_POLICY_LOAD", "MAC_CONFIG_CHANGE"})
"""SELinux: enforcing switched, policy loaded, boolean changed."""
EVENT_RECORDS = 64
"""A denial keeps no more records of its event: the kernel writes a dozen, and thousands must not cost their square."""

# What these read, a guest wrote: none of them may take more than a time in proportion to the line.
_HEAD = re.compile(r"(?:node=\S+ )?type=(\S+) msg=audit\((\d+\.\d+):(\d+)\): ?(.*)", re.DOTALL)
_FIELD = re.compile(r"""(?<![\w-])([A-Za-z_][\w-]*)=("(?:[^"]*)"|'(?:[^']*)'|\S*)""")
_AVC = re.compile(r"avc:\s+(denied|granted)\s+\{([^{}]*)\} for\s+(.*)", re.DOTALL)
_FILE_MASK = re.compile(r"[rwaxmlkcd]+")
_HEX = re.compile(r"(?:[0-9A-F]{2})+")


class Record(Strict):
    """One line of the audit log. `fields` hold decoded values."""

    type: str
    stamp: str
    serial: int
    fields: dict[str, str]
    raw: str

    @property
    def event(self) -> tuple[str, int]:
        """Time stamp and serial: all records of one event share both."""
        return (self.stamp, self.serial)


class Denial(Strict):
    """One record of the kernel saying no, or saying that it would have said no.

    `effective`: the access was refused; an AVC with permissive=0, or AppArmor DENIED or KILLED, and no SYSCALL record
    of the same event that says success=yes (a denied capability that another rule then made unnecessary).
    """

    framework: Framework
    effective: bool
    logged_only: bool
    """permissive=1, or ALLOWED under complain."""
    event: tuple[str, int]
    pid: int | None
    ppid: int | None
    auid: int | None
    comm: str
    subject: str
    """Source context, or profile."""
    object: str
    """Target context, or empty under AppArmor."""
    tclass: str
    permissions: tuple[str, ...]
    name: str
    """Path or name of the object, as the record has it."""
    paths: tuple[tuple[str, int | None], ...]
    """(name, inode) of the PATH records of the same event."""
    dev: str
    ino: int | None
    operation: str
    syscall_success: bool | None
    """None: no SYSCALL record belongs to the event."""
    raw: tuple[str, ...]
    """The record and the others of its event, as the kernel and auditd wrote them."""

    @property
    def subject_domain(self) -> str:
        """The SELinux type or AppArmor profile that acted."""
        return domain_of(self.subject)

    @property
    def object_type(self) -> str:
        """The SELinux type acted upon; empty under AppArmor."""
        return domain_of(self.object) if self.object else ""

    @property
    def access(self) -> str:
        """What was denied, in the record's words: its permissions, or its operation where it names none."""
        return " ".join(self.permissions) or self.operation

    @property
    def headline(self) -> str:
        """The record itself, without auditd's translations."""
        return self.raw[0]


def parse_line(line: str) -> Record | None:
    """One line of /var/log/audit/audit.log, or None where it is no audit record. Never raises."""
    kernel_part = line.rstrip("\n").partition(ENRICHMENT)[0]
    match = _HEAD.match(kernel_part)
    if match is None:
        return None
    kind, stamp, serial, body = match.groups()
    return Record(type=kind, stamp=stamp, serial=int(serial[:18]), fields=_fields(body), raw=kernel_part)


def parse(text: str) -> tuple[Record, ...]:
    """All records of a piece of the audit log, in order; lines that are no records are passed over."""
    return tuple(r for r in (parse_line(line) for line in text.split("\n")) if r is not None)


def _fields(body: str) -> dict[str, str]:
    avc = _AVC.search(body)
    found: dict[str, str] = {}
    parts = (body,) if avc is None else (body[: avc.start()], avc[3])
    for key, value in (pair for part in parts for pair in _FIELD.findall(part)):
        # The first one counts: what a process chose stands behind what the kernel wrote.
        found.setdefault(key, _decode(key, value))
    for key in ("avc", "permissions"):  # ours: no field of a record is called so
        found.pop(key, None)
    if avc is not None:
        found.pop("msg", None)  # the beginning of the message that the rest was read from
        found |= {"avc": avc[1], "permissions": " ".join(avc[2].split())}
    return found


def _decode(key: str, value: str) -> str:
    if value[:1] in {'"', "'"}:
        return value[1:-1] if len(value) > 1 and value[-1] == value[0] else value[1:]
    if key in ENCODED_FIELDS and _HEX.fullmatch(value):
        return bytes.fromhex(value).decode("utf-8", "backslashreplace")
    return value


def number(value: str | None) -> int | None:
    """A decimal number of a record; None where there is none."""
    return int(value) if value is not None and re.fullmatch(r"-?\d{1,18}", value) else None


def denials(records: Iterable[Record]) -> tuple[Denial, ...]:
    """The denials among `records`, in order, each joined with the other records of its event."""
    events: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        events.setdefault(record.event, []).append(record)
    return tuple(d for event in events.values() for d in _denials_of(event))


def _denials_of(event: list[Record]) -> Iterator[Denial]:
    syscall = next((r for r in event if r.type == "SYSCALL"), None)
    found = (_denial(record, event[:EVENT_RECORDS], syscall) for record in event)
    yield from (d for d in found if d is not None)


def _denial(record: Record, event: list[Record], syscall: Record | None) -> Denial | None:
    fields = record.fields
    success = {"yes": True, "no": False}.get(syscall.fields.get("success", "")) if syscall else None
    if record.type == "USER_AVC" and not _from_object_manager(fields):
        return None
    if record.type in {"AVC", "USER_AVC"} and fields.get("avc") == "denied":
        framework, logged_only = Framework.SELINUX, fields.get("permissive") == "1"
        says_no = fields.get("permissive") == "0" or (record.type == "USER_AVC" and not logged_only)
        subject, target = fields.get("scontext", ""), fields.get("tcontext", "")
        permissions = tuple(fields["permissions"].split())
        tclass, operation = fields.get("tclass", ""), ""
    elif record.type in KERNEL_TYPES and fields.get("apparmor") in {"DENIED", "ALLOWED", "KILLED"}:
        framework, logged_only = Framework.APPARMOR, fields["apparmor"] == "ALLOWED"
        says_no = not logged_only
        subject, target = fields.get("profile", ""), ""
        permissions = tuple(_mask(fields))
        tclass, operation = fields.get("class", ""), fields.get("operation", "")
    else:
        return None
    others = tuple(r.raw for r in event if r is not record)
    named = syscall.fields if syscall else {}
    return Denial(
        framework=framework,
        effective=says_no and success is not True,
        logged_only=logged_only,
        event=record.event,
        # an object manager's own pid stands in pid=; the subject's, as D-Bus writes it, in spid=
        pid=number(fields.get("spid") if record.type == "USER_AVC" else fields.get("pid")),
        ppid=number(named.get("ppid")),
        auid=number(named.get("auid")),
        comm=fields.get("comm", ""),
        subject=subject,
        object=target,
        tclass=tclass,
        permissions=permissions,
        name=fields.get("path") or fields.get("name", ""),
        paths=tuple((r.fields.get("name", ""), number(r.fields.get("inode"))) for r in event if r.type == "PATH"),
        dev=fields.get("dev", ""),
        ino=number(fields.get("ino")),
        operation=operation,
        syscall_success=success,
        raw=(record.raw, *others),
    )


def _from_object_manager(fields: dict[str, str]) -> bool:
    """Whether a USER_AVC can be what it says: a process with CAP_AUDIT_WRITE may send one about itself, or about files.

    The sender's own number and context, `pid` and `subj`, are the kernel's; all else is the sender's words.
    """
    tclass = fields.get("tclass", "")
    known = tclass in OBJECT_MANAGER_CLASSES or tclass.startswith(("db_", "x_"))
    of_itself = fields.get("pid") == fields.get("spid") or _domain(fields, "subj") == _domain(fields, "scontext")
    return known and not of_itself


def _domain(fields: dict[str, str], key: str) -> str:
    return domain_of(fields.get(key, ""))


def _mask(fields: dict[str, str]) -> Iterable[str]:
    """AppArmor's denied permissions: file masks are letters, capabilities and others are words."""
    if fields.get("capname"):
        return [fields["capname"]]
    mask = fields.get("denied_mask", "")
    if fields.get("class") == "file" or (fields.get("class") is None and _FILE_MASK.fullmatch(mask)):
        return list(mask)
    return mask.split()


def mode_changes(records: Iterable[Record]) -> tuple[Record, ...]:
    """Records that say that a mode, policy, boolean or profile was changed."""
    return tuple(
        r
        for r in records
        if r.type in MODE_CHANGES
        or (r.type in KERNEL_TYPES and r.fields.get("apparmor") == "STATUS" and r.fields.get("error", "0") == "0")
    )


def audit_changes(records: Iterable[Record]) -> tuple[Record, ...]:
    """Records that say that auditing was switched, or its rules or limits changed."""
    return tuple(r for r in records if r.type == "CONFIG_CHANGE")


def refused_calls(records: Iterable[Record]) -> tuple[Record, ...]:
    """SYSCALL records of calls that failed with EACCES or EPERM, whoever refused them."""
    return tuple(r for r in records if r.type == "SYSCALL" and r.fields.get("exit") in {"-13", "-1"})
