"""Cloud images, as far as no guest is needed: what is taken from elsewhere, and what a lab's file may say."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pycdlib
import pytest
from entries import Notes, put, put_image
from test_signed import LATER, needs_gpg

import standin
from lsmlab import discovery, doctor, download, host, inventory, lab
from lsmlab.channel.base import CommandResult
from lsmlab.channel.ssh import Access
from lsmlab.errors import DamagedError, DefinitionError, DownloadError, HostError, ImageError
from lsmlab.image import build, cloud, seed
from lsmlab.lab import CloudImage, Lab
from lsmlab.machine import accel, states
from lsmlab.machine.hardware import Hardware, Network
from lsmlab.machine.qemu import QEMU
from lsmlab.progress import Silent
from lsmlab.run import cases, chosen
from lsmlab.terms import Kernel
from standin import UBUNTU, Signer, served

CONTENT = b"\0" * 510 + b"\x55\xaa" + b"\0" * 512
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution's folder, with one image."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    made = tmp_path / "published"
    made.mkdir()
    (made / "ubuntu-shaped.qcow2").write_bytes(CONTENT)
    return made


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    with served(folder) as found:
        yield found


@pytest.fixture
def signer(tmp_path: Path) -> Iterator[Signer]:
    made = Signer.make(tmp_path / "gnupg")
    yield made
    made.close()


def image(address: str, **more: Any) -> CloudImage:
    said = {"sha256": DIGEST, "installer": "apt", "packages": ["nginx"], "disk_mib": 1024}
    return CloudImage.model_validate_json(json.dumps({"url": f"{address}/ubuntu-shaped.qcow2", **said, **more}))


def signed_image(address: str, signer: Signer, tmp_path: Path, **more: Any) -> CloudImage:
    (tmp_path / "key.asc").write_bytes(signer.public)
    lists = {
        "url": f"{address}/SHA256SUMS", "signature": f"{address}/SHA256SUMS.gpg", "keyring": str(tmp_path / "key.asc"),
    }  # fmt: skip
    return image(address, sha256=None, checksums=lists, **more)


# What is taken


def test_a_pinned_digest_is_what_counts(address: str) -> None:
    assert cloud.expected_digest(image(address), Silent(), "t") == DIGEST


@needs_gpg
def test_a_signed_list_says_the_digest(address: str, folder: Path, signer: Signer, tmp_path: Path) -> None:
    standin.publish(folder, "ubuntu-shaped.qcow2", UBUNTU, signer)
    assert cloud.expected_digest(signed_image(address, signer, tmp_path), Silent(), "t") == DIGEST


@needs_gpg
def test_a_pin_that_the_list_contradicts_is_an_error(
    address: str, folder: Path, signer: Signer, tmp_path: Path
) -> None:
    standin.publish(folder, "ubuntu-shaped.qcow2", UBUNTU, signer)
    other = signed_image(address, signer, tmp_path).model_copy(update={"sha256": "0" * 64})
    with pytest.raises(ImageError, match="the distribution's list says"):
        cloud.expected_digest(other, Silent(), "t")


@needs_gpg
def test_a_list_that_is_not_there_is_an_error(address: str, signer: Signer, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="the server says 404"):
        cloud.expected_digest(signed_image(address, signer, tmp_path), Silent(), "t")


def test_what_is_small_is_not_read_without_end(address: str, folder: Path) -> None:
    (folder / "list").write_bytes(b"x" * 2000)
    assert download.small(f"{address}/list", 2000) == b"x" * 2000
    with pytest.raises(DownloadError, match="more than 1999 bytes"):
        download.small(f"{address}/list", 1999)


def test_another_digest_is_damage(folder: Path) -> None:
    assert cloud._verify(folder / "ubuntu-shaped.qcow2", DIGEST, "it", "") == DIGEST
    with pytest.raises(DamagedError, match=f"it: its SHA-256 is {DIGEST}, expected {'0' * 64}"):
        cloud._verify(folder / "ubuntu-shaped.qcow2", "0" * 64, "it", "")
    with pytest.raises(HostError, match="No such file"):
        cloud._verify(folder / "nowhere", DIGEST, "it", "")


@pytest.mark.parametrize("content", [b"", b"<html>captive portal</html>", b"\0" * 1024, CONTENT[:-1]])
def test_what_is_no_disk_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DamagedError, match="it: is no disk"):
        cloud._unpack(tmp_path / "file", tmp_path / "disk", 1024, "it")
    assert not (tmp_path / "disk").exists()


def standin_lab(address: str, folder: Path, **changes: Any) -> Lab:
    """A stand-in's lab with changes to what its file says of the image; None takes a key away."""
    lines = standin.lab_file(UBUNTU, address, folder / "key", "standin").splitlines()
    for number, line in enumerate(lines):
        key, _, said = line.partition(": ")
        if key == "cloud_image":
            kept = {k: v for k, v in (json.loads(said) | changes).items() if v is not None}
            lines[number] = f"{key}: {json.dumps(kept)}"
    path = folder / "standin.yaml"
    path.write_text("\n".join(lines) + "\n")
    return lab.load(path, lambda _: None)


def test_a_wrong_image_is_refused_and_leaves_nothing(address: str, tmp_path: Path) -> None:
    made = standin_lab(address, tmp_path, checksums=None, sha256="0" * 64)
    with pytest.raises(DamagedError, match="its SHA-256 is"):
        build.ensure(made, Silent(), accelerator="tcg")
    kept = [p for p in (tmp_path / "home").rglob("*") if p.is_file() and p.stat().st_size >= len(CONTENT)]
    assert kept == []


def test_a_file_that_is_here_is_verified_as_well(address: str, folder: Path, tmp_path: Path) -> None:
    made = standin_lab(address, tmp_path, checksums=None, sha256="0" * 64)
    with pytest.raises(DamagedError, match=r"ubuntu-shaped\.qcow2: its SHA-256 is"):
        build.ensure(made, Silent(), accelerator="tcg", file=folder / "ubuntu-shaped.qcow2")


def test_a_file_that_is_not_used_since_the_image_is_there_is_said(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, there, said = standin_lab(address, tmp_path), object(), Notes()
    monkeypatch.setattr(build, "_cached", lambda *_: there)
    assert build.ensure(made, said, file=Path("resolute.img")) is there
    (note,) = said.notes
    assert "resolute.img is not used: the image of standin is there already" in note
    assert "`lsmlab images build standin --rebuild --image resolute.img`" in note
    assert build.ensure(made, said) is there
    assert len(said.notes) == 1


# What doctor says of it


@needs_gpg
def test_doctor_tries_the_address_and_the_signature(address: str, folder: Path, signer: Signer, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(signer.public)
    standin.publish(folder, "ubuntu-shaped.qcow2", UBUNTU, signer)
    key, found = doctor._packages(standin_lab(address, tmp_path), needed=True)
    assert (key.ok, key.found) == (True, f"{tmp_path / 'key'}, without an end")
    assert (found.ok, found.found) == (True, f"0 MiB, the list's signature is good, SHA-256 {DIGEST[:16]}...")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64} *ubuntu-shaped.qcow2\n")
    _, found = doctor._packages(standin_lab(address, tmp_path), needed=True)
    assert not found.ok
    assert "it is not what was signed" in found.found


@needs_gpg
@pytest.mark.parametrize(("until", "ok"), [("1m", False), ("50y", True)])
def test_a_key_that_has_expired_is_lacking(folder: Path, tmp_path: Path, until: str, *, ok: bool) -> None:
    old = Signer.make(tmp_path / "old", *LATER, until=until)
    try:
        (tmp_path / "key").write_bytes(old.public)
    finally:
        old.close()
    made = standin_lab("http://127.0.0.1:1", tmp_path)
    key, _ = doctor._packages(made, needed=True)
    assert (key.what, key.ok, key.needed, doctor.needs(made)["valid key"]) == ("key", ok, True, ok)
    if not ok:
        assert key.found.endswith("/key: expired on 2020-01-31")
        assert f"present key into {tmp_path / 'key'}" in key.advice
    (tmp_path / "key").unlink()
    assert doctor.needs(made)["valid key"] is False
    put_image(made)
    assert "valid key" not in doctor.needs(made), "it vouches for a download alone"


def test_doctor_says_that_the_file_is_not_there(address: str, folder: Path, tmp_path: Path) -> None:
    (folder / "ubuntu-shaped.qcow2").unlink()
    made = standin_lab(address, tmp_path, checksums=None, sha256=DIGEST)
    found = {f.what: f for f in doctor.examine(made)}
    assert (found["download"].ok, found["download"].needed) == (False, True)
    assert "the server says 404" in found["download"].found
    advice = found["image standin"].advice
    assert "`lsmlab images build standin`" in advice and "some hundred MiB" in advice and "a minute" not in advice
    put_image(made)
    assert "download" not in {f.what for f in doctor.examine(made)}, "nothing is left to be fetched"


# What a guest says


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("BOOT_IMAGE=/boot/vmlinuz root=UUID=1-2 ro console=tty1 console=ttyS0 quiet", "root=UUID=1-2 ro"),
        ("root=UUID=1 ro rootflags=subvol=root selinux=0 rd.luks=0", "root=UUID=1 ro rootflags=subvol=root rd.luks=0"),
        ("root=LABEL=x rw security=apparmor net.ifnames=0 init=/bin/sh", "root=LABEL=x rw net.ifnames=0"),
    ],
)
def test_of_a_command_line_the_root_file_system_is_kept(said: str, kept: str) -> None:
    assert cloud.root_arguments(said) == kept


def test_a_kernel_without_a_root_is_refused() -> None:
    with pytest.raises(ImageError, match="without root="):
        cloud.root_arguments("quiet rootwait")


class Files:
    """A guest's files, read piece by piece with dd."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """What dd writes."""
        said = dict(word.partition("=")[::2] for word in argv[1:])
        start = int(said["bs"]) * int(said["skip"])
        return CommandResult(tuple(argv), 0, None, self.content[start : start + int(said["bs"])], b"", 0.0)

    def write_file(self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None) -> None:
        """Not here."""
        raise NotImplementedError

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        """Not here."""
        raise NotImplementedError


@pytest.mark.parametrize("size", [1, cloud.PIECE - 1, cloud.PIECE, cloud.PIECE + 1, 2 * cloud.PIECE])
def test_a_file_is_fetched_whole(tmp_path: Path, size: int) -> None:
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    cloud.fetch(Files(content), "/boot/initrd", tmp_path / "initrd")
    assert (tmp_path / "initrd").read_bytes() == content


def test_a_file_of_any_size_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "MOST_FETCHED", 2 * cloud.PIECE)
    with pytest.raises(ImageError, match="more than 8 MiB"):
        cloud.fetch(Files(b"x" * (2 * cloud.PIECE + 1)), "/boot/initrd", tmp_path / "initrd")
    with pytest.raises(ImageError, match="is empty"):
        cloud.fetch(Files(b""), "/boot/initrd", tmp_path / "initrd")


# The seed


def test_the_seed_is_what_cloud_init_looks_for(tmp_path: Path) -> None:
    user, machine = seed.KeyPair.generate(), seed.KeyPair.generate()
    seed.write(tmp_path / "seed.iso", user, machine)
    disk = pycdlib.PyCdlib()
    disk.open(str(tmp_path / "seed.iso"))
    try:
        assert disk.pvd.volume_identifier.rstrip() == b"cidata"
        names = {child.rock_ridge.name() for child in disk.list_children(rr_path="/") if child.rock_ridge.name()}
        assert {b"user-data", b"meta-data", b"network-config"} <= names
        disk.get_file_from_iso(str(tmp_path / "user-data"), rr_path="/user-data")
    finally:
        disk.close()
    text = (tmp_path / "user-data").read_text()
    assert text.startswith("#cloud-config\n")
    assert user.public in text
    assert user.private not in text
    assert machine.public in text
    blob = base64.b64decode(user.public.split()[1])
    assert blob.startswith(b"\0\0\0\x0bssh-ed25519")


def test_a_guest_is_known_by_its_key_at_any_port(tmp_path: Path) -> None:
    place = Access("lsmlab", tmp_path / "key", tmp_path / "known").place("guest", 4711)
    assert (place.address, place.port, place.known_as) == ("127.0.0.1", 4711, Access.HOST_NAME)
    assert place.only_these_keys
    assert not place.new_key


# Labs


CLOUD_LABS = ("almalinux-10", "fedora-44", "opensuse-16.0", "ubuntu-24.04", "ubuntu-26.04")


@pytest.mark.parametrize("name", CLOUD_LABS)
def test_the_distributions_labs_are_verified_by_keys_that_are_here(name: str) -> None:
    found = discovery.load_lab(name)
    assert found.cloud_image is not None
    lists = found.cloud_image.checksums
    assert lists is not None
    assert lists.keyring.is_file()
    assert found.cloud_image.url.startswith("https://")
    assert found.cloud_image.installer == {"f": "dnf", "a": "dnf", "u": "apt", "o": "zypper"}[name[0]]


def test_a_recipe_covers_what_the_preparation_goes_by() -> None:
    suse = discovery.load_lab("opensuse-16.0")
    others = [
        suse,
        suse.model_copy(update={"frameworks": suse.frameworks[1:]}),
        suse.model_copy(update={"services": {}}),
        suse.with_packages(["tree"]),
    ]
    assert len({build.recipe_digest(one) for one in others}) == len(others)


def test_a_lab_that_emulation_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(accel, "worth_trying", lambda: False)
    alma = discovery.load_lab("almalinux-10")
    for wanted in ("tcg", "auto"):
        with pytest.raises(HostError, match="lab almalinux-10 needs KVM"):
            cloud.make(alma, tmp_path, "t", Silent(), wanted, None)
    assert doctor.needs(alma)["KVM"] is False
    assert "KVM" not in doctor.needs(discovery.load_lab("fedora-44"))


@pytest.mark.parametrize(
    ("lab_id", "worth", "wanted", "names"),
    [
        ("fedora-44", True, "auto", ("kvm", "tcg")),
        ("fedora-44", False, "auto", ("tcg",)),
        ("fedora-44", False, "kvm", ("kvm",)),
        ("almalinux-10", True, "auto", ("kvm",)),
        ("almalinux-10", False, "kvm", ("kvm",)),
    ],
)
def test_what_an_image_is_first_booted_with(
    monkeypatch: pytest.MonkeyPatch, lab_id: str, worth: bool, wanted: str, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr(accel, "worth_trying", lambda: worth)
    assert accel.to_try(discovery.load_lab(lab_id), wanted) == names


def test_saved_guests_of_a_cloud_lab_are_current(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `images prune` would remove is what no run would use: the network card is part of a guest."""
    (tmp_path / "here" / "labs").mkdir(parents=True)
    made = standin_lab(address, tmp_path / "here" / "labs", checksums=None, sha256=DIGEST)
    put(build.folder_of(made, "a"), dict.fromkeys(cloud.FILES, b"x"), {
        "lab": made.id, "kernel_release": "6", "packages": {}, "built": "", "root_arguments": "root=/dev/vda",
        "asked": list(made.disk.packages),
    })  # fmt: skip
    found = build.find(made)
    assert found is not None
    assert found.access is not None
    assert found.network is Network.OURS
    hardware = Hardware("tcg", made.memory_mib, host.version(QEMU, "--version"), found.network)
    put(states.folder_of(made, found, Kernel.NONE, hardware, "a"), {"ram": b"r", "disk.qcow2": b"d"},
        states.fits(made, found, Kernel.NONE, hardware))  # fmt: skip
    monkeypatch.chdir(tmp_path / "here")
    kinds = {entry.kind: entry.status for entry in inventory.entries()}
    assert set(kinds.values()) == {inventory.Status.CURRENT}, kinds
    assert len(kinds) == 2


def test_set_ups_use_the_distributions_own_names() -> None:
    fedora = discovery.load_lab("fedora-44")
    assert fedora.named("www-data") == "nginx"
    assert fedora.named("www-data:www-data") == "nginx:nginx"
    assert fedora.named("user:www-data:---") == "user:nginx:---"
    assert fedora.named("/srv/www-data.txt") == "/srv/www-data.txt"
    assert fedora.named("/etc/nginx/sites-enabled/default") == "/etc/nginx/conf.d/lsmlab.conf"
    assert discovery.load_lab("debian-13").named("www-data") == "www-data"


def test_of_the_library_what_the_lab_has_services_for_is_run() -> None:
    found = discovery.load_scenarios(discovery.scenarios().ids)
    taken = chosen(found, discovery.load_lab("fedora-44"))
    assert {s.subject.service for s in taken} == {"nginx", None}
    assert 40 <= len(taken) < len(found)
    assert cases(taken, discovery.load_lab("fedora-44"))


def test_an_image_that_nothing_vouches_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="nothing vouches for is not taken"):
        standin_lab("http://127.0.0.1:1", tmp_path, checksums=None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"url": "ftp://example.org/x"}, "cloud_image.url"),
        ({"installer": "pacman"}, "cloud_image.installer"),
        ({"sha256": "ab"}, "cloud_image.sha256"),
        ({"checksums": {"url": "http://example.org/x"}}, "cloud_image.checksums.keyring: is missing"),
    ],
)
def test_a_fault_in_a_lab_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        standin_lab("http://127.0.0.1:1", tmp_path, **changes)


def test_a_lab_has_one_image() -> None:
    both = discovery.load_lab("debian-13").model_dump() | {"cloud_image": discovery.load_lab("fedora-44").cloud_image}
    with pytest.raises(ValueError, match="expected either `image`"):
        Lab.model_validate(both)
