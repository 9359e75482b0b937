"""What every framework gives: put a scenario's policy in, enter an arm's mode, read it back."""

from __future__ import annotations

from collections.abc import Mapping
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
    written: Mapping[str, bytes] | None = None
    """All files of the guest that are written until the service is started, the profiles among them, by path, in their
    order and as they were read once; None: others may be changed as well."""


class FrameworkDriver(Protocol):
    """One framework in a guest. Every method raises FrameworkError, PolicyError or ChannelError."""

    def load(self, channel: Channel, image: Image | None, policy: PolicyUnderTest) -> None:
        """Bring `policy` into the guest, and what can be into its kernel: all but profiles, which `enter` loads."""
        ...

    def enter(self, channel: Channel, arm: Arm, image: Image | None, policy: PolicyUnderTest) -> None:
        """Enter the arm's mode, once the set-up is done, and read it back."""
        ...

    def unconfine(self, channel: Channel, program: str) -> None:
        """See that the service whose unit runs `program` is started outside the policy under test."""
        ...

    def settle(self, channel: Channel, arm: Arm, unit: str, *, started: bool) -> None:
        """Once `unit` has come to rest, before the window of the attempts opens: forget what was logged, so that all is
        logged again. `started`: in this very arm, `unit` was.
        """
        ...
