"""Which accelerator a guest can have: KVM where it proves itself with the lab's own kernel, else TCG.

/dev/kvm may be there, open, and even make a virtual machine, and still be useless (nested virtualisation without
hardware). So the lab's kernel is booted under it, without a disk, until it has done all its own work and panics for
want of a root file system; a kernel that does not get there in time proves the opposite.
"""

from __future__ import annotations

import enum
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lsmlab import host, paths
from lsmlab.definition import digest_of
from lsmlab.errors import HostError
from lsmlab.lab import Lab
from lsmlab.machine.hardware import CPU
from lsmlab.machine.qemu import QEMU

KVM = Path("/dev/kvm")
PROOF_SECONDS = 12
"""A kernel under a working KVM is through in two."""
REMEMBERED = 15
PROOF = "Unable to mount root fs"


class KvmState(enum.StrEnum):
    """What is known of KVM on this machine."""

    PROVEN = "proven"
    ABSENT = "absent"
    DENIED = "denied"
    BROKEN = "broken"


ADVICE = {
    KvmState.PROVEN: "",
    KvmState.ABSENT: "Enable virtualisation in the firmware, load the module (modprobe kvm_intel or kvm_amd), or, in a "
    "virtual machine, enable nested virtualisation.",
    KvmState.DENIED: "Add yourself to the group that owns it: usermod --append --groups kvm $USER, then log in anew.",
    KvmState.BROKEN: "Nested virtualisation without hardware support does this; use a host that has it.",
}


WSL_ADVICE = {
    KvmState.ABSENT: "In WSL 2 on Windows 11: put nestedVirtualization=true below [wsl2] in .wslconfig in your Windows "
    "home, run `wsl --shutdown` in Windows, and open WSL anew.",
    KvmState.DENIED: "Add yourself to the group kvm: sudo usermod --append --groups kvm $USER; let systemd give that "
    "group the device: systemd=true below [boot] in /etc/wsl.conf; run `wsl --shutdown` in Windows, and open WSL anew.",
}
"""In place of the same in ADVICE where this Linux runs in Windows: it has no firmware, and nobody logs in."""


def advice(state: KvmState) -> str:
    """What to do about KVM on this machine; empty where it works."""
    return (WSL_ADVICE if host.on_wsl() else {}).get(state, ADVICE[state])


@dataclass(frozen=True, slots=True)
class Acceleration:
    """The choice, and why."""

    name: str
    kvm: KvmState | None
    """None: not looked at."""
    detail: str

    def sentence(self) -> str:
        """One line for people."""
        if self.name == "kvm":
            return "KVM: proven with the lab's own kernel"
        why = f"/dev/kvm is {self.kvm}: {self.detail}" if self.kvm else self.detail
        return f"TCG (software emulation): {why}"


def choose(kernel: Path, wanted: str = "auto") -> Acceleration:
    """The accelerator for guests with this `kernel`; `wanted` is auto, kvm or tcg.

    The answer is remembered until the kernel, QEMU or the boot of this machine changes. Raises HostError where KVM is
    asked for and does not work.
    """
    if wanted == "tcg":
        return Acceleration("tcg", None, "as asked for")
    state, detail = known_or_probe(kernel)
    if state is KvmState.PROVEN:
        return Acceleration("kvm", state, detail)
    if wanted == "kvm":
        raise HostError(f"KVM was asked for, and /dev/kvm is {state}: {detail}", hint=advice(state))
    return Acceleration("tcg", state, detail)


def known_or_probe(kernel: Path) -> tuple[KvmState, str]:
    """What KVM is worth with `kernel`: as remembered, or by a proof that is then remembered."""
    key = _key(kernel)
    found = _recall(key)
    if found is None:
        found = probe(kernel)
        _remember(key, found)
    return found


def device_state() -> tuple[KvmState, str] | None:
    """Absent or denied, as far as the device tells; None where it opens and has to prove itself."""
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        return KvmState.DENIED, f"{KVM} is there and may not be opened"
    except OSError as error:
        return KvmState.ABSENT, f"{KVM}: {error.strerror}"
    return None


def probe(kernel: Path) -> tuple[KvmState, str]:
    """What KVM is worth here: boots `kernel` under it, at most `PROOF_SECONDS`. Leaves nothing behind."""
    early = device_state()
    if early is not None:
        return early
    argv = [
        host.need(QEMU), "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-accel", "kvm",
        "-cpu", CPU["kvm"], "-m", "512M", "-kernel", str(kernel), "-no-reboot", "-serial", "stdio",
        "-append", "console=ttyS0 root=/dev/none panic=-1",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            host.dying_with_us(argv), env=host.environment(), stdin=subprocess.DEVNULL, capture_output=True,
            timeout=PROOF_SECONDS, check=False,
        )  # fmt: skip
        said = done.stdout.decode("ascii", "replace")
        complaint = done.stderr.decode("utf-8", "replace").strip()
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode("ascii", "replace")
        complaint = f"the lab's kernel was not through its boot after {PROOF_SECONDS} s"
    if PROOF in said:
        return KvmState.PROVEN, "the lab's kernel booted under it"
    words = next((line for line in complaint.splitlines() if line.strip()), "the lab's kernel stopped without a word")
    return KvmState.BROKEN, f"it opens, but {words}"


def kvm_needed(lab: str) -> HostError:
    """The error for a lab that software emulation cannot run."""
    return HostError(
        f"lab {lab} needs KVM: its programs are built for processors that software emulation here does not give",
        hint="`lsmlab doctor` says what KVM lacks on this machine.",
    )


def worth_trying() -> bool:
    """Whether KVM may work for a guest whose kernel is not known yet: it opens, is for guests of our kind, and nothing
    broke under it here."""
    try:
        entries = [e for e in json.loads(_file().read_text("utf-8")).values() if e[2:] == [_boot_id()]]
    except (OSError, ValueError, TypeError, AttributeError):
        entries = []
    return host.is_x86() and device_state() is None and all(entry[0] != KvmState.BROKEN for entry in entries)


def to_try(lab: Lab, wanted: str) -> tuple[str, ...]:
    """What to boot an image of `lab` with whose kernel is not known yet, one after the other.

    Raises HostError where nothing is left.
    """
    names = (("kvm", "tcg") if worth_trying() else ("tcg",)) if wanted == "auto" else (wanted,)
    left = tuple(name for name in names if name == "kvm" or not lab.needs_kvm)
    if not left:
        raise kvm_needed(lab.id)
    return left


def _boot_id() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text("ascii").strip() if boot.exists() else ""


def _key(kernel: Path) -> str:
    stat = kernel.stat()
    early = device_state()
    access = early[0].value if early else "opens"
    return digest_of(str(kernel), str(stat.st_mtime_ns), host.version(QEMU, "--version"), _boot_id(), access)[:32]


def _file() -> Path:
    return paths.state() / "acceleration.json"


def _recall(key: str) -> tuple[KvmState, str] | None:
    try:
        entry = json.loads(_file().read_text("utf-8"))[key]
        return KvmState(entry[0]), str(entry[1])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _remember(key: str, found: tuple[KvmState, str]) -> None:
    path = paths.make(paths.state()) / "acceleration.json"
    draft = path.with_suffix(f".{os.getpid()}")
    try:
        known = dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    kept = dict(list(known.items())[-REMEMBERED:])
    draft.write_text(json.dumps({**kept, key: [found[0].value, found[1], _boot_id()]}), "utf-8")
    draft.replace(path)
