"""From nothing to a scenario that ran, as docs/write-a-scenario.md leads there; what the labs' own tools refuse."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import REPO, environment, outcomes

pytestmark = pytest.mark.lsmlab_vm

PAGE = (REPO / "docs" / "write-a-scenario.md").read_text("utf-8")
LABS = ["debian-13", pytest.param("debian-12", marks=pytest.mark.slow)]


def lsmlab(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command, run in `folder`; with a store of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lsmlab.cli", *arguments],
        cwd=folder, env=environment(folder / "state"), capture_output=True, text=True, timeout=1700, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def build_image(lab: str) -> None:
    subprocess.run([sys.executable, "-m", "lsmlab.cli", "images", "build", lab], cwd=REPO, timeout=1700, check=True)


def steps() -> list[str]:
    """The commands of the page and the scenario between them, in their order."""
    found: list[str] = []
    for language, body in re.findall(r"^ *```(\w*)\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL):
        if language == "sh":
            found += [line.strip() for line in body.splitlines() if line.strip()]
        elif body.startswith("kind: "):
            found.append(body)
    return found


def test_the_way_to_a_scenario_can_be_gone(tmp_path: Path) -> None:
    ran: list[dict[str, str]] = []
    for step in steps():
        if step.startswith("kind: "):
            (tmp_path / "scenarios" / "my-key" / "scenario.yaml").write_text(step, "utf-8")
            continue
        words = shlex.split(step.partition(" > ")[0])[1:]
        more = ["--json", "out.json"] if words[0] == "run" else []
        done = lsmlab(tmp_path, words[0], *more, *words[1:])
        if words[0] == "run":
            found = outcomes((tmp_path / "out.json").read_text("utf-8"))
            ran.append({framework: o["verdict"] for (_, framework), o in found.items()})
        if words[0] == "shell":
            assert done.stdout.strip() == "", "the page says that there is no such rule"
    assert ran == [
        {"selinux": "CONTAINED", "apparmor": "CONTAINED"},
        {"selinux": "CONTAINED", "apparmor": "NOT_CONTAINED"},
    ]
    (tmp_path / "docs").mkdir()
    lsmlab(tmp_path, "catalogue", "--out", "docs")
    assert "## Only SELinux contains it" in (tmp_path / "docs" / "comparison.md").read_text("utf-8")


@pytest.mark.parametrize("lab", LABS)
def test_what_the_labs_own_tools_refuse_is_told_with_file_and_line(lab: str, tmp_path: Path) -> None:
    build_image(lab)
    changes: dict[str, list[tuple[str, str, str]]] = {
        "sound": [],
        "profile": [("nginx.apparmor", "/srv/** r,", "/srv/** r")],
        "module": [("scenario.yaml", "modules: []", "modules: [m.cil]")],
        "names": [("scenario.yaml", "sshd_key_t #", "ssh_key_t #"), ("scenario.yaml", "nginx # the", "ngin # the")],
    }
    for name, edits in changes.items():
        lsmlab(tmp_path, "new", "scenario", name)
        for file, old, new in edits:
            path = tmp_path / "scenarios" / name / file
            text = path.read_text("utf-8")
            assert old in text
            path.write_text(text.replace(old, new), "utf-8")
    (tmp_path / "scenarios" / "module" / "m.cil").write_text("(type my_t)\n(allow httpd_t none_t (file (read)))\n")
    document: dict[str, Any] = json.loads(lsmlab(tmp_path, "check", "--lab", lab, "--json", "-", code=4).stdout)
    rows = {row["id"]: row for row in document["files"] if row["kind"] == "scenario"}
    assert {name: row["status"] for name, row in rows.items()} == {
        "sound": "sound", "profile": "faulty", "module": "faulty", "names": "faulty",
    }  # fmt: skip
    (fault,) = rows["profile"]["faults"]
    assert re.match(rf"{re.escape(os.fspath(tmp_path))}/scenarios/profile/nginx\.apparmor:\d+: syntax error", fault), (
        fault
    )
    (fault,) = rows["module"]["faults"]
    assert "/scenarios/module/m.cil:2: Failed to resolve allow statement: (allow httpd_t none_t" in fault
    assert sorted(f.partition(": ")[2].partition(": ")[0] for f in rows["names"]["faults"]) == [
        "object.selinux", "subject.apparmor",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("lab", ["debian-13", "debian-12"])
def test_every_policy_of_the_library_compiles(lab: str) -> None:
    """And every type, boolean and profile that a scenario names is there. A run takes what was compiled here."""
    build_image(lab)
    done = subprocess.run(
        [sys.executable, "-m", "lsmlab.cli", "check", "--lab", lab],
        cwd=REPO, capture_output=True, text=True, timeout=1700, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
