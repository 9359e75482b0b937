"""The cache folder: entries are made aside and moved in whole, locked while made or used, and verified by digest.

Locks are flock(2): the kernel drops them with the process, so nothing is stale after kill -9.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lsmlab import paths
from lsmlab.errors import HostError

MANIFEST = "manifest.json"
CHUNK = 1 << 22


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`; yields False where it is taken and `wait` is False."""
    paths.make(path.parent)
    with path.open("a") as handle:
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """A folder of this process's own in the cache, gone afterwards; after kill -9 the next `sweep` removes it."""
    root = paths.make(paths.cache() / "scratch")
    with contextlib.ExitStack() as held:
        with lock(_scratch_lock()):  # a sweep does not see the folder before its own lock is held
            folder = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=root))
            held.callback(remove, folder)
            held.enter_context(lock(folder / ".lock"))
        yield folder


def _scratch_lock() -> Path:
    return paths.cache() / "locks" / "scratch"


def sweep() -> int:
    """Remove the scratch folders whose process is gone; how many there were."""
    count = 0
    root = paths.cache() / "scratch"
    with lock(_scratch_lock()):
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            # A run that ends may be removing its folder at this moment: what cannot be locked is not ours to remove
            with contextlib.suppress(OSError), (folder / ".lock").open("a") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)
                count += 1
    return count


def remove(folder: Path) -> None:
    """Delete a folder. Files of a user namespace's other ids are deleted in such a namespace. Never raises."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists() and os.geteuid() != 0:
        from lsmlab import host  # noqa: PLC0415 - only where plain deletion did not do

        with contextlib.suppress(Exception):
            host.run(host.in_namespace(["rm", "-rf", "--", str(folder)]), what="removing a work folder")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    total = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()


def publish(folder: Path, target: Path, files: tuple[str, ...], about: Mapping[str, Any]) -> None:
    """Move finished `files` of `folder` to `target` with a manifest of their digests; in one step, or not at all."""
    for name in files:
        with (folder / name).open("rb") as handle:
            os.fsync(handle.fileno())
    manifest = {**about, "files": {name: _entry(folder / name) for name in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")
    finished = folder / "finished"
    finished.mkdir()
    for name in (*files, MANIFEST):
        (folder / name).rename(finished / name)
    paths.make(target.parent)
    if target.exists():
        remove(target)
    try:
        finished.rename(target)
    except OSError as error:
        raise HostError(f"{target}: cannot be put in place: {error.strerror or error}") from error


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def read_manifest(target: Path) -> dict[str, Any] | None:
    """The manifest of a cache entry, or None where there is none or it cannot be read."""
    try:
        found = json.loads((target / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else None


def damage(target: Path, manifest: Mapping[str, Any], *, full: bool) -> str:
    """What is wrong with a cache entry, or an empty text. `full`: read and digest every byte."""
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not {"sha256", "bytes"} <= entry.keys():
            return f"the manifest says nothing of {name}"
        path = target / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}"
        if full and file_digest(path) != entry["sha256"]:
            return f"{name} is damaged: its digest is not the one in the manifest"
    return ""


@contextlib.contextmanager
def in_use(*, exclusive: bool = False) -> Iterator[bool]:
    """Runs hold the cache together; pruning holds it alone, and yields False while a run holds it."""
    with lock(paths.make(paths.cache() / "locks") / "use", shared=not exclusive, wait=not exclusive) as held:
        yield held
