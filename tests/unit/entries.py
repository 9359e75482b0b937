"""Made-up entries of the cache: images, saved guests and policies as their manifests tell, and what keeps notes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lsmlab import cache, host, paths
from lsmlab.image import build, debian
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.machine import states
from lsmlab.machine.hardware import Hardware
from lsmlab.machine.qemu import QEMU
from lsmlab.progress import Silent
from lsmlab.terms import Kernel

ROOT = "root=/dev/vda rw"
KIB = 1024


class Notes(Silent):
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[str] = []

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self.notes.append(text)

    def step(self, task: str, text: str) -> None:
        """See `Progress.step`."""
        self.steps.append(text)


def put(target: Path, files: dict[str, bytes], about: dict[str, Any]) -> Path:
    """Publish an entry with these files."""
    with cache.scratch("made-up") as work:
        for name, content in files.items():
            (work / name).write_bytes(content)
        cache.publish(work, target, tuple(files), about)
    return target


def put_image(lab: Lab, build_id: str = "a", *, kib: int = 4, lab_id: str = "") -> Image:
    """An image of `lab`, whose disk has `kib` KiB; of another lab's where `lab_id` says so."""
    folder = build.folder_of(lab, build_id)
    folder = folder.with_name(folder.name.replace(lab.id, lab_id or lab.id))
    disk = folder.name.encode().ljust(kib * KIB, b"\1")
    about = {
        "lab": lab_id or lab.id,
        "kernel_release": "6.12-made-up",
        "packages": {"nginx": "1"},
        "built": "2026-11-24",
        "root_arguments": ROOT,
    }
    put(folder, {**dict.fromkeys(debian.FILES, b"x"), "disk.qcow2": disk}, about)
    digest = cache.file_digest(folder / "disk.qcow2")
    files = frozenset(debian.FILES)
    return Image(lab_id or lab.id, folder, digest, "6.12-made-up", {"nginx": "1"}, {}, "2026-11-24", ROOT, files)


def hardware(lab: Lab, accelerator: str = "tcg") -> Hardware:
    """What this machine would make a guest of."""
    return Hardware(accelerator, lab.memory_mib, host.version(QEMU, "--version"))


def put_state(
    lab: Lab, image: Image, kernel: Kernel, build_id: str = "a", *, kib: int = 4, like: Hardware | None = None
) -> Path:
    """A saved guest whose RAM has `kib` KiB."""
    made_of = like or hardware(lab)
    folder = states.folder_of(lab, image, kernel, made_of, build_id)
    files = {"ram": b"\2" * kib * KIB, "disk.qcow2": b"x"}
    return put(folder, files, states.fits(lab, image, kernel, made_of))


def put_policy(name: str, image: Image | None) -> Path:
    """A compiled policy for `image`; None: of a time when that was not written down."""
    about = {"modules": ["own.cil"], **({"image": image.digest} if image else {})}
    return put(paths.cache() / "policies" / name, {"policy": b"\3" * 4 * KIB}, about)


def age(folder: Path, *, used: int, made: int | None = None) -> None:
    """Have an entry be used, and made, so many seconds ago."""
    now = folder.stat().st_mtime
    os.utime(folder / cache.MANIFEST, (now - used, now - used))
    if made is not None:
        os.utime(folder, (now - made, now - made))
