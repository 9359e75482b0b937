"""Policies from elsewhere on Debian 13: Debian 12's SELinux policy decides, and only the profiles that were brought."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from command import environment, lsmlab, outcomes

from lsmlab import discovery
from lsmlab.image import build
from lsmlab.progress import Silent

pytestmark = [pytest.mark.lsmlab_vm, pytest.mark.slow]

LAB = """\
kind: lsmlab/lab
extends: debian-13
id: older-policies
title: Debian 13 under Debian 12's policies
image:
  selinux_policy: ../policy
  apparmor_profiles: ../profiles
"""
PROFILE = "usr.sbin.named"


def bring(folder: Path) -> None:
    """Put Debian 12's policies below `folder`, of its profiles one, and a lab that takes them."""
    tree = build.ensure(discovery.load_lab("debian-12"), Silent()).need_policy_tree()
    (folder / "labs").mkdir()
    (folder / "labs" / "older-policies.yaml").write_text(LAB, "utf-8")
    with tarfile.open(tree) as tar:
        for member in tar:
            for there, here in (("./etc/selinux/default/", "policy"), ("./etc/apparmor.d/", "profiles")):
                inner = member.name.removeprefix(there)
                if not member.name.startswith(there) or not member.isfile() or inner.startswith("policy/"):
                    continue
                if here == "profiles" and "/" not in inner and inner != PROFILE:
                    continue
                file = folder / here / inner
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(_content(tar, member))
        policy = folder / "policy" / "policy" / "policy.33"
        policy.parent.mkdir()
        # As the distribution ships it, dontaudit rules and all
        policy.write_bytes(_content(tar, tar.getmember("./usr/lib/lsmlab/policy.shipped")))


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def test_the_policies_that_were_brought_decide_and_no_others(tmp_path: Path) -> None:
    bring(tmp_path)
    env = environment(tmp_path / "state")
    ran = ("run", "--lab", "older-policies")
    lsmlab(*ran, "named-reads-tls-keys", "shop-base", "--json", "out.json", env=env, cwd=tmp_path)
    found = outcomes((tmp_path / "out.json").read_text("utf-8"))
    assert len(found) == 4
    for outcome in found.values():
        assert outcome["as_expected"], outcome["reason"]
        said = outcome["environment"]
        assert {name: text.partition(",")[0] for name, text in said["policies"].items()} == {
            "selinux": "policy", "apparmor": "profiles",
        }  # fmt: skip
        assert "selinux-policy-default" not in said["packages"]

    # Debian 13's own policy lets the shop map this file, and denies it to execute: that is expected. Debian 12's denies
    # the map already. The shop's module is compiled with it, and no dontaudit rule hides the record
    lsmlab(*ran, "shop-runs-machine-code", "-f", "selinux", "--json", "out.json", env=env, cwd=tmp_path, code=1)
    (outcome,) = outcomes((tmp_path / "out.json").read_text("utf-8")).values()
    assert outcome["verdict"] == "UNATTRIBUTED"
    (mapped,) = (a for a in outcome["arms"][-1]["attempts"] if a["attempt"] == "run-mapped-file")
    assert {(*d["permissions"], d["object"].split(":")[2]) for d in mapped["denials"]} == {("map", "httpd_tmpfs_t")}

    done = lsmlab(*ran, "tcpdump-runs-a-program", "-f", "apparmor", env=env, cwd=tmp_path, code=3)
    assert "usr.bin.tcpdump" in done.stdout + done.stderr, "the distribution's own profile is gone"
