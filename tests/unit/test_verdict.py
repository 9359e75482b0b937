"""Verdicts: truth tables of each rule, the order of precedence, and what must hold for every table of results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from builders import (
    AUID,
    HTTPD,
    WORD,
    apparmor,
    avc,
    denial,
    exec_record,
    http_attempt,
    judged,
    judged_arm,
    label_in,
    mode,
    nobody,
    observation,
    path_record,
    process,
    run_attempt,
    run_observation,
    sample,
    scenario,
    source,
    subject,
    syscall,
    target,
)
from hypothesis import given
from hypothesis import strategies as st

from lsmlab.attempt import Observation
from lsmlab.dac import DacExplanation
from lsmlab.evidence import Denial, denials, parse
from lsmlab.scenario import Attempt, DenialExpectation, Scenario
from lsmlab.terms import Arm, AttemptKind, Control, Framework, Result, SourceState, Verdict, arms_of
from lsmlab.verdict import (
    Attribution,
    Conclusion,
    JudgedArm,
    JudgedAttempt,
    attribute,
    conclude,
    ending,
    failure,
    judge,
    mode_problem,
    own_denials,
    settle,
    wrong_subject,
)

ALLOWED, BLOCKED, UNCLEAR, FAILED = Result.ALLOWED, Result.BLOCKED, Result.UNCLEAR, Result.FAILED
SELINUX, APPARMOR = Framework.SELINUX, Framework.APPARMOR
DAC, PERMISSIVE, ENFORCING = Arm.DAC, Arm.SELINUX_PERMISSIVE, Arm.SELINUX_ENFORCING
COMPLAIN, ENFORCE = Arm.APPARMOR_COMPLAIN, Arm.APPARMOR_ENFORCE
NO_SELINUX, NO_APPARMOR = Arm.SELINUX_UNCONFINED, Arm.APPARMOR_UNCONFINED
SUBJECT = {
    DAC: "", PERMISSIVE: "httpd_t", ENFORCING: "httpd_t", NO_SELINUX: "httpd_t",
    COMPLAIN: "nginx", ENFORCE: "nginx", NO_APPARMOR: "nginx",
}  # fmt: skip
READ_IT: dict[str, Any] = {"output": f"lsmlab-{WORD}:!:::::::", "http_status": 200}


def result_of(spec: Attempt, seen: Observation, arm: Arm = ENFORCING) -> tuple[Result, str]:
    judgement = judge(spec, arm, seen, SUBJECT[arm])
    return judgement.result, judgement.reason


# mode_problem


@pytest.mark.parametrize("arm", list(Arm))
def test_the_right_mode_is_no_problem(arm: Arm) -> None:
    assert mode_problem(arm, mode(arm), SUBJECT[arm]) == ""


@pytest.mark.parametrize(
    ("arm", "found", "problem"),
    [
        (DAC, mode(ENFORCING), "SELinux is active in the kernel of the control arm"),
        (DAC, mode(ENFORCE), "AppArmor is active in the kernel of the control arm"),
        (ENFORCING, mode(DAC), "the kernel has no SELinux (LSM list: lockdown,capability,yama)"),
        (ENFORCING, mode(ENFORCE), "the kernel has no SELinux (LSM list: lockdown,capability,yama,apparmor)"),
        (ENFORCE, mode(ENFORCING), "the kernel has no AppArmor (LSM list: lockdown,capability,yama,selinux)"),
        (ENFORCING, mode(PERMISSIVE), "SELinux is permissive"),
        (PERMISSIVE, mode(ENFORCING), "SELinux is enforcing"),
        (ENFORCING, mode(DAC, lsm=("selinux",)), "SELinux has no policy loaded"),
        (COMPLAIN, mode(ENFORCE), "profile nginx is in mode enforce"),
        (COMPLAIN, mode(COMPLAIN, profiles={"nginx": "kill"}), "profile nginx is in mode kill"),
        (COMPLAIN, mode(COMPLAIN, profiles={}), ""),  # the subject's own label tells it
        (ENFORCE, mode(COMPLAIN), ""),  # a profile left in complain is the policy under test
    ],
)
def test_a_wrong_mode_is_told(arm: Arm, found: Any, problem: str) -> None:
    assert mode_problem(arm, found, "nginx") == problem


def test_the_engine_s_own_profile_may_be_loaded_in_the_control() -> None:
    """Others' containers run under it; that the control's is unconfined is seen of its processes."""
    loaded = mode(NO_APPARMOR, profiles={"docker-default": "enforce", "shop-container": "enforce"})
    assert mode_problem(NO_APPARMOR, loaded, "docker-default") == ""
    assert mode_problem(NO_APPARMOR, loaded, "shop-container") == "profile shop-container is loaded in the control arm"
    log = exec_record(subject="docker-default")
    seen = run_observation(NO_APPARMOR, log, mode_before=loaded, mode_after=loaded)
    judged = judge(run_attempt(), NO_APPARMOR, seen, "docker-default")
    assert judged.reason == "the control's subject is confined: it runs in docker-default"


# What fails an attempt

WRONG = {
    DAC: mode(ENFORCING),
    PERMISSIVE: mode(ENFORCING),
    ENFORCING: mode(PERMISSIVE),
    COMPLAIN: mode(DAC),
    ENFORCE: mode(DAC),
    NO_SELINUX: mode(PERMISSIVE),
    NO_APPARMOR: mode(ENFORCE),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("arm", list(Arm))
@pytest.mark.parametrize("seen", [{}, READ_IT], ids=["blocked", "read"])
def test_a_wrong_mode_fails_the_attempt(arm: Arm, when: str, seen: dict[str, Any]) -> None:
    found, reason = result_of(http_attempt(), observation(arm, **seen, **{f"mode_{when}": WRONG[arm]}), arm)
    assert found is FAILED
    assert reason.startswith(f"wrong mode {when} the attempt: ")


def test_an_attack_on_the_mode_may_change_it_but_not_find_it_changed() -> None:
    log = "\n".join(line for line in sample("mode-changes.log").split("\n") if "type=CONFIG_CHANGE" not in line)
    after = observation(ENFORCING, log, mode_after=mode(PERMISSIVE), **READ_IT)
    before = observation(ENFORCING, mode_before=mode(PERMISSIVE), **READ_IT)
    assert result_of(http_attempt(changes_mac=True), after)[0] is ALLOWED
    assert result_of(http_attempt(changes_mac=True), before)[0] is FAILED
    assert result_of(http_attempt(), after)[0] is FAILED


def test_a_block_with_mac_changed_all_the_same_is_none() -> None:
    """An attack that switched MAC off and then stumbled has not been contained."""
    spec, changed = http_attempt(changes_mac=True), "HTTP 403, and yet MAC was changed"
    assert result_of(spec, observation(ENFORCING, avc(), mode_after=mode(PERMISSIVE))) == (UNCLEAR, changed)
    line = sample("mode-changes.log").splitlines()[0]
    assert result_of(spec, observation(ENFORCING, avc(), line)) == (UNCLEAR, changed)
    assert result_of(spec, observation(ENFORCING, avc()))[0] is BLOCKED


def test_a_profile_that_was_refused_is_no_change() -> None:
    head = 'type=AVC msg=audit(1.0:9): apparmor="STATUS" operation="profile_replace" profile="unconfined" name="nginx"'
    refused = f'{head} info="not policy admin" error=-13 pid=1 comm="x"'
    assert result_of(http_attempt(), observation(ENFORCE, refused), ENFORCE)[0] is BLOCKED
    assert result_of(http_attempt(), observation(ENFORCE, f'{head} pid=1 comm="x"'), ENFORCE)[0] is FAILED


@pytest.mark.parametrize("arm", [COMPLAIN, ENFORCE, NO_APPARMOR])
@pytest.mark.parametrize("found", ["complain", "kill", "", None])
def test_apparmor_that_only_logs_as_a_whole_is_a_wrong_mode(arm: Arm, found: str | None) -> None:
    seen = mode(arm).model_copy(update={"apparmor_mode": found})
    assert mode_problem(arm, seen, "nginx") == f"AppArmor as a whole is in mode {found or 'unknown'}"


def test_without_an_object_and_an_expectation_no_denial_accounts_for_a_block() -> None:
    vague = scenario(object={"class": "capability"})
    other = apparmor(name=b"/run/unrelated")
    why = "no object is expected that it could be compared with: "
    found = attribute(vague, APPARMOR, None, observation(ENFORCE, other, object=None))
    assert (found.denial, found.misses) == (None, (f"{why}{other}",))
    line = avc("sys_admin", tclass="capability")
    found = attribute(vague, SELINUX, None, observation(ENFORCING, line, object=None))
    assert (found.denial, found.misses) == (None, (f"{why}{line}",))


@pytest.mark.parametrize(
    ("record", "changes", "fits"),
    [
        (apparmor(name=b"/run/unrelated"), {"permissions": ["r"]}, False),
        (apparmor(name=b"/run/unrelated"), {"permissions": ["r"], "class": "file"}, False),
        (apparmor(name=b"/run/unrelated"), {"permissions": ["r"], "operation": "open"}, True),
        (sample("apparmor-capability.log"), {"permissions": ["dac_override"], "class": "cap"}, True),
    ],
)
def test_without_an_objects_path_the_class_or_the_operation_has_to_name_it(
    record: str, changes: dict[str, Any], fits: bool
) -> None:
    vague = scenario(object={"class": "capability"})
    seen = observation(ENFORCE, record, object=None)
    expected = DenialExpectation.model_validate({"attempt": "read-shadow", **changes}, strict=False)
    assert (attribute(vague, APPARMOR, expected, seen).denial is not None) is fits


@pytest.mark.parametrize(("arm", "label"), [(NO_SELINUX, HTTPD), (NO_APPARMOR, "nginx (enforce)")])
def test_an_unconfined_control_that_is_confined_is_unclear(arm: Arm, label: str) -> None:
    confined = observation(arm, subject_before=subject(label=label), subject_after=subject(label=label), **READ_IT)
    assert result_of(http_attempt(), confined, arm) == (
        UNCLEAR, f"the control's subject is confined: it runs in {SUBJECT[arm]}",
    )  # fmt: skip
    assert result_of(http_attempt(), observation(arm, **READ_IT), arm)[0] is ALLOWED


def test_a_command_of_an_unconfined_control_that_ran_confined_is_unclear() -> None:
    ran = {"exit_code": 0, "output": WORD, "errors": ""}
    confined = run_observation(NO_SELINUX, exec_record(), **ran)
    free = run_observation(NO_SELINUX, exec_record(subject="system_u:system_r:init_t:s0"), **ran)
    assert result_of(run_attempt(), confined, NO_SELINUX)[0] is UNCLEAR
    assert result_of(run_attempt(), free, NO_SELINUX)[0] is ALLOWED


@pytest.mark.parametrize("arm", list(Arm))
def test_an_unavailable_source_fails_the_attempt(arm: Arm) -> None:
    reading = source(SourceState.UNAVAILABLE, "3 records were lost by the kernel")
    for changes in ({}, READ_IT):
        found = result_of(http_attempt(), observation(arm, source=reading, **changes), arm)
        assert found == (FAILED, "audit log unavailable: 3 records were lost by the kernel")


@pytest.mark.parametrize("state", [SourceState.EMPTY, SourceState.FETCHED])
def test_an_empty_source_is_none(state: SourceState) -> None:
    assert result_of(http_attempt(), observation(source=source(state))) == (BLOCKED, "HTTP 403")


@pytest.mark.parametrize("serial", [340, 341, 342, 343])
def test_a_mode_change_in_the_window_fails_the_attempt(serial: int) -> None:
    line = next(row for row in sample("mode-changes.log").splitlines() if f":{serial})" in row)
    found, reason = result_of(http_attempt(), observation(ENFORCING, avc(), line))
    assert found is FAILED
    assert reason.startswith("mode or policy changed inside the window: type=")


@pytest.mark.parametrize("changes_mac", [False, True])
def test_auditing_that_was_changed_in_the_window_fails_the_attempt(changes_mac: bool) -> None:
    line = next(row for row in sample("mode-changes.log").split("\n") if "type=CONFIG_CHANGE" in row)
    line = line.replace("\x1d", 50 * " x=1" + "\x1d")
    found, reason = result_of(http_attempt(changes_mac=changes_mac), observation(ENFORCING, avc(), line))
    assert found is FAILED
    assert reason == f"auditing was changed inside the window: {line[:200]}"
    assert len(line) > 200


@pytest.mark.parametrize("seen", [{}, READ_IT], ids=["blocked", "read"])
def test_a_profile_in_enforce_that_only_logged_was_not_in_force(seen: dict[str, Any]) -> None:
    """AppArmor's mode as a whole is switched without a record: between the two looks it may have been another."""
    line = apparmor(kind="ALLOWED", name=b"/srv/" + b"a" * 200)
    found, reason = result_of(http_attempt(), observation(ENFORCE, line, **seen), ENFORCE)
    assert found is FAILED
    assert reason == f"profile nginx is in mode enforce, and only logged: {line[:200]}"
    on_mac = result_of(http_attempt(changes_mac=True), observation(ENFORCE, line, **seen), ENFORCE)
    assert on_mac == (
        (ALLOWED, "the canary was read, HTTP 200") if seen else (UNCLEAR, "HTTP 403, and yet MAC was changed")
    )


def test_a_profile_left_in_complain_may_log() -> None:
    left = {"mode_before": mode(COMPLAIN), "mode_after": mode(COMPLAIN)}
    seen = observation(ENFORCE, apparmor(kind="ALLOWED"), **left, **READ_IT)
    assert result_of(http_attempt(), seen, ENFORCE)[0] is ALLOWED


def test_a_canary_that_came_out_with_the_refusal_is_no_block() -> None:
    leaked = observation(ENFORCING, avc(), output=f"refused, lsmlab-{WORD}")
    assert result_of(http_attempt(), leaked) == (UNCLEAR, "HTTP 403, and yet the canary came out")


@pytest.mark.parametrize("timed_out", [True, False])
@pytest.mark.parametrize(
    "attempt",
    [
        {},
        {"kind": "benign", "canary": None, "allowed_if": {"output": "root:"}},
        {"canary": None, "allowed_if": {"effect": {"run": ["ls"], "output": "x"}}},
        {"blocked_if": [{"status": 403}, {"timeout": True}]},
    ],
    ids=["canary", "words", "effect", "timeout"],
)
def test_a_refusal_whose_rest_was_not_read_is_no_block(attempt: dict[str, Any], timed_out: bool) -> None:
    """What the service sent, or did, after a head that says 403 may have been what was to be prevented."""
    seen = observation(ENFORCING, avc(), cut_short=True, timed_out=timed_out, effect_before=False, effect_after=False)
    rest = "its answer was not over: what shows a success may be still to come"
    assert result_of(http_attempt(**attempt), seen) == (UNCLEAR, f"HTTP 403, and yet {rest}")


@pytest.mark.parametrize("where", ["output", "errors", "head"])
def test_a_canary_that_came_out_anywhere_is_no_block(where: str) -> None:
    leaked = observation(ENFORCING, avc(), **{where: f"date: invalid date lsmlab-{WORD}"})
    assert result_of(http_attempt(), leaked) == (UNCLEAR, "HTTP 403, and yet the canary came out")


def test_a_canary_beside_the_output_is_no_proof() -> None:
    leaked = observation(ENFORCING, errors=f"lsmlab-{WORD}:", head=f"X: lsmlab-{WORD}:", http_status=200)
    assert result_of(http_attempt(), leaked)[0] is UNCLEAR


@pytest.mark.parametrize("arm", [ENFORCING, ENFORCE])
def test_a_success_that_the_kernel_refused_is_unclear(arm: Arm) -> None:
    refused = avc() if arm is ENFORCING else apparmor()
    seen = observation(arm, refused, **READ_IT)
    attribution = attribute(scenario(), SELINUX if arm is ENFORCING else APPARMOR, None, seen)
    allowed = judge(http_attempt(), arm, seen, SUBJECT[arm])
    assert allowed.result is ALLOWED
    settled = settle(allowed, attribution)
    assert settled.result is UNCLEAR
    assert settled.reason.startswith("the canary was read, HTTP 200, and yet the kernel refused it: type=AVC")
    assert settle(allowed, Attribution(denial=None, misses=("another process",))) == allowed
    blocked = judge(http_attempt(), arm, observation(arm, refused), SUBJECT[arm])
    assert settle(blocked, attribution) == blocked


def test_an_attack_on_mac_may_change_its_own_domain_and_no_other_right() -> None:
    good = label_in(ENFORCING)
    before = subject(process(481, main=True, label=good))
    moved = subject(process(481, main=True, label="system_u:system_r:initrc_t:s0"))
    other = subject(process(481, main=True, label=good).model_copy(update={"uids": (7, 7, 7, 7)}))
    for after, changes_mac, expected in (
        (moved, True, ALLOWED), (moved, False, UNCLEAR), (other, True, UNCLEAR),
    ):  # fmt: skip
        seen = observation(ENFORCING, subject_before=before, subject_after=after, **READ_IT)
        assert result_of(http_attempt(changes_mac=changes_mac), seen)[0] is expected


def test_a_service_started_anew_with_other_rights_is_unclear() -> None:
    good = label_in(ENFORCING)
    before = subject(process(481, main=True, label=good), process(482, label=good))
    free = subject(process(581, main=True, label="system_u:system_r:initrc_t:s0"), process(582, label=good))
    same = subject(process(581, main=True, label=good), process(582, label=good))
    other = process(581, main=True, label=good).model_copy(update={"uids": (1, 7, 8, 9)})
    told = "the service was started anew during the attempt, with other rights: it had uid 0 and the label "
    for after, expected in (
        (free, (UNCLEAR, f"{told}{good!r}, and has 0 and 'system_u:system_r:initrc_t:s0'")),
        (subject(other, process(582, label=good)), (UNCLEAR, f"{told}{good!r}, and has 7 and {good!r}")),
        (same, (ALLOWED, "the canary was read, HTTP 200")),
    ):
        seen = observation(ENFORCING, subject_before=before, subject_after=after, **READ_IT)
        assert result_of(http_attempt(), seen) == expected
    back = observation(ENFORCING, subject_before=subject(other), subject_after=subject(process(481, main=True)))
    assert result_of(http_attempt(), back)[1].endswith(f": it had uid 7 and the label {good!r}, and has 0 and {good!r}")


def test_a_change_is_a_failure_unless_it_is_said_to_be_the_attempt() -> None:
    line = sample("mode-changes.log").splitlines()[0] + " x" * 200
    seen = observation(ENFORCING, line)
    words = f"mode or policy changed inside the window: {line[:200]}"
    assert failure(ENFORCING, seen, parse(line), "httpd_t") == words
    assert failure(ENFORCING, seen, parse(line), "httpd_t", changes_mac=True) == ""


def test_a_profile_that_was_switched_is_mac_changed() -> None:
    seen = observation(COMPLAIN, mode_after=mode(ENFORCE))
    assert result_of(http_attempt(changes_mac=True), seen, COMPLAIN) == (UNCLEAR, "HTTP 403, and yet MAC was changed")


def test_failed_comes_before_unclear() -> None:
    seen = observation(source=source(SourceState.UNAVAILABLE), object=target(exists=False), canary_planted=False)
    assert result_of(http_attempt(), seen)[0] is FAILED


# What makes an attempt unclear

EFFECT = {"canary": None, "allowed_if": {"effect": {"run": ["cat", "/run/x"], "output": "pwned"}}}


@pytest.mark.parametrize("arm", list(Arm))
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"object": target(exists=False)}, "the object /etc/shadow is absent"),
        ({"canary_planted": False}, "the canary could not be planted"),
        ({"effect_before": True}, "the effect was there before the attempt"),
        ({"subject_before": nobody()}, "the service is failed, not active"),
        ({"subject_before": nobody("activating")}, "the service is activating, not active"),
        ({"subject_before": nobody("active")}, "the service has no process"),
    ],
)
def test_what_is_not_ready_is_unclear(arm: Arm, changes: dict[str, Any], reason: str) -> None:
    for seen in (observation(arm, **changes), observation(arm, **{**READ_IT, **changes})):
        assert result_of(http_attempt(), seen, arm) == (UNCLEAR, reason)


@pytest.mark.parametrize(
    ("arm", "label", "reason"),
    [
        (ENFORCING, "system_u:system_r:unconfined_t:s0", "nginx (pid 483) runs in unconfined_t, not in httpd_t"),
        (PERMISSIVE, "system_u:system_r:init_t:s0", "nginx (pid 483) runs in init_t, not in httpd_t"),
        (ENFORCE, "unconfined", "nginx (pid 483) runs in unconfined, not in nginx"),
        (COMPLAIN, "other (complain)", "nginx (pid 483) runs in other, not in nginx"),
        (ENFORCING, "", "nginx (pid 483) runs in no domain, not in httpd_t"),
    ],
)
def test_one_worker_in_another_domain_is_unclear(arm: Arm, label: str, reason: str) -> None:
    good = label_in(arm)
    processes = subject(process(481, main=True, label=good), process(482, label=good), process(483, label=label))
    for changes in ({}, READ_IT):
        assert result_of(http_attempt(), observation(arm, subject_before=processes, **changes), arm) == (
            UNCLEAR,
            reason,
        )


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            subject(process(481, main=True)),
            subject(process(481, main=True), process(482)),
            "the service's workers appeared only during the attempt",
        ),
        (
            subject(process(481, main=True), process(482).model_copy(update={"uids": (0, 0, 0, 0)})),
            None,
            "nginx (pid 482) changed its user, groups or domain during the attempt",
        ),
        (
            subject(process(481, main=True), process(482, label="unconfined")),
            None,
            "nginx (pid 482) changed its user, groups or domain during the attempt",
        ),
    ],
)
def test_a_subject_that_was_not_at_rest_proves_nothing(before: Any, after: Any, words: str) -> None:
    changes = {"subject_before": before} | ({"subject_after": after} if after else {})
    assert result_of(http_attempt(), observation(DAC, **changes, **READ_IT), DAC) == (UNCLEAR, words)


def test_a_main_process_alone_before_and_after_is_at_rest() -> None:
    alone = subject(process(481, main=True, label=""))
    seen = observation(DAC, subject_before=alone, subject_after=alone, **READ_IT)
    assert result_of(http_attempt(), seen, DAC)[0] is ALLOWED


@pytest.mark.parametrize("key", ['"lsmlab-denied"', "(null)"])
def test_another_call_of_the_command_is_not_its_start(key: str) -> None:
    seen = run_observation(ENFORCING, syscall(auid=AUID, key=key), syscall(auid=AUID + 1, key='"lsmlab-subject"'))
    found, reason = result_of(run_attempt(), seen)
    assert found is UNCLEAR
    assert reason.startswith("the command was not started: ")


def test_a_command_that_was_not_started_is_no_block() -> None:
    seen = run_observation(ENFORCING, exit_code=1, errors="unshare: unshare failed: Operation not permitted")
    assert result_of(run_attempt(), seen)[0] is UNCLEAR


def test_in_the_control_arm_no_domain_is_asked_for() -> None:
    whatever = subject(label="whatever")
    seen = observation(DAC, subject_before=whatever, subject_after=whatever, **READ_IT)
    assert result_of(http_attempt(), seen, DAC)[0] is ALLOWED


def test_the_main_process_may_be_elsewhere_where_there_are_workers() -> None:
    processes = subject(process(481, main=True, label="system_u:system_r:init_t:s0"), process(482))
    assert result_of(http_attempt(), observation(subject_before=processes))[0] is BLOCKED


def test_a_main_process_alone_is_the_worker() -> None:
    processes = subject(process(481, main=True, label="system_u:system_r:init_t:s0"))
    assert result_of(http_attempt(), observation(subject_before=processes))[0] is UNCLEAR


@pytest.mark.parametrize(
    ("code", "errors"),
    [
        (126, "cat: Permission denied"),
        (127, "cat: No such file or directory"),
        (1, "cat: /etc/shadow: Permission denied"),
    ],
)
def test_a_command_that_was_not_started_is_unclear(code: int, errors: str) -> None:
    seen = run_observation(exit_code=code, errors=errors)  # as the agent says it, and as the command itself would
    words = f"the command was not started: exit status {code}, {errors!r}"
    assert result_of(run_attempt(blocked_if=[{"exit": code}]), seen) == (UNCLEAR, words)


@pytest.mark.parametrize("errors", ["cat: lsmlab: no\n", "lsmlab: no\n", ""])
@pytest.mark.parametrize("code", [97, 126, 127])
def test_the_exit_status_of_the_command_itself_is_its_own(code: int, errors: str) -> None:
    seen = run_observation(ENFORCING, exec_record(), exit_code=code, errors=errors)
    assert result_of(run_attempt(blocked_if=[{"exit": code}]), seen) == (BLOCKED, f"exit status {code}")


GOOD_RUN = {"exit_code": 0, "output": WORD, "errors": ""}


@pytest.mark.parametrize(
    ("arm", "records", "expected"),
    [
        (ENFORCING, [exec_record()], ALLOWED),
        (ENFORCING, [], UNCLEAR),
        (ENFORCING, [exec_record(auid=AUID + 1)], UNCLEAR),
        (ENFORCING, [exec_record(success="no")], UNCLEAR),
        (ENFORCING, [exec_record().replace('"lsmlab-subject"', '"other"')], UNCLEAR),
        (ENFORCING, [exec_record(subject="system_u:system_r:initrc_t:s0")], UNCLEAR),
        (ENFORCING, [exec_record(success="no", subject="system_u:system_r:initrc_t:s0"), exec_record()], ALLOWED),
        (ENFORCING, [exec_record(), exec_record(subject="system_u:system_r:initrc_t:s0")], UNCLEAR),
        (ENFORCE, [exec_record(subject="nginx")], ALLOWED),
        (ENFORCE, [exec_record(subject="unconfined")], UNCLEAR),
        (DAC, [exec_record()], ALLOWED),
        (DAC, [], UNCLEAR),
    ],
)
def test_the_subject_of_a_command_is_proved_by_its_exec_record(arm: Arm, records: list[str], expected: Result) -> None:
    assert result_of(run_attempt(), run_observation(arm, *records, **GOOD_RUN), arm)[0] is expected


def without_subject(record: str) -> str:
    return re.sub(r" subj=\S+", "", record)


def test_a_command_without_a_domain_ran_in_none() -> None:
    record = without_subject(exec_record())  # as a kernel without MAC writes it
    assert record != exec_record()
    assert result_of(run_attempt(), run_observation(DAC, record, **GOOD_RUN), DAC)[0] is ALLOWED
    words = "the command ran in no domain, not in httpd_t"
    assert result_of(run_attempt(), run_observation(ENFORCING, record, **GOOD_RUN)) == (UNCLEAR, words)


NOT_PROVED = "no exec record proves which domain the command ran in"


def test_a_proof_without_an_exec_record_is_none() -> None:
    for arm in Arm:
        assert result_of(run_attempt(), run_observation(arm, **GOOD_RUN), arm) == (UNCLEAR, NOT_PROVED)
    assert wrong_subject(run_observation(ENFORCING, **GOOD_RUN), (), "httpd_t") == NOT_PROVED
    assert wrong_subject(run_observation(ENFORCING), (), "httpd_t") == ""


def test_a_command_in_another_domain_is_told() -> None:
    seen = run_observation(ENFORCING, exec_record(subject="system_u:system_r:initrc_t:s0"))
    assert result_of(run_attempt(), seen) == (UNCLEAR, "the command ran in initrc_t, not in httpd_t")
    seen = run_observation(ENFORCING, **GOOD_RUN)
    assert result_of(run_attempt(), seen) == (UNCLEAR, "no exec record proves which domain the command ran in")


def test_a_refused_exec_is_a_block() -> None:
    seen = run_observation(ENFORCING, exec_record(success="no"), exit_code=126, errors="bash: cat: Permission denied")
    assert result_of(run_attempt(), seen) == (BLOCKED, "Permission denied (exit status 126)")


@pytest.mark.parametrize(
    "ended", [{"exit_code": 1}, {"exit_code": None, "signal": 9}, {"exit_code": None, "timed_out": True}]
)
def test_a_success_without_a_proved_subject_is_none(ended: dict[str, Any]) -> None:
    seen = run_observation(ENFORCING, canary_planted=None, effect_before=False, effect_after=True, errors="", **ended)
    assert result_of(run_attempt(**EFFECT), seen)[0] is UNCLEAR


# What counts as allowed


@pytest.mark.parametrize("arm", list(Arm))
def test_the_canary_proves_it(arm: Arm) -> None:
    assert result_of(http_attempt(), observation(arm, **READ_IT), arm) == (ALLOWED, "the canary was read, HTTP 200")


ALL = {"status": 200, "output": "lsmlab-{canary}:", "effect": {"run": ["true"], "output": "x"}}


@pytest.mark.parametrize("effect", [True, False])
@pytest.mark.parametrize("status", [200, 403])
@pytest.mark.parametrize("text", [f"lsmlab-{WORD}:", "lsmlab-0000:", ""])
@pytest.mark.parametrize(
    "wanted", [{"output"}, {"effect"}, {"output", "status"}, {"output", "status", "effect"}, {"effect", "status"}]
)
def test_all_that_is_asked_for_must_be_seen(wanted: set[str], text: str, status: int, effect: bool) -> None:
    spec = http_attempt(
        allowed_if={k: v for k, v in ALL.items() if k in wanted},
        canary=None if "output" not in wanted else {"file": "/etc/shadow", "line": "lsmlab-{canary}:"},
        blocked_if=[{"status": 500}],
    )
    seen = observation(output=text, http_status=status, effect_before=False, effect_after=effect)
    proved = {"output": WORD in text, "status": status == 200, "effect": effect}
    assert result_of(spec, seen)[0] is (ALLOWED if all(proved[w] for w in wanted) else UNCLEAR)


def test_a_text_without_a_canary_is_named() -> None:
    spec = http_attempt(kind="benign", canary=None, allowed_if={"output": "Our shop"})
    assert result_of(spec, observation(output="<h1>Our shop</h1>")) == (ALLOWED, "the output has 'Our shop'")


def test_the_effect_is_named() -> None:
    spec = http_attempt(**EFFECT)
    assert result_of(spec, observation(effect_before=False, effect_after=True)) == (ALLOWED, "the effect was seen")


def test_the_proof_comes_before_the_sign_of_a_block() -> None:
    seen = run_observation(ENFORCING, exec_record(), output=WORD)  # read it, then failed with EACCES elsewhere
    assert result_of(run_attempt(), seen) == (ALLOWED, "the canary was read")


def test_the_canary_in_the_errors_is_no_proof() -> None:
    assert result_of(run_attempt(), run_observation(ENFORCING, exec_record(), errors=WORD))[0] is UNCLEAR


def test_another_attempts_canary_is_no_proof() -> None:
    seen = observation(ENFORCING, canary="0" * 16, **READ_IT)
    assert result_of(http_attempt(), seen)[0] is UNCLEAR


# What counts as blocked


@pytest.mark.parametrize(
    ("sign", "changes", "reason"),
    [
        ({"status": 403}, {"http_status": 403}, "HTTP 403"),
        ({"status": 404}, {"http_status": 403}, ""),
        ({"status": 403}, {"http_status": None}, ""),
        ({"output": "Forbidden"}, {"output": "<h1>403 Forbidden</h1>"}, "Forbidden"),
        ({"output": "(?i)RESET by"}, {"output": "", "errors": "Connection reset by peer"}, "reset by"),
        ({"output": "nothing"}, {}, ""),
        ({"timeout": True}, {"timed_out": True, "http_status": None}, "timed out"),
        ({"timeout": True}, {}, ""),
        ({"status": 403, "output": "Forbidden"}, {}, "HTTP 403, Forbidden"),
        ({"status": 403, "output": "nothing"}, {}, ""),
        ({"status": 404, "output": "Forbidden"}, {}, ""),
    ],
)
def test_signs_of_a_blocked_request(sign: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    found = result_of(http_attempt(blocked_if=[sign]), observation(**changes))
    assert found == (BLOCKED, reason) if reason else found[0] is UNCLEAR


@pytest.mark.parametrize(
    ("sign", "changes", "reason"),
    [
        ({"exit": 126}, {"exit_code": 126}, "exit status 126"),
        ({"exit": 126}, {"exit_code": 127}, ""),
        ({"signal": 11}, {"exit_code": None, "signal": 11}, "signal 11"),
        ({"signal": 11}, {"exit_code": None, "signal": 9}, ""),
        ({"signal": 11}, {"exit_code": 11}, ""),
        ({"exit": 9}, {"exit_code": None, "signal": 9}, ""),
        ({"timeout": True}, {"exit_code": None, "timed_out": True}, "timed out"),
        ({"exit": 1, "output": "AVC"}, {"exit_code": 1, "errors": "an AVC"}, "exit status 1, AVC"),
        ({"exit": 1, "output": "AVC"}, {"exit_code": 2, "errors": "an AVC"}, ""),
        ({"timeout": True, "exit": 1}, {"exit_code": 1}, ""),
    ],
)
def test_signs_of_a_blocked_command(sign: dict[str, Any], changes: dict[str, Any], reason: str) -> None:
    seen = run_observation(ENFORCING, exec_record(), **{"errors": "", **changes})
    found = result_of(run_attempt(blocked_if=[sign]), seen)
    assert found == (BLOCKED, reason) if reason else found[0] is UNCLEAR


def test_any_of_several_signs_counts() -> None:
    spec = http_attempt(blocked_if=[{"status": 404}, {"status": 403}])
    assert result_of(spec, observation()) == (BLOCKED, "HTTP 403")


@pytest.mark.parametrize(
    ("errors", "exit_code", "expected"),
    [
        ("cat: /etc/shadow: Permission denied\n", 1, BLOCKED),
        ("chown: changing ownership: Operation not permitted\n", 1, BLOCKED),
        ("cat: /etc/shadow: Permission denied\n", 0, UNCLEAR),
        ("cat: /etc/shadow: Permission denied\n", None, UNCLEAR),  # killed, or not ended: nothing is declared
        ("cat: /etc/shadow: No such file or directory\n", 1, UNCLEAR),
        ("", 1, UNCLEAR),
    ],
)
def test_a_command_refused_with_eacces_or_eperm_is_blocked(
    errors: str, exit_code: int | None, expected: Result
) -> None:
    seen = run_observation(ENFORCING, exec_record(), errors=errors, exit_code=exit_code)
    assert result_of(run_attempt(), seen)[0] is expected


def test_a_refusal_that_only_the_output_tells_is_no_sign() -> None:
    seen = run_observation(ENFORCING, exec_record(), errors="", output="Permission denied")
    assert result_of(run_attempt(), seen)[0] is UNCLEAR


def test_a_request_is_not_blocked_by_what_its_errors_say() -> None:
    for status in (500, None):
        seen = observation(http_status=status, errors="Permission denied")
        assert result_of(http_attempt(), seen)[0] is UNCLEAR


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"http_status": 502}, "HTTP 502"),
        ({"http_status": None, "output": "", "errors": "\n Connection refused\n"}, "'Connection refused'"),
        ({"http_status": None, "output": ""}, "'no output'"),
        ({"http_status": None, "output": "", "errors": "x" * 200}, f"'{'x' * 160}'"),
        ({"timed_out": True, "http_status": None, "seconds": 15.0}, "timed out after 15 s"),
    ],
)
def test_neither_proof_nor_sign_is_unclear(changes: dict[str, Any], words: str) -> None:
    seen = observation(**changes)
    assert result_of(http_attempt(), seen) == (UNCLEAR, f"neither proof nor sign of a block: {words}")
    assert ending(seen) == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exit_code": 7, "errors": "\n cat: it is broken\n"}, "exit status 7, 'cat: it is broken'"),
        ({"exit_code": 7, "errors": "", "output": "so far\n"}, "exit status 7, 'so far'"),
        ({"exit_code": 7, "errors": "x" * 200}, f"exit status 7, '{'x' * 160}'"),
        ({"exit_code": 0, "errors": ""}, "exit status 0, 'no output'"),
        ({"exit_code": None, "signal": 9}, "signal 9"),
        ({"exit_code": None, "timed_out": True, "seconds": 3.0}, "timed out after 3 s"),
    ],
)
def test_how_a_command_ended(changes: dict[str, Any], words: str) -> None:
    assert ending(run_observation(ENFORCING, exec_record(), **changes)) == words


# own_denials


def test_own_denials_are_those_of_the_services_processes() -> None:
    lines = [
        avc(serial=1),
        avc(serial=2, pid=999),
        avc(serial=3, pid=481),
        avc(serial=4, pid=600),
        syscall(serial=4, pid=600),
    ]
    assert [d.event[1] for d in own_denials(observation(ENFORCING, *lines))] == [1, 3, 4]  # 600 is a child of 481


def fork(parent: int, pid: int, serial: int = 5) -> str:
    """`pid`, which `parent` has started, starts another: 7 in its own namespace."""
    return syscall(serial=serial, number=56, success="yes", result=7, ppid=parent, pid=pid, key='"lsmlab-fork"')


def test_own_denials_are_those_of_the_services_descendants() -> None:
    denied = avc(pid=702, serial=9), syscall(pid=702, ppid=701, serial=9)
    assert own_denials(observation(ENFORCING, *denied)) == ()
    # a parent's record may come after what its child did
    started = fork(700, 701, 10), fork(481, 482, 6), fork(482, 700, 11)
    assert len(own_denials(observation(ENFORCING, *denied, *started))) == 1
    others = fork(900, 700, 6), fork(700, 701, 7)
    assert own_denials(observation(ENFORCING, *denied, *others)) == ()
    assert own_denials(observation(ENFORCING, avc(pid=7), fork(481, 482))) == ()  # a number of another namespace


@pytest.mark.parametrize(
    "line",
    [
        syscall(serial=6, success="yes", ppid=482, pid=700, key='"lsmlab-denied"'),
        fork(482, 700).replace("type=SYSCALL", "type=USER"),
        fork(482, 700).replace(" pid=700", ""),
        fork(482, 700).replace(" ppid=482", ""),
    ],
)
def test_only_the_kernels_record_of_a_fork_makes_a_descendant(line: str) -> None:
    assert own_denials(observation(ENFORCING, avc(pid=700), line)) == ()


def test_every_process_of_the_service_has_descendants() -> None:
    started = fork(481, 700, 6), fork(482, 800, 7), fork(481, 900, 8), fork(800, 801, 9)
    denied = [avc(pid=pid, serial=pid) for pid in (700, 801, 900)]
    assert len(own_denials(observation(ENFORCING, *started, *denied))) == 3


def test_processes_that_started_each_other_are_followed_once() -> None:
    rounds = fork(482, 700, 6), fork(700, 701, 7), fork(701, 700, 8), fork(701, 482, 9), avc(pid=701, serial=10)
    assert len(own_denials(observation(ENFORCING, *rounds))) == 1


def test_own_denials_of_a_process_that_came_later() -> None:
    after = subject(process(481, main=True), process(490))
    assert len(own_denials(observation(ENFORCING, avc(pid=490), subject_after=after))) == 1


def test_own_denials_of_a_command_are_those_with_its_audit_user_id() -> None:
    lines = [avc(serial=150), syscall(serial=150, auid=AUID), avc(serial=151), avc(serial=152), syscall(serial=152)]
    assert [d.event[1] for d in own_denials(run_observation(ENFORCING, exec_record(), *lines))] == [150]


def test_own_denials_of_a_command_begin_with_its_exec() -> None:
    launcher = [avc(serial=140), syscall(serial=140, auid=AUID)]
    own = [avc("execute", stamp="1795509852.100", serial=146), exec_record()]
    assert own_denials(run_observation(ENFORCING, *launcher)) == ()
    assert [d.event[1] for d in own_denials(run_observation(ENFORCING, *launcher, *own))] == [146]


def test_own_denials_of_a_command_whose_exec_was_refused() -> None:
    refused = exec_record(success="no")
    denied = avc("entrypoint", stamp="1795509852.100", serial=146)
    assert len(own_denials(run_observation(ENFORCING, denied, refused, exit_code=126))) == 1


# attribute


def expectation(**changes: Any) -> DenialExpectation:
    base = {"attempt": "read-shadow", "permissions": ["read", "open"]}
    return DenialExpectation.model_validate({**base, **changes}, strict=False)


def attributed(
    seen: Observation,
    expected: DenialExpectation | None,
    framework: Framework = SELINUX,
    what: Scenario | None = None,
) -> Attribution:
    return attribute(what or scenario(), framework, expected, seen)


def test_the_fitting_denial_is_found() -> None:
    found = attributed(
        observation(ENFORCING, avc(serial=1, pid=999), avc("getattr", serial=2), avc("open", "read"), syscall()),
        expectation(),
    )
    assert found.denial is not None
    assert found.denial.permissions == ("open", "read")
    assert found.misses == ()


@pytest.mark.parametrize(
    ("lines", "changes", "miss"),
    [
        ([avc(source="system_u:system_r:init_t:s0")], {}, "another subject (init_t, not httpd_t)"),
        ([avc(pid=999)], {}, "another process (pid 999)"),
        ([avc(permissive=1)], {}, "not effective: logged only"),
        ([avc(), syscall(success="yes", result=3)], {}, "not effective: the call succeeded all the same"),
        ([avc("getattr", "ioctl")], {}, "another permission (getattr ioctl, not read or open)"),
        ([avc()], {"operation": "open"}, "another operation (, not open)"),
        ([avc(tclass="dir")], {}, "another class (dir, not file)"),
        ([avc()], {"class": "dir"}, "another class (file, not dir)"),
        ([avc(target="system_u:object_r:etc_t:s0")], {}, "another object type (etc_t, not shadow_t)"),
        ([avc()], {"selinux_object": "etc_t"}, "another object type (shadow_t, not etc_t)"),
        ([avc(ino=590)], {}, "another object (inode 590 on vda, not 589 on vda)"),
        ([avc(dev="tmpfs")], {}, "another object (inode 589 on tmpfs, not 589 on vda)"),
        ([avc()], {"path": "/etc/gshadow"}, "another object (shadow, not /etc/gshadow)"),
        ([], {}, None),
        ([apparmor()], {}, None),  # another framework's record is no near miss
    ],
)
def test_what_does_not_fit_is_told(lines: list[str], changes: dict[str, Any], miss: str | None) -> None:
    found = attributed(observation(ENFORCING, *lines), expectation(**changes))
    assert found.denial is None
    assert [m.partition(": type=")[0] for m in found.misses] == ([miss] if miss else [])


@pytest.mark.parametrize(
    ("lines", "changes"),
    [
        ([avc()], {}),
        ([avc(), syscall()], {}),
        ([avc("open", "read", "getattr")], {"permissions": ["open"]}),
        ([avc(ino=12, target="system_u:object_r:etc_t:s0")], {"selinux_object": "etc_t"}),
        ([avc(key="path", name=b"/etc/gshadow", ino=12)], {"path": "/etc/gshadow"}),
        ([avc(name=b"gshadow", ino=12), path_record(b"/srv/../etc/gshadow", 12)], {"path": "/etc/gshadow"}),
        (
            [avc("name_connect", tclass="tcp_socket", ino=0, dev="")],
            {"class": "tcp_socket", "permissions": ["name_connect"]},
        ),
    ],
)
def test_what_fits(lines: list[str], changes: dict[str, Any]) -> None:
    assert attributed(observation(ENFORCING, *lines), expectation(**changes)).denial is not None


def test_without_an_expectation_subject_and_object_still_count() -> None:
    assert attributed(observation(ENFORCING, avc("ioctl")), None).denial is not None
    assert attributed(observation(ENFORCING, avc(ino=1)), None).denial is None


def test_another_frameworks_record_before_it_hides_nothing() -> None:
    assert attributed(observation(ENFORCING, apparmor(), avc()), expectation()).denial is not None


def test_the_subject_that_is_expected_may_be_another() -> None:
    helper = avc(source="system_u:system_r:helper_t:s0")
    assert attributed(observation(ENFORCING, helper), expectation(subject="helper_t")).denial is not None
    found = attributed(observation(ENFORCING, avc()), expectation(subject="helper_t"))
    assert found.misses[0].startswith("another subject (httpd_t, not helper_t)")


def test_the_nearest_miss_comes_first() -> None:
    others = avc(serial=1, source="system_u:system_r:a_t:s0"), avc(serial=2, source="system_u:system_r:b_t:s0")
    found = attributed(observation(ENFORCING, *others, avc(serial=3, permissive=1)), expectation())
    assert [miss.partition(": type=")[0] for miss in found.misses] == [
        "not effective: logged only",
        "another subject (a_t, not httpd_t)",
        "another subject (b_t, not httpd_t)",
    ]


def test_a_commands_denial_is_found_by_its_audit_user_id() -> None:
    assert attributed(run_observation(ENFORCING, avc(pid=700), syscall(auid=AUID)), expectation()).denial is not None
    found = attributed(run_observation(ENFORCING, avc(), syscall()), expectation())
    assert found.denial is None
    assert found.misses[0].startswith("another process (pid 482)")


def test_a_file_of_the_same_name_elsewhere_does_not_fit() -> None:
    seen = observation(ENFORCING, avc(ino=12), syscall(), path_record(b"/var/backups/shadow", 12))
    assert attributed(seen, expectation(path="/etc/shadow")).denial is None


AA = {"permissions": ["r"], "operation": "open"}


@pytest.mark.parametrize(
    ("record", "changes", "miss"),
    [
        (apparmor(), {}, None),
        (apparmor(mask="wr"), {}, None),
        (apparmor(kind="KILLED"), {}, None),
        (apparmor(rule_class=None), {"class": "file"}, None),
        (apparmor(name=b"/etc/gshadow"), {"path": "/etc/gshadow"}, None),
        (apparmor(profile=b"other"), {}, "another subject (other, not nginx)"),
        (apparmor(profile=b"nginx//null-/bin/sh"), {}, "another subject (nginx//null-/bin/sh, not nginx)"),
        (apparmor(pid=999), {}, "another process (pid 999)"),
        (apparmor(kind="ALLOWED"), {}, "not effective: logged only"),
        (apparmor(mask="w"), {}, "another permission (w, not r)"),
        (apparmor(operation="exec"), {}, "another operation (exec, not open)"),
        (apparmor(rule_class="net"), {"class": "file"}, "another class (net, not file)"),
        (apparmor(name=b"/etc/passwd"), {}, "another object (/etc/passwd, not /etc/shadow)"),
        (apparmor(name=b"/etc/passwd"), {"class": "file"}, "another object (/etc/passwd, not /etc/shadow)"),
        (apparmor(), {"operation": None}, None),
        (apparmor(rule_class="mount"), {"class": "mount"}, None),
        (apparmor(rule_class="mount"), {"class": "mount", "path": "/mnt"}, "another object (/etc/shadow, not /mnt)"),
        (apparmor(), {"path": "/etc/gshadow"}, "another object (/etc/shadow, not /etc/gshadow)"),
    ],
)
def test_apparmor_denials(record: str, changes: dict[str, Any], miss: str | None) -> None:
    found = attributed(observation(ENFORCE, record), expectation(**{**AA, **changes}), APPARMOR)
    assert (found.denial is None) is (miss is not None)
    assert [m.partition(": type=")[0] for m in found.misses] == ([miss] if miss else [])


def test_apparmor_capability_denial_has_no_path() -> None:
    expected = expectation(permissions=["dac_override"], **{"class": "cap"})
    seen = observation(ENFORCE, sample("apparmor-capability.log"))
    assert attributed(seen, expected, APPARMOR).denial is not None
    assert attributed(seen, expectation(permissions=["dac_override"]), APPARMOR).denial is None


def test_apparmor_compares_with_the_resolved_path() -> None:
    place = target("/etc/shadow").model_copy(update={"path": "/etc/link", "real": "/etc/shadow"})
    what = scenario(object={"path": "/etc/link", "class": "file"})
    seen = observation(ENFORCE, apparmor(), object=place)
    assert attributed(seen, expectation(**AA), APPARMOR, what).denial is not None


def test_apparmor_compares_with_the_scenarios_path_where_the_object_was_not_looked_at() -> None:
    for name, fits in ((b"/etc/shadow", True), (b"/etc/passwd", False)):
        seen = observation(ENFORCE, apparmor(name=name), object=None)
        assert (attributed(seen, expectation(**AA), APPARMOR).denial is not None) is fits


def test_apparmor_success_of_the_call_voids_the_denial() -> None:
    call = syscall(stamp="1795509850.164", serial=216, success="yes", subject="nginx")
    found = attributed(observation(ENFORCE, apparmor(), call), expectation(**AA), APPARMOR)
    assert found.misses[0].startswith("not effective: the call succeeded all the same")


def test_the_captured_windows_are_attributed() -> None:
    seen = observation(
        ENFORCING, sample("selinux-enforcing.log"), object=target(ino=590), subject_before=subject(process(457))
    )
    assert judge(http_attempt(), ENFORCING, seen, "httpd_t").result is BLOCKED
    assert attributed(seen, expectation()).denial is not None
    seen = observation(
        ENFORCE, sample("apparmor-enforce.log"), subject_before=subject(process(587, label="nginx (enforce)"))
    )
    assert judge(http_attempt(), ENFORCE, seen, "nginx").result is BLOCKED
    assert attributed(seen, expectation(**AA), APPARMOR).denial is not None


# conclude

CONTROL_OK = judged()
LOGGED = judged(denied=denial(logged=True))
DENIED = judged(result=BLOCKED, denied=denial(), attributed=True)
HIDDEN = judged(result=BLOCKED)
BENIGN = judged("front-page", kind=AttemptKind.BENIGN)


def benign(result: Result, denied: Denial | None = None) -> JudgedAttempt:
    return judged("front-page", result, kind=AttemptKind.BENIGN, denied=denied)


def attack(result: Result, name: str = "read-shadow", **changes: Any) -> JudgedAttempt:
    return judged(name, result, **changes)


def second(attempt: JudgedAttempt) -> JudgedAttempt:
    return attempt.model_copy(update={"attempt": "second"})


def verdict_of(
    control: Sequence[JudgedAttempt] | JudgedArm = (CONTROL_OK, BENIGN),
    logging: Sequence[JudgedAttempt] | JudgedArm = (LOGGED, BENIGN),
    enforcing: Sequence[JudgedAttempt] | JudgedArm = (DENIED, BENIGN),
    framework: Framework = SELINUX,
) -> Conclusion:
    given_arms = zip(arms_of(framework), (control, logging, enforcing), strict=True)
    return conclude(framework, {n: a if isinstance(a, JudgedArm) else judged_arm(n, *a) for n, a in given_arms})


def explained(*, permitted: bool) -> DacExplanation:
    return DacExplanation(permitted=permitted, rule="other bits: /etc/shadow is -rw-r-----", steps=())


BROKEN = judged_arm(ENFORCING, error="the guest died")
DOWN = judged_arm(ENFORCING, attack(UNCLEAR), benign(UNCLEAR), service_active=False, setup_denials=(denial(),))
DAC_SAYS_NO = attack(BLOCKED, dac=explained(permitted=False))

VERDICTS: dict[str, tuple[Mapping[str, Any], Verdict, str]] = {
    "all as wished": ({}, Verdict.CONTAINED, "DAC permits read-shadow; SELinux denies httpd_t { read } on shadow"),
    "no benign attempt": (
        {"control": (CONTROL_OK,), "logging": (LOGGED,), "enforcing": (DENIED,)},
        Verdict.CONTAINED,
        "DAC permits",
    ),
    "an explicit deny in the logging arm": (
        {"logging": (DENIED, BENIGN)},
        Verdict.CONTAINED,
        "DAC permits",
    ),
    "denials in benign work that works": (
        {"enforcing": (DENIED, benign(ALLOWED, denial()))},
        Verdict.CONTAINED,
        "DAC permits",
    ),
    "the attack succeeds": (
        {"enforcing": (attack(ALLOWED, reason="the canary was read"), BENIGN)},
        Verdict.NOT_CONTAINED,
        "read-shadow succeeds under SELinux (the canary was read)",
    ),
    "it succeeds and is logged only": (
        {"enforcing": (LOGGED, BENIGN)},
        Verdict.NOT_CONTAINED,
        "the kernel only logged it: type=AVC",
    ),
    "one of two attacks succeeds": (
        {
            "control": (CONTROL_OK, second(CONTROL_OK)),
            "logging": (LOGGED, second(LOGGED)),
            "enforcing": (DENIED, second(CONTROL_OK)),
        },
        Verdict.NOT_CONTAINED,
        "second succeeds",
    ),
    "breach before error elsewhere": (
        {"logging": judged_arm(PERMISSIVE, error="boom"), "enforcing": (CONTROL_OK, benign(FAILED))},
        Verdict.NOT_CONTAINED,
        "read-shadow succeeds",
    ),
    "breach before another attack blocked in the control": (
        {"control": (CONTROL_OK, second(DAC_SAYS_NO)), "enforcing": (CONTROL_OK, second(DENIED))},
        Verdict.NOT_CONTAINED,
        "read-shadow succeeds",
    ),
    "a success that the control cannot confirm": (
        {"control": (attack(UNCLEAR), BENIGN), "enforcing": (CONTROL_OK, BENIGN)},
        Verdict.INCONCLUSIVE,
        "dac: read-shadow",
    ),
    "a success where the control failed": (
        {"control": (attack(FAILED), BENIGN), "enforcing": (CONTROL_OK, BENIGN)},
        Verdict.ERROR,
        "dac: read-shadow",
    ),
    "the control failed": ({"control": (attack(FAILED), BENIGN)}, Verdict.ERROR, "dac: read-shadow: it was failed"),
    "the logging arm failed": ({"logging": (attack(FAILED), BENIGN)}, Verdict.ERROR, "selinux-permissive: read-shadow"),
    "the enforcing arm failed": (
        {"enforcing": (attack(FAILED), BENIGN)},
        Verdict.ERROR,
        "selinux-enforcing: read-shadow",
    ),
    "a benign attempt failed": ({"logging": (LOGGED, benign(FAILED))}, Verdict.ERROR, "selinux-permissive: front-page"),
    "an arm broke": ({"enforcing": BROKEN}, Verdict.ERROR, "selinux-enforcing: read-shadow: the guest died"),
    "an attempt is missing in one arm": (
        {"enforcing": (DENIED,)},
        Verdict.ERROR,
        "front-page: the attempt was not made",
    ),
    "error before unclear": ({"control": (attack(UNCLEAR), benign(FAILED))}, Verdict.ERROR, "dac: front-page"),
    "unclear in the control": ({"control": (attack(UNCLEAR), BENIGN)}, Verdict.INCONCLUSIVE, "dac: read-shadow"),
    "unclear in the logging arm": ({"logging": (attack(UNCLEAR), BENIGN)}, Verdict.INCONCLUSIVE, "selinux-permissive:"),
    "unclear in the enforcing arm": (
        {"enforcing": (attack(UNCLEAR), BENIGN)},
        Verdict.INCONCLUSIVE,
        "selinux-enforcing:",
    ),
    "a benign attempt unclear in the control": (
        {"control": (CONTROL_OK, benign(UNCLEAR))},
        Verdict.INCONCLUSIVE,
        "dac:",
    ),
    "unclear before unattributed": ({"enforcing": (HIDDEN, benign(UNCLEAR))}, Verdict.INCONCLUSIVE, "front-page"),
    "unclear elsewhere before overblocked": (
        {
            "control": (CONTROL_OK, BENIGN),
            "logging": (attack(UNCLEAR), BENIGN),
            "enforcing": (DENIED, benign(BLOCKED, denial())),
        },
        Verdict.INCONCLUSIVE,
        "selinux-permissive: read-shadow",
    ),
    "DAC forbids it": ({"control": (DAC_SAYS_NO, BENIGN)}, Verdict.DAC_BLOCKED, "DAC alone forbids it: other bits"),
    "DAC forbids it, and the other arms broke": (
        {"control": (DAC_SAYS_NO, BENIGN), "logging": judged_arm(PERMISSIVE, error="boom"), "enforcing": BROKEN},
        Verdict.DAC_BLOCKED,
        "DAC alone",
    ),
    "DAC forbids it, and other attempts are unclear": (
        {
            "control": (DAC_SAYS_NO, benign(UNCLEAR)),
            "logging": (attack(UNCLEAR), BENIGN),
            "enforcing": (attack(FAILED), BENIGN),
        },
        Verdict.DAC_BLOCKED,
        "DAC alone",
    ),
    "DAC forbids one attack, and another failed in the control": (
        {"control": (DAC_SAYS_NO, attack(FAILED, "second"))},
        Verdict.ERROR,
        "dac: second",
    ),
    "DAC forbids one attack, and another is unclear in the control": (
        {"control": (DAC_SAYS_NO, attack(UNCLEAR, "second"))},
        Verdict.INCONCLUSIVE,
        "dac: second",
    ),
    "DAC permits it, yet it is blocked": (
        {"control": (attack(BLOCKED, dac=explained(permitted=True)), BENIGN)},
        Verdict.CONTROL_BLOCKED,
        "blocked without MAC (it was blocked), and DAC is not why: other bits",
    ),
    "blocked in the control, and nobody knows why": (
        {"control": (HIDDEN, BENIGN)},
        Verdict.CONTROL_BLOCKED,
        "blocked without MAC",
    ),
    "a block without a denial": ({"enforcing": (HIDDEN, BENIGN)}, Verdict.UNATTRIBUTED, "no denial in its window"),
    "a block with a denial that does not fit": (
        {
            "enforcing": (
                HIDDEN.model_copy(update={"attribution": Attribution(denial=None, misses=("another class",))}),
                BENIGN,
            )
        },
        Verdict.UNATTRIBUTED,
        "nearest: another class",
    ),
    "blocked in the logging arm too, with no denial": (
        {"logging": (HIDDEN, BENIGN)},
        Verdict.UNATTRIBUTED,
        "read-shadow: blocked in selinux-permissive as well",
    ),
    "unattributed before overblocked": (
        {"enforcing": (HIDDEN, benign(BLOCKED, denial()))},
        Verdict.UNATTRIBUTED,
        "read-shadow",
    ),
    "one of two attacks unattributed": (
        {
            "control": (CONTROL_OK, second(CONTROL_OK)),
            "logging": (LOGGED, second(LOGGED)),
            "enforcing": (DENIED, second(HIDDEN)),
        },
        Verdict.UNATTRIBUTED,
        "second",
    ),
    "benign work is denied": (
        {"enforcing": (DENIED, benign(BLOCKED, denial()))},
        Verdict.OVERBLOCKED,
        "front-page: the service's own work is denied (it was blocked): type=AVC",
    ),
    "benign work is blocked in the logging arm too, with no denial": (
        {"logging": (LOGGED, benign(BLOCKED)), "enforcing": (DENIED, benign(BLOCKED, denial()))},
        Verdict.INCONCLUSIVE,
        "selinux-permissive: front-page: does not work (it was blocked)",
    ),
    "benign work is denied in the logging arm too": (
        {"logging": (LOGGED, benign(BLOCKED, denial())), "enforcing": (DENIED, benign(BLOCKED, denial()))},
        Verdict.OVERBLOCKED,
        "front-page: the service's own work is denied",
    ),
    "benign work is unclear, with a denial": (
        {"enforcing": (DENIED, benign(UNCLEAR, denial()))},
        Verdict.INCONCLUSIVE,
        "front-page",
    ),
    "the service is denied at its start": (
        {"enforcing": DOWN},
        Verdict.OVERBLOCKED,
        "front-page: the service's own work is denied (it was unclear): type=AVC",
    ),
    "the service is denied at its start, and there is no benign attempt": (
        {
            "control": (CONTROL_OK,),
            "logging": (LOGGED,),
            "enforcing": judged_arm(ENFORCING, attack(UNCLEAR), service_active=False, setup_denials=(denial(),)),
        },
        Verdict.OVERBLOCKED,
        "the service cannot start: type=AVC",
    ),
    "the service does not start, and no denial says why": (
        {"enforcing": judged_arm(ENFORCING, attack(UNCLEAR), benign(UNCLEAR), service_active=False)},
        Verdict.INCONCLUSIVE,
        "selinux-enforcing: read-shadow",
    ),
    "a denial at the start of a service that runs excuses nothing": (
        {"enforcing": judged_arm(ENFORCING, attack(UNCLEAR), BENIGN, setup_denials=(denial(),))},
        Verdict.INCONCLUSIVE,
        "selinux-enforcing: read-shadow",
    ),
    "benign work is broken in the control": (
        {"control": (CONTROL_OK, benign(BLOCKED))},
        Verdict.INCONCLUSIVE,
        "dac: front-page: does not work",
    ),
    "benign work is broken everywhere": (
        {
            "control": (CONTROL_OK, benign(BLOCKED)),
            "logging": (LOGGED, benign(BLOCKED)),
            "enforcing": (DENIED, benign(BLOCKED, denial())),
        },
        Verdict.INCONCLUSIVE,
        "dac: front-page: does not work",
    ),
    "benign work fails in the enforcing arm without a denial": (
        {"enforcing": (DENIED, benign(BLOCKED))},
        Verdict.INCONCLUSIVE,
        "selinux-enforcing: front-page: does not work",
    ),
    "benign work fails in the enforcing arm, only logged": (
        {"enforcing": (DENIED, benign(BLOCKED, denial(logged=True)))},
        Verdict.INCONCLUSIVE,
        "selinux-enforcing: front-page: does not work",
    ),
    "benign work fails with a denial of a call that succeeded": (
        {"enforcing": (DENIED, benign(BLOCKED, denial(spoilt=True)))},
        Verdict.INCONCLUSIVE,
        "selinux-enforcing: front-page: does not work",
    ),
    "benign work fails in the logging arm": (
        {"logging": (LOGGED, benign(BLOCKED))},
        Verdict.INCONCLUSIVE,
        "selinux-permissive: front-page: does not work",
    ),
    "no attack": (
        {"control": (BENIGN,), "logging": (BENIGN,), "enforcing": (BENIGN,)},
        Verdict.ERROR,
        "dac: no attack was made",
    ),
}


@pytest.mark.parametrize(("arms", "verdict", "words"), list(VERDICTS.values()), ids=list(VERDICTS))
def test_verdict(arms: Mapping[str, Any], verdict: Verdict, words: str) -> None:
    found = verdict_of(**arms)
    assert found.verdict is verdict
    assert words in found.reason


READING = denials(parse(f"{avc('open', 'read')}\n{syscall()}"))[0]
REASONS: dict[str, tuple[Mapping[str, Any], str]] = {
    "contained, by two permissions": (
        {"enforcing": (judged(result=BLOCKED, denied=READING, attributed=True), BENIGN)},
        "DAC permits read-shadow; SELinux denies httpd_t { open read } on shadow",
    ),
    "a breach with no record": (
        {"enforcing": (attack(ALLOWED), BENIGN)},
        "read-shadow succeeds under SELinux (it was allowed)",
    ),
    "a block with no record": (
        {"enforcing": (HIDDEN, BENIGN)},
        "read-shadow: blocked (it was blocked), and no effective denial accounts for it; no denial in its window",
    ),
    "blocked in the control, unexplained": (
        {"control": (HIDDEN, BENIGN)},
        "read-shadow: blocked without MAC (it was blocked), and whether DAC is why was not looked at",
    ),
}


@pytest.mark.parametrize(("arms", "reason"), list(REASONS.values()), ids=list(REASONS))
def test_the_reason_says_no_more_than_was_seen(arms: Mapping[str, Any], reason: str) -> None:
    assert verdict_of(**arms).reason == reason


def test_an_attack_on_mac_is_weighed_against_the_unconfined_service() -> None:
    names = arms_of(SELINUX, Control.UNCONFINED)
    assert NO_SELINUX in names
    attempts = {name: judged_arm(name, DENIED if name is ENFORCING else CONTROL_OK) for name in names}
    assert conclude(SELINUX, attempts, Control.UNCONFINED) == Conclusion(
        verdict=Verdict.CONTAINED,
        reason="read-shadow succeeds where the service is not confined; SELinux denies httpd_t { read } on shadow",
    )
    blocked = attempts | {NO_SELINUX: judged_arm(NO_SELINUX, HIDDEN)}
    assert conclude(SELINUX, blocked, Control.UNCONFINED) == Conclusion(
        verdict=Verdict.CONTROL_BLOCKED,
        reason="read-shadow: blocked unconfined (it was blocked), and whether DAC is why was not looked at",
    )
    missing = {name: arm for name, arm in attempts.items() if name is not NO_SELINUX}
    for arms in (missing, missing | {DAC: judged_arm(DAC, CONTROL_OK)}):
        assert conclude(SELINUX, arms, Control.UNCONFINED).verdict is Verdict.ERROR


def test_every_verdict_is_in_the_table() -> None:
    assert {v for _, v, _ in VERDICTS.values()} == set(Verdict)


@pytest.mark.parametrize("framework", list(Framework))
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_arm_is_an_error(framework: Framework, missing: int) -> None:
    attempts = (CONTROL_OK, LOGGED, DENIED)
    arms = {n: judged_arm(n, a) for n, a in zip(arms_of(framework), attempts, strict=True)}
    name = arms_of(framework)[missing]
    del arms[name]
    assert conclude(framework, arms) == Conclusion(
        verdict=Verdict.ERROR, reason=f"{name}: read-shadow: the arm was not run"
    )


def test_no_arm_at_all_is_an_error() -> None:
    assert conclude(SELINUX, {}) == Conclusion(verdict=Verdict.ERROR, reason="dac: the arm was not run")


def test_the_arms_of_the_other_framework_do_not_count() -> None:
    arms = {
        DAC: judged_arm(DAC, CONTROL_OK),
        PERMISSIVE: judged_arm(PERMISSIVE, LOGGED),
        ENFORCING: judged_arm(ENFORCING, CONTROL_OK),
        COMPLAIN: judged_arm(COMPLAIN, LOGGED),
        ENFORCE: judged_arm(ENFORCE, judged(result=BLOCKED, denied=denial(framework=APPARMOR), attributed=True)),
    }
    assert conclude(SELINUX, arms).verdict is Verdict.NOT_CONTAINED
    assert conclude(APPARMOR, arms) == Conclusion(
        verdict=Verdict.CONTAINED, reason="DAC permits read-shadow; AppArmor denies nginx { r } on /etc/shadow"
    )


# conclude: what holds for every table of results

DENIALS = (denial(), denial(logged=True), denial(spoilt=True))


@st.composite
def attempts_of(draw: st.DrawFn, name: str, kind: AttemptKind) -> JudgedAttempt:
    result = draw(st.sampled_from(Result))
    denied = draw(st.sampled_from([None, *DENIALS]))
    attributed_too = result is BLOCKED and denied is not None and denied.effective and draw(st.booleans())
    dac = draw(st.sampled_from([None, explained(permitted=True), explained(permitted=False)]))
    return judged(name, result, kind=kind, denied=denied, attributed=attributed_too, dac=dac)


@st.composite
def arm_of(draw: st.DrawFn, arm: Arm, kinds: Mapping[str, AttemptKind]) -> JudgedArm:
    made = [draw(attempts_of(n, kind)) for n, kind in kinds.items() if draw(st.integers(0, 9))]
    return judged_arm(
        arm,
        *made,
        error=draw(st.sampled_from(["", "", "", "boom"])),
        service_active=draw(st.sampled_from([True, True, False])),
        setup_denials=draw(st.sampled_from([(), (denial(),)])),  # effective ones: that is their contract
    )


@st.composite
def tables(draw: st.DrawFn) -> dict[Arm, JudgedArm]:
    attacks, benigns = draw(st.integers(1, 2)), draw(st.integers(0, 2))
    kinds = {f"attack-{n}": AttemptKind.ATTACK for n in range(attacks)}
    kinds |= {f"benign-{n}": AttemptKind.BENIGN for n in range(benigns)}
    return {arm: draw(arm_of(arm, kinds)) for arm in arms_of(SELINUX) if draw(st.integers(0, 19))}


def results(arms: Mapping[Arm, JudgedArm], arm: Arm, kind: AttemptKind) -> dict[str, JudgedAttempt]:
    return {a.attempt: a for a in arms[arm].attempts if a.kind is kind} if arm in arms else {}


def is_breach(arms: Mapping[Arm, JudgedArm]) -> bool:
    control, enforcing = (results(arms, arm, AttemptKind.ATTACK) for arm in (DAC, ENFORCING))
    return any(a.result is ALLOWED and n in enforcing and enforcing[n].result is ALLOWED for n, a in control.items())


@given(tables())
def test_every_table_has_a_verdict_and_a_breach_has_its_own(arms: dict[Arm, JudgedArm]) -> None:
    found = conclude(SELINUX, arms)
    assert found.reason
    assert (found.verdict is Verdict.NOT_CONTAINED) is is_breach(arms)
    assert conclude(SELINUX, arms) == found


@st.composite
def mostly_good_tables(draw: st.DrawFn) -> dict[Arm, JudgedArm]:
    """A table that is contained, with up to two cells replaced: near the border."""
    kinds = {"attack-0": AttemptKind.ATTACK, "attack-1": AttemptKind.ATTACK, "benign-0": AttemptKind.BENIGN}
    arms: dict[Arm, JudgedArm] = {}
    good = {DAC: CONTROL_OK, PERMISSIVE: LOGGED, ENFORCING: DENIED}
    spoilt = draw(st.sets(st.tuples(st.sampled_from(sorted(good)), st.sampled_from(sorted(kinds))), max_size=2))
    for arm, attempt in good.items():
        made = [
            draw(attempts_of(name, kind))
            if (arm, name) in spoilt
            else attempt.model_copy(update={"attempt": name})
            if kind is AttemptKind.ATTACK
            else BENIGN.model_copy(update={"attempt": name})
            for name, kind in kinds.items()
        ]
        arms[arm] = judged_arm(arm, *made)
    return arms


@given(st.one_of(tables(), mostly_good_tables()))
def test_contained_means_all_of_it(arms: dict[Arm, JudgedArm]) -> None:
    if conclude(SELINUX, arms).verdict is not Verdict.CONTAINED:
        return
    every = [a for arm in arms_of(SELINUX) for a in arms[arm].attempts]
    assert all(a.result not in {FAILED, UNCLEAR} for a in every)
    control, enforcing = (results(arms, arm, AttemptKind.ATTACK) for arm in (DAC, ENFORCING))
    assert control
    assert set(control) == set(enforcing)
    assert all(a.result is ALLOWED for a in control.values())
    for a in enforcing.values():
        assert a.result is BLOCKED
        assert a.attribution is not None
        assert a.attribution.denial is not None
        assert a.attribution.denial.effective
    assert all(a.result is ALLOWED for a in every if a.kind is AttemptKind.BENIGN)
    assert not arms[ENFORCING].start_denial


@given(mostly_good_tables())
def test_a_table_without_a_fault_is_contained(arms: dict[Arm, JudgedArm]) -> None:
    control, logging, enforcing = (arms[a].attempts for a in arms_of(SELINUX))
    good = (
        all(a.result is ALLOWED for a in (*control, *logging))
        and all(a.result is ALLOWED for a in enforcing if a.kind is AttemptKind.BENIGN)
        and all(
            a.result is BLOCKED and a.attribution is not None and a.attribution.denial is not None
            for a in enforcing
            if a.kind is AttemptKind.ATTACK
        )
    )
    if good:
        assert conclude(SELINUX, arms).verdict is Verdict.CONTAINED


@given(tables())
def test_errors_and_doubts_of_what_is_not_needed_change_nothing(arms: dict[Arm, JudgedArm]) -> None:
    """An attack that the control blocks decides alone: DAC's answer needs no MAC arm."""
    control = results(arms, DAC, AttemptKind.ATTACK)
    if not control or any(a.result in {FAILED, UNCLEAR} for a in control.values()):
        return
    if all(a.result is ALLOWED for a in control.values()) or is_breach(arms):
        return
    everywhere = {a.attempt for arm in arms.values() for a in arm.attempts if a.kind is AttemptKind.ATTACK}
    if everywhere == set(control):
        assert conclude(SELINUX, arms).verdict in {Verdict.DAC_BLOCKED, Verdict.CONTROL_BLOCKED}


def test_a_denial_at_the_start_that_was_only_logged_does_not_break_the_verdict() -> None:
    down = DOWN.model_copy(update={"setup_denials": (denial(logged=True),)})
    assert verdict_of(enforcing=down).verdict is Verdict.INCONCLUSIVE
