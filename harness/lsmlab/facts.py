"""Raw facts read on a guest, as frozen records; and the reading of what the agent answers.

Nothing here judges. What cannot be read is None or an error, never a default.
"""

from __future__ import annotations

import json
import re
import stat
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from lsmlab.definition import Strict
from lsmlab.errors import ChannelError
from lsmlab.terms import SourceState

M = TypeVar("M", bound=Strict)

Number = Annotated[int, Field(ge=0, lt=1 << 63)]
"""A number of the kernel's: an id, a size, an inode."""
Mask = Annotated[int, Field(ge=0, lt=1 << 64)]
"""A set of bits."""


class Process(Strict):
    """One process of the subject's service, from /proc/PID. Capability sets are bit masks (capabilities(7))."""

    pid: Number
    ppid: Number
    name: str
    main: bool
    exe: str
    label: str
    """/proc/PID/attr/current: an SELinux context, an AppArmor profile with its mode, or empty without a framework."""
    uids: tuple[Number, Number, Number, Number]
    """Real, effective, saved, file system."""
    gids: tuple[Number, Number, Number, Number]
    groups: tuple[Number, ...]
    cap_permitted: Mask
    cap_effective: Mask
    cap_bounding: Mask
    no_new_privs: bool
    seccomp: Number
    initial_userns: bool

    @property
    def domain(self) -> str:
        """The SELinux type, or the AppArmor profile without its mode."""
        return domain_of(self.label)


class PathEntry(Strict):
    """One component on the way to an object: stat(2) and its ACL entries in numeric form."""

    path: str
    mode: Number
    """st_mode, with the file type."""
    uid: Number
    gid: Number
    user: str
    group: str
    dev: str
    """Device number, hexadecimal, as stat(1) prints it."""
    ino: Number
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
    apparmor_mode: str | None = None
    """What holds for all profiles, whatever their own modes: `enforce`, or another; None: no AppArmor."""


class AuditState(Strict):
    """`auditctl -s` and the log's identity and size in bytes."""

    enabled: Number
    daemon_pid: Number
    lost: Number
    backlog: Number
    log: str
    """Device and inode: a rotated log is another one."""
    size: Number


class ServiceState(Strict):
    """What systemd says of the subject's service."""

    active: str
    sub: str
    result: str
    main_pid: Number


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


def pids(answer: Any, unit: str) -> list[int]:
    """The agent's answer to `pids`: the processes of `unit`. Raises ChannelError where it is none."""
    if type(answer) is not list or not all(type(pid) is int and pid > 0 for pid in answer):
        raise ChannelError(f"the agent answered nonsense: {str(answer)[:200]} for the processes of {unit}")
    return answer


def read(model: type[M], answer: Any) -> M:
    """The agent's `answer` as a record. Raises ChannelError where it is nonsense: a guest is not trusted."""
    try:
        return model.model_validate_json(json.dumps(answer))
    except RecursionError:
        raise ChannelError("the agent answered nonsense: nested too deep") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])[:200]  # a key may be the guest's
        raise ChannelError(f"the agent answered nonsense: {where}: {fault['msg']}") from error
