"""Stand-ins for distributions' cloud images, which cannot be had where there is no network but the package archive.

Of Debian packages, and of the same shape: a partitioned disk with a boot loader of its own, cloud-init, sudo, root
locked, nothing of ours. The Ubuntu-shaped one has ext4 and AppArmor, the Fedora-shaped one btrfs with subvolumes, BLS
entries and SELinux. They are served as the distributions do it: beside a list of digests
with a signature. What they cannot show is what the distributions' own packages and policies do.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lsmlab import cache, host
from lsmlab.image import debian

SUITE = "trixie"
PACKAGES = (
    "linux-image-cloud-amd64", "initramfs-tools", "zstd", "systemd", "systemd-sysv", "libpam-systemd", "dbus", "udev",
    "kmod", "e2fsprogs", "btrfs-progs", "fdisk", "grub-pc-bin", "grub-common", "python3", "openssh-server", "sudo",
    "cloud-init", "cloud-guest-utils", "apt", "ca-certificates", "iproute2", "procps", "login", "passwd", "apparmor",
    "selinux-policy-default", "policycoreutils", "selinux-utils",
)  # fmt: skip
DISK_MIB = 3072
BOOT_PARTITION, ROOT_PARTITION = 2048, 4096
"""Their first sectors."""
SECTOR = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of image. `clear_signed`: as Fedora signs its lists, with BSD's lines; else as Ubuntu does."""

    name: str
    file_system: str
    framework: str
    clear_signed: bool


UBUNTU = Shape("ubuntu-shaped", "ext4", "apparmor", clear_signed=False)
FEDORA = Shape("fedora-shaped", "btrfs", "selinux", clear_signed=True)


def root_tree(folder: Path) -> Path:
    """The root tree of all shapes, as a tar file in `folder`. Takes a minute and the package archive."""
    tree = folder / "tree.tar"
    (folder / "apt.conf").write_text(debian.proxy_settings(), "utf-8")
    argv = [
        host.need("mmdebstrap"), "--variant=minbase", "--format=tar", "--components=main",
        f"--aptopt={folder / 'apt.conf'}", *(f"--dpkgopt=path-exclude={path}" for path in debian.EXCLUDED),
        f"--include={','.join(PACKAGES)}", "--mode=root", SUITE, str(tree), *debian.package_sources(SUITE),
    ]  # fmt: skip
    host.run(host.in_namespace(["env", f"TMPDIR={folder}", *argv]), what="building a stand-in's tree", timeout=1800)
    return tree


def disk(tree: Path, shape: Shape, target: Path) -> None:
    """Make the image `target`, qcow2, of `tree`. Takes half a minute."""
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        (work / "tree.tar").hardlink_to(tree)
        script = Path(__file__).with_name("disk.sh")
        argv = ["sh", str(script), str(work), shape.file_system, str(DISK_MIB), shape.framework]
        host.run(host.in_namespace(argv), what=f"making the disk of {shape.name}")
        _put_loader(work)
        convert = ["convert", "-q", "-O", "qcow2", str(work / "disk.raw"), str(target)]
        host.run([host.need("qemu-img"), *convert], what="packing the disk")


def _put_loader(work: Path) -> None:
    """GRUB into the disk's first sector and its boot partition, and the file system into the other one.

    What grub-install does to a device: boot.img is told where core.img lies, and core.img where it goes on. Source:
    grub-core/boot/i386/pc/boot.S and diskboot.S.
    """
    boot = bytearray((work / "boot.img").read_bytes()[:440])  # behind it is the partition table
    struct.pack_into("<Q", boot, 0x5C, BOOT_PARTITION)
    core = bytearray((work / "core.img").read_bytes())
    struct.pack_into("<Q", core, 0x1F4, BOOT_PARTITION + 1)
    with (work / "disk.raw").open("r+b") as to, (work / "fs.raw").open("rb") as file_system:
        to.write(boot)
        to.seek(BOOT_PARTITION * SECTOR)
        to.write(core)
        place = ROOT_PARTITION * SECTOR
        while piece := file_system.read(1 << 20):
            if any(piece):
                to.seek(place)
                to.write(piece)
            place += len(piece)


@dataclass(frozen=True, slots=True)
class Signer:
    """A key of the tests, made anew each time: its folder is GnuPG's home."""

    home: Path

    @classmethod
    def make(cls, home: Path, *options: str, until: str = "never") -> Signer:
        """A new one. `options` of gpg, such as a faked time."""
        home.mkdir(mode=0o700)
        signer = cls(home)
        signer.gpg(
            *options, "--passphrase", "", "--quick-generate-key", "tests <tests@localhost>", "ed25519", "sign", until
        )
        return signer

    def gpg(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """What gpg answers."""
        argv = [host.need("gpg"), "--homedir", str(self.home), "--batch", "--quiet", *arguments]
        return subprocess.run(argv, input=stdin, check=True, capture_output=True, timeout=120).stdout

    @property
    def public(self) -> bytes:
        """The public key, armored."""
        return self.gpg("--armor", "--export")

    def detached(self, data: bytes, *options: str) -> bytes:
        """A signature of `data`."""
        return self.gpg(*options, "--armor", "--detach-sign", stdin=data)

    def clear(self, data: bytes, *options: str) -> bytes:
        """`data`, clear-signed."""
        return self.gpg(*options, "--clear-sign", stdin=data)

    def close(self) -> None:
        """End GnuPG's agent, which serves this folder alone."""
        ended = ["gpgconf", "--homedir", str(self.home), "--kill", "all"]
        subprocess.run(ended, check=False, capture_output=True, timeout=60)


def publish(folder: Path, name: str, shape: Shape, signer: Signer) -> None:
    """Put a signed list of the file `name`'s digest beside it, as the distributions of this shape do."""
    digest = cache.file_digest(folder / name)
    if shape.clear_signed:
        size = (folder / name).stat().st_size
        text = f"# {name}: {size} bytes\nSHA256 ({name}) = {digest}\n".encode()
        (folder / "CHECKSUM").write_bytes(signer.clear(text))
        return
    text = f"{digest} *{name}\n".encode()
    (folder / "SHA256SUMS").write_bytes(text)
    (folder / "SHA256SUMS.gpg").write_bytes(signer.detached(text))


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the files of `folder` are served, from this machine to itself."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    handler = functools.partial(Quiet, directory=os.fspath(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def lab_file(shape: Shape, address: str, keyring: Path, lab_id: str) -> str:
    """The lab of a stand-in, as a person would write it."""
    signed = {"url": f"{address}/CHECKSUM"}
    if not shape.clear_signed:
        signed = {"url": f"{address}/SHA256SUMS", "signature": f"{address}/SHA256SUMS.gpg"}
    selinux = shape.framework == "selinux"
    about = {
        "kind": "lsmlab/lab",
        "id": lab_id,
        "title": f"a cloud image, {shape.name}",
        "backend": "qemu",
        "memory_mib": 768,
        "frameworks": [shape.framework],
        "kernel_arguments": {
            "none": "security=none",
            shape.framework: f"security={shape.framework}{' enforcing=1' if selinux else ''}",
        },
        "cloud_image": {
            "url": f"{address}/{shape.name}.qcow2",
            "checksums": {**signed, "keyring": str(keyring)},
            "installer": "apt",
            "disk_mib": 4096,
            "packages": ["auditd", "nginx", "curl", "acl", *(["checkpolicy"] if selinux else [])],
            "masked_units": [
                "apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_reap.service", "fstrim.timer",
                "grub-common.service", "systemd-networkd-wait-online.service",
            ],
        },
        "services": {"nginx": {"unit": "nginx.service"}},
    }  # fmt: skip
    # One key a line at the top, as people write it: what a lab is, is told by the first lines of its file
    return "".join(f"{key}: {value if isinstance(value, str) else json.dumps(value)}\n" for key, value in about.items())
