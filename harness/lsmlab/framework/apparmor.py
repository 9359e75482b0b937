"""AppArmor in a guest: profiles are compiled on the host where that is the same, loaded, in complain mode or as they
are written, and read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lsmlab import facts
from lsmlab.channel.base import Channel
from lsmlab.errors import FrameworkError, PolicyError
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.image import profile as native
from lsmlab.image.build import Image
from lsmlab.image.probe import FOLDER
from lsmlab.scenario import read_file
from lsmlab.terms import Arm

KERNEL = "/sys/kernel/security/apparmor"


def path_of(profile: Path) -> str:
    """Where a profile of the host's lies in a guest."""
    return f"{FOLDER}/{profile.name}"


class Apparmor:
    """See `FrameworkDriver`."""

    def load(self, channel: Channel, image: Image | None, policy: PolicyUnderTest) -> None:
        """Write the profiles into /etc/apparmor.d and have quiet denials audited. `enter` loads them."""
        for profile in policy.apparmor_profiles:
            path = path_of(profile)
            known = (policy.written or {}).get(path)
            channel.write_file(path, read_file(profile) if known is None else known)
        # An explicit `deny` refuses silently; noquiet has it logged (Documentation/admin-guide/LSM/apparmor.rst)
        channel.write_file("/sys/module/apparmor/parameters/audit", b"noquiet")

    def enter(self, channel: Channel, arm: Arm, image: Image | None, policy: PolicyUnderTest) -> None:
        """Load each profile, under complain where that is the arm, and see that the kernel has it.

        In the arm of an unconfined subject none is loaded, and those that were loaded from boot are removed.
        """
        if arm.unconfined:
            self._remove(channel, policy.apparmor_others)
        sources = {path_of(profile): str(profile) for profile in policy.apparmor_profiles}
        for path in (*sources, *policy.apparmor_shipped):
            source = sources.get(path, path)
            if arm.unconfined:
                self._unload(channel, path)
                continue
            compiled = self._compiled(channel, image, policy, path)
            if compiled is None:
                names = self._parse(channel, arm, path, source)
            else:
                names = compiled.names
                channel.write_file(f"{KERNEL}/.replace", compiled.complain if arm.logging else compiled.enforce)
            if not names:
                raise PolicyError(f"{source}: apparmor_parser loads no profile of it")
            loaded = self._loaded(channel)
            for name in names:
                state = loaded.get(name)
                if state is None or (arm.logging and state != "complain"):
                    raise FrameworkError(f"profile {name}: the kernel says {state or 'it is not loaded'!r}")

    @staticmethod
    def _compiled(channel: Channel, image: Image | None, policy: PolicyUnderTest, path: str) -> native.Compiled | None:
        """`path` compiled on this machine, where that is sure to be what the guest's parser would make of it."""
        if image is None or image.policy_tree is None or policy.written is None:
            return None
        features = channel.ask("apparmor_features")
        return native.compile_file(image.policy_tree, image.digest, features, policy.written, path)

    def _parse(self, channel: Channel, arm: Arm, path: str, source: str) -> Sequence[str]:
        """Have the guest's own parser compile and load `path`; the profiles in it."""
        mode = ["--Complain"] if arm.logging else []
        done = channel.run(["apparmor_parser", "--replace", *mode, path])
        if not done.ok:
            words = done.err.strip().replace(path, source)
            raise PolicyError(f"{source}: apparmor_parser: {words or done.ended()}")
        return self._names(channel, path)

    def _remove(self, channel: Channel, names: Sequence[str]) -> None:
        """Remove those that are loaded, of which there are no sources."""
        for name in names:
            if name in self._loaded(channel):
                channel.write_file(f"{KERNEL}/.remove", name.encode())
        left = self._loaded(channel).keys() & set(names)
        if left:
            raise FrameworkError(f"profile {min(left)} was removed, and the kernel still has it")

    def _unload(self, channel: Channel, path: str) -> None:
        names = self._names(channel, path)
        if self._loaded(channel).keys().isdisjoint(names):
            return
        channel.run(["apparmor_parser", "--remove", path]).check()
        left = self._loaded(channel).keys() & set(names)
        if left:
            raise FrameworkError(f"profile {min(left)} was removed, and the kernel still has it")

    @staticmethod
    def _names(channel: Channel, path: str) -> list[str]:
        names = channel.run(["apparmor_parser", "--names", path]).check().out.split("\n")
        return [name.strip() for name in names if name.strip()]

    @staticmethod
    def _loaded(channel: Channel) -> dict[str, str]:
        return facts.read(facts.ModeFacts, channel.ask("mode")).profiles or {}

    def unconfine(self, channel: Channel, program: str) -> None:
        """Nothing more to do: `enter` has loaded no profile."""

    def settle(self, channel: Channel, arm: Arm, unit: str, *, started: bool) -> None:
        """Nothing is cached but capability denials, for a second (security/apparmor/capability.c)."""
