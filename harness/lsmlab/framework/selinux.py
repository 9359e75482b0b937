"""SELinux in a guest: policies compiled on the host are loaded, the mode is switched and read back."""

from __future__ import annotations

from lsmlab.channel.base import Channel
from lsmlab.errors import FrameworkError, PolicyError
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.image import policy as native
from lsmlab.image.build import Image
from lsmlab.terms import Arm

ENFORCE = "/sys/fs/selinux/enforce"


class Selinux:
    """See `FrameworkDriver`."""

    def load(self, channel: Channel, image: Image, policy: PolicyUnderTest) -> None:
        """Compile the modules natively and load the result; set the booleans."""
        if policy.selinux_modules:
            compiled = native.compile_modules(image.policy_tree, image.digest, policy.selinux_modules)
            found = channel.run(["sh", "-c", "ls -v /etc/selinux/default/policy/policy.* | tail -n 1"]).check()
            channel.write_file(found.out.strip(), compiled)
            loaded = channel.run(["load_policy"])
            if not loaded.ok:
                raise PolicyError(f"load_policy: {loaded.ended()}: {loaded.err.strip()}")
        for name, value in policy.selinux_booleans:
            done = channel.run(["setsebool", name, "on" if value else "off"])
            if not done.ok:
                raise PolicyError(f"setsebool {name}: {done.err.strip() or done.ended()}")

    def enter(self, channel: Channel, arm: Arm, policy: PolicyUnderTest) -> None:
        """Switch with setenforce and read /sys/fs/selinux/enforce back."""
        wanted = "1" if arm.enforcing else "0"
        switched = channel.run(["setenforce", wanted])
        found = channel.run(["cat", ENFORCE]).out.strip()
        if found != wanted:
            raise FrameworkError(f"setenforce {wanted}: {ENFORCE} holds {found!r} ({switched.err.strip()})")

    def settle(self, channel: Channel, arm: Arm) -> None:
        """Flush the access vector cache: in permissive mode a hit that was once logged is not logged again.

        Committing booleans, even unchanged ones, resets it (security/selinux/ss/services.c, security_set_bools).
        """
        channel.run(["sh", "-c", "echo 1 > /sys/fs/selinux/commit_pending_bools"]).check()
