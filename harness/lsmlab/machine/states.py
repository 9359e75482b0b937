"""Booted, settled guests kept as RAM and disk state: the next guest starts from one in half a second.

A state fits one image, one command line and one hardware; its key is the digest of all of them. A damaged one, or one
that QEMU refuses, is said and made anew.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmlab import cache, facts, paths
from lsmlab.channel.agent import agent_digest
from lsmlab.channel.base import Channel
from lsmlab.container import install
from lsmlab.definition import digest_of
from lsmlab.errors import CommandTimeoutError, HostError, LsmlabError, MachineError
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.machine.hardware import CPU, Boot, Hardware
from lsmlab.machine.qemu import QemuMachine
from lsmlab.progress import Progress
from lsmlab.terms import Framework, Kernel

FORMAT = "5"
FILES = ("ram", "disk.qcow2")
COMMON_ARGUMENTS = "console=ttyS0 quiet audit=1 audit_backlog_limit=16384 panic=0 systemd.show_status=error"
"""panic=0: a guest that panics stands still, so that its console can be read."""
EMULATED_ARGUMENTS = {"tcg": "tsc=unstable clocksource=hpet norandmaps ", "kvm": ""}
"""What an emulated guest is booted with besides, for two reasons.

The TSC is not set back by a restore: time would jump ahead by all that passed since the snapshot, every timer would end
at once, and the kernel would complain. The HPET is set back. And QEMU 7 translates a library once for each address that
it lies at: where programs lie at random addresses, twice as much to start a service.
"""
BOOT_SECONDS = {"tcg": 300.0, "kvm": 60.0}
RULE_KEYS = ("lsmlab-subject", "lsmlab-denied", "lsmlab-fork")
"""Of the audit rules that evidence rests on."""
MIN_FREE, MIN_FREE_KIB = "/proc/sys/vm/min_free_kbytes", 2048
"""What the kernel keeps free, and how much that is to be while a guest's free memory is cleared: with more, it would
give up files that it has read, or swap memory out."""
CLEAR_SECONDS = 240
CLEAR = """
import mmap
free = next(int(line.split()[1]) << 10 for line in open("/proc/meminfo") if line.startswith("MemFree:"))
size = min(free - max(16 << 20, free >> 5), 2 << 30)
open("/proc/self/oom_score_adj", "w").write("1000")
MAP_POPULATE = 0x8000
if size > 0:
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_POPULATE)
"""
"""Has the kernel clear nearly all that is free, at most 2 GiB. Where that is too much, it is this program that ends."""
UDEV = "systemd-udevd.service"
UDEV_SECONDS = 30
"""How long udev's workers are waited for. Nothing depends on them but how long the set-ups after a restore take."""
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class SavedState:
    """A guest that can be started at once."""

    folder: Path
    image: Image
    hardware: Hardware
    command_line: str

    def start(self, name: str, scratch: Path) -> QemuMachine:
        """A new guest from this state, on a disk of its own. Raises MachineError."""
        return QemuMachine.start(
            name,
            self.hardware,
            self.folder / "disk.qcow2",
            below=self.image.disk,
            incoming=self.folder / "ram",
            scratch=scratch,
            timeout=60,
            access=self.image.access,
        )


def command_line(lab: Lab, image: Image, kernel: Kernel, accelerator: str) -> str:
    """The kernel's command line for one boot of `lab`."""
    return f"{image.root_arguments} {COMMON_ARGUMENTS} {EMULATED_ARGUMENTS[accelerator]}{lab.kernel_arguments[kernel]}"


def fits(lab: Lab, image: Image, kernel: Kernel, hardware: Hardware) -> dict[str, Any]:
    """All that a saved state fits, as its manifest says it."""
    about: dict[str, Any] = {
        "format": FORMAT, "agent": agent_digest(), "lab": lab.id, "kernel": kernel.value,
        "command_line": command_line(lab, image, kernel, hardware.accelerator),
        "image": image.digest, "image_folder": image.folder.name,
        "qemu": hardware.qemu_version, "accelerator": hardware.accelerator, "cpu": CPU[hardware.accelerator],
        "memory_mib": hardware.memory_mib,
    }  # fmt: skip
    if lab.engine is not None:
        about["engine"] = install.digest()
    return about | (_host_cpu() if hardware.accelerator == "kvm" else {})


def _host_cpu() -> dict[str, str]:
    """This machine's processor, which guests see under KVM."""
    first = CPU_INFO.read_text("utf-8").partition("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return {"host_cpu": fields.get("model name", ""), "host_cpu_flags": digest_of(fields.get("flags", ""))}


def folder_of(lab: Lab, image: Image, kernel: Kernel, hardware: Hardware, build_id: str) -> Path:
    """Where one build of a saved state lies in the cache. Another may be in use: each has a folder of its own."""
    about = json.dumps(fits(lab, image, kernel, hardware), sort_keys=True)
    key = digest_of(about, *hardware.arguments())
    return paths.cache() / "states" / f"{lab.id}-{kernel}-{key[:16]}-{build_id}"


def damage(folder: Path, about: Mapping[str, Any], *, full: bool) -> str:
    """What is wrong with a state that is to fit `about`, or an empty text; see `cache.damage`."""
    manifest = cache.read_manifest(folder)
    if manifest is None:
        return "its manifest cannot be read"
    other = [key for key, value in about.items() if manifest.get(key) != value]
    other += [name for name in FILES if name not in manifest["files"]]
    return f"its manifest has another {other[0]}, or none" if other else cache.damage(folder, manifest, full=full)


def ensure(
    lab: Lab,
    image: Image,
    kernel: Kernel,
    hardware: Hardware,
    progress: Progress,
    task: str,
    *,
    uses: contextlib.ExitStack,
    check: Callable[[], None] = lambda: None,
) -> SavedState:
    """The saved state for one boot of `lab`, made by a cold boot where there is none.

    It is not removed before `uses` is closed. `check` raises where it is wanted no more: a run that another boots for
    waits. Raises MachineError where the guest does not come up, FrameworkError where it came up as something else, and
    HostError where the disk is full.
    """
    key = folder_of(lab, image, kernel, hardware, "")
    with (
        contextlib.ExitStack() as held,
        cache.lock(
            paths.cache() / "locks" / f"state-{key.name}",
            waiting=lambda: progress.step(task, f"another run is booting this; waiting (kernel: {kernel})"),
            check=check,
        ),
    ):
        state = _saved(lab, image, kernel, hardware, progress, held)
        if state is None:
            _say_what_is_stale(fits(lab, image, kernel, hardware), progress)
            folder = key.with_name(key.name + secrets.token_hex(3))
            held.enter_context(cache.use(folder))  # before it is there: nobody removes it in between
            state = SavedState(folder, image, hardware, command_line(lab, image, kernel, hardware.accelerator))
            _boot(lab, image, kernel, state, progress, task)
        uses.enter_context(held.pop_all())
    return state


def _saved(
    lab: Lab, image: Image, kernel: Kernel, hardware: Hardware, progress: Progress, uses: contextlib.ExitStack
) -> SavedState | None:
    about = fits(lab, image, kernel, hardware)
    for folder in cache.builds(folder_of(lab, image, kernel, hardware, "*")):
        with contextlib.ExitStack() as held:
            if not held.enter_context(cache.use(folder)):
                continue  # removed since it was found
            wrong = damage(folder, about, full=True)
            if not wrong:
                uses.enter_context(held.pop_all())
                return SavedState(folder, image, hardware, command_line(lab, image, kernel, hardware.accelerator))
        progress.note(f"The saved state of {lab.id} ({kernel}) is damaged ({wrong}): booting it anew.")
        discard(folder, progress)
    return None


def _say_what_is_stale(about: Mapping[str, Any], progress: Progress) -> None:
    """Where there is a state for this boot that fits no more, say what has changed."""
    same = ("lab", "kernel", "accelerator")
    for folder in cache.builds(paths.cache() / "states" / f"{about['lab']}-{about['kernel']}-*"):
        manifest = cache.read_manifest(folder)
        if manifest is not None and all(manifest.get(key) == about[key] for key in same):
            other = [key.replace("_", " ") for key in about if manifest.get(key) != about[key]]
            changed = ", ".join(other or ["set of QEMU's options"])
            progress.note(f"The saved state of {about['lab']} ({about['kernel']}) is stale (another {changed}).")
            return


def discard(folder: Path, progress: Progress) -> None:
    """Have no guest start from a state again. Where it cannot be removed, that is said."""
    try:
        cache.discard(folder)
    except HostError as error:
        progress.note(str(error))


def _boot(lab: Lab, image: Image, kernel: Kernel, state: SavedState, progress: Progress, task: str) -> None:
    boot = Boot(image.kernel, image.initrd, state.command_line)
    with cache.making(f"state-{lab.id}-{kernel}", f"the booted state of {lab.id} ({kernel}) was made") as work:
        cache.need_mib(lab.memory_mib, "a saved guest")
        progress.step(task, f"booting {lab.title} (kernel: {kernel})")
        machine = QemuMachine.start(
            f"{lab.id}-{kernel}",
            state.hardware,
            image.disk,
            boot=boot,
            scratch=work,
            keep_overlay=work / "disk.qcow2",
            timeout=BOOT_SECONDS[state.hardware.accelerator],
            access=image.access,
        )
        try:
            progress.step(task, f"letting {lab.title} settle (kernel: {kernel})")
            settle(machine.channel, kernel)
            if lab.engine is not None:
                from lsmlab.container import engine  # noqa: PLC0415 - its library takes a moment, and few labs need it

                progress.step(task, f"starting {lab.title}'s container engine (kernel: {kernel})")
                engine.bring_up(machine.channel, lab.engine.units)
            _let_workers_end(machine.channel)
            if not _clear_free_memory(machine.channel):
                progress.note(
                    f"The free memory of {lab.id} ({kernel}) was not cleared: more of it is saved than need be."
                )
            progress.step(task, f"saving the booted state (kernel: {kernel})")
            machine.save(work / "ram")
        except LsmlabError as error:
            raise MachineError(f"{lab.id} ({kernel}): {error.message}", hint=error.hint) from error
        finally:
            machine.stop()
        about = fits(lab, image, kernel, state.hardware)
        about["made"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
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
    rules = channel.run(["auditctl", "-l"]).out
    lacking = [key for key in RULE_KEYS if key not in rules]
    if lacking:
        raise MachineError(
            f"the guest's kernel has not all audit rules of ours: none has the key {lacking[0]}",
            hint="Its evidence would have gaps. See /etc/audit/rules.d there, and what loads it.",
        )
    channel.ask("relabel", paths=[])  # has the agent read SELinux's labels in, now and not in each run
    channel.run(["sync"]).check()


def _let_workers_end(channel: Channel) -> None:
    """Wait until udev's workers have ended, some seconds after its last event: saved with the guest, they would end in
    each run anew, ten processes in the middle of its set-up."""
    deadline = time.monotonic() + UDEV_SECONDS
    while len(facts.pids(channel.ask("pids", unit=UDEV), UDEV)) > 1 and time.monotonic() < deadline:
        time.sleep(0.5)


def _clear_free_memory(channel: Channel) -> bool:
    """Have the guest's kernel clear what a boot has used and given back: less is saved then, and restored.

    False where it could not; nothing else depends on it.
    """
    kept = channel.run(["cat", MIN_FREE]).check().stdout
    channel.write_file(MIN_FREE, str(MIN_FREE_KIB).encode())
    try:
        return channel.run(["python3", "-I", "-c", CLEAR], timeout=CLEAR_SECONDS).ok
    except CommandTimeoutError:
        return False
    finally:
        channel.write_file(MIN_FREE, kept)
