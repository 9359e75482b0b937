"""What attempts and evidence prove. Pure functions: no guest, no clock, no default.

`judge` gives one attempt in one arm its result; `attribute` finds the denial that accounts for a block; `conclude`
weighs the arms of one scenario under one framework. The rules are those of docs/design.md.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence

from lsmlab import evidence
from lsmlab.attempt import REFUSALS, Observation
from lsmlab.container.install import DEFAULT_PROFILE
from lsmlab.dac import DacExplanation
from lsmlab.definition import Strict
from lsmlab.evidence import Denial, Record
from lsmlab.facts import ModeFacts, Process, SubjectFacts, domain_of
from lsmlab.scenario import CANARY, INODE_CLASSES, Attempt, BlockedIf, DenialExpectation, Scenario
from lsmlab.terms import (
    Arm,
    AttemptKind,
    Control,
    Framework,
    Result,
    SourceState,
    Verdict,
    arms_of,
)

REFUSED = re.compile(REFUSALS)
SUBJECT_KEY = "lsmlab-subject"
"""The audit key of the exec that starts a `run` attempt's program."""
FORK_KEY = "lsmlab-fork"
"""The audit key of every call that starts a process: `ppid` has started `pid`, which starts another."""


class Judgement(Strict):
    """One attempt's result in one arm, and the reason in words."""

    result: Result
    reason: str


class Attribution(Strict):
    """The denial that accounts for a block, or why none does."""

    denial: Denial | None
    misses: tuple[str, ...]
    """For each denial that does not account for it: what does not fit."""


class JudgedAttempt(Strict):
    """One attempt in one arm, judged. `denials` are those of the subject's own processes."""

    attempt: str
    kind: AttemptKind
    result: Result
    reason: str
    denials: tuple[Denial, ...] = ()
    attribution: Attribution | None = None
    dac: DacExplanation | None = None


class JudgedArm(Strict):
    """One arm: its attempts, or the error that kept it from running."""

    arm: Arm
    error: str = ""
    service_active: bool = True
    setup_denials: tuple[Denial, ...] = ()
    """Effective denials of the subject's domain while the service was started."""
    attempts: tuple[JudgedAttempt, ...] = ()

    @property
    def start_denial(self) -> Denial | None:
        """The denial that kept the service from starting, where it could not start and the policy is why."""
        return next((d for d in self.setup_denials if d.effective and not self.service_active), None)


class Conclusion(Strict):
    """The verdict and its reason, one sentence for people."""

    verdict: Verdict
    reason: str


def mode_problem(arm: Arm, mode: ModeFacts, profile: str) -> str:
    """Why `mode` is not the arm's mode, or an empty text."""
    if arm is Arm.DAC:
        present = [f for f in Framework if f in mode.lsm]
        return f"{present[0].display} is active in the kernel of the control arm" if present else ""
    framework = arm.framework
    assert framework is not None
    if framework not in mode.lsm:
        return f"the kernel has no {framework.display} (LSM list: {','.join(mode.lsm)})"
    return _selinux_problem(arm, mode) if framework is Framework.SELINUX else _apparmor_problem(arm, mode, profile)


def _selinux_problem(arm: Arm, mode: ModeFacts) -> str:
    if mode.selinux_enforcing is None:
        return "SELinux has no policy loaded"
    if mode.selinux_enforcing == arm.logging:
        return f"SELinux is {'enforcing' if mode.selinux_enforcing else 'permissive'}"
    return ""


def _apparmor_problem(arm: Arm, mode: ModeFacts, profile: str) -> str:
    if mode.apparmor_mode != "enforce":
        return f"AppArmor as a whole is in mode {mode.apparmor_mode or 'unknown'}"
    loaded = (mode.profiles or {}).get(profile)
    if arm is Arm.APPARMOR_COMPLAIN and loaded not in {None, "complain"}:
        return f"profile {profile} is in mode {loaded}"
    if arm.unconfined and loaded is not None and profile != DEFAULT_PROFILE:  # others' containers need the engine's own
        return f"profile {profile} is loaded in the control arm"
    return ""


def judge(spec: Attempt, arm: Arm, seen: Observation, subject: str) -> Judgement:
    """The result of one attempt. `subject` is the domain or profile that must have acted.

    Machine, mode and evidence first (failed), then object and subject (unclear), then the proofs.
    """
    records = evidence.parse(seen.log)
    problem = failure(arm, seen, records, subject, changes_mac=spec.changes_mac)
    if problem:
        return Judgement(result=Result.FAILED, reason=problem)
    problem = _unready(seen, changes_mac=spec.changes_mac) or _subject_problem(arm, seen, records, subject)
    if problem:
        return Judgement(result=Result.UNCLEAR, reason=problem)
    proof = _proof_of_allowed(spec, seen)
    if seen.auid is not None and ran_in(seen, records) is None and (proof or seen.exit_code == 0):
        return Judgement(result=Result.UNCLEAR, reason="no exec record proves which domain the command ran in")
    if proof:
        return Judgement(result=Result.ALLOWED, reason=proof)
    if seen.auid is not None and not exec_made(seen, records):
        return Judgement(result=Result.UNCLEAR, reason=f"the command was not started: {ending(seen)}")
    sign = next((s for s in (_sign(b, seen) for b in spec.blocked_if) if s), "") or _refusal(spec, seen)
    if not sign:
        return Judgement(result=Result.UNCLEAR, reason=f"neither proof nor sign of a block: {ending(seen)}")
    other = _sign_of_success(spec, arm, seen, records, subject)
    if other:
        return Judgement(result=Result.UNCLEAR, reason=f"{sign}, and yet {other}")
    return Judgement(result=Result.BLOCKED, reason=sign)


def _sign_of_success(spec: Attempt, arm: Arm, seen: Observation, records: Sequence[Record], subject: str) -> str:
    """What speaks against a block, although it is no proof of a success."""
    if spec.changes_mac and (
        mode_problem(arm, seen.mode_after, subject)
        or evidence.mode_changes(records)
        or _hidden_mode_change(arm, seen, records)
    ):
        return "MAC was changed"
    if spec.canary is not None and any(seen.canary in text for text in (seen.output, seen.errors, seen.head)):
        return "the canary came out"
    if seen.cut_short:
        return "its answer was not over: what shows a success may be still to come"
    return ""


def failure(arm: Arm, seen: Observation, records: Sequence[Record], subject: str, *, changes_mac: bool = False) -> str:
    """What makes an attempt worthless: a wrong mode, an evidence source that was not read, a change in between.

    `changes_mac`: such a change is what the attempt is about.
    """
    for when, mode in (("before", seen.mode_before), ("after", seen.mode_after)):
        problem = mode_problem(arm, mode, subject)
        if problem and not (changes_mac and when == "after"):
            return f"wrong mode {when} the attempt: {problem}"
    if seen.source.state is SourceState.UNAVAILABLE:
        return f"{seen.source.name} unavailable: {seen.source.detail}"
    audit_changes = evidence.audit_changes(records)
    if audit_changes:
        return f"auditing was changed inside the window: {audit_changes[0].raw[:200]}"
    changes = evidence.mode_changes(records)
    if changes and not changes_mac:
        return f"mode or policy changed inside the window: {changes[0].raw[:200]}"
    return "" if changes_mac else _hidden_mode_change(arm, seen, records)


def _hidden_mode_change(arm: Arm, seen: Observation, records: Sequence[Record]) -> str:
    """AppArmor's mode as a whole is switched without a record: what an enforcing profile only logged tells of it."""
    if arm.framework is not Framework.APPARMOR:
        return ""
    before, after = seen.mode_before.profiles or {}, seen.mode_after.profiles or {}
    for denial in evidence.denials(records):
        profile = denial.subject
        if denial.logged_only and before.get(profile) == after.get(profile) == "enforce":
            return f"profile {profile} is in mode enforce, and only logged: {denial.headline[:200]}"
    return ""


def _unready(seen: Observation, *, changes_mac: bool) -> str:
    if seen.object is not None and not seen.object.exists:
        return f"the object {seen.object.path} is absent"
    if seen.canary_planted is False:
        return "the canary could not be planted"
    if seen.effect_before:
        return "the effect was there before the attempt"
    if seen.subject_before.service.active != "active":
        return f"the service is {seen.subject_before.service.active}, not active"
    if not seen.subject_before.workers:
        return "the service has no process"
    return _unsteady(seen.subject_before, seen.subject_after, changes_mac=changes_mac)


def _unsteady(before: SubjectFacts, after: SubjectFacts, *, changes_mac: bool) -> str:
    """Why the facts about the subject before the attempt were not those of who acted.

    `changes_mac`: its domain or profile may be another one afterwards: that may be what the attempt is about.
    """
    if all(p.main for p in before.workers) and any(not p.main for p in after.processes):
        return "the service's workers appeared only during the attempt"
    for old, new in zip(_mains(before), _mains(after), strict=False):
        if old.pid != new.pid and _rights(old) != _rights(new):
            return (
                "the service was started anew during the attempt, with other rights: "
                f"it had uid {old.uids[1]} and the label {old.label!r}, and has {new.uids[1]} and {new.label!r}"
            )
    later = {p.pid: p for p in after.processes}
    for process in before.workers:
        now = later.get(process.pid, process)
        if _rights(now, changes_mac=changes_mac) != _rights(process, changes_mac=changes_mac):
            return f"{process.name} (pid {process.pid}) changed its user, groups or domain during the attempt"
    return ""


def _mains(facts: SubjectFacts) -> tuple[Process, ...]:
    return tuple(p for p in facts.processes if p.main)


def _rights(process: Process, *, changes_mac: bool = False) -> tuple[object, ...]:
    return (process.uids, process.groups, *(() if changes_mac else (process.label,)))


def _subject_problem(arm: Arm, seen: Observation, records: Sequence[Record], subject: str) -> str:
    """Why it is not known that who acted was who should have: confined, or unconfined in the weaker control."""
    if arm is Arm.DAC:
        return ""
    if not arm.unconfined:
        return wrong_subject(seen, records, subject)
    found = [ran_in(seen, records)] if seen.auid is not None else [p.domain for p in seen.subject_before.workers]
    return f"the control's subject is confined: it runs in {subject}" if subject in found else ""


def wrong_subject(seen: Observation, records: Sequence[Record], subject: str) -> str:
    """Who acted, where it is not the expected domain or profile."""
    if seen.auid is not None:
        found = ran_in(seen, records)
        if (
            found is None
        ):  # the exec itself was refused: the proofs decide; but a success without a proved subject is none
            return "no exec record proves which domain the command ran in" if seen.exit_code == 0 else ""
        return "" if found == subject else f"the command ran in {found or 'no domain'}, not in {subject}"
    for process in seen.subject_before.workers:
        if process.domain != subject:
            return f"{process.name} (pid {process.pid}) runs in {process.domain or 'no domain'}, not in {subject}"
    return ""


def ran_in(seen: Observation, records: Sequence[Record]) -> str | None:
    """The domain or profile of a `run` attempt's command, from the kernel's record of its exec; None without one."""
    for record in reversed(records):
        ours = record.type == "SYSCALL" and record.fields.get("key") == SUBJECT_KEY and _auid(record) == seen.auid
        if ours and record.fields.get("success") == "yes":
            return domain_of(record.fields.get("subj", ""))
    return None


def exec_made(seen: Observation, records: Sequence[Record]) -> bool:
    """True where the kernel recorded the exec of a `run` attempt's program, permitted or refused."""
    return any(r.type == "SYSCALL" and r.fields.get("key") == SUBJECT_KEY and _auid(r) == seen.auid for r in records)


def _auid(record: Record) -> int | None:
    return evidence.number(record.fields.get("auid"))


def _proof_of_allowed(spec: Attempt, seen: Observation) -> str:
    proofs: list[str] = []
    wanted = spec.allowed_if
    if wanted.output is not None:
        if wanted.output.replace(CANARY, seen.canary) not in seen.output:
            return ""
        proofs.append("the canary was read" if CANARY in wanted.output else f"the output has {wanted.output!r}")
    if wanted.status is not None:
        if seen.http_status != wanted.status:
            return ""
        proofs.append(f"HTTP {wanted.status}")
    if wanted.effect is not None:
        if not seen.effect_after:
            return ""
        proofs.append("the effect was seen")
    return ", ".join(proofs)


def _sign(wanted: BlockedIf, seen: Observation) -> str:
    signs: list[tuple[object, bool, str]] = [
        (wanted.status, seen.http_status == wanted.status, f"HTTP {wanted.status}"),
        (wanted.exit, seen.exit_code == wanted.exit, f"exit status {wanted.exit}"),
        (wanted.signal, seen.signal == wanted.signal, f"signal {wanted.signal}"),
        (wanted.timeout, seen.timed_out, "timed out"),
    ]
    if wanted.output is not None:
        match = re.search(wanted.output, seen.output + seen.errors)
        signs.append((wanted.output, match is not None, match[0] if match else ""))
    declared = [(seen_it, words) for is_declared, seen_it, words in signs if is_declared]
    return ", ".join(words for _, words in declared) if all(ok for ok, _ in declared) else ""


def _refusal(spec: Attempt, seen: Observation) -> str:
    if spec.run is None or seen.exit_code in {0, None}:
        return ""
    match = REFUSED.search(seen.errors)
    return f"{match[0]} (exit status {seen.exit_code})" if match else ""


def ending(seen: Observation) -> str:
    """How an operation ended, in words."""
    if seen.timed_out:
        return f"timed out after {seen.seconds:.0f} s"
    first = next(
        (line.strip() for line in (seen.errors + "\n" + seen.output).splitlines() if line.strip()), "no output"
    )
    if seen.http_status is not None:
        return f"HTTP {seen.http_status}"
    if seen.signal is not None:
        return f"signal {seen.signal}"
    return f"{first[:160]!r}" if seen.exit_code is None else f"exit status {seen.exit_code}, {first[:160]!r}"


def own_denials(seen: Observation) -> tuple[Denial, ...]:
    """The denials in the window that belong to the subject's processes; of a `run`, from its program's exec on."""
    records = evidence.parse(seen.log)
    start = None
    if seen.auid is not None:
        start = next((r for r in records if r.fields.get("key") == SUBJECT_KEY and _auid(r) == seen.auid), None)
        records = tuple(r for r in records if start is not None and r.serial >= start.serial)
    family = _family(seen, records)
    found = (d for d in evidence.denials(records) if _is_subjects(d, seen, family))
    return tuple(d for d in found if start is None or not _of_entering(d, start))


def _of_entering(denial: Denial, start: Record) -> bool:
    """Whether a denial is of who let the subject in: another domain's, in the exec that succeeded all the same.

    Who starts a process in another domain may be denied to pass on signals and limits (siginh, rlimitinh).
    """
    entered = domain_of(start.fields.get("subj", ""))
    return denial.event == start.event and start.fields.get("success") == "yes" and denial.subject_domain != entered


def _family(seen: Observation, records: Sequence[Record]) -> frozenset[int]:
    """The service's processes, and those among their descendants that started others, by the kernel's records of it.

    A record's pid and ppid are of the initial namespace; what the call returned is of the caller's own.
    """
    family = {p.pid for p in (*seen.subject_before.processes, *seen.subject_after.processes)}
    children: dict[int | None, list[int]] = {}
    for record in records:
        if record.type == "SYSCALL" and record.fields.get("key") == FORK_KEY:
            child = evidence.number(record.fields.get("pid"))
            children.setdefault(evidence.number(record.fields.get("ppid")), []).extend([] if child is None else [child])
    left = list(family)
    while left:  # each process once: a service may start a long line of them
        new = [child for child in children.pop(left.pop(), ()) if child not in family]
        family.update(new)
        left += new
    return frozenset(family)


def _is_subjects(denial: Denial, seen: Observation, family: frozenset[int]) -> bool:
    if seen.auid is not None:
        return denial.auid == seen.auid
    return denial.pid in family or denial.ppid in family


def attribute(
    scenario: Scenario, framework: Framework, expected: DenialExpectation | None, seen: Observation
) -> Attribution:
    """The effective denial in the window that is of the expected subject, object and permission."""
    misses: list[str] = []
    records = evidence.parse(seen.log)
    family = _family(seen, records)
    for denial in evidence.denials(records):
        if denial.framework is not framework:
            continue
        miss = _misfit(denial, scenario, framework, expected, seen, family)
        if not miss:
            return Attribution(denial=denial, misses=())
        misses.append(f"{miss}: {denial.headline}")
    nearest_first = sorted(misses, key=lambda miss: miss.startswith("another subject"))
    return Attribution(denial=None, misses=tuple(nearest_first))


def _misfit(
    denial: Denial,
    scenario: Scenario,
    framework: Framework,
    expected: DenialExpectation | None,
    seen: Observation,
    family: frozenset[int],
) -> str:
    subject = (expected.subject if expected else None) or scenario.subject_name(framework)
    if denial.subject_domain != subject:
        return f"another subject ({denial.subject_domain}, not {subject})"
    if not _is_subjects(denial, seen, family):
        return f"another process (pid {denial.pid})"
    if not denial.effective:
        return "not effective: " + ("logged only" if denial.logged_only else "the call succeeded all the same")
    if expected is not None and expected.permissions and not set(expected.permissions) & set(denial.permissions):
        return f"another permission ({' '.join(denial.permissions)}, not {' or '.join(expected.permissions)})"
    if expected is not None and expected.operation not in {None, denial.operation}:
        return f"another operation ({denial.operation}, not {expected.operation})"
    check = _selinux_object if framework is Framework.SELINUX else _apparmor_object
    return check(denial, scenario, expected, seen)


def _selinux_object(denial: Denial, scenario: Scenario, expected: DenialExpectation | None, seen: Observation) -> str:
    tclass = (expected.tclass if expected else None) or scenario.object.tclass
    if denial.tclass != tclass:
        return f"another class ({denial.tclass}, not {tclass})"
    if expected is None and scenario.object.path is None:
        return "no object is expected that it could be compared with"
    wanted = (expected.selinux_object if expected else None) or scenario.object.selinux
    if wanted is not None and denial.object_type != wanted:
        return f"another object type ({denial.object_type}, not {wanted})"
    path = expected.path if expected else None
    if path is not None:
        # An AVC's name= is the last component alone; the PATH records of its event have what the process asked for
        same = denial.name == path or any(posixpath.normpath(name) == path for name, _ in denial.paths)
        return "" if same else f"another object ({denial.name}, not {path})"
    redirected = expected is not None and expected.selinux_object is not None
    target = seen.object if tclass in INODE_CLASSES and not redirected else None
    if target is not None and (denial.ino, denial.dev) != (target.ino, target.device):
        return f"another object (inode {denial.ino} on {denial.dev}, not {target.ino} on {target.device})"
    return ""


def _apparmor_object(denial: Denial, scenario: Scenario, expected: DenialExpectation | None, seen: Observation) -> str:
    tclass = expected.tclass if expected else None
    if tclass is not None and denial.tclass not in {tclass, ""}:  # kernels before 6.5 write no class
        return f"another class ({denial.tclass}, not {tclass})"
    path = (expected.path if expected else None) or (seen.object.real if seen.object else "") or scenario.object.path
    if path is None and tclass in {None, "file"} and (expected is None or expected.operation is None):
        return "no object is expected that it could be compared with"
    if path is None or (tclass not in {None, "file"} and (expected is None or expected.path is None)):
        return ""
    return "" if denial.name == path else f"another object ({denial.name}, not {path})"


def settle(judgement: Judgement, attribution: Attribution) -> Judgement:
    """The judgement, where it and the kernel's record do not contradict each other; unclear where they do."""
    if judgement.result is Result.ALLOWED and attribution.denial is not None:
        words = f"{judgement.reason}, and yet the kernel refused it: {attribution.denial.headline}"
        return Judgement(result=Result.UNCLEAR, reason=words)
    return judgement


def conclude(framework: Framework, arms: Mapping[Arm, JudgedArm], control: Control = Control.DAC) -> Conclusion:
    """The verdict of one scenario under one framework, by the order of precedence in docs/design.md."""
    weighing = _Weighing(framework, arms, control)
    rules = (
        weighing.not_contained, weighing.error, weighing.inconclusive, weighing.control_blocked,
        weighing.unattributed, weighing.overblocked, weighing.benign_broken,
    )  # fmt: skip
    for rule in rules:
        found = rule()
        if found is not None:
            return found
    return weighing.contained()


class _Weighing:
    """The arms of one framework, and one method for each verdict."""

    def __init__(self, framework: Framework, arms: Mapping[Arm, JudgedArm], control: Control) -> None:
        self.framework = framework
        self.unconfined = control is Control.UNCONFINED
        names = arms_of(framework, control)
        self.arms = {name: arms.get(name) or JudgedArm(arm=name, error="the arm was not run") for name in names}
        self.control, *self.logging, self.enforcing = self.arms.values()
        known: dict[str, AttemptKind] = {}
        for arm in self.arms.values():
            known |= {a.attempt: a.kind for a in arm.attempts}
        self.attacks = [a for a, kind in known.items() if kind is AttemptKind.ATTACK]
        self.benign = [a for a, kind in known.items() if kind is AttemptKind.BENIGN]

    def of(self, arm: JudgedArm, attempt: str) -> JudgedAttempt:
        found = next((a for a in arm.attempts if a.attempt == attempt), None)
        reason = arm.error or "the attempt was not made"
        return found or JudgedAttempt(attempt=attempt, kind=AttemptKind.ATTACK, result=Result.FAILED, reason=reason)

    def result(self, arm: JudgedArm, attempt: str) -> Result:
        return self.of(arm, attempt).result

    def blocked_in_control(self) -> list[str]:
        return [a for a in self.attacks if self.result(self.control, a) is Result.BLOCKED]

    def needed(self) -> list[tuple[JudgedArm, JudgedAttempt]]:
        """What the verdict rests on: attacks in the control; and, unless one is blocked there, everything."""
        pairs = [(self.control, a) for a in self.attacks]
        if not self.blocked_in_control():
            pairs += [(arm, a) for arm in (*self.logging, self.enforcing) for a in self.attacks]
            pairs += [(arm, a) for arm in self.arms.values() for a in self.benign]
        return [(arm, self.of(arm, a)) for arm, a in pairs]

    def not_contained(self) -> Conclusion | None:
        for attack in self.attacks:
            seen = self.of(self.enforcing, attack)
            if seen.result is Result.ALLOWED and self.result(self.control, attack) is Result.ALLOWED:
                logged = next((d for d in seen.denials if d.logged_only), None)
                why = f"; the kernel only logged it: {logged.headline}" if logged else ""
                return Conclusion(
                    verdict=Verdict.NOT_CONTAINED,
                    reason=f"{attack} succeeds under {self.framework.display} ({seen.reason}){why}",
                )
        return None

    def error(self) -> Conclusion | None:
        if not self.attacks:
            broken = next((a for a in self.arms.values() if a.error), self.control)
            return Conclusion(verdict=Verdict.ERROR, reason=f"{broken.arm}: {broken.error or 'no attack was made'}")
        for arm, attempt in self.needed():
            if attempt.result is Result.FAILED:
                return Conclusion(verdict=Verdict.ERROR, reason=f"{arm.arm}: {attempt.attempt}: {attempt.reason}")
        return None

    def denied_benign(self) -> list[JudgedAttempt]:
        """Benign work that the control permits, and that fails in the enforcing arm with a denial."""
        found = []
        for name in self.benign:
            seen = self.of(self.enforcing, name)
            denied = seen.result is Result.BLOCKED and any(d.effective for d in seen.denials)
            denied = denied and all(self._by_policy(self.of(arm, name)) for arm in self.logging)
            denied = denied or (seen.result is not Result.ALLOWED and self.enforcing.start_denial is not None)
            if self.result(self.control, name) is Result.ALLOWED and denied:
                found.append(seen)
        return found

    @staticmethod
    def _by_policy(logged: JudgedAttempt) -> bool:
        """Whether a logging arm leaves it to the policy that benign work fails where it is enforced: it works there, or
        an explicit deny took effect."""
        return logged.result is not Result.BLOCKED or any(d.effective for d in logged.denials)

    def inconclusive(self) -> Conclusion | None:
        overblocked = {a.attempt for a in self.denied_benign()}
        for arm, attempt in self.needed():
            excused = arm is self.enforcing and (arm.start_denial is not None or attempt.attempt in overblocked)
            if attempt.result is Result.UNCLEAR and not excused:
                return Conclusion(
                    verdict=Verdict.INCONCLUSIVE, reason=f"{arm.arm}: {attempt.attempt}: {attempt.reason}"
                )
        return None

    def control_blocked(self) -> Conclusion | None:
        for attack in self.blocked_in_control():
            seen = self.of(self.control, attack)
            if seen.dac is not None and seen.dac.dac_forbids:
                return Conclusion(
                    verdict=Verdict.DAC_BLOCKED, reason=f"{attack}: DAC alone forbids it: {seen.dac.rule}"
                )
            where = "unconfined" if self.unconfined else "without MAC"
            return Conclusion(
                verdict=Verdict.CONTROL_BLOCKED,
                reason=f"{attack}: blocked {where} ({seen.reason}), "
                + (f"and DAC is not why: {seen.dac.rule}" if seen.dac else "and whether DAC is why was not looked at"),
            )
        return None

    def unattributed(self) -> Conclusion | None:
        for attack in self.attacks:
            for arm in self.logging:
                logged = self.of(arm, attack)
                explicit_deny = logged.attribution is not None and logged.attribution.denial is not None
                if logged.result is Result.BLOCKED and not explicit_deny:
                    return Conclusion(
                        verdict=Verdict.UNATTRIBUTED,
                        reason=f"{attack}: blocked in {arm.arm} as well ({logged.reason}), with no denial",
                    )
            seen = self.of(self.enforcing, attack)
            if seen.result is Result.BLOCKED and (seen.attribution is None or seen.attribution.denial is None):
                misses = seen.attribution.misses if seen.attribution else ()
                near = f"; nearest: {misses[0]}" if misses else "; no denial in its window"
                return Conclusion(
                    verdict=Verdict.UNATTRIBUTED,
                    reason=f"{attack}: blocked ({seen.reason}), and no effective denial accounts for it{near}",
                )
        return None

    def overblocked(self) -> Conclusion | None:
        denied = self.denied_benign()
        if not denied:
            return None
        records = [d for d in (*denied[0].denials, *self.enforcing.setup_denials) if d.effective]
        return Conclusion(
            verdict=Verdict.OVERBLOCKED,
            reason=f"{denied[0].attempt}: the service's own work is denied ({denied[0].reason}): {records[0].headline}",
        )

    def benign_broken(self) -> Conclusion | None:
        if self.enforcing.start_denial is not None:
            return Conclusion(
                verdict=Verdict.OVERBLOCKED,
                reason=f"the service cannot start: {self.enforcing.start_denial.headline}",
            )
        for arm in self.arms.values():
            for name in self.benign:
                seen = self.of(arm, name)
                if seen.result is not Result.ALLOWED:
                    return Conclusion(
                        verdict=Verdict.INCONCLUSIVE, reason=f"{arm.arm}: {name}: does not work ({seen.reason})"
                    )
        return None

    def _permitted(self, attack: str) -> str:
        return f"{attack} succeeds where the service is not confined" if self.unconfined else f"DAC permits {attack}"

    def contained(self) -> Conclusion:
        attack = self.attacks[0]
        seen = self.of(self.enforcing, attack)
        assert seen.attribution is not None
        assert seen.attribution.denial is not None
        denial = seen.attribution.denial
        what = f"{{ {denial.access} }} on {denial.name or denial.tclass}"
        return Conclusion(
            verdict=Verdict.CONTAINED,
            reason=f"{self._permitted(attack)}; {self.framework.display} denies {denial.subject_domain} {what}",
        )
