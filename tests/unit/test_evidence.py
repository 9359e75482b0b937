"""Reading the audit log: real records, records true to the kernel's formats, and whatever else.

Captured in guests (Debian 13, kernel 6.12, unchanged): samples/selinux-*.log, apparmor-*.log, run-as.log.
Written by hand after the kernel's and auditd's sources, since no capture has them: user-avc.log (libselinux's
avc.c as dbus-daemon and systemd print it), apparmor-capability.log, selinux-err.log, hex-names.log, mode-changes.log,
dac-read-search.log.
"""

from __future__ import annotations

import pytest
from builders import (
    HTTPD,
    SHADOW,
    UNSET,
    apparmor,
    avc,
    path_record,
    sample,
    syscall,
    untrusted,
)
from hypothesis import given
from hypothesis import strategies as st

from lsmlab.evidence import Denial, denials, mode_changes, parse, parse_line, refused_calls
from lsmlab.terms import Framework

AUDITCTL = "system_u:system_r:auditctl_t:s0"


def read(name: str) -> tuple[Denial, ...]:
    return denials(parse(sample(name)))


def only(text: str) -> Denial:
    found = denials(parse(text))
    assert len(found) == 1
    return found[0]


# The captures


def test_selinux_enforcing_capture_is_read_exactly() -> None:
    records = parse(sample("selinux-enforcing.log"))
    assert [r.type for r in records] == [
        "USER", "SERVICE_START", "AVC", "SYSCALL", "CWD", "PATH", "PROCTITLE", "AVC", "SYSCALL", "PROCTITLE", "USER",
    ]  # fmt: skip
    assert [r.serial for r in records] == [145, 146, 147, 147, 147, 147, 147, 148, 148, 148, 149]
    assert records[2].event == ("1795508111.424", 147)
    assert records[2].fields == {
        "avc": "denied", "permissions": "read", "pid": "457", "comm": "nginx", "name": "shadow", "dev": "vda",
        "ino": "590", "scontext": HTTPD, "tcontext": SHADOW, "tclass": "file", "permissive": "0",
    }  # fmt: skip
    assert records[6].fields == {"proctitle": "nginx: worker process"}
    nginx, auditctl = denials(records)
    assert nginx.model_dump(exclude={"raw"}) == {
        "framework": Framework.SELINUX, "effective": True, "logged_only": False, "event": ("1795508111.424", 147),
        "pid": 457, "ppid": 456, "auid": UNSET, "comm": "nginx", "subject": HTTPD, "object": SHADOW, "tclass": "file",
        "permissions": ("read",), "name": "shadow", "paths": (("/srv/../etc/shadow", 590),), "dev": "vda", "ino": 590,
        "operation": "", "syscall_success": False,
    }  # fmt: skip
    assert (nginx.subject_domain, nginx.object_type) == ("httpd_t", "shadow_t")
    assert nginx.headline == nginx.raw[0]
    assert nginx.headline.startswith("type=AVC msg=audit(1795508111.424:147): avc:  denied  { read } for  pid=457 ")
    assert [r.split(" ")[0] for r in nginx.raw] == [
        "type=AVC",
        "type=SYSCALL",
        "type=CWD",
        "type=PATH",
        "type=PROCTITLE",
    ]
    assert (auditctl.subject, auditctl.tclass, auditctl.permissions) == (AUDITCTL, "filesystem", ("getattr",))
    assert auditctl.effective
    assert mode_changes(records) == ()
    assert [(r.type, r.serial) for r in refused_calls(records)] == [("SYSCALL", 147), ("SYSCALL", 148)]


def test_selinux_permissive_capture_only_logs() -> None:
    records = parse(sample("selinux-permissive.log"))
    found = denials(records)
    assert [(d.event[1], d.permissions, d.name) for d in found] == [
        (152, ("getattr",), "/"),
        (156, ("read",), "shadow"),
        (156, ("open",), "/etc/shadow"),
        (157, ("getattr",), "/etc/shadow"),
        (158, ("getattr",), "/"),
    ]
    assert all(d.logged_only and not d.effective and d.syscall_success for d in found)
    # setenforce's SYSCALL record stands after another event's: the serial joins, not the neighbourhood
    (change,) = mode_changes(records)
    assert (change.type, change.serial, change.fields["enforcing"]) == ("MAC_STATUS", 150, "0")
    assert refused_calls(records) == ()


def test_two_denials_of_one_event_share_its_other_records() -> None:
    first, second = (d for d in read("selinux-permissive.log") if d.event[1] == 156)
    assert first.event == second.event
    assert first.paths == second.paths == (("/srv/../etc/shadow", 590),)
    assert second.headline in first.raw
    assert first.headline in second.raw
    assert sorted(first.raw) == sorted(second.raw)


def test_a_record_without_permissions_says_its_operation() -> None:
    line = (
        'type=AVC msg=audit(1.0:2): apparmor="DENIED" operation="change_onexec" class="file" profile="shop" '
        'name="unconfined" pid=602 comm="shop" target="unconfined"'
    )
    (denial,) = denials(parse(line))
    assert (denial.permissions, denial.access) == ((), "change_onexec")
    (other,) = denials(parse(avc("read", "open")))
    assert other.access == "read open"


def test_apparmor_enforce_capture_is_read_exactly() -> None:
    records = parse(sample("apparmor-enforce.log"))
    (found,) = denials(records)
    assert found.model_dump(exclude={"raw", "event"}) == {
        "framework": Framework.APPARMOR, "effective": True, "logged_only": False, "pid": 587, "ppid": 586,
        "auid": UNSET, "comm": "nginx", "subject": "nginx", "object": "", "tclass": "file", "permissions": ("r",),
        "name": "/etc/shadow", "paths": (("/srv/../etc/shadow", 589),), "dev": "", "ino": None, "operation": "open",
        "syscall_success": False,
    }  # fmt: skip
    assert (found.subject_domain, found.object_type) == ("nginx", "")
    assert [r.serial for r in refused_calls(records)] == [216]


def test_apparmor_complain_capture_only_logs() -> None:
    records = parse(sample("apparmor-complain.log"))
    (found,) = denials(records)
    assert (found.effective, found.logged_only, found.syscall_success) == (False, True, True)
    assert (found.subject, found.permissions, found.name) == ("nginx", ("r",), "/etc/shadow")
    (change,) = mode_changes(records)
    assert (change.fields["operation"], change.fields["name"]) == ("profile_load", "nginx")
    assert refused_calls(records) == ()


def test_a_refused_exec_of_a_run_attempt_is_found_by_its_audit_user_id() -> None:
    refused = refused_calls(parse(sample("run-as.log")))
    assert [(r.serial, r.fields["auid"], r.fields["syscall"], r.fields["key"]) for r in refused] == [
        (165, "77777", "59", "lsmlab-denied"),
        (167, "77777", "59", "lsmlab-denied"),
    ]
    assert read("run-as.log") == ()


# Formats not captured


def test_user_avc_of_an_object_manager_is_a_denial() -> None:
    dbus, systemd = read("user-avc.log")
    assert (dbus.framework, dbus.effective, dbus.logged_only) == (Framework.SELINUX, True, False)
    assert (dbus.subject_domain, dbus.object_type, dbus.tclass) == ("httpd_t", "init_t", "dbus")
    assert dbus.permissions == ("send_msg",)
    assert (dbus.paths, dbus.syscall_success) == ((), None)
    assert (systemd.effective, systemd.logged_only) == (False, True)
    assert (systemd.name, systemd.tclass) == ("/usr/lib/systemd/system/auditd.service", "service")


def test_user_avc_names_the_subjects_process() -> None:
    assert read("user-avc.log")[0].pid == 482


def test_user_avc_without_permissive_is_effective() -> None:
    # libselinux before 2.9 wrote no permissive=
    assert only(sample("user-avc.log").splitlines()[0].replace(" permissive=0", "")).effective


def test_avc_without_permissive_is_neither_effective_nor_logged_only() -> None:
    found = only(avc().replace(" permissive=0", ""))
    assert (found.effective, found.logged_only) == (False, False)


def test_apparmor_capability_denial_names_the_capability() -> None:
    (found,) = read("apparmor-capability.log")
    assert (found.permissions, found.tclass, found.operation) == (("dac_override",), "cap", "capable")
    assert (found.name, found.effective, found.auid) == ("", True, UNSET)


def test_selinux_err_is_no_denial() -> None:
    records = parse(sample("selinux-err.log"))
    assert [r.type for r in records] == ["SELINUX_ERR", "SYSCALL", "SELINUX_ERR"]
    assert records[0].fields["seresult"] == "denied"
    assert records[2].fields["invalid_context"] == "system_u:system_r:nobody_t:s0"
    assert denials(records) == ()


def test_hex_names_are_decoded() -> None:
    spaces, spoof, unicode, latin = read("hex-names.log")
    assert (spaces.comm, spaces.name, spaces.ino) == ("my nginx", "/srv/my files/a b", 900)
    assert (unicode.subject, unicode.name) == ("café web", "/srv/über")
    assert latin.name == "caf\\xe9"  # bytes that are not UTF-8 become escapes, never an error
    assert spoof.name == 'x" scontext=system_u:system_r:init_t:s0 permissive=1'
    assert (spoof.subject_domain, spoof.effective) == ("httpd_t", True)


def test_mode_changes_are_found_and_nothing_else() -> None:
    records = parse(sample("mode-changes.log"))
    assert [r.serial for r in mode_changes(records)] == [340, 341, 342, 343]  # 344: an audit rule, no mode
    assert denials(records) == ()


def test_a_denied_capability_that_another_made_unnecessary_is_not_effective() -> None:
    (found,) = read("dac-read-search.log")
    assert (found.permissions, found.tclass) == (("dac_read_search",), "capability")
    assert (found.effective, found.logged_only, found.syscall_success) == (False, False, True)


# Effective, logged only, or neither


@pytest.mark.parametrize(
    ("record", "success", "effective", "logged_only"),
    [
        (avc(permissive=0), "no", True, False),
        (avc(permissive=0), None, True, False),
        (avc(permissive=0), "yes", False, False),
        (avc(permissive=1), "yes", False, True),
        (avc(permissive=1), "no", False, True),
        (avc(permissive=1), None, False, True),
        (apparmor(kind="DENIED"), "no", True, False),
        (apparmor(kind="DENIED"), None, True, False),
        (apparmor(kind="DENIED"), "yes", False, False),
        (apparmor(kind="KILLED"), None, True, False),
        (apparmor(kind="ALLOWED"), "yes", False, True),
        (apparmor(kind="ALLOWED"), "no", False, True),
    ],
)
def test_effect_of_a_denial(record: str, success: str | None, effective: bool, logged_only: bool) -> None:
    parsed = parse_line(record)
    assert parsed is not None
    call = syscall(stamp=parsed.stamp, serial=parsed.serial, success=success) if success else ""
    found = only(f"{record}\n{call}")
    assert (found.effective, found.logged_only) == (effective, logged_only)
    assert found.syscall_success is {"yes": True, "no": False, None: None}[success]


@pytest.mark.parametrize("kind", ["STATUS", "AUDIT", "HINT", "ERROR"])
def test_other_apparmor_records_are_no_denials(kind: str) -> None:
    assert denials(parse(apparmor(kind=kind))) == ()


def test_granted_is_no_denial() -> None:
    record = parse_line(avc(verb="granted"))
    assert record is not None
    assert record.fields["avc"] == "granted"
    assert denials([record]) == ()


@pytest.mark.parametrize("exit_code", [-13, -1])
def test_refused_calls_are_those_with_eacces_or_eperm(exit_code: int) -> None:
    text = "\n".join([syscall(result=exit_code), syscall(result=-2), syscall(result=0, success="yes"), avc()])
    assert len(refused_calls(parse(text))) == 1


# Joining


def test_an_event_is_its_stamp_and_its_serial() -> None:
    restored = syscall(stamp="1795509999.000", success="yes")  # the same serial, after a restore
    found = only("\n".join([avc(), restored, path_record(b"/other", 1, serial=148)]))
    assert (found.effective, found.syscall_success, found.paths) == (True, None, ())


def test_records_of_one_event_join_in_any_order() -> None:
    lines = [path_record(b"/etc/shadow", 589), syscall(auid=77), avc(), avc(serial=148)]
    first, second = denials(parse("\n".join(lines)))
    assert (first.auid, first.ppid, first.paths) == (77, 481, (("/etc/shadow", 589),))
    assert (second.auid, second.ppid, second.paths) == (None, None, ())


# Fields


def test_auditds_translations_are_ignored() -> None:
    record = parse_line(syscall() + ' AUID="x" success=yes subj=evil')
    assert record is not None
    assert "AUID" not in record.fields
    assert (record.fields["success"], record.fields["subj"]) == ("no", HTTPD)
    assert "\x1d" not in record.raw
    assert record.raw.endswith('key="lsmlab-denied"')


def test_the_first_field_of_a_name_counts() -> None:
    found = only(avc() + " scontext=system_u:system_r:evil_t:s0 permissive=1 pid=1")
    assert (found.subject_domain, found.effective, found.pid) == ("httpd_t", True, 482)


def test_a_name_with_a_quote_is_not_written_quoted_by_the_kernel() -> None:
    name = b'x" scontext=system_u:system_r:evil_t:s0 tclass=dir permissive=1 "'
    assert '"' not in untrusted(name)
    found = only(avc(name=name))
    assert found.name.encode() == name
    assert (found.subject, found.tclass, found.effective) == (HTTPD, "file", True)


def test_a_name_of_hexadecimal_digits_is_not_decoded_where_it_is_quoted() -> None:
    assert only(avc(name=b"4142")).name == "4142"
    assert only(avc().replace('name="shadow"', "name=4142")).name == "AB"


@pytest.mark.parametrize("value", ["(null)", "?", "", "ABC", "abcd", "0x41"])
def test_values_that_are_no_encoded_text_stay(value: str) -> None:
    assert only(avc().replace('name="shadow"', f"name={value}")).name == value


def test_comm_stays_cut_at_15_characters() -> None:
    comm = b"nginx-worker-process"[:15]  # TASK_COMM_LEN, with its final NUL, is 16
    assert only(avc(comm=comm)).comm == "nginx-worker-pr"


def test_path_is_preferred_to_name() -> None:
    assert only(avc(key="path", name=b"/etc/shadow")).name == "/etc/shadow"


@pytest.mark.parametrize(
    ("operation", "rule_class", "mask", "permissions"),
    [
        ("open", "file", "wrc", ("w", "r", "c")),
        ("exec", "file", "x", ("x",)),
        ("open", None, "wr", ("w", "r")),
        ("create", "net", "create", ("create",)),
        ("ptrace", "ptrace", "read", ("read",)),
        ("file_mmap", None, "rm", ("r", "m")),
    ],
)
def test_apparmor_masks(operation: str, rule_class: str | None, mask: str, permissions: tuple[str, ...]) -> None:
    assert only(apparmor(operation=operation, rule_class=rule_class, mask=mask)).permissions == permissions


@pytest.mark.parametrize("operation", ["rename_src", "file_perm", "file_lock", "link", "mknod", "truncate"])
def test_apparmor_file_masks_without_a_class(operation: str) -> None:
    found = only(apparmor(operation=operation, rule_class=None, mask="wrd"))
    assert found.permissions == ("w", "r", "d")


def test_apparmor_denials_without_a_mask_have_no_permissions() -> None:
    assert (
        only('type=AVC msg=audit(1.2:3): apparmor="DENIED" operation="userns_create" class="namespace"').permissions
        == ()
    )


@pytest.mark.parametrize(
    "line", ["", "hello", "type=AVC", "type=AVC msg=audit(1:2): x", "# type=AVC msg=audit(1.0:2): a=b"]
)
def test_what_is_no_record_is_passed_over(line: str) -> None:
    assert parse_line(line) is None
    assert parse(f"{line}\n{avc()}\n{line}") == parse(avc())


def test_a_record_may_carry_its_node() -> None:
    assert only(f"node=web1 {avc()}").subject_domain == "httpd_t"


def test_bytes_that_are_not_utf8_in_the_log_do_no_harm() -> None:
    text = avc().encode().replace(b"shadow", b"sha\xff\xfedow").decode("utf-8", "backslashreplace")
    assert only(text).subject == HTTPD


USER_RECORD = (
    "type=USER_CMD msg=audit(1795509852.300:150): pid=482 uid=33 auid=4294967295 ses=4294967295 subj={subj}"
    ' msg=\'cwd="/" x\' {forged} exe="/usr/bin/sudo" terminal=? res=failed\''
)


@pytest.mark.parametrize("kind", ["DENIED", "STATUS"])
def test_what_a_process_writes_into_the_log_is_not_the_kernels_record(kind: str) -> None:
    forged = f'apparmor="{kind}" operation="open" profile="nginx" name="/etc/shadow" denied_mask="r"'
    records = parse(USER_RECORD.format(subj=HTTPD, forged=forged))
    assert len(records) == 1
    assert denials(records) == ()
    assert mode_changes(records) == ()


def test_an_avc_in_a_users_record_is_no_denial() -> None:
    forged = avc().partition("): ")[2]
    assert denials(parse(USER_RECORD.format(subj=HTTPD, forged=forged))) == ()


def told_by(pid: int, words: str, *, sender: str = "system_u:system_r:system_dbusd_t:s0") -> str:
    """A record that a process with CAP_AUDIT_WRITE sent: the kernel says who it is, and the rest are its words."""
    return (
        f"type=USER_AVC msg=audit(1795509852.188:147): pid={pid} uid=33 auid=4294967295 ses=4294967295 subj={sender}"
        f" msg='{words}'"
    )


def words_of(before: str = "", *, tclass: str = " tclass=dbus", spid: str = " spid=482") -> str:
    return (
        f"{before}avc:  denied  {{ send_msg }} for {spid} scontext={HTTPD} tcontext=system_u:system_r:init_t:s0{tclass}"
        " permissive=0"
    )


@pytest.mark.parametrize("tclass", ["dbus", "service", "system", "passwd", "nscd", "db_table", "x_drawable"])
def test_an_object_manager_speaks_of_its_own_classes(tclass: str) -> None:
    found = only(told_by(348, words_of(tclass=f" tclass={tclass}")))
    assert (found.pid, found.tclass, found.subject, found.effective) == (482, tclass, HTTPD, True)


@pytest.mark.parametrize("tclass", [" tclass=file", " tclass=capability", " tclass=DB_TABLE", " tclass=adb_", ""])
def test_of_the_kernels_classes_nobody_else_speaks(tclass: str) -> None:
    assert denials(parse(told_by(348, words_of(tclass=tclass)))) == ()


@pytest.mark.parametrize("before", ["", "pid=348 ", "x pid=348 subj=a:b_r:c:s0 ", "' pid=348 '"])
def test_nobody_speaks_of_itself(before: str) -> None:
    # its own number and context are the kernel's, who writes them first
    assert denials(parse(told_by(482, words_of(before)))) == ()
    assert denials(parse(told_by(483, words_of(before), sender=HTTPD))) == ()
    assert denials(parse(told_by(483, words_of(before, spid=""), sender=HTTPD))) == ()
    assert len(denials(parse(told_by(483, words_of(before))))) == 1


def test_a_context_that_is_missing_is_nobodys() -> None:
    both = told_by(348, words_of())
    for silent in (" subj=system_u:system_r:system_dbusd_t:s0", f" scontext={HTTPD}"):
        assert len(denials(parse(both.replace(silent, "")))) == 1
    neither = both.replace(" subj=system_u:system_r:system_dbusd_t:s0", "").replace(f" scontext={HTTPD}", "")
    assert denials(parse(neither)) == ()


def test_the_message_of_an_object_manager_is_read_and_not_kept() -> None:
    (record,) = parse(told_by(348, words_of()))
    assert "msg" not in record.fields
    assert (record.fields["pid"], record.fields["spid"]) == ("348", "482")
    (other,) = parse(told_by(348, "op=login"))
    assert other.fields["msg"] == "op=login"


# Which fields and records


@pytest.mark.parametrize(
    "key", ["name", "path", "comm", "exe", "cwd", "proctitle", "profile", "key", "target", "peer", "info"]
)
def test_what_a_process_may_choose_is_decoded(key: str) -> None:
    (record,) = parse(f"type=SYSCALL msg=audit(1.2:3): {key}={untrusted(b'a b')}")
    assert record.fields == {key: "a b"}


@pytest.mark.parametrize("key", ["ino", "dev", "a1", "subj", "scontext", "exit"])
def test_what_the_kernel_chooses_is_not(key: str) -> None:
    (record,) = parse(f"type=SYSCALL msg=audit(1.2:3): {key}=4142")
    assert record.fields == {key: "4142"}


@pytest.mark.parametrize("kind", ["DENIED", "ALLOWED", "KILL", "STATUS", "AUDIT", "ERROR"])
def test_apparmors_records_have_types_of_their_own(kind: str) -> None:
    said = {"KILL": "KILLED"}.get(kind, kind)
    records = parse(apparmor(kind=said).replace("type=AVC", f"type=APPARMOR_{kind}"))
    assert len(denials(records)) == (kind in {"DENIED", "ALLOWED", "KILL"})
    assert len(mode_changes(records)) == (kind == "STATUS")
    assert denials(parse(apparmor(kind=said).replace("type=AVC", "type=APPARMOR_HINT"))) == ()


@pytest.mark.parametrize(
    "body", ["avc=denied", "avc=denied permissions=read scontext=a", "permissions=x", "avc=denied {"]
)
def test_only_the_kernels_own_words_make_an_avc(body: str) -> None:
    (record,) = parse(f"type=AVC msg=audit(1.0:1): {body}")
    assert {"avc", "permissions"}.isdisjoint(record.fields)
    assert denials([record]) == ()


# What a record does not say


def test_an_avc_that_says_little_is_empty_where_it_is_silent() -> None:
    found = only(
        "type=AVC msg=audit(1.2:3): avc:  denied  { read } for  permissive=0\ntype=PATH msg=audit(1.2:3): item=0"
    )
    assert found.model_dump(exclude={"raw"}) == {
        "framework": Framework.SELINUX, "effective": True, "logged_only": False, "event": ("1.2", 3), "pid": None,
        "ppid": None, "auid": None, "comm": "", "subject": "", "object": "", "tclass": "", "permissions": ("read",),
        "name": "", "paths": (("", None),), "dev": "", "ino": None, "operation": "", "syscall_success": None,
    }  # fmt: skip


def test_an_apparmor_record_that_says_little_is_empty_where_it_is_silent() -> None:
    found = only('type=AVC msg=audit(1.2:3): apparmor="DENIED"')
    assert (found.subject, found.object, found.tclass, found.operation, found.comm, found.name) == ("",) * 6
    assert (found.permissions, found.pid, found.effective) == ((), None, True)


def test_a_call_that_does_not_say_how_it_ended_leaves_it_open() -> None:
    found = only(f"{avc()}\n{syscall().replace('success=no ', '')}")
    assert (found.syscall_success, found.effective) == (None, True)


@pytest.mark.parametrize(
    ("written", "read"),
    [('"sha', "sha"), ("'sha", "sha"), ('"', ""), ("'a b'", "a b"), ("'4142'", "4142"), ('""', ""), ("''", "")],
)
def test_a_quote_is_taken_off_closed_or_not(written: str, read: str) -> None:
    assert only(f"type=AVC msg=audit(1.2:3): avc:  denied  {{ read }} for  name={written}").name == read


@pytest.mark.parametrize(
    ("rule_class", "mask", "permissions"),
    [("net", "rd", ("rd",)), (None, "send receive", ("send", "receive")), (None, "rd", ("r", "d"))],
)
def test_apparmor_masks_are_letters_for_files_alone(
    rule_class: str | None, mask: str, permissions: tuple[str, ...]
) -> None:
    assert only(apparmor(rule_class=rule_class, mask=mask)).permissions == permissions


@pytest.mark.parametrize("end", ["", "  ", "X", "\t"])
def test_a_line_is_kept_as_it_was_but_for_its_end(end: str) -> None:
    record = parse_line(f"{avc()}{end}\n")
    assert record is not None
    assert record.raw == avc() + end
    assert parse_line(f"\n{avc()}") is None


def test_a_serial_that_no_kernel_has_is_cut() -> None:
    record = parse_line(avc(serial=10**30))
    assert record is not None
    assert record.serial == 10**17


# Properties

BYTES = st.binary(max_size=40).map(lambda b: b.replace(b"\0", b"x"))
NAMES = st.one_of(
    BYTES,
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30).map(str.encode),
    st.sampled_from([b'a"b', b"a b", b"AB", b"(null)", b"'", b"a=b", b"{ read }", b"\x1d", b"\n", b"scontext=x"]),
)
TYPES = st.from_regex(r"[a-z_]{1,12}_t", fullmatch=True)
CONTEXTS = TYPES.map(lambda t: f"system_u:system_r:{t}:s0-s0:c0.c1023")
PERMISSIONS = st.lists(st.from_regex(r"[a-z_]{1,10}", fullmatch=True), min_size=1, max_size=4, unique=True)
JUNK = st.one_of(
    st.text(max_size=200),
    st.binary(max_size=200).map(lambda b: b.decode("utf-8", "backslashreplace")),
    st.binary(max_size=200).map(lambda b: b.decode("latin-1")),
)


def text_of(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


@given(JUNK)
def test_parse_never_raises(text: str) -> None:
    denials(parse(text))


@given(JUNK, st.sampled_from(["AVC", "SYSCALL", "USER_AVC", "PATH"]), st.integers(0))
def test_parse_never_raises_inside_a_record(text: str, kind: str, serial: int) -> None:
    records = parse(f"type={kind} msg=audit(1.2:{serial}): {text}")
    denials(records)
    mode_changes(records)
    refused_calls(records)


@given(JUNK)
def test_parse_never_raises_inside_an_avc(text: str) -> None:
    denials(parse(f"type=AVC msg=audit(1.2:3): avc:  denied  {{ {text} }} for  {text} pid={text} ino={text}"))
    denials(parse(f'type=AVC msg=audit(1.2:3): apparmor="DENIED" {text} name={text}'))


@given(
    permissions=PERMISSIONS,
    comm=NAMES.map(lambda b: b[:15]),
    name=NAMES,
    source=CONTEXTS,
    target=CONTEXTS,
    pid=st.integers(1, 1 << 22),
    ino=st.integers(0, (1 << 59) - 1),
    serial=st.integers(1, 1 << 40),
    permissive=st.integers(0, 1),
    key=st.sampled_from(["name", "path"]),
)
def test_an_avc_comes_back_as_it_was(
    permissions: list[str],
    comm: bytes,
    name: bytes,
    source: str,
    target: str,
    pid: int,
    ino: int,
    serial: int,
    permissive: int,
    key: str,
) -> None:
    line = avc(
        *permissions, comm=comm, name=name, key=key, source=source, target=target, pid=pid, ino=ino, serial=serial,
        permissive=permissive,
    )  # fmt: skip
    found = only(line)
    assert found.permissions == tuple(permissions)
    assert (found.comm, found.name) == (text_of(comm), text_of(name))
    assert (found.subject, found.object) == (source, target)
    assert (found.pid, found.ino, found.event[1]) == (pid, ino, serial)
    assert (found.effective, found.logged_only) == (permissive == 0, permissive == 1)
    assert found.raw == (line,)


@given(NAMES, NAMES)
def test_an_apparmor_record_comes_back_as_it_was(profile: bytes, name: bytes) -> None:
    found = only(apparmor(profile=profile, name=name))
    assert (found.subject, found.name) == (text_of(profile), text_of(name))
    assert (found.permissions, found.operation, found.pid, found.effective) == (("r",), "open", 482, True)


@given(NAMES)
def test_a_path_record_comes_back_as_it_was(name: bytes) -> None:
    assert only(f"{avc()}\n{path_record(name, 7)}").paths == ((text_of(name), 7),)


@given(
    st.lists(
        st.tuples(st.sampled_from(["avc", "apparmor", "syscall", "granted", "junk"]), st.integers(1, 4)), max_size=30
    )
)
def test_there_are_as_many_denials_as_denying_records(lines: list[tuple[str, int]]) -> None:
    written = {
        "avc": lambda n: avc(serial=n),
        "apparmor": lambda n: apparmor(serial=n),
        "syscall": lambda n: syscall(serial=n),
        "granted": lambda n: avc(serial=n, verb="granted"),
        "junk": lambda n: f"line {n}",
    }
    text = "\n".join(written[kind](serial) for kind, serial in lines)
    found = denials(parse(text))
    assert len(found) == sum(kind in {"avc", "apparmor"} for kind, _ in lines)
    assert all(d.raw[0] in text for d in found)
