"""SELinux in a guest: policies compiled on the host are loaded, the mode is switched and read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lsmlab import facts
from lsmlab.channel.base import Channel
from lsmlab.errors import FrameworkError, PolicyError
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.image import policy as native
from lsmlab.image.build import Image
from lsmlab.scenario import read_file
from lsmlab.terms import Arm

ENFORCE = "/sys/fs/selinux/enforce"
THERE = "/run/lsmlab-modules"
COMPILE_SECONDS = 300
FILE_CONTEXTS = "/etc/selinux/default/contexts/files/file_contexts"


class Selinux:
    """See `FrameworkDriver`."""

    def load(self, channel: Channel, image: Image | None, policy: PolicyUnderTest) -> None:
        """Compile the modules, natively where the image has its tree here, and load the result; set the booleans."""
        if policy.selinux_modules and image is None:
            raise PolicyError("SELinux modules are compiled with an image's tools, and this machine has no image")
        if policy.selinux_modules and image is not None and image.policy_tree is None:
            self._compile_there(channel, policy.selinux_modules)
        elif policy.selinux_modules and image is not None:
            compiled = native.compile_modules(image.need_policy_tree(), image.digest, policy.selinux_modules)
            found = channel.run(["sh", "-c", "ls -v /etc/selinux/default/policy/policy.* | tail -n 1"]).check()
            channel.write_file(found.out.strip(), compiled.policy)
            if compiled.file_contexts:  # the compiled one last: libselinux takes the younger
                channel.write_file(FILE_CONTEXTS, compiled.file_contexts)
                channel.write_file(f"{FILE_CONTEXTS}.bin", compiled.file_contexts_bin)
            loaded = channel.run(["load_policy"])
            if not loaded.ok:
                raise PolicyError(f"load_policy: {loaded.ended()}: {loaded.err.strip()}")
        for name, value in policy.selinux_booleans:
            done = channel.run(["setsebool", name, "on" if value else "off"])
            if not done.ok:
                raise PolicyError(f"setsebool {name}: {done.err.strip() or done.ended()}")

    @staticmethod
    def _compile_there(channel: Channel, modules: Sequence[Path]) -> None:
        """Compile and load in the guest itself: half a minute under emulation."""
        for module in modules:
            channel.write_file(f"{THERE}/{module.name}", read_file(module))
        names = [f"{THERE}/{module.name}" for module in modules]
        done = channel.run(["semodule", "--install", *names], timeout=COMPILE_SECONDS)
        if not done.ok:
            words = done.err.strip().replace(f"{THERE}/", "")
            raise PolicyError(f"{', '.join(str(m) for m in modules)}: does not compile:\n{words}")

    def enter(self, channel: Channel, arm: Arm, image: Image | None, policy: PolicyUnderTest) -> None:
        """Write /sys/fs/selinux/enforce, as setenforce does, and read it back."""
        enforcing = not arm.logging
        wanted = "1" if enforcing else "0"
        channel.write_file(ENFORCE, wanted.encode())
        found = facts.read(facts.ModeFacts, channel.ask("mode")).selinux_enforcing
        if found is not enforcing:
            raise FrameworkError(f"{ENFORCE}: {wanted} was written, and the mode is {found}")

    def unconfine(self, channel: Channel, program: str) -> None:
        """Take away the label by which systemd's exec enters the domain: it is then unconfined, in initrc_t."""
        channel.run(["chcon", "--type", "bin_t", "--", program]).check()

    def settle(self, channel: Channel, arm: Arm, unit: str, *, started: bool) -> None:
        """Flush the access vector cache where something may have been logged once, and would not be again.

        What is refused is logged each time. What is only logged is then cached as granted (avc.c, avc_denied): all in
        permissive mode, and in either mode what a permissive domain does. Committing booleans, even unchanged ones,
        flushes (ss/services.c, security_set_bools); it counts as a new policy, so dbus-daemon reads its files anew.
        The agent answers once the service has come to rest: what it does at its start is cached by then.
        """
        permissive = channel.ask("permissive", unit=unit) is not False
        if permissive or (started and arm.logging):
            channel.write_file("/sys/fs/selinux/commit_pending_bools", b"1")
