"""AppArmor in a guest: profiles are loaded, in complain mode or as they are written, and read back."""

from __future__ import annotations

from lsmlab.channel.base import Channel
from lsmlab.errors import FrameworkError, PolicyError
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.image.build import Image
from lsmlab.scenario import read_file
from lsmlab.terms import Arm

FOLDER = "/etc/apparmor.d"
PROFILES = "/sys/kernel/security/apparmor/profiles"


class Apparmor:
    """See `FrameworkDriver`."""

    def load(self, channel: Channel, image: Image, policy: PolicyUnderTest) -> None:
        """Write the profiles into /etc/apparmor.d and have quiet denials audited. `enter` loads them."""
        for profile in policy.apparmor_profiles:
            channel.write_file(f"{FOLDER}/{profile.name}", read_file(profile))
        # An explicit `deny` refuses silently; noquiet has it logged (Documentation/admin-guide/LSM/apparmor.rst)
        channel.run(["sh", "-c", "printf noquiet > /sys/module/apparmor/parameters/audit"]).check()

    def enter(self, channel: Channel, arm: Arm, policy: PolicyUnderTest) -> None:
        """Load each profile, under complain where that is the arm, and see that the kernel has it."""
        for profile in policy.apparmor_profiles:
            path = f"{FOLDER}/{profile.name}"
            mode = ["--Complain"] if arm is Arm.APPARMOR_COMPLAIN else []
            done = channel.run(["apparmor_parser", "--replace", *mode, path])
            if not done.ok:
                words = done.err.strip().replace(f"{FOLDER}/", f"{profile.parent}/")
                raise PolicyError(f"{profile}: apparmor_parser: {words or done.ended()}")
            names = channel.run(["apparmor_parser", "--names", path]).check().out.split("\n")
            loaded = channel.run(["cat", PROFILES]).check().out
            for name in filter(None, (n.strip() for n in names)):
                state = next((line for line in loaded.splitlines() if line.startswith(f"{name} (")), "")
                if not state or (mode and not state.endswith("(complain)")):
                    raise FrameworkError(f"profile {name}: the kernel says {state or 'it is not loaded'!r}")

    def settle(self, channel: Channel, arm: Arm) -> None:
        """Nothing is cached but capability denials, for a second (security/apparmor/capability.c)."""
