"""What lies in the cache: images, saved guests, compiled policies; and clearing it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsmlab import cache, discovery, paths
from lsmlab.errors import HostError, LsmlabError
from lsmlab.image import build

KINDS = {"images": "image", "states": "saved guest", "policies": "policy"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the cache. Sizes in MiB."""

    kind: str
    name: str
    folder: Path
    mib: int
    made: datetime.datetime
    status: str
    """`current`, `stale` (no run would use it) or `damaged`."""

    def age(self) -> str:
        """In words."""
        minutes = int((datetime.datetime.now(datetime.UTC) - self.made).total_seconds() // 60)
        if minutes < 120:
            return f"{minutes} min"
        return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} days"

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        made = self.made.isoformat(timespec="seconds")
        return {"kind": self.kind, "name": self.name, "mib": self.mib, "made": made, "status": self.status}


def entries() -> list[Entry]:
    """Everything in the cache, images first."""
    current = _current_images()
    found: list[Entry] = []
    for name, kind in KINDS.items():
        root = paths.cache() / name
        folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        found += [_entry(kind, folder, current) for folder in folders]
    return found


def _current_images() -> dict[str, str]:
    """Folder name to digest of each lab's current image."""
    current = {}
    for name in discovery.labs().ids:
        try:
            image = build.find(discovery.load_lab(name))
        except LsmlabError:
            continue
        if image is not None:
            current[image.folder.name] = image.digest
    return current


def _entry(kind: str, folder: Path, current: dict[str, str]) -> Entry:
    manifest = cache.read_manifest(folder)
    if manifest is None or cache.damage(folder, manifest, full=False):
        status = "damaged"
    elif kind == "image":
        status = "current" if folder.name in current else "stale"
    elif kind == "saved guest":
        status = "current" if manifest.get("image") in current.values() else "stale"
    else:
        status = "current"
    sizes = [p.stat().st_blocks * 512 for p in folder.iterdir() if p.is_file()]
    made = datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC)
    return Entry(kind, folder.name, folder, sum(sizes) >> 20, made, status)


def prune(*, everything: bool) -> list[Entry]:
    """Delete what no run would use, or everything; what was deleted. Raises HostError while a run uses the cache."""
    cache.sweep()
    with cache.in_use(exclusive=True) as free:
        if not free:
            raise HostError("another run is using the cache", hint="Try again when it has ended.")
        doomed = [e for e in entries() if everything or e.status != "current"]
        for entry in doomed:
            cache.remove(entry.folder)
    return doomed
