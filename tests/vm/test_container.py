"""Containers in real guests: every scenario through the command, who acted, whose denial it was, what is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from command import REPO, environment, lsmlab, outcomes

from lsmlab import discovery

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.container, pytest.mark.slow]

LAB = "docker-debian-13"
ERRORS = REPO / "tests" / "vm" / "containers"
CONTAINED, NOT_CONTAINED, CONTROL_BLOCKED = "CONTAINED", "NOT_CONTAINED", "CONTROL_BLOCKED"
EXPECTED = {
    "container-built-from-dockerfile-shares-group": {"selinux": CONTAINED, "apparmor": NOT_CONTAINED},
    "container-commands-engine": {"selinux": CONTAINED, "apparmor": NOT_CONTAINED},
    "container-kills-host-process": {"selinux": CONTAINED, "apparmor": CONTAINED},
    "container-makes-user-namespace": {"selinux": CONTROL_BLOCKED, "apparmor": CONTROL_BLOCKED},
    "container-makes-user-namespace-without-seccomp": {"selinux": CONTAINED, "apparmor": CONTAINED},
    "container-mounts-file-system": {"selinux": CONTAINED, "apparmor": CONTAINED},
    "container-nginx-serves-host-shadow": {"selinux": CONTAINED, "apparmor": NOT_CONTAINED},
    "container-privileged-mounts-disk": {"selinux": NOT_CONTAINED, "apparmor": NOT_CONTAINED},
    "container-reads-host-shadow": {"selinux": CONTAINED, "apparmor": NOT_CONTAINED},
    "container-reads-host-shadow-as-spc": {"selinux": NOT_CONTAINED},
    "container-reads-host-shadow-own-profile": {"apparmor": CONTAINED},
    "container-reads-other-tenant": {"selinux": CONTAINED, "apparmor": NOT_CONTAINED},
    "container-reads-other-tenant-same-level": {"selinux": NOT_CONTAINED},
    "container-serves-host-shadow": {"selinux": CONTAINED, "apparmor": NOT_CONTAINED},
    "container-sets-core-pattern": {"selinux": CONTROL_BLOCKED, "apparmor": CONTROL_BLOCKED},
    "container-sets-core-pattern-systempaths": {"selinux": CONTAINED, "apparmor": CONTAINED},
}
"""Written a second time, away from the scenarios: who changes one there has to mean it."""
SOME = (
    "container-commands-engine", "container-nginx-serves-host-shadow",
    "container-privileged-mounts-disk", "container-reads-host-shadow", "container-reads-host-shadow-own-profile",
    "container-reads-other-tenant",
)  # fmt: skip
"""Those that are looked at closely; one test runs all of them."""
CONFINED = {"selinux": "container_t", "apparmor": "docker-default"}
UNCONFINED = {"selinux": "spc_t", "apparmor": "unconfined"}
Outcomes = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcomes]:
    """These: the store's folder, and the outcomes."""
    state = tmp_path_factory.mktemp("containers")
    file = state / "out.json"
    lsmlab("run", *SOME, "--lab", LAB, "--json", str(file), env=environment(state))
    return state, outcomes(file.read_text("utf-8"))


@pytest.fixture(scope="module")
def found(ran: tuple[Path, Outcomes]) -> Outcomes:
    return ran[1]


def attempts(outcome: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The arm and the record of each attempt."""
    return [(arm["arm"], attempt) for arm in outcome["arms"] for attempt in arm["attempts"]]


def expected(names: Iterable[str]) -> dict[tuple[str, str], str]:
    return {(name, framework): verdict for name in names for framework, verdict in EXPECTED[name].items()}


def test_some_scenarios_are_as_expected(found: Outcomes) -> None:
    assert {case: outcome["verdict"] for case, outcome in found.items()} == expected(SOME)
    assert all(outcome["as_expected"] for outcome in found.values())


def test_every_container_scenario_is_as_expected(tmp_path: Path) -> None:
    """Nothing named: all of the library that belongs to a lab with an engine."""
    file = tmp_path / "out.json"
    done = lsmlab("run", "--lab", LAB, "--json", str(file), env=environment(tmp_path))
    assert re.search(r"lab docker-debian-13: \d+ scenarios are not about containers: left out", done.stderr)
    found = outcomes(file.read_text("utf-8"))
    assert {case: outcome["verdict"] for case, outcome in found.items()} == expected(EXPECTED)
    assert {s.id for s in discovery.load_scenarios((), REPO) if s.subject.container is not None} == set(EXPECTED)


def test_the_control_differs_by_the_mac_alone_and_is_named_as_weaker(found: Outcomes) -> None:
    for (name, framework), outcome in found.items():
        arms = [arm["arm"] for arm in outcome["arms"]]
        assert [a.partition("-")[2] for a in arms] == (["unconfined", "enforcing"] if framework == "selinux" else
                                                      ["unconfined", "enforce"]), name  # fmt: skip
        for arm, attempt in attempts(outcome):
            seen = attempt["observation"]
            labels = {process["label"] for process in seen["subject_before"]["processes"]}
            assert len(labels) == 1, (name, arm, labels)
            own = [line for line in seen["log"].splitlines() if 'key="lsmlab-subject"' in line]
            ran = {line.rpartition(" subj=")[2].split()[0] for line in own if f" auid={seen['auid']} " in line}
            assert ran or seen["auid"] is None, (name, arm, attempt["attempt"])  # a visitor's request starts nothing
            for label in (*labels, *ran):
                if arm.endswith("unconfined"):
                    assert UNCONFINED[framework] in label, (name, arm, label)
                elif outcome["verdict"] == CONTAINED and not name.endswith("own-profile"):
                    assert CONFINED[framework] in label, (name, arm, label)


def test_a_block_is_charged_to_the_attempts_own_process(found: Outcomes) -> None:
    contained = [outcome for outcome in found.values() if outcome["verdict"] == CONTAINED]
    assert len(contained) >= 5
    for outcome in contained:
        (attack,) = [a for arm, a in attempts(outcome) if arm.startswith(f"{outcome['framework']}-enforc")][:1]
        denial, seen = attack["attribution"]["denial"], attack["observation"]
        assert denial["effective"] is True
        there = {p["pid"] for p in seen["subject_before"]["processes"]}
        if seen["auid"] is None:  # a visitor's request: of the server, or of a process that it started for it
            assert {denial["pid"], denial["ppid"]} & there
            continue
        assert denial["auid"] == seen["auid"] != 0xFFFFFFFF
        assert denial["pid"] not in there, "its own, not the container's"


def test_nobody_elses_denials_are_listed(found: Outcomes) -> None:
    subjects = {d["subject"] for o in found.values() for _, a in attempts(o) for d in a["denials"]}
    assert subjects
    for subject in subjects:
        assert re.search(r"container_t:s0:c\d+,c\d+$|^docker-default$|^shop-container$|spc_t", subject), subject


def test_two_containers_are_kept_apart_by_their_categories(found: Outcomes) -> None:
    apart = found["container-reads-other-tenant", "selinux"]
    denial = attempts(apart)[-2][1]["attribution"]["denial"]
    ours, theirs = (re.search(r":s0:(c\d+,c\d+)$", denial[side]) for side in ("subject", "object"))
    assert ours and theirs and ours[1] != theirs[1]


@pytest.mark.parametrize("framework", ["apparmor", "selinux"])
def test_a_containment_could_have_come_out_otherwise(tmp_path: Path, framework: str) -> None:
    file = tmp_path / "out.json"
    asked = ("run", "container-mounts-file-system", "--lab", LAB, "-f", framework, "--falsify", "--json", str(file))
    lsmlab(*asked, env=environment(tmp_path))
    (outcome,) = outcomes(file.read_text("utf-8")).values()
    falsified = outcome["falsification"]
    assert (falsified["verdict"], falsified["misled"]) == (NOT_CONTAINED, "UNATTRIBUTED"), falsified


def test_an_attack_can_be_made_by_hand_in_the_container(ran: tuple[Path, Outcomes]) -> None:
    state, found = ran
    number = found["container-reads-host-shadow", "selinux"]["id"]
    by_hand = ("attack", "sh", "-c", "cat /hostetc/shadow; cat /hostetc/hostname; exit 7")
    done = lsmlab("rewind", number, "--", *by_hand, env=environment(state), code=7)
    assert "can't open '/hostetc/shadow': Permission denied" in done.stderr
    assert done.stdout == "lsmlab\n", "etc_t may be read: it ran in the container, in its domain"


def test_what_is_wrong_with_engine_or_container_is_an_error_that_says_so(tmp_path: Path) -> None:
    done = lsmlab(
        "run", str(ERRORS), "--lab", LAB, "--framework", "apparmor", "--json", "-", env=environment(tmp_path), code=3
    )
    found = {name: outcome for (name, _), outcome in outcomes(done.stdout).items()}
    assert {name: outcome["verdict"] for name, outcome in found.items()} == {
        "container-ends-at-once": "ERROR", "container-without-engine": "ERROR",
    }  # fmt: skip
    assert "no configuration" in json.dumps(found["container-ends-at-once"])
    assert "no container engine answers on /run/docker.sock" in found["container-without-engine"]["reason"]


def test_a_lab_without_an_engine_says_so(tmp_path: Path) -> None:
    done = lsmlab("run", "container-reads-host-shadow", "--lab", "debian-13", env=environment(tmp_path), code=4)
    assert "lab debian-13 has no container engine" in done.stderr
