"""The whole chain on real kernels: the library's scenarios and the tests' own, on both labs, through the command."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from command import MINE, REPO, environment, lsmlab, outcomes

from lsmlab import discovery
from lsmlab.scenario import Scenario
from lsmlab.terms import Verdict

pytestmark = pytest.mark.lsmlab_vm


def others(scenario: Scenario) -> bool:
    """True where a lab is expected to differ from the rest."""
    return any(expectation.labs for expectation in scenario.expected.values())


LABS = ["debian-13", "debian-12"]
SCENARIOS = {s.id: s for s in discovery.load_scenarios((), REPO) if s.subject.container is None}
"""Those about containers are in test_container.py."""
KINDS = (
    "named-reads-machine-keytab", "selinux-database-boolean-on", "selinux-moved-page", "shop-kills-billing",
    "shop-sets-permissive",
)  # fmt: skip
"""One of each kind that the flagship is not: a profile that the distribution ships, and another service; a boolean;
files that were moved; an object without a path, and a unit of the scenario's own; an attack on MAC itself."""
ALWAYS = sorted(s.id for s in SCENARIOS.values() if s.id.startswith("nginx-reads-shadow") or others(s))
SOME = {"debian-13": [*ALWAYS, *KINDS], "debian-12": ALWAYS}
"""A part of the library: the flagship's variants, where a lab differs, and one scenario of each kind. `make test` runs
that of debian-13; the slow tests that of debian-12 as well, and all of it, on both labs, falsified."""
MY_EXPECTED = {
    ("service-masked", "selinux"): "INCONCLUSIVE",
    ("service-masked", "apparmor"): "INCONCLUSIVE",
    ("service-stopped-later", "apparmor"): "INCONCLUSIVE",
    ("cannot-start", "apparmor"): "OVERBLOCKED",
    ("overblocked", "apparmor"): "OVERBLOCKED",
    ("run-as-service", "selinux"): "CONTAINED",
    ("run-as-service", "apparmor"): "CONTAINED",
    ("effect", "selinux"): "CONTAINED",
    ("effect", "apparmor"): "CONTAINED",
    ("broken-setup", "selinux"): "ERROR",
}
Outcomes = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module", params=["debian-13", pytest.param("debian-12", marks=pytest.mark.slow)])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Outcomes]:
    """A part of the library on one lab: the lab, its store's folder, the outcomes."""
    state = tmp_path_factory.mktemp(request.param)
    file = state / "out.json"
    lsmlab("run", *SOME[request.param], "--lab", request.param, "--json", str(file), env=environment(state))
    return request.param, state, outcomes(file.read_text())


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The tests' own scenarios on the default lab. `broken-setup` expects CONTAINED and is an error: exit code 3."""
    state = tmp_path_factory.mktemp("mine")
    file = state / "out.json"
    lsmlab("run", str(MINE), "--json", str(file), env=environment(state), code=3)
    return outcomes(file.read_text())


def arm(outcome: dict[str, Any], name: str) -> dict[str, Any]:
    return next(a for a in outcome["arms"] if a["arm"] == name)


def attempt(outcome: dict[str, Any], arm_name: str, name: str = "read-shadow") -> dict[str, Any]:
    found: dict[str, Any] = next(a for a in arm(outcome, arm_name)["attempts"] if a["attempt"] == name)
    return found


def test_every_verdict_is_the_expected_one(library: tuple[str, Path, Outcomes]) -> None:
    lab, _, found = library
    wanted = {
        (name, framework.value): SCENARIOS[name].expectation(framework, lab).verdict.value
        for name in SOME[lab] for framework in SCENARIOS[name].expected
    }  # fmt: skip
    assert {key: o["verdict"] for key, o in found.items()} == wanted
    if lab == "debian-13":
        assert set(wanted.values()) == {"CONTAINED", "NOT_CONTAINED", "DAC_BLOCKED", "OVERBLOCKED"}, (
            "each is seen daily"
        )
    assert all(o["as_expected"] and o["lab"] == lab for o in found.values())


def test_the_library_is_worth_running() -> None:
    expected = [
        (scenario.expectation(framework, lab).verdict, scenario.id)
        for lab in LABS for scenario in SCENARIOS.values() for framework in scenario.expected
    ]  # fmt: skip
    known = {Verdict.CONTAINED, Verdict.NOT_CONTAINED, Verdict.DAC_BLOCKED, Verdict.OVERBLOCKED}
    assert {verdict for verdict, _ in expected} == known
    assert len(SCENARIOS) >= 30
    assert len(expected) >= 2 * 45
    assert sum(verdict is Verdict.CONTAINED for verdict, _ in expected) >= 2 * 30


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("lab", LABS)
def test_every_scenario_that_contains_is_falsifiable(lab: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    lsmlab("run", "--falsify", "--lab", lab, "--json", str(file), env=environment(tmp_path), timeout=7000)
    contained = [o for o in outcomes(file.read_text()).values() if o["verdict"] == "CONTAINED"]
    assert len(contained) >= 30
    assert all(o["falsification"]["verdict"] == "NOT_CONTAINED" for o in contained)
    assert all(o["falsification"]["misled"] == "UNATTRIBUTED" for o in contained)


def test_the_flagship_is_falsifiable(tmp_path: Path) -> None:
    done = lsmlab("run", "nginx-reads-shadow", "--falsify", "--json", "-", env=environment(tmp_path))
    for (_, framework), outcome in outcomes(done.stdout).items():
        kept = outcome["falsification"]
        assert (kept["verdict"], kept["misled"]) == ("NOT_CONTAINED", "UNATTRIBUTED")
        first = {"selinux": "(allow httpd_t shadow_t (file (read)))", "apparmor": 'nginx: "/etc/shadow" r,'}[framework]
        assert kept["rules"][0] == first


def test_the_flagship_shows_the_whole_chain(library: tuple[str, Path, Outcomes]) -> None:
    _, _, found = library
    for framework, logging, enforcing in (
        ("selinux", "selinux-permissive", "selinux-enforcing"),
        ("apparmor", "apparmor-complain", "apparmor-enforce"),
    ):
        outcome = found["nginx-reads-shadow", framework]
        assert [a["arm"] for a in outcome["arms"]] == ["dac", logging, enforcing]
        results = [attempt(outcome, a)["result"] for a in ("dac", logging, enforcing)]
        assert results == ["allowed", "allowed", "blocked"]
        assert attempt(outcome, "dac")["dac"]["permitted"]
        assert "group shadow (42)" in attempt(outcome, "dac")["dac"]["rule"]
        workers = [
            p for p in attempt(outcome, enforcing)["observation"]["subject_before"]["processes"] if not p["main"]
        ]
        assert {p["uids"][0] for p in workers} == {33}
        assert all(a["attempts"] for a in outcome["arms"])


def test_the_block_is_attributed_to_the_kernels_own_record(library: tuple[str, Path, Outcomes]) -> None:
    _, _, found = library
    selinux = attempt(found["nginx-reads-shadow", "selinux"], "selinux-enforcing")
    record = selinux["attribution"]["denial"]
    assert record["effective"] and record["syscall_success"] is False
    assert (record["object_type"] if "object_type" in record else record["object"].split(":")[2]) == "shadow_t"
    assert "permissive=0" in record["raw"][0] and "httpd_t" in record["raw"][0]
    assert record["ino"] == selinux["observation"]["object"]["chain"][-1]["ino"]
    apparmor = attempt(found["nginx-reads-shadow", "apparmor"], "apparmor-enforce")["attribution"]["denial"]
    assert 'apparmor="DENIED"' in apparmor["raw"][0] and apparmor["name"] == "/etc/shadow"


def test_the_frameworks_are_where_they_should_be_and_nowhere_else(library: tuple[str, Path, Outcomes]) -> None:
    _, _, found = library
    for (_, framework), outcome in found.items():
        for record in outcome["arms"]:
            present = {"selinux", "apparmor"} & set(record["lsm"])
            assert present == (set() if record["arm"] == "dac" else {framework})


def test_what_the_record_needs_to_be_repeated_is_there(library: tuple[str, Path, Outcomes]) -> None:
    lab, state, found = library
    outcome = found["nginx-reads-shadow", "selinux"]
    environment_ = outcome["environment"]
    assert len(environment_["image"]) == 64
    assert environment_["kernel"] and environment_["qemu"] and environment_["accelerator"] in {"kvm", "tcg"}
    assert {"nginx", "selinux-policy-default", "apparmor", "auditd"} <= set(environment_["packages"])
    assert all("audit=1" in a["command_line"] for a in outcome["arms"])
    sources = [a["observation"]["source"]["state"] for r in outcome["arms"] for a in r["attempts"]]
    assert sources and "unavailable" not in sources
    with sqlite3.connect(state / "lsmlab" / "outcomes.sqlite") as store:
        kept = store.execute("SELECT document FROM outcomes WHERE id = ?", (outcome["id"],)).fetchone()
    assert json.loads(kept[0])["scenario_digest"] == outcome["scenario_digest"]
    assert lab in lsmlab("show", outcome["id"], env=environment(state)).stdout


def test_canaries_are_fresh_for_every_attempt(library: tuple[str, Path, Outcomes]) -> None:
    _, _, found = library
    # the control arm is shared by both frameworks of a scenario: its attempts are the same ones
    words = {
        (scenario, a["arm"], t["attempt"]): t["observation"]["canary"]
        for (scenario, _), o in found.items() for a in o["arms"] for t in a["attempts"]
    }  # fmt: skip
    assert len(set(words.values())) == len(words) > 40


def test_the_tests_own_scenarios(mine: Outcomes) -> None:
    assert {key: o["verdict"] for key, o in mine.items()} == MY_EXPECTED


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_scenario_has_the_packages_that_it_asks_for(tmp_path: Path) -> None:
    asked = str(MINE.parent / "packages")
    done = lsmlab("run", asked, "nginx-reads-shadow", "-f", "apparmor", "--json", "-", env=environment(tmp_path))
    found = outcomes(done.stdout)
    assert {key: o["verdict"] for key, o in found.items()} == {
        ("nginx-reads-shadow", "apparmor"): "CONTAINED", ("with-a-package", "apparmor"): "CONTAINED",
    }  # fmt: skip
    images = {o["environment"]["image"] for o in found.values()}
    assert len(images) == 2  # the other one stays on the lab's own
    assert "with hello" in done.stderr


def test_a_failing_step_is_named(mine: Outcomes) -> None:
    assert "setup, step 1" in mine["broken-setup", "selinux"]["reason"]
    assert "no-such-group" in mine["broken-setup", "selinux"]["reason"]


def test_a_command_run_as_the_service_is_proved_to_have_its_domain(mine: Outcomes) -> None:
    seen = attempt(mine["run-as-service", "selinux"], "selinux-enforcing", "read-page")
    execs = [
        line for line in seen["observation"]["log"].split("\n") if 'key="lsmlab-subject"' in line and "SYSCALL" in line
    ]
    assert any("subj=system_u:system_r:httpd_t:s0" in e and "uid=33" in e and "success=yes" in e for e in execs)


def test_try_says_what_is_true_in_each_arm(tmp_path: Path) -> None:
    def answers(*arguments: str) -> dict[str, tuple[str, str]]:
        done = lsmlab("try", "--json", "-", "-q", *arguments, env=environment(tmp_path))
        return {a["arm"]: (a["result"], a["by"]) for a in json.loads(done.stdout)["arms"]}

    arms = ("dac", "selinux-permissive", "selinux-enforcing", "apparmor-complain", "apparmor-enforce")
    page = answers("--as", "nginx", "--", "cat", "/var/www/html/index.html")
    assert page == dict.fromkeys(arms, ("ran", ""))
    plain = answers("--as", "nginx", "--", "cat", "/etc/shadow")
    assert plain == dict.fromkeys(arms, ("refused", "DAC"))
    grouped = answers("--as", "nginx", "--group", "shadow", "--", "cat", "/etc/shadow")
    assert grouped == {
        **dict.fromkeys(arms, ("ran", "")),
        "selinux-enforcing": ("refused", "SELinux"),
        "apparmor-enforce": ("refused", "AppArmor"),
    }


def test_a_command_in_a_guest_of_an_arm(tmp_path: Path) -> None:
    env = environment(tmp_path)
    done = lsmlab("shell", "debian-13", "--arm", "selinux-enforcing", "-q", "--", "getenforce", env=env)
    assert done.stdout == "Enforcing\n"
    assert lsmlab("shell", "debian-13", "-q", "--", "sh", "-c", "exit 7", env=env, code=7).stdout == ""
