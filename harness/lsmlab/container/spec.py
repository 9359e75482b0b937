"""What a scenario says of a container: the options of `docker run` that matter to who may do what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from lsmlab.definition import Strict
from lsmlab.terms import Framework

UNCONFINED_TYPE = "spc_t"
"""SELinux's domain for containers that it does not confine."""
SECURITY_OPT = (
    r"^(seccomp=unconfined|systempaths=unconfined|no-new-privileges|apparmor=[A-Za-z0-9_.-]+"
    r"|label=(type:[a-z0-9_]+|level:s0(:c[0-9]+([,.]c[0-9]+)*)?))$"
)
"""As `docker run --security-opt` takes them."""


class Container(Strict):
    """A container that lsmlab creates, as `docker run` would. Its image has BusyBox, and nothing else."""

    run: Annotated[tuple[str, ...], Field(min_length=1)] = ("tail", "-f", "/dev/null")
    """Its main process."""
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

    def confined_by(self, framework: Framework) -> bool:
        """False where its own options leave it unconfined: then it is its own control.

        Docker Engine, as seen with 26.1: --privileged takes neither label nor profile, even where one is named, and
        --pid=host takes a label only where one is named (moby, daemon/create.go, generateSecurityOpt).
        """
        label = [o for o in self.security_opt if o.startswith("label=")]
        if self.privileged or framework is Framework.APPARMOR:
            return not self.privileged
        return (self.pid is None or bool(label)) and f"label=type:{UNCONFINED_TYPE}" not in label
