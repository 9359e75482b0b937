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
    was_active = is_active(channel, plan.unit)
    do_steps(channel, plan.setup, "setup")
    driver.enter(channel, arm, plan.policy)
    started: bool = False
    denials: tuple[Denial, ...] = ()
    if is_active(channel, plan.unit) or not was_active:  # one that the set-up stopped stays stopped
        started, denials = _restart(channel, plan.unit)
    if started:
        do_steps(channel, plan.after_start, "after_start")
    driver.settle(channel, arm)
    return Prepared(service_active=started, setup_denials=denials)


def is_active(channel: Channel, unit: str) -> bool:
    """True while systemd calls the unit active."""
    return channel.run(["systemctl", "is-active", "--quiet", unit]).ok


def _restart(channel: Channel, unit: str) -> tuple[bool, tuple[Denial, ...]]:
    """Start the service in the mode under test; where it does not start, the effective denials meanwhile."""
    size = channel.run(["stat", "-c", "%s", "/var/log/audit/audit.log"]).check().out.strip()
    if not size.isdigit():
        raise ChannelError(f"the guest's audit log has a size of {size[:80]!r}")
    if channel.run(["systemctl", "restart", unit], timeout=STEP_SECONDS).ok:
        return True, ()
    sections, _ = attempt.close_window(channel, unit, int(size))
    return False, tuple(d for d in evidence.denials(evidence.parse(sections["window"])) if d.effective)


def mark(channel: Channel, arm: Arm) -> None:
    """Set the guest's clock, which a saved state carries along, and say in the prompt which arm this is."""
    script = 'date --set="@$1" >/dev/null; echo "$2" > /run/lsmlab-arm'
    channel.run(["sh", "-c", script, "mark", f"{time.time():.0f}", arm]).check()


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
