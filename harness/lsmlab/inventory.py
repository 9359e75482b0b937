"""What lies in the cache: images, saved guests, compiled policies, what containers are made of.

Clearing it, and keeping it within its limit.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lsmlab import cache, discovery, host, paths
from lsmlab.errors import DefinitionError, HostError, LsmlabError
from lsmlab.image import build, container
from lsmlab.lab import Lab
from lsmlab.machine import states
from lsmlab.machine.hardware import CPU, Hardware
from lsmlab.machine.qemu import QEMU
from lsmlab.progress import Progress

IMAGE, STATE, POLICY, DOWNLOAD, CONTAINER = "image", "saved guest", "policy", "download", "container image"
KINDS = {"images": IMAGE, "states": STATE, "policies": POLICY, container.FOLDER: CONTAINER, "downloads": DOWNLOAD}
LIMIT_VARIABLE = "LSMLAB_CACHE_LIMIT"
LIMIT_GIB = "20"
NAMED = 3
"""How many of the removed are named in one line."""


class Status(StrEnum):
    """What an entry is good for."""

    CURRENT = "current"
    STALE = "stale"
    """No run would use it."""
    DAMAGED = "damaged"
    UNFINISHED = "unfinished"
    """A download: the same command goes on where it stopped."""
    UNKNOWN_LAB = "unknown lab"
    """Of a lab that is not known in the current folder: a run elsewhere may use it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the cache. `size`: what it takes on the disk, bytes. `image`: the digest of its disk."""

    kind: str
    name: str
    folder: Path
    size: int
    made: datetime.datetime
    used: datetime.datetime
    status: Status
    in_use: bool
    image: str

    @property
    def mib(self) -> int:
        """Its size, MiB."""
        return self.size >> 20

    def standing(self) -> str:
        """Its status, and whether it is in use, for people."""
        return f"{self.status}, in use" if self.in_use else self.status.value

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        made, used = (moment.isoformat(timespec="seconds") for moment in (self.made, self.used))
        return {
            "kind": self.kind, "name": self.name, "mib": self.mib, "made": made, "used": used,
            "status": self.status.value, "in_use": self.in_use,
        }  # fmt: skip


def since(moment: datetime.datetime) -> str:
    """How long ago it was, in words."""
    minutes = int((datetime.datetime.now(datetime.UTC) - moment).total_seconds() // 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} days"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What runs from the current folder would use, of the labs that are known there."""

    labs: frozenset[str]
    images: Mapping[str, str]
    """Folder name to digest."""
    states: Mapping[str, Mapping[str, Any]]
    """Folder name without the build's own part, to all that the state has to fit."""


def entries() -> list[Entry]:
    """Everything in the cache, images first."""
    folders = [(kind, folder) for name, kind in KINDS.items() for folder in cache.builds(paths.cache() / name / "*")]
    if not folders:
        return []
    wanted = _wanted()
    elsewhere: set[str] = set()
    found = []
    for kind, folder in sorted(folders, key=lambda pair: (list(KINDS.values()).index(pair[0]), pair[1])):
        try:
            entry = _entry(kind, folder, wanted, elsewhere)
        except FileNotFoundError:
            continue  # it is being removed
        if entry.kind == IMAGE and entry.status is Status.UNKNOWN_LAB:
            elsewhere.add(entry.image)
        found.append(entry)
    return found


def listed(found: Iterable[Entry]) -> list[list[Entry]]:
    """`found` as it is listed: each on its own, but all policies together that stand alike. Their names say nothing."""
    lines: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        lines.setdefault((entry.kind, entry.standing() if entry.kind == POLICY else entry.name), []).append(entry)
    return list(lines.values())


def total(found: Sequence[Entry]) -> str:
    """How much `found` takes, and how much it may, for people. Raises DefinitionError for a limit that is no number."""
    words = _limit()
    limit = f"{words} GiB are kept at most" if _limit_bytes(words) else "no limit is set"
    return f"{sum(entry.size for entry in found) / (1 << 30):.1f} GiB in all; {limit} ({LIMIT_VARIABLE})."


def _wanted() -> _Wanted:
    labs: set[str] = set()
    images: dict[str, str] = {}
    fitting: dict[str, Mapping[str, Any]] = {}
    version = host.version(QEMU, "--version")
    for lab in _labs():
        labs.add(lab.id)
        image = build.find(lab)
        if image is None:
            continue
        images[image.folder.name] = image.digest
        for accelerator in CPU:
            hardware = Hardware(accelerator, lab.memory_mib, version, image.network)
            for kernel in lab.kernel_arguments:
                key = states.folder_of(lab, image, kernel, hardware, "").name
                fitting[key] = states.fits(lab, image, kernel, hardware)
    return _Wanted(frozenset(labs), images, fitting)


def _labs() -> Iterator[Lab]:
    """Every lab, and each with the packages that a scenario has asked for: its images name them."""
    for name in discovery.labs().ids:
        with contextlib.suppress(LsmlabError):  # what it would use is not known
            lab = discovery.load_lab(name)
            manifests = map(cache.read_manifest, cache.builds(paths.cache() / "images" / f"{lab.id}-*"))
            asked = {tuple(m.get("asked", ())) for m in manifests if m is not None}
            yield from {one.disk: one for one in (lab, *(lab.with_packages(packages) for packages in asked))}.values()


def _entry(kind: str, folder: Path, wanted: _Wanted, elsewhere: set[str]) -> Entry:
    manifest = cache.read_manifest(folder)
    made = folder.stat().st_mtime
    used = (folder / cache.MANIFEST).stat().st_mtime if manifest is not None else made
    made_at, used_at = (datetime.datetime.fromtimestamp(moment, datetime.UTC) for moment in (made, used))
    return Entry(
        kind=kind,
        name=folder.name,
        folder=folder,
        size=cache.size(folder),
        made=made_at,
        used=used_at,
        status=_status(kind, folder, manifest, wanted, elsewhere),
        in_use=cache.in_use(folder),
        image=_image(kind, manifest or {}),
    )


def _image(kind: str, manifest: dict[str, Any]) -> str:
    disk = manifest.get("files", {}).get("disk.qcow2") if kind == IMAGE else None
    return str((disk.get("sha256", "") if isinstance(disk, dict) else "") or manifest.get("image", ""))


def _status(kind: str, folder: Path, manifest: dict[str, Any] | None, wanted: _Wanted, elsewhere: set[str]) -> Status:
    if kind == DOWNLOAD:
        return Status.UNFINISHED
    if manifest is None:
        return Status.DAMAGED
    if kind == CONTAINER:  # made of what a scenario names, which may lie in another folder: none is stale
        return Status.DAMAGED if cache.damage(folder, manifest, full=False) else Status.CURRENT
    if kind == IMAGE:
        damaged, current = build.damage(folder, manifest, full=False), folder.name in wanted.images
        unknown = manifest.get("lab") not in wanted.labs
    elif kind == STATE:
        fitting = wanted.states.get(folder.name.rpartition("-")[0] + "-")
        damaged, current = states.damage(folder, fitting or {}, full=False), fitting is not None
        unknown = manifest.get("lab") not in wanted.labs
    else:
        image = _image(kind, manifest)
        damaged, current = cache.damage(folder, manifest, full=False), image in wanted.images.values()
        unknown = image in elsewhere
    if damaged:
        return Status.DAMAGED
    if current:
        return Status.CURRENT
    return Status.UNKNOWN_LAB if unknown else Status.STALE


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune` did. `freed` and `leftovers` in bytes; the leftovers are those of killed runs, and part of it."""

    removed: list[Entry]
    kept: list[tuple[Entry, str]]
    """What was to go and is in use, or of an unknown lab: with the reason."""
    failed: list[HostError]
    leftovers: int
    freed: int


def prune(*, everything: bool) -> Pruned:
    """Delete what no run would use, or everything; never what is in use. Raises HostError for a cache out of reach."""
    removed, kept, failed = list[Entry](), list[tuple[Entry, str]](), list[HostError]()
    freed = leftovers = sum(cache.sweep())
    for entry in entries():
        if entry.status is Status.UNKNOWN_LAB and not everything:
            kept.append((entry, "its lab is not known in this folder; --all removes it"))
        elif everything or entry.status is not Status.CURRENT:
            try:
                taken = cache.drop(entry.folder)
            except HostError as error:
                failed.append(error)
                freed += entry.size - cache.size(entry.folder)
                continue
            if taken is None:
                kept.append((entry, "in use"))
            else:
                removed.append(entry)
                freed += taken
    return Pruned(removed, kept, failed, leftovers, freed)


class Limit:
    """The cache's limit: $LSMLAB_CACHE_LIMIT in GiB, 0 for none. Raises DefinitionError where it is no such number."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._words = _limit()
        self._bytes = _limit_bytes(self._words)
        self._said = False

    def keep(self) -> None:
        """Remove what goes first until the cache is within its limit; never what is in use. Says what was removed.

        What keeps it from doing so is said as well, and nothing raised: the experiment goes on.
        """
        if self._bytes == 0 or self._over(cache.builds(paths.cache() / name / "*") for name in KINDS) <= 0:
            return
        try:
            with cache.lock(paths.cache() / "locks" / "limit"):  # two at once would each remove enough
                self._keep()
        except (OSError, LsmlabError) as error:
            self._progress.note(f"The cache's limit cannot be kept: {error}")

    def _over(self, kinds: Iterable[list[Path]]) -> int:
        return sum(cache.size(folder) for folders in kinds for folder in folders) - self._bytes

    def _keep(self) -> None:
        found = entries()
        over = sum(entry.size for entry in found) - self._bytes
        removed: list[Entry] = []
        for entry in _first_to_go(found):
            if over <= 0:
                break
            try:
                taken = None if entry.in_use else cache.drop(entry.folder)
            except HostError as error:
                self._progress.note(str(error))
                continue
            if taken is not None:
                removed.append(entry)
                over -= taken
        limit = f"its limit of {self._words} GiB ({LIMIT_VARIABLE})"
        if removed:
            freed = sum(entry.mib for entry in removed)
            self._progress.note(f"The cache was over {limit}: removed {_named(removed)}; {freed} MiB freed.")
        if over > 0 and not self._said:
            self._said = True
            self._progress.note(f"The cache stays {over >> 20} MiB over {limit}: the rest of it is in use.")


def _limit() -> str:
    return os.environ.get(LIMIT_VARIABLE, "") or LIMIT_GIB


def _limit_bytes(words: str) -> int:
    try:
        gib = float(words)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise DefinitionError(
            f"{LIMIT_VARIABLE}={words}: expected a number of GiB, such as {LIMIT_GIB}", hint="0 stands for no limit."
        )
    return math.ceil(gib * (1 << 30))  # the least of limits is not none


def _first_to_go(found: list[Entry]) -> list[Entry]:
    """What no run would use before the rest, the longest unused first; an image after all that was made from it.

    What a run that is there may yet ask for, being of an image in use, comes last.
    """
    last = {e.image: max(other.used for other in found if other.image == e.image) for e in found}
    busy = {e.image for e in found if e.kind == IMAGE and e.in_use}

    def rank(entry: Entry) -> tuple[bool, bool, datetime.datetime, bool]:
        wanted = entry.status in {Status.CURRENT, Status.UNKNOWN_LAB}
        used = last[entry.image] if entry.kind == IMAGE and entry.image else entry.used
        return (wanted, wanted and entry.image in busy, used, entry.kind == IMAGE)

    return sorted(found, key=rank)


def _named(removed: list[Entry]) -> str:
    names = ", ".join(f"{entry.kind} {entry.name}" for entry in removed[:NAMED])
    return f"{names} and {len(removed) - NAMED} more" if len(removed) > NAMED else names
