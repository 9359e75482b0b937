"""A finished image as one file: made on one machine, taken into another's cache, where nothing can be built.

A tar file, compressed with gzip: the image's manifest, and then the files that it names, with their digests. An archive
may come from anywhere. So it is read header by header, and none but a plain file's is taken: extended ones may be of
any size. Members are written by the manifest's names alone, of the sizes that it says, and a disk whose header names
other files is refused.
"""

from __future__ import annotations

import contextlib
import datetime
import gzip
import hashlib
import json
import os
import secrets
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lsmlab import cache, discovery
from lsmlab.errors import DamagedError, DefinitionError, HostError, ImageError
from lsmlab.image import build, cloud, qcow2
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.progress import Progress

LEVEL = 1
"""gzip's: a twentieth larger than with 4, in half the time."""
MOST_MANIFEST = 1 << 20
MOST_DISK = 1 << 37
"""Bytes; a cloud image is as large as its distribution makes it, and no distribution makes one so large."""
PRIVATE = frozenset({cloud.KEY})
"""Who has it may log in to guests of this image, for as long as they run, from this machine alone."""
AGAIN = "Export it again, or fetch it again."


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive that was written. `sha256` of the whole file, hexadecimal."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class Imported:
    """An image that came from an archive; `there`: the cache had it already."""

    image: Image
    there: bool


# Out


def write(lab: Lab, target: Path, progress: Progress) -> Archive:
    """Write the lab's image, built where there is none, to the file `target`: in one step, or not at all.

    Raises HostError where it cannot be written, and what `build.ensure` raises.
    """
    with contextlib.ExitStack() as uses:
        image = build.ensure(lab, progress, uses=uses)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        task = f"image {lab.id}"
        try:
            if lab.cloud_image is not None:
                draft.touch(0o600)  # with the key to its guests in it
            with draft.open("wb") as raw:
                hashed = _Hashed(raw)
                _write_members(image.folder, hashed, progress, task)
                raw.flush()
                os.fsync(raw.fileno())
            draft.replace(target)
        except OSError as error:
            raise HostError(f"{target}: cannot be written: {error.strerror or error}") from error
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        progress.done(task)
    return Archive(target, hashed.digest.hexdigest())


class _Hashed:
    """A file to write to that keeps the digest of what was written."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._raw.write(data)

    def tell(self) -> int:
        return self._raw.tell()

    def flush(self) -> None:
        self._raw.flush()


def _write_members(folder: Path, to: Any, progress: Progress, task: str) -> None:
    manifest = cache.read_manifest(folder)
    assert manifest is not None
    names = sorted(manifest["files"])
    total = sum((folder / name).stat().st_size for name in names)
    done = 0
    with tarfile.open(fileobj=to, mode="w:gz", compresslevel=LEVEL, format=tarfile.GNU_FORMAT) as archive:
        for name in (cache.MANIFEST, *names):
            progress.step(task, f"writing {name}: {done * 100 // total} % done")
            member = tarfile.TarInfo(name)
            member.size, member.mode = (folder / name).stat().st_size, 0o600 if name in PRIVATE else 0o644
            with (folder / name).open("rb") as content:
                archive.addfile(member, content)
            done += member.size if name != cache.MANIFEST else 0


# In


def read(source: str, progress: Progress, *, sha256: str = "") -> Imported:
    """Take an image from an archive, a file or an http(s) address, into the cache. `sha256`: the file's, if known.

    Raises HostError, DownloadError; DamagedError where the archive is not whole or is none, ImageError where it fits no
    lab here.
    """
    from lsmlab import download  # noqa: PLC0415 - its library takes a moment that no other command has to wait for

    task = "import"
    with contextlib.ExitStack() as held:
        if download.is_address(source):
            path = held.enter_context(download.fetched(source, progress, task))
            source = download.shown(source)
        else:
            path = Path(source)
        try:
            raw = held.enter_context(path.open("rb"))
            if sha256:
                progress.step(task, "computing the digest")
                _see_digest(source, path, sha256)
        except OSError as error:
            raise HostError(f"{source}: {error.strerror or error}") from error
        try:
            imported = _read(source, held.enter_context(gzip.open(raw)), progress, task)
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DamagedError(f"{source}: is no whole archive of an image: {error}", hint=AGAIN) from error
    progress.done(task)
    return imported


def _see_digest(source: str, path: Path, sha256: str) -> None:
    found = cache.file_digest(path)
    if found != sha256.lower():
        raise DamagedError(f"{source}: its SHA-256 is {found}, expected {sha256.lower()}", hint=AGAIN)


@dataclass(frozen=True, slots=True)
class _Member:
    """A plain file of an archive, to be read before the next. `size` in bytes."""

    name: str
    size: int
    pieces: Iterator[bytes]


def _walk(source: str, archive: gzip.GzipFile) -> Iterator[_Member]:
    """The archive's files, one header after the other. Raises DamagedError at anything that is no plain file."""
    while True:
        block = _exactly(archive, tarfile.BLOCKSIZE)
        if not any(block):
            return
        header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        if header.type != tarfile.REGTYPE or header.size < 0:
            raise DamagedError(f"{source}: {header.name!r:.100} is no plain file", hint=AGAIN)
        yield _Member(header.name, header.size, _pieces(archive, header.size))
        _exactly(archive, -header.size % tarfile.BLOCKSIZE)


def _pieces(archive: gzip.GzipFile, size: int) -> Iterator[bytes]:
    while size:
        piece = _exactly(archive, min(size, cache.CHUNK))
        size -= len(piece)
        yield piece


def _exactly(archive: gzip.GzipFile, size: int) -> bytes:
    data = archive.read(size)
    if len(data) < size:
        raise EOFError("it ends too early")
    return data


def _read(source: str, archive: gzip.GzipFile, progress: Progress, task: str) -> Imported:
    with contextlib.ExitStack() as held:
        members = _walk(source, archive)
        manifest = _manifest(source, next(members, None))
        lab = _lab(source, manifest)
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        with cache.lock(build.lock_of(lab), waiting=lambda: progress.step(task, "another run has this image; waiting")):
            there = build.find(lab, full_check=True)
            if there is not None and there.digest == manifest["files"]["disk.qcow2"]["sha256"]:
                return Imported(there, there=True)
            work = held.enter_context(cache.making("import", f"{source} was unpacked"))
            cache.need_mib(sum(sizes.values()) >> 20, "the image")
            for member in _expected(source, members, sizes):
                progress.step(task, f"unpacking {member.name} ({member.size >> 20} MiB)")
                _unpack(source, member, work / member.name, manifest["files"][member.name]["sha256"])
            see_plain_disk(work / "disk.qcow2", lab.disk.disk_mib << 20, or_more=lab.cloud_image is not None)
            about = {key: value for key, value in manifest.items() if key != "files"}
            about["imported"] = {
                "from": source,
                "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            folder = build.folder_of(lab, secrets.token_hex(3))
            cache.publish(work, folder, tuple(sizes), about)
    image = build.find(lab)
    if image is None or image.folder != folder:
        raise ImageError(f"{folder}: the image vanished while it was put in place")
    return Imported(image, there=False)


def _manifest(source: str, member: _Member | None) -> dict[str, Any]:
    """The archive's first member. Raises DamagedError where it is no image's manifest."""
    if member is None or member.name != cache.MANIFEST or member.size > MOST_MANIFEST:
        raise DamagedError(f"{source}: is no archive of an image: it does not begin with {cache.MANIFEST}")
    try:
        found = json.loads(b"".join(member.pieces))
        files = found["files"]
        plain = all(
            type(entry["bytes"]) is int and entry["bytes"] >= 0 and len(bytes.fromhex(entry["sha256"])) == 32
            for entry in files.values()
        )
        texts = all(type(found[key]) is str for key in ("lab", "recipe", "built", "kernel_release", "root_arguments"))
        names = type(found["asked"]) is list and all(type(name) is str for name in found["asked"])
        versions = all(type(part) is str for pair in found["packages"].items() for part in pair)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{source}: its manifest is none of an image: {error!r:.200}") from error
    if not (plain and texts and names and versions) or not set(build.FILES) <= set(files):
        raise DamagedError(f"{source}: its manifest is none of an image")
    return dict(found)


def _lab(source: str, manifest: dict[str, Any]) -> Lab:
    """The lab that the image is of, as it is known here. Raises ImageError where its images are made otherwise here."""
    try:
        lab = discovery.load_lab(manifest["lab"]).with_packages(manifest["asked"])
    except DefinitionError as error:
        raise ImageError(
            f"{source}: an image of a lab that is not known here: {error.message}", hint=error.hint
        ) from None
    if build.recipe_digest(lab) != manifest["recipe"]:
        raise ImageError(
            f"{source}: an image of {lab.id} as another version of lsmlab, or of the lab's file, makes it",
            hint="Export it with the version and the lab's file that are used here.",
        )
    if set(manifest["files"]) != set(build.files_of(lab)):
        raise DamagedError(f"{source}: its manifest is none of an image of {lab.id}: it has other files")
    return lab


def _expected(source: str, members: Iterator[_Member], sizes: dict[str, int]) -> Iterator[_Member]:
    """The files that the manifest names, each once and as large as it says. Raises DamagedError at any other member."""
    left = dict(sizes)
    for member in members:
        if left.pop(member.name, None) != member.size:
            raise DamagedError(f"{source}: {member.name!r:.100} is not what the manifest says", hint=AGAIN)
        yield member
    if left:
        raise DamagedError(f"{source}: {min(left)} is missing", hint=AGAIN)


def _unpack(source: str, member: _Member, target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with target.open("xb") as handle:
        for piece in member.pieces:
            digest.update(piece)
            handle.write(piece)
    target.chmod(0o600 if target.name in PRIVATE else 0o644)
    if digest.hexdigest() != sha256:
        raise DamagedError(f"{source}: {target.name} is damaged: its digest is not the one in the manifest", hint=AGAIN)


def see_plain_disk(path: Path, size: int, *, or_more: bool = False) -> None:
    """See that a disk is qcow2, of `size` bytes or more up to MOST_DISK, and a file of its own. Raises DamagedError."""
    virtual = qcow2.size_of_plain(path)
    if virtual != size and not (or_more and size < virtual <= MOST_DISK):
        raise DamagedError(f"{path.name}: is a disk of {virtual} bytes, expected {size}")


def default_name(lab: Lab) -> Path:
    """What an archive of the lab's image is called where no name is given."""
    return Path(f"{lab.id}.image.tar.gz")
