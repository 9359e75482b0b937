"""Bringing a guest into an arm: policy, set-up, mode, the service started in the mode under test."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lsmlab import attempt, evidence
from lsmlab.channel.base import Channel
from lsmlab.errors import ChannelError, SetupError
from lsmlab.evidence import Denial
from lsmlab.framework import FRAMEWORKS
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.scenario import Scenario, Step, Write
from lsmlab.terms import Arm

STEP_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Plan:
    """What an arm is prepared with."""

    unit: str
    setup: tuple[Step, ...]
    after_start: tuple[Step, ...]
    policy: PolicyUnderTest
    object_path: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What came of it."""

    service_active: bool
    setup_denials: tuple[Denial, ...]


def plan_of(scenario: Scenario, lab: Lab) -> Plan:
    """The plan of a scenario on a lab. Raises DefinitionError where the lab has no such service."""
    return Plan(
        unit=lab.service(scenario.subject.service).unit,
        setup=scenario.setup,
        after_start=scenario.after_start,
        policy=PolicyUnderTest(
            scenario.selinux.modules, tuple(sorted(scenario.selinux.booleans.items())), scenario.apparmor.profiles
        ),
        object_path=scenario.object.path,
    )


def bring_into(channel: Channel, arm: Arm, plan: Plan, image: Image) -> Prepared:
    """Prepare the guest behind `channel` for `arm`. Raises SetupError, PolicyError, FrameworkError, ChannelError."""
    driver = FRAMEWORKS[arm.framework]
    mark(channel, arm)
    driver.load(channel, image, plan.policy)
    do_steps(channel, plan.setup, "setup")
    driver.enter(channel, arm, plan.policy)
    opened = int(channel.run(["stat", "-c", "%s", "/var/log/audit/audit.log"]).check().out)
    started = channel.run(["systemctl", "restart", plan.unit], timeout=STEP_SECONDS)
    denials: tuple[Denial, ...] = ()
    if started.ok:
        do_steps(channel, plan.after_start, "after_start")
    else:
        denials = _denials_since(channel, plan.unit, opened)
    driver.settle(channel, arm)
    return Prepared(service_active=started.ok, setup_denials=denials)


def mark(channel: Channel, arm: Arm) -> None:
    """Set the guest's clock, which a saved state carries along, and say in the prompt which arm this is."""
    script = 'date --set="@$1" >/dev/null; echo "$2" > /run/lsmlab-arm'
    channel.run(["sh", "-c", script, "mark", f"{time.time():.0f}", arm]).check()


def _denials_since(channel: Channel, unit: str, offset: int) -> tuple[Denial, ...]:
    sections, _ = attempt.close_window(channel, unit, offset)
    return tuple(d for d in evidence.denials(evidence.parse(sections["window"])) if d.effective)


def do_steps(channel: Channel, steps: Sequence[Step], where: str) -> None:
    """Do the steps in order. Raises SetupError that names the step."""
    for number, step in enumerate(steps, 1):
        try:
            if step.write is not None:
                _write(channel, step.write)
            elif step.run is not None:
                channel.run(step.run, timeout=STEP_SECONDS).check()
        except ChannelError as error:
            raise SetupError(f"{where}, step {number}: {error.message}") from error


def _write(channel: Channel, write: Write) -> None:
    folder = write.path.rpartition("/")[0] or "/"
    channel.run(["mkdir", "-p", "--", folder]).check()
    channel.write_file(write.path, write.data())
    channel.run(
        [
            "sh",
            "-c",
            'chmod "$1" "$3" && chown "$2" "$3" && if [ -e /sys/fs/selinux/enforce ]; then restorecon -RF "$4"; fi',
            "write",
            write.mode,
            write.owner,
            write.path,
            folder if folder.count("/") > 1 else write.path,
        ]
    ).check()
