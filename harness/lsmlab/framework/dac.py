"""The control: a kernel in which no framework is active. There is nothing to load and no mode to enter."""

from __future__ import annotations

from lsmlab.channel.base import Channel
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.image.build import Image
from lsmlab.terms import Arm


class NoFramework:
    """See `FrameworkDriver`."""

    def load(self, channel: Channel, image: Image | None, policy: PolicyUnderTest) -> None:
        """Nothing to load."""

    def enter(self, channel: Channel, arm: Arm, image: Image | None, policy: PolicyUnderTest) -> None:
        """No mode to enter: that no framework is active is read at every attempt."""

    def unconfine(self, channel: Channel, program: str) -> None:
        """Nothing confines it."""

    def settle(self, channel: Channel, arm: Arm, unit: str, *, started: bool) -> None:
        """Nothing is cached."""
