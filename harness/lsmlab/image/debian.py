"""A disk built from Debian packages with mmdebstrap, on this machine, without root."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lsmlab import cache, host
from lsmlab.definition import digest_of, files_below
from lsmlab.errors import HostError, ImageError
from lsmlab.image import policy, step
from lsmlab.lab import DebianImage, Lab
from lsmlab.progress import Progress

FILES = ("disk.qcow2", "vmlinuz", "initrd", "packages", "policy-tree.tar")
ROOT_ARGUMENTS = "root=/dev/vda rw net.ifnames=0"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
NEEDED_MIB = 5120
"""What a build needs at its widest, with room to spare."""
EXCLUDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


def make(lab: Lab, image: DebianImage, work: Path, task: str, progress: Progress) -> dict[str, Any]:
    """Make FILES in `work`; what there is to say of them. Raises HostError and ImageError."""
    _see_what_a_build_needs(lab)
    cache.need_mib(NEEDED_MIB, "building an image")
    progress.step(task, f"installing {lab.title}'s packages")
    _bootstrap(lab, image, work)
    for framework, folder in image.elsewhere.items():
        _bring(folder, work / "elsewhere" / framework)
    progress.step(task, "preparing the disk: units, policy, labels")
    with resources.as_file(resources.files("lsmlab") / "image") as here:
        for name in ("masked_units", "disabled_units"):
            (work / name).write_text("".join(f"{u}\n" for u in getattr(image, name)), "utf-8")
        argv = ["sh", str(here / "prepare.sh"), str(work), str(here / "overlay"), str(image.disk_mib), sys.executable]
        step.run(host.in_namespace(argv), f"preparing the disk of {lab.id}")
    progress.step(task, "proving that the policy without dontaudit decides the same")
    about: dict[str, Any] = {
        "kernel_release": (work / "kernel").read_text("utf-8").split()[0],
        "root_arguments": ROOT_ARGUMENTS,
        "policies": {
            framework: f"{folder.name}, sha256 {digest_of(*files_below(folder))}"
            for framework, folder in image.elsewhere.items()
        },
    }
    if (work / "shipped.cil").exists():
        shipped, audited = ((work / f"{n}.cil").read_text("utf-8") for n in ("shipped", "audited"))
        about["dontaudit_rules_removed"] = policy.prove_same_decisions(
            shipped, audited, any_silent=image.selinux_policy is None
        )
    progress.step(task, "packing the disk")
    convert = [host.need("qemu-img"), "convert", "-q", "-O", "qcow2", str(work / "disk.raw"), str(work / "disk.qcow2")]
    step.run(host.dying_with_us(convert), f"packing the disk of {lab.id}")
    return about


def see_what_a_tree_needs(what: str) -> None:
    """See that `install` works here. Raises HostError."""
    host.need_x86(what)
    for program in ("mmdebstrap", "unshare", "setpriv"):
        host.need(program)
    if os.geteuid() != 0:
        host.need("newuidmap")
    host.need_namespaces()


def _see_what_a_build_needs(lab: Lab) -> None:
    """Raises HostError that says what to do, here or elsewhere."""
    host.need_x86_to_make(lab.id)
    try:
        for program in ("mke2fs", "debugfs", "qemu-img"):
            host.need(program)
        see_what_a_tree_needs("building an image")
    except HostError as error:
        raise HostError(error.message, hint=f"{error.hint}\n  {host.made_elsewhere(lab.id)}") from error


def _bring(folder: Path, into: Path) -> None:
    """Copy a policy from elsewhere to where the disk is prepared. Raises ImageError."""
    try:
        shutil.copytree(folder, into, symlinks=True)
    except (OSError, shutil.Error) as error:
        raise ImageError(f"{folder}: cannot be copied: {str(error)[:300]}") from error


def _bootstrap(lab: Lab, image: DebianImage, work: Path) -> None:
    install(
        image.suite, image.packages, work, f"installing the packages of {lab.id}", variant="minbase",
        hint=f"Mend `packages` of the lab {lab.id} or of the scenario.",
    )  # fmt: skip


def install(suite: str, packages: Sequence[str], work: Path, what: str, *, variant: str, hint: str) -> None:
    """Make `tree.tar` in `work`: a root tree of Debian packages. `variant`: mmdebstrap's, what is there besides.

    `hint`: what to do about a package that is not there. Raises HostError and ImageError.
    """
    sources = package_sources(suite)
    (work / "apt.conf").write_text(proxy_settings(), "utf-8")
    argv = [
        host.need("mmdebstrap"), f"--variant={variant}", "--format=tar", "--components=main",
        f"--aptopt={work / 'apt.conf'}", *(f"--dpkgopt=path-exclude={p}" for p in EXCLUDED),
        f"--include={','.join(packages)}",
    ]  # fmt: skip
    # In namespaces of ours, also without root: they die with us, and what is left of it lies in the work folder
    argv = host.in_namespace(["env", f"TMPDIR={work}", *argv, "--mode=root"])
    try:
        step.run([*argv, suite, str(work / "tree.tar"), *sources], what)
    except ImageError as error:
        unknown = re.findall(r"^E: Unable to locate package (\S+)$", error.message, re.MULTILINE)
        if not unknown:
            raise
        raise ImageError(f"Debian {suite} has no package {', '.join(unknown)}", hint=hint) from error


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
        raise HostError(f"{KEYRING} is missing", hint=f"{host.to_install('debian-archive-keyring')}.")
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
