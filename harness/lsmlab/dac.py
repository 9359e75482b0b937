"""Why Discretionary Access Control permits or forbids an access, told from facts read on a guest.

Pure. It restates what the kernel decides in fs/namei.c (acl_permission_check, generic_permission) and fs/posix_acl.c
(posix_acl_permission): https://elixir.bootlin.com/linux/v6.12/source/fs/namei.c. File systems with rules of their own
(/proc/sys), immutable files, sticky directories and the directories of symbolic links on the way are not looked at.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass

from lsmlab.definition import Strict
from lsmlab.errors import ChannelError
from lsmlab.facts import ObjectFacts, PathEntry, Process

BITS = {"read": 4, "write": 2, "execute": 1, "search": 1}
"""The accesses, and the bit of each class that grants them. The x bit is `search` on a directory, else `execute`."""

CAPABILITIES = {"CAP_DAC_READ_SEARCH": 1 << 2, "CAP_DAC_OVERRIDE": 1 << 1}
"""In the order in which generic_permission asks: the first may be logged as denied where the second grants."""

_ACL_ENTRY = re.compile(r"(user|group|mask|other):(\d*):([r-])([w-])([x-])")


class DacStep(Strict):
    """One permission that the access needs."""

    path: str
    needs: str
    """search, read, write or execute."""
    permitted: bool
    rule: str
    """Which rule decided, in words."""
    by_mount: bool = False
    """A read-only mount forbids it, whatever the permissions say."""


class DacExplanation(Strict):
    """Whether DAC permits an access, and by which rule."""

    permitted: bool
    rule: str
    """The deciding rule: the object's own where all is permitted, else that of the first step that forbids."""
    steps: tuple[DacStep, ...]
    """Search on each directory from / on, then the access to the object."""

    @property
    def dac_forbids(self) -> bool:
        """True where permissions forbid it; False where they permit it, or where it is only the mount."""
        refusing = [step for step in self.steps if not step.permitted]
        return not self.permitted and not (refusing and all(step.by_mount for step in refusing))


@dataclass(frozen=True, slots=True)
class _Decision:
    permitted: bool
    by: str
    because: str


@dataclass(frozen=True, slots=True)
class _AclEntry:
    tag: str
    number: int | None
    bits: int
    text: str


def explain(process: Process, target: ObjectFacts, access: str) -> DacExplanation:
    """Say whether DAC lets `process` do `access` (a key of BITS) to `target`, and why.

    Raises ValueError for an unknown access, ChannelError for facts that cannot be.
    """
    if access not in BITS:
        raise ValueError(f"unknown access {access!r}; expected one of: {', '.join(BITS)}")
    if not target.exists:
        rule = f"{target.path} is absent: there is nothing to {access}"
        return _joined((DacStep(path=target.path, needs=access, permitted=False, rule=rule),))
    if not target.chain:
        raise ChannelError(f"{target.path!r} exists, but no component of its path was read")
    *ancestors, entry = target.chain
    steps = [_search_step(process, directory) for directory in ancestors]
    return _joined((*steps, _object_step(process, entry, access, read_only=target.read_only)))


def _joined(steps: tuple[DacStep, ...]) -> DacExplanation:
    deciding = next((step for step in steps if not step.permitted), steps[-1])
    return DacExplanation(permitted=deciding.permitted, rule=deciding.rule, steps=steps)


def _search_step(process: Process, entry: PathEntry) -> DacStep:
    decision = _decide(process, entry, "search")
    word = "permitted" if decision.permitted else "forbidden"
    rule = f"search on {entry.path} ({_listing(entry)}) is {word}: {decision.because} ({decision.by})"
    return DacStep(path=entry.path, needs="search", permitted=decision.permitted, rule=rule)


def _object_step(process: Process, entry: PathEntry, access: str, *, read_only: bool) -> DacStep:
    needs = access
    if BITS[access] == 1:
        needs = "search" if stat.S_ISDIR(entry.mode) else "execute"
    decision = _decide(process, entry, needs)
    permitted = decision.permitted
    rule = f"{decision.by}: {entry.path} is {_listing(entry)}; {decision.because}"
    # Devices, pipes and sockets can be written on a read-only mount: nothing of theirs reaches the file system.
    by_mount = False
    if needs == "write" and read_only and stat.S_IFMT(entry.mode) in {stat.S_IFREG, stat.S_IFDIR}:
        who, alone = (
            ("not DAC, but the mount", "would permit it") if permitted else ("the mount and DAC", "forbids it too")
        )
        rule = f"{who}: {entry.path} is on a read-only mount, and nobody may write (EROFS); DAC {alone}: {rule}"
        permitted, by_mount = False, permitted
    return DacStep(path=entry.path, needs=needs, permitted=permitted, rule=rule, by_mount=by_mount)


def _decide(process: Process, entry: PathEntry, needs: str) -> _Decision:
    decision = _by_class(process, entry, needs)
    if not decision.permitted:
        return _by_capability(process, entry, needs, decision)
    if process.uids[3] == 0 or _held(process):
        return _Decision(True, decision.by, f"{decision.because}; no capability is used")
    return decision


def _by_class(process: Process, entry: PathEntry, needs: str) -> _Decision:
    """Owner, ACL, group or other: the first class that the process is in decides, and no later one is asked."""
    uid, bit = process.uids[3], BITS[needs]
    if uid == entry.uid:
        granted = bool(entry.mode >> 6 & bit)
        tail = "" if granted else ", whatever group and others may"
        because = f"uid {uid} is its owner, {_user(entry)}, and the owner {_may(granted, needs)}{tail}"
        return _Decision(granted, "owner bits", because)
    acl = _access_acl(entry)
    aside = ""
    if acl and not entry.mode & stat.S_IRWXG:
        # acl_permission_check asks for no ACL where the group bits, which then show the mask, are all clear.
        aside = " (the kernel passes over an ACL whose mask is empty)"
    elif acl:
        decision = _by_acl(process, entry, acl, needs)
        if decision is not None:
            return decision
        aside = ", and no ACL entry names it or a group of its own"
    if entry.gid in _groups(process):
        granted = bool(entry.mode >> 3 & bit)
        tail = "" if granted else ", whatever others may"
        because = f"uid {uid} is in {_group(entry)}{aside}, and the group {_may(granted, needs)}{tail}"
        return _Decision(granted, "group bits", because)
    granted = bool(entry.mode & bit)
    because = f"uid {uid} is not {_user(entry)} and not in {_group(entry)}{aside}, and others {_may(granted, needs)}"
    return _Decision(granted, "other bits", because)


def _by_acl(process: Process, entry: PathEntry, acl: tuple[_AclEntry, ...], needs: str) -> _Decision | None:
    """What the entries for named users and for groups say; None where none of them applies."""
    uid, bit = process.uids[3], BITS[needs]
    named = next((e for e in acl if e.tag == "user" and e.number == uid), None)
    if named is not None:
        return _masked(named, acl, needs, f"the entry names uid {uid}")
    groups = _groups(process)
    matching = [e for e in acl if e.tag == "group" and (entry.gid if e.number is None else e.number) in groups]
    if not matching:
        return None
    granting = next((e for e in matching if e.bits & bit), None)
    if granting is None:
        texts = ", ".join(e.text for e in matching)
        because = f"uid {uid} is in the groups of {texts}, and none of them grants {needs}, whatever others may"
        return _Decision(False, "ACL group entries", because)
    name = _group(entry) if granting.number is None else f"group {granting.number}"
    return _masked(granting, acl, needs, f"uid {uid} is in {name}")


def _masked(entry: _AclEntry, acl: tuple[_AclEntry, ...], needs: str, why: str) -> _Decision:
    mask = next((e for e in acl if e.tag == "mask"), None)
    by = f"ACL entry {entry.text}"
    if not entry.bits & BITS[needs]:
        return _Decision(False, by, f"{why} and does not grant {needs}, whatever groups and others may")
    if mask is not None and not mask.bits & BITS[needs]:
        return _Decision(False, by, f"{why}, but the mask, {mask.text}, withholds {needs}")
    return _Decision(True, by, f"{why}, and the entry grants {needs}")


def _by_capability(process: Process, entry: PathEntry, needs: str, refused: _Decision) -> _Decision:
    """What the effective capabilities make of a refusal."""
    held = _held(process)
    helping = next((name for name in _overriding(entry, needs) if name in held), None)
    uid = process.uids[3]
    if helping and process.initial_userns:
        return _Decision(True, f"capability {helping}", f"{refused.because}, but the process holds {helping}")
    if helping:
        note = f"; {helping} does not count, as the process is not in the initial user namespace"
    elif "CAP_DAC_OVERRIDE" in held:
        note = "; CAP_DAC_OVERRIDE does not help, as no execute bit is set"
    elif uid == 0:
        note = f"; uid 0 has no power of its own, and no effective capability of the process permits {needs}"
    else:
        note = ""
    return _Decision(False, refused.by, f"{refused.because}{note}")


def _overriding(entry: PathEntry, needs: str) -> tuple[str, ...]:
    """The capabilities that permit `needs` where the bits do not, in the order in which the kernel asks."""
    read_search = needs in {"read", "search"}
    override = needs != "execute" or bool(entry.mode & 0o111)
    return tuple(name for name, helps in zip(CAPABILITIES, (read_search, override), strict=True) if helps)


def _held(process: Process) -> tuple[str, ...]:
    return tuple(name for name, mask in CAPABILITIES.items() if process.cap_effective & mask)


def _access_acl(entry: PathEntry) -> tuple[_AclEntry, ...]:
    """The access ACL, or nothing where it says no more than the mode: `default:` entries only matter to new files."""
    acl = tuple(_acl_entry(entry, text) for text in entry.acl if not text.startswith("default:"))
    if not any(e.tag == "mask" or e.number is not None for e in acl):
        return ()
    if not any(e.tag == "group" and e.number is None for e in acl):
        raise ChannelError(f"the ACL of {entry.path!r} has no `group::` entry; found {', '.join(entry.acl)}")
    return acl


def _acl_entry(entry: PathEntry, text: str) -> _AclEntry:
    match = _ACL_ENTRY.fullmatch(text)
    if match is None:
        raise ChannelError(f"the ACL of {entry.path!r} has an entry {text!r}; expected such as `user:1000:r--`")
    bits = sum(value for letter, value in zip(match.groups()[2:], (4, 2, 1), strict=True) if letter != "-")
    return _AclEntry(tag=match[1], number=int(match[2]) if match[2] else None, bits=bits, text=text)


def _groups(process: Process) -> frozenset[int]:
    return frozenset((process.gids[3], *process.groups))


def _may(granted: bool, needs: str) -> str:
    return f"may {needs}" if granted else f"may not {needs}"


def _listing(entry: PathEntry) -> str:
    """As ls(1) shows it: mode, `+` for an ACL, owner and group."""
    return f"{entry.permissions}{'+' if _access_acl(entry) else ''} {entry.user}:{entry.group}"


def _user(entry: PathEntry) -> str:
    return entry.user if entry.user != "UNKNOWN" else f"uid {entry.uid}"


def _group(entry: PathEntry) -> str:
    return f"group {entry.group} ({entry.gid})"
