"""Labs: kinds of machine to experiment on. One file each, `labs/<id>.yaml`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from lsmlab import definition
from lsmlab.definition import Definition, Strict
from lsmlab.errors import DefinitionError
from lsmlab.terms import Arm, Framework, Kernel

KIND = "lsmlab/lab"
FILE_KEYS = frozenset({"apparmor_profile", "keyring", "selinux_policy", "apparmor_profiles"})
SECILC = "secilc"
"""The package with the compiler of a whole SELinux policy, which one from elsewhere needs: it has no module store."""

Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
UnitName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:_.@][A-Za-z0-9:_.@-]*\.service$")]
PackageName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9+._-]+$")]
WebAddress = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+/\S+$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class DebianImage(Strict):
    """A disk built from Debian packages with mmdebstrap."""

    suite: Identifier
    packages: tuple[PackageName, ...] = Field(min_length=1)
    disk_mib: int = Field(ge=1024, le=65536)
    """Size of the root file system, MiB."""
    masked_units: tuple[str, ...] = Field(default=())
    """systemd units that no scenario needs and that only cost boot time."""
    disabled_units: tuple[str, ...] = Field(default=())
    """systemd units that some scenario starts, and that do not run from boot."""
    selinux_policy: Path | None = Field(default=None)
    """A policy from elsewhere in place of the distribution's: a folder like /etc/selinux/targeted of the machine that
    it comes from, with policy/policy.NN and contexts/."""
    apparmor_profiles: Path | None = Field(default=None)
    """Profiles from elsewhere in place of the distribution's: a folder like /etc/apparmor.d. Of its own folders, such
    as abstractions/, each takes the place of the distribution's."""

    @property
    def elsewhere(self) -> dict[Framework, Path]:
        """The folders of policies from elsewhere, by framework."""
        said = {Framework.SELINUX: self.selinux_policy, Framework.APPARMOR: self.apparmor_profiles}
        return {framework: folder for framework, folder in said.items() if folder is not None}


class Checksums(Strict):
    """A distribution's list of its files' digests, signed."""

    url: WebAddress
    signature: WebAddress | None = Field(default=None)
    """None: the list is clear-signed, the signature lies in it."""
    keyring: Path
    """The keys of which one has to have signed it."""


class CloudImage(Strict):
    """A distribution's own disk image, downloaded, verified, and prepared once in a guest that has a network."""

    url: WebAddress
    sha256: Sha256 | None = Field(default=None)
    """None: the one that the signed list says, of whatever is there on that day."""
    checksums: Checksums | None = Field(default=None)
    installer: Literal["apt", "dnf", "zypper"]
    """What installs packages there, from the distribution's own repositories."""
    packages: tuple[PackageName, ...] = Field(min_length=1)
    disk_mib: int = Field(ge=1024, le=65536)
    """Size of the disk, MiB; the distribution's is made larger where it is smaller."""
    prepare: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...] = Field(default=())
    """Commands that make this distribution as scenarios expect it; done once, when the packages are there."""
    masked_units: tuple[str, ...] = Field(default=())
    disabled_units: tuple[str, ...] = Field(default=())

    @model_validator(mode="after")
    def _verifiable(self) -> CloudImage:
        if self.sha256 is None and self.checksums is None:
            raise ValueError("expected `sha256`, `checksums`, or both: an image that nothing vouches for is not taken")
        return self


class Service(Strict):
    """What a distribution calls a service that scenarios attack."""

    unit: UnitName
    apparmor_profile: Path | None = Field(default=None)
    """The profile that `lsmlab try` loads where the distribution ships none."""


class Engine(Strict):
    """The container engine that runs inside the lab's guests, and what the image has for it besides."""

    kind: Literal["docker"]
    packages: tuple[PackageName, ...] = Field(min_length=1)
    units: tuple[str, ...] = Field(min_length=1)
    """Its systemd units, the one that is started first; none runs from boot, since lsmlab writes their settings."""


class Lab(Definition):
    """A kind of machine. Units: memory in MiB."""

    kind: Literal["lsmlab/lab"]
    id: Identifier
    title: str
    backend: Literal["qemu"]
    image: DebianImage | None = Field(default=None)
    cloud_image: CloudImage | None = Field(default=None)
    frameworks: tuple[Framework, ...] = Field(min_length=1)
    memory_mib: int = Field(ge=256, le=65536)
    kernel_arguments: dict[Kernel, str]
    """The part of the kernel's command line that picks the framework, for each boot."""
    services: dict[Identifier, Service] = Field(default_factory=dict)
    needs_kvm: bool = False
    """Its programs need a processor of x86-64-v3, of which software emulation here lacks a part: the kernel's list
    allocator breaks with it (see `machine.hardware.CPU`)."""
    names: dict[str, str] = Field(default_factory=dict)
    """What this distribution calls what Debian, whose names scenarios use, calls otherwise: users, groups, paths."""
    engine: Engine | None = None
    """None: no containers here."""

    os_release: dict[str, str] = Field(default_factory=dict)
    """Lines of /etc/os-release by which a machine over SSH is known to call its services so."""

    @model_validator(mode="after")
    def _one_image(self) -> Lab:
        if (self.image is None) == (self.cloud_image is None):
            raise ValueError("expected either `image` (built from Debian packages) or `cloud_image` (downloaded)")
        if self.engine is not None and self.image is None:
            raise ValueError("engine: expected with `image`, whose packages and units it adds to")
        for framework, folder in (self.image.elsewhere if self.image is not None else {}).items():
            if framework not in self.frameworks:
                raise ValueError(f"image: {folder} is a policy of {framework}, which is not among the frameworks")
        return self

    @property
    def disk(self) -> DebianImage | CloudImage:
        """What its disk is made from."""
        found = self.image or self.cloud_image
        assert found is not None
        return found

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Every arm that this lab can run, in the order of the experiment; the weaker controls last."""
        return tuple(a for a in Arm if a.framework is None or a.framework in self.frameworks)

    def with_packages(self, packages: Sequence[str]) -> Lab:
        """This lab with more packages in its image; itself where it has them all."""
        more = [p for p in dict.fromkeys(packages) if p not in self.disk.packages]
        if not more:
            return self
        disk = self.disk.model_copy(update={"packages": (*self.disk.packages, *sorted(more))})
        return self.model_copy(update={"image" if self.image else "cloud_image": disk})

    def named(self, text: str) -> str:
        """`text` of a set-up with this distribution's own names in place of Debian's."""
        for debian, own in self.names.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(debian)}(?![\w.-])", own.replace("\\", r"\\"), text)
        return text

    def completed(self) -> Lab:
        """This lab with what its engine, and a policy from elsewhere, need in the image."""
        if self.image is None or (self.engine is None and self.image.selinux_policy is None):
            return self
        engine_packages, engine_units = (self.engine.packages, self.engine.units) if self.engine else ((), ())
        compiler = (SECILC,) if self.image.selinux_policy else ()
        image = self.with_packages((*engine_packages, *compiler)).image
        assert image is not None
        units = (*image.disabled_units, *(u for u in engine_units if u not in image.disabled_units))
        return self.model_copy(update={"image": image.model_copy(update={"disabled_units": units})})

    def service(self, name: str) -> Service:
        """The service called `name`. Raises DefinitionError with the nearest name."""
        found = self.services.get(name)
        if found is None:
            raise definition.unknown_name(f"service of lab {self.id}", name, sorted(self.services))
        return found


def load(path: Path, find: definition.Finder) -> Lab:
    """Read a lab file; `find` turns the id in `extends:` into a file. Raises DefinitionError."""
    raw = definition.resolve(path, KIND, find, FILE_KEYS)
    lab = definition.validate(Lab, raw, path).completed()
    if path.stem != lab.id:
        raise DefinitionError(
            f"{raw.origin(('id',), path)}: id: expected {path.stem!r}, the file's name; found {lab.id!r}"
        )
    for framework, folder in (lab.image.elsewhere if lab.image is not None else {}).items():
        name, look = _ELSEWHERE[framework]
        wrong = look(folder)
        if wrong:
            raise DefinitionError(f"{raw.origin(('image', name), path)}: image.{name}: {folder}: {wrong}")
    wanted = {Kernel.NONE, *(Kernel(f.value) for f in lab.frameworks)}
    missing = sorted(wanted - set(lab.kernel_arguments))
    if missing:
        raise DefinitionError(f"{raw.origin(('kernel_arguments',), path)}: kernel_arguments: {missing[0]} is missing")
    return lab


def policy_file(folder: Path) -> Path | None:
    """The compiled policy of a folder like /etc/selinux/targeted: the newest version there is; None where none is."""
    numbered = [p for p in (folder / "policy").glob("policy.*") if p.suffix[1:].isdecimal() and p.is_file()]
    return max(numbered, key=lambda p: int(p.suffix[1:]), default=None)


def _no_selinux_policy(folder: Path) -> str:
    """Why `folder` is no SELinux policy; empty where it is one."""
    if not folder.is_dir():
        return "expected a folder like /etc/selinux/targeted; there is none"
    if policy_file(folder) is None:
        return "expected a compiled policy in it, policy/policy.NN, as /etc/selinux/targeted has; there is none"
    leading_out = next((p for p in folder.rglob("*") if p.is_symlink() and _leads_out(p, folder)), None)
    if leading_out is not None:
        return f"{leading_out.relative_to(folder)} is a link that leads out of it: copy what it leads to"
    contexts = "contexts/files/file_contexts"
    return "" if (folder / contexts).is_file() else f"expected the labels of files in it, {contexts}; there are none"


def _leads_out(link: Path, folder: Path) -> bool:
    return link.readlink().is_absolute() or not link.resolve().is_relative_to(folder.resolve())


def _no_profiles(folder: Path) -> str:
    """Why `folder` has no AppArmor profiles; empty where it has."""
    if not folder.is_dir():
        return "expected a folder of profiles, like /etc/apparmor.d; there is none"
    found = any(p.is_file() and not p.name.startswith(".") for p in folder.iterdir())
    return "" if found else "expected profiles in it; there is no file right below it"


_ELSEWHERE = {
    Framework.SELINUX: ("selinux_policy", _no_selinux_policy),
    Framework.APPARMOR: ("apparmor_profiles", _no_profiles),
}
"""The key that names a policy from elsewhere, and what is wrong with its folder."""
