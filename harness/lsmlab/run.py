"""The experiment: the only place that joins the parts. Arms run side by side; outcomes come in the order asked for."""

from __future__ import annotations

import concurrent.futures
import datetime
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lsmlab import attempt, dac, host, prepare, verdict
from lsmlab.attempt import Observation
from lsmlab.bench import Bench, guest_budget
from lsmlab.errors import DefinitionError, LsmlabError
from lsmlab.lab import Lab
from lsmlab.machine import qemu, states
from lsmlab.machine.qemu import QemuMachine
from lsmlab.outcome import ArmRecord, AttemptRecord, Outcome
from lsmlab.scenario import Attempt, Scenario
from lsmlab.terms import CONTROL, ENFORCING_ARM, LOGGING_ARM, Arm, Framework, Result, arms_of

READY = "ready"
"""The snapshot that every attempt starts from."""


@dataclass(frozen=True, slots=True)
class Case:
    """One scenario under one framework: what one outcome is about."""

    scenario: Scenario
    framework: Framework


def cases(scenarios: Sequence[Scenario], lab: Lab, frameworks: Sequence[Framework] | None = None) -> tuple[Case, ...]:
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
    return tuple(Case(s, f) for s in scenarios for f in Framework if f in wanted and f in s.expected)


def run(bench: Bench, wanted: Sequence[Case], *, guests: int | None = None) -> Iterator[Outcome]:
    """Run every case; each outcome as soon as it and those before it are there. Guests die with an interruption.

    An arm that breaks is an error in its outcome, never an exception; the other arms go on.
    """
    budget = guest_budget(bench.lab.memory_mib, guests)
    order = sorted({(c.scenario.id, arm) for c in wanted for arm in arms_of(c.framework)}, key=_first_the_boots)
    scenarios = {c.scenario.id: c.scenario for c in wanted}
    pool = concurrent.futures.ThreadPoolExecutor(budget.guests, thread_name_prefix="arm")
    futures: dict[tuple[str, Arm], concurrent.futures.Future[ArmRecord]] = {}
    try:
        for name, arm in _in_turn(order, wanted):
            futures[name, arm] = pool.submit(run_arm, bench, scenarios[name], arm)
        for case in wanted:
            arms = {arm: futures[(case.scenario.id, arm)].result() for arm in arms_of(case.framework)}
            yield conclude(bench, case, arms)
    except BaseException:
        bench.close()  # first: an arm that waits for its guest then starts none
        for future in futures.values():
            future.cancel()
        qemu.stop_all()
        host.stop_all()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _first_the_boots(key: tuple[str, Arm]) -> int:
    """Arms of different boots first: each boots its kernel while the others do theirs."""
    order = (Arm.SELINUX_ENFORCING, Arm.APPARMOR_ENFORCE, Arm.DAC, Arm.SELINUX_PERMISSIVE, Arm.APPARMOR_COMPLAIN)
    return order.index(key[1])


def _in_turn(order: Sequence[tuple[str, Arm]], wanted: Sequence[Case]) -> list[tuple[str, Arm]]:
    """Scenario by scenario, so that the first outcome comes early; inside one, the boots first."""
    ids = list(dict.fromkeys(c.scenario.id for c in wanted))
    return sorted(order, key=lambda key: ids.index(key[0]))


def run_arm(bench: Bench, scenario: Scenario, arm: Arm) -> ArmRecord:
    """All attempts of `scenario` in one arm, each from the same snapshot. What breaks is in the record."""
    task = f"{scenario.id} {arm}"
    start = time.monotonic()
    line = states.command_line(bench.lab, arm.kernel)
    record = ArmRecord(arm=arm, command_line=line)
    try:
        with bench.guest(arm.kernel, task) as machine:
            record = _attempts(bench, machine, scenario, arm, task)
    except (LsmlabError, OSError) as error:
        record = ArmRecord(arm=arm, command_line=line, error=str(error))
    finally:
        bench.progress.done(task)
    return record.model_copy(update={"seconds": round(time.monotonic() - start, 3), "command_line": line})


def _attempts(bench: Bench, machine: QemuMachine, scenario: Scenario, arm: Arm, task: str) -> ArmRecord:
    plan = prepare.plan_of(scenario, bench.lab)
    bench.progress.step(task, "entering the arm: set-up, policy, mode, service")
    prepared = prepare.bring_into(machine.channel, arm, plan, bench.image)
    opened = attempt.open_window(machine.channel, plan.unit, plan.object_path)
    machine.snapshot(READY)
    records: list[AttemptRecord] = []
    for number, spec in enumerate(scenario.attempts):
        bench.progress.step(task, f"{spec.kind} {spec.id}")
        try:
            if number:
                machine.restore(READY)
            seen = attempt.make(machine.channel, spec, plan.unit, opened)
            records.append(judge_attempt(scenario, spec, arm, seen))
        except LsmlabError as error:  # what the other attempts proved stays proved
            records.append(_failed(spec, str(error)))
            if not machine.running:
                break
    subjects = {scenario.subject_name(f) for f in scenario.expected}
    return ArmRecord(
        arm=arm,
        service_active=prepared.service_active,
        setup_denials=tuple(d for d in prepared.setup_denials if d.subject_domain in subjects),
        lsm=opened.mode.lsm,
        attempts=tuple(records),
    )


def _failed(spec: Attempt, reason: str) -> AttemptRecord:
    return AttemptRecord(attempt=spec.id, kind=spec.kind, result=Result.FAILED, reason=reason)


def judge_attempt(scenario: Scenario, spec: Attempt, arm: Arm, seen: Observation) -> AttemptRecord:
    """One attempt's facts, judged: result, own denials, the denial that accounts for a block, DAC's explanation."""
    framework = arm.framework
    subject = scenario.subject_name(framework) if framework else ""
    judgement = verdict.judge(spec, arm, seen, subject)
    attribution = None
    if framework is not None and judgement.result is Result.BLOCKED:
        expectation = scenario.expected.get(framework)
        denial = next((d for d in expectation.denials if d.attempt == spec.id), None) if expectation else None
        attribution = verdict.attribute(scenario, framework, denial, seen)
    explanation = None
    if seen.subject_before.workers and seen.object.exists:
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


def conclude(bench: Bench, case: Case, arms: dict[Arm, ArmRecord]) -> Outcome:
    """The outcome of one case from the records of its arms."""
    scenario, framework = case.scenario, case.framework
    conclusion = verdict.conclude(framework, arms)
    expectation = scenario.expected[framework]
    return Outcome(
        id=uuid.uuid4().hex[:12],
        recorded=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        scenario=scenario.id,
        scenario_digest=scenario.digest(),
        title=scenario.title,
        technique=scenario.technique,
        lab=bench.lab.id,
        framework=framework,
        verdict=conclusion.verdict,
        expected=expectation.verdict,
        because=expectation.because,
        reason=conclusion.reason,
        environment=bench.environment,
        arms=tuple(arms[a] for a in (CONTROL, LOGGING_ARM[framework], ENFORCING_ARM[framework])),
    )
