"""The experiment: the only place that joins the parts. Arms run side by side; outcomes come in the order asked for."""

from __future__ import annotations

import datetime
import functools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lsmlab import attempt, dac, prepare, verdict
from lsmlab.attempt import Observation
from lsmlab.bench import Workbench, guest_pool
from lsmlab.errors import DefinitionError, LsmlabError
from lsmlab.lab import Lab
from lsmlab.machine.base import Machine
from lsmlab.outcome import ArmRecord, AttemptRecord, Outcome
from lsmlab.scenario import Attempt, Scenario
from lsmlab.terms import CONTROL, Arm, Control, Framework, Kernel, Result, arms_of

SET_UP, READY = "set-up", "ready"
"""The snapshots: what arms start from that each start the service, and what the attempts of an arm start from."""
GUESTS_A_BOOT = 2
"""A guest that dies is replaced once."""


@dataclass(frozen=True, slots=True)
class Case:
    """One scenario under one framework: what one outcome is about."""

    scenario: Scenario
    framework: Framework
    unconfined: bool = False
    """Where the machine cannot be booted without MAC: the weaker control, whatever the scenario's is."""

    @property
    def control(self) -> Control:
        """What the enforcing arm is compared with."""
        return Control.UNCONFINED if self.unconfined else self.scenario.control

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that its verdict rests on, the control first and the enforcing one last."""
        return arms_of(self.framework, self.control)


def cases(
    scenarios: Sequence[Scenario],
    lab: Lab,
    frameworks: Sequence[Framework] | None = None,
    *,
    unconfined: bool = False,
) -> tuple[Case, ...]:
    """The cases of `scenarios` on `lab`, all frameworks that scenario and lab share, or `frameworks` alone.

    Raises DefinitionError where a framework asked for is not the lab's, or the lab lacks a scenario's service.
    """
    for framework in frameworks or ():
        if framework not in lab.frameworks:
            has = ", ".join(lab.frameworks)
            raise DefinitionError(f"lab {lab.id} has no {framework.display}; it has: {has}")
    wanted = tuple(frameworks or lab.frameworks)
    for scenario in scenarios:
        prepare.plan_of(scenario, lab)
    return tuple(Case(s, f, unconfined) for s in scenarios for f in Framework if f in wanted and f in s.expected)


def chosen(scenarios: Sequence[Scenario], lab: Lab) -> tuple[Scenario, ...]:
    """Those of `scenarios` that belong to `lab`; all of them where none does, so that `cases` says why."""
    return tuple(s for s in scenarios if s.belongs_to(lab)) or tuple(scenarios)


def left_out(lab: Lab, number: int) -> str:
    """What is said of `number` scenarios that do not belong to `lab`; empty where there are none."""
    if not number:
        return ""
    why = "not about containers" if lab.engine else "about containers or services that it has not"
    return f"lab {lab.id}: {number} {'scenario is' if number == 1 else 'scenarios are'} {why}: left out"


def by_image(lab: Lab, wanted: Sequence[Case]) -> tuple[tuple[Lab, tuple[Case, ...]], ...]:
    """`wanted` by the lab that serves it: `lab` itself first, then those with more packages in their image."""
    found: dict[tuple[str, ...], tuple[Lab, list[Case]]] = {}
    for case in wanted:
        machine = lab.with_packages(case.scenario.packages)
        found.setdefault(machine.disk.packages, (machine, []))[1].append(case)
    return tuple(
        (machine, tuple(cases)) for _, (machine, cases) in sorted(found.items(), key=lambda item: len(item[0]))
    )


def run(bench: Workbench, wanted: Sequence[Case]) -> Iterator[Outcome]:
    """Run every case; each outcome as soon as it and those before it are there. Guests die with an interruption.

    An arm that breaks is an error in its outcome, never an exception; the other arms go on.
    """
    scenarios = {c.scenario.id: c.scenario for c in wanted}
    with guest_pool(bench, "arm") as pool:
        futures = {
            (name, kernel): pool.submit(run_boot, bench, scenarios[name], arms)
            for (name, kernel), arms in _boots(wanted).items()
        }
        for case in wanted:
            records: dict[Arm, ArmRecord] = {}
            for arm in case.arms:
                records[arm] = futures[case.scenario.id, arm.kernel].result()[arm]
            yield conclude(bench, case, records)


def _boots(wanted: Sequence[Case]) -> dict[tuple[str, Kernel], tuple[Arm, ...]]:
    """The arms of each scenario by the kernel that they share; scenario by scenario, so that outcomes come early."""
    found: dict[tuple[str, Kernel], list[Arm]] = {}
    for name in dict.fromkeys(c.scenario.id for c in wanted):
        arms = dict.fromkeys(arm for c in wanted if c.scenario.id == name for arm in c.arms)
        for arm in sorted(arms, key=lambda arm: arm is CONTROL):  # the control has one arm only: the shortest last
            found.setdefault((name, arm.kernel), []).append(arm)
    return {key: tuple(arms) for key, arms in found.items()}


def run_boot(bench: Workbench, scenario: Scenario, arms: Sequence[Arm]) -> dict[Arm, ArmRecord]:
    """All attempts of `scenario` in the arms of one kernel, each from its arm's snapshot. What breaks is recorded.

    The set-up is done once, in one guest. Where the guest dies, that arm is an error, and one other guest is started
    for those that are left: also for a logging arm that cannot go on from the enforcing one, or lacks something then.
    """
    records: dict[Arm, ArmRecord] = {}
    switched: dict[Arm, tuple[AttemptRecord, ...]] = {}
    for _ in range(GUESTS_A_BOOT):
        left = sorted((arm for arm in arms if arm not in records), key=lambda arm: arm.logging)
        for arm, record in (_run_boot(bench, scenario, left) if left else {}).items():
            if _needs_its_own_start(record):
                switched[arm] = record.attempts
            else:
                records[arm] = record.model_copy(update={"switched": switched.get(arm, ())})
    for arm in arms:
        records.setdefault(arm, _broken(bench, arm, "the guest that was to run it died, twice"))
    return records


def _needs_its_own_start(record: ArmRecord) -> bool:
    """Whether an attempt was blocked or unclear with the enforcing arm's processes.

    What the service was denied at its start may be why. What failed is an error, and is not tried again.
    """
    results = {seen.result for seen in record.attempts}
    return record.started_in is not None and Result.FAILED not in results and results != {Result.ALLOWED}


def _can_be_gone_on_from(record: ArmRecord) -> bool:
    """Whether nothing failed and the service runs; with one that has died since its start no attempt can be made."""
    failed = any(seen.result is Result.FAILED for seen in record.attempts)
    return record.service_active and not record.error and not failed


def _broken(bench: Workbench, arm: Arm, error: str, seconds: float = 0.0) -> ArmRecord:
    return ArmRecord(arm=arm, command_line=bench.command_line(arm.kernel), error=error, seconds=seconds)


def _run_boot(bench: Workbench, scenario: Scenario, arms: Sequence[Arm]) -> dict[Arm, ArmRecord]:
    """The records of `arms`, or of the first of them: where the guest dies, or the second cannot go on from it.

    A logging arm behind the enforcing one goes on from there, with its processes: only the mode is switched.
    """
    kernel, task = arms[0].kernel, f"{scenario.id} {arms[0].kernel}"
    plan = prepare.plan_of(scenario, bench.lab, kept=bench.image is None)
    records: dict[Arm, ArmRecord] = {}
    start = time.monotonic()
    try:
        with (  # images first: no guest waits for them
            prepare.with_images(plan, scenario, bench.lab, bench.progress, task) as plan,
            bench.guest(kernel, task) as machine,
        ):
            bench.progress.step(task, "set-up: policy, files, users")
            tell = functools.partial(bench.progress.step, task)
            to_start = prepare.set_up(machine.channel, arms[0], plan, bench.image, tell)
            logging_last = [arm.logging for arm in arms] == [False, True]
            goes_on = logging_last and not machine.stays and not plan.after_start  # those are done in each arm's mode
            if len(arms) > 1 and not goes_on:
                machine.snapshot(SET_UP)
            for number, arm in enumerate(arms):
                if number and goes_on and not _can_be_gone_on_from(records[arms[0]]):
                    break
                try:
                    if number and goes_on:
                        record = _going_on(bench, machine, scenario, plan, arm, task, arms[0])
                    else:
                        if number:
                            machine.restore(SET_UP)
                        record = _starting(bench, machine, scenario, plan, arm, task, start=to_start)
                except (LsmlabError, OSError) as error:
                    record = _broken(bench, arm, str(error))
                seconds = round(time.monotonic() - start, 3)
                records[arm] = record.model_copy(update={"seconds": seconds})
                start = time.monotonic()
                if not machine.running:
                    break
    except (LsmlabError, OSError) as error:  # no guest, or no set-up: then no arm
        seconds = round(time.monotonic() - start, 3)
        records = {arm: records.get(arm) or _broken(bench, arm, str(error), seconds) for arm in arms}
    finally:
        bench.progress.done(task)
    return records


def _starting(
    bench: Workbench, machine: Machine, scenario: Scenario, plan: prepare.Plan, arm: Arm, task: str, *, start: bool
) -> ArmRecord:
    """The record of an arm whose service is started in its mode."""
    bench.progress.step(task, f"{arm}: mode, service")
    enter = functools.partial(prepare.enter, machine.channel, arm, plan, start=start)
    if machine.stays and plan.container is not None:  # no memory is restored there: a container for each attempt
        machine.snapshot(READY)
        return _attempts(bench, machine, scenario, plan, arm, task, enter(), anew=enter)
    return _attempts(bench, machine, scenario, plan, arm, task, enter())


def _going_on(
    bench: Workbench, machine: Machine, scenario: Scenario, plan: prepare.Plan, arm: Arm, task: str, started_in: Arm
) -> ArmRecord:
    """The record of an arm with the very processes that were started in another one: only the mode is switched."""
    machine.restore(READY)
    bench.progress.step(task, f"{arm}: mode")
    prepare.enter(machine.channel, arm, plan, start=False)
    record = _attempts(bench, machine, scenario, plan, arm, task, prepare.Prepared(service_active=True))
    return record.model_copy(update={"started_in": started_in})


def _attempts(
    bench: Workbench,
    machine: Machine,
    scenario: Scenario,
    plan: prepare.Plan,
    arm: Arm,
    task: str,
    prepared: prepare.Prepared,
    *,
    anew: Callable[[], prepare.Prepared] | None = None,
) -> ArmRecord:
    """The record of an arm whose service is ready: each attempt from there, or from what `anew` prepares."""
    opened = attempt.open_window(machine.channel, plan.unit, plan.object_path)
    if anew is None:
        machine.snapshot(READY)
    records: list[AttemptRecord] = []
    for number, spec in enumerate(scenario.attempts):
        bench.progress.step(task, f"{arm}: {spec.kind} {spec.id}")
        try:
            if number:
                machine.restore(READY)
            if number and anew is not None:
                prepared = anew()
            if number and machine.stays:  # its log has gone on
                opened = attempt.open_window(machine.channel, plan.unit, plan.object_path)
            seen = attempt.make(machine.channel, spec, plan.unit, opened, prepared.container, withhold=machine.stays)
            records.append(judge_attempt(scenario, spec, arm, seen, bench.lab.id))
        except LsmlabError as error:  # what the other attempts proved stays proved
            records.append(_failed(spec, str(error)))
            if not machine.running:
                break
    subjects = {scenario.subject_name(f) for f in scenario.expected}
    return ArmRecord(
        arm=arm,
        command_line=bench.command_line(arm.kernel),
        service_active=prepared.service_active,
        setup_denials=tuple(d for d in prepared.setup_denials if d.subject_domain in subjects),
        lsm=opened.mode.lsm,
        images=tuple(made.record for made in plan.images),
        attempts=tuple(records),
    )


def _failed(spec: Attempt, reason: str) -> AttemptRecord:
    return AttemptRecord(attempt=spec.id, kind=spec.kind, result=Result.FAILED, reason=reason)


def judge_attempt(scenario: Scenario, spec: Attempt, arm: Arm, seen: Observation, lab: str) -> AttemptRecord:
    """One attempt's facts, judged: result, own denials, the denial that accounts for a block, DAC's explanation.

    `lab`: the id of the lab whose expectation counts.
    """
    framework = arm.framework
    subject = scenario.subject_name(framework) if framework else ""
    container = scenario.subject.container
    if framework and container and arm.unconfined and not container.confined_by(framework):
        subject = ""  # who is never confined is its own control
    judgement = verdict.judge(spec, arm, seen, subject)
    attribution = None
    if framework in scenario.expected and judgement.result in {Result.BLOCKED, Result.ALLOWED}:
        denials = scenario.expectation(framework, lab).denials
        denial = next((d for d in denials if d.attempt == spec.id), None)
        found = verdict.attribute(scenario, framework, denial, seen)
        if judgement.result is Result.BLOCKED:
            attribution = found
        elif denial is not None:
            judgement = verdict.settle(judgement, found)
    explanation = None
    if seen.subject_before.workers and seen.object is not None and seen.object.exists:
        explanation = dac.explain(seen.subject_before.workers[0], seen.object, scenario.dac.access)
    return AttemptRecord(
        attempt=spec.id,
        kind=spec.kind,
        result=judgement.result,
        reason=judgement.reason,
        denials=verdict.own_denials(seen),
        attribution=attribution,
        dac=explanation if spec in scenario.attacks else None,
        observation=attempt.shortened(seen),
    )


def conclude(bench: Workbench, case: Case, arms: dict[Arm, ArmRecord]) -> Outcome:
    """The outcome of one case from the records of its arms."""
    scenario, framework = case.scenario, case.framework
    conclusion = verdict.conclude(framework, arms, case.control)
    expectation = scenario.expectation(framework, bench.lab.id)
    return Outcome(
        id=uuid.uuid4().hex[:12],
        recorded=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        scenario=scenario.id,
        scenario_digest=scenario.digest(),
        title=scenario.title,
        technique=scenario.technique,
        lab=bench.name,
        framework=framework,
        verdict=conclusion.verdict,
        expected=expectation.verdict,
        because=expectation.because,
        reason=conclusion.reason,
        environment=bench.environment,
        arms=tuple(arms[arm] for arm in case.arms),
    )
