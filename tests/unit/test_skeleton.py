"""`lsmlab new scenario`: what is made loads and is complete, and nothing is ever overwritten."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsmlab import definition, discovery, skeleton
from lsmlab.errors import DefinitionError, HostError, LsmlabError
from lsmlab.scenario import Scenario
from lsmlab.terms import Framework, Verdict


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_a_new_scenario_loads_and_expects_to_be_contained() -> None:
    folder = skeleton.create("mine")
    assert folder == Path("scenarios/mine")
    (made,) = discovery.load_scenarios(["mine"])
    assert made.id == "mine"
    assert {f: e.verdict for f, e in made.expected.items()} == dict.fromkeys(Framework, Verdict.CONTAINED)
    assert made.attacks and made.benign
    assert {p.name for p in made.files()} | {"scenario.yaml"} == {p.name for p in folder.iterdir()}


def test_each_key_is_explained_in_its_line() -> None:
    text = (skeleton.create("mine") / "scenario.yaml").read_text("utf-8")
    for key in (
        k for k in Scenario.model_fields if k in definition.read_raw(Path("scenarios/mine/scenario.yaml")).data
    ):
        if key != "attempts":
            assert re.search(rf"^{key}:.* # ", text, re.MULTILINE), f"{key} has no comment"
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "@name@" not in text


def test_it_says_what_to_do_next() -> None:
    assert skeleton.next_steps(skeleton.create("mine"), "mine") == ("lsmlab check mine", "lsmlab run mine")
    elsewhere = skeleton.create("other", Path("tests/policy"))
    assert skeleton.next_steps(elsewhere, "other") == (f"lsmlab check {elsewhere}", f"lsmlab run {elsewhere}")
    assert discovery.load_scenarios([str(elsewhere)])[0].id == "other"


@pytest.mark.parametrize("name", ["", "Mine", "-mine", "a/b", "..", "a b", "a" * 65, "ä", "mine\n"])
def test_a_name_that_is_no_id(name: str) -> None:
    with pytest.raises(DefinitionError, match="is no id: expected 1 to 64 small letters"):
        skeleton.create(name)
    assert not Path("scenarios").exists()


def test_a_name_that_is_no_id_is_told_the_nearest_that_is() -> None:
    with pytest.raises(DefinitionError, match=r"Call it 'my-first-one'\?"):
        skeleton.create("My first one!")


@given(st.text(min_size=1, max_size=80))
def test_the_nearest_id_is_one(name: str) -> None:
    try:
        skeleton._need_free_id(name)
    except DefinitionError as error:
        near = re.search(r"Call it '(.*)'\?", error.hint)
        if near:
            skeleton._need_free_id(near[1])


def test_nothing_is_overwritten() -> None:
    folder = Path("scenarios/mine")
    folder.mkdir(parents=True)
    (folder / "site.conf").write_text("mine")
    with pytest.raises(DefinitionError, match=r"scenarios/mine: is there already; nothing was changed"):
        skeleton.create("mine")
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("site.conf", "mine")]


@pytest.mark.parametrize("make", ["file", "link"])
def test_what_is_there_may_be_anything(make: str) -> None:
    Path("scenarios").mkdir()
    target = Path("scenarios/mine")
    target.write_text("x") if make == "file" else target.symlink_to("nowhere")
    with pytest.raises(DefinitionError, match="is there already"):
        skeleton.create("mine")
    assert target.is_symlink() or target.read_text() == "x"


def test_a_folder_that_is_a_file() -> None:
    Path("file").write_text("x")
    with pytest.raises(LsmlabError, match="file"):
        skeleton.create("mine", Path("file"))
    with pytest.raises(LsmlabError, match="file"):
        skeleton.create("mine", Path("file/deeper"))
    assert Path("file").read_text() == "x"


def test_a_name_that_a_scenario_has_already() -> None:
    with pytest.raises(DefinitionError, match=r"a scenario is called 'nginx-reads-shadow' already: /.*scenario\.yaml"):
        skeleton.create("nginx-reads-shadow")
    skeleton.create("deep", Path("scenarios/more"))
    with pytest.raises(DefinitionError, match="a scenario is called 'deep' already"):
        skeleton.create("deep")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written() -> None:
    Path("closed").mkdir(mode=0o555)
    with pytest.raises(HostError, match=r"closed/mine: cannot be made: Permission denied"):
        skeleton.create("mine", Path("closed"))


def test_a_place_where_nothing_can_be_made() -> None:
    with pytest.raises(HostError, match=r"/proc/x/mine: cannot be made: .*\n.*--at"):
        skeleton.create("mine", Path("/proc/x"))


def test_nothing_is_left_of_what_failed_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, text: str, encoding: str) -> int:
        if path.name == "site.conf":
            raise OSError(28, "No space left on device")
        return write(path, text, encoding)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(HostError, match="cannot be made: No space left on device"):
        skeleton.create("mine")
    assert list(Path("scenarios").iterdir()) == []


# Templates


def test_a_variable_is_replaced_and_others_signs_stay() -> None:
    text = "id: @name@\n@{PROC} a@b.c $uri {canary} @name@"
    assert skeleton.render(text, {"name": "x"}, "f") == "id: x\n@{PROC} a@b.c $uri {canary} x"


def test_an_unknown_variable_is_told_with_its_line() -> None:
    with pytest.raises(DefinitionError, match=r"^f\.yaml:2: @nmae@: unknown template variable\n  Known: @name@\.$"):
        skeleton.render("a\nid: @nmae@\n", {"name": "x"}, "f.yaml")


def test_an_unknown_variable_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    (tmp_path / "template" / "scenario.yaml").write_text("id: @id@\n")
    with pytest.raises(DefinitionError, match=r"template/scenario\.yaml:1: @id@"):
        skeleton.create("mine", None, tmp_path / "template")
    assert not Path("scenarios").exists()


def test_a_package_without_its_templates_is_said(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"no template is there\n.*Install lsmlab anew"):
        skeleton.create("mine", None, tmp_path / "absent")
