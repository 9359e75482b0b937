"""Falsification: what is added to a policy, when it is enough, and what is no answer. Guests are made up."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from builders import apparmor, avc, observation, outcome, scenario, syscall

from fakes import FakeBench
from lsmlab import discovery, evidence, falsify, run
from lsmlab.cli.experiment import exit_code
from lsmlab.errors import PolicyError
from lsmlab.outcome import ArmRecord, AttemptRecord, Falsification, Outcome
from lsmlab.run import Case, judge_attempt
from lsmlab.scenario import Scenario
from lsmlab.terms import Arm, AttemptKind, Control, Framework, Result, Verdict

SELINUX, APPARMOR = Framework.SELINUX, Framework.APPARMOR
READ_IT: dict[str, Any] = {"http_status": 200}
REFUSED = {SELINUX: (avc(), syscall()), APPARMOR: (apparmor(), syscall(stamp="1795509850.164", serial=216))}
ARMS = {
    SELINUX: (Arm.DAC, Arm.SELINUX_PERMISSIVE, Arm.SELINUX_ENFORCING),
    APPARMOR: (Arm.DAC, Arm.APPARMOR_COMPLAIN, Arm.APPARMOR_ENFORCE),
}


def record(found: Scenario, arm: Arm, *lines: str, allowed: bool) -> ArmRecord:
    """One arm in which the attack succeeds, or is refused with `lines` as its records."""
    spec = found.attacks[0]
    seen = observation(arm, *lines)
    if allowed:
        seen = observation(arm, *lines, output=f"lsmlab-{seen.canary}:", **READ_IT)
    return ArmRecord(arm=arm, attempts=(judge_attempt(found, spec, arm, seen, "debian-13"),))


def contained(framework: Framework, found: Scenario | None = None) -> tuple[Case, Outcome]:
    """A case that is contained, by a record that accounts for the block."""
    found = found or scenario()
    control, logging, enforcing = ARMS[framework]
    arms = (
        record(found, control, allowed=True),
        record(found, logging, allowed=True),
        record(found, enforcing, *REFUSED[framework], allowed=False),
    )
    return Case(found, framework), outcome(framework=framework, arms=arms)


TWO = {
    "selinux": {
        "verdict": "CONTAINED",
        "because": "no rule",
        "denials": [{"attempt": name, "permissions": ["read"]} for name in ("read-shadow", "second")],
    }
}


def outcome_of(arm: Arm) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The records, and what else was seen, of an attack that only the enforcing arm refuses."""
    seen = observation(arm)
    return (REFUSED[SELINUX], {}) if arm.enforcing else ((), {"output": f"lsmlab-{seen.canary}:", **READ_IT})


@pytest.fixture
def bench() -> FakeBench:
    return FakeBench(discovery.load_lab("debian-13"), lambda *_: pytest.fail("no guest is to be started"))


Answers = Callable[[Sequence[ArmRecord]], list[Scenario]]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Has the enforcing arm answer with `records`, one a round; the scenarios that were run."""

    def given(records: Sequence[ArmRecord]) -> list[Scenario]:
        asked: list[Scenario] = []

        def run_boot(_: Any, found: Scenario, arms: Sequence[Arm]) -> dict[Arm, ArmRecord]:
            asked.append(found)
            return {arms[0]: records[len(asked) - 1]}

        monkeypatch.setattr(falsify, "run_boot", run_boot)
        return asked

    return given


def denial_of(*lines: str) -> evidence.Denial:
    return evidence.denials(evidence.parse("\n".join(lines)))[0]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (avc("read", "open"), "(allow httpd_t shadow_t (file (read open)))"),
        (avc("search", tclass="dir", target="u:object_r:a_t:s0"), "(allow httpd_t a_t (dir (search)))"),
    ],
)
def test_what_selinux_denied_is_the_rule_that_is_missing(line: str, rule: str) -> None:
    assert falsify.rules_for(SELINUX, [denial_of(line), denial_of(line)]) == (rule,)
    assert falsify.rules_for(APPARMOR, [denial_of(line)]) == ()


def of_apparmor(text: str) -> str:
    return f'type=AVC msg=audit(1.0:2): apparmor="DENIED" {text}'


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (apparmor(), 'nginx: "/etc/shadow" r,'),
        (apparmor(mask="wc"), 'nginx: "/etc/shadow" w,'),
        (apparmor(mask="acr"), 'nginx: "/etc/shadow" wr,'),
        (apparmor(mask="x", operation="exec"), 'nginx: "/etc/shadow" ix,'),
        (apparmor(mask="mrx", rule_class=None), 'nginx: "/etc/shadow" mrix,'),
        (apparmor(profile=b"shop//ping"), 'shop//ping: "/etc/shadow" r,'),
        (apparmor(name=b"/srv/a[1]*{x}"), 'nginx: "/srv/a\\[1\\]\\*\\{x\\}" r,'),
        (
            of_apparmor('operation="capable" class="cap" profile="p" pid=1 comm="c" capability=21 capname="sys_admin"'),
            "p: capability sys_admin,",
        ),
        (
            of_apparmor('operation="capable" profile="p" pid=1 comm="c" capability=21 capname="sys_admin"'),
            "p: capability sys_admin,",
        ),
        (
            of_apparmor(
                'operation="create" class="net" profile="p" pid=1 comm="c" family="inet" sock_type="raw" protocol=1 '
                'requested_mask="create" denied_mask="create"'
            ),
            "p: network inet raw,",
        ),
        (
            of_apparmor(
                'operation="signal" class="signal" profile="p" pid=1 comm="c" requested_mask="send" '
                'denied_mask="send" signal=kill peer="q"'
            ),
            'p: signal (send) peer="q",',
        ),
        (
            of_apparmor('operation="mount" class="mount" info="failed type match" profile="p" name="/mnt/" pid=1'),
            "p: mount,",
        ),
        (
            of_apparmor('operation="change_profile" class="label" profile="p" name="q" pid=1 comm="c"'),
            "p: change_profile -> q,",
        ),
        (  # the kernel writes class="file" for it
            of_apparmor('operation="change_onexec" class="file" profile="p" name="q" pid=1 comm="c" target="q"'),
            "p: change_profile -> q,",
        ),
        (  # what is denied is what the link would have too much, and its target lacks
            of_apparmor(
                'operation="link" class="file" profile="p" name="/a/link" pid=1 comm="c" requested_mask="wracd" '
                'denied_mask="wracd" fsuid=1 ouid=1 target="/b/key"'
            ),
            'p: "/b/key" wr,',
        ),
        (apparmor(mask="l", operation="link"), 'nginx: "/etc/shadow" l,'),
    ],
)
def test_what_apparmor_denied_is_the_rule_that_is_missing(line: str, rule: str) -> None:
    assert falsify.rules_for(APPARMOR, [denial_of(line)]) == (rule,)


PROFILE = """include <tunables/global>
# profile nginx is told of here {
profile nginx /usr/sbin/nginx flags=(attach_disconnected) {
  /srv/** r,
  profile helper {
    /bin/true r,
  }
  ^hat {
  }
}
"""


def test_what_cannot_be_said_as_a_rule_is_left_out() -> None:
    nowhere = of_apparmor('operation="create" class="net" profile="p" pid=1 comm="c" denied_mask="create"')
    learning = denial_of(apparmor(profile=b"shop//null-/usr/bin/cat"))
    assert falsify.rules_for(APPARMOR, [denial_of(apparmor(name=b"run/x")), denial_of(nowhere), learning]) == ()


def test_a_rule_goes_behind_the_braces_of_an_attachment(tmp_path: Path) -> None:
    source = tmp_path / "p.apparmor"
    source.write_text("profile nginx /usr/{s,}bin/nginx { # {\n}\n")
    (tmp_path / "weaker").mkdir()
    weaker = falsify.weakened(
        scenario(apparmor={"profiles": [source]}), APPARMOR, ("nginx: /x r,",), tmp_path / "weaker"
    )
    assert weaker.apparmor.profiles[0].read_text() == "profile nginx /usr/{s,}bin/nginx {\n  /x r, # {\n}\n"


@pytest.mark.parametrize(
    ("profile", "before"),
    [("nginx", "flags=(attach_disconnected) {"), ("nginx//helper", "  profile helper {"), ("nginx//hat", "  ^hat {")],
)
def test_a_rule_stands_first_in_the_block_of_its_profile(tmp_path: Path, profile: str, before: str) -> None:
    source = tmp_path / "nginx.apparmor"
    source.write_text(PROFILE)
    found = scenario(apparmor={"profiles": [source]})
    (tmp_path / "weaker").mkdir()
    weaker = falsify.weakened(found, APPARMOR, (f'{profile}: "/x" r,',), tmp_path / "weaker")
    (copy,) = weaker.apparmor.profiles
    assert copy.name == source.name
    assert copy.read_text() == PROFILE.replace(before, f'{before}\n  "/x" r,', 1)
    assert source.read_text() == PROFILE


def test_a_rule_without_a_place_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no profile of the scenario has a place for the rule 'nginx: "):
        falsify.weakened(scenario(), APPARMOR, ("nginx: /x r,",), tmp_path)


def test_a_shipped_profile_is_weakened_by_its_local_file(tmp_path: Path) -> None:
    found = scenario(apparmor={"shipped": ["/etc/apparmor.d/usr.sbin.named"]})
    weaker = falsify.weakened(found, APPARMOR, ('named: "/x" r,',), tmp_path)
    step = weaker.setup[-1].run
    assert step is not None
    local = tmp_path / "local"
    local.write_text("# the scenario's own\n")
    subprocess.run([*step[:-1], str(local)], check=True)
    assert step[-1] == "/etc/apparmor.d/local/usr.sbin.named"
    assert local.read_text() == '# the scenario\'s own\n"/x" r,\n'
    with pytest.raises(PolicyError, match="has a place for the rule"):
        falsify.weakened(found, APPARMOR, ('named//child: "/x" r,',), tmp_path)


def test_one_attack_that_is_let_in_is_not_enough(bench: FakeBench, answers: Answers, tmp_path: Path) -> None:
    second = {**scenario().attempts[0].model_dump(by_alias=True), "id": "second"}
    found = scenario(attempts=[scenario().attempts[0].model_dump(by_alias=True), second], expected=TWO)
    control, logging, enforcing = (
        ArmRecord(
            arm=arm,
            attempts=tuple(
                judge_attempt(found, spec, arm, observation(arm, *lines, **changes), "debian-13")
                for spec in found.attacks
                for lines, changes in [outcome_of(arm)]
            ),
        )
        for arm in ARMS[SELINUX]
    )
    case = Case(found, SELINUX)
    kept = outcome(framework=SELINUX, arms=(control, logging, enforcing))
    halfway = enforcing.model_copy(update={"attempts": (logging.attempts[0], enforcing.attempts[1])})
    answers([halfway] * falsify.MOST_ROUNDS)
    answer = falsify.weaken_until_it_succeeds(bench.as_bench, case, kept, tmp_path)
    assert answer.verdict is Verdict.INCONCLUSIVE
    assert answer.reason == "second: blocked: HTTP 403"


def test_selinux_is_weakened_by_one_more_module(tmp_path: Path) -> None:
    weaker = falsify.weakened(scenario(), SELINUX, ("(allow a_t b_t (file (read)))",), tmp_path)
    assert weaker.selinux.modules[-1].read_text() == "(allow a_t b_t (file (read)))\n"
    assert weaker.attempts == scenario().attacks


@pytest.mark.parametrize(
    "step",
    [
        {"run": ["semanage", "port", "-a", "-t", "http_port_t", "-p", "tcp", "8081"]},
        {"run": ["setsebool", "-P", "httpd_enable_cgi", "on"]},
        {"write": {"path": "/root/mend.sh", "content": "audit2allow -M mine\nsemodule -i mine.pp\n"}},
    ],
)
def test_where_the_guest_builds_its_policy_anew_it_is_weakened_there(tmp_path: Path, step: dict[str, Any]) -> None:
    rule = "(allow a_t b_t (file (read)))"
    weaker = falsify.weakened(scenario(setup=[step]), SELINUX, (rule,), tmp_path)
    first, write, install = weaker.setup
    assert first == scenario(setup=[step]).setup[0]
    assert write.write is not None
    assert write.write.content == f"{rule}\n"
    assert install.run == ("semodule", "--install", write.write.path)
    assert weaker.selinux.modules == ()


def test_a_boolean_that_is_not_kept_leaves_the_policy_as_it_is(tmp_path: Path) -> None:
    steps = [{"run": ["setsebool", "httpd_enable_cgi", "on"]}]
    weaker = falsify.weakened(scenario(setup=steps), SELINUX, ("(allow a_t b_t (file (read)))",), tmp_path)
    assert weaker.setup == scenario(setup=steps).setup
    assert len(weaker.selinux.modules) == 1


def test_benign_attempts_of_the_other_arms_are_not_missed(bench: FakeBench, answers: Answers) -> None:
    """Under a weakened policy attacks alone are made: one that is still refused is no error for that."""
    case, found = contained(SELINUX)
    benign = AttemptRecord(attempt="page", kind=AttemptKind.BENIGN, result=Result.ALLOWED, reason="the canary was read")
    arms = tuple(a.model_copy(update={"attempts": (*a.attempts, benign)}) for a in found.arms)
    answers([record(case.scenario, Arm.SELINUX_ENFORCING, *REFUSED[SELINUX], allowed=False)])
    (falsified,) = falsify.run(bench.as_bench, [(case, found.model_copy(update={"arms": arms}))])
    assert falsified.falsification is not None
    assert falsified.falsification.verdict is Verdict.CONTAINED


@pytest.mark.parametrize("framework", list(Framework))
def test_a_scenario_that_comes_out_otherwise_is_falsifiable(
    bench: FakeBench, answers: Answers, framework: Framework, tmp_path: Path
) -> None:
    profile = tmp_path / "nginx.apparmor"
    profile.write_text(PROFILE)
    case, found = contained(framework, scenario(apparmor={"profiles": [profile]}))
    enforcing = ARMS[framework][-1]
    asked = answers([record(case.scenario, enforcing, allowed=True)])
    (falsified,) = falsify.run(bench.as_bench, [(case, found)])
    kept = falsified.falsification
    assert kept is not None
    assert (kept.verdict, kept.misled, kept.falsifiable) == (Verdict.NOT_CONTAINED, Verdict.UNATTRIBUTED, True)
    assert len(asked) == 1
    assert falsified.model_copy(update={"falsification": None}) == found
    assert exit_code([falsified]) == 0


def test_rules_are_added_until_nothing_more_is_denied(bench: FakeBench, answers: Answers, tmp_path: Path) -> None:
    case, found = contained(SELINUX)
    opened = avc("open"), syscall()
    refused = record(case.scenario, Arm.SELINUX_ENFORCING, *opened, allowed=False)
    asked = answers([refused, record(case.scenario, Arm.SELINUX_ENFORCING, allowed=True)])
    kept = falsify.weaken_until_it_succeeds(bench.as_bench, case, found, tmp_path)
    assert kept.rules == ("(allow httpd_t shadow_t (file (read)))", "(allow httpd_t shadow_t (file (open)))")
    assert (kept.verdict, len(asked)) == (Verdict.NOT_CONTAINED, 2)


def test_an_attack_that_stays_blocked_proves_nothing(bench: FakeBench, answers: Answers) -> None:
    case, found = contained(SELINUX)
    answers([record(case.scenario, Arm.SELINUX_ENFORCING, *REFUSED[SELINUX], allowed=False)])
    (falsified,) = falsify.run(bench.as_bench, [(case, found)])
    kept = falsified.falsification
    assert kept is not None
    assert not kept.falsifiable
    assert kept.verdict is Verdict.CONTAINED
    assert kept.reason == "read-shadow: blocked: HTTP 403"
    assert exit_code([falsified]) == 1


def test_what_breaks_is_an_error_and_no_success(bench: FakeBench, answers: Answers, tmp_path: Path) -> None:
    case, found = contained(SELINUX)
    answers([ArmRecord(arm=Arm.SELINUX_ENFORCING, error="the guest died")])
    kept = falsify.weaken_until_it_succeeds(bench.as_bench, case, found, tmp_path)
    assert (kept.verdict, kept.reason) == (Verdict.ERROR, "the guest died")
    case, found = contained(APPARMOR)  # with no profile that a rule could be put into
    kept = falsify.weaken_until_it_succeeds(bench.as_bench, case, found, tmp_path)
    assert kept.verdict is Verdict.ERROR


def test_the_authors_own_way_takes_the_place_of_rules(bench: FakeBench, answers: Answers, tmp_path: Path) -> None:
    weaker = tmp_path / "weaker.cil"
    weaker.write_text("")
    expected = scenario().model_dump(by_alias=True)["expected"]
    expected["selinux"]["falsified_by"] = [weaker]
    case, found = contained(SELINUX, scenario(expected=expected))
    asked = answers([record(case.scenario, Arm.SELINUX_ENFORCING, allowed=True)])
    kept = falsify.weaken_until_it_succeeds(bench.as_bench, case, found, tmp_path)
    assert (kept.rules, kept.verdict) == (("weaker.cil",), Verdict.NOT_CONTAINED)
    assert asked[0].selinux.modules == (weaker,)


def test_a_verdict_that_heeds_no_expectation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case, found = contained(SELINUX)
    assert falsify.with_another_expectation(case, found, "debian-13") is Verdict.UNATTRIBUTED
    genuine = found.arms[-1].attempts[0].attribution
    monkeypatch.setattr("lsmlab.verdict.attribute", lambda *_: genuine)
    assert falsify.with_another_expectation(case, found, "debian-13") is Verdict.CONTAINED


def test_half_a_falsification_is_none() -> None:
    whole = Falsification(rules=("x",), verdict=Verdict.NOT_CONTAINED, reason="", misled=Verdict.UNATTRIBUTED)
    assert whole.falsifiable
    for changes in ({"verdict": Verdict.CONTAINED}, {"verdict": Verdict.ERROR}, {"misled": Verdict.CONTAINED}):
        assert not whole.model_copy(update=changes).falsifiable


def test_the_weaker_control_has_two_arms() -> None:
    found = scenario(control=Control.UNCONFINED)
    assert Case(found, SELINUX).arms == (Arm.SELINUX_UNCONFINED, Arm.SELINUX_ENFORCING)
    assert Case(found, APPARMOR).arms == (Arm.APPARMOR_UNCONFINED, Arm.APPARMOR_ENFORCE)


def test_scenarios_with_more_packages_have_an_image_of_their_own(bench: FakeBench) -> None:
    plain, more, same = scenario(), scenario(id="b", packages=["tree", "nginx"]), scenario(id="c", packages=["nginx"])
    cases = run.cases([more, plain, same], bench.lab, [SELINUX])
    groups = run.by_image(bench.lab, cases)
    assert [[c.scenario.id for c in group] for _, group in groups] == [["nginx-reads-shadow", "c"], ["b"]]
    assert groups[0][0] is bench.lab
    assert groups[1][0].disk.packages == (*bench.lab.disk.packages, "tree")
