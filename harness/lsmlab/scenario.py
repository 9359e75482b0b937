"""Scenarios: who does what to what, how DAC is made to permit it, and what is expected.

One folder each, `scenarios/<id>/scenario.yaml` and the files that it uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from lsmlab import definition
from lsmlab.container import context
from lsmlab.container.context import Context
from lsmlab.container.spec import Container, ContainerImage
from lsmlab.definition import Definition, Strict
from lsmlab.errors import DefinitionError
from lsmlab.lab import Identifier, Lab, PackageName, UnitName
from lsmlab.terms import AttemptKind, Control, Framework, Verdict

KIND = "lsmlab/scenario"
FILE_NAME = "scenario.yaml"
FILE_KEYS = frozenset({"from", "modules", "profiles", "falsified_by", "dockerfile"})

CANARY = "{canary}"
INODE_CLASSES = frozenset({"file", "dir", "lnk_file", "chr_file", "blk_file", "sock_file", "fifo_file"})
"""SELinux's classes of what has a path and an inode."""
GuestPath = Annotated[str, StringConstraints(pattern=r"^/[^\x00\n]*$")]
Words = Annotated[tuple[str, ...], Field(min_length=1)]
NAME = "[a-z_][a-z0-9_-]*"
"""A user's or a group's."""
AccountName = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]


def _regex(value: str | None) -> str | None:
    if value is not None:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
    return value


def _distinct_names(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    names = [p.name for p in paths]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise ValueError(f"two files are called {twice!r}; in the guest one would replace the other")
    return paths


class Subject(Strict):
    """Who acts: a service of the lab, a unit of the scenario's own, or a container; and its domain and profile."""

    service: Identifier | None = None
    unit: UnitName | None = None
    """A systemd unit that the set-up writes."""
    container: Container | None = None
    """A container of the lab's engine."""
    beside: tuple[Container, ...] = ()
    """Other containers, which are there before it."""
    selinux: str | None = None
    """The SELinux type (domain), such as httpd_t."""
    apparmor: str | None = None
    """The AppArmor profile's name."""

    @model_validator(mode="after")
    def _one(self) -> Subject:
        if sum(one is not None for one in (self.service, self.unit, self.container)) != 1:
            raise ValueError(
                "expected one of `service` (one of the lab), `unit` (one that the set-up writes) and `container`"
            )
        if self.beside and self.container is None:
            raise ValueError("`beside` has the containers beside a container")
        return self

    @property
    def images(self) -> tuple[ContainerImage, ...]:
        """What its containers are made of, each once, where that is not BusyBox alone."""
        there = [] if self.container is None else [self.container, *self.beside]
        return tuple(dict.fromkeys(one.image for one in there if one.image is not None))

    @property
    def name(self) -> str:
        """The service's name, for people."""
        if self.container is not None:
            return "container"
        return self.service or (self.unit or "").removesuffix(".service")


class Object(Strict):
    """What is acted upon. It has a path where its class is one of files."""

    path: GuestPath | None = None
    tclass: str = Field(default="file", alias="class")
    selinux: str | None = None
    """The SELinux type of the object, such as shadow_t."""

    @model_validator(mode="after")
    def _has_path(self) -> Object:
        if self.path is None and self.tclass in INODE_CLASSES:
            raise ValueError(f"path is missing: an object of class {self.tclass} has one")
        return self


class Write(Strict):
    """Write a file in the guest, in place, and give it the label that the policy gives its path."""

    path: GuestPath
    source: Path | None = Field(default=None, alias="from")
    content: str | None = None
    mode: str = Field(default="0644", pattern=r"^[0-7]{4}$")
    owner: str = Field(default="root:root", pattern=f"^{NAME}:{NAME}$")

    @model_validator(mode="after")
    def _one_source(self) -> Write:
        if (self.source is None) == (self.content is None):
            raise ValueError("expected either `from` (a file beside this one) or `content`")
        return self

    def data(self) -> bytes:
        """The bytes to write. Raises DefinitionError where the file is not there."""
        if self.content is not None:
            return self.content.encode()
        assert self.source is not None
        return read_file(self.source)


class Join(Strict):
    """Make a user a member of a group, as `usermod --append --groups` does; both are in the guest's own files."""

    user: AccountName
    group: AccountName


class Step(Strict):
    """One step of a scenario's set-up, done as root: exactly one of its keys."""

    run: Words | None = None
    write: Write | None = None
    join: Join | None = None

    @model_validator(mode="after")
    def _one(self) -> Step:
        if [self.run, self.write, self.join].count(None) != 2:
            raise ValueError("expected exactly one of: run, write, join")
        return self

    def renamed(self, named: Callable[[str], str]) -> Step:
        """The step with other names in its command, in where it writes and whose the file is, or in who joins."""
        if self.run is not None:
            return self.model_copy(update={"run": tuple(named(word) for word in self.run)})
        if self.join is not None:
            join = {"user": named(self.join.user), "group": named(self.join.group)}
            return self.model_copy(update={"join": self.join.model_copy(update=join)})
        assert self.write is not None
        write = {"path": named(self.write.path), "owner": named(self.write.owner)}
        return self.model_copy(update={"write": self.write.model_copy(update=write)})


class HttpRequest(Strict):
    """A request that a visitor sends to the service, from inside the guest, its path as it is written."""

    path: str = Field(pattern=r"^/\S*$")
    method: str = Field(default="GET", pattern=r"^[A-Z]+$")
    port: int = Field(default=80, ge=1, le=65535)
    body: str | None = None
    """What is sent along, as UTF-8."""


class Canary(Strict):
    """A line with a random word, appended in place after the restore: who shows the word has read the object."""

    file: GuestPath
    line: str = CANARY

    @field_validator("line")
    @classmethod
    def _has_canary(cls, value: str) -> str:
        if CANARY not in value or "\n" in value:
            raise ValueError(f"expected one line with {CANARY} in it")
        return value


class Effect(Strict):
    """A command, run as root, whose output shows that the action happened; it must not show it before."""

    run: Words
    output: str

    _check = field_validator("output")(_regex)


class AllowedIf(Strict):
    """The proof that the operation was done. All that is given must be seen."""

    output: str | None = None
    """A text that the output must contain; `{canary}` stands for the attempt's random word."""
    status: int | None = Field(default=None, ge=100, le=599)
    effect: Effect | None = None


class BlockedIf(Strict):
    """The sign of a block. All that is given must be seen."""

    status: int | None = Field(default=None, ge=100, le=599)
    exit: int | None = Field(default=None, ge=1, le=255)
    signal: int | None = Field(default=None, ge=1, le=64)
    output: str | None = None
    """A regular expression that the output must match."""
    timeout: bool = False

    _check = field_validator("output")(_regex)

    @model_validator(mode="after")
    def _some(self) -> BlockedIf:
        if not (self.status or self.exit or self.signal or self.output or self.timeout):
            raise ValueError("expected at least one of: status, exit, signal, output, timeout")
        return self


class Attempt(Strict):
    """One operation, tried once in each arm: a visitor's request, or a command run as the subject."""

    id: Identifier
    kind: AttemptKind
    http: HttpRequest | None = None
    run: Words | None = None
    """A command, run with the service's own uid, groups, capabilities and domain or profile."""
    canary: Canary | None = None
    allowed_if: AllowedIf
    blocked_if: tuple[BlockedIf, ...] = Field(default=())
    """Signs of a block, any of which counts. A `run` that fails with EACCES or EPERM always counts."""
    changes_mac: bool = False
    """Where it succeeds, a mode, a policy, a boolean or a profile is another one afterwards: that is the attack."""
    timeout: int = Field(default=15, ge=1, le=300)
    """Seconds."""

    @model_validator(mode="after")
    def _provable(self) -> Attempt:
        if (self.http is None) == (self.run is None):
            raise ValueError("expected exactly one of: http, run")
        proof = self.allowed_if
        has_canary = proof.output is not None and CANARY in proof.output
        if has_canary and self.canary is None:
            raise ValueError("allowed_if.output names {canary}, and no `canary:` is planted")
        if self.canary is not None and not has_canary:
            raise ValueError("a canary is planted, and allowed_if.output does not look for {canary}")
        if self.kind is AttemptKind.ATTACK and not has_canary and proof.effect is None:
            raise ValueError(
                "an attack needs a proof of success: allowed_if with a {canary} in `output`, or an `effect`"
            )
        if proof.output is None and proof.effect is None:
            raise ValueError("allowed_if proves nothing: expected `output` or `effect`")
        if self.changes_mac and self.kind is AttemptKind.BENIGN:
            raise ValueError("changes_mac is for attacks; benign work that changes MAC is a fault of the scenario")
        if self.http is None and (proof.status or any(b.status for b in self.blocked_if)):
            raise ValueError("`status` is an HTTP status; this attempt is not an http one")
        if self.http is not None and any(b.exit or b.signal for b in self.blocked_if):
            raise ValueError("`exit` and `signal` are a command's end; an http attempt has none")
        if self.http is not None and not self.blocked_if:
            raise ValueError("an http attempt needs `blocked_if`, such as `- status: 403`")
        return self


class DenialExpectation(Strict):
    """The kernel's record that must account for a block. What is not said is taken from subject and object."""

    attempt: Identifier
    permissions: tuple[str, ...] = Field(default=())
    """Permissions of which at least one must be in the record: `read` (SELinux) or `r` (AppArmor)."""
    subject: str | None = None
    """The domain or profile that is denied, where it is not the scenario's subject: a child profile, a hat."""
    tclass: str | None = Field(default=None, alias="class")
    """SELinux: the object class. AppArmor: the rule class (file, cap, net, ...)."""
    selinux_object: str | None = None
    """SELinux: the object's type, where it is not the scenario's object."""
    path: GuestPath | None = None
    """The object's path, where it is not the scenario's object."""
    operation: str | None = None
    """AppArmor: the operation, such as open or exec."""

    @model_validator(mode="after")
    def _says_something(self) -> DenialExpectation:
        if not self.permissions and self.operation is None:
            raise ValueError("expected `permissions`, or AppArmor's `operation`")
        return self


class LabExpectation(Strict):
    """What one framework is expected to do on one lab."""

    verdict: Verdict
    because: str
    """The reason, from the policy; written before the first run."""
    denials: tuple[DenialExpectation, ...] = Field(default=())
    falsified_by: tuple[Path, ...] = Field(default=())
    """What `run --falsify` loads instead of the scenario's modules or profiles, where adding the denied rules does not
    weaken it: a constraint, an explicit deny."""
    _names = field_validator("falsified_by")(_distinct_names)


class Expectation(LabExpectation):
    """What one framework is expected to do: on every lab, but for those that are named."""

    labs: dict[Identifier, LabExpectation] = Field(default_factory=dict)


class SelinuxPolicy(Strict):
    """What the scenario adds to the distribution's SELinux policy."""

    modules: tuple[Path, ...] = Field(default=())
    """CIL modules, compiled natively in the image's root tree."""
    _names = field_validator("modules")(_distinct_names)
    booleans: dict[str, bool] = Field(default_factory=dict)


class ApparmorPolicy(Strict):
    """What the scenario adds to the distribution's AppArmor profiles."""

    profiles: tuple[Path, ...] = Field(default=())
    _names = field_validator("profiles")(_distinct_names)
    shipped: tuple[GuestPath, ...] = Field(default=())
    """Profiles that the distribution ships, such as /etc/apparmor.d/usr.sbin.named."""


class Dac(Strict):
    """How DAC is made to permit the attack, and which access the explanation is about."""

    opened_by: str
    access: Literal["read", "write", "execute"] = "read"


class Difficulty(StrEnum):
    """For whom a scenario is a good exercise."""

    BEGINNER = "beginner"
    INTERMEDIATE = "intermediate"
    ADVANCED = "advanced"


class Scenario(Definition):
    """One scenario, as written in its file."""

    kind: Literal["lsmlab/scenario"]
    id: Identifier
    title: str
    story: str
    technique: str = Field(pattern=r"^T\d{4}(\.\d{3})?$")
    """MITRE ATT&CK technique."""
    difficulty: Difficulty = Difficulty.BEGINNER
    tags: tuple[str, ...] = Field(default=())
    packages: tuple[PackageName, ...] = Field(default=())
    """Debian packages that it needs besides the lab's."""
    control: Control = Control.DAC
    """What the enforcing arm is compared with."""
    subject: Subject
    object: Object
    dac: Dac
    setup: tuple[Step, ...] = Field(default=())
    """Done once for the arms of a kernel, before the service is started in the mode under test."""
    after_start: tuple[Step, ...] = Field(default=())
    """Done once an arm, after the service was started."""
    selinux: SelinuxPolicy = SelinuxPolicy()
    apparmor: ApparmorPolicy = ApparmorPolicy()
    attempts: tuple[Attempt, ...] = Field(min_length=1)
    expected: dict[Framework, Expectation]

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        ids = [a.id for a in self.attempts]
        twice = next((n for n, i in enumerate(ids) if i in ids[:n]), None)
        if twice is not None:
            raise ValueError(f"attempts.{twice}: two attempts are called {ids[twice]!r}")
        attacks = [a.id for a in self.attempts if a.kind is AttemptKind.ATTACK]
        if not attacks:
            raise ValueError("attempts: expected at least one of kind attack")
        if not self.expected:
            raise ValueError("expected: expected selinux, apparmor or both")
        changing = next((n for n, a in enumerate(self.attempts) if a.changes_mac), None)
        if changing is not None and self.control is Control.DAC:
            raise ValueError(
                f"attempts.{changing}: an attack that changes MAC has no object where there is none: "
                f"it needs `control: {Control.UNCONFINED}`"
            )
        self._check_container()
        for framework, expectation in self.expected.items():
            self._check_expectation(framework, f"expected.{framework}", expectation, attacks)
            for lab, other in expectation.labs.items():
                self._check_expectation(framework, f"expected.{framework}.labs.{lab}", other, attacks)
        return self

    def _check_container(self) -> None:
        container = self.subject.container
        if container is None:
            return
        if self.control is not Control.UNCONFINED:
            raise ValueError(
                "subject.container: an engine needs a kernel with the framework, so that its absence is no control: "
                f"it needs `control: {Control.UNCONFINED}` (`apparmor=unconfined`, `label=disable`)"
            )
        if container.network != "host":
            asked = next((n for n, a in enumerate(self.attempts) if a.http is not None), None)
            if asked is not None:
                raise ValueError(f"attempts.{asked}: no visitor reaches a container without `network: host`")

    def _check_expectation(
        self, framework: Framework, at: str, expectation: LabExpectation, attacks: list[str]
    ) -> None:
        name = self.subject.selinux if framework is Framework.SELINUX else self.subject.apparmor
        if name is None:
            raise ValueError(f"{at}: subject.{framework} is missing: the domain or profile that must be found")
        for denial in expectation.denials:
            if denial.attempt not in attacks:
                raise ValueError(f"{at}.denials: {denial.attempt!r} is no attack of this scenario")
            vague = denial.path is None and denial.tclass is None and denial.operation is None
            if framework is Framework.APPARMOR and vague and self.object.path is None:
                raise ValueError(f"{at}.denials: the object has no path; expected `class`, `operation` or `path`")
        covered = {d.attempt for d in expectation.denials}
        uncovered = [a for a in attacks if a not in covered]
        if expectation.verdict is Verdict.CONTAINED and uncovered:
            raise ValueError(f"{at}: CONTAINED needs the denial expected for attack {uncovered[0]!r}")

    @property
    def attacks(self) -> tuple[Attempt, ...]:
        """The attempts of kind attack."""
        return tuple(a for a in self.attempts if a.kind is AttemptKind.ATTACK)

    @property
    def benign(self) -> tuple[Attempt, ...]:
        """The attempts that must keep working."""
        return tuple(a for a in self.attempts if a.kind is AttemptKind.BENIGN)

    def expectation(self, framework: Framework, lab: str) -> LabExpectation:
        """What `framework` is expected to do on `lab`. Raises KeyError where nothing is expected of it."""
        expected = self.expected[framework]
        return expected.labs.get(lab, expected)

    def belongs_to(self, lab: Lab) -> bool:
        """Whether it is run on `lab` when all are asked for: about a container where there is an engine, or neither.

        A downloaded lab has few services, and is not asked for others. Elsewhere such a name is a fault, and is said.
        """
        about_containers = self.subject.container is not None
        has_service = self.subject.service in {None, *lab.services} or lab.cloud_image is None
        return about_containers is (lab.engine is not None) and has_service

    def subject_name(self, framework: Framework) -> str:
        """The domain or profile in which the subject must be found under `framework`."""
        name = self.subject.selinux if framework is Framework.SELINUX else self.subject.apparmor
        return name or ""

    def files(self) -> tuple[Path, ...]:
        """Every file beside the definition that the scenario uses, in a stable order."""
        steps = (*self.setup, *self.after_start)
        expected = [e for one in self.expected.values() for e in (one, *one.labs.values())]
        sources = [s.write.source for s in steps if s.write is not None and s.write.source is not None]
        weaker = [path for expectation in expected for path in expectation.falsified_by]
        built = [image.dockerfile for image in self.subject.images if image.dockerfile is not None]
        return (*sources, *self.selinux.modules, *self.apparmor.profiles, *weaker, *built)

    def contexts(self) -> tuple[Context, ...]:
        """What its images are built from, read anew. Raises DefinitionError."""
        return tuple(
            context.read(image.dockerfile, has_base=image.base is not None)
            for image in self.subject.images
            if image.dockerfile is not None
        )

    def digest(self) -> str:
        """SHA-256 over the definition and the content of its files; where the folder lies does not matter."""
        document = self.model_dump(mode="json", by_alias=True)
        text = json.dumps(_without_folders(document, {str(p) for p in self.files()}), sort_keys=True)
        built = [one.digest() for one in self.contexts()]
        return definition.digest_of(text, *(read_file(path) for path in self.files()), *built)


LATER = (("image", None), ("join", None))
"""Keys that came later, where they are not used: a definition without them has the digest that it had before."""


def _without_folders(node: Any, files: set[str]) -> Any:
    if isinstance(node, dict):
        there = (item for item in node.items() if item not in LATER)
        return {key: _without_folders(value, files) for key, value in there}
    if isinstance(node, list):
        return [_without_folders(value, files) for value in node]
    return Path(node).name if node in files else node


def read_file(path: Path) -> bytes:
    """A file that a definition names. Raises DefinitionError."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise DefinitionError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def load(path: Path, find: definition.Finder) -> Scenario:
    """Read a scenario file; `find` turns the id in `extends:` into a file. Raises DefinitionError."""
    raw = definition.resolve(path, KIND, find, FILE_KEYS)
    scenario = definition.validate(Scenario, raw, path)
    if path.parent.name != scenario.id:
        where = raw.origin(("id",), path)
        raise DefinitionError(f"{where}: id: expected {path.parent.name!r}, the folder's name; found {scenario.id!r}")
    for file in scenario.files():
        if not _is_file(file):
            raise DefinitionError(f"{_origin_of(raw, file)}: no such file: {file}")
    for image in scenario.subject.images:
        if image.dockerfile is not None:
            where = _origin_of(raw, image.dockerfile)
            if not image.dockerfile.resolve().is_relative_to(where.file.parent.resolve()):
                raise DefinitionError(
                    f"{where}: dockerfile: expected a file in the scenario's folder, found {image.dockerfile}"
                )
    scenario.contexts()  # what is wrong with a Dockerfile is told now
    return scenario


def _origin_of(raw: definition.RawDefinition, file: Path) -> definition.Origin:
    """Where a file is named."""
    return next((o for loc, o in raw.origins.items() if _value_at(raw.data, loc) == str(file)), raw.origins[()])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _value_at(data: Any, loc: definition.Location) -> Any:
    try:
        for part in loc:
            data = data[part]
    except (KeyError, IndexError, TypeError):
        return None
    return data
