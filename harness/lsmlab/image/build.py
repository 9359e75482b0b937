"""A lab's disk, built from Debian packages, cached by the digest of all that went in."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import secrets
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lsmlab import cache, host, paths
from lsmlab.definition import digest_of
from lsmlab.errors import HostError, ImageError
from lsmlab.image import policy
from lsmlab.lab import Lab
from lsmlab.progress import Progress

FORMAT = "1"
"""Changes with the meaning of what is built: older images are then built anew."""
FILES = ("disk.qcow2", "vmlinuz", "initrd", "policy-tree.tar", "packages")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
NEEDED_MIB = 5120
"""What a build needs at its widest, with room to spare."""
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
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
    built: str

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
    def policy_tree(self) -> Path:
        """The root tree as a tar file, to compile policies in."""
        return self.folder / "policy-tree.tar"


def recipe_digest(lab: Lab) -> str:
    """The digest of everything that decides what is built, short of the packages' versions on the day."""
    with resources.as_file(resources.files("lsmlab") / "image") as here:
        overlay = sorted(p for p in (here / "overlay").rglob("*") if p.is_file() or p.is_symlink())
        parts: list[bytes | str] = [FORMAT, lab.image.model_dump_json(), (here / "prepare.sh").read_bytes()]
        for path in overlay:
            # The owner's bits alone: a checkout has those of whoever cloned it elsewhere
            kind = f"-> {path.readlink()}" if path.is_symlink() else f"{path.stat().st_mode & 0o700:o}"
            parts += [str(path.relative_to(here)), kind, b"" if path.is_symlink() else path.read_bytes()]
    return digest_of(*parts, *EXCLUDED)


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
    lacking = [key for key in ("kernel_release", "packages", "built") if key not in manifest]
    lacking += [name for name in FILES if name not in manifest["files"]]
    return f"its manifest has no {lacking[0]}" if lacking else cache.damage(folder, manifest, full=full)


def _image(lab: Lab, folder: Path, manifest: dict[str, Any]) -> Image:
    return Image(
        lab=lab.id,
        folder=folder,
        digest=manifest["files"]["disk.qcow2"]["sha256"],
        kernel_release=manifest["kernel_release"],
        packages=manifest["packages"],
        built=manifest["built"],
    )


def ensure(lab: Lab, progress: Progress, *, rebuild: bool = False, uses: contextlib.ExitStack | None = None) -> Image:
    """The lab's image, verified, built where there is none. Takes a minute or two then, and the network.

    Nobody removes it before `uses` is closed. Raises HostError and ImageError. Two runs that need the same image build
    it once.
    """
    task = f"image {lab.id}"
    progress.step(task, "looking for the image")
    with (
        contextlib.ExitStack() as held,
        cache.lock(lock_of(lab), waiting=lambda: progress.step(task, "another run is building this image; waiting")),
    ):
        image = None if rebuild else _cached(lab, task, progress, held)
        if image is None:
            folder = folder_of(lab, secrets.token_hex(3))
            held.enter_context(cache.use(folder))  # before it is there: nobody removes it in between
            image = _build(lab, folder, task, progress)
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


def _build(lab: Lab, folder: Path, task: str, progress: Progress) -> Image:
    _see_what_a_build_needs(lab)
    with cache.making(f"image-{lab.id}", f"the image of {lab.id} was built") as work:
        cache.need_mib(NEEDED_MIB, "building an image")
        progress.step(task, f"installing {lab.title}'s packages")
        _bootstrap(lab, work)
        progress.step(task, "preparing the disk: units, policy, labels")
        with resources.as_file(resources.files("lsmlab") / "image") as here:
            for name in ("masked_units", "disabled_units"):
                (work / name).write_text("".join(f"{u}\n" for u in getattr(lab.image, name)), "utf-8")
            argv = ["sh", str(here / "prepare.sh"), str(work), str(here / "overlay"), str(lab.image.disk_mib)]
            _host_step(host.in_namespace(argv), f"preparing the disk of {lab.id}")
        progress.step(task, "proving that the policy without dontaudit decides the same")
        about = _about(lab, work)
        progress.step(task, "packing the disk")
        convert = host.dying_with_us(
            [host.need("qemu-img"), "convert", "-q", "-O", "qcow2", str(work / "disk.raw"), str(work / "disk.qcow2")]
        )
        _host_step(convert, f"packing the disk of {lab.id}")
        for name in ("vmlinuz", "initrd"):
            (work / name).chmod(0o644)  # QEMU opens them itself, as a user of its own where root starts it
        cache.publish(work, folder, FILES, about)
    manifest = cache.read_manifest(folder)
    if manifest is None:
        raise ImageError(f"{folder}: the image vanished while it was put in place")
    progress.note(f"Built the image of {lab.id} ({cache.size(folder) >> 20} MiB in {folder}).")
    return _image(lab, folder, manifest)


def _see_what_a_build_needs(lab: Lab) -> None:
    """Raises HostError that says what to do, here or elsewhere."""
    try:
        host.need_x86("building an image")
        for program in ("mmdebstrap", "mke2fs", "debugfs", "qemu-img", "unshare", "setpriv"):
            host.need(program)
        if os.geteuid() != 0:
            host.need("newuidmap")
        host.need_namespaces()
    except HostError as error:
        elsewhere = (
            f"Or take an image built elsewhere: `lsmlab images export {lab.id}` there, `lsmlab images import` here."
        )
        raise HostError(error.message, hint=f"{error.hint}\n  {elsewhere}".strip()) from error


def _host_step(argv: list[str], what: str) -> None:
    try:
        host.run(argv, what=what, timeout=1800)
    except HostError as error:
        raise ImageError(error.message, hint=error.hint) from error


def _bootstrap(lab: Lab, work: Path) -> None:
    sources = package_sources(lab.image.suite)
    (work / "apt.conf").write_text(proxy_settings(), "utf-8")
    argv = [
        host.need("mmdebstrap"), "--variant=minbase", "--format=tar", "--components=main",
        f"--aptopt={work / 'apt.conf'}", *(f"--dpkgopt=path-exclude={p}" for p in EXCLUDED),
        f"--include={','.join(lab.image.packages)}",
    ]  # fmt: skip
    # In namespaces of ours, also without root: they die with us, and what is left of it lies in the work folder
    argv = host.in_namespace(["env", f"TMPDIR={work}", *argv, "--mode=root"])
    try:
        _host_step([*argv, lab.image.suite, str(work / "tree.tar"), *sources], f"installing the packages of {lab.id}")
    except ImageError as error:
        unknown = re.findall(r"^E: Unable to locate package (\S+)$", error.message, re.MULTILINE)
        if not unknown:
            raise
        raise ImageError(
            f"Debian {lab.image.suite} has no package {', '.join(unknown)}",
            hint=f"Mend `packages` of the lab {lab.id} or of the scenario.",
        ) from error


def package_sources(suite: str) -> list[str]:
    """apt sources for a Debian `suite`, from this machine's own apt configuration or $LSMLAB_MIRROR.

    Raises HostError where this machine names no Debian mirror.
    """
    archive, security = os.environ.get("LSMLAB_MIRROR", ""), os.environ.get("LSMLAB_SECURITY_MIRROR", "")
    if not archive and host.find("apt-get"):
        template = "$(ORIGIN)|$(LABEL)|$(REPO_URI)"
        listed = host.run([host.need("apt-get"), "indextargets", "--format", template], what="reading apt's sources")
        for line in listed.decode("utf-8", "replace").splitlines():
            origin, label, uri = (*line.split("|"), "", "")[:3]
            if origin == "Debian" and label == "Debian":
                archive = archive or uri
            elif origin == "Debian" and label == "Debian-Security":
                security = security or uri
    if not archive:
        raise HostError(
            "this machine's apt configuration names no Debian archive to take packages from",
            hint="Run `apt-get update`, or set LSMLAB_MIRROR to the address of a Debian archive.",
        )
    if not KEYRING.exists():
        raise HostError(f"{KEYRING} is missing", hint="Run `make setup`, or: apt-get install debian-archive-keyring.")
    option = f"[signed-by={KEYRING}]"
    sources = [f"deb {option} {archive} {suite} main", f"deb {option} {archive} {suite}-updates main"]
    if security:
        sources.append(f"deb {option} {security} {suite}-security main")
    return sources


def proxy_settings() -> str:
    """This machine's apt proxy settings, in apt.conf form; empty where it has none."""
    if not host.find("apt-config"):
        return ""
    dump = host.run([host.need("apt-config"), "dump"], what="reading apt's configuration").decode("utf-8", "replace")
    wanted = re.compile(r"^Acquire::(?:https?::(?:Proxy|Proxy-Auto-Detect|CaInfo)|Retries)\b.*\".+\";$")
    return "".join(f"{line}\n" for line in dump.splitlines() if wanted.match(line))


def _about(lab: Lab, work: Path) -> dict[str, Any]:
    packages = dict(line.split("\t") for line in (work / "packages").read_text("utf-8").splitlines())
    about: dict[str, Any] = {
        "lab": lab.id,
        "recipe": recipe_digest(lab),
        "built": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel_release": (work / "kernel").read_text("utf-8").split()[0],
        "asked": lab.image.packages,
        "packages": {
            name: version for name, version in packages.items() if name in (*REPORTED_PACKAGES, *lab.image.packages)
        },
    }
    if (work / "shipped.cil").exists():
        shipped, audited = ((work / f"{n}.cil").read_text("utf-8") for n in ("shipped", "audited"))
        about["dontaudit_rules_removed"] = policy.prove_same_decisions(shipped, audited)
    return about
