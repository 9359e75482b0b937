"""Trees of files on a machine that is kept: what is there, and putting back what was, with rights, labels and times.

Runs there, beside the agent: see undo.py. Nothing but Python's own library, 3.9 or later.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any

from lsmlab.guest.agent import Refused

Entry = dict[str, Any]
"""What is kept of a file: kind, mode, uid, gid, mtime in ns, xattrs; of a regular one its digest and links as well, of
a symbolic one its target."""
PASSING = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "pipe"}
"""Nothing is in them, and their programs make them anew: one that is gone is not made, and is no difference either."""
UNREAD = "unread"
"""The kind of what is there and cannot be looked at. It is never as wanted, and is let alone."""
TOO_LARGE = "too large"
"""The digest of a file that is larger than any that is kept."""
MOST_ENTRIES = 100_000
MOST_BYTES = 512 << 20
"""More is not copied aside: a scenario that touches such a tree is refused."""
SETTLED_NS = 1_000_000_000
"""What was changed in the last second is read again: a file's time is that of the kernel's last tick."""
LABEL = "security.selinux"
DRAFT = ".lsmlab-"


class Problems:
    """What could not be done, in words: the rest is done all the same."""

    def __init__(self) -> None:
        self.words: list[str] = []

    @contextlib.contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Note what goes wrong in the block, with `what` it was about, and go on behind it."""
        try:
            yield
        except Refused as error:
            self.words.append(str(error))
        except OSError as error:
            self.words.append(f"{what}: {error.strerror or error}")


class Trees:
    """Trees and single files, as they are. Contents are kept below `objects`, each by its digest.

    Sockets and pipes are exempt: see `PASSING`.
    """

    def __init__(self, objects: str) -> None:
        self._objects = objects
        self._known: dict[str, tuple[tuple[int, ...], Entry]] = {}
        self._bytes = 0

    def forget(self) -> None:
        """Read everything anew from now on."""
        self._known.clear()

    def scan(self, trees: Iterable[str], single: Iterable[str], *, keep: bool = False) -> dict[str, Entry]:
        """Every file of `trees`, and each of `single` without what is in it. What is absent is not in the answer.

        `keep`: see that the contents are in the objects. Mounts below a tree are not entered; with `keep` they are
        refused, but for a tree of its own: what is in them would not be put back.
        """
        trees = tuple(trees)
        found: dict[str, Entry] = {}
        left = list(trees)
        devices = {path: there.st_dev for path in left if (there := _lstat(path)) is not None}
        while left:
            path = left.pop()
            there = self._see(path, found, keep=keep)
            if there is None:
                continue
            if keep and len(found) > MOST_ENTRIES:
                raise Refused(f"{path}: more than {MOST_ENTRIES} files would have to be kept")
            device = devices.setdefault(path, there.st_dev)
            if keep and stat.S_ISDIR(there.st_mode) and there.st_dev != device and path not in trees:
                raise Refused(f"{path}: another file system is mounted there, or a subvolume, and would not be kept")
            if stat.S_ISDIR(there.st_mode) and there.st_dev == device:
                with contextlib.suppress(FileNotFoundError if keep else OSError):
                    for name in os.listdir(path):
                        below = path.rstrip("/") + "/" + name
                        devices[below] = device
                        left.append(below)
        for path in single:
            if path not in found:
                self._see(path, found, keep=keep)
        return found

    def _see(self, path: str, found: dict[str, Entry], *, keep: bool) -> os.stat_result | None:
        """Add to `found` what is at `path`; where there is nothing, or nothing that can be looked at, None."""
        try:
            there = _lstat(path)
            if there is not None:
                found[path] = self._look(path, there, keep=keep)
        except FileNotFoundError:  # removed meanwhile: the next look says so
            return None
        except OSError as error:
            if keep:
                raise
            found[path] = {"kind": UNREAD, "why": error.strerror or str(error)}
            return None
        return there

    def _look(self, path: str, there: os.stat_result, *, keep: bool) -> Entry:
        if keep and stat.S_ISREG(there.st_mode) and there.st_size > MOST_BYTES:
            raise Refused(f"{path}: {there.st_size} bytes are too many to keep")
        stamp = _stamp(there)
        known = self._known.get(path)
        if known is not None and known[0] == stamp:
            entry = known[1]
        else:
            begun = time.time_ns()
            entry = _entry(path, there)
            if begun - there.st_ctime_ns > SETTLED_NS:
                self._known[path] = (stamp, entry)
        if keep and entry["kind"] == "file":
            self._keep(path, entry)
        return entry

    def _keep(self, path: str, entry: Entry) -> None:
        digest = entry["digest"]
        target = f"{self._objects}/{digest}"
        if os.path.exists(target):
            return
        draft = f"{self._objects}/{DRAFT}{secrets.token_hex(8)}"
        copy = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(copy, "wb") as into, _reading(path) as source:
            if LABEL in entry["xattrs"]:  # no more open than the file itself, to whom a policy holds
                os.setxattr(draft, LABEL, base64.b64decode(entry["xattrs"][LABEL]))
            shutil.copyfileobj(source, into, 1 << 20)
            self._bytes += into.tell()
        if self._bytes > MOST_BYTES:
            raise Refused(f"{path}: with it, more than {MOST_BYTES >> 20} MiB would have to be kept")
        with open(draft, "rb") as again:
            if _digest(again) != digest:
                os.unlink(draft)
                raise Refused(f"{path}: changes while it is read")
        os.rename(draft, target)

    def put_back(self, wanted: dict[str, Entry], found: dict[str, Entry], problems: Problems) -> list[str]:
        """Make what was `found` what is `wanted`; the files that were changed for it. One that cannot be is noted."""
        changed = []
        for path in sorted(found.keys() - wanted.keys(), reverse=True):
            with problems.going_on(path):
                _remove(path)
                changed.append(path)
        for path in sorted(wanted):
            if not _as_wanted(wanted[path], found.get(path)):
                with problems.going_on(path):
                    self._restore(path, wanted[path], found.get(path))
                    changed.append(path)
        folders = (path for path, entry in wanted.items() if entry["kind"] == "dir")
        for path in sorted(folders, reverse=True):  # last, and the deepest first: each change in a folder is one of it
            with problems.going_on(path):
                there = _lstat(path)
                if there is not None and there.st_mtime_ns != wanted[path]["mtime"]:
                    os.utime(path, ns=(there.st_atime_ns, wanted[path]["mtime"]))
        return changed

    def _restore(self, path: str, entry: Entry, there: Entry | None) -> None:
        if there is not None and there["kind"] == UNREAD:
            raise Refused(f"{path}: cannot be looked at: {there['why']}")
        if there is not None and there["kind"] != entry["kind"]:
            _remove(path)
            there = None
        kind = entry["kind"]
        if kind in PASSING.values() and there is None:
            return
        if kind == "dir" and there is None:
            os.mkdir(path, 0o700)
        elif kind == "link" and (there is None or there["target"] != entry["target"]):
            draft = _draft(path)
            os.symlink(entry["target"], draft)
            os.rename(draft, path)
        elif kind == "file" and (there is None or there["digest"] != entry["digest"]):
            if there is not None and there["links"] == entry["links"] > 1:
                with open(f"{self._objects}/{entry['digest']}", "rb") as source, open(path, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            else:
                self._replace(path, entry)
        elif kind == "other" and there is None:
            os.mknod(path, entry["type"] | 0o600, entry["device"])
        _dress(path, entry)

    def _replace(self, path: str, entry: Entry) -> None:
        """By a rename: nobody sees half a file, or one that is more open than it was."""
        with open(f"{self._objects}/{entry['digest']}", "rb") as source:
            draft = _draft(path)
            fresh = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(fresh, "wb") as target:
                    if LABEL in entry["xattrs"]:
                        os.setxattr(draft, LABEL, base64.b64decode(entry["xattrs"][LABEL]))
                    shutil.copyfileobj(source, target, 1 << 20)
                    target.flush()
                    os.fsync(target.fileno())
                _dress(draft, entry)
                os.rename(draft, path)
            except OSError:
                os.unlink(draft)
                raise


def differences(wanted: dict[str, Entry], found: dict[str, Entry]) -> list[str]:
    """What is not as wanted, in words, file by file."""
    words = []
    for path in sorted(wanted.keys() | found.keys()):
        was, now = wanted.get(path), found.get(path)
        if _as_wanted(was, now):
            continue
        if was is None:
            words.append(f"{path}: was not there")
        elif now is None:
            words.append(f"{path}: is gone")
        else:
            keys = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
            words.append(f"{path}: another {', '.join(keys)}")
    return words


def _as_wanted(was: Entry | None, now: Entry | None) -> bool:
    return was == now or (was is not None and was["kind"] in PASSING.values() and now is None)


def _draft(path: str) -> str:
    return f"{os.path.dirname(path)}/{DRAFT}{secrets.token_hex(8)}"


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _stamp(there: os.stat_result) -> tuple[int, ...]:
    return (
        there.st_dev, there.st_ino, there.st_mode, there.st_uid, there.st_gid, there.st_nlink, there.st_size,
        there.st_mtime_ns, there.st_ctime_ns,
    )  # fmt: skip


def _entry(path: str, there: os.stat_result) -> Entry:
    entry = {
        "mode": stat.S_IMODE(there.st_mode), "uid": there.st_uid, "gid": there.st_gid, "mtime": there.st_mtime_ns,
        "xattrs": _xattrs(path),
    }  # fmt: skip
    if stat.S_ISREG(there.st_mode):
        with _reading(path) as source:
            digest = _digest(source) if there.st_size <= MOST_BYTES else TOO_LARGE
        return {**entry, "kind": "file", "digest": digest, "links": there.st_nlink}
    if stat.S_ISLNK(there.st_mode):
        return {**entry, "kind": "link", "target": os.readlink(path)}
    if stat.S_ISDIR(there.st_mode):
        return {**entry, "kind": "dir"}
    if stat.S_IFMT(there.st_mode) in PASSING:
        return {**entry, "kind": PASSING[stat.S_IFMT(there.st_mode)], "mtime": 0}  # whoever uses it changes its time
    return {**entry, "kind": "other", "type": stat.S_IFMT(there.st_mode), "device": there.st_rdev}


def _reading(path: str) -> Any:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.fdopen(os.open(path, flags | os.O_NOATIME), "rb")
    except PermissionError:
        return os.fdopen(os.open(path, flags), "rb")


def _digest(source: Any) -> str:
    made = hashlib.sha256()
    while chunk := source.read(1 << 20):
        made.update(chunk)
    return made.hexdigest()


def _xattrs(path: str) -> dict[str, str]:
    """Labels, ACLs, capabilities and users' own, in base64."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    return {name: base64.b64encode(os.getxattr(path, name, follow_symlinks=False)).decode() for name in sorted(names)}


def _dress(path: str, entry: Entry) -> None:
    """Give a file its owner, rights, attributes and time; in this order: each may undo the one before."""
    link = entry["kind"] == "link"
    there = os.lstat(path)
    if (there.st_uid, there.st_gid) != (entry["uid"], entry["gid"]):
        os.chown(path, entry["uid"], entry["gid"], follow_symlinks=False)
    if not link and stat.S_IMODE(os.lstat(path).st_mode) != entry["mode"]:
        os.chmod(path, entry["mode"])
    have = _xattrs(path)
    for name in have.keys() - entry["xattrs"].keys():
        os.removexattr(path, name, follow_symlinks=False)
    for name, value in entry["xattrs"].items():
        if have.get(name) != value:
            os.setxattr(path, name, base64.b64decode(value), follow_symlinks=False)
    if entry["kind"] not in PASSING.values():
        os.utime(path, ns=(os.lstat(path).st_atime_ns, entry["mtime"]), follow_symlinks=False)


def _remove(path: str) -> None:
    """Remove a file, or a folder with all that is in it; what is mounted there is not touched. Raises Refused."""
    there = _lstat(path)
    if there is None:
        return
    if os.path.ismount(path):
        raise Refused(f"{path}: something is mounted there")
    if stat.S_ISDIR(there.st_mode):
        for name in os.listdir(path):
            _remove(f"{path}/{name}")
        os.rmdir(path)
    else:
        os.unlink(path)
