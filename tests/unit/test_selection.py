"""Choosing scenarios: one kind of condition beside another narrows, two of one kind widen."""

from __future__ import annotations

from typing import Any

import pytest
from builders import scenario

from lsmlab import selection
from lsmlab.errors import DefinitionError
from lsmlab.selection import Selection
from lsmlab.terms import Framework, Verdict


def expecting(**verdicts: str) -> dict[str, Any]:
    denials = [{"attempt": "read-shadow", "permissions": ["r"]}]
    return {f: {"verdict": v, "because": "x", "denials": denials} for f, v in verdicts.items()}


THERE = (
    scenario(
        id="a", tags=["web", "credentials"], difficulty="intermediate",
        expected=expecting(selinux="CONTAINED", apparmor="NOT_CONTAINED"),
    ),
    scenario(
        id="b", tags=["web"], technique="T1552.004", difficulty="intermediate",
        expected=expecting(selinux="NOT_CONTAINED"),
    ),
    scenario(id="c", technique="T1003", difficulty="advanced", expected=expecting(apparmor="CONTAINED")),
    scenario(
        id="d", tags=["database"], technique="T1003", difficulty="beginner",
        subject={"service": "postgresql", "selinux": "postgresql_t", "apparmor": "postgresql"},
        expected=expecting(selinux="OVERBLOCKED", apparmor="CONTAINED"),
    ),
)  # fmt: skip


def chosen(**wanted: list[str]) -> str:
    found = selection.read(THERE, **wanted)
    return "".join(s.id for s in THERE if found.takes(s))


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ({}, "abcd"),
        ({"framework": ["selinux"]}, "abd"),
        ({"framework": ["selinux", "apparmor"]}, "abcd"),
        ({"tag": ["web"]}, "ab"),
        ({"tag": ["credentials", "database"]}, "ad"),
        ({"technique": ["T1003"]}, "acd"),
        ({"technique": ["t1003.008"]}, "a"),
        ({"technique": ["T1552", "T1003.008"]}, "ab"),
        ({"service": ["postgresql"]}, "d"),
        ({"difficulty": ["advanced"]}, "c"),
        ({"difficulty": ["Beginner", "advanced"]}, "cd"),
        ({"verdict": ["CONTAINED"]}, "acd"),
        ({"verdict": ["not-contained", "overblocked"]}, "abd"),
        ({"framework": ["selinux"], "verdict": ["CONTAINED"]}, "a"),
        ({"framework": ["apparmor"], "verdict": ["NOT_CONTAINED"]}, "a"),
        ({"framework": ["selinux"], "verdict": ["NOT_CONTAINED"]}, "b"),
        ({"tag": ["web"], "technique": ["T1003"]}, "a"),
        ({"tag": ["web"], "service": ["postgresql"]}, ""),
    ],
)
def test_and_between_kinds_or_within_one(wanted: dict[str, list[str]], ids: str) -> None:
    assert chosen(**wanted) == ids


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("framework", "selinx", "unknown framework 'selinx'\n  Did you mean 'selinux'?"),
        ("difficulty", "easy", "unknown difficulty 'easy'\n  Known: beginner, intermediate, advanced."),
        ("verdict", "CONTAIND", "unknown verdict 'CONTAIND'\n  Did you mean 'CONTAINED'?"),
        ("tag", "wed", "unknown tag 'wed'\n  Did you mean 'web'?"),
        ("service", "ngin", "unknown service 'ngin'\n  Did you mean 'nginx'?"),
        ("technique", "1003", "--technique 1003: expected a technique such as T1003 or T1003.008"),
        ("technique", "T1003.009", "unknown technique 'T1003.009'"),
    ],
)
def test_a_value_that_nothing_has(kind: str, value: str, words: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        chosen(**{kind: [value]})
    assert words in str(caught.value)


def test_every_value_that_is_offered_chooses_without_an_error() -> None:
    offered = selection.values(THERE)
    assert set(offered) == {"framework", "technique", "service", "difficulty", "tag", "verdict"}
    for kind, names in offered.items():
        assert names, kind
        for name in names:
            chosen(**{kind: [name]})
    assert chosen(technique=["T1552"]) == "b", "a technique of which only a sub-technique is there"


def test_a_selection_knows_whether_it_chooses() -> None:
    assert not Selection()
    assert Selection(tags=("web",))
    assert Selection(verdicts=(Verdict.ERROR,))


def test_the_verdict_of_a_single_lab_is_found_too() -> None:
    other = {**expecting(selinux="NOT_CONTAINED")["selinux"], "verdict": "CONTAINED"}
    expected = expecting(selinux="NOT_CONTAINED")
    expected["selinux"]["labs"] = {"debian-12": other}
    one = scenario(expected=expected)
    assert selection.verdicts_of(one, Framework.SELINUX) == {
        "": Verdict.NOT_CONTAINED,
        "debian-12": Verdict.CONTAINED,
    }
    assert Selection(verdicts=(Verdict.CONTAINED,)).takes(one)
    assert not Selection(verdicts=(Verdict.ERROR,)).takes(one)
    assert selection.verdicts_of(one, Framework.APPARMOR) == {}
    assert selection.verdict_words(one, Framework.SELINUX) == "NOT_CONTAINED, debian-12: CONTAINED"
    assert selection.verdict_words(one, Framework.APPARMOR) == "-"


def test_a_scenario_with_a_unit_of_its_own_is_found_by_that() -> None:
    one = scenario(subject={"unit": "shop.service", "selinux": "httpd_t", "apparmor": "shop"})
    assert Selection(services=("shop",)).takes(one)
    assert selection.values([one])["service"] == ["shop"]
