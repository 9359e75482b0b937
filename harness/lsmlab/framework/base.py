"""What every framework gives: put a scenario's policy in, enter an arm's mode, read it back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lsmlab.channel.base import Channel
from lsmlab.image.build import Image
from lsmlab.terms import Arm


@dataclass(frozen=True, slots=True)
class PolicyUnderTest:
    """What is added to the distribution's policy, before the service starts."""

    selinux_modules: tuple[Path, ...] = ()
    selinux_booleans: tuple[tuple[str, bool], ...] = ()
    apparmor_profiles: tuple[Path, ...] = ()
    apparmor_shipped: tuple[str, ...] = ()
    """Files in the guest: profiles that the distribution ships."""
    apparmor_others: tuple[str, ...] = ()
    """Names of profiles that somebody else loads, such as a container engine."""


class FrameworkDriver(Protocol):
    """One framework in a guest. Every method raises FrameworkError, PolicyError or ChannelError."""

    def load(self, channel: Channel, image: Image | None, policy: PolicyUnderTest) -> None:
        """Put `policy` into the running kernel. Compiling happens on the host, beforehand where that is possible."""
        ...

    def enter(self, channel: Channel, arm: Arm, policy: PolicyUnderTest) -> None:
        """Enter the arm's mode and read it back."""
        ...

    def unconfine(self, channel: Channel, program: str) -> None:
        """See that the service whose unit runs `program` is started outside the policy under test."""
        ...

    def settle(self, channel: Channel, arm: Arm) -> None:
        """Last thing before the snapshot that attempts start from: forget cached decisions, so that all are logged."""
        ...
