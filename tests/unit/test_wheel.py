"""The wheel: it carries the labs, the scenarios and the guest's scripts, and works from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, unpacked into a folder that has nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("lsmlab-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def lsmlab(installed: Path, folder: Path, *arguments: str) -> str:
    """The command from the wheel, run in `folder`; an installed lsmlab must not answer in its place."""
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import lsmlab.cli as c;"
        f" assert c.__file__.startswith({str(installed)!r}), c.__file__; c.main()"
    )
    env = {**os.environ, "LSMLAB_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_lists_every_lab_and_scenario_of_the_repository(installed: Path, tmp_path: Path) -> None:
    scenarios = {s["id"] for s in json.loads(lsmlab(installed, tmp_path, "scenarios", "--json", "-"))["scenarios"]}
    assert scenarios == {p.parent.name for p in (REPO / "scenarios").glob("*/scenario.yaml")} != set()
    labs = {lab["id"] for lab in json.loads(lsmlab(installed, tmp_path, "labs", "--json", "-"))["labs"]}
    assert labs == {p.stem for p in (REPO / "labs").glob("*.yaml")} != set()


def test_it_carries_what_goes_into_guests_and_images(installed: Path) -> None:
    for name in (
        "guest/agent.py",
        "guest/files.py",
        "guest/kernel.py",
        "guest/undo.py",
        "guest/canaries.py",
        "image/prepare.sh",
        "image/overlay/etc/audit/rules.d/audit.rules",
        "image/overlay/etc/systemd/system/lsmlab-agent.service",
        "image/overlay/usr/lib/lsmlab/agent",
        "templates/scenario/scenario.yaml",
        "templates/scenario/nginx.apparmor",
        "templates/scenario/site.conf",
    ):
        assert (installed / "lsmlab" / name).read_bytes() == (REPO / "harness" / "lsmlab" / name).read_bytes()


def test_a_scenario_of_the_users_own_is_found_and_may_build_on_ours(installed: Path, tmp_path: Path) -> None:
    mine = tmp_path / "scenarios" / "mine"
    mine.mkdir(parents=True)
    (mine / "scenario.yaml").write_text(
        "kind: lsmlab/scenario\nextends: nginx-reads-shadow\nid: mine\ntitle: my own\n", encoding="utf-8"
    )
    listed = json.loads(lsmlab(installed, tmp_path, "scenarios", "--json", "-"))["scenarios"]
    assert {"mine", "nginx-reads-shadow"} <= {s["id"] for s in listed}


def test_a_new_scenario_is_made_checked_and_found(installed: Path, tmp_path: Path) -> None:
    assert "It works as it is." in lsmlab(installed, tmp_path, "new", "scenario", "mine")
    labs = len(list((REPO / "labs").glob("*.yaml")))
    said = lsmlab(installed, tmp_path, "check", "mine", "--no-compile")
    assert f"1 scenario and {labs} labs: {labs + 1} ok" in said
    assert json.loads(lsmlab(installed, tmp_path, "schema", "scenario"))["$defs"]["Scenario"]
