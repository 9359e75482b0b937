"""The words of the experiment, as types. Imported by everything, imports nothing of ours."""

from __future__ import annotations

from enum import StrEnum


class Framework(StrEnum):
    """A Mandatory Access Control framework of the kernel."""

    SELINUX = "selinux"
    APPARMOR = "apparmor"

    @property
    def display(self) -> str:
        """The framework's name as people write it."""
        return {"selinux": "SELinux", "apparmor": "AppArmor"}[self.value]


class Kernel(StrEnum):
    """What a guest's kernel was booted with: one disk, three command lines."""

    NONE = "none"
    SELINUX = "selinux"
    APPARMOR = "apparmor"


class Arm(StrEnum):
    """One condition of the experiment: framework and mode."""

    DAC = "dac"
    SELINUX_PERMISSIVE = "selinux-permissive"
    SELINUX_ENFORCING = "selinux-enforcing"
    APPARMOR_COMPLAIN = "apparmor-complain"
    APPARMOR_ENFORCE = "apparmor-enforce"

    @property
    def framework(self) -> Framework | None:
        """The framework of this arm; None in the control."""
        return None if self is Arm.DAC else Framework(self.value.partition("-")[0])

    @property
    def kernel(self) -> Kernel:
        """The boot that serves this arm."""
        return Kernel.NONE if self.framework is None else Kernel(self.framework.value)

    @property
    def enforcing(self) -> bool:
        """True where MAC decides; False where it is absent or only logs."""
        return self in {Arm.SELINUX_ENFORCING, Arm.APPARMOR_ENFORCE}


CONTROL = Arm.DAC
LOGGING_ARM = {Framework.SELINUX: Arm.SELINUX_PERMISSIVE, Framework.APPARMOR: Arm.APPARMOR_COMPLAIN}
ENFORCING_ARM = {Framework.SELINUX: Arm.SELINUX_ENFORCING, Framework.APPARMOR: Arm.APPARMOR_ENFORCE}


def arms_of(framework: Framework) -> tuple[Arm, Arm, Arm]:
    """The three arms that one framework's verdict rests on: control, logging, enforcing."""
    return (CONTROL, LOGGING_ARM[framework], ENFORCING_ARM[framework])


class AttemptKind(StrEnum):
    """What an attempt stands for."""

    ATTACK = "attack"
    BENIGN = "benign"


class Result(StrEnum):
    """What became of one attempt in one arm."""

    ALLOWED = "allowed"
    BLOCKED = "blocked"
    UNCLEAR = "unclear"
    FAILED = "failed"


class SourceState(StrEnum):
    """How an evidence source was read. Unavailable is never empty."""

    FETCHED = "fetched"
    EMPTY = "empty"
    UNAVAILABLE = "unavailable"


class Verdict(StrEnum):
    """What the arms together prove; in order of precedence."""

    NOT_CONTAINED = "NOT_CONTAINED"
    ERROR = "ERROR"
    INCONCLUSIVE = "INCONCLUSIVE"
    DAC_BLOCKED = "DAC_BLOCKED"
    CONTROL_BLOCKED = "CONTROL_BLOCKED"
    UNATTRIBUTED = "UNATTRIBUTED"
    OVERBLOCKED = "OVERBLOCKED"
    CONTAINED = "CONTAINED"
