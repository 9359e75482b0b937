"""Images as files: what is written can be read elsewhere, and nothing else can."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from entries import Notes, put

from lsmlab import cache, discovery, paths
from lsmlab.errors import DamagedError, HostError, ImageError, LsmlabError
from lsmlab.image import archive, build, debian
from lsmlab.lab import Lab

Members = list[tuple[tarfile.TarInfo, bytes]]


def disk(*, size: int = 2048 << 20, backing: int = 0, features: int = 0, magic: bytes = b"QFI\xfb") -> bytes:
    """A qcow2 header, as far as it is looked at."""
    head = magic + struct.pack(">IQIIQ", 3, backing, 0, 16, size) + bytes(40) + struct.pack(">Q", features)
    return head + bytes(4096)


@pytest.fixture
def lab() -> Lab:
    return discovery.load_lab("debian-13")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lab: Lab) -> Path:
    """An archive that another machine's lsmlab has written; the cache here is empty."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "elsewhere"))
    about = {
        "lab": lab.id, "recipe": build.recipe_digest(lab), "built": "2026-11-24", "kernel_release": "6.12-made-up",
        "packages": {"nginx": "1"}, "asked": list(lab.disk.packages), "root_arguments": "root=/dev/vda rw",
    }  # fmt: skip
    files = {name: name.encode() * 1000 for name in debian.FILES} | {"disk.qcow2": disk()}
    put(build.folder_of(lab, "a"), files, about)
    written = archive.write(lab, tmp_path / "image.tar.gz", Notes())
    assert written.sha256 == cache.file_digest(written.path)
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "here"))
    return written.path


def changed(path: Path, change: Callable[[Members], Members]) -> str:
    """Another archive, of the changed members of the one at `path`."""
    with tarfile.open(path) as old:
        members = [(m, (old.extractfile(m) or io.BytesIO()).read()) for m in old]
    target = path.with_name("changed.tar.gz")
    with tarfile.open(target, "w:gz") as new:
        for member, content in change(members):
            if member.isreg():
                member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return str(target)


def manifest(**other: Any) -> Callable[[Members], Members]:
    """Change what the manifest says; None takes a key away."""

    def change(members: Members) -> Members:
        about = json.loads(members[0][1]) | other
        about = {key: value for key, value in about.items() if value is not None}
        return [(members[0][0], json.dumps(about).encode()), *members[1:]]

    return change


def holding(name: str, content: bytes) -> Callable[[Members], Members]:
    """Another content of a member, and a manifest that knows it."""

    def change(members: Members) -> Members:
        members = [(m, content if m.name == name else data) for m, data in members]
        files = json.loads(members[0][1])["files"]
        aside = paths.make(paths.cache()) / "aside"
        aside.write_bytes(content)
        files[name] = {"sha256": cache.file_digest(aside), "bytes": len(content)}
        return manifest(files=files)(members)

    return change


def link(members: Members) -> Members:
    """A member that is a link to a file of the host."""
    info = tarfile.TarInfo("initrd")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/shadow"
    return [(info, b"") if m.name == "initrd" else (m, data) for m, data in members]


def extended(members: Members) -> Members:
    """A header of the kind that says more of the next one, and may be of any size."""
    info = tarfile.TarInfo("anything")
    info.type, info.size = tarfile.XHDTYPE, 1 << 16
    return [members[0], (info, b"0" * info.size), *members[1:]]


def climbing(members: Members) -> Members:
    """A member that lies above the folder that is unpacked to."""
    return [*members, (tarfile.TarInfo("../../climbed"), b"x")]


def refused(source: str) -> LsmlabError:
    with pytest.raises(LsmlabError) as caught:
        archive.read(source, Notes())
    assert list((paths.cache() / "images").glob("*")) == []
    assert list((paths.cache() / "scratch").glob("*")) == []
    return caught.value


def test_an_image_is_the_same_elsewhere(elsewhere: Path, lab: Lab) -> None:
    found = archive.read(str(elsewhere), Notes())
    assert not found.there
    image = build.find(lab, full_check=True)
    assert image == found.image
    assert image is not None
    assert (image.kernel_release, image.packages, image.built) == ("6.12-made-up", {"nginx": "1"}, "2026-11-24")
    assert image.disk.read_bytes() == disk()
    told = cache.read_manifest(image.folder)
    assert told is not None
    assert told["imported"]["from"] == str(elsewhere)
    assert archive.read(str(elsewhere), Notes()).there
    assert len(list((paths.cache() / "images").iterdir())) == 1


def test_an_imported_image_can_be_exported(elsewhere: Path, lab: Lab, tmp_path: Path) -> None:
    archive.read(str(elsewhere), Notes())
    again = archive.write(lab, tmp_path / "again.tar.gz", Notes())
    cache.remove(paths.cache() / "images")
    assert not archive.read(str(again.path), Notes()).there


def test_the_digest_is_compared_first(elsewhere: Path) -> None:
    digest = cache.file_digest(elsewhere)
    with pytest.raises(ImageError, match=f"its SHA-256 is {digest}, expected {'0' * 64}"):
        archive.read(str(elsewhere), Notes(), sha256="0" * 64)
    assert not (paths.cache() / "images").exists()
    assert not archive.read(str(elsewhere), Notes(), sha256=digest.upper()).there


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda members: members[1:], "does not begin with manifest.json"),
        (lambda members: [(members[0][0], b"{"), *members[1:]], "its manifest is none of an image"),
        (lambda members: [(members[0][0], b"[" * 100_000), *members[1:]], "its manifest is none of an image"),
        (manifest(recipe=None), "its manifest is none of an image"),
        (manifest(asked=5), "its manifest is none of an image"),
        (manifest(packages={"nginx": 1}), "its manifest is none of an image"),
        (manifest(files={"../climbed": {"sha256": "0" * 64, "bytes": 1}}), "its manifest is none of an image"),
        (manifest(recipe="0" * 64), "as another version of lsmlab"),
        (manifest(lab="debian-14"), "of a lab that is not known here: unknown lab 'debian-14'"),
        (manifest(lab="../debian-13"), "of a lab that is not known here"),
        (lambda members: members[:-1], "vmlinuz is missing"),
        (lambda members: [*members, members[-1]], "'vmlinuz' is not what the manifest says"),
        (lambda members: [(m, d + b"x" if m.name == "initrd" else d) for m, d in members], "'initrd' is not what"),
        (lambda members: [(m, d[::-1] if m.name == "initrd" else d) for m, d in members], "initrd is damaged"),
        (link, "'initrd' is no plain file"),
        (extended, "'anything' is no plain file"),
        (manifest(asked={"nginx": 1}), "its manifest is none of an image"),
        (climbing, "'../../climbed' is not what the manifest says"),
        (holding("disk.qcow2", disk(backing=512)), "its header names another file"),
        (holding("disk.qcow2", disk(features=4)), "its header names another file"),
        (holding("disk.qcow2", disk(size=1 << 40)), f"is a disk of {1 << 40} bytes, expected {2048 << 20}"),
        (holding("disk.qcow2", disk(magic=b"raw!")), "is no disk in the format qcow2"),
        (holding("disk.qcow2", b""), "is no disk in the format qcow2"),
    ],
)
def test_what_is_no_image_of_ours_is_refused(elsewhere: Path, change: Callable[[Members], Members], words: str) -> None:
    error = refused(changed(elsewhere, change))
    assert isinstance(error, ImageError)
    assert words in error.message
    assert not list(paths.cache().parent.rglob("climbed"))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_what_an_archive_says_of_itself_takes_no_memory_and_no_time(elsewhere: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("manifest.json")
    header.type, header.size = kind, 1 << 33
    bomb = elsewhere.with_name("bomb")
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(32 << 20))
    tracemalloc.start()
    error = refused(str(bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, DamagedError)
    assert peak < 4 << 20


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08\x04\xff", b"\x1f\x8b\x08\x00", b"\x1f\x8b" * 300, b"BZh9", b"PK"])
def test_what_begins_like_something_else_is_refused(elsewhere: Path, start: bytes) -> None:
    elsewhere.write_bytes(start)
    assert isinstance(refused(str(elsewhere)), DamagedError)


def test_half_an_archive_is_refused_wherever_it_ends(elsewhere: Path, tmp_path: Path) -> None:
    whole, half = elsewhere.read_bytes(), tmp_path / "half"
    for end in (0, 1, 10, len(whole) // 3, len(whole) // 2):
        half.write_bytes(whole[:end])
        assert isinstance(refused(str(half)), ImageError), end


def test_every_flipped_byte_is_noticed(elsewhere: Path, tmp_path: Path, lab: Lab) -> None:
    whole, flipped = elsewhere.read_bytes(), tmp_path / "flipped"
    for at in range(10, len(whole) - 8, max(1, len(whole) // 60)):
        flipped.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            found = archive.read(str(flipped), Notes())
        except LsmlabError:
            continue
        assert build.find(lab, full_check=True) == found.image, at  # a byte that no file's content depends on
        assert found.image.disk.read_bytes() == disk()
        cache.remove(found.image.folder)


@pytest.mark.parametrize("what", ["nothing", "folder"])
def test_a_file_that_is_none_is_told(elsewhere: Path, tmp_path: Path, what: str) -> None:
    error = refused(str(tmp_path / "none" if what == "nothing" else tmp_path))
    assert isinstance(error, HostError)
    assert ("No such file or directory" if what == "nothing" else "Is a directory") in error.message


def test_an_image_larger_than_the_disk_is_refused_before_it_is_unpacked(elsewhere: Path) -> None:
    def grown(members: Members) -> Members:
        files = json.loads(members[0][1])["files"]
        files["initrd"]["bytes"] = 1 << 50
        return manifest(files=files)(members)

    error = refused(changed(elsewhere, grown))
    assert "MiB free; the image takes up to" in error.message


def test_what_cannot_be_written_leaves_nothing(elsewhere: Path, lab: Lab, tmp_path: Path) -> None:
    archive.read(str(elsewhere), Notes())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "taken").mkdir()
    with pytest.raises(HostError, match="cannot be written: Is a directory"):
        archive.write(lab, tmp_path / "out" / "taken", Notes())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["taken"]


def test_a_key_to_guests_is_for_its_owner_alone(tmp_path: Path) -> None:
    content = b"a key"
    digest = hashlib.sha256(content).hexdigest()
    for name, mode in (("ssh-key", 0o600), ("vmlinuz", 0o644)):
        archive._unpack("it", archive._Member(name, len(content), iter([content])), tmp_path / name, digest)
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


def test_an_image_of_another_kind_is_refused(elsewhere: Path) -> None:
    """A key in the image of a lab without a network, or no tree where policies are compiled."""

    def without_tree(members: Members) -> Members:
        kept = [(m, d) for m, d in members if m.name != "policy-tree.tar"]
        about = json.loads(kept[0][1])
        del about["files"]["policy-tree.tar"]
        kept[0][0].size = len(json.dumps(about))
        return [(kept[0][0], json.dumps(about).encode()), *kept[1:]]

    error = refused(changed(elsewhere, without_tree))
    assert "none of an image of debian-13: it has other files" in error.message
