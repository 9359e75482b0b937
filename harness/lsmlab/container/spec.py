"""What a scenario says of a container: the options of `docker run` that matter to who may do what."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from lsmlab.definition import Strict, digest_of
from lsmlab.lab import PackageName
from lsmlab.terms import Framework

UNCONFINED_TYPE = "spc_t"
"""SELinux's domain for containers that it does not confine."""
SECURITY_OPT = (
    r"^(seccomp=unconfined|systempaths=unconfined|no-new-privileges|apparmor=[A-Za-z0-9_.-]+"
    r"|label=(type:[a-z0-9_]+|level:s0(:c[0-9]+([,.]c[0-9]+)*)?))$"
)
"""As `docker run --security-opt` takes them."""
PINNED = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-f:]+\])(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+@sha256:[0-9a-f]{64}"
)


def _pinned(value: str) -> str:
    """A reference that stands for one image for ever. Raises ValueError that says what to write instead."""
    name, at, _ = value.partition("@")
    host, slash, path = name.partition("/")
    if not slash or not (host == "localhost" or re.search(r"[.:]", host)):
        raise ValueError(f"{value!r}: expected HOST[:PORT]/NAME@sha256:DIGEST; it names no registry, such as docker.io")
    tag = path.rpartition("/")[2].partition(":")[2]
    if not at:
        raise ValueError(
            f"{value!r} is not pinned, and may be another image tomorrow: expected HOST[:PORT]/NAME@sha256:DIGEST; "
            f"`skopeo inspect --format '{{{{.Digest}}}}' docker://{value}` prints the digest"
        )
    if tag:
        raise ValueError(f"{value!r} has a tag and a digest: expected the digest alone, without :{tag}")
    if not PINNED.fullmatch(value):
        wanted = "expected HOST[:PORT]/NAME@sha256:DIGEST, in lower case, its digest of 64 hexadecimal digits"
        raise ValueError(f"{value!r} is no name of an image: {wanted}")
    return value


Reference = Annotated[str, AfterValidator(_pinned)]
"""An image of a registry, pinned by its digest."""


def host_of(reference: str) -> str:
    """The registry of a reference, with its port."""
    return reference.partition("/")[0]


def digest_in(reference: str) -> str:
    """The digest of a reference, hexadecimal."""
    return reference.rpartition(":")[2]


def is_loopback(reference: str) -> bool:
    """Whether its registry is this very machine: plain HTTP will do there, as Docker Engine has it."""
    host = re.sub(r":[0-9]+$", "", host_of(reference)).strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class BaseImage(Strict):
    """What a Dockerfile builds on besides `lsmlab` and `scratch`; its name there is `base`."""

    registry: Reference
    """HOST[:PORT]/NAME@sha256:DIGEST"""


class ContainerImage(Strict):
    """What a container is made of, where it is not BusyBox alone: exactly one of `registry`, `dockerfile`, `packages`.

    Its engine has no network: what it needs is fetched or built on this machine, and put into the guest.
    """

    registry: Reference | None = None
    """HOST[:PORT]/NAME@sha256:DIGEST, fetched with skopeo for linux/amd64."""
    dockerfile: Path | None = None
    """A file below the scenario's folder; its own folder is the build context. Built in the guest, without a network,
    FROM `lsmlab` (BusyBox), `scratch`, or `base`."""
    base: BaseImage | None = None
    """With `dockerfile`: an image of a registry, which it calls `base`."""
    packages: tuple[PackageName, ...] | None = None
    """Debian packages of the lab's own suite: a root tree of them, and what they depend on."""

    @model_validator(mode="after")
    def _one(self) -> ContainerImage:
        if sum(one is not None for one in (self.registry, self.dockerfile, self.packages)) != 1:
            raise ValueError("expected exactly one of: registry, dockerfile, packages")
        if self.base is not None and self.dockerfile is None:
            raise ValueError("`base` is what a `dockerfile` builds on")
        if self.packages is not None and not self.packages:
            raise ValueError("packages: expected at least one")
        return self

    @property
    def fetched(self) -> str | None:
        """The registry's image that it is, or is built on."""
        return self.registry or (self.base.registry if self.base is not None else None)

    @property
    def name(self) -> str:
        """What the engine in the guest calls it."""
        return f"lsmlab-image:{digest_of(self.model_dump_json())[:16]}"

    def __str__(self) -> str:
        """For people, on one line."""
        if self.packages is not None:
            return f"Debian packages {', '.join(self.packages)}"
        if self.dockerfile is None:
            return str(self.registry)
        on = f" on {self.base.registry}" if self.base is not None else ""
        return f"{self.dockerfile.parent.name}/{self.dockerfile.name}{on}"


class ImageRecord(Strict):
    """What a container's image was made of, as an outcome keeps it."""

    image: str
    """As the scenario asks for it."""
    sha256: tuple[str, ...]
    """Of what was put into the guest: the archive or root tree, or the build context, and the archive below it."""
    packages: dict[str, str] = Field(default_factory=dict)
    """Debian packages that were asked for, with their versions."""


class Container(Strict):
    """A container that lsmlab creates, as `docker run` would."""

    image: ContainerImage | None = None
    """None: BusyBox, and nothing else."""
    run: Annotated[tuple[str, ...], Field(min_length=1)] = ("tail", "-f", "/dev/null")
    """Its main process. Where none is given and its `image` names one, that."""
    binds: tuple[
        Annotated[str, StringConstraints(pattern=r"^/[^:\s]*:/[^:\s]+(:(ro|rw|z|Z)(,(ro|rw|z|Z))*)?$")], ...
    ] = ()
    """Of the guest, bind-mounted into it: `/etc:/hostetc:ro`; `z` and `Z` have the engine label it."""
    cap_add: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Z_]+$")], ...] = ()
    """Capabilities without `CAP_`, beyond the engine's own 14."""
    privileged: bool = False
    security_opt: tuple[Annotated[str, StringConstraints(pattern=SECURITY_OPT)], ...] = ()
    """Those of AppArmor hold in AppArmor's arms, those of SELinux in SELinux's; in the control neither."""
    user: Annotated[str, StringConstraints(pattern=r"^[0-9]+(:[0-9]+)?$")] | None = None
    network: Literal["none", "host"] = "none"
    pid: Literal["host"] | None = None

    @property
    def names_a_process(self) -> bool:
        """Whether the scenario says what its main process is."""
        return "run" in self.model_fields_set

    def confined_by(self, framework: Framework) -> bool:
        """False where its own options leave it unconfined: then it is its own control.

        Docker Engine, as seen with 26.1: --privileged takes neither label nor profile, even where one is named, and
        --pid=host takes a label only where one is named (moby, daemon/create.go, generateSecurityOpt).
        """
        label = [o for o in self.security_opt if o.startswith("label=")]
        if self.privileged or framework is Framework.APPARMOR:
            return not self.privileged
        return (self.pid is None or bool(label)) and f"label=type:{UNCONFINED_TYPE}" not in label
