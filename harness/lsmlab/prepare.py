"""Bringing a guest into an arm: policy, set-up, mode, the service started in the mode under test."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsmlab import attempt, evidence, facts
from lsmlab.channel.base import Channel
from lsmlab.container.context import BASE
from lsmlab.container.install import DEFAULT_PROFILE, SLICE, VEHICLE, VEHICLE_THERE
from lsmlab.container.spec import Container
from lsmlab.errors import ChannelError, DefinitionError, SetupError
from lsmlab.evidence import Denial
from lsmlab.framework import FRAMEWORKS
from lsmlab.framework.apparmor import path_of
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.framework.selinux import ENFORCE
from lsmlab.image import container as image_for_containers
from lsmlab.image.build import Image
from lsmlab.image.container import Made
from lsmlab.lab import Lab
from lsmlab.progress import Progress
from lsmlab.scenario import Scenario, Step, Write, read_file
from lsmlab.terms import Arm, Framework, SourceState

if TYPE_CHECKING:
    from lsmlab.container.engine import Engine, Running

STEP_SECONDS = 120
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an arm is prepared with."""

    unit: str
    setup: tuple[Step, ...]
    after_start: tuple[Step, ...]
    policy: PolicyUnderTest
    object_path: str | None
    container: Container | None = None
    """The subject, where it is one; `unit` is then the slice that it lies in."""
    beside: tuple[Container, ...] = ()
    images: tuple[Made, ...] = ()
    """What containers are made of besides BusyBox, as it lies in the cache: see `with_images`."""
    vehicle: str = VEHICLE
    """The one program of every container, on its machine."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What came of it."""

    service_active: bool
    setup_denials: tuple[Denial, ...] = ()
    container: Running | None = None


def plan_of(scenario: Scenario, lab: Lab, *, kept: bool = False) -> Plan:
    """The plan of a scenario on a lab. Raises DefinitionError where the lab has no such service, or no engine.

    `kept`: on a machine that stays. There the engine's own profile holds others' containers, and is let alone.
    """
    setup = tuple(step.renamed(lab.named) for step in scenario.setup)
    return Plan(
        unit=_unit_of(scenario, lab),
        setup=setup,
        after_start=tuple(step.renamed(lab.named) for step in scenario.after_start),
        policy=PolicyUnderTest(
            scenario.selinux.modules,
            tuple(sorted(scenario.selinux.booleans.items())),
            scenario.apparmor.profiles,
            scenario.apparmor.shipped,
            (DEFAULT_PROFILE,) if scenario.subject.container is not None and not kept else (),
            _written(scenario, setup),
        ),
        object_path=scenario.object.path and lab.named(scenario.object.path),
        container=scenario.subject.container,
        beside=scenario.subject.beside,
        vehicle=VEHICLE_THERE if kept else VEHICLE,
    )


def _written(scenario: Scenario, setup: Sequence[Step]) -> dict[str, bytes] | None:
    """What is written in a guest until the service is started; None where a step is a command, which may do anything,
    and where containers are made."""
    if scenario.subject.container or scenario.subject.beside or any(step.run is not None for step in setup):
        return None
    own = {path_of(profile): read_file(profile) for profile in scenario.apparmor.profiles}
    for step in setup:
        if step.write is not None:
            own.pop(step.write.path, None)  # the last one counts
            own[step.write.path] = step.write.data()
    return own


@contextlib.contextmanager
def with_images(plan: Plan, scenario: Scenario, lab: Lab, progress: Progress, task: str) -> Iterator[Plan]:
    """`plan` with the images of its containers, which are made first: minutes, where they are not in the cache.

    They stay there while the block lasts. Raises DownloadError, ImageError, HostError and DefinitionError.
    """
    suite = lab.image.suite if lab.image is not None else None
    with contextlib.ExitStack() as uses:
        made = [image_for_containers.ensure(one, suite, progress, task, uses) for one in scenario.subject.images]
        yield dataclasses.replace(plan, images=tuple(made))


def _unit_of(scenario: Scenario, lab: Lab) -> str:
    subject = scenario.subject
    if subject.container is None:
        return subject.unit or lab.service(subject.service or "").unit
    if lab.engine is None:
        raise DefinitionError(
            f"lab {lab.id} has no container engine, and {scenario.id} is about a container",
            hint="`lsmlab labs` lists the labs; a lab with `engine` has one, such as docker-debian-13.",
        )
    return SLICE


def set_up(channel: Channel, arm: Arm, plan: Plan, image: Image | None, tell: Tell = lambda _: None) -> bool:
    """Do what both arms of a framework share: load the policy, do the steps in the mode that the guest booted in, and
    stop the service. `image`: None for a machine that was made from none. `tell` is told of steps that take long.

    True where the service is to be started in the arm's mode: one that the set-up stopped stays stopped.
    Raises SetupError, PolicyError, FrameworkError, ChannelError.
    """
    mark(channel, arm)
    FRAMEWORKS[arm.framework].load(channel, image, plan.policy)
    was_running = is_running(channel, plan.unit)
    do_steps(channel, plan.setup, "setup")
    for made in plan.images:
        _deliver(channel, arm, made, tell)
    if plan.beside:
        engine = _engine(channel, plan)
        for number, container in enumerate(plan.beside, 1):
            engine.start(container, arm, name=f"beside-{number}", unconfined=False)
    if not is_running(channel, plan.unit):
        return not was_running
    channel.run(["systemctl", "stop", plan.unit], timeout=STEP_SECONDS).check()
    return True


def enter(channel: Channel, arm: Arm, plan: Plan, image: Image | None, *, start: bool) -> Prepared:
    """Enter the arm's mode and start the service in it, or leave the service as it is. Raises as `set_up`."""
    driver = FRAMEWORKS[arm.framework]
    driver.enter(channel, arm, image, plan.policy)
    started: bool = False
    denials: tuple[Denial, ...] = ()
    running = None
    if plan.container is not None:
        running = _start_container(channel, arm, plan, plan.container)
        started = True
    elif arm.unconfined:
        driver.unconfine(channel, program_of(channel, plan.unit))
    if start and running is None:
        started, denials = _start(channel, plan.unit)
    if started:
        do_steps(channel, plan.after_start, "after_start")
    driver.settle(channel, arm, plan.unit, started=started)
    return Prepared(service_active=started, setup_denials=denials, container=running)


def _deliver(channel: Channel, arm: Arm, made: Made, tell: Tell) -> None:
    """Have the engine have one image. Raises EngineError and ChannelError."""
    from lsmlab.container import delivery  # noqa: PLC0415 - as below

    image = made.image
    if made.archive is not None and image.fetched is not None:
        name = image.name if image.registry is not None else f"{BASE}:latest"
        delivery.load(channel, made.archive.file, image_for_containers.loaded_name(image.fetched), (name,), tell)
    elif made.archive is not None:
        delivery.import_tree(channel, made.archive.file, image.name, tell)
    if made.context is not None:
        with _refusing_nothing(channel, arm):
            delivery.build(channel, image, made.context, tell)


@contextlib.contextmanager
def _refusing_nothing(channel: Channel, arm: Arm) -> Iterator[None]:
    """While the block lasts SELinux only logs: what a build may do is not what is under test."""
    if arm.framework is Framework.SELINUX:
        channel.write_file(ENFORCE, b"0")
    try:
        yield
    finally:
        if arm.framework is Framework.SELINUX:
            channel.write_file(ENFORCE, b"1")


def _engine(channel: Channel, plan: Plan) -> Engine:
    from lsmlab.container.engine import Engine  # noqa: PLC0415 - its library takes a moment, and few commands need it

    return Engine(channel, vehicle=plan.vehicle)


def _start_container(channel: Channel, arm: Arm, plan: Plan, container: Container) -> Running:
    """The subject's container, in the arm's mode. Raises EngineError, and FrameworkError where nothing confines it."""
    assert arm.framework is not None
    engine = _engine(channel, plan)
    engine.need(arm.framework)
    return engine.start(container, arm, name="subject", unconfined=arm.unconfined, group=SLICE)


def bring_into(
    channel: Channel,
    arm: Arm,
    plan: Plan,
    image: Image | None,
    tell: Tell = lambda _: None,
    *,
    started_in: Arm | None = None,
) -> Prepared:
    """Prepare the guest behind `channel` for `arm`. Raises as `set_up`.

    `started_in`: the arm that the service is started in, and comes to rest in, where it is another one.
    """
    first = started_in or arm
    prepared = enter(channel, first, plan, image, start=set_up(channel, first, plan, image, tell))
    if first is not arm:
        attempt.open_window(channel, plan.unit, plan.object_path)
        mark(channel, arm)
        enter(channel, arm, plan, image, start=False)
    return prepared


def program_of(channel: Channel, unit: str) -> str:
    """The file that systemd executes to start the unit. Raises SetupError."""
    shown = channel.run(["systemctl", "show", "--property=ExecStart", "--value", unit]).check().out
    found = re.match(r"\{ path=(/\S+) ;", shown)
    if found is None:
        raise SetupError(f"{unit}: systemd knows no program that starts it: {shown.strip()[:200] or 'no ExecStart'}")
    return found[1]


def is_running(channel: Channel, unit: str) -> bool:
    """True while the unit has a process."""
    return bool(facts.pids(channel.ask("pids", unit=unit), unit))


def _start(channel: Channel, unit: str) -> tuple[bool, tuple[Denial, ...]]:
    """Start the service in the mode under test; where it does not start, the effective denials meanwhile."""
    before = facts.read(facts.AuditState, channel.ask("audit_state"))
    why = channel.ask("start_unit", within=STEP_SECONDS + 10, unit=unit, seconds=STEP_SECONDS)
    if not isinstance(why, str):
        raise ChannelError(f"the agent answered nonsense: {str(why)[:200]} for the start of {unit}")
    if not why:
        return True, ()
    source, log = attempt.close_window(channel, unit, before)
    if source.state is SourceState.UNAVAILABLE:
        raise ChannelError(
            f"{unit} does not start ({why[:200]}), and what it was denied is not known: {source.name} unavailable: "
            f"{source.detail}"
        )
    return False, tuple(d for d in evidence.denials(evidence.parse(log)) if d.effective)


def mark(channel: Channel, arm: Arm) -> None:
    """Set the guest's clock, which is as old as what it was restored to, and say in the prompt which arm this is."""
    channel.ask("clock", seconds=time.time())
    channel.write_file("/run/lsmlab-arm", f"{arm}\n".encode())


def do_steps(channel: Channel, steps: Sequence[Step], where: str) -> None:
    """Do the steps in order. Raises SetupError that names the step."""
    unlabelled: list[str] = []
    for number, step in enumerate(steps, 1):
        last = number == len(steps)
        try:
            if step.write is not None:
                unlabelled.append(_write(channel, step.write))
            if step.join is not None:
                channel.ask("join", user=step.join.user, group=step.join.group)
            if unlabelled and (last or step.run is not None):  # before a command may look at them
                channel.ask("relabel", within=STEP_SECONDS, paths=list(dict.fromkeys(unlabelled)))
                unlabelled.clear()
            if step.run is not None:
                channel.run(step.run, timeout=STEP_SECONDS).check()
        except ChannelError as error:
            raise SetupError(f"{where}, step {number}: {error.message}") from error


def _write(channel: Channel, write: Write) -> str:
    """Write a file; what is to be given its label: the file with its folder, which may be new."""
    channel.write_file(write.path, write.data(), mode=int(write.mode, 8), owner=write.owner)
    folder = write.path.rpartition("/")[0]
    return folder if folder.count("/") > 1 else write.path
