"""What this machine has, lacks, and what to do about it. Looks, and changes nothing."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmlab import __version__, host, paths
from lsmlab.bench import guest_budget
from lsmlab.errors import LsmlabError
from lsmlab.image import build, cloud, debian, signed
from lsmlab.lab import CloudImage, Lab
from lsmlab.machine import accel
from lsmlab.machine.qemu import QEMU
from lsmlab.progress import Silent

TO_RUN = (
    ("qemu-system-x86_64", "--version", "runs the guests"),
    ("qemu-img", "--version", "makes their disks"),
    ("setpriv", "--version", "lets guests die with lsmlab"),
)
TO_BUILD = (
    ("mmdebstrap", "--version", "builds images from packages"),
    ("mke2fs", "-V", "makes the image's file system"),
    ("debugfs", "-V", "writes SELinux labels into it"),
    ("gpg", "--version", "checks the archive's signatures"),
    ("unshare", "--version", "gives builds namespaces of their own"),
)
TO_PREPARE = (("gpgv", "--version", "checks the distribution's signature"),)
"""What a machine lacks of these matters where there is no image yet; see `image.archive` for one from elsewhere."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `needed`: without it nothing runs here, as things stand."""

    what: str
    ok: bool
    needed: bool
    found: str
    advice: str = ""


def examine(lab: Lab) -> list[Finding]:
    """Every finding for running `lab` here, in the order a run needs them. Never raises LsmlabError."""
    system = _system()
    if not system.ok:
        return [system]  # the rest can be looked at on Linux alone
    builds = build.find(lab) is None
    findings = [system, _processor(lab, needed=builds), *(_program(*entry) for entry in TO_RUN)]
    findings += [_program(*entry, needed=builds) for entry in _to_make(lab)]
    if os.geteuid() != 0 and lab.image is not None:
        findings.append(_program("newuidmap", "", "builds images without root", needed=builds))
        findings.append(_user_namespaces(needed=builds))
    findings += [_folder("cache", paths.cache()), _folder("outcomes", paths.state()), _space(), _memory(lab)]
    kvm = _kvm(lab)
    findings += [_image(lab), kvm, *_packages(lab, needed=builds)]
    if os.geteuid() == 0 and host.find(QEMU) and host.find("setpriv"):
        findings.append(_user_of_guests(accel.KVM if kvm.ok else None))
    return findings


def circumstances(lab: Lab | None) -> dict[str, Any]:
    """What findings are of, for whoever reads them elsewhere: when, by which lsmlab, on what, and with which image.

    `lab` None: it is another machine that was looked at, and QEMU is not asked.
    """
    system = host.system()
    image = build.find(lab) if lab is not None else None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "lsmlab": __version__,
        "host": {"system": system.name, "kernel": system.kernel, "processor": system.processor},
        "qemu": host.version(QEMU, "--version") if lab is not None and host.find(QEMU) else None,
        "lab": lab.id if lab is not None else None,
        "image": image.digest if image is not None else None,
    }


def needs(lab: Lab) -> dict[str, bool]:
    """What this machine has to have to run `lab`, in few words each, and whether it has. Asks gpg of keys."""
    if not _system().ok:
        return {"Linux": False}
    found = {name: host.find(name) is not None for name, _, _ in TO_RUN}
    if build.find(lab) is None:
        found["x86-64 processor"] = _processor(lab, needed=True).ok
        found |= {name: host.find(name) is not None for name, _, _ in _to_make(lab)}
        if os.geteuid() != 0 and lab.image is not None:
            found["newuidmap"] = host.find("newuidmap") is not None
        if (keyring := _keyring(lab)) is not None and host.find("gpg") is not None:
            found["valid key"] = _key(keyring, needed=True).ok
    found["memory"] = _memory(lab).ok
    if lab.needs_kvm:
        found["KVM"] = accel.worth_trying()
    return found


def _to_make(lab: Lab) -> tuple[tuple[str, str, str], ...]:
    """The programs that make the lab's image."""
    return TO_BUILD if lab.image is not None else TO_PREPARE


def _system() -> Finding:
    found = host.system()
    try:
        host.need_linux()
    except LsmlabError as error:
        return Finding("system", ok=False, needed=True, found=error.message, advice=error.hint)
    return Finding("system", ok=True, needed=True, found=f"{found.name}, {found.kernel}")


def _processor(lab: Lab, *, needed: bool) -> Finding:
    try:
        host.need_x86_to_make(lab.id)
    except LsmlabError as error:
        return Finding("processor", ok=False, needed=needed, found=error.message, advice=error.hint)
    return Finding("processor", ok=True, needed=needed, found=platform.machine())


def _program(name: str, flag: str, purpose: str, *, needed: bool = True) -> Finding:
    found = host.find(name)
    if found is None:
        return Finding(name, ok=False, needed=needed, found=f"missing: {purpose}", advice=host.to_install(name))
    return Finding(name, ok=True, needed=needed, found=host.version(name, flag) if flag else found)


def _user_namespaces(*, needed: bool) -> Finding:
    ok = False
    found = "an ordinary user may make them, with the subordinate ids of /etc/subuid"
    try:
        host.need_namespaces()
        ok = True
    except LsmlabError as error:
        found = error.message.splitlines()[-1]
    advice = (
        ""
        if ok
        else "See that /etc/subuid and /etc/subgid have a line for you, and unprivileged user namespaces are on."
    )
    return Finding("user namespaces", ok=ok, needed=needed, found=found, advice=advice)


def _user_of_guests(device: Path | None) -> Finding:
    ok = bool(host.no_rights(host.need(QEMU), device))
    found = "a user of their own, without rights" if ok else "root: they cannot be given a user of their own here"
    advice = "" if ok else "Run lsmlab as an ordinary user: what breaks out of a guest has QEMU's rights."
    return Finding("guests run as", ok=ok, needed=False, found=found, advice=advice)


def _folder(what: str, folder: Path) -> Finding:
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    ok = os.access(nearest, os.W_OK | os.X_OK)
    advice = "" if ok else "Set LSMLAB_HOME to a folder that can be written."
    return Finding(what, ok=ok, needed=True, found=f"{folder}{'' if ok else ' cannot be written'}", advice=advice)


def _space() -> Finding:
    folder = next(p for p in (paths.cache(), *paths.cache().parents) if p.exists())
    free = shutil.disk_usage(folder).free >> 20
    ok = free >= debian.NEEDED_MIB
    advice = "" if ok else "Free some, or set LSMLAB_HOME to a folder on a larger disk."
    return Finding(
        "disk space", ok=ok, needed=False, found=f"{free} MiB free, a build takes {debian.NEEDED_MIB}", advice=advice
    )


def _memory(lab: Lab) -> Finding:
    try:
        budget = guest_budget(lab.memory_mib)
    except LsmlabError as error:
        return Finding("memory", ok=False, needed=True, found=error.message, advice=error.hint)
    return Finding("guests at once", ok=True, needed=True, found=f"{budget.guests} ({budget.reason})")


def _image(lab: Lab) -> Finding:
    image = build.find(lab)
    if image is None:
        takes = (
            "a minute or two, and the network"
            if lab.image is not None
            else "a download of some hundred MiB, and several minutes, more of them without KVM"
        )
        advice = f"`lsmlab images build {lab.id}`, or any run: it takes {takes}. {host.made_elsewhere(lab.id)}"
        return Finding(f"image {lab.id}", ok=False, needed=False, found="not built yet", advice=advice)
    found = f"built {image.built}, kernel {image.kernel_release}, SHA-256 {image.digest[:16]}..."
    return Finding(f"image {lab.id}", ok=True, needed=False, found=found)


def _kvm(lab: Lab) -> Finding:
    early = accel.device_state()
    image = build.find(lab)
    if early is not None:
        state, detail = early
    elif image is None:
        return Finding("KVM", ok=True, needed=False, found="it opens; it has to prove itself once an image is built")
    else:
        state, detail = accel.known_or_probe(image.kernel)
    ok = state is accel.KvmState.PROVEN
    advice = "" if ok else f"Guests run under TCG, ten times slower. {accel.advice(state)}"
    return Finding("KVM", ok=ok, needed=lab.needs_kvm, found=f"{state}: {detail}", advice=advice)


def _keyring(lab: Lab) -> Path | None:
    """The keys of which one has to have signed the list that the lab's image is in."""
    lists = lab.cloud_image.checksums if lab.cloud_image is not None else None
    return lists.keyring if lists is not None else None


def _key(keyring: Path, *, needed: bool) -> Finding:
    if host.find("gpg") is None:
        found = f"{keyring}; when it expires gpg would say, which is not installed"
        return Finding("key", ok=True, needed=needed, found=found)
    try:
        until = signed.expiry(keyring)
    except LsmlabError as error:
        return Finding("key", ok=False, needed=needed, found=error.message, advice=error.hint)
    if until is None:
        return Finding("key", ok=True, needed=needed, found=f"{keyring}, without an end")
    if until > datetime.datetime.now(datetime.UTC):
        return Finding("key", ok=True, needed=needed, found=f"{keyring}, until {until:%Y-%m-%d}")
    found = f"{keyring}: expired on {until:%Y-%m-%d}"
    return Finding("key", ok=False, needed=needed, found=found, advice=signed.present_key(keyring))


def _download(image: CloudImage) -> Finding:
    """Whether the distribution's file is there, and whether its list is signed by a key that is here."""
    from lsmlab import download  # noqa: PLC0415 - its library takes a moment that no other command has to wait for

    try:
        size = download.length(image.url)
        digest = cloud.expected_digest(image, Silent(), "doctor")
    except LsmlabError as error:
        return Finding("download", ok=False, needed=True, found=error.message, advice=error.hint)
    vouched = "the list's signature is good" if image.checksums else "the lab's file says its digest"
    large = f"{size >> 20} MiB, " if size is not None else ""
    return Finding("download", ok=True, needed=True, found=f"{large}{vouched}, SHA-256 {digest[:16]}...")


def _packages(lab: Lab, *, needed: bool) -> Iterator[Finding]:
    """Whether what an image is made of can be had; `needed`: there is no image yet."""
    if lab.cloud_image is not None:
        if needed:
            if (keyring := _keyring(lab)) is not None:
                yield _key(keyring, needed=True)
            yield _download(lab.cloud_image)
        return
    try:
        assert lab.image is not None
        debian.package_sources(lab.image.suite)
    except LsmlabError as error:
        yield Finding("Debian packages", ok=False, needed=needed, found=error.message, advice=error.hint)
        return
    yield Finding("Debian packages", ok=True, needed=needed, found="from the archive that this machine's apt uses")
