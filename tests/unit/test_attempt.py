"""What the guest's scripts print, and the audit log's window: read exactly, or told to be unreadable, never guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from builders import HTTPD, avc, http_attempt, process, run_attempt, sample, subject, syscall
from hypothesis import given
from hypothesis import strategies as st

from lsmlab import attempt, evidence, facts
from lsmlab.attempt import capability_list, curl_command, read_window
from lsmlab.channel.base import CommandResult
from lsmlab.errors import ChannelError, CommandTimeoutError
from lsmlab.facts import AuditState, ModeFacts, Sections, domain_of
from lsmlab.terms import SourceState

NONCE = "0123456789abcdef"
SENTINEL = "lsmlab-66e129c970dae5cb"
OPENED = AuditState(enabled=1, daemon_pid=344, lost=0, backlog=0, log="65024:1183", size=85220)
AUDITCTL = """\
enabled 1
failure 1
pid 344
rate_limit 0
backlog_limit 16384
lost 0
backlog 0
backlog_wait_time 60000
backlog_wait_time_actual 0
loginuid_immutable 0 unlocked
"""
SERVICE = "Result=success\nMainPID=481\nActiveState=active\nSubState=running\n"
STATUS = """\
status\tName:\tnginx
status\tPPid:\t{ppid}
status\tUid:\t{uid}\t{uid}\t{uid}\t{uid}
status\tGid:\t{uid}\t{uid}\t{uid}\t{uid}
status\tGroups:\t{groups}
status\tCapInh:\t0000000000000000
status\tCapPrm:\t{caps}
status\tCapEff:\t{caps}
status\tCapBnd:\t000001ffffffffff
status\tCapAmb:\t0000000000000000
status\tNoNewPrivs:\t0
status\tSeccomp:\t0
"""
MASTER = (
    f"pid\t481\nmain\t1\nexe\t/usr/sbin/nginx\nuserns\tuser:[4026531837]\nlabel\t{HTTPD}\n"
    + STATUS.format(ppid=1, uid=0, groups=" ", caps="000001ffffffffff")
)  # fmt: skip
WORKER = f"pid\t482\nexe\t/usr/sbin/nginx\nuserns\tuser:[4026531837]\nlabel\t{HTTPD}\n" + STATUS.format(
    ppid=481, uid=33, groups="33 42 ", caps="0000000000000000"
)
OBJECT = """\
real\t/etc/shadow
mount\trw,relatime /dev/vda
label\tsystem_u:object_r:shadow_t:s0
path\t/
stat\t41ed 0 0 fe00 2 root root
path\t/etc
stat\t41ed 0 0 fe00 17 root root
path\t/etc/shadow
stat\t81a0 0 42 fe00 589 root shadow
"""
SELINUX_LSM = "lockdown,capability,landlock,yama,selinux,bpf,ipe,ima,evm"
WINDOW = f"{avc()}\n{syscall()}"
USER = (
    "type=USER msg=audit(1795509853.196:149): pid=519 uid=0 auid=4294967295 ses=4294967295"
    " subj=system_u:system_r:auditctl_t:s0 msg='text={sentinel} exe=\"/usr/sbin/auditctl\" hostname=? res=success'"
    '\x1dUID="root" AUID="unset"\n'
)


def printed(nonce: str, **parts: str | None) -> str:
    """What a guest script prints: facts.sh's say() and a body for each part; a part of None is left out."""
    whole: dict[str, str | None] = {
        "rest": "steady\n",
        "drained": "seen\n",
        "service": SERVICE,
        "processes": MASTER + WORKER,
        "rootns": "user:[4026531837]\n",
        "object": OBJECT,
        "lsm": SELINUX_LSM + "\n",
        "enforce": "1\n",
        "profiles": "",
        "auditctl": AUDITCTL,
        "log": "65024:1183 85220\n",
        **parts,
        "end": parts.get("end", ""),
    }
    return "".join(f"\n@@{nonce} {name}\n{body}" for name, body in whole.items() if body is not None)


def sections(**parts: str | None) -> Sections:
    return Sections(printed(NONCE, **parts), NONCE)


def closing(window: str | None = None, **parts: str | None) -> Sections:
    """What window-close prints: the window of an attempt, ended by the sentinel's record."""
    text = WINDOW + "\n" + USER.format(sentinel=SENTINEL) if window is None else window
    base: dict[str, str | None] = {
        "sentinel": "sent\nseen\n",
        "window": text,
        "log": f"65024:1183 {85220 + len(text)}\n",
    }
    return sections(**{**base, **parts})


# Sections


def test_sections_are_cut_at_the_nonces_lines() -> None:
    found = Sections("noise\n\n@@n one\na\nb\n\n@@n two\n\n@@n three\nno end of line\n@@n end\n", "n")
    assert (found["one"], found["two"], found["three"]) == ("a\nb\n", "", "no end of line")
    assert found.get("four") is None
    with pytest.raises(ChannelError, match="the guest's answer has no section 'four'"):
        found["four"]


def test_words_are_lines_of_a_key_and_a_value() -> None:
    assert sections().words("auditctl")["loginuid_immutable"] == "0 unlocked"
    assert sections(auditctl="a\n\n b\nc d e\n").words("auditctl") == {"a": "", "c": "d e"}


def test_an_answer_that_was_cut_short_is_told() -> None:
    text = printed(NONCE)
    for end in range(0, len(text) - len("\n"), 7):
        with pytest.raises(ChannelError, match="the guest's answer was cut short"):
            Sections(text[:end], NONCE)
    with pytest.raises(ChannelError, match="Last section: none"):
        Sections("", NONCE)


def test_a_cut_answer_names_its_last_section() -> None:
    with pytest.raises(ChannelError, match="Last section: log"):
        Sections(printed(NONCE, end=None), NONCE)


@pytest.mark.parametrize(
    "forged",
    [
        "\n@@fedcba9876543210 enforce\n0\n",
        "\n@@ enforce\n0\n",
        "\n@@.* enforce\n0\n",
        f" @@{NONCE} enforce\n0\n",
        f"@@{NONCE} enforce 0\n",
        f"\n@@{NONCE.upper()} enforce\n0\n",
    ],
)
def test_lines_without_the_nonce_begin_no_section(forged: str) -> None:
    found = sections(window=forged)
    assert found["window"] == forged
    assert facts.mode_facts(found).selinux_enforcing is True


def test_the_nonce_is_no_pattern() -> None:
    assert Sections("\n@@x one\n1\n@@. two\n2\n@@. end\n", ".").get("one") is None


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_without_the_nonce_comes_back(first: str, second: str) -> None:
    found = Sections(f"\n@@{NONCE} a\n{first}\n@@{NONCE} b\n{second}\n@@{NONCE} end\n", NONCE)
    assert (found["a"], found["b"]) == (first, second)


# Facts


def test_mode_facts() -> None:
    assert facts.mode_facts(sections()) == ModeFacts(
        lsm=tuple(SELINUX_LSM.split(",")), selinux_enforcing=True, profiles=None
    )
    assert facts.mode_facts(sections(enforce="0")).selinux_enforcing is False
    assert facts.mode_facts(sections(enforce="\n")).selinux_enforcing is None


def test_mode_facts_of_apparmor() -> None:
    text = "nginx (enforce)\n/usr/sbin/man (complain)\nmy web server (kill)\nnginx//child (unconfined)\nnonsense\n"
    found = facts.mode_facts(sections(lsm="capability,apparmor\n", enforce="\n", profiles=text))
    assert found == ModeFacts(
        lsm=("capability", "apparmor"),
        selinux_enforcing=None,
        profiles={
            "nginx": "enforce", "/usr/sbin/man": "complain", "my web server": "kill", "nginx//child": "unconfined",
        },
    )  # fmt: skip
    assert facts.mode_facts(sections(lsm="apparmor", enforce="")).profiles == {}
    assert facts.mode_facts(sections(lsm="capability", enforce="", profiles=text)).profiles is None


@pytest.mark.parametrize("enforce", ["2", "yes", "1 1", "cat: Permission denied"])
def test_nonsense_of_a_mode_is_told(enforce: str) -> None:
    with pytest.raises(ChannelError, match=r"/sys/fs/selinux/enforce holds .*; expected 0 or 1"):
        facts.mode_facts(sections(enforce=enforce))


def test_audit_state() -> None:
    assert facts.audit_state(sections()) == OPENED
    assert facts.audit_state(sections(auditctl=AUDITCTL.replace("lost 0", "lost 7"))).lost == 7


@pytest.mark.parametrize(
    "parts",
    [
        {"auditctl": "auditctl: not found\n"},
        {"auditctl": ""},
        {"auditctl": AUDITCTL.replace("lost 0\n", "")},
        {"auditctl": AUDITCTL.replace("lost 0", "lost many")},
        {"log": "stat: cannot statx '/var/log/audit/audit.log': No such file or directory\n"},
        {"log": ""},
    ],
)
def test_an_audit_state_that_cannot_be_read_is_told(parts: dict[str, str]) -> None:
    with pytest.raises(ChannelError, match="the audit subsystem's state cannot be read: "):
        facts.audit_state(sections(**parts))


def test_subject_facts() -> None:
    assert facts.subject_facts(sections()) == subject(process(481, main=True), process(482))
    found = facts.subject_facts(sections())
    assert [p.pid for p in found.workers] == [482]
    assert [p.domain for p in found.processes] == ["httpd_t", "httpd_t"]


def test_a_service_that_is_down_has_no_processes() -> None:
    text = "Result=exit-code\nMainPID=0\nActiveState=failed\nSubState=failed\n"
    found = facts.subject_facts(sections(service=text, processes=""))
    assert (found.service.active, found.service.result, found.service.main_pid) == ("failed", "exit-code", 0)
    assert found.processes == found.workers == ()


def test_a_main_process_alone_is_its_worker() -> None:
    assert [p.pid for p in facts.subject_facts(sections(processes=MASTER)).workers] == [481]


def test_other_facts_of_a_process() -> None:
    text = (
        WORKER.replace(HTTPD, "nginx (enforce)")
        .replace("NoNewPrivs:\t0", "NoNewPrivs:\t1")
        .replace("Seccomp:\t0", "Seccomp:\t2")
        .replace("user:[4026531837]", "user:[4026532222]")
        .replace("Name:\tnginx", "Name:\ta: b (c)\\n")
        .replace("Uid:\t33\t33\t33\t33", "Uid:\t1\t2\t3\t4")
        .replace("CapEff:\t0000000000000000", "CapEff:\t0000000000000400")
    )
    (found,) = facts.subject_facts(sections(processes=text)).processes
    assert (found.label, found.domain, found.main) == ("nginx (enforce)", "nginx", False)
    assert (found.no_new_privs, found.seccomp, found.initial_userns) == (True, 2, False)
    assert (found.name, found.uids, found.gids, found.groups) == ("a: b (c)\\n", (1, 2, 3, 4), (33,) * 4, (33, 42))
    assert (found.cap_permitted, found.cap_effective, found.cap_bounding) == (0, 1 << 10, (1 << 41) - 1)


def test_without_a_framework_the_label_is_empty() -> None:
    (found,) = facts.subject_facts(sections(processes=WORKER.replace(HTTPD, ""))).processes
    assert (found.label, found.domain) == ("", "")


@pytest.mark.parametrize(
    "parts",
    [
        {"service": ""},
        {"service": SERVICE.replace("MainPID=481\n", "")},
        {"service": SERVICE.replace("481", "")},
        {"processes": "pid\t481\n"},
        {"processes": WORKER.replace("pid\t482", "pid\tself")},
        {"processes": WORKER.replace("status\tUid:\t33\t33\t33\t33\n", "")},
        {"processes": WORKER.replace("Uid:\t33\t33\t33\t33", "Uid:\t33")},
        {"processes": WORKER.replace("CapEff:\t0000000000000000", "CapEff:\t")},
    ],
)
def test_nonsense_of_a_subject_is_told(parts: dict[str, str]) -> None:
    with pytest.raises(ChannelError, match="the subject's processes cannot be read: "):
        facts.subject_facts(sections(**parts))


@pytest.mark.parametrize("name", ["a\vmain\t1", "\x1epid\t7", "x\u2028label\tq", "a\x85exe\tb"])
def test_a_process_cannot_forge_facts_by_its_name(name: str) -> None:
    text = MASTER + WORKER.replace("Name:\tnginx", f"Name:\t{name}")
    found = facts.subject_facts(sections(processes=text))
    assert [(p.pid, p.main) for p in found.processes] == [(481, True), (482, False)]
    assert found.processes[1].name == name


@pytest.mark.parametrize(
    ("label", "domain"),
    [
        ("system_u:system_r:httpd_t:s0", "httpd_t"),
        ("system_u:object_r:shadow_t:s0-s0:c0.c1023", "shadow_t"),
        ("nginx (enforce)", "nginx"),
        ("nginx (complain)", "nginx"),
        ("nginx//null-/bin/sh (complain)", "nginx//null-/bin/sh"),
        ("my (web) server (kill)", "my (web) server"),
        ("nginx (other)", "nginx (other)"),
        ("unconfined", "unconfined"),
        (":a:b:nginx (mixed)", ":a:b:nginx"),
        ("", ""),
    ],
)
def test_domain_of(label: str, domain: str) -> None:
    assert domain_of(label) == domain


def test_object_facts() -> None:
    found = facts.object_facts(sections(), "/etc/../etc/shadow")
    assert (found.path, found.real, found.exists, found.ino) == ("/etc/../etc/shadow", "/etc/shadow", True, 589)
    assert (found.label, found.device, found.read_only) == ("system_u:object_r:shadow_t:s0", "vda", False)
    assert [(e.path, e.permissions, e.acl) for e in found.chain] == [
        ("/", "drwxr-xr-x", ()),
        ("/etc", "drwxr-xr-x", ()),
        ("/etc/shadow", "-rw-r-----", ()),
    ]
    last = found.chain[-1]
    assert (last.uid, last.gid, last.user, last.group, last.dev, last.ino) == (0, 42, "root", "shadow", "fe00", 589)


def test_an_absent_object() -> None:
    found = facts.object_facts(sections(object="missing\trealpath: /x: No such file or directory\n"), "/x")
    assert (found.path, found.exists, found.chain, found.ino) == ("/x", False, (), None)


def test_an_object_without_a_label() -> None:
    text = OBJECT.replace("label\tsystem_u:object_r:shadow_t:s0\n", "")
    assert facts.object_facts(sections(object=text), "/etc/shadow").label == "?"


@pytest.mark.parametrize(
    ("mount", "read_only", "device"),
    [
        ("rw,relatime /dev/vda", False, "vda"),
        ("ro,nosuid /dev/vda1", True, "vda1"),
        ("rw,errors=remount-ro /dev/vda", False, "vda"),
        ("rw,nosuid tmpfs", False, "tmpfs"),
    ],
)
def test_the_mount_of_an_object(mount: str, read_only: bool, device: str) -> None:
    text = OBJECT.replace("rw,relatime /dev/vda", mount)
    found = facts.object_facts(sections(object=text), "/etc/shadow")
    assert (found.read_only, found.device) == (read_only, device)


def test_the_device_of_a_bind_mount_or_subvolume() -> None:
    text = OBJECT.replace("/dev/vda", "/dev/vda[/root]")
    assert facts.object_facts(sections(object=text), "/etc/shadow").device == "vda"


def test_access_control_lists_go_to_their_files() -> None:
    acl = (
        "aclfile\t/etc\nacl\tuser::rwx\nacl\tgroup::r-x\nacl\tother::r-x\nacl\tdefault:user::rwx\n"
        "aclfile\t/etc/shadow\nacl\tuser::rw-\nacl\tuser:1000:rw-\t\t\t#effective:r--\nacl\tgroup::r--\n"
        "acl\tmask::r--\nacl\tother::---\n"
    )
    found = facts.object_facts(sections(object=OBJECT + acl), "/etc/shadow")
    assert [e.acl for e in found.chain] == [
        (),
        ("user::rwx", "group::r-x", "other::r-x"),
        ("user::rw-", "user:1000:rw-", "group::r--", "mask::r--", "other::---"),
    ]


def test_access_control_lists_of_files_with_odd_names() -> None:
    text = OBJECT.replace("/etc/shadow", "/etc/a b\\c") + "aclfile\t/etc/a\\040b\\134c\nacl\tmask::r--\n"
    assert facts.object_facts(sections(object=text), "/x").chain[-1].acl == ("mask::r--",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        OBJECT.replace("mount\trw,relatime /dev/vda\n", ""),
        OBJECT.replace("real\t/etc/shadow\n", ""),
        OBJECT.replace("81a0 0 42", "81a0 0"),
        OBJECT.replace("81a0", "zz"),
        OBJECT.replace("589", "?"),
    ],
)
def test_nonsense_of_an_object_is_told(text: str) -> None:
    with pytest.raises(ChannelError, match="the object's facts cannot be read: "):
        facts.object_facts(sections(object=text), "/etc/shadow")


@pytest.mark.parametrize("name", ["lsm", "enforce", "auditctl", "log", "service", "processes", "rootns", "object"])
def test_a_section_that_is_missing_is_told(name: str) -> None:
    found = sections(**{name: None})
    with pytest.raises(ChannelError, match=f"the guest's answer has no section '{name}'"):
        (
            facts.mode_facts(found),
            facts.audit_state(found),
            facts.subject_facts(found),
            facts.object_facts(found, "/etc/shadow"),
        )


# The window


def test_the_window_ends_before_the_sentinels_record() -> None:
    reading, log = read_window(closing(), OPENED, SENTINEL)
    assert (reading.name, reading.state, reading.detail) == ("audit log", SourceState.FETCHED, "2 records, none lost")
    assert log == WINDOW
    assert [r.type for r in evidence.parse(log)] == ["AVC", "SYSCALL"]


def test_records_after_the_sentinel_are_not_in_the_window() -> None:
    text = WINDOW + "\n" + USER.format(sentinel=SENTINEL) + avc(serial=999) + "\n"
    assert read_window(closing(text), OPENED, SENTINEL)[1] == WINDOW


def test_a_window_without_records_is_empty_not_unavailable() -> None:
    reading, log = read_window(closing(USER.format(sentinel=SENTINEL)), OPENED, SENTINEL)
    assert (reading.state, reading.detail, log) == (SourceState.EMPTY, "0 records, none lost", "")


def test_the_captured_window_is_read() -> None:
    text = sample("selinux-enforcing.log")
    reading, log = read_window(closing(text), OPENED, "END-x")
    assert reading.state is SourceState.FETCHED
    assert reading.detail == "10 records, none lost"
    assert log == text[: text.rindex("\ntype=USER ")]


@pytest.mark.parametrize(
    ("opened", "parts", "detail"),
    [
        ({"enabled": 0}, {}, "auditing is off (auditctl: enabled 0)"),
        ({}, {"auditctl": AUDITCTL.replace("enabled 1", "enabled 0")}, "auditing is off (auditctl: enabled 0)"),
        ({}, {"auditctl": AUDITCTL.replace("pid 344", "pid 0")}, "auditd stopped or changed: pid 344 before, 0 after"),
        ({}, {"auditctl": AUDITCTL.replace("pid 344", "pid 7")}, "auditd stopped or changed: pid 344 before, 7 after"),
        (
            {"daemon_pid": 0},
            {"auditctl": AUDITCTL.replace("pid 344", "pid 0")},
            "auditd stopped or changed: pid 0 before, 0 after",
        ),
        ({}, {"log": "65024:1184 99999\n"}, "the log was rotated inside the window"),
        ({}, {"log": "65024:1183 85219\n"}, "the log was truncated inside the window"),
        ({}, {"auditctl": AUDITCTL.replace("lost 0", "lost 3")}, "3 records were lost by the kernel"),
        ({"lost": 2}, {"auditctl": AUDITCTL.replace("lost 0", "lost 3")}, "1 records were lost by the kernel"),
        (
            {},
            {"window": WINDOW + "\n", "sentinel": "sent\n"},
            "the sentinel did not come through the audit queue: sent",
        ),
        (
            {},
            {"window": "", "sentinel": "Error sending user message\n"},
            "the sentinel did not come through the audit queue: Error sending user message",
        ),
        ({}, {"window": "tail: cannot open\n"}, "the sentinel did not come through the audit queue: sent\nseen"),
    ],
)
def test_a_window_that_cannot_be_trusted_is_unavailable(
    opened: dict[str, int], parts: dict[str, str], detail: str
) -> None:
    reading, _ = read_window(closing(**parts), OPENED.model_copy(update=opened), SENTINEL)
    assert (reading.state, reading.detail) == (SourceState.UNAVAILABLE, detail)


def test_a_locked_audit_configuration_is_on() -> None:
    locked = AUDITCTL.replace("enabled 1", "enabled 2")
    reading, _ = read_window(closing(auditctl=locked), OPENED.model_copy(update={"enabled": 2}), SENTINEL)
    assert reading.state is SourceState.FETCHED


def test_records_lost_before_the_window_do_not_matter() -> None:
    lost = AUDITCTL.replace("lost 0", "lost 3")
    reading, _ = read_window(closing(auditctl=lost), OPENED.model_copy(update={"lost": 3}), SENTINEL)
    assert reading.state is SourceState.FETCHED


@pytest.mark.parametrize("parts", [{"auditctl": "auditctl: not found\n"}, {"log": "stat: cannot statx\n"}])
def test_a_state_that_cannot_be_read_makes_the_window_unavailable(parts: dict[str, str]) -> None:
    reading, log = read_window(closing(**parts), OPENED, SENTINEL)
    assert reading.state is SourceState.UNAVAILABLE
    assert reading.detail.startswith("the audit subsystem's state cannot be read: ")
    assert log == ""


def test_another_sentinel_does_not_end_the_window() -> None:
    text = WINDOW + "\n" + USER.format(sentinel="lsmlab-0000000000000000")
    assert read_window(closing(text), OPENED, SENTINEL)[0].state is SourceState.UNAVAILABLE


def test_records_with_a_node_are_counted() -> None:
    text = f"node=web1 {avc()}\nnode=web1 {USER.format(sentinel=SENTINEL)}"
    assert read_window(closing(text), OPENED, SENTINEL)[0].state is SourceState.FETCHED


# The operation


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (0, "-all"),
        (0b1, "-all,+cap_0"),
        (0b110, "-all,+cap_1,+cap_2"),
        (1 << 40, "-all,+cap_40"),
        ((1 << 41) - 1, "-all," + ",".join(f"+cap_{n}" for n in range(41))),
    ],
)
def test_capability_list(mask: int, words: str) -> None:
    assert capability_list(mask) == words


@given(st.integers(0, (1 << 64) - 1))
def test_capability_list_holds_exactly_the_mask(mask: int) -> None:
    first, *rest = capability_list(mask).split(",")
    assert first == "-all"
    assert sum(1 << int(word.removeprefix("+cap_")) for word in rest) == mask


def test_curl_command_sends_the_path_as_it_is() -> None:
    assert curl_command(http_attempt()) == (
        "curl", "--silent", "--show-error", "--globoff", "--path-as-is", "--max-time", "15", "--request", "GET",
        "--write-out", "%{stderr}http_code=%{http_code}", "http://127.0.0.1:80/static../etc/shadow",
    )  # fmt: skip
    other = curl_command(http_attempt(http={"path": "/a?b=%2e%2e", "method": "PUT", "port": 8080}, timeout=3))
    assert other[-1] == "http://127.0.0.1:8080/a?b=%2e%2e"
    assert other[other.index("--request") + 1] == "PUT"
    assert other[other.index("--max-time") + 1] == "3"


def test_curl_command_takes_brackets_as_they_are() -> None:
    assert "--globoff" in curl_command(http_attempt(http={"path": "/a{b,c}[1-3]"}))


# An attempt over a channel that plays a guest


class Guest:
    """A channel into a guest that answers by script: what `act` gives for the operation, facts for the rest."""

    def __init__(self, act: CommandResult | Exception, **parts: str | None) -> None:
        self.act = act
        self.parts = parts
        self.ran: list[tuple[str, ...]] = []

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        self.ran.append(tuple(argv))
        if argv[0] == "sh":
            return done("")  # the canary
        if argv[0] == "/bin/sh" and argv[3] in {"window-open", "window-close"}:
            nonce = argv[4]
            parts = dict(self.parts)
            if argv[3] == "window-close":
                text = WINDOW + "\n" + USER.format(sentinel=argv[7])
                parts = {"sentinel": "sent\nseen\n", "window": text, "log": "65024:1183 99999\n", **parts}
            return done(printed(nonce, **parts))
        if isinstance(self.act, Exception):
            raise self.act
        return self.act

    def write_file(self, path: str, data: bytes) -> None:
        raise AssertionError(path)


def done(out: str, err: str = "", exit_code: int | None = 0, signal: int | None = None) -> CommandResult:
    return CommandResult((), exit_code, signal, out.encode(), err.encode(), 0.12345)


def made(guest: Guest, spec: Any) -> attempt.Observation:
    opened = attempt.open_window(guest, "nginx.service", "/etc/shadow")
    return attempt.make(guest, spec, "nginx.service", opened)


def test_an_http_attempt_is_observed() -> None:
    guest = Guest(done("<h1>403 Forbidden</h1>", "http_code=403"))
    seen = made(guest, http_attempt())
    assert (seen.http_status, seen.exit_code, seen.timed_out, seen.auid) == (403, 0, False, None)
    assert (seen.output, seen.errors) == ("<h1>403 Forbidden</h1>", "http_code=403")
    assert (seen.canary_planted, seen.effect_before, seen.effect_after) == (True, None, None)
    assert seen.log == WINDOW
    assert seen.source.state is SourceState.FETCHED
    assert seen.subject_before == seen.subject_after == subject(process(481, main=True), process(482))
    assert re.fullmatch(r"[0-9a-f]{16}", seen.canary)
    (planted,) = (c for c in guest.ran if c[0] == "sh")
    assert planted[-2:] == ("/etc/shadow", f"lsmlab-{seen.canary}:!:::::::")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"drained": ""}, "audit queue does not come through"),
        ({"rest": ""}, "the processes of nginx.service do not come to rest"),
    ],
)
def test_a_window_opens_only_on_a_machine_at_rest(parts: dict[str, str], words: str) -> None:
    with pytest.raises(ChannelError, match=words):
        attempt.open_window(Guest(done(""), **parts), "nginx.service", "/etc/shadow")


def test_every_attempt_has_words_of_its_own() -> None:
    guest = Guest(done("", "http_code=200"))
    first, second = (made(guest, http_attempt()) for _ in range(2))
    assert first.canary != second.canary
    scripts = [c for c in guest.ran if c[0] == "/bin/sh"]
    assert len({c[4] for c in scripts}) == len(scripts) == 4  # nonces
    assert len({c[7] for c in scripts if c[3] == "window-close"}) == 2  # sentinels
    assert first.canary not in " ".join(word for c in scripts for word in c)


@pytest.mark.parametrize(
    ("act", "status", "timed_out"),
    [
        (done("", "http_code=200"), 200, False),
        (done("", "curl: (7) refused\nhttp_code=000", 7), None, False),
        (done("", "curl: (28) timed out\nhttp_code=000", 28), None, True),
        (done("http_code=200", ""), None, False),  # the answer's own text is no status
        (done("", "http_code=200 and more"), None, False),
        (done("", "", None, 9), None, False),
        (CommandTimeoutError("gone"), None, True),
    ],
)
def test_the_status_of_a_request(act: CommandResult | Exception, status: int | None, timed_out: bool) -> None:
    seen = made(Guest(act), http_attempt())
    assert (seen.http_status, seen.timed_out) == (status, timed_out)


def test_a_run_attempt_is_run_as_the_worker() -> None:
    guest = Guest(done("", "cat: /etc/shadow: Permission denied", 1))
    seen = made(guest, run_attempt())
    (command,) = (c for c in guest.ran if "run-as" in c)
    assert seen.auid is not None
    assert 0x40000000 <= seen.auid < 0xFFFFFFFF
    everything = capability_list((1 << 41) - 1)
    assert command[4:] == (
        str(seen.auid),
        "33",
        "33",
        "33,42",
        everything,
        "0",
        "/usr/sbin/nginx",
        "cat",
        "/etc/shadow",
    )
    assert (seen.exit_code, seen.errors, seen.http_status) == (1, "cat: /etc/shadow: Permission denied", None)


def test_a_command_that_does_not_end_timed_out() -> None:
    seen = made(Guest(CommandTimeoutError("gone")), run_attempt(timeout=3))
    assert (seen.exit_code, seen.signal, seen.timed_out, seen.output, seen.seconds) == (None, None, True, "", 3.0)


def test_a_guest_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(ChannelError, match="no answer"):
        made(Guest(ChannelError("no answer")), http_attempt())


def test_a_service_without_processes_cannot_lend_its_rights() -> None:
    with pytest.raises(ChannelError, match="the service has no process"):
        made(Guest(done(""), processes=""), run_attempt())


def test_long_output_is_cut_in_the_record() -> None:
    seen = made(Guest(done("x" * (attempt.KEPT_OUTPUT + 5), "http_code=200")), http_attempt())
    assert len(attempt.shortened(seen).output) == attempt.KEPT_OUTPUT


class Echo(Guest):
    """A guest whose operation shows, far behind, the word that was planted."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        if argv[0] == "sh":
            self.act = done("x" * attempt.KEPT_OUTPUT + argv[-1], "http_code=200")
        return super().run(argv, stdin=stdin, timeout=timeout)


def test_a_canary_behind_long_output_is_seen() -> None:
    seen = made(Echo(done("")), http_attempt())
    assert seen.canary in seen.output
