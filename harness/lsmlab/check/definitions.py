"""Scenario and lab files held against their models, and against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lsmlab import definition, discovery, lab, scenario
from lsmlab.check.findings import Checked, Findings, faults_of
from lsmlab.errors import DefinitionError
from lsmlab.lab import Lab
from lsmlab.scenario import Scenario

OURS = "lsmlab/"


@dataclass(frozen=True, slots=True)
class Place:
    """The scenario files below one folder, by id: all of them, also where several share one."""

    files: dict[str, list[Path]]
    others: list[tuple[Path, str]]
    """Files that are called like scenarios and are of another kind."""

    @classmethod
    def at(cls, root: Path) -> Place:
        """What lies below `root`."""
        found = cls({}, [])
        for path in discovery.named_like_scenarios(root):
            kind = definition.peek_kind(path)
            if kind == scenario.KIND:
                found.files.setdefault(path.parent.name, []).append(path)
            else:
                found.others.append((path, kind or "none"))
        return found

    @property
    def all(self) -> list[Path]:
        """Every scenario file, by id."""
        return [path for name in sorted(self.files) for path in self.files[name]]


@dataclass(frozen=True, slots=True)
class Search:
    """Where scenarios are looked for, in order. The last place is lsmlab's own library."""

    places: tuple[Place, ...]

    @classmethod
    def everywhere(cls) -> Search:
        """`./scenarios`, and the library."""
        return cls(tuple(Place.at(root) for root in discovery.roots("scenarios")))

    def twice(self) -> Iterator[str]:
        """A fault for each id that several files of one place share: `lsmlab run` then refuses them all."""
        for place in self.places:
            yield from (_shared(name, paths) for name, paths in place.files.items() if len(paths) > 1)

    def pass_over(self, found: Findings) -> None:
        """Say which files are not taken for scenarios: a slip in their kind would go unseen."""
        for path, kind in (other for place in self.places for other in place.others):
            _pass_over(found, path, kind, scenario.KIND)

    def known(self, name: str) -> list[Path]:
        """The files of one id, of the first place that has any."""
        return next((place.files[name] for place in self.places if name in place.files), [])

    def chosen(self, names: Sequence[str], found: Findings) -> list[Path]:
        """The files of `names`: ids, folders or files; none named: all of the first place that has any.

        Raises DefinitionError for a name that stands for nothing.
        """
        if not names:
            return next((place.all for place in self.places if place.files), [])
        paths = list(dict.fromkeys(path for name in names for path in self.known(name) or self._in_place(name)))
        own = {path for place in self.places for path in place.all}  # those are told of already
        for name in dict.fromkeys(path.parent.name for path in paths):
            same = [path for path in paths if path.parent.name == name]
            if len(same) > 1 and not own.issuperset(same):
                found.faults.append(_shared(name, same))
        return paths

    def _in_place(self, name: str) -> list[Path]:
        place = Path(name)
        if not place.exists():
            raise definition.unknown_name("scenario", name, sorted({n for p in self.places for n in p.files}))
        if place.is_file():
            return [place.resolve()]
        here = place.resolve() / scenario.FILE_NAME
        files = [*([here] if here.is_file() else []), *Place.at(place.resolve()).all]
        if not files:
            raise DefinitionError(
                f"{place}: no {scenario.FILE_NAME} with `kind: {scenario.KIND}` in it",
                hint="Name a scenario, its folder or its file; `lsmlab scenarios` lists those that are known.",
            )
        return files

    def load(self, entry: Checked) -> Scenario | None:
        """The scenario of a file, or None and its faults."""

        def find(name: str) -> Path | None:
            beside = entry.file.parent.parent / name / scenario.FILE_NAME
            return beside if beside.is_file() else next(iter(self.known(name)), None)

        try:
            one = scenario.load(entry.file, find)
            one.digest()  # reads every file
        except DefinitionError as error:
            entry.faults += faults_of(error)
            return None
        files = len(one.files())
        entry.looked_at.append(("keys", ""))
        entry.looked_at += [(f"{files} file{'s' * (files != 1)}", "")] if files else []
        hidden = self.places[-1].files.get(entry.name, [])
        if hidden and entry.file not in hidden and entry.file in self.known(entry.name):
            entry.notes.append(f"hides the scenario of this name that comes with lsmlab: {hidden[0]}")
        return one


def _pass_over(found: Findings, path: Path, kind: str, wanted: str) -> None:
    """A fault where the kind is like one of ours; another program's file is only noted."""
    words = f"{path}: passed over: its kind is {kind}, and not {wanted}"
    (found.faults if kind.startswith(OURS) else found.notes).append(words)


def _shared(name: str, paths: Sequence[Path]) -> str:
    return f"{len(paths)} scenarios are called {name!r}: {', '.join(map(str, paths))} (Rename all but one.)"


def check_labs(found: Findings, wanted: Sequence[str]) -> list[Lab]:
    """Check every lab file; those of `wanted` that are sound. Raises DefinitionError for a name that no lab has."""
    by_id: dict[str, list[Path]] = {}
    for path in (p for root in discovery.roots("labs") for p in discovery.named_like_labs(root)):
        kind = definition.peek_kind(path)
        if kind == lab.KIND:
            by_id.setdefault(path.stem, []).append(path)
        elif (kind or "").startswith(OURS):
            _pass_over(found, path, kind or "", lab.KIND)
    for name in wanted:
        if name not in by_id:
            raise definition.unknown_name("lab", name, sorted(by_id))
    sound: dict[str, Lab] = {}
    for name, path in [(name, path) for name, paths in sorted(by_id.items()) for path in paths]:
        entry = Checked("lab", name, path)
        found.files.append(entry)
        machine = _load_lab(entry, {base: paths[0] for base, paths in by_id.items()})
        if machine is not None:
            sound.setdefault(name, machine)
    return [sound[name] for name in dict.fromkeys(wanted) if name in sound]


def _load_lab(entry: Checked, known: dict[str, Path]) -> Lab | None:
    try:
        machine = lab.load(entry.file, known.get)
    except DefinitionError as error:
        entry.faults += faults_of(error)
        return None
    entry.looked_at.append(("keys", ""))
    for name, service in machine.services.items():
        if service.apparmor_profile is not None and not service.apparmor_profile.is_file():
            at = ("services", name, "apparmor_profile")
            entry.faults.append(entry.at(at, f"no such file: {service.apparmor_profile}"))
    return machine


def check_on_lab(entry: Checked, one: Scenario, machine: Lab) -> None:
    """See that a lab has what a scenario asks of it."""
    if one.subject.container is not None and machine.engine is None:
        entry.notes.append(f"{machine.id} has no container engine: it is not run there")
        return
    service = one.subject.service
    if service is not None and service not in machine.services:
        known = ", ".join(sorted(machine.services)) or "none"
        words = f"lab {machine.id} has no service {service!r}; it has: {known}"
        entry.faults.append(entry.at(("subject", "service"), words))
    for framework, expectation in one.expected.items():
        if framework not in machine.frameworks:
            entry.notes.append(f"{machine.id} has no {framework.display}: that part is not run there")
        for name in sorted(set(expectation.labs) - set(discovery.labs().ids)):
            words = entry.at(("expected", framework.value, "labs", name), "there is no lab of this name")
            entry.faults += [words] if words not in entry.faults else []
