"""A distribution's cloud image: fetched, verified, prepared once in a guest that has a network, and cut off from it.

Nothing of it is edited from outside. It starts by its own boot loader, cloud-init lets us in, its own installer brings
the packages, and its kernel, its initial RAM disk and what it says of its root file system are taken along: later
boots are by QEMU's -kernel, since arms differ in the command line. So no boot loader has to be understood.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsmlab import cache, host
from lsmlab.channel.base import Channel
from lsmlab.errors import DamagedError, HostError, ImageError, MachineError
from lsmlab.image import policy, qcow2, seed, signed, step
from lsmlab.lab import CloudImage, Lab
from lsmlab.machine import accel
from lsmlab.machine.hardware import Hardware, Network, OwnLoader
from lsmlab.machine.qemu import QEMU, QemuMachine
from lsmlab.progress import Progress
from lsmlab.terms import Framework

if TYPE_CHECKING:
    from lsmlab.channel.ssh import Access

KEY, KNOWN_HOSTS = "ssh-key", "ssh-known-hosts"
FILES = ("disk.qcow2", "vmlinuz", "initrd", "packages", KEY, KNOWN_HOSTS)
INSTALLERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "apt": (
        ("apt-get", "--quiet", "--option", "APT::Update::Error-Mode=any", "update"),
        ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes", "--no-install-recommends", "install"),
    ),
    "dnf": (
        ("dnf", "--quiet", "--assumeyes", "makecache"),
        ("dnf", "--quiet", "--assumeyes", "--setopt=install_weak_deps=False", "install"),
    ),
    "zypper": (
        ("zypper", "--non-interactive", "refresh"),
        ("zypper", "--non-interactive", "install", "--no-recommends"),
    ),
}
"""How each installer reads its lists, and how it installs packages."""
FIRST_BOOT_SECONDS = {"tcg": 900.0, "kvm": 120.0}
"""A KVM that does not work is given up after so long."""
STEP_SECONDS = 1800.0
AGAIN = "Fetch it again: the same command does."
OTHER = "It is another image than the lab's file, or the distribution's list of today, names; or it is not whole."
PREPARE = "prepare-cloud.sh"
OVERLAY = (
    "etc/audit/rules.d/audit.rules", "etc/profile.d/lsmlab.sh", "etc/systemd/system/lsmlab-shell.service",
    "var/www/html/index.html",
)  # fmt: skip
"""Of what images built here have, all but the agent: it comes over SSH."""
THERE = "/run/lsmlab"
PIECE = 4 << 20
"""Bytes of a guest's file that are read at once."""
MOST_FETCHED = 512 << 20
ROOT_KEYS = ("root=", "rootflags=", "rootfstype=", "rd.", "net.ifnames=", "biosdevname=")
ROOT_FLAGS = frozenset({"ro", "rw"})


def access_by(folder: Path) -> Access:
    """How a guest is logged in to whose keys lie in `folder`."""
    from lsmlab.channel.ssh import Access  # noqa: PLC0415 - paramiko takes longer to load than most commands run

    return Access(seed.USER, folder / KEY, folder / KNOWN_HOSTS)


def make(lab: Lab, work: Path, task: str, progress: Progress, accelerator: str, file: Path | None) -> dict[str, Any]:
    """Make FILES in `work`; what there is to say of them. `file`: the distribution's image, where it is here already.

    Raises HostError, DownloadError, DamagedError and ImageError, MachineError where it does not let us in.
    """
    from lsmlab import download  # noqa: PLC0415 - its library takes a moment that no other command has to wait for

    image = lab.cloud_image
    assert image is not None
    host.need_x86_to_make(lab.id)
    accelerators = accel.to_try(lab, accelerator)
    host.need(QEMU)
    host.need("qemu-img")
    expected = expected_digest(image, progress, task)
    what = str(file) if file else image.url
    with contextlib.ExitStack() as held:  # to the end: where the preparation fails, the download is kept
        there = file or held.enter_context(download.fetched(image.url, progress, task))
        progress.step(task, "verifying the download")
        digest = _verify(there, expected, what, AGAIN if file is None else OTHER)
        progress.step(task, "unpacking the disk")
        _unpack(there, work / "source.qcow2", image.disk_mib, what)
        about = _prepare(lab, image, work, task, progress, accelerators)
        progress.step(task, "packing the disk")
        packed = [host.need("qemu-img"), "convert", "-q", "-O", "qcow2", str(work / "prepared.qcow2")]
        step.run(host.dying_with_us([*packed, str(work / "disk.qcow2")]), f"packing the disk of {lab.id}")
    return about | {"source": {"url": image.url, "sha256": digest}}


def expected_digest(image: CloudImage, progress: Progress, task: str) -> str:
    """What the image's digest has to be: as the lab's file says, and as the distribution's signed list says.

    Raises DownloadError; ImageError where the list cannot be trusted, or the two differ.
    """
    from lsmlab import download  # noqa: PLC0415 - its library takes a moment that no other command has to wait for

    if image.checksums is None:
        assert image.sha256 is not None
        return image.sha256
    lists = image.checksums
    progress.step(task, "verifying the distribution's signature")
    name = image.url.rpartition("/")[2]
    text = download.small(lists.url, signed.MOST_BYTES)
    signature = download.small(lists.signature, signed.MOST_BYTES) if lists.signature else None
    said = signed.digest_of(lists.url, signed.verified(lists.url, text, signature, lists.keyring), name)
    if image.sha256 not in {None, said}:
        raise ImageError(
            f"{image.url}: the lab's file expects the SHA-256 {image.sha256}, the distribution's list says {said}",
            hint="The distribution has put another file there: mend `sha256` of the lab.",
        )
    return said


def _verify(file: Path, expected: str, what: str, hint: str) -> str:
    try:
        found = cache.file_digest(file)
    except OSError as error:
        raise HostError(f"{what}: {error.strerror}") from error
    if found != expected:
        raise DamagedError(f"{what}: its SHA-256 is {found}, expected {expected}", hint=hint)
    return found


def _unpack(file: Path, target: Path, disk_mib: int, what: str) -> None:
    """The image as a plain disk in qcow2, at least `disk_mib` large. Raises DamagedError, ImageError."""
    try:
        plain = qcow2.is_qcow2(file)
        size = qcow2.size_of_plain(file, what=what) if plain else file.stat().st_size
    except OSError as error:
        raise HostError(f"{what}: {error.strerror}") from error
    if not plain and (size % 512 or not _has_partitions(file)):
        raise DamagedError(f"{what}: is no disk: neither qcow2, nor does it have a partition table")
    cache.need_mib(2 * (file.stat().st_size >> 20) + disk_mib // 2, "preparing a cloud image")
    convert = [host.need("qemu-img"), "convert", "-q", "-f", "qcow2" if plain else "raw", "-O", "qcow2"]
    step.run(host.dying_with_us([*convert, str(file), str(target)]), f"unpacking {what}")
    if size < disk_mib << 20:  # its last partition grows into it: cloud-init's growpart
        resize = [host.need("qemu-img"), "resize", "-q", str(target), f"{disk_mib}M"]
        step.run(host.dying_with_us(resize), f"enlarging {what}")


def _has_partitions(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(512)[510:] == b"\x55\xaa"


# In the guest


def _prepare(
    lab: Lab, image: CloudImage, work: Path, task: str, progress: Progress, accelerators: Sequence[str]
) -> dict[str, Any]:
    """Boot the image, make it a lab's disk, `prepared.qcow2`, and take along what FILES names."""
    user, machine = seed.KeyPair.generate(), seed.KeyPair.generate()
    seed.write(work / "seed.iso", user, machine)
    (work / KEY).touch(0o600)
    (work / KEY).write_text(user.private, "utf-8")
    access = access_by(work)
    access.known_hosts.write_text(f"{access.HOST_NAME} {machine.public}\n", "utf-8")
    with _first_boot(lab, work, access, task, progress, accelerators) as guest:
        channel = guest.channel
        progress.step(task, "waiting for cloud-init")
        _there(channel, ["cloud-init", "status", "--wait"], "cloud-init", statuses=(0, 2))  # 2: done, with warnings
        refresh, install = INSTALLERS[image.installer]
        progress.step(task, "reading the distribution's package lists")
        _there(channel, refresh, "reading the package lists")
        progress.step(task, f"installing {len(image.packages)} packages in the guest")
        _there(channel, (*install, *image.packages), f"installing the packages of {lab.id}")
        for argv in image.prepare:
            _there(channel, argv, f"preparing {lab.id}: {' '.join(argv)[:200]}")
        progress.step(task, "preparing the disk: units, policy, labels")
        _bring(channel, lab, image)
        selinux = "yes" if Framework.SELINUX in lab.frameworks else "no"
        _there(channel, ("sh", f"{THERE}/{PREPARE}", selinux), f"preparing the disk of {lab.id}")
        about = _take_along(channel, work, task, progress, selinux=selinux == "yes")
        progress.step(task, "shutting the guest down")
        guest.power_off(300)
    return about


@contextlib.contextmanager
def _first_boot(
    lab: Lab, work: Path, access: Access, task: str, progress: Progress, accelerators: Sequence[str]
) -> Iterator[QemuMachine]:
    """A guest of the image itself, logged in. KVM, where it is tried, has to bring it up soon."""
    version = host.version(QEMU, "--version")
    for name in accelerators:
        progress.step(task, f"booting {lab.title} for the first time ({name})")
        try:
            guest = QemuMachine.start(
                f"prepare-{lab.id}", Hardware(name, lab.memory_mib, version, Network.OPEN), work / "source.qcow2",
                boot=OwnLoader(work / "seed.iso"), scratch=work, keep_overlay=work / "prepared.qcow2",
                timeout=FIRST_BOOT_SECONDS[name], access=access,
            )  # fmt: skip
        except MachineError as error:
            if name == accelerators[-1]:
                raise
            why = error.message.partition("\n")[0]
            progress.note(f"{lab.title} does not come up under KVM ({why}): preparing it in software emulation.")
            continue
        try:
            yield guest
        finally:
            guest.stop()
        return


def _there(channel: Channel, argv: tuple[str, ...] | list[str], what: str, *, statuses: tuple[int, ...] = (0,)) -> None:
    """A long step in the guest. Raises ImageError with its last words."""
    done = channel.run(argv, timeout=STEP_SECONDS)
    if done.exit_code not in statuses:
        words = "\n".join((done.err.strip() or done.out.strip()).splitlines()[-15:])
        raise ImageError(f"{what}, in the guest: {done.ended()}\n{words}")


def _bring(channel: Channel, lab: Lab, image: CloudImage) -> None:
    """What the preparation reads, and what images built here have as well."""
    with resources.as_file(resources.files("lsmlab") / "image") as here:
        for name in OVERLAY:
            channel.write_file(f"/{name}", (here / "overlay" / name).read_bytes(), mode=0o644)
        channel.write_file(f"{THERE}/{PREPARE}", (here / PREPARE).read_bytes())
    off = {*image.disabled_units, *image.masked_units}
    enabled = ["auditd.service", *(s.unit for s in lab.services.values() if s.unit not in off)]
    for name, units in (("masked", image.masked_units), ("disabled", image.disabled_units), ("enabled", enabled)):
        channel.write_file(f"{THERE}/{name}", "".join(f"{unit}\n" for unit in units).encode())
    channel.write_file("/usr/lib/lsmlab/vehicle", b"")


def _take_along(channel: Channel, work: Path, task: str, progress: Progress, *, selinux: bool) -> dict[str, Any]:
    for name in ("vmlinuz", "initrd", "packages"):
        progress.step(task, f"taking along: {name}")
        fetch(channel, f"{THERE}/{name}", work / name)
    about: dict[str, Any] = {
        "kernel_release": _said(channel, "kernel"),
        "root_arguments": root_arguments(_said(channel, "cmdline")),
    }
    if selinux:
        progress.step(task, "proving that the policy without dontaudit decides the same")
        for name in ("shipped", "audited"):
            fetch(channel, f"{THERE}/{name}.cil.gz", work / f"{name}.cil.gz")
        shipped, audited = (_unzipped(work / f"{name}.cil.gz") for name in ("shipped", "audited"))
        about["dontaudit_rules_removed"] = policy.prove_same_decisions(shipped, audited)
    return about


def _said(channel: Channel, name: str) -> str:
    return channel.run(["cat", f"{THERE}/{name}"]).check().out.strip()


def _unzipped(file: Path) -> str:
    try:
        with gzip.open(file) as handle:
            return handle.read(MOST_FETCHED).decode("utf-8", "replace")
    except (OSError, EOFError) as error:
        raise ImageError(f"{file.name}: the guest sent no whole file: {error}") from error


def fetch(channel: Channel, source: str, target: Path) -> None:
    """Copy a guest's file here, piece by piece. Raises ChannelError, and ImageError where it is too large or empty."""
    with target.open("wb") as handle:
        for number in range(MOST_FETCHED // PIECE):
            argv = ["dd", f"if={source}", f"bs={PIECE}", f"skip={number}", "count=1", "status=none"]
            piece = channel.run(argv, timeout=120).check().stdout
            handle.write(piece)
            if len(piece) < PIECE:
                break
        else:
            raise ImageError(f"{source}: more than {MOST_FETCHED >> 20} MiB")
    if not target.stat().st_size:
        raise ImageError(f"{source}: is empty")


def root_arguments(command_line: str) -> str:
    """The part of a kernel's command line by which it finds its root file system. Raises ImageError."""
    words = [word for word in command_line.split() if word.startswith(ROOT_KEYS) or word in ROOT_FLAGS]
    if not any(word.startswith("root=") for word in words):
        raise ImageError(f"the image's kernel was booted without root=: {command_line[:200]}")
    return " ".join(words)
