"""The experiment: the only place that joins the parts. Arms run side by side; outcomes come in the order asked for."""

from __future__ import annotations

import contextlib
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

SET_UP, READY, SWITCHED = "set-up", "ready", "switched"
"""The snapshots: what arms start from that each start the service, what the attempts of an arm start from, and what
those of a logging arm do that goes on with the enforcing one's processes."""
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
        if arm not in records:
            broken = _broken(
                bench, arm, "no guest was left for it: a kernel has two, and they died or were needed for another arm"
            )
            records[arm] = broken.model_copy(update={"switched": switched.get(arm, ())})
    return records


def _needs_its_own_start(record: ArmRecord) -> bool:
    """Whether an attempt was blocked or unclear with the enforcing arm's processes.

    What the service was denied at its start may be why. What failed is an error, and is not tried again.
    """
    results = {seen.result for seen in record.attempts}
    return record.started_in is not None and Result.FAILED not in results and results != {Result.ALLOWED}


def _can_be_gone_on_from(record: ArmRecord) -> bool:
    """Whether nothing failed and the service runs; with one that has died since its start no attempt can be made."""
    return record.service_active and not _is_broken(record)


def _is_broken(record: ArmRecord) -> bool:
    return bool(record.error) or any(seen.result is Result.FAILED for seen in record.attempts)


def _broken(bench: Workbench, arm: Arm, error: str, seconds: float = 0.0) -> ArmRecord:
    return ArmRecord(arm=arm, command_line=bench.command_line(arm.kernel), error=error, seconds=seconds)


def _run_boot(bench: Workbench, scenario: Scenario, arms: Sequence[Arm]) -> dict[Arm, ArmRecord]:
    """The records of `arms`, or of the first of them: where the guest dies, or the second cannot go on from it.

    A logging arm behind the enforcing one goes on with its processes: only the mode is switched.
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
            each = _Arms(bench, machine, scenario, plan, task, start)
            if goes_on:
                records = each.with_one_start(*arms, start=to_start)
            else:
                records = each.with_a_start_each(arms, start=to_start)
    except (LsmlabError, OSError) as error:  # no guest, or no set-up: then no arm
        seconds = round(time.monotonic() - start, 3)
        records = {arm: records.get(arm) or _broken(bench, arm, str(error), seconds) for arm in arms}
    finally:
        bench.progress.done(task)
    return records


@dataclass(frozen=True, slots=True)
class _Ready:
    """An arm in which attempts can be made, and the snapshot that they start from."""

    prepared: prepare.Prepared
    opened: attempt.Opened
    snapshot: str


class _Arms:
    """The arms of one kernel in one guest that is set up. `began`: when the work for the first of them did."""

    def __init__(
        self, bench: Workbench, machine: Machine, scenario: Scenario, plan: prepare.Plan, task: str, began: float
    ) -> None:
        self._bench = bench
        self._machine = machine
        self._scenario = scenario
        self._plan = plan
        self._task = task
        self._began = began
        self._spent: dict[Arm, float] = {}

    def with_a_start_each(self, arms: Sequence[Arm], *, start: bool) -> dict[Arm, ArmRecord]:
        """The records of arms that each start the service in their mode, up to where the guest dies."""
        records: dict[Arm, ArmRecord] = {}
        if len(arms) > 1:
            self._machine.snapshot(SET_UP)
        for number, arm in enumerate(arms):
            with self._recorded(arm, records):
                if number:
                    self._machine.restore(SET_UP)
                    prepare.mark(self._machine.channel, arm)
                records[arm] = self._starting(arm, start=start)
            if not self._machine.running:
                break
        return records

    def with_one_start(self, enforcing: Arm, logging: Arm, *, start: bool) -> dict[Arm, ArmRecord]:
        """The records of an enforcing arm and of the logging arm that goes on with its processes. The second is left
        out where something failed in the first, and the first where the guest died in the second.

        The guest is switched where it was just now made ready, and the logging arm's attempts are made first: behind a
        restore all that this takes would be translated anew.
        """
        records: dict[Arm, ArmRecord] = {}
        with self._recorded(enforcing, records):
            ready = self._made_ready(enforcing, READY, start=start)
        if enforcing in records:  # it broke
            return records
        if ready.prepared.service_active:
            with self._recorded(logging, records):
                prepare.mark(self._machine.channel, logging)
                switched = self._made_ready(logging, SWITCHED, start=False)
                record = self._attempts(logging, switched)
                records[logging] = record.model_copy(update={"started_in": enforcing, "service_active": True})
            if not self._machine.running:  # what it went on from has no record: it counts where it broke
                return records if _is_broken(records[logging]) else {}
        with self._recorded(enforcing, records):
            records[enforcing] = self._attempts(enforcing, ready, there=logging not in records)
        if not _can_be_gone_on_from(records[enforcing]):
            records.pop(logging, None)
        return records

    @contextlib.contextmanager
    def _recorded(self, arm: Arm, records: dict[Arm, ArmRecord]) -> Iterator[None]:
        """Make what breaks the record of `arm`; each has the time that was spent on it."""
        try:
            yield
        except (LsmlabError, OSError) as error:
            records[arm] = _broken(self._bench, arm, str(error))
        seconds, self._began = time.monotonic() - self._began, time.monotonic()
        self._spent[arm] = self._spent.get(arm, 0.0) + seconds
        if arm in records:
            records[arm] = records[arm].model_copy(update={"seconds": round(self._spent[arm], 3)})

    def _made_ready(self, arm: Arm, snapshot: str, *, start: bool) -> _Ready:
        self._bench.progress.step(self._task, f"{arm}: mode, service" if snapshot == READY else f"{arm}: mode")
        prepared = prepare.enter(self._machine.channel, arm, self._plan, self._bench.image, start=start)
        opened = self._opened()
        if snapshot == READY or len(self._scenario.attempts) > 1:  # where attempts begin
            self._machine.snapshot(snapshot)
        return _Ready(prepared, opened, snapshot)

    def _opened(self) -> attempt.Opened:
        return attempt.open_window(self._machine.channel, self._plan.unit, self._plan.object_path)

    def _starting(self, arm: Arm, *, start: bool) -> ArmRecord:
        """The record of an arm whose service is started in its mode."""
        if not (self._machine.stays and self._plan.container is not None):
            return self._attempts(arm, self._made_ready(arm, READY, start=start))
        # No memory is restored there: a container for each attempt
        self._bench.progress.step(self._task, f"{arm}: mode, service")
        enter = functools.partial(prepare.enter, self._machine.channel, arm, self._plan, self._bench.image, start=start)
        self._machine.snapshot(READY)
        return self._attempts(arm, _Ready(enter(), self._opened(), READY), anew=enter)

    def _attempts(
        self, arm: Arm, ready: _Ready, *, there: bool = True, anew: Callable[[], prepare.Prepared] | None = None
    ) -> ArmRecord:
        """The record of an arm that is ready: each attempt from there, or from what `anew` prepares. `there`: the guest
        is as it was made ready."""
        machine, scenario, plan = self._machine, self._scenario, self._plan
        prepared, opened = ready.prepared, ready.opened
        records: list[AttemptRecord] = []
        for spec in scenario.attempts:
            self._bench.progress.step(self._task, f"{arm}: {spec.kind} {spec.id}")
            try:
                if not there:
                    machine.restore(ready.snapshot)
                    if anew is not None:
                        prepared = anew()
                    if machine.stays:  # its log has gone on
                        opened = self._opened()
                there = False
                seen = attempt.make(
                    machine.channel, spec, plan.unit, opened, prepared.container, withhold=machine.stays
                )
                records.append(judge_attempt(scenario, spec, arm, seen, self._bench.lab.id))
            except LsmlabError as error:  # what the other attempts proved stays proved
                records.append(_failed(spec, str(error)))
                if not machine.running:
                    break
        subjects = {scenario.subject_name(f) for f in scenario.expected}
        return ArmRecord(
            arm=arm,
            command_line=self._bench.command_line(arm.kernel),
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
        worker = seen.subject_before.workers[0]
        subject_of_dac = attempt.acting_as(worker) if spec.run and container is None else worker
        explanation = dac.explain(subject_of_dac, seen.object, scenario.dac.access)
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
