"""A lab's disk: built or downloaded, prepared, and cached by the digest of all that went in."""

from __future__ import annotations

import contextlib
import datetime
import inspect
import json
import secrets
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsmlab import cache, paths
from lsmlab.definition import digest_of, files_below
from lsmlab.errors import ImageError
from lsmlab.image import cloud, debian, policy
from lsmlab.lab import Lab
from lsmlab.machine.hardware import Network
from lsmlab.progress import Progress

if TYPE_CHECKING:
    from lsmlab.channel.ssh import Access

FORMAT = "2"
"""Changes with the meaning of what is built: older images are then built anew."""
FILES = ("disk.qcow2", "vmlinuz", "initrd", "packages")
"""What every image has."""
REPORTED_PACKAGES = (
    "nginx", "selinux-policy-default", "policycoreutils", "libselinux1", "apparmor", "libapparmor1", "auditd",
    "systemd",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """A finished disk in the cache."""

    lab: str
    folder: Path
    digest: str
    """SHA-256 of the disk: what ran, whatever the recipe said."""
    kernel_release: str
    packages: dict[str, str]
    """The versions that an outcome reports."""
    policies: dict[str, str]
    """By framework, a policy that is not the distribution's: its folder's name, and the digest of what is in it."""
    built: str
    root_arguments: str
    """The part of the kernel's command line by which it finds its root file system."""
    files: frozenset[str]

    @property
    def disk(self) -> Path:
        """The root disk, qcow2, never written to."""
        return self.folder / "disk.qcow2"

    @property
    def kernel(self) -> Path:
        """The kernel."""
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """Its initial RAM disk."""
        return self.folder / "initrd"

    @property
    def policy_tree(self) -> Path | None:
        """The root tree as a tar file, to compile policies in on this machine; None: they are compiled in guests."""
        return self.folder / "policy-tree.tar" if "policy-tree.tar" in self.files else None

    def need_policy_tree(self) -> Path:
        """The same. Raises ImageError where there is none."""
        if self.policy_tree is None:
            raise ImageError(f"the image of {self.lab} is the distribution's own: its policy tools run in guests alone")
        return self.policy_tree

    @property
    def access(self) -> Access | None:
        """How its guests are logged in to; None: they have no network, and the agent starts by itself."""
        if cloud.KEY not in self.files:
            return None
        return cloud.access_by(self.folder)

    @property
    def network(self) -> Network:
        """What its guests' network card reaches."""
        return Network.OURS if cloud.KEY in self.files else Network.NONE


def recipe_digest(lab: Lab) -> str:
    """The digest of everything that decides what is built, short of the packages' versions on the day."""
    with resources.as_file(resources.files("lsmlab") / "image") as here:
        script = "prepare.sh" if lab.image else "prepare-cloud.sh"
        parts: list[bytes | str] = [FORMAT, _recipe(lab), (here / script).read_bytes()]
        parts += files_below(here / "overlay")
    if lab.image is not None:
        for folder in lab.image.elsewhere.values():
            parts += files_below(folder)
        if lab.image.selinux_policy is not None:  # what of its dump is compiled again
            parts.append(inspect.getsource(policy.decisions))
    return digest_of(*parts, *debian.EXCLUDED)


def _recipe(lab: Lab) -> str:
    """What the lab's file says of its disk; of files and folders that it names, only whether there are any: what is in
    them counts, wherever they lie."""
    keyring = lab.cloud_image.checksums.keyring if lab.cloud_image and lab.cloud_image.checksums else None
    said = lab.disk.model_dump_json(
        exclude={"checksums": {"keyring"}, "selinux_policy": True, "apparmor_profiles": True}
    )
    if lab.image is not None and lab.image.elsewhere:
        said += json.dumps(sorted(lab.image.elsewhere))
    if lab.cloud_image is not None:  # its preparation is by frameworks, and enables services
        units = sorted(service.unit for service in lab.services.values())
        said += json.dumps([sorted(lab.frameworks), units])
    return said + (digest_of(keyring.read_bytes()) if keyring and keyring.is_file() else "")


def files_of(lab: Lab) -> tuple[str, ...]:
    """What the lab's image consists of."""
    return debian.FILES if lab.image is not None else cloud.FILES


def folder_of(lab: Lab, build_id: str) -> Path:
    """Where one build of the lab's image lies in the cache."""
    return paths.cache() / "images" / f"{lab.id}-{recipe_digest(lab)[:16]}-{build_id}"


def lock_of(lab: Lab) -> Path:
    """The lock that whoever makes the lab's image holds."""
    return paths.cache() / "locks" / f"image-{recipe_digest(lab)[:16]}"


def find(lab: Lab, *, full_check: bool = False) -> Image | None:
    """The lab's cached image; None where there is none, or a damaged one. `full_check` reads every byte."""
    for folder in cache.builds(folder_of(lab, "*")):
        manifest = cache.read_manifest(folder)
        if manifest is not None and not damage(folder, manifest, full=full_check):
            return _image(lab, folder, manifest)
    return None


def damage(folder: Path, manifest: dict[str, Any], *, full: bool) -> str:
    """What is wrong with a cached image, or an empty text; see `cache.damage`."""
    lacking = [key for key in ("kernel_release", "packages", "built", "root_arguments") if key not in manifest]
    lacking += [name for name in FILES if name not in manifest["files"]]
    return f"its manifest has no {lacking[0]}" if lacking else cache.damage(folder, manifest, full=full)


def _image(lab: Lab, folder: Path, manifest: dict[str, Any]) -> Image:
    return Image(
        lab=lab.id,
        folder=folder,
        digest=manifest["files"]["disk.qcow2"]["sha256"],
        kernel_release=manifest["kernel_release"],
        packages=manifest["packages"],
        policies=manifest.get("policies", {}),
        built=manifest["built"],
        root_arguments=manifest["root_arguments"],
        files=frozenset(manifest["files"]),
    )


def ensure(
    lab: Lab,
    progress: Progress,
    *,
    rebuild: bool = False,
    uses: contextlib.ExitStack | None = None,
    accelerator: str = "auto",
    file: Path | None = None,
) -> Image:
    """The lab's image, verified, made where there is none. Takes minutes then, and the network.

    `accelerator` and `file` are for a cloud image that is prepared: auto, kvm or tcg; and the distribution's file,
    where it is here already. Nobody removes the image before `uses` is closed. Raises HostError, ImageError,
    DownloadError and MachineError. Two runs that need the same image make it once.
    """
    task = f"image {lab.id}"
    progress.step(task, "looking for the image")
    with (
        contextlib.ExitStack() as held,
        cache.lock(lock_of(lab), waiting=lambda: progress.step(task, "another run is building this image; waiting")),
    ):
        image = None if rebuild else _cached(lab, task, progress, held)
        if image is not None and file is not None:
            progress.note(
                f"{file} is not used: the image of {lab.id} is there already. To make it anew from that file: "
                f"`lsmlab images build {lab.id} --rebuild --image {file}`."
            )
        if image is None:
            folder = folder_of(lab, secrets.token_hex(3))
            held.enter_context(cache.use(folder))  # before it is there: nobody removes it in between
            image = _make(lab, folder, task, progress, accelerator, file)
        if uses is not None:
            uses.enter_context(held.pop_all())
    progress.done(task)
    return image


def _cached(lab: Lab, task: str, progress: Progress, uses: contextlib.ExitStack) -> Image | None:
    for folder in cache.builds(folder_of(lab, "*")):
        with contextlib.ExitStack() as held:
            if not held.enter_context(cache.use(folder)):
                continue  # removed since it was found
            progress.step(task, "verifying the image")
            manifest = cache.read_manifest(folder)
            wrong = damage(folder, manifest, full=True) if manifest is not None else "its manifest cannot be read"
            if manifest is not None and not wrong:
                uses.enter_context(held.pop_all())
                return _image(lab, folder, manifest)
        progress.note(f"The cached image of {lab.id} is damaged ({wrong}): it is not used.")
    return None


def _make(lab: Lab, folder: Path, task: str, progress: Progress, accelerator: str, file: Path | None) -> Image:
    with cache.making(f"image-{lab.id}", f"the image of {lab.id} was built") as work:
        if lab.image is not None:
            found = debian.make(lab, lab.image, work, task, progress)
        else:
            found = cloud.make(lab, work, task, progress, accelerator, file)
        for name in ("vmlinuz", "initrd"):
            (work / name).chmod(0o644)  # QEMU opens them itself, as a user of its own where root starts it
        cache.publish(work, folder, files_of(lab), _about(lab, work) | found)
    manifest = cache.read_manifest(folder)
    if manifest is None:
        raise ImageError(f"{folder}: the image vanished while it was put in place")
    progress.note(f"Built the image of {lab.id} ({cache.size(folder) >> 20} MiB in {folder}).")
    return _image(lab, folder, manifest)


def _about(lab: Lab, work: Path) -> dict[str, Any]:
    packages = dict(line.split("\t") for line in (work / "packages").read_text("utf-8").splitlines())
    wanted = {*REPORTED_PACKAGES, *lab.disk.packages}
    if lab.image is not None and lab.image.selinux_policy is not None:
        wanted.discard("selinux-policy-default")  # it is there for its tools' settings alone
    return {
        "lab": lab.id,
        "recipe": recipe_digest(lab),
        "built": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "asked": lab.disk.packages,
        "packages": {name: version for name, version in packages.items() if name in wanted},
    }
