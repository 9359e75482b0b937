"""The inventory: what is current, stale, damaged, unknown or in use; what is pruned, and what the limit removes."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from entries import KIB, Notes, age, hardware, put_image, put_policy, put_state

from lsmlab import cache, discovery, inventory, paths
from lsmlab.errors import DefinitionError, HostError
from lsmlab.inventory import Entry, Limit, Status
from lsmlab.lab import Lab
from lsmlab.machine import states
from lsmlab.machine.hardware import Hardware
from lsmlab.terms import Kernel

GIB = 1 << 30


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An LSMLAB_HOME of the test's own, and a current folder without labs."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(inventory.LIMIT_VARIABLE, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def lab() -> Lab:
    return discovery.load_lab("debian-13")


def of(folder: Path) -> Entry:
    (found,) = [e for e in inventory.entries() if e.folder == folder]
    return found


def left() -> set[str]:
    return {e.name for e in inventory.entries()}


# What an entry is good for


def test_nothing_is_there(home: Path) -> None:
    assert inventory.entries() == []
    assert not home.exists()


def test_what_a_run_would_use_is_current(lab: Lab) -> None:
    image = put_image(lab)
    made = [image.folder, put_policy("one", image)]
    for accelerator in ("tcg", "kvm"):
        made += [put_state(lab, image, kernel, like=hardware(lab, accelerator)) for kernel in Kernel]
    found = inventory.entries()
    assert {e.folder for e in found} == set(made)
    assert {e.status for e in found} == {Status.CURRENT}
    assert [e.kind for e in found] == ["image"] + ["saved guest"] * 6 + ["policy"]


def test_an_older_build_is_stale_with_all_that_was_made_from_it(lab: Lab) -> None:
    old = put_image(lab, "a")
    age(old.folder, used=500, made=500)
    made = [old.folder, put_state(lab, old, Kernel.NONE), put_policy("old", old)]
    put_image(lab, "b")
    assert [of(folder).status for folder in made] == [Status.STALE] * 3


@pytest.mark.parametrize(
    "other",
    [
        lambda lab: Hardware("tcg", lab.memory_mib, "QEMU emulator version 0.9"),
        lambda lab: Hardware("tcg", lab.memory_mib + 256, hardware(lab).qemu_version),
    ],
    ids=["another QEMU", "more memory"],
)
def test_a_state_of_other_hardware_is_stale(lab: Lab, other: Callable[[Lab], Hardware]) -> None:
    image = put_image(lab)
    assert of(put_state(lab, image, Kernel.NONE, like=other(lab))).status is Status.STALE
    assert of(image.folder).status is Status.CURRENT


def test_a_state_of_another_format_is_stale(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    image = put_image(lab)
    folder = put_state(lab, image, Kernel.NONE)
    monkeypatch.setattr(states, "FORMAT", "of another time")
    assert of(folder).status is Status.STALE


def test_a_state_of_another_processor_is_stale_under_kvm_only(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = put_image(lab)
    emulated, real = (put_state(lab, image, Kernel.NONE, like=hardware(lab, name)) for name in ("tcg", "kvm"))
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Another\nflags\t\t: fpu vme\n\nprocessor\t: 1\n")
    monkeypatch.setattr(states, "CPU_INFO", tmp_path / "cpuinfo")
    assert of(emulated).status is Status.CURRENT
    assert of(real).status is Status.STALE


def test_a_state_whose_image_is_gone_is_stale(lab: Lab) -> None:
    image = put_image(lab)
    folder = put_state(lab, image, Kernel.NONE)
    shutil.rmtree(image.folder)
    assert of(folder).status is Status.STALE


def test_a_policy_that_names_no_image_is_stale(lab: Lab) -> None:
    put_image(lab)
    assert of(put_policy("old", None)).status is Status.STALE


def test_damage_is_told(lab: Lab) -> None:
    image = put_image(lab)
    folders = [put_state(lab, image, Kernel.NONE), put_state(lab, image, Kernel.SELINUX), put_policy("one", image)]
    (folders[0] / "ram").write_bytes(b"short")
    (folders[1] / cache.MANIFEST).write_text("{")
    (folders[2] / "policy").unlink()
    (image.folder / "initrd").write_bytes(b"longer than it was")
    assert [of(folder).status for folder in (*folders, image.folder)] == [Status.DAMAGED] * 4


def test_a_state_under_anothers_name_is_damaged(lab: Lab) -> None:
    image = put_image(lab)
    folder = put_state(lab, image, Kernel.NONE)
    place = folder.with_name(states.folder_of(lab, image, Kernel.SELINUX, hardware(lab), "a").name)
    folder.rename(place)
    assert of(place).status is Status.DAMAGED


def test_what_is_of_an_unknown_lab_is_told(lab: Lab) -> None:
    image = put_image(lab, lab_id="somebodys")
    other = lab.model_copy(update={"id": "somebodys"})
    made = [image.folder, put_state(other, image, Kernel.NONE), put_policy("theirs", image)]
    assert [of(folder).status for folder in made] == [Status.UNKNOWN_LAB] * 3


def test_a_lab_that_cannot_be_read_is_unknown_and_not_stale(lab: Lab) -> None:
    image = put_image(lab)
    Path("labs").mkdir()
    Path("labs/debian-13.yaml").write_text("kind: lsmlab/lab\nid: debian-13\nbackend: none\n")
    assert of(image.folder).status is Status.UNKNOWN_LAB


def test_use_is_told_beside_the_status(lab: Lab) -> None:
    image = put_image(lab)
    age(image.folder, used=7200, made=86400 * 3)
    entry = of(image.folder)
    assert (entry.in_use, entry.standing()) == (False, "current")
    assert (inventory.since(entry.made), inventory.since(entry.used)) == ("3 days", "2 h")
    with cache.use(image.folder):
        entry = of(image.folder)
    assert (entry.in_use, entry.standing()) == (True, "current, in use")
    assert (inventory.since(entry.made), inventory.since(entry.used)) == ("3 days", "0 min")


def test_an_entry_does_not_grow_younger_when_it_is_verified(lab: Lab) -> None:
    old, image = put_image(lab, "a"), put_image(lab, "b")
    age(old.folder, used=7200, made=86400 * 3)
    manifest = cache.read_manifest(old.folder)
    assert manifest is not None
    verified = old.folder / cache.VERIFIED
    before = verified.read_bytes()
    assert not cache.damage(old.folder, manifest, full=True)
    assert verified.read_bytes() != before
    assert inventory.since(of(old.folder).made) == "3 days"
    assert cache.builds(image.folder.with_name("debian-13-*")) == [image.folder, old.folder]


def test_policies_that_stand_alike_are_listed_together(lab: Lab) -> None:
    old, image = put_image(lab, "a", kib=KIB), put_image(lab, "b", kib=KIB)
    age(old.folder, used=500, made=500)
    old_one, one, other = put_policy("old", old), put_policy("one", image), put_policy("other", image)
    two = put_policy("two", image)
    with cache.use(other):
        found = inventory.listed(inventory.entries())
    assert [e.folder for e in found[0] + found[1]] == [old.folder, image.folder]
    assert [{e.folder for e in like} for like in found[2:]] == [{old_one}, {one, two}, {other}]


def test_how_much_there_is_in_all(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    put_image(lab, "a", kib=512 * KIB)
    found = inventory.entries()
    assert inventory.total(found) == "0.5 GiB in all; 20 GiB are kept at most (LSMLAB_CACHE_LIMIT)."
    monkeypatch.setenv("LSMLAB_CACHE_LIMIT", "1.5")
    assert inventory.total(found) == "0.5 GiB in all; 1.5 GiB are kept at most (LSMLAB_CACHE_LIMIT)."
    monkeypatch.setenv("LSMLAB_CACHE_LIMIT", "0")
    assert inventory.total(found) == "0.5 GiB in all; no limit is set (LSMLAB_CACHE_LIMIT)."
    monkeypatch.setenv("LSMLAB_CACHE_LIMIT", "much")
    with pytest.raises(DefinitionError, match="LSMLAB_CACHE_LIMIT=much: expected a number of GiB"):
        inventory.total(found)


def test_an_entry_as_json(lab: Lab) -> None:
    image = put_image(lab, kib=3 * KIB)
    age(image.folder, used=60, made=90)
    entry = of(image.folder)
    found = entry.as_json()
    assert found.keys() == {"kind", "name", "mib", "made", "used", "status", "in_use"}
    assert (found["kind"], found["status"], found["in_use"]) == ("image", "current", False)
    assert found["mib"] == 3
    moments = [datetime.datetime.fromisoformat(found[key]) for key in ("made", "used")]
    assert moments == [entry.made.replace(microsecond=0), entry.used.replace(microsecond=0)]
    assert moments[1] - moments[0] >= datetime.timedelta(seconds=29)


# Pruning


@pytest.fixture
def mixed(lab: Lab) -> dict[str, Path]:
    """One entry of each sort."""
    old = put_image(lab, "a", kib=2 * KIB)
    age(old.folder, used=900, made=900)
    image = put_image(lab, "b")
    theirs = put_image(lab, lab_id="somebodys")
    broken = put_state(lab, image, Kernel.APPARMOR)
    (broken / "ram").unlink()
    return {
        "old": old.folder, "old state": put_state(lab, old, Kernel.NONE), "image": image.folder,
        "state": put_state(lab, image, Kernel.NONE), "theirs": theirs.folder, "broken": broken,
    }  # fmt: skip


def test_pruning_takes_what_no_run_would_use(mixed: dict[str, Path]) -> None:
    done = inventory.prune(everything=False)
    assert {e.folder for e in done.removed} == {mixed[name] for name in ("old", "old state", "broken")}
    assert (
        {p.name for p in mixed.values() if p.exists()}
        == left()
        == {mixed[n].name for n in ("image", "state", "theirs")}
    )
    assert [(e.folder, "--all" in why) for e, why in done.kept] == [(mixed["theirs"], True)]
    assert done.failed == []
    assert 2 << 20 < done.freed < 3 << 20


def test_pruning_all(mixed: dict[str, Path]) -> None:
    done = inventory.prune(everything=True)
    assert len(done.removed) == len(mixed)
    assert inventory.entries() == []


@pytest.mark.parametrize("everything", [False, True])
def test_pruning_keeps_what_is_in_use_and_says_so(mixed: dict[str, Path], everything: bool) -> None:
    with cache.use(mixed["old"]), cache.use(mixed["old state"]), cache.use(mixed["image"]):
        done = inventory.prune(everything=everything)
        assert {e.folder for e, why in done.kept if why == "in use"} == {
            mixed[name] for name in ("old", "old state", *(["image"] if everything else []))
        }
        assert mixed["broken"] in {e.folder for e in done.removed}
        assert done.freed < 1 << 20
        assert all(mixed[name].exists() for name in ("old", "old state", "image"))


def test_what_could_not_be_pruned_is_said_and_not_counted(
    mixed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "remove", lambda folder: None if folder == mixed["old"] else shutil.rmtree(folder))
    done = inventory.prune(everything=False)
    (error,) = done.failed
    assert f"{mixed['old']}: cannot be removed: 2 MiB are left" in error.message
    assert mixed["old"] not in {e.folder for e in done.removed}
    assert done.freed < 1 << 20
    assert of(mixed["old"]).status is Status.DAMAGED, "half an image is none"


def test_leftovers_of_killed_runs_are_freed_as_well(home: Path) -> None:
    folder = home / "cache" / "scratch" / "killed"
    folder.mkdir(parents=True)
    (folder / "disk.raw").write_bytes(bytes(1 << 20))
    done = inventory.prune(everything=False)
    assert (done.leftovers, done.freed) == (1 << 20, 1 << 20)


def test_what_goes_while_it_is_listed_is_left_out(mixed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = cache.builds

    def late(pattern: Path) -> list[Path]:
        found = find(pattern)
        if pattern.name == "*" and pattern.parent.name == "policies":
            shutil.rmtree(mixed["state"])
        return found

    monkeypatch.setattr(cache, "builds", late)
    assert mixed["state"] not in {e.folder for e in inventory.entries()}


# The limit


def limit(monkeypatch: pytest.MonkeyPatch, kib: float) -> tuple[Limit, Notes]:
    monkeypatch.setenv(inventory.LIMIT_VARIABLE, f"{kib * KIB / GIB:.12f}")
    notes = Notes()
    return Limit(notes), notes


@pytest.mark.parametrize("words", ["plenty", "-1", "nan", "inf", "20 GiB", "1e999"])
def test_a_limit_that_is_no_number_is_said(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(inventory.LIMIT_VARIABLE, words)
    with pytest.raises(DefinitionError, match=f"LSMLAB_CACHE_LIMIT={words}: expected a number of GiB") as caught:
        Limit(Notes())
    assert "0 stands for no limit" in caught.value.hint


@pytest.mark.parametrize(
    ("words", "gib"), [(None, 20), ("", 20), ("0", 0), ("0.5", 0.5), (" 3 ", 3), ("1e-12", 1 / GIB)]
)
def test_the_limit(words: str | None, gib: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if words is not None:
        monkeypatch.setenv(inventory.LIMIT_VARIABLE, words)
    assert Limit(Notes())._bytes == gib * GIB


@pytest.mark.parametrize("words", ["0", "20"])
def test_within_the_limit_nothing_goes(words: str, mixed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(inventory.LIMIT_VARIABLE, words)
    notes = Notes()
    Limit(notes).keep()
    assert all(folder.exists() for folder in mixed.values())
    assert notes.notes == []


def test_no_limit_is_kept_where_nothing_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 1)[0].keep()
    assert not home.exists()


@pytest.fixture
def aged(lab: Lab) -> dict[str, Path]:
    """Entries of a mebibyte each, by name: when each was used last, in seconds ago."""
    old, image = put_image(lab, "a", kib=KIB), put_image(lab, "b", kib=KIB)
    found = {
        "old": old.folder, "image": image.folder,
        "old none": put_state(lab, old, Kernel.NONE, kib=KIB),
        "old selinux": put_state(lab, old, Kernel.SELINUX, kib=KIB),
        "none": put_state(lab, image, Kernel.NONE, kib=KIB), "selinux": put_state(lab, image, Kernel.SELINUX, kib=KIB),
        "apparmor": put_state(lab, image, Kernel.APPARMOR, kib=KIB),
    }  # fmt: skip
    ages = {
        "old": 50, "old none": 10, "old selinux": 20, "image": 900, "selinux": 300, "apparmor": 200, "none": 100,
    }  # fmt: skip
    for name, seconds in ages.items():
        age(found[name], used=seconds, made=2000 if name.startswith("old") else 1000)
    return found


ORDER = ("old selinux", "old none", "old", "selinux", "apparmor", "none", "image")
"""Stale before current, the longest unused first, an image after what was made from it."""


@pytest.mark.parametrize("kept", range(len(ORDER) + 1))
def test_what_goes_first(aged: dict[str, Path], kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, notes = limit(monkeypatch, (kept * 1.1 or 0.1) * KIB)
    keeper.keep()
    assert [name for name in ORDER if aged[name].exists()] == list(ORDER[len(ORDER) - kept :])
    assert len(notes.notes) == (kept < len(ORDER))
    for note in notes.notes:
        assert "LSMLAB_CACHE_LIMIT" in note
        assert f"{len(ORDER) - kept} MiB freed" in note
    keeper.keep()
    assert len(notes.notes) <= 1


def test_what_is_in_use_stays_and_its_image_may_be_asked_for_more(
    aged: dict[str, Path], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = discovery.load_lab("debian-12")
    image = put_image(other, kib=KIB)
    age(image.folder, used=5)
    keeper, notes = limit(monkeypatch, 4.4 * KIB)
    with cache.use(aged["image"]), cache.use(aged["selinux"]):
        keeper.keep()
    assert {name for name in ORDER if aged[name].exists()} == {"image", "selinux", "apparmor", "none"}
    assert not image.folder.exists(), "used last, and of no run that is there"
    assert len(notes.notes) == 1


def test_a_limit_that_cannot_be_kept_is_said_once(aged: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, notes = limit(monkeypatch, KIB)
    with contextlib.ExitStack() as uses:
        for name in ("image", "none", "selinux"):
            uses.enter_context(cache.use(aged[name]))
        keeper.keep()
        keeper.keep()
    assert {name for name in ORDER if aged[name].exists()} == {"image", "none", "selinux"}
    removed, stays = notes.notes
    assert "removed saved guest" in removed
    assert "and 1 more" in removed
    assert "stays 2 MiB over its limit" in stays
    assert "in use" in stays


def test_what_another_run_takes_at_that_moment_stays(aged: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, _ = limit(monkeypatch, 6.6 * KIB)
    drop = cache.drop
    with contextlib.ExitStack() as uses:

        def taken(folder: Path) -> int | None:
            if folder == aged["old selinux"]:
                uses.enter_context(cache.use(folder))
            return drop(folder)

        monkeypatch.setattr(cache, "drop", taken)
        keeper.keep()
        assert aged["old selinux"].exists()
        assert not aged["old none"].exists()


def test_what_cannot_be_removed_for_the_limit_is_said(aged: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    keeper, notes = limit(monkeypatch, 6.6 * KIB)
    drop = cache.drop

    def refuse(folder: Path) -> int | None:
        if folder == aged["old selinux"]:
            raise HostError(f"{folder}: cannot be removed: Permission denied")
        return drop(folder)

    monkeypatch.setattr(cache, "drop", refuse)
    keeper.keep()
    assert not aged["old none"].exists()
    said, removed = notes.notes
    assert "Permission denied" in said
    assert "removed saved guest" in removed


def test_a_limit_that_cannot_be_looked_after_stops_no_run(
    aged: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, notes = limit(monkeypatch, KIB)

    def fail() -> list[Entry]:
        raise HostError("the labs cannot be read")

    monkeypatch.setattr(inventory, "entries", fail)
    keeper.keep()
    assert notes.notes == ["The cache's limit cannot be kept: the labs cannot be read"]
    assert all(folder.exists() for folder in aged.values())


def test_the_cache_folder_is_the_one_that_is_looked_at(home: Path, lab: Lab) -> None:
    assert put_image(lab).folder.is_relative_to(paths.cache())
    assert paths.cache() == home / "cache"
