"""A policy from elsewhere: what a lab may name, what the image's recipe knows of it, what is proved of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lsmlab import lab as labs
from lsmlab.errors import DefinitionError, ImageError
from lsmlab.image import build, policy
from lsmlab.lab import Lab
from lsmlab.terms import Framework

LAB = """\
kind: lsmlab/lab
id: other
title: t
backend: qemu
memory_mib: 512
frameworks: [selinux, apparmor]
kernel_arguments: {none: security=none, selinux: security=selinux, apparmor: security=apparmor}
image:
  suite: trixie
  disk_mib: 2048
  packages: [nginx]
"""


def put(folder: Path) -> None:
    """Two policies that lack nothing."""
    for path in ("policy/policy/policy.33", "policy/contexts/files/file_contexts", "profiles/usr.sbin.named"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path, "utf-8")


def load(folder: Path, more: str = "", text: str = LAB) -> Lab:
    file = folder / "other.yaml"
    file.write_text(text + more, "utf-8")
    return labs.load(file, lambda _: None)


BOTH = "  selinux_policy: policy\n  apparmor_profiles: profiles\n"


def test_a_lab_names_both_beside_its_file_and_gets_the_compiler(tmp_path: Path) -> None:
    put(tmp_path)
    found = load(tmp_path, BOTH)
    assert found.image is not None
    assert found.image.elsewhere == {
        Framework.SELINUX: tmp_path / "policy", Framework.APPARMOR: tmp_path / "profiles",
    }  # fmt: skip
    assert found.image.packages == ("nginx", "secilc")
    plain = load(tmp_path).image
    assert plain is not None
    assert (plain.elsewhere, plain.packages) == ({}, ("nginx",))


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (
            "policy",
            "other.yaml:12: image.selinux_policy: .*expected a folder like /etc/selinux/targeted; there is none",
        ),
        ("policy/policy/policy.33", r"other.yaml:12: .*expected a compiled policy in it, policy/policy.NN"),
        ("policy/contexts", "other.yaml:12: .*expected the labels of files in it, contexts/files/file_contexts"),
        ("profiles", "other.yaml:13: image.apparmor_profiles: .*expected a folder of profiles"),
        ("profiles/usr.sbin.named", "other.yaml:13: .*expected profiles in it; there is no file right below it"),
    ],
)
def test_what_a_folder_lacks_is_said_with_its_line(tmp_path: Path, gone: str, said: str) -> None:
    put(tmp_path)
    path = tmp_path / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(DefinitionError, match=said):
        load(tmp_path, BOTH)


def test_a_policy_of_a_framework_that_the_lab_has_not_is_a_mistake(tmp_path: Path) -> None:
    put(tmp_path)
    with pytest.raises(DefinitionError, match="is a policy of apparmor, which is not among the frameworks"):
        load(tmp_path, BOTH, LAB.replace("[selinux, apparmor]", "[selinux]"))


def test_the_newest_compiled_policy_counts_by_number(tmp_path: Path) -> None:
    put(tmp_path)
    for name in ("policy.9", "policy.31", "policy.kern", "policy.34"):
        (tmp_path / "policy" / "policy" / name).touch()
    assert labs.policy_file(tmp_path / "policy") == tmp_path / "policy" / "policy" / "policy.34"


def test_the_recipe_knows_what_is_in_the_folders_and_not_where_they_lie(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        put(folder)
    digest = build.recipe_digest(load(one, BOTH))
    assert build.recipe_digest(load(two, BOTH)) == digest
    assert build.recipe_digest(load(one, BOTH.splitlines()[0] + "\n")) != digest
    assert build.recipe_digest(load(one)) != digest
    (two / "profiles" / "usr.sbin.named").write_text("another", "utf-8")
    changed = build.recipe_digest(load(two, BOTH))
    assert changed != digest
    (two / "policy" / "contexts" / "files" / "more").touch()
    assert build.recipe_digest(load(two, BOTH)) not in {digest, changed}


def test_folders_count_as_well_and_names_need_not_be_text(tmp_path: Path) -> None:
    put(tmp_path)
    digest = build.recipe_digest(load(tmp_path, BOTH))
    (tmp_path / "profiles" / "abstractions").mkdir()  # it takes the place of the distribution's
    with_folder = build.recipe_digest(load(tmp_path, BOTH))
    assert with_folder != digest
    (tmp_path / "profiles" / os.fsdecode(b"a\xff")).touch()
    assert build.recipe_digest(load(tmp_path, BOTH)) not in {digest, with_folder}


@pytest.mark.parametrize("target", ["/etc/hostname", "../../other.yaml", "../../../elsewhere"])
def test_a_link_that_leads_out_of_a_policy_is_refused(tmp_path: Path, target: str) -> None:
    put(tmp_path)
    (tmp_path / "policy" / "contexts" / "files" / "inside").symlink_to("file_contexts")
    load(tmp_path, BOTH)
    (tmp_path / "policy" / "contexts" / "more").symlink_to(target)
    with pytest.raises(DefinitionError, match=r"other.yaml:12: .*contexts/more is a link that leads out of it"):
        load(tmp_path, BOTH)


RULES = "(allow a b (file (read)))\n"
IDLE = "(typeattribute idle)\n(typeattributeset idle (a b))\n"


def test_an_attribute_that_no_rule_uses_may_go() -> None:
    assert policy.prove_same_decisions(f"{IDLE}{RULES}(dontaudit idle b (file (read)))\n", RULES) == 1


def test_an_attribute_that_a_rule_uses_may_not_go() -> None:
    used = "(allow idle b (file (write)))\n"
    with pytest.raises(ImageError, match="lacks the attribute idle, which rules name"):
        policy.prove_same_decisions(f"{IDLE}{used}{RULES}(dontaudit a b (file (read)))\n", f"{used}{RULES}")


def test_who_is_in_an_attribute_that_stays_has_to_be_the_same() -> None:
    less = IDLE.replace("(a b)", "(a)")
    with pytest.raises(ImageError, match="decides otherwise"):
        policy.prove_same_decisions(f"{IDLE}{RULES}(dontaudit a b (file (read)))\n", f"{less}{RULES}")


def test_a_policy_from_elsewhere_may_have_no_dontaudit_rule_and_has_to_have_others() -> None:
    assert policy.prove_same_decisions(RULES, RULES, any_silent=False) == 0
    with pytest.raises(ImageError, match="nothing was proved"):
        policy.prove_same_decisions(RULES, RULES)
    with pytest.raises(ImageError, match="nothing was proved"):
        policy.prove_same_decisions("", "", any_silent=False)
    with pytest.raises(ImageError, match="decides otherwise"):
        policy.prove_same_decisions(RULES, RULES.replace("read", "write"), any_silent=False)
