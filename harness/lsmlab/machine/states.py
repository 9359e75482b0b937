"""Booted, settled guests kept as RAM and disk state: the next guest starts from one in half a second.

A state fits one image, one command line and one hardware; its key is the digest of all of them. A damaged one is said
and made anew.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from lsmlab import cache, paths
from lsmlab.channel.base import Channel
from lsmlab.definition import digest_of
from lsmlab.errors import HostError, LsmlabError, MachineError
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.machine.qemu import Boot, Hardware, QemuMachine
from lsmlab.progress import Progress
from lsmlab.terms import Framework, Kernel

FORMAT = "2"
FILES = ("ram", "disk.qcow2")
COMMON_ARGUMENTS = (
    "root=/dev/vda rw console=ttyS0 quiet audit=1 audit_backlog_limit=16384 panic=0 net.ifnames=0 "
    "systemd.show_status=error"
)
"""panic=0: a guest that panics stands still, so that its console can be read."""
BOOT_SECONDS = {"tcg": 300.0, "kvm": 60.0}


@dataclass(frozen=True, slots=True)
class SavedState:
    """A guest that can be started at once."""

    folder: Path
    hardware: Hardware
    command_line: str

    def start(self, name: str, scratch: Path) -> QemuMachine:
        """A new guest from this state, on a disk of its own. Raises MachineError."""
        return QemuMachine.start(
            name, self.hardware, self.folder / "disk.qcow2", incoming=self.folder / "ram", scratch=scratch, timeout=60
        )


def command_line(lab: Lab, kernel: Kernel) -> str:
    """The kernel's command line for one boot of `lab`."""
    return f"{COMMON_ARGUMENTS} {lab.kernel_arguments[kernel]}"


def _folder(lab: Lab, image: Image, kernel: Kernel, hardware: Hardware) -> Path:
    key = digest_of(
        FORMAT, image.digest, image.folder.name, command_line(lab, kernel), *hardware.arguments(), hardware.qemu_version
    )
    return paths.cache() / "states" / f"{lab.id}-{kernel}-{key[:16]}"


def ensure(lab: Lab, image: Image, kernel: Kernel, hardware: Hardware, progress: Progress, task: str) -> SavedState:
    """The saved state for one boot of `lab`, made by a cold boot where there is none.

    Raises MachineError where the guest does not come up, and FrameworkError where it came up as something else.
    """
    folder = _folder(lab, image, kernel, hardware)
    state = SavedState(folder, hardware, command_line(lab, kernel))
    with cache.lock(paths.make(paths.cache() / "locks") / f"state-{folder.name}"):
        manifest = cache.read_manifest(folder)
        if manifest is not None:
            wrong = cache.damage(folder, manifest, full=True)
            if not wrong:
                return state
            progress.note(f"The saved state of {lab.id} ({kernel}) is damaged ({wrong}): booting it anew.")
        _boot(lab, image, kernel, state, progress, task)
    return state


def _boot(lab: Lab, image: Image, kernel: Kernel, state: SavedState, progress: Progress, task: str) -> None:
    boot = Boot(image.kernel, image.initrd, state.command_line)
    with cache.scratch(f"state-{lab.id}-{kernel}") as work:
        progress.step(task, f"booting {lab.title} (kernel: {kernel})")
        machine = QemuMachine.start(
            f"{lab.id}-{kernel}",
            state.hardware,
            image.disk,
            boot=boot,
            scratch=work,
            keep_overlay=work / "disk.qcow2",
            timeout=BOOT_SECONDS[state.hardware.accelerator],
        )
        try:
            progress.step(task, f"letting {lab.title} settle (kernel: {kernel})")
            settle(machine.channel, kernel)
            progress.step(task, f"saving the booted state (kernel: {kernel})")
            machine.save(work / "ram")
        except LsmlabError as error:
            raise MachineError(f"{lab.id} ({kernel}): {error.message}", hint=error.hint) from error
        finally:
            machine.stop()
        about = {
            "lab": lab.id, "kernel": kernel.value, "command_line": state.command_line, "image": image.digest,
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        try:
            cache.publish(work, state.folder, FILES, about)
        except OSError as error:
            raise HostError(f"{state.folder}: {error.strerror or error}") from error


def settle(channel: Channel, kernel: Kernel) -> None:
    """Wait until the guest has finished booting, and see that it is what was asked for. Raises MachineError."""
    state = channel.run(["systemctl", "is-system-running", "--wait"], timeout=240).out.strip()
    if state != "running":
        failed = channel.run(["systemctl", "--failed", "--plain", "--no-legend"]).out.strip()
        raise MachineError(f"the guest booted to state {state!r}; failed units: {failed or 'none'}")
    lsm = channel.run(["cat", "/sys/kernel/security/lsm"]).check().out.strip().split(",")
    active = [f.value for f in Framework if f in lsm]
    wanted = [] if kernel is Kernel.NONE else [kernel.value]
    if active != wanted:
        raise MachineError(f"the guest's kernel has the frameworks {active}, expected {wanted}")
    status = channel.run(["auditctl", "-s"])
    fields = dict(line.split(" ", 1) for line in status.out.splitlines() if " " in line)
    if fields.get("enabled") != "1" or fields.get("pid", "0") == "0":
        raise MachineError(f"auditd does not run in the guest: {status.out.strip() or status.err.strip()}")
    channel.run(["sync"]).check()
