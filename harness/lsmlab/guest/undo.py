"""Undoing on a machine that is kept: a journal of what was, written before anything is changed, and the way back.

Runs on that machine beside the agent, whose operations it adds to. The journal is a folder that root alone may read:
what the files, the frameworks, auditing and the services were, and the files' contents. A run that is killed leaves it
there, and `undo` of another connection goes back by it. Nothing of it is left once all is verified to be as it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from lsmlab.guest import agent, engine, files, kernel
from lsmlab.guest.agent import Refused
from lsmlab.guest.files import Problems, Trees

FOLDER = "/var/lib/lsmlab"
FORMAT = 2
PASSES = 4
"""So often is put back what is not as it was; something else may change it meanwhile."""
MOST_NAMED = 20
OWN = frozenset({"journal.json", "journal.json.new", "lock", "objects", "vehicle"})
"""What is ever in the folder."""
LOCK_SECONDS = 20
"""How long an agent may take to end after its connection has."""
GRACE_SECONDS = 600
"""What is changed so much later than a run was last at work, somebody else has changed."""
TRANSIENT = ("/run", "/tmp", "/var/tmp", "/var/lib/docker")  # noqa: S108 - folders whose own times are everybody's
Mark = dict[str, Any]


Method = TypeVar("Method", bound=Callable[..., Any])


def _one_by_one(method: Method) -> Method:
    """Have what is asked of one journal be done one after the other, each from its beginning to its end."""

    @functools.wraps(method)
    def alone(self: Journal, *arguments: Any, **named: Any) -> Any:
        with self.turn:
            return method(self, *arguments, **named)

    return cast("Method", alone)


class Journal:
    """The journal of this machine, held by one agent at a time. Safe for all threads."""

    def __init__(self, folder: str = "") -> None:
        self.folder = folder or FOLDER
        self.turn = threading.RLock()
        """Who has it is the only one that changes anything."""
        self._lock = -1
        self._trees = Trees(f"{self.folder}/objects")
        self._marks: dict[str, Mark] = {}
        self._about: dict[str, Any] = {}
        self.auids: set[int] = set()
        """The audit user ids of all commands that were run as a service."""

    @property
    def _file(self) -> str:
        return f"{self.folder}/journal.json"

    def status(self) -> dict[str, str] | None:
        """Whose journal there is, and since when; None where there is none. Changes nothing."""
        try:
            with open(self._file, encoding="ascii") as source:
                about = json.load(source)
            return {"who": str(about["who"]), "begun": str(about["begun"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise Refused(f"{self._file}: cannot be read: {error!r:.200}") from None

    def hold(self) -> None:
        """Make the folder, where there is none, and be the only one that uses it. Raises Refused."""
        deadline = time.monotonic() + LOCK_SECONDS
        while self._lock < 0:
            try:
                self._lock = self._take()
            except (BlockingIOError, FileNotFoundError):  # another's, or removed with the folder by whoever had it
                if time.monotonic() > deadline:
                    raise Refused("another run is at work on this machine") from None
                time.sleep(0.05)

    def _take(self) -> int:
        """The lock, where nobody has it: the very file that is in the folder; -1 where that is another by now.

        Raises Refused, BlockingIOError, FileNotFoundError.
        """
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.folder, 0o700)
        there = os.lstat(self.folder)
        if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid() or there.st_mode & 0o077:
            raise Refused(f"{self.folder}: is there, and no folder that root alone may enter")
        path = f"{self.folder}/lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(lock), os.lstat(path))
        except BaseException:
            os.close(lock)
            raise
        if not same:
            os.close(lock)
        return lock if same else -1

    @_one_by_one
    def begin(
        self,
        who: str,
        trees: list[str],
        units: list[str],
        profiles: Iterable[str] = (),
        container_engine: engine.About | None = None,
    ) -> None:
        """Keep all that is to be as it is now. Nothing may be changed before this has returned.

        `profiles`: will be removed or replaced. `container_engine`: will make containers. Raises Refused, OSError.
        """
        if self._marks:
            raise Refused("what was begun here has not ended")
        self.hold()
        if self.status() is not None:
            self._drop()
            raise Refused("the journal of another run is there")
        try:
            self._keep_all(who, trees, units, list(profiles), container_engine)
        except BaseException:  # nothing was changed
            self._leave()
            raise

    def _keep_all(
        self,
        who: str,
        trees: list[str],
        units: list[str],
        profiles: list[str],
        container_engine: engine.About | None,
    ) -> None:
        self._clear()
        os.mkdir(f"{self.folder}/objects", 0o700)
        self._trees = Trees(f"{self.folder}/objects")  # of an earlier journal nothing is kept any more
        # What is written goes through links, and makes the folders that are missing
        real = sorted({_topmost_missing(os.path.realpath(path)) for path in trees})
        trees = [path for path in real if not any(_within(path, other) for other in real)]
        single = sorted({_standing(path) for path in trees})
        self._about = {
            "format": FORMAT, "who": who, "begun": time.strftime("%Y-%m-%d %H:%M:%S"), "trees": trees,
            "single": [path for path in single if not path.startswith(TRANSIENT)], "engine": container_engine,
        }  # fmt: skip
        base = self._kept(units, policy=True)
        if container_engine is not None:
            there = engine.look(container_engine)
            if there["image"] or there["runtime"] or there["containers"]:
                raise Refused(
                    f"the container engine has an image or a runtime called {container_engine['image']} already"
                )
        lost = kernel.not_kept(base["apparmor"], profiles)
        if lost:
            raise Refused(
                f"profile {', '.join(lost)}: this kernel does not give what it was loaded from, or its digest"
            )
        self._marks = {"": base}
        text = json.dumps({**self._about, "base": base})
        _write_durably(self._file, text)

    def _parts(self, units: list[str], *, keep: bool = False, policy: bool = False) -> dict[str, Callable[[], Any]]:
        """How each part of a mark is looked at."""
        save = self._save if keep else None
        about = self._about["engine"]
        return {
            "engine": lambda: None if about is None else engine.look(about),
            "files": lambda: self._trees.scan(self._about["trees"], self._about["single"], keep=keep),
            "selinux": lambda: kernel.selinux(policy=policy),
            "apparmor": lambda: kernel.apparmor(save),
            "audit": kernel.audit_rules,
            "units": lambda: kernel.units(units),
        }

    def _kept(self, units: list[str], *, policy: bool = False) -> Mark:
        """How all is now, with the contents kept. Raises Refused, OSError."""
        return {name: look() for name, look in self._parts(units, keep=True, policy=policy).items()}

    def _seen(self, was: Mark, problems: Problems) -> Mark:
        """How all is now. A part that cannot be looked at is a problem, and taken for what it was."""
        policy = bool(was["selinux"] and "policy" in was["selinux"])
        seen = dict(was)
        for name, look in self._parts(list(was["units"]), policy=policy).items():
            with problems.going_on(name):
                seen[name] = look()
        return seen

    def _at_work(self) -> None:
        """Note, for whoever undoes this, that the run is still at work."""
        os.utime(f"{self.folder}/lock")

    def _later(self) -> list[str]:
        """What differs from the journal, and was changed long after the run was last at work."""
        since = os.stat(f"{self.folder}/lock").st_mtime + GRACE_SECONDS
        base = self._marks[""]["files"]
        now = self._trees.scan(self._about["trees"], self._about["single"])
        wrong = (path for path in base.keys() | now.keys() if base.get(path) != now.get(path))
        return sorted(path for path in wrong if os.lstat(_there(path)).st_ctime > since)

    def _save(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        path = f"{self.folder}/objects/{name}"
        if not os.path.exists(path):
            with open(path, "xb") as target:
                target.write(data)
        return name

    def _load(self, name: str) -> bytes:
        with open(f"{self.folder}/objects/{name}", "rb") as source:
            return source.read()

    @_one_by_one
    def mark(self, name: str) -> None:
        """Remember how all is now. Raises Refused."""
        if not name or "" not in self._marks:
            raise Refused("nothing was begun")
        self._marks[name] = self._kept(list(self._marks[""]["units"]))
        self._at_work()

    @_one_by_one
    def restore(self, name: str) -> list[str]:
        """Have all be as it was at a mark, and see that it is; what was put back. Raises Refused."""
        was = self._marks.get(name)
        if was is None:
            raise Refused(f"no mark {name!r}")
        self._end_strays()
        done = []
        aside = Problems()  # what is wrong is seen in the passes
        with aside.going_on("lock"):
            self._at_work()
        if was["engine"]:  # before their group is stopped: a container's first process heeds no SIGTERM
            with aside.going_on("engine"):
                about = self._about["engine"]
                done += engine.remove_containers(about, was["engine"], engine.look(about), aside)
        with aside.going_on("units"):
            stopped = kernel.stop_changed(was["units"], kernel.units(list(was["units"])), aside)
            done += [f"{unit} stopped" for unit in stopped]
        words: list[str] = []
        for _ in range(PASSES):
            problems = Problems()
            now = self._seen(was, problems)
            wrong = _differences(was, now)
            if not wrong and not problems.words:
                return done
            done += self._put_back(was, now, problems)
            words = [*problems.words, *wrong]
        more = [f"and {len(words) - MOST_NAMED} more"] if len(words) > MOST_NAMED else []
        raise Refused("not as it was: " + "; ".join([*words[:MOST_NAMED], *more]))

    def _put_back(self, was: Mark, now: Mark, problems: Problems) -> list[str]:
        """Put back all that differs, part by part; what cannot be is noted, and keeps no other from it."""
        done = []
        if was["engine"]:
            done += engine.put_back(self._about["engine"], was["engine"], now["engine"], problems)
        done += self._trees.put_back(was["files"], now["files"], problems)
        if any(path.startswith("/etc/systemd/") for path in done):
            with problems.going_on("systemctl"):
                kernel.program("systemctl", "daemon-reload")
        if was["selinux"] and now["selinux"]:
            done += kernel.put_selinux_back(was["selinux"], now["selinux"], problems)
        if was["apparmor"] and now["apparmor"]:
            done += kernel.put_apparmor_back(was["apparmor"], now["apparmor"], self._load, problems)
        done += kernel.put_audit_back(was["audit"], now["audit"], problems)
        with problems.going_on("units"):
            names = list(was["units"])
            kernel.stop_changed(was["units"], kernel.units(names), problems)
            done += [f"{unit} started" for unit in kernel.start_again(was["units"], kernel.units(names), problems)]
        return done

    def _end_strays(self) -> None:
        """Kill what commands run as a service have left behind."""
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, ValueError):
                if int(agent.text_of(f"/proc/{entry}/loginuid")) in self.auids:
                    os.kill(int(entry), signal.SIGKILL)

    @_one_by_one
    def end(self) -> list[str]:
        """Go back to the beginning, verify every byte of it, and leave nothing behind; what was put back.

        Where nothing was begun, nothing is done.
        """
        if not self._marks:
            return []
        self._trees.forget()
        done = self.restore("")
        os.sync()
        os.unlink(self._file)  # from here on, nothing is to be undone
        self._leave()
        return done

    @property
    def engine_word(self) -> str:
        """What every container of ours bears; empty where none may be made now."""
        about = self._about.get("engine") if self._marks else None
        return str(about["word"]) if about else ""

    @_one_by_one
    def take_up(self, *, force: bool = False, who: str = "") -> bool:
        """Read the journal that a killed run has left. False where there is none, and what was begun is removed.

        Refused where somebody has changed what is kept since that run; with `force`, that is put back as well.
        `who`: only where it is theirs.
        """
        if self._marks:  # it is our own
            return True
        if not os.path.isdir(self.folder):
            return False
        self.hold()
        there = self.status()
        if there is None:
            self._leave()
            return False
        if who and there["who"] != who:
            self._drop()
            return False
        with open(self._file, encoding="ascii") as source:
            about = json.load(source)
        if about.get("format") != FORMAT:
            raise Refused(f"{self._file}: of another version of lsmlab; undo with that one")
        base = about.pop("base")
        self._about, self._marks = about, {"": base}
        later = [] if force else self._later()
        if later:
            self._drop()
            raise Refused(f"changed since that run ended, by somebody else: {', '.join(later[:MOST_NAMED])}")
        return True

    def _drop(self) -> None:
        """Let go of the folder, with all that is in it."""
        os.close(self._lock)
        self._lock = -1
        self._marks = {}

    def _leave(self) -> None:
        """Remove the folder, and let go of it, where nobody else has begun to use it by then. Raises Refused."""
        try:
            self._clear()
            os.unlink(f"{self.folder}/lock")
        finally:
            self._drop()
        try:
            os.rmdir(self.folder)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
                raise

    def _clear(self) -> None:
        """Remove all but the lock: what an earlier run began, before it changed anything. Raises Refused."""
        names = os.listdir(self.folder)
        strange = next((name for name in names if name not in OWN), None)
        if strange is not None:
            raise Refused(f"{self.folder}: holds {strange}, which is none of lsmlab's")
        for name in names:
            path = f"{self.folder}/{name}"
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif name != "lock":
                os.unlink(path)


def _there(path: str) -> str:
    """`path`, or the nearest of the folders to it that is there."""
    return path if os.path.lexists(path) else _standing(path)


def _standing(path: str) -> str:
    """The nearest folder above `path` that is there: its own time changes with what is in it."""
    above = os.path.dirname(path)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    return above


def _topmost_missing(path: str) -> str:
    """`path` where it is there; else the highest of the folders to it that are not."""
    while not os.path.lexists(path) and not os.path.lexists(os.path.dirname(path)):
        path = os.path.dirname(path)
    return path


def _within(path: str, other: str) -> bool:
    """Whether a scan of `other` comes by `path`: on the same file system."""
    return path.startswith(f"{other.rstrip('/')}/") and _device(path) == _device(other)


def _device(path: str) -> int:
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.lstat(path).st_dev


def _differences(was: Mark, now: Mark) -> list[str]:
    words = files.differences(was["files"], now["files"])
    words += kernel.differences(was, now)
    words += engine.differences(was["engine"], now["engine"]) if was["engine"] else []
    words += ["the audit rules are others"] if was["audit"] != now["audit"] else []
    return words + [f"{unit}: another state" for unit in was["units"] if was["units"][unit] != now["units"][unit]]


def _write_durably(path: str, text: str) -> None:
    """Whole or not at all, also where the machine loses its power: with all that was written before."""
    with open(f"{path}.new", "x", encoding="ascii") as target:
        target.write(text)
        target.flush()
        os.fsync(target.fileno())
    os.sync()
    os.rename(f"{path}.new", path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# Operations

_journal = Journal()


def journal() -> dict[str, str] | None:
    """Whose journal there is on this machine; None where there is none."""
    return _journal.status()


def begin(
    who: str,
    trees: list[str],
    units: list[str],
    profiles: list[str],
    rules: list[list[str]],
    new: list[str] | None = None,
    container_engine: dict[str, Any] | None = None,
) -> None:
    """Write the journal; then have auditing record what evidence needs, by `rules` of auditctl.

    `new`: must not be there yet, since it is removed at the end. `container_engine`: what the journal says of it
    (engine.About), and what `engine.set_up` takes.
    """
    there = next((path for path in new or () if os.path.lexists(path)), None)
    if there is not None:
        raise Refused(f"{there}: is there already, and it is somebody's")
    used = kernel.users_of(profiles, units)
    if used:
        raise Refused(f"{used}, which is no process of {', '.join(units)}: it would lose its confinement")
    others = kernel.stopped_along(units)
    if others:
        raise Refused(f"{', '.join(others)}: would be stopped with {', '.join(units)}, and not started again")
    with _journal.turn:
        given = container_engine
        _journal.begin(who, trees, units, profiles, given and given["about"])
        try:
            agent.VEHICLE = f"{_journal.folder}/vehicle"
            with open(agent.VEHICLE, "xb"):  # what the rule on commands run as a service watches
                pass
            kernel.audit_as_needed(rules)
            if given is not None:
                engine.set_up(given["about"], given["runtime"], given["program"], agent.VEHICLE)
        except BaseException:
            _journal.end()
            raise


def mark(name: str) -> None:
    """Remember how all is now."""
    _journal.mark(name)


def restore(name: str) -> list[str]:
    """Have all be as it was at a mark."""
    return _journal.restore(name)


def end() -> list[str]:
    """Undo everything, and leave nothing behind."""
    return _journal.end()


def undo(force: bool = False, who: str = "") -> list[str] | None:
    """Undo what a killed run has left; None where there is nothing. `force`: what others changed since as well.

    `who`: only what this one has begun.
    """
    with _journal.turn:
        return _journal.end() if _journal.take_up(force=force, who=who) else None


def clock(seconds: float) -> None:
    """Nothing: this machine's clock is its own, and right."""


def turn() -> threading.RLock:
    """Who has it is the only one that changes anything: what is asked meanwhile waits."""
    return _journal.turn


def engine_word() -> str:
    """See `Journal.engine_word`."""
    return _journal.engine_word


def remember(auid: int) -> None:
    """Have what runs under this audit user id be ended before the next restore."""
    _journal.auids.add(auid)


OPERATIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (journal, begin, mark, restore, end, undo, clock)
}  # fmt: skip
