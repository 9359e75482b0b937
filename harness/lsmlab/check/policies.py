"""Policies compiled with the tools of a lab's own image, and what a scenario says of them held against the result."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from lsmlab import cache, definition, host
from lsmlab.check.findings import Checked, faults_of
from lsmlab.container.install import DEFAULT_PROFILE
from lsmlab.errors import LsmlabError, PolicyError
from lsmlab.image import build, policy, probe
from lsmlab.image.build import Image
from lsmlab.image.probe import Probed, ProfileSet
from lsmlab.lab import Lab
from lsmlab.progress import Progress
from lsmlab.scenario import Scenario, read_file
from lsmlab.terms import Framework

TASK = "check"
_CIL_FILE = r"/\S*?/modules/\d+/{name}/cil"
_CIL_DECLARED = re.compile(r"\(\s*(type|boolean)\s+([A-Za-z0-9_]+)[\s)]")
_CIL_NAMESPACE = re.compile(r"\(\s*(?:block|macro|in|optional)\s")


def _needs(one: Scenario) -> list[str]:
    return [p.name for p in (*one.selinux.modules, *one.apparmor.profiles)] + list(one.apparmor.shipped)


def check_policies(
    machine: Lab, own: Sequence[Checked], ready: Sequence[tuple[Checked, Scenario]], progress: Progress
) -> None:
    """Compile the policies of `ready`, and the profiles of the lab's own services, with the tools of its image."""
    by_image: dict[str, tuple[Lab, list[tuple[Checked, Scenario]]]] = {}
    for entry, one in ready:
        widened = machine.with_packages(one.packages)
        by_image.setdefault(build.recipe_digest(widened), (widened, []))[1].append((entry, one))
    by_image.setdefault(build.recipe_digest(machine), (machine, []))
    for widened, group in by_image.values():
        labs = own if widened is machine else []
        with ExitStack() as held:
            image = build.find(widened)
            if image is None or not held.enter_context(cache.use(image.folder)):
                how = f"`lsmlab images build {machine.id}`" if widened is machine else "running the scenario"
                why = f"the image of {machine.id} is not built; {how} builds it"
                _say_not_compiled(machine, labs, group, why)
                continue
            _compile_with(image, machine, labs, group, progress)


def _say_not_compiled(
    machine: Lab, labs: Sequence[Checked], group: Sequence[tuple[Checked, Scenario]], why: str
) -> None:
    profiles = [p.name for p in _lab_profiles(machine)]
    for entry, names in [*((e, profiles) for e in labs), *((e, _needs(one)) for e, one in group)]:
        if names:
            entry.unchecked.append(f"not compiled: {', '.join(names)}: {why}")


def _lab_profiles(machine: Lab) -> list[Path]:
    found = (service.apparmor_profile for service in machine.services.values())
    return list(dict.fromkeys(p for p in found if p is not None and p.is_file()))


def _compile_with(
    image: Image, machine: Lab, labs: Sequence[Checked], group: Sequence[tuple[Checked, Scenario]], progress: Progress
) -> None:
    progress.step(TASK, f"compiling AppArmor profiles with the tools of {machine.id}")
    sets = [ProfileSet((p,)) for p in _lab_profiles(machine)]
    sets += [ProfileSet(one.apparmor.profiles, one.apparmor.shipped) for _, one in group]
    try:
        answers = probe.examine(image.need_policy_tree(), sets)
    except LsmlabError as error:
        _say_not_compiled(machine, labs, group, "; ".join(faults_of(error)))
        return
    for entry in labs:
        for profiles in answers.profiles[: len(sets) - len(group)]:
            _judge_profiles(entry, machine, profiles)
    for number, (entry, one) in enumerate(group, len(sets) - len(group)):
        if answers.profiles:
            _judge_profiles(entry, machine, answers.profiles[number])
            _judge_profile_name(entry, machine, one, answers, answers.profiles[number])
        elif one.apparmor.profiles:
            names = ", ".join(p.name for p in one.apparmor.profiles)
            entry.unchecked.append(f"not compiled: {names}: the image of {machine.id} has no apparmor_parser")
        _judge_names(entry, machine, one, answers)
    if Framework.SELINUX in machine.frameworks:
        _compile_modules(image, machine, group, progress)


def _judge_profiles(entry: Checked, machine: Lab, profiles: Iterable[probe.Profile]) -> None:
    for profile in profiles:
        name = Path(profile.source).name
        if not profile.compiles:
            words = profile.words or "apparmor_parser refuses it without a word"
            first = words if words.startswith(f"{profile.source}:") else f"{profile.source}: {words}"
            entry.faults.append(f"{first} [AppArmor of {machine.id}]")
            continue
        entry.looked_at.append((name, machine.id))
        if profile.words:
            entry.notes.append(f"{profile.source}: apparmor_parser of {machine.id}: {profile.words}")


def _judge_profile_name(
    entry: Checked, machine: Lab, one: Scenario, answers: Probed, profiles: Sequence[probe.Profile]
) -> None:
    name = one.subject.apparmor
    if Framework.APPARMOR not in one.expected or name is None or not all(p.compiles for p in profiles):
        return
    there = [n for p in profiles for n in p.names]
    there += [DEFAULT_PROFILE] if one.subject.container is not None else []  # the engine brings it
    if name not in {*there, *(answers.names or ()), "unconfined"}:
        known = ", ".join(there) or "none"
        words = f"no profile is called {name!r}; the scenario's files have: {known} [AppArmor of {machine.id}]"
        entry.faults.append(entry.at(("subject", "apparmor"), words))


def _judge_names(entry: Checked, machine: Lab, one: Scenario, answers: Probed) -> None:
    """See that SELinux's policy has each type and boolean that is named: a slip would read like a missing denial."""
    if answers.types is None or Framework.SELINUX not in one.expected:
        return
    sources = [read_file(path).decode("utf-8", "replace") for path in one.selinux.modules]
    if any(_CIL_NAMESPACE.search(text) for text in sources):
        return  # a name may be made of several there
    named = [("type", loc, name) for loc, name in _named_types(one, machine.id)]
    named += [("boolean", ("selinux", "booleans", name), name) for name in one.selinux.booleans]
    known = {"type": answers.types, "boolean": answers.booleans or frozenset()}
    made = {(kind, name) for text in sources for kind, name in _CIL_DECLARED.findall(text)}
    wrong = [(kind, loc, name) for kind, loc, name in named if name not in known[kind] and (kind, name) not in made]
    for kind, loc, name in wrong:
        near = difflib.get_close_matches(name, known[kind], n=1)
        advice = f"; did you mean {near[0]!r}?" if near else ""
        entry.faults.append(entry.at(loc, f"the policy has no {kind} {name!r}{advice} [SELinux of {machine.id}]"))
    if not wrong:
        entry.looked_at.append(("types", machine.id))


def _named_types(one: Scenario, lab: str) -> Iterator[tuple[definition.Location, str]]:
    if one.subject.selinux:
        yield ("subject", "selinux"), one.subject.selinux
    if one.object.selinux:
        yield ("object", "selinux"), one.object.selinux
    own = lab in one.expected[Framework.SELINUX].labs
    at = ("expected", "selinux", *(("labs", lab) if own else ()), "denials")
    for number, denial in enumerate(one.expectation(Framework.SELINUX, lab).denials):
        if denial.selinux_object:
            yield (*at, number, "selinux_object"), denial.selinux_object
        if denial.subject:
            yield (*at, number, "subject"), denial.subject


def _compile_modules(image: Image, machine: Lab, group: Sequence[tuple[Checked, Scenario]], progress: Progress) -> None:
    wanted = list(dict.fromkeys(one.selinux.modules for _, one in group if one.selinux.modules))
    if not wanted:
        return
    progress.step(TASK, f"compiling {len(wanted)} SELinux policies with the tools of {machine.id}")

    def compiled(modules: tuple[Path, ...]) -> LsmlabError | None:
        try:
            policy.compile_modules(image.need_policy_tree(), image.digest, modules)
        except LsmlabError as error:
            return error
        return None

    # Each unpacks the image's tree: more side by side than processors would only fill the disk
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile")
    try:
        results = dict(zip(wanted, pool.map(compiled, wanted), strict=True))
    except BaseException:
        host.stop_all()  # asked to stop: compilers are not waited for
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        host.go_on()
    for entry, one in group:
        if not one.selinux.modules:
            continue
        names = ", ".join(p.name for p in one.selinux.modules)
        error = results[one.selinux.modules]
        if error is None:
            entry.looked_at.append((names, machine.id))
        elif isinstance(error, PolicyError):
            words = compiler_words(error.message, one.selinux.modules)
            entry.faults += [f"{line} [SELinux of {machine.id}]" for line in words]
        else:
            entry.unchecked.append(f"not compiled: {names}: {'; '.join(faults_of(error))}")


def compiler_words(message: str, modules: Sequence[Path]) -> list[str]:
    """semodule's own complaints: where one names a line, file and line in front and what is written there behind."""
    lines = [line for line in message.splitlines()[1:] if line.strip() and not line.startswith("semodule:")]
    found = []
    for line, module in itertools.product(lines, modules):
        inside = _CIL_FILE.format(name=re.escape(module.stem))
        at = re.search(rf" at {inside}:(\d+)| at line (\d+) of {inside}", line)
        if at:
            number = int(at[1] or at[2])
            text = read_file(module).decode("utf-8", "replace").splitlines()
            there = f": {text[number - 1].strip()}" if number <= len(text) else ""
            found.append(f"{module}:{number}: {line[: at.start()]}{line[at.end() :]}{there}")
    return found or [f"{message.partition(': does not compile')[0]}: {'; '.join(lines) or 'does not compile'}"]
