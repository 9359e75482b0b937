"""`lsmlab schema`: what loads fits the schema, and what an editor can know to be wrong does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsmlab import definition, scenario, schema, skeleton
from lsmlab.scenario import Scenario

REPO = Path(__file__).resolve().parents[2]
SCENARIOS = sorted(
    p for root in ("scenarios", "tests") for p in (REPO / root).rglob("scenario.yaml")
    if definition.peek_kind(p) == scenario.KIND
)  # fmt: skip
LABS = sorted((REPO / "labs").glob("*.yaml"))


def validator(kind: str) -> jsonschema.Draft202012Validator:
    found = schema.of(kind)
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


SCENARIO = validator("scenario")
LAB = validator("lab")


def faults(data: Any, which: jsonschema.Draft202012Validator = SCENARIO) -> list[str]:
    return [leaf.message for error in which.iter_errors(data) for leaf in (error.context or [error])]


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return definition.read_raw(skeleton.create("mine") / "scenario.yaml").data


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda p: p.parent.name)
def test_every_scenario_fits(path: Path) -> None:
    assert not faults(definition.read_raw(path).data)


@pytest.mark.parametrize("path", LABS, ids=lambda p: p.stem)
def test_every_lab_fits(path: Path) -> None:
    assert not faults(definition.read_raw(path).data, LAB)


def test_there_was_something_to_look_at() -> None:
    builds_on = {"extends" in definition.read_raw(p).data for p in [*SCENARIOS, *LABS]}
    assert builds_on == {True, False}


def test_the_skeleton_fits(whole: dict[str, Any]) -> None:
    assert not faults(whole)


Change = Callable[[dict[str, Any]], object]
WRONG: dict[str, tuple[Change, str]] = {
    "a key with a slip": (lambda d: d.update(titel="x"), "'titel' was unexpected"),
    "a key with a slip, below": (lambda d: d["subject"].update(servce="x"), "'servce' was unexpected"),
    "a key with a slip, in a list": (lambda d: d["attempts"][0].update(alowed_if={}), "'alowed_if' was unexpected"),
    "a key that is missing": (lambda d: d.pop("title"), "'title' is a required property"),
    "a key that is missing, below": (lambda d: d["dac"].pop("opened_by"), "'opened_by' is a required property"),
    "another kind": (lambda d: d.update(kind="lsmlab/lab"), "'lsmlab/scenario' was expected"),
    "a verdict with a slip": (lambda d: d["expected"]["selinux"].update(verdict="CONTAIND"), "'CONTAIND'"),
    "a framework that is none": (lambda d: d["expected"].update(tomoyo={}), "'tomoyo'"),
    "a number for a text": (lambda d: d.update(title=7), "7 is not of type 'string'"),
    "a technique of another form": (lambda d: d.update(technique="1003"), "'1003' does not match"),
    "an id with capitals": (lambda d: d.update(id="Mine"), "'Mine' does not match"),
    "no attempts": (lambda d: d.update(attempts=[]), "[] should be non-empty"),
    "a status that is none": (lambda d: d["attempts"][0]["blocked_if"].append({"status": 99}), "99"),
    "nothing for a needed key": (lambda d: d.update(title=None), "None is not of type 'string'"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_does_not_fit(whole: dict[str, Any], name: str) -> None:
    change, words = WRONG[name]
    change(whole)
    found = faults(whole)
    assert any(words in fault for fault in found), found


def test_with_extends_a_mapping_may_be_incomplete_and_a_key_be_taken_away() -> None:
    base = {"kind": "lsmlab/scenario", "extends": "other", "id": "mine"}
    assert not faults(base)
    assert not faults({**base, "subject": {"selinux": "httpd_t"}, "expected": {"apparmor": None}, "setup": None})
    assert not faults({**base, "expected": {"selinux": {"because": "x"}}})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"titel": "x"}, "'titel' was unexpected"),
        ({"subject": {"servce": "x"}}, "'servce' was unexpected"),
        ({"expected": {"selinux": {"verdict": "X"}}}, "'X'"),
        ({"attempts": [{"id": "a"}]}, "is a required property"),
        ({"id": None}, "None is not of type 'string'"),
        ({"extends": None}, "None is not of type 'string'"),
    ],
)
def test_with_extends_the_rest_still_holds(more: dict[str, Any], words: str) -> None:
    found = [
        leaf.message
        for error in SCENARIO.iter_errors({"kind": "lsmlab/scenario", "extends": "other", "id": "mine", **more})
        for leaf in leaves(error)
    ]
    assert any(words in message for message in found), found


def leaves(error: jsonschema.ValidationError) -> list[jsonschema.ValidationError]:
    return [leaf for inner in error.context for leaf in leaves(inner)] if error.context else [error]


def test_a_wrong_key_of_a_lab_does_not_fit() -> None:
    data = definition.read_raw(REPO / "labs" / "debian-13.yaml").data
    assert not faults(data, LAB)
    assert faults({**data, "memory": 1}, LAB)
    assert faults({**data, "memory_mib": "768"}, LAB)


def test_every_key_of_every_model_is_there_by_its_own_name() -> None:
    defs = schema.of("scenario")["$defs"]
    assert set(defs["Scenario"]["properties"]) == {f.alias or n for n, f in Scenario.model_fields.items()}
    assert {"class", "path", "selinux"} <= set(defs["Object"]["properties"])
    assert {"from", "content"} <= set(defs["Write"]["properties"])
    assert set(defs["ScenarioPart"]["properties"]) == {"extends", *defs["Scenario"]["properties"]}


def test_what_the_docstrings_say_is_shown() -> None:
    defs = schema.of("scenario")["$defs"]
    assert defs["Subject"]["properties"]["selinux"]["description"] == "The SELinux type (domain), such as httpd_t."
    assert defs["SubjectPart"]["properties"]["selinux"]["description"]
    assert defs["DenialExpectation"]["properties"]["class"]["description"].startswith("SELinux: the object class.")
    assert defs["Expectation"]["properties"]["because"]["description"].startswith("The reason, from the policy")
    assert all("title" not in shown for d in defs.values() for shown in d.get("properties", {}).values())


def test_it_is_made_anew_each_time_and_always_the_same() -> None:
    first = schema.of("scenario")
    kept = copy.deepcopy(first)
    first["$defs"].clear()
    assert schema.of("scenario") == kept
    assert kept["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda n: st.lists(n) | st.dictionaries(st.text(), n),
        max_leaves=8,
    )
)
def test_any_value_can_be_held_against_it(value: Any) -> None:
    assert faults(value) or not isinstance(value, dict)
