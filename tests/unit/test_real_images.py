"""What was proved on real images: the record, the script that adds to it, and the workflow that has it do so."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from builders import outcome
from ruamel.yaml import YAML
from test_docs import misuse

from lsmlab import discovery, proofs
from lsmlab.errors import DefinitionError
from lsmlab.outcome import Outcome, Report
from lsmlab.proofs import Ledger
from lsmlab.terms import Framework, Verdict

REPO = Path(__file__).resolve().parents[2]
WORKFLOW = REPO / ".github" / "workflows" / "real-images.yml"
LAB = "fedora-44"


def report(*outcomes: Outcome) -> Report:
    return Report(outcomes=outcomes or (outcome(1, lab=LAB),))


# The record


def test_the_committed_record_has_every_lab_whose_image_is_downloaded() -> None:
    ledger = proofs.read()
    assert LAB in ledger.labs
    labs = {path.stem: path.read_text("utf-8") for path in (REPO / "labs").glob("*.yaml")}
    downloaded = {name for name, text in labs.items() if "\ncloud_image:" in text}
    assert downloaded <= set(ledger.labs)
    assert ledger.to_json() == (REPO / proofs.FILE).read_text("utf-8")


def test_a_proof_is_added_and_nothing_else_changed(tmp_path: Path) -> None:
    before = Ledger(labs={LAB: None, "ubuntu-24.04": None})
    later = outcome(2, lab=LAB, framework=Framework.APPARMOR, recorded="2026-11-24T08:45:00+00:00")
    after = before.proved(report(outcome(1, lab=LAB), later), "a run")
    assert before.labs == {LAB: None, "ubuntu-24.04": None}
    proof = after.labs[LAB]
    assert proof is not None and after.labs["ubuntu-24.04"] is None
    assert (proof.date, proof.run, proof.lsmlab) == ("2026-11-24T08:45:00+00:00", "a run", "0.1.0")
    assert (proof.image, proof.kernel, proof.accelerator) == ("86" * 32, "6.12.117+deb13-cloud-amd64", "tcg")
    assert proof.words() == "SELinux CONTAINED, AppArmor CONTAINED"
    (tmp_path / "ledger.json").write_text(after.to_json())
    assert proofs.read(tmp_path / "ledger.json") == after
    again = after.proved(report(), "a later run").labs[LAB]
    assert again is not None and again.words() == "SELinux CONTAINED"


OTHER_IMAGE = outcome().environment.model_copy(update={"image": "99" * 32})


@pytest.mark.parametrize(
    ("outcomes", "words"),
    [
        ((outcome(1, lab=LAB, verdict=Verdict.UNATTRIBUTED),), "fedora-44 is not proved: .* SELinux: UNATTRIBUTED"),
        ((outcome(1, lab="debian-13"),), "a report of debian-13: expected one lab of fedora-44"),
        ((outcome(1, lab=LAB), outcome(2, lab="debian-13")), "a report of debian-13, fedora-44"),
        ((outcome(1, lab=LAB), outcome(2, lab=LAB, environment=OTHER_IMAGE)), "a report of 2 images"),
    ],
)
def test_what_proves_nothing_is_refused(outcomes: tuple[Outcome, ...], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        Ledger(labs={LAB: None}).proved(report(*outcomes), "a run")


def test_an_empty_report_proves_nothing() -> None:
    with pytest.raises(DefinitionError, match="a report of no lab"):
        Ledger(labs={LAB: None}).proved(Report(outcomes=()), "a run")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no record of proofs"),
        ("[]", "no record of proofs"),
        ('{"schema": 1}', "no record of proofs"),
        ('{"schema": 2, "labs": {}}', "schema_: Input should be 1"),
        ('{"schema": 1, "labs": {"a": {}}}', "labs.a.date: Field required"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_damaged_record_is_told(text: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "ledger.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DefinitionError, match=re.escape(words)):
        proofs.read(file)


# The workflow


ALONE = frozenset({"echo", "test", "tee", "sudo", "udevadm", "find"})
"""What a runner has, of all that the workflow calls besides our own."""
SCRIPT = ".venv/bin/python scripts/real_images.py"
ACTIONS = frozenset(f"actions/{name}@v4" for name in ("checkout", "cache", "upload-artifact", "download-artifact"))
MISTAKES = {
    "an option of lsmlab": ("--json out.json 2>&1", "--jsn out.json 2>&1", "no option '--jsn'"),
    "a command of lsmlab": ("lsmlab doctor", "lsmlab docter", "no command 'docter'"),
    "a scenario": ("run nginx-reads-shadow", "run nginx-reads-shadows", "no scenario nginx-reads-shadows"),
    "a target": ("run: make setup", "run: make set-up", "no target set-up"),
    "a script": ("scripts/real_images.py labs", "scripts/real_image.py labs", "no script scripts/real_image.py"),
    "a program": ("udevadm settle", "udevadmin settle", "no program udevadmin"),
    "the shell": ("tee doctor.log", "tee doctor.log)", "syntax error"),
    "a job": ("needs: labs\n", "needs: lab\n", "no job lab"),
    "a job's result": ("(needs.labs.outputs.labs)", "(needs.labs.outputs.lab)", "no output lab of labs"),
    "a step": ("steps.labs.outputs", "steps.lab.outputs", "no step lab"),
    "a file": ("tee run.log", "tee ran.log", "nothing writes run.log"),
    "an artifact": ("name: flagship-", "name: flagships-", "nothing uploads flagship-*"),
    "an action": ("actions/cache@v4", "actions/cash@v4", "no action actions/cash@v4"),
    "rights": ("contents: read", "contents: write", "rights"),
    "no schedule": ('  schedule:\n    - cron: "23 4 * * 1"\n', "", "started by"),
}  # fmt: skip


def test_nothing_is_wrong_with_the_workflow() -> None:
    assert list(wrong_with(WORKFLOW.read_text("utf-8"))) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_in_the_workflow_is_seen(mistake: str) -> None:
    old, new, words = MISTAKES[mistake]
    text = WORKFLOW.read_text("utf-8")
    assert old in text
    said = list(wrong_with(text.replace(old, new)))
    assert any(words in line for line in said), said


def wrong_with(text: str) -> Iterator[str]:
    """What the workflow says that is not there."""
    workflow = YAML(typ="safe").load(StringIO(text))
    jobs = workflow["jobs"]
    if set(workflow["on"]) != {"workflow_dispatch", "schedule"}:
        yield f"started by {list(workflow['on'])}"
    if workflow["permissions"] != {"contents": "read"}:
        yield f"rights {workflow['permissions']}"
    steps = [step for job in jobs.values() for step in job["steps"]]
    uploads = [step["with"]["name"] for step in steps if "upload-artifact" in step.get("uses", "")]
    for job in jobs.values():
        needed = job.get("needs", [])
        yield from (f"no job {n}" for n in ([needed] if isinstance(needed, str) else needed) if n not in jobs)
        for step in job["steps"]:
            yield from wrong_action(step, job, uploads)
        for command in (step["run"] for step in job["steps"] if "run" in step):
            checked = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False)
            yield from [checked.stderr] if checked.returncode else (f for c in calls(command) for f in wrong_call(c))
    for name, output in re.findall(r"needs\.(\w+)\.outputs\.(\w+)", text):
        if output not in jobs.get(name, {}).get("outputs", {}):
            yield f"no output {output} of {name}"
    ids = {step.get("id") for step in steps}
    yield from (f"no step {name}" for name in re.findall(r"steps\.(\w+)\.", text) if name not in ids)


def wrong_action(step: dict[str, Any], job: dict[str, Any], uploads: list[str]) -> Iterator[str]:
    """What is wrong with a step that uses an action."""
    used = step.get("uses")
    if used and used not in ACTIONS:
        yield f"no action {used}"
    given = step.get("with", {})
    if used and "upload" in used:
        commands = " ".join(s.get("run", "") for s in job["steps"])
        kept = {"docs/real-images.json"} if SCRIPT in commands else set()
        written = {*re.findall(r"(?:tee(?: -a)?|--json) (\S+)", commands), *kept}
        yield from (f"nothing writes {file}" for file in given["path"].split() if file not in written)
    if used and "download" in used and not any(name.startswith(given["pattern"].rstrip("*")) for name in uploads):
        yield f"nothing uploads {given['pattern']}"


def calls(command: str) -> Iterator[list[str]]:
    """The words of each program that a step calls; what `sudo` and `find -exec` call as well."""
    for line in command.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|;")
        words.whitespace_split = True
        call: list[str] = []
        for word in (*words, "|"):
            if set(word) <= set("|;"):
                yield call
                call = []
            else:
                call.append(word)
                if word in {"sudo", "-exec"}:
                    yield call
                    call = []


def wrong_call(words: list[str]) -> Iterator[str]:
    """What is wrong with one call."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
        yield from (f"no target {target}" for target in arguments if target not in targets)
    elif program == ".venv/bin/lsmlab":
        if problem := misuse(shlex.join(["lsmlab", *arguments])):
            yield problem
        elif arguments[0] == "run" and arguments[1] not in discovery.scenarios(REPO).ids:
            yield f"no scenario {arguments[1]}"
    elif program == ".venv/bin/python":
        if not (REPO / arguments[0]).is_file():
            yield f"no script {arguments[0]}"
    elif program not in ALONE:
        yield f"no program {program}"


# Its own steps of the script, as they stand there


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """A checkout as a runner has it, as far as the script goes."""
    for name in ("scripts/real_images.py", str(proofs.FILE)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "labs").mkdir()
    return tmp_path


def step(job: str, runner: Path) -> subprocess.CompletedProcess[str]:
    """Run the step of `job` that calls the script, as GitHub does."""
    workflow = YAML(typ="safe").load(WORKFLOW)
    (command,) = [s["run"] for s in workflow["jobs"][job]["steps"] if SCRIPT in s.get("run", "")]
    outputs = {name: str(runner / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command],
        cwd=runner, env={**os.environ, **outputs, "RUN": "a run"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_step_that_finds_the_labs(runner: Path) -> None:
    extends = "kind: lsmlab/lab\nextends: debian-13\nid: {}\n"
    for name in (LAB, "mine"):
        (runner / "labs" / f"{name}.yaml").write_text(extends.format(name))
    done = step("labs", runner)
    assert done.returncode == 0, done.stderr
    key, _, value = (runner / "GITHUB_OUTPUT").read_text().strip().partition("=")
    found = json.loads(value)
    assert (key, LAB in found, "mine" in found, "debian-13" in found) == ("labs", True, False, False)


def test_the_step_that_records(runner: Path) -> None:
    bad = report(outcome(2, lab="ubuntu-24.04", verdict=Verdict.ERROR))
    for lab, seen in ((LAB, report()), ("ubuntu-24.04", bad)):
        (runner / "seen" / f"flagship-{lab}").mkdir(parents=True)
        (runner / "seen" / f"flagship-{lab}" / "out.json").write_text(seen.to_json())
    done = step("record", runner)
    assert done.returncode == 1
    assert "flagship-ubuntu-24.04/out.json: ubuntu-24.04 is not proved: nginx-reads-shadow under SELinux: ERROR" in (
        done.stderr
    )
    kept = proofs.read(runner / proofs.FILE).labs
    proof = kept.pop(LAB)
    assert proof is not None and proof.run == "a run"
    assert set(kept.values()) == {None}
    summary = (runner / "GITHUB_STEP_SUMMARY").read_text()
    assert re.search(r"^\| fedora-44 +\| 2026-11-24 +\| tcg +\| SELinux CONTAINED +\|$", summary, re.MULTILINE)
    assert re.search(r"^\| ubuntu-24.04 +\| never +\|", summary, re.MULTILINE)
    shutil.rmtree(runner / "seen" / "flagship-ubuntu-24.04")
    assert step("record", runner).returncode == 0
