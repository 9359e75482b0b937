"""What a guest is made of, and what it starts from: QEMU's options for it.

Source of the options: https://www.qemu.org/docs/master/system/invocation.html
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
CPU = {
    # cmpxchg16b under QEMU 7.2's TCG corrupts SLUB's lists with kernels from 6.12 on: the guest panics
    "tcg": "max,cx16=off",
    "kvm": "host",
}
SSH_PORT = 22


class Network(enum.StrEnum):
    """What a guest's network card reaches. A guest whose agent is asked over a port has none."""

    NONE = "none"
    OURS = "ours"
    """Nothing: only this machine reaches the guest, its sshd, at a port of 127.0.0.1."""
    OPEN = "open"
    """What this machine reaches: while packages are installed."""

    def arguments(self) -> list[str]:
        """QEMU's options for it."""
        if self is Network.NONE:
            return []
        restrict = "on" if self is Network.OURS else "off"
        return [  # port 0: one that is free
            "-netdev", f"user,id=net,restrict={restrict},hostfwd=tcp:127.0.0.1:0-:{SSH_PORT}",
            "-device", "virtio-net-pci,netdev=net,romfile=",
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a guest is made of. A saved state fits this very hardware only. `memory_mib` in MiB."""

    accelerator: str
    memory_mib: int
    qemu_version: str
    network: Network = Network.NONE

    def arguments(self) -> list[str]:
        """QEMU's options for it; no default devices, and no network where none is asked for."""
        return [
            "-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
            "-machine", "q35,usb=off,vmport=off", "-accel", self.accelerator, "-cpu", CPU[self.accelerator],
            "-smp", "1", "-m", f"{self.memory_mib}M", "-sandbox", SANDBOX,
            "-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0",
            *self.network.arguments(),
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Boot:
    """A cold start: kernel, initial RAM disk, command line."""

    kernel: Path
    initrd: Path
    command_line: str


@dataclass(frozen=True, slots=True)
class OwnLoader:
    """A cold start by the disk's own boot loader, with a second disk that tells cloud-init who may log in."""

    seed: Path
