"""`lsmlab try`: any command as any service of the lab, in every arm. Observations, no verdicts: nothing is expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lsmlab import attempt, dac, evidence, prepare, verdict
from lsmlab.attempt import Observation, Opened
from lsmlab.bench import Bench, guest_pool
from lsmlab.dac import DacExplanation
from lsmlab.definition import Strict
from lsmlab.errors import LsmlabError, SetupError
from lsmlab.evidence import Denial, Record
from lsmlab.facts import ObjectFacts, Process, SubjectFacts
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.machine import qemu
from lsmlab.scenario import AllowedIf, Attempt
from lsmlab.terms import Arm, AttemptKind, Framework


@dataclass(frozen=True, slots=True)
class Question:
    """What is tried: `argv` as `service`, perhaps with more groups or as root, under a profile of the user's own."""

    service: str
    argv: tuple[str, ...]
    groups: tuple[str, ...] = ()
    as_root: bool = False
    profile: Path | None = None
    access: str = "read"
    timeout: int = 30

    @property
    def object_path(self) -> str | None:
        """The first argument that is an absolute path: what DAC's answer is about."""
        return next((a for a in self.argv[1:] if a.startswith("/")), None)


class TrialArm(Strict):
    """What happened in one arm. `by` names who refused: DAC, SELinux, AppArmor, or nobody that can be named."""

    arm: Arm
    result: str
    """`ran`, `refused`, `failed` (by itself) or `error` (nothing can be said)."""
    by: str = ""
    reason: str
    domain: str = ""
    """The SELinux type or AppArmor profile that the command ran in."""
    exit_code: int | None = None
    signal: int | None = None
    output: str = ""
    errors: str = ""
    denials: tuple[Denial, ...] = ()
    dac: DacExplanation | None = None


def ask(bench: Bench, question: Question, arms: Sequence[Arm]) -> list[TrialArm]:
    """The answer of each arm, in the order of `arms`. Guests die with an interruption."""
    bench.lab.service(question.service)
    with guest_pool(bench, "try") as pool:
        return list(pool.map(lambda arm: _ask(bench, question, arm), arms))


def _ask(bench: Bench, question: Question, arm: Arm) -> TrialArm:
    task = f"try {arm}"
    try:
        with bench.guest(arm.kernel, task) as machine:
            service = bench.lab.service(question.service)
            profile = question.profile or service.apparmor_profile
            plan = prepare.Plan(
                unit=service.unit,
                setup=(),
                after_start=(),
                policy=PolicyUnderTest(apparmor_profiles=(profile,) if profile else ()),
                object_path=question.object_path,
            )
            bench.progress.step(task, f"starting {question.service} in the mode under test")
            prepared = prepare.bring_into(machine.channel, arm, plan, bench.image)
            if not prepared.service_active:
                raise SetupError(f"{service.unit} does not start in this arm")
            opened = attempt.open_window(machine.channel, plan.unit, plan.object_path)
            opened = opened.model_copy(update={"subject": _altered(machine, opened, question)})
            bench.progress.step(task, " ".join(question.argv)[:60])
            seen = attempt.make(machine.channel, _spec(question), plan.unit, opened)
            return observe(question, arm, seen)
    except (LsmlabError, OSError) as error:
        return TrialArm(arm=arm, result="error", reason=str(error))
    finally:
        bench.progress.done(task)


def _spec(question: Question) -> Attempt:
    # Built without validation: an attempt of a scenario needs a proof, and here nothing is to be proved
    return Attempt.model_construct(
        id="try", kind=AttemptKind.ATTACK, http=None, run=question.argv, canary=None, allowed_if=AllowedIf(),
        blocked_if=(), timeout=question.timeout,
    )  # fmt: skip


def _altered(machine: qemu.QemuMachine, opened: Opened, question: Question) -> SubjectFacts:
    gids: list[int] = []
    for group in question.groups:
        found = machine.channel.run(["getent", "group", group])
        if not found.ok:
            raise SetupError(f"the guest has no group {group!r}")
        gids.append(int(found.out.split(":")[2]))

    def alter(process: Process) -> Process:
        changes: dict[str, object] = {"groups": tuple(dict.fromkeys((*process.groups, *gids)))}
        if question.as_root:
            changes |= {"uids": (0,) * 4, "gids": (0,) * 4}
        return process.model_copy(update=changes)

    processes = tuple(p if p.main and len(opened.subject.processes) > 1 else alter(p) for p in opened.subject.processes)
    return opened.subject.model_copy(update={"processes": processes})


def observe(question: Question, arm: Arm, seen: Observation) -> TrialArm:
    """What one arm showed, in words; who refused is named only where the kernel's record or DAC's rules say so."""
    records = evidence.parse(seen.log)
    denials = verdict.own_denials(seen)
    explanation = None
    if question.object_path is not None and seen.object is not None:
        command = attempt.acting_as(seen.subject_before.workers[0])
        explanation = dac.explain(command, seen.object, question.access)
    result, by, reason = _in_words(arm, seen, records, denials, explanation)
    return TrialArm(
        arm=arm,
        result=result,
        by=by,
        reason=reason,
        domain=verdict.ran_in(seen, records) or "",
        exit_code=seen.exit_code,
        signal=seen.signal,
        output=seen.output,
        errors=seen.errors,
        denials=denials,
        dac=explanation,
    )


def _in_words(
    arm: Arm,
    seen: Observation,
    records: Sequence[Record],
    denials: Sequence[Denial],
    explanation: DacExplanation | None,
) -> tuple[str, str, str]:
    """Result, who refused, and why."""
    profile = seen.subject_before.workers[0].domain if arm.framework else ""
    problem = verdict.failure(arm, seen, records, profile)
    if problem:
        return "error", "", problem
    ran_in = verdict.ran_in(seen, records)
    if arm.framework is not None and ran_in is not None and ran_in != profile:
        return "error", "", f"the command ran in {ran_in or 'no domain'}, and the service is in {profile or 'none'}"
    if seen.exit_code == 0:
        logged = sum(d.logged_only for d in denials)
        return "ran", "", "exit status 0" + (f", {logged} denials logged only" if logged else "")
    about = seen.object if explanation is not None else None
    effective = [d for d in denials if d.effective]
    cause = next((d for d in effective if about is None or _is_about(d, about)), None)
    if cause is None and verdict.REFUSED.search(seen.errors) and explanation is not None and explanation.dac_forbids:
        return "refused", "DAC", explanation.rule
    cause = cause or next(iter(effective), None)
    if cause is not None:
        what = f"{{ {cause.access} }} {cause.name}".strip()
        return "refused", cause.framework.display, what
    return "failed", "", verdict.ending(seen)


def _is_about(denial: Denial, target: ObjectFacts) -> bool:
    """True where the record is about the object that was asked for."""
    if denial.framework is Framework.APPARMOR:
        return denial.name == target.real
    return denial.ino is not None and (denial.ino, denial.dev) == (target.ino, target.device)
