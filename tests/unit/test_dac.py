"""The explanation of DAC, against truth tables, two independent restatements of the kernel's rules, and invariants."""

from __future__ import annotations

import stat
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lsmlab.dac import CAPABILITIES, DacExplanation, explain
from lsmlab.errors import ChannelError
from lsmlab.facts import ObjectFacts, PathEntry, Process

USERS = {0: "root", 33: "www-data", 1000: "app"}
GROUPS = {0: "root", 33: "www-data", 42: "shadow", 1000: "app"}
OVERRIDE, READ_SEARCH, ALL_OTHERS = 1 << 1, 1 << 2, (1 << 41) - 1 & ~0b110
READ_ONLY = "/f is on a read-only mount, and nobody may write (EROFS)"
OWNER_OF_SHADOW = "/etc/shadow is -rw-r----- root:shadow; uid 0 is its owner, root, and the owner may read"
MEMBER_OF_SHADOW = "/etc/shadow is -rw-r----- root:shadow; uid 33 is in group shadow (42), and the group may read"
STRANGER = (
    "/etc/shadow is -rw-r----- root:shadow; uid 33 is not root and not in group shadow (42), and others may not read"
)


def process(uid: int = 33, *groups: int, gid: int = 33, caps: int = 0, initial: bool = True) -> Process:
    """A process that acts as `uid`; its other uids and gids are those of nobody, and must not matter."""
    return Process(
        pid=700,
        ppid=1,
        name="nginx",
        main=False,
        exe="/usr/sbin/nginx",
        label="",
        uids=(65534, 65534, 65534, uid),
        gids=(65534, 65534, 65534, gid),
        groups=groups,
        cap_permitted=(1 << 41) - 1,
        cap_effective=caps,
        cap_bounding=(1 << 41) - 1,
        no_new_privs=False,
        seccomp=0,
        initial_userns=initial,
    )


def entry(path: str, mode: int, uid: int = 0, gid: int = 0, acl: Sequence[str] = ()) -> PathEntry:
    """One component; a mode without a type is a regular file's."""
    return PathEntry(
        path=path,
        mode=mode if stat.S_IFMT(mode) else stat.S_IFREG | mode,
        uid=uid,
        gid=gid,
        user=USERS.get(uid, "UNKNOWN"),
        group=GROUPS.get(gid, "UNKNOWN"),
        dev="fe00",
        ino=12,
        acl=tuple(acl),
    )


def directory(path: str, mode: int = 0o755, uid: int = 0, gid: int = 0, acl: Sequence[str] = ()) -> PathEntry:
    """One component that is a directory."""
    return entry(path, stat.S_IFDIR | mode, uid, gid, acl)


def target(*chain: PathEntry, read_only: bool = False) -> ObjectFacts:
    """The object at the end of `chain`."""
    path = chain[-1].path
    return ObjectFacts(
        path=path, exists=True, real=path, label="?", read_only=read_only, device="vda", chain=tuple(chain)
    )


def shadow(*acl: str, mode: int = 0o640, read_only: bool = False) -> ObjectFacts:
    """/etc/shadow, root:shadow."""
    return target(directory("/"), directory("/etc"), entry("/etc/shadow", mode, 0, 42, acl), read_only=read_only)


def lone(mode: int, *acl: str, uid: int = 1000, gid: int = 42) -> ObjectFacts:
    """One file with nothing on the way to it."""
    return target(entry("/f", mode, uid, gid, acl))


def lone_directory(mode: int) -> ObjectFacts:
    """One directory with nothing on the way to it."""
    return target(directory("/d", mode, 1000, 42))


@pytest.mark.parametrize(
    ("who", "mode", "access", "permitted", "rule"),
    [
        (
            process(1000),
            0o400,
            "read",
            True,
            "owner bits: /f is -r-------- app:shadow; uid 1000 is its owner, app, and",
        ),
        (process(1000), 0o200, "write", True, "the owner may write"),
        (process(1000), 0o100, "execute", True, "the owner may execute"),
        (process(1000, 42), 0o077, "read", False, "the owner may not read, whatever group and others may"),
        (process(1000, 42), 0o577, "write", False, "the owner may not write"),
        (
            process(33, 42),
            0o040,
            "read",
            True,
            "group bits: /f is ----r----- app:shadow; uid 33 is in group shadow (42),",
        ),
        (process(33, gid=42), 0o020, "write", True, "uid 33 is in group shadow (42), and the group may write"),
        (process(33, 7, 42, 8), 0o010, "execute", True, "the group may execute"),
        (process(33, 42), 0o707, "read", False, "the group may not read, whatever others may"),
        (process(33), 0o004, "read", True, "other bits: /f is -------r-- app:shadow; uid 33 is not app and not in"),
        (process(33), 0o770, "read", False, "not in group shadow (42), and others may not read"),
        (process(33), 0o775, "write", False, "others may not write"),
        (process(33), 0o776, "execute", False, "others may not execute"),
    ],
)
def test_first_matching_class_decides(who: Process, mode: int, access: str, permitted: bool, rule: str) -> None:
    found = explain(who, lone(mode), access)
    assert (found.permitted, rule in found.rule) == (permitted, True), found.rule


@pytest.mark.parametrize(
    ("who", "permitted", "rule"),
    [
        (process(0), True, f"owner bits: {OWNER_OF_SHADOW}; no capability is used"),
        (process(0, caps=OVERRIDE), True, f"owner bits: {OWNER_OF_SHADOW}; no capability is used"),
        (process(33, 42), True, f"group bits: {MEMBER_OF_SHADOW}"),
        (process(33, 42, caps=READ_SEARCH), True, f"group bits: {MEMBER_OF_SHADOW}; no capability is used"),
        (process(33), False, f"other bits: {STRANGER}"),
        (process(33, caps=ALL_OTHERS), False, f"other bits: {STRANGER}"),
        (
            process(33, caps=READ_SEARCH),
            True,
            f"capability CAP_DAC_READ_SEARCH: {STRANGER}, but the process holds CAP_DAC_READ_SEARCH",
        ),
    ],
)
def test_whole_sentence_for_reading_shadow(who: Process, permitted: bool, rule: str) -> None:
    found = explain(who, shadow(), "read")
    assert (found.permitted, found.rule) == (permitted, rule)


@pytest.mark.parametrize(
    ("acl", "who", "access", "by", "says"),
    [
        ("user:33:r-- group::--- mask::r--", process(33), "read", "ACL entry user:33:r--", "and the entry grants read"),
        (
            "group::r-- group:7:--- mask::r--",
            process(33, 42, 7),
            "read",
            "ACL entry group::r--",
            "in group shadow (42)",
        ),
        (
            "group::--- group:7:r-- mask::r--",
            process(33, 42, 7),
            "read",
            "ACL entry group:7:r--",
            "uid 33 is in group 7",
        ),
        ("group::r-- mask::r--", process(33, 42), "read", "ACL entry group::r--", "and the entry grants read"),
        ("user:1000:r-- group::r-- mask::r--", process(1000), "write", "owner bits", "is its owner, app"),
        ("group::r--", process(33, 42), "read", "group bits", "-rw-r----- app:shadow"),
        (
            "user:33:--- group::r-- mask::r--",
            process(33, caps=OVERRIDE),
            "read",
            "capability CAP_DAC_OVERRIDE",
            "holds",
        ),
    ],
)
def test_acl_permits(acl: str, who: Process, access: str, by: str, says: str) -> None:
    found = explain(who, lone(0o640, "user::rw-", *acl.split(), "other::---"), access)
    assert found.permitted
    assert found.rule.startswith(f"{by}: /f is -rw-r-----")
    assert says in found.rule


@pytest.mark.parametrize(
    ("acl", "who", "access", "by", "says"),
    [
        (
            "user:33:rw- group::--- mask::r--",
            process(33),
            "write",
            "ACL entry user:33:rw-",
            "mask::r--, withholds write",
        ),
        (
            "user:33:--- group::r-- mask::r--",
            process(33, 42),
            "read",
            "ACL entry user:33:---",
            "and does not grant read",
        ),
        (
            "user:99:r-- group::--- mask::r--",
            process(33),
            "read",
            "other bits",
            "no ACL entry names it or a group of its",
        ),
        (
            "group::--- group:7:-wx mask::r--",
            process(33, 42, 7),
            "read",
            "ACL group entries",
            "group::---, group:7:-wx, and",
        ),
        (
            "group::--- group:7:r-- mask::r--",
            process(33, 42),
            "read",
            "ACL group entries",
            "the groups of group::---, and",
        ),
        (
            "group::rw- group:7:rw- mask::r--",
            process(33, gid=7),
            "write",
            "ACL entry group:7:rw-",
            "the mask, mask::r--",
        ),
        ("group::rwx group:7:rwx mask::r--", process(33), "read", "other bits", "-rw-r-----+ app:shadow"),
        ("group::--- mask::r--", process(33, 42), "read", "ACL group entries", "none of them grants read"),
        (
            "group::r-- default:user:33:rwx default:mask::rwx",
            process(33),
            "read",
            "other bits",
            "-rw-r----- app:shadow",
        ),
    ],
)
def test_acl_forbids(acl: str, who: Process, access: str, by: str, says: str) -> None:
    found = explain(who, lone(0o640, "user::rw-", *acl.split(), "other::---"), access)
    assert not found.permitted
    assert found.rule.startswith(f"{by}: /f is -rw-r-----")
    assert says in found.rule


def test_acl_group_entries_that_forbid_hide_what_others_may() -> None:
    acl = ("user::rw-", "group::r--", "group:7:---", "mask::r--", "other::r--")
    assert not explain(process(33, 7), lone(0o644, *acl), "read").permitted
    assert explain(process(33), lone(0o644, *acl), "read").permitted


def test_kernel_passes_over_an_acl_whose_mask_is_empty() -> None:
    acl = ("user::rw-", "user:33:---", "group::r--", "mask::---", "other::r--")
    named, grouped = (explain(who, lone(0o604, *acl), "read") for who in (process(33), process(7, 42)))
    assert named.permitted
    assert "the kernel passes over an ACL whose mask is empty" in named.rule
    assert not grouped.permitted
    assert grouped.rule.startswith("group bits")


@pytest.mark.parametrize(
    ("caps", "thing", "access", "permitted", "rule"),
    [
        (READ_SEARCH, lone(0o000), "read", True, "capability CAP_DAC_READ_SEARCH"),
        (READ_SEARCH, lone(0o000), "write", False, "other bits"),
        (READ_SEARCH, lone(0o700), "execute", False, "other bits"),
        (OVERRIDE, lone(0o000), "read", True, "capability CAP_DAC_OVERRIDE"),
        (OVERRIDE, lone(0o000), "write", True, "capability CAP_DAC_OVERRIDE"),
        (OVERRIDE, lone(0o666), "execute", False, "CAP_DAC_OVERRIDE does not help, as no execute bit is set"),
        (OVERRIDE, lone(0o100), "execute", True, "capability CAP_DAC_OVERRIDE"),
        (OVERRIDE, lone(0o010), "execute", True, "capability CAP_DAC_OVERRIDE"),
        (OVERRIDE | READ_SEARCH, lone(0o000), "read", True, "capability CAP_DAC_READ_SEARCH"),
        (OVERRIDE | READ_SEARCH, lone(0o000), "write", True, "capability CAP_DAC_OVERRIDE"),
        (READ_SEARCH, lone_directory(0o000), "read", True, "capability CAP_DAC_READ_SEARCH"),
        (READ_SEARCH, lone_directory(0o000), "search", True, "capability CAP_DAC_READ_SEARCH"),
        (READ_SEARCH, lone_directory(0o000), "write", False, "other bits"),
        (OVERRIDE, lone_directory(0o000), "read", True, "capability CAP_DAC_OVERRIDE"),
        (OVERRIDE, lone_directory(0o000), "search", True, "capability CAP_DAC_OVERRIDE"),
        (OVERRIDE, lone_directory(0o000), "write", True, "capability CAP_DAC_OVERRIDE"),
        (OVERRIDE | READ_SEARCH, lone_directory(0o000), "search", True, "capability CAP_DAC_READ_SEARCH"),
        (ALL_OTHERS, lone(0o770), "read", False, "other bits"),
        (OVERRIDE, lone(0o004), "read", True, "others may read; no capability is used"),
    ],
)
def test_capabilities(caps: int, thing: ObjectFacts, access: str, permitted: bool, rule: str) -> None:
    found = explain(process(33, caps=caps), thing, access)
    assert (found.permitted, rule in found.rule) == (permitted, True), found.rule


def test_uid_0_without_capabilities_has_no_power() -> None:
    found = explain(process(0, caps=ALL_OTHERS), lone(0o600), "read")
    assert not found.permitted
    assert "uid 0 has no power of its own, and no effective capability of the process permits read" in found.rule


def test_capabilities_count_in_the_initial_user_namespace_only() -> None:
    found = explain(process(0, caps=OVERRIDE | READ_SEARCH, initial=False), lone(0o600), "read")
    assert not found.permitted
    assert "CAP_DAC_READ_SEARCH does not count, as the process is not in the initial user namespace" in found.rule


def test_search_is_asked_of_every_ancestor() -> None:
    thing = target(
        directory("/"), directory("/root", 0o700), directory("/root/open", 0o777), entry("/root/open/f", 0o666)
    )
    found = explain(process(33), thing, "read")
    assert [(s.path, s.needs, s.permitted) for s in found.steps] == [
        ("/", "search", True),
        ("/root", "search", False),
        ("/root/open", "search", True),
        ("/root/open/f", "read", True),
    ]
    assert not found.permitted
    assert found.rule.startswith(
        "search on /root (drwx------ root:root) is forbidden: uid 33 is not root and not in group root (0), "
    )
    assert found.rule.endswith("and others may not search (other bits)")
    assert found.steps[0].rule.startswith("search on / (drwxr-xr-x root:root) is permitted: ")
    assert explain(process(33, caps=READ_SEARCH), thing, "read").permitted


@pytest.mark.parametrize(("access", "needs"), [("execute", "search"), ("search", "search"), ("read", "read")])
def test_x_on_a_directory_is_search(access: str, needs: str) -> None:
    assert explain(process(33), lone_directory(0o755), access).steps[-1].needs == needs


@pytest.mark.parametrize(
    ("mode", "access", "permitted", "rule"),
    [
        (0o666, "write", False, f"not DAC, but the mount: {READ_ONLY}; DAC would permit it: other bits:"),
        (0o600, "write", False, f"the mount and DAC: {READ_ONLY}; DAC forbids it too: other bits:"),
        (stat.S_IFDIR | 0o777, "write", False, "not DAC, but the mount: "),
        (stat.S_IFCHR | 0o666, "write", True, "other bits: "),
        (stat.S_IFIFO | 0o666, "write", True, "other bits: "),
        (stat.S_IFSOCK | 0o666, "write", True, "other bits: "),
        (0o666, "read", True, "other bits: "),
        (0o777, "execute", True, "other bits: "),
    ],
)
def test_read_only_mount(mode: int, access: str, permitted: bool, rule: str) -> None:
    found = explain(process(33), target(entry("/f", mode), read_only=True), access)
    assert (found.permitted, found.rule.startswith(rule)) == (permitted, True), found.rule


def test_no_capability_writes_on_a_read_only_mount() -> None:
    assert not explain(process(0, caps=OVERRIDE | READ_SEARCH), shadow(read_only=True), "write").permitted


def test_absent_object() -> None:
    gone = ObjectFacts(path="/gone", exists=False, real="", label="?", read_only=False, device="", chain=())
    found = explain(process(0, caps=OVERRIDE), gone, "read")
    assert (found.permitted, found.rule) == (False, "/gone is absent: there is nothing to read")
    assert [step.permitted for step in found.steps] == [False]


def test_owner_without_a_name() -> None:
    assert "uid 4321 is its owner, uid 4321" in explain(process(4321), lone(0o600, uid=4321), "read").rule


def test_unknown_access_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown access 'open'; expected one of: read, write, execute, search"):
        explain(process(), shadow(), "open")


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (shadow("user:bin:r--", "group::r--", "mask::r--"), r"'/etc/shadow' has an entry 'user:bin:r--'"),
        (shadow("user:33:r--", "mask::r--"), r"'/etc/shadow' has no `group::` entry"),
        (
            ObjectFacts(path="/f", exists=True, real="/f", label="?", read_only=False, device="", chain=()),
            r"'/f' exists",
        ),
    ],
)
def test_facts_that_cannot_be_are_errors(thing: ObjectFacts, message: str) -> None:
    with pytest.raises(ChannelError, match=message):
        explain(process(), thing, "read")


# --- properties -----------------------------------------------------------------------------------------------------

IDS = st.sampled_from([0, 33, 42, 1000])
ACCESSES = st.sampled_from(["read", "write", "execute"])
PROCESSES = st.builds(
    lambda uid, gid, groups, caps, initial: process(uid, *groups, gid=gid, caps=caps, initial=initial),
    IDS,
    IDS,
    st.frozensets(IDS, max_size=3),
    st.sampled_from([0, OVERRIDE, READ_SEARCH, OVERRIDE | READ_SEARCH, ALL_OTHERS]),
    st.booleans(),
)
MODES = st.integers(0, 0o777)
RWX = MODES.map(lambda mode: stat.filemode(mode)[1:4])


@st.composite
def access_acls(draw: st.DrawFn) -> tuple[int, tuple[str, ...]]:
    """A mode and an ACL that agree, as the kernel keeps them, in the kernel's order."""
    owner, group, mask, other = (draw(RWX) for _ in range(4))
    users, groups = (sorted(draw(st.frozensets(IDS, max_size=2))) for _ in range(2))
    bits = "".join("0" if letter == "-" else "1" for letter in owner + mask + other)
    named_users = [f"user:{n}:{draw(RWX)}" for n in users]
    named_groups = [f"group:{n}:{draw(RWX)}" for n in groups]
    acl = (f"user::{owner}", *named_users, f"group::{group}", *named_groups, f"mask::{mask}", f"other::{other}")
    return int(bits, 2), acl


@st.composite
def targets(draw: st.DrawFn, *, with_acl: bool = False) -> ObjectFacts:
    """A file or directory in up to three directories."""
    chain = []
    for depth in range(draw(st.integers(1, 4))):
        mode, acl = draw(access_acls()) if with_acl and draw(st.booleans()) else (draw(MODES), ())
        chain.append(directory("/" + "d/" * depth, mode, draw(IDS), draw(IDS), acl))
    if draw(st.booleans()):
        last = chain[-1]
        chain[-1] = last.model_copy(update={"mode": stat.S_IFREG | stat.S_IMODE(last.mode)})
    return target(*chain, read_only=draw(st.booleans()))


def letters_say_yes(who: Process, thing: PathEntry, letter: str) -> bool:
    """The rules once more, without ACLs, told by the letters of `ls -l`."""
    listing = stat.filemode(thing.mode)
    owner, group, other = listing[1:4], listing[4:7], listing[7:10]
    member = thing.gid == who.gids[3] or thing.gid in who.groups
    mine = owner if who.uids[3] == thing.uid else group if member else other
    override, read_search = (bool(who.cap_effective & bit) and who.initial_userns for bit in (OVERRIDE, READ_SEARCH))
    if letter in mine:
        return True
    if listing[0] == "d":
        return override or (read_search and letter != "w")
    if letter == "x":
        return override and "x" in listing
    return override or (read_search and letter == "r")


def walk_says_yes(who: Process, thing: PathEntry, letter: str) -> bool:
    """The rules once more, with an ACL, without capabilities: one walk down the entries, as the kernel does."""
    listing = stat.filemode(thing.mode)
    if who.uids[3] == thing.uid or not thing.acl or listing[4:7] == "---":
        return letters_say_yes(who, thing, letter)
    mask = next(text for text in thing.acl if text.startswith("mask::"))
    found = False
    for text in thing.acl:
        tag, number, grants = text.split(":")
        if tag == "user" and number == str(who.uids[3]):
            return letter in grants and letter in mask[6:]
        if tag == "group" and int(number or thing.gid) in {who.gids[3], *who.groups}:
            found = True
            if letter in grants:
                return letter in mask[6:]
        if tag == "other":
            return not found and letter in grants
    raise AssertionError(thing.acl)


def mount_says_yes(thing: ObjectFacts, access: str) -> bool:
    return not (thing.read_only and access == "write")


@given(PROCESSES, targets(), ACCESSES)
def test_agrees_with_a_restatement_without_acls(who: Process, thing: ObjectFacts, access: str) -> None:
    letter = {"read": "r", "write": "w", "execute": "x"}[access]
    *above, last = thing.chain
    expected = [letters_say_yes(who, part, "x") for part in above]
    expected.append(letters_say_yes(who, last, letter) and mount_says_yes(thing, access))
    assert [step.permitted for step in explain(who, thing, access).steps] == expected


@given(PROCESSES, targets(with_acl=True), ACCESSES)
def test_agrees_with_a_walk_down_the_acl(who: Process, thing: ObjectFacts, access: str) -> None:
    bare = who.model_copy(update={"cap_effective": 0})
    letter = {"read": "r", "write": "w", "execute": "x"}[access]
    *above, last = thing.chain
    expected = [walk_says_yes(bare, part, "x") for part in above]
    expected.append(walk_says_yes(bare, last, letter) and mount_says_yes(thing, access))
    assert [step.permitted for step in explain(bare, thing, access).steps] == expected


def deciding_rule(found: DacExplanation) -> str:
    return [*(step.rule for step in found.steps if not step.permitted), found.steps[-1].rule][0]


@given(PROCESSES, targets(with_acl=True), ACCESSES)
def test_the_whole_is_the_sum_of_its_steps(who: Process, thing: ObjectFacts, access: str) -> None:
    found = explain(who, thing, access)
    assert found.permitted == all(step.permitted for step in found.steps)
    assert [step.path for step in found.steps] == [part.path for part in thing.chain]
    assert found.rule == deciding_rule(found)
    assert all(step.needs == "search" for step in found.steps[:-1])


@given(PROCESSES, targets(with_acl=True))
def test_cap_dac_override_reads_all_and_writes_on_any_writable_mount(who: Process, thing: ObjectFacts) -> None:
    strong = who.model_copy(update={"cap_effective": OVERRIDE, "initial_userns": True})
    assert explain(strong, thing, "read").permitted
    assert explain(strong, thing, "write").permitted == (not thing.read_only)


@given(PROCESSES, targets(with_acl=True), ACCESSES, st.sampled_from(sorted(CAPABILITIES.values())))
def test_a_capability_never_forbids(who: Process, thing: ObjectFacts, access: str, capability: int) -> None:
    more = who.model_copy(update={"cap_effective": who.cap_effective | capability})
    assert explain(more, thing, access).permitted >= explain(who, thing, access).permitted


@given(PROCESSES, targets(), ACCESSES)
def test_losing_a_group_grants_only_where_group_bits_are_stricter_than_other(
    who: Process, thing: ObjectFacts, access: str
) -> None:
    assume(who.groups)
    lost = who.groups[0]
    fewer = who.model_copy(update={"groups": who.groups[1:]})
    if explain(fewer, thing, access).permitted and not explain(who, thing, access).permitted:
        assert any(part.gid == lost and part.mode & 7 & ~(part.mode >> 3) for part in thing.chain)


@given(PROCESSES, targets(), ACCESSES)
def test_uid_0_is_a_number_like_any_other(who: Process, thing: ObjectFacts, access: str) -> None:
    other = who.model_copy(update={"uids": tuple(uid or 77 for uid in who.uids)})
    chain = tuple(part.model_copy(update={"uid": part.uid or 77}) for part in thing.chain)
    renamed = thing.model_copy(update={"chain": chain})
    assert explain(other, renamed, access).permitted == explain(who, thing, access).permitted
