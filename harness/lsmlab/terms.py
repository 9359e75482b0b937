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
    SELINUX_UNCONFINED = "selinux-unconfined"
    APPARMOR_UNCONFINED = "apparmor-unconfined"

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
        """True where MAC decides over the subject; False where it is absent, only logs, or does not confine it."""
        return self in {Arm.SELINUX_ENFORCING, Arm.APPARMOR_ENFORCE}

    @property
    def logging(self) -> bool:
        """True where MAC only logs what it would refuse."""
        return self in {Arm.SELINUX_PERMISSIVE, Arm.APPARMOR_COMPLAIN}

    @property
    def unconfined(self) -> bool:
        """True where MAC is enforced, and the subject runs outside its domain or profile: the weaker control."""
        return self in {Arm.SELINUX_UNCONFINED, Arm.APPARMOR_UNCONFINED}


class Control(StrEnum):
    """What an enforcing arm is compared with: no MAC at all, or a subject that MAC does not confine."""

    DAC = "dac"
    UNCONFINED = "unconfined"


CONTROL = Arm.DAC
LOGGING_ARM = {Framework.SELINUX: Arm.SELINUX_PERMISSIVE, Framework.APPARMOR: Arm.APPARMOR_COMPLAIN}
UNCONFINED_ARM = {Framework.SELINUX: Arm.SELINUX_UNCONFINED, Framework.APPARMOR: Arm.APPARMOR_UNCONFINED}
ENFORCING_ARM = {Framework.SELINUX: Arm.SELINUX_ENFORCING, Framework.APPARMOR: Arm.APPARMOR_ENFORCE}


def arms_of(framework: Framework, control: Control = Control.DAC) -> tuple[Arm, ...]:
    """The arms that one framework's verdict rests on: the control first, the enforcing one last.

    Between them the logging one; with the weaker control there is none, since what an attack on MAC changes does not
    show where MAC only logs.
    """
    if control is Control.UNCONFINED:
        return (UNCONFINED_ARM[framework], ENFORCING_ARM[framework])
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
