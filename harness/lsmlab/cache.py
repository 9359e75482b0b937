"""The cache folder: entries are made aside and moved in whole, locked while made or used, and verified by digest.

Locks are flock(2): the kernel drops them with the process, so nothing is stale after kill -9. An entry is held together
by all that use it; whoever removes it has to hold it alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lsmlab import host, paths
from lsmlab.errors import HostError, LsmlabError, MachineError

with contextlib.suppress(ImportError):  # Windows has none, and nothing to lock: see `host.need_linux`
    import fcntl

MANIFEST = "manifest.json"
VERIFIED = "verified.json"
"""Which files, as they lie there, were read in full since this machine was booted."""
CHUNK = 1 << 22
POLL_SECONDS = 0.05
"""Between two looks at a lock that is taken: a flock(2) that waits would not see that its run was asked to stop."""
FULL_MIB = 16
"""With less than this left, a guest that fails is taken to have failed for want of space."""


@contextlib.contextmanager
def lock(
    path: Path,
    *,
    shared: bool = False,
    wait: bool = True,
    waiting: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[bool]:
    """Hold the lock file `path`; yields False where it is taken and `wait` is False.

    `waiting` is called once where it is taken. `check` is called before each look and once it is held: where it raises,
    nothing is held. Raises HostError where it is waited for, and programs are stopped (`host.stop_all`).
    """
    paths.make(path.parent)
    told = False
    while True:
        check()
        with path.open("a") as handle:
            taken = _take(handle, shared=shared)
            if taken and _is_at(handle, path):
                check()
                yield True
                return
        if taken:  # a sweep has removed the file: the next one to come would lock another
            continue
        if not wait:
            yield False
            return
        if not told:
            waiting()
            told = True
        host.check_going_on(f"waiting for {path.name}")
        time.sleep(POLL_SECONDS)


def _take(handle: IO[Any], *, shared: bool = False) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


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


@contextlib.contextmanager
def making(purpose: str, what: str) -> Iterator[Path]:
    """A scratch folder to make an entry in. Raises HostError where the disk is full while `what` is done."""
    with full_disk_is_said(what), scratch(purpose) as folder, full_disk_is_said(what):  # free space is told inside
        yield folder


@contextlib.contextmanager
def full_disk_is_said(what: str) -> Iterator[None]:
    """Raise HostError that says what to do where the block fails for want of space, `what` being in the past tense."""
    try:
        yield
    except (OSError, LsmlabError) as error:
        if not _is_for_want_of_space(error):
            raise
        raise HostError(f"{paths.cache()}: the disk is full: {free_mib()} MiB free while {what}", hint=_ROOM) from error


_ROOM = "Free some space, or set LSMLAB_HOME to a folder on a larger disk. `lsmlab images prune` may help."


def _is_for_want_of_space(error: OSError | LsmlabError) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    said = any(os.strerror(number) in error.message for number in (errno.ENOSPC, errno.EDQUOT))
    return said or (isinstance(error, MachineError) and free_mib() < FULL_MIB)


def free_mib() -> int:
    """What is left for us on the disk that the cache lies on, MiB."""
    usage = os.statvfs(next(p for p in (paths.cache(), *paths.cache().parents) if p.exists()))
    return usage.f_bavail * usage.f_frsize >> 20


def need_mib(needed: int, what: str) -> None:
    """See that there are `needed` MiB for `what`. Raises HostError that says what to do."""
    free = free_mib()
    if free < needed:
        raise HostError(f"{paths.cache()}: {free} MiB free; {what} takes up to {needed} MiB", hint=_ROOM)


def _locks() -> Path:
    return paths.cache() / "locks"


def _scratch_lock() -> Path:
    return _locks() / "scratch"


def sweep() -> list[int]:
    """Remove scratch folders whose process is gone, and locks that nobody holds; the bytes that each folder took."""
    freed = []
    root = paths.cache() / "scratch"
    with lock(_scratch_lock()):
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            # A run that ends may be removing its folder at this moment: what cannot be locked is not ours to remove
            with contextlib.suppress(OSError), (folder / ".lock").open("a") as handle:
                if _take(handle):
                    taken = size(folder)
                    remove(folder)
                    freed.append(taken - size(folder))
        for path in sorted(_locks().iterdir()):
            with lock(path, wait=False) as free:  # not the one held above
                if free:
                    path.unlink()
    return freed


@contextlib.contextmanager
def use(target: Path) -> Iterator[bool]:
    """Keep an entry from being removed while the block lasts, and note when it was used.

    Yields False where it is not there: gone since it was found, or about to be made by whoever asks.
    """
    with lock(_use_lock(target), shared=True):
        with contextlib.suppress(OSError):
            os.utime(target / MANIFEST)
        yield target.is_dir()


def _use_lock(target: Path) -> Path:
    return _locks() / f"use-{target.parent.name}-{target.name}"


def in_use(target: Path) -> bool:
    """True while somebody uses the entry. Makes nothing."""
    try:
        with _use_lock(target).open("r+b") as handle:
            return not _take(handle)
    except OSError:
        return False


def drop(target: Path) -> int | None:
    """Remove an entry; the bytes freed, or None where somebody uses it. Raises HostError where it cannot be removed."""
    with lock(_use_lock(target), wait=False) as free:  # and no scratch folder: this has to work on a full disk
        if not free:
            return None
        taken = size(target)
        _forget(target)  # first: what is half removed after kill -9 is no entry
        remove(target)
        if target.exists():
            raise _cannot_be_removed(target, f"{size(target) >> 20} MiB are left")
        return taken


def discard(target: Path) -> None:
    """Have nobody take an entry again, and remove it unless somebody uses it still. Raises HostError."""
    _forget(target)
    drop(target)


def _forget(target: Path) -> None:
    try:
        (target / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_be_removed(target, error.strerror or str(error)) from error


def _cannot_be_removed(folder: Path, why: str) -> HostError:
    return HostError(f"{folder}: cannot be removed: {why}", hint="See whose files these are, and remove them yourself.")


def size(folder: Path) -> int:
    """The bytes that the files below `folder` take on the disk; what vanishes meanwhile takes none."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_blocks * 512  # noqa: PTH118 - os.walk gives text
    return total


def builds(pattern: Path) -> list[Path]:
    """The entries whose path fits `pattern`, newest first. Each build has a folder of its own: others may be in use."""
    found = []
    for folder in pattern.parent.glob(pattern.name):
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            status = folder.stat()
            if stat.S_ISDIR(status.st_mode):
                found.append((status.st_mtime_ns, folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def remove(folder: Path) -> None:
    """Delete a folder. Files of a user namespace's other ids are deleted in such a namespace. Never raises."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists() and os.geteuid() != 0:
        with contextlib.suppress(Exception):
            argv = host.in_namespace(["rm", "-rf", "--", str(folder)])
            host.run(argv, what="removing a work folder", cleaning=True)


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
    (finished / VERIFIED).write_text("{}", "utf-8")  # there already: a folder's own time is when its entry was made
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
    """What is wrong with a cache entry, or an empty text.

    `full`: every byte was read and digested, now or before: once for each boot of this machine, and again whenever a
    file is another one or was touched.
    """
    known = _verified(target) if full else {}
    seen: dict[str, list[Any]] = {}
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not {"sha256", "bytes"} <= entry.keys():
            return f"the manifest says nothing of {name}"
        path = target / name
        if not path.is_file():
            return f"{name} is missing"
        status = path.stat()
        if status.st_size != entry["bytes"]:
            return f"{name} has {status.st_size} bytes, expected {entry['bytes']}"
        seen[name] = [entry["sha256"], status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, _boot_id()]
        if full and known.get(name) != seen[name] and file_digest(path) != entry["sha256"]:
            return f"{name} is damaged: its digest is not the one in the manifest"
    if full and known != seen:
        _remember(target, seen)
    return ""


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _verified(target: Path) -> dict[str, Any]:
    try:
        found = json.loads((target / VERIFIED).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(target: Path, seen: Mapping[str, list[Any]]) -> None:
    with contextlib.suppress(OSError):  # then every byte is read again the next time, as where half of it is written
        (target / VERIFIED).write_text(json.dumps(seen), "utf-8")  # in place: nothing else touches the folder's time
