"""The cache: what is published is whole, damage is found, locks hold, what is in use stays, a full disk is said."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lsmlab import cache, host, paths
from lsmlab.errors import HostError, MachineError, PolicyError

ABOUT = {"lab": "debian-13", "packages": {"nginx": "1"}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An LSMLAB_HOME of the test's own."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


# Entries


def published(target: Path, **files: bytes) -> Path:
    with cache.scratch("test") as work:
        for name, content in files.items():
            (work / name).write_bytes(content)
        (work / "not-mentioned").write_bytes(b"x")
        cache.publish(work, target, tuple(files), ABOUT)
    return target


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return published(tmp_path / "entries" / "one", disk=b"a disk" * 1000, kernel=b"")


def check(target: Path, *, full: bool = True) -> str:
    manifest = cache.read_manifest(target)
    assert manifest is not None
    return cache.damage(target, manifest, full=full)


def test_what_is_published_is_whole(entry: Path) -> None:
    assert sorted(p.name for p in entry.iterdir()) == ["disk", "kernel", cache.MANIFEST, cache.VERIFIED]
    manifest = cache.read_manifest(entry)
    assert manifest is not None
    assert {k: manifest[k] for k in ABOUT} == ABOUT
    assert manifest["files"]["disk"] == {"sha256": cache.file_digest(entry / "disk"), "bytes": 6000}
    assert check(entry) == ""
    assert list((paths.cache() / "scratch").iterdir()) == []


def test_publishing_replaces_an_older_entry(entry: Path) -> None:
    (entry / "left-over").touch()
    published(entry, disk=b"new")
    assert sorted(p.name for p in entry.iterdir()) == ["disk", cache.MANIFEST, cache.VERIFIED]
    assert (entry / "disk").read_bytes() == b"new"
    assert check(entry) == ""


def test_what_cannot_be_published_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "entries" / "one"
    with pytest.raises(OSError, match="no-such-file"), cache.scratch("test") as work:  # noqa: PT012
        (work / "there").touch()
        cache.publish(work, target, ("there", "no-such-file"), ABOUT)
    assert not target.exists()
    assert list((paths.cache() / "scratch").iterdir()) == []


def test_a_place_that_is_taken_by_a_file(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    target.write_text("somebody's")
    with pytest.raises(HostError, match="cannot be put in place"):
        published(target, disk=b"x")


@pytest.mark.parametrize(
    ("change", "words", "full_only"),
    [
        (lambda e: (e / "disk").unlink(), "disk is missing", False),
        (lambda e: (e / "disk").write_bytes(b"short"), "disk has 5 bytes, expected 6000", False),
        (lambda e: (e / "disk").write_bytes(b"!" * 6000), "disk is damaged", True),
        (lambda e: (e / "kernel").write_bytes(b"x"), "kernel has 1 bytes, expected 0", False),
    ],
    ids=["missing", "short", "changed", "longer"],
)
def test_damage_is_found(entry: Path, change: Callable[[Path], object], words: str, full_only: bool) -> None:
    change(entry)
    assert words in check(entry)
    assert (check(entry, full=False) == "") is full_only


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b'{"files": []}', b"{}", b"\xff\xfe", b'{"files": null}'])
def test_a_manifest_that_cannot_be_read_is_no_manifest(entry: Path, content: bytes) -> None:
    (entry / cache.MANIFEST).write_bytes(content)
    assert cache.read_manifest(entry) is None


# What was verified is remembered


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read in full, in order."""
    names: list[str] = []
    digest = cache.file_digest

    def noted(path: Path) -> str:
        names.append(path.name)
        return digest(path)

    monkeypatch.setattr(cache, "file_digest", noted)
    return names


@pytest.fixture
def verified(entry: Path, read: list[str]) -> Path:
    """An entry that was read in full once."""
    assert check(entry) == ""
    assert sorted(read) == ["disk", "kernel"]
    read.clear()
    return entry


def test_what_was_verified_is_not_read_again(verified: Path, read: list[str]) -> None:
    before = (verified / cache.VERIFIED).stat()
    assert [check(verified) for _ in range(3)] == ["", "", ""]
    assert read == []
    assert (verified / cache.VERIFIED).stat().st_mtime_ns == before.st_mtime_ns, "and nothing is written"
    assert sorted(p.name for p in verified.iterdir()) == ["disk", "kernel", cache.MANIFEST, cache.VERIFIED]


def test_a_quick_look_reads_and_remembers_nothing(entry: Path, read: list[str]) -> None:
    assert check(entry, full=False) == ""
    assert read == []
    assert (entry / cache.VERIFIED).read_text() == "{}"


def test_an_entry_is_as_old_as_it_was_when_it_is_verified(entry: Path) -> None:
    os.utime(entry, (1000, 1000))
    assert check(entry) == ""
    (entry / cache.VERIFIED).write_text("nonsense")
    assert check(entry) == ""
    assert entry.stat().st_mtime == 1000


def touch(path: Path) -> None:
    os.utime(path, (1000, 1000))


def put_beside_and_rename(content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        status = path.stat()
        other = path.with_name("other")
        other.write_bytes(content)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(path)

    return change


def write_over_with_the_old_time(path: Path) -> None:
    status = path.stat()
    while path.stat().st_ctime_ns == status.st_ctime_ns:  # the kernel's clock for files has coarse ticks
        path.write_bytes(b"!" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, put_beside_and_rename(b"a disk" * 1000)], ids=["touched", "replaced"])
def test_a_file_that_was_changed_is_read_again_and_then_remembered(
    verified: Path, read: list[str], change: Callable[[Path], None]
) -> None:
    change(verified / "disk")
    assert check(verified) == ""
    assert read == ["disk"]
    assert check(verified) == ""
    assert read == ["disk"]


@pytest.mark.parametrize(
    ("change", "words", "reads"),
    [
        (put_beside_and_rename(b"b disk" * 1000), "disk is damaged", ["disk", "disk"]),
        (write_over_with_the_old_time, "disk is damaged", ["disk", "disk"]),
        (lambda path: os.truncate(path, 5999), "disk has 5999 bytes, expected 6000", []),
        (Path.unlink, "disk is missing", []),
    ],
    ids=["replaced", "written over", "truncated", "removed"],
)
def test_damage_after_it_was_verified_is_found_each_time(
    verified: Path, read: list[str], change: Callable[[Path], None], words: str, reads: list[str]
) -> None:
    change(verified / "disk")
    for _ in range(2):
        assert words in check(verified)
    assert read == reads


def test_a_manifest_with_another_digest_is_not_what_was_verified(verified: Path, read: list[str]) -> None:
    file = verified / cache.MANIFEST
    digest = cache.file_digest(verified / "disk")
    read.clear()
    file.write_text(file.read_text().replace(digest, "0" * 64))
    assert "disk is damaged" in check(verified)
    assert read == ["disk"]


@pytest.mark.parametrize("boot", ["another", ""], ids=["another", "unknown"])
def test_after_a_boot_of_the_host_all_is_read_again(
    verified: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, boot: str
) -> None:
    assert cache._boot_id()
    monkeypatch.setattr(cache, "_boot_id", lambda: boot)
    assert check(verified) == ""
    assert sorted(read) == ["disk", "kernel"]


def test_a_copy_of_an_entry_is_not_verified(verified: Path, read: list[str]) -> None:
    copy = verified.with_name("copy")
    shutil.copytree(verified, copy)
    assert check(copy) == ""
    assert sorted(read) == ["disk", "kernel"]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b"{}", b'{"disk": [1]}', b'{"disk": null}', b"\xff\xfe"])
def test_a_memory_that_cannot_be_read_is_none(verified: Path, read: list[str], content: bytes) -> None:
    (verified / cache.VERIFIED).write_bytes(content)
    assert check(verified) == ""
    assert sorted(read) == ["disk", "kernel"]
    assert check(verified) == ""
    assert len(read) == 2, "it was written anew"


def test_where_nothing_can_be_written_all_is_read_each_time(
    entry: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    assert [check(entry), check(entry)] == ["", ""]
    assert sorted(read) == ["disk", "disk", "kernel", "kernel"]
    assert (entry / cache.VERIFIED).read_text() == "{}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_another_user(entry: Path, read: list[str]) -> None:
    (entry / cache.VERIFIED).chmod(0o444)
    entry.chmod(0o555)
    try:
        assert [check(entry), check(entry)] == ["", ""]
    finally:
        entry.chmod(0o755)
    assert len(read) == 4


def test_an_entry_published_anew_is_read(verified: Path, read: list[str]) -> None:
    published(verified, disk=b"new")
    read.clear()
    assert check(verified) == ""
    assert read == ["disk"]


# Locks and scratch folders


def test_who_waits_for_a_lock_is_told_that_the_program_is_to_end(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "one"
    with (
        cache.lock(path),
        pytest.raises(HostError, match="waiting for one: interrupted"),
        cache.lock(path, waiting=host.stop_all),
    ):
        pytest.fail("it was never free")
    with cache.lock(path) as held:  # one that is free is taken: what is cleaned up is locked as well
        assert held
    host.go_on()


def test_a_lock_is_exclusive_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "one"
    with cache.lock(path) as first:
        with cache.lock(path, wait=False) as second, cache.lock(path, shared=True, wait=False) as third:
            assert (first, second, third) == (True, False, False)
        with cache.lock(path, wait=False) as again:
            assert again is False
    with cache.lock(path, wait=False) as free:
        assert free is True


def test_a_shared_lock_is_shared(tmp_path: Path) -> None:
    path = tmp_path / "one"
    with cache.lock(path, shared=True) as first, cache.lock(path, shared=True, wait=False) as second:
        assert (first, second) == (True, True)
        with cache.lock(path, wait=False) as exclusive:
            assert exclusive is False


def test_a_lock_is_given_back_when_the_block_fails(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), cache.lock(tmp_path / "one"):
        raise RuntimeError
    with cache.lock(tmp_path / "one", wait=False) as free:
        assert free is True


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    got: list[float] = []

    def wait() -> None:
        with cache.lock(tmp_path / "one"):
            got.append(time.monotonic())

    with cache.lock(tmp_path / "one"):
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.1)
        assert got == []
        released = time.monotonic()
    waiter.join(10)
    assert got
    assert got[0] >= released


def hold(path: str, ready: str) -> None:
    with cache.lock(Path(path)):
        Path(ready).touch()
        signal.pause()


@contextlib.contextmanager
def held_by_another(path: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    ready = path.with_suffix(".ready")
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(str(path), str(ready)))
    process.start()
    try:
        deadline = time.monotonic() + 20
        while not ready.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    with held_by_another(tmp_path / "one") as process:
        with cache.lock(tmp_path / "one", wait=False) as free:
            assert free is False
        process.kill()
        process.join()
        with cache.lock(tmp_path / "one", wait=False) as free:
            assert free is True


def test_a_scratch_folder_is_gone_afterwards(home: Path) -> None:
    with cache.scratch("image-debian-13") as folder:
        assert folder.parent == home / "cache" / "scratch"
        assert folder.name.startswith("image-debian-13-")
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
    assert not folder.exists()
    with contextlib.suppress(RuntimeError), cache.scratch("image") as folder:
        raise RuntimeError
    assert not folder.exists()


def test_a_sweep_leaves_what_is_in_use() -> None:
    with cache.scratch("mine") as folder:
        assert cache.sweep() == []
        assert folder.exists()


LEAVE = """
import os, sys
from lsmlab import cache
with cache.scratch("killed") as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_sweep_removes_what_kill_9_left() -> None:
    killed = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = Path(killed.stdout.strip())
    assert (left / "file").exists()
    assert len(cache.sweep()) == 1
    assert not left.exists()
    assert cache.sweep() == []


def test_a_sweep_removes_what_never_got_its_lock(home: Path) -> None:
    folder = home / "cache" / "scratch" / "made-and-killed"
    (folder / "deep").mkdir(parents=True)
    assert len(cache.sweep()) == 1
    assert not folder.exists()


def test_a_folder_that_its_run_removes_meanwhile_is_no_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "cache" / "scratch" / "ending").mkdir(parents=True)
    make = paths.make

    def vanish(folder: Path) -> Path:
        if folder.name != "ending":
            return make(folder)
        shutil.rmtree(folder)
        return folder

    monkeypatch.setattr(paths, "make", vanish)
    cache.sweep()


def test_a_sweep_where_nothing_is(home: Path) -> None:
    assert cache.sweep() == []
    assert not (home / "cache" / "scratch").exists()


def test_a_stray_file_does_not_keep_a_sweep_from_its_work(home: Path) -> None:
    root = home / "cache" / "scratch"
    (root / "left").mkdir(parents=True)
    (root / "disk.raw").touch()
    cache.sweep()
    assert not (root / "left").exists()


def test_a_sweep_tells_what_each_folder_took(home: Path) -> None:
    folder = home / "cache" / "scratch" / "left"
    folder.mkdir(parents=True)
    (folder / "disk.raw").write_bytes(b"x" * 40960)
    (freed,) = cache.sweep()
    assert freed >= 40960


def test_a_sweep_removes_locks_that_nobody_holds(home: Path) -> None:
    locks = home / "cache" / "locks"
    with cache.lock(locks / "alone"), cache.lock(locks / "together", shared=True), cache.lock(locks / "over"):
        pass
    with cache.lock(locks / "alone"), cache.lock(locks / "together", shared=True):
        cache.sweep()
        assert {p.name for p in locks.iterdir()} >= {"alone", "together"}
        assert not (locks / "over").exists()
    cache.sweep()
    assert [p.name for p in locks.iterdir()] == ["scratch"]


def test_a_lock_whose_file_is_swept_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one"
    take = cache._take
    swept: list[Path] = []

    def late(handle: Any, *, shared: bool = False) -> bool:
        if not swept:
            swept.append(path)
            path.unlink()
        return take(handle, shared=shared)

    monkeypatch.setattr(cache, "_take", late)
    with cache.lock(path) as first, cache.lock(path, wait=False) as second:
        assert (first, second, swept) == (True, False, [path])


def test_locks_stay_exclusive_while_they_are_swept(home: Path) -> None:
    path = home / "cache" / "locks" / "one"
    inside: list[int] = []
    most: list[int] = []
    stop = threading.Event()

    def work() -> None:
        for _ in range(40):
            with cache.lock(path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    def sweep() -> None:
        while not stop.is_set():
            cache.sweep()

    sweeper = threading.Thread(target=sweep)
    workers = [threading.Thread(target=work) for _ in range(3)]
    for thread in (sweeper, *workers):
        thread.start()
    for thread in workers:
        thread.join(60)
    stop.set()
    sweeper.join(60)
    assert (len(most), max(most)) == (120, 1)


# Waiting for a lock


def test_who_waits_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.001)
    said: list[str] = []
    with contextlib.ExitStack() as first:
        first.enter_context(cache.lock(tmp_path / "one", waiting=lambda: said.append("first")))
        waits = iter(range(20))

        def check() -> None:
            if next(waits, None) == 10:
                first.close()

        with cache.lock(tmp_path / "one", waiting=lambda: said.append("second"), check=check):
            assert said == ["second"]


def test_who_waits_can_be_stopped(tmp_path: Path) -> None:
    stopped = threading.Event()
    caught: list[MachineError] = []

    def check() -> None:
        if stopped.is_set():
            raise MachineError("stopped")

    def wait() -> None:
        try:
            with cache.lock(tmp_path / "one", check=check):
                pass
        except MachineError as error:
            caught.append(error)

    with cache.lock(tmp_path / "one"):
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.1)
        stopped.set()
        waiter.join(2)
        assert not waiter.is_alive()
    assert len(caught) == 1


def test_who_was_stopped_while_it_got_the_lock_does_not_keep_it(tmp_path: Path) -> None:
    answers = iter([None, MachineError("stopped")])

    def check() -> None:
        answer = next(answers)
        if answer is not None:
            raise answer

    with pytest.raises(MachineError), cache.lock(tmp_path / "one", check=check):
        pytest.fail("it was stopped")
    with cache.lock(tmp_path / "one", wait=False) as free:
        assert free


# Entries in use


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return published(tmp_path / "entries" / "two", disk=b"x" * 8192)


def test_what_is_used_stays_and_the_rest_goes(entry: Path, other: Path) -> None:
    with cache.use(entry) as one, cache.use(entry) as again:
        assert (one, again) == (True, True)
        assert cache.in_use(entry)
        assert not cache.in_use(other)
        assert cache.drop(entry) is None
        assert check(entry) == ""
        assert (cache.drop(other) or 0) >= 8192
        assert not other.exists()
    assert not cache.in_use(entry)
    assert cache.drop(entry)
    assert not entry.exists()


def test_what_is_gone_is_not_used(entry: Path) -> None:
    cache.drop(entry)
    with cache.use(entry) as there:
        assert not there
    assert cache.drop(entry) == 0


def test_what_is_about_to_be_made_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "entries" / "one"
    with cache.use(target) as there:
        assert not there
        published(target, disk=b"x")
        assert cache.drop(target) is None
    assert check(target) == ""


USE = """
import signal, sys
from pathlib import Path
from lsmlab import cache
with cache.use(Path(sys.argv[1])) as there:
    print(there, flush=True)
    signal.pause()
"""


def test_a_run_that_is_killed_uses_nothing(entry: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", USE, entry], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert cache.in_use(entry)
        assert cache.drop(entry) is None
        process.kill()
        process.wait()
    assert not cache.in_use(entry)
    assert cache.drop(entry)


def test_a_use_is_noted_and_the_age_stays(entry: Path) -> None:
    for path in (entry / cache.MANIFEST, entry):
        os.utime(path, (1000, 1000))
    with cache.use(entry):
        pass
    assert (entry / cache.MANIFEST).stat().st_mtime > time.time() - 60
    assert entry.stat().st_mtime == 1000


def test_looking_whether_something_is_used_makes_nothing(home: Path) -> None:
    assert not cache.in_use(home / "cache" / "images" / "one")
    assert not home.exists()


def test_what_is_discarded_is_never_taken_again(entry: Path) -> None:
    with cache.use(entry):
        cache.discard(entry)
        assert cache.read_manifest(entry) is None
        assert (entry / "disk").exists(), "whoever uses it still needs it"
    cache.discard(entry)
    assert not entry.exists()


def test_what_cannot_be_removed_is_said(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "remove", lambda _: None)
    with pytest.raises(HostError, match=r"entries/one: cannot be removed: 0 MiB are left") as caught:
        cache.drop(entry)
    assert "remove them yourself" in caught.value.hint
    assert cache.read_manifest(entry) is None


def test_what_belongs_to_another_is_said(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    for remove in (cache.drop, cache.discard):
        with pytest.raises(HostError, match=r"one: cannot be removed: Permission denied"):
            remove(entry)
    assert check(entry) == ""


def test_builds_come_newest_first(tmp_path: Path) -> None:
    (tmp_path / "lab-file").touch()
    for number, name in enumerate(["lab-b", "lab-c", "lab-a", "other-a"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (number, number))
    assert [p.name for p in cache.builds(tmp_path / "lab-*")] == ["lab-a", "lab-c", "lab-b"]
    assert cache.builds(tmp_path / "none" / "*") == []


def test_a_size_is_what_is_allocated(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"x" * 65536)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert 65536 <= cache.size(tmp_path) < 1 << 20
    assert cache.size(tmp_path / "none") == 0


# A full disk

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (FULL, 0),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 9000),
        (PolicyError("cannot compile:\ncp: error writing 'policy': No space left on device"), 9000),
        (MachineError("guest x did not come up: no answer within 300 s"), 3),
    ],
    ids=["write", "quota", "a program", "a guest"],
)
def test_a_full_disk_is_one_clear_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, free: int
) -> None:
    monkeypatch.setattr(cache, "free_mib", lambda: free)
    with pytest.raises(HostError) as caught, cache.making("state", "a guest was saved"):
        raise error
    assert caught.value.message == f"{home}/cache: the disk is full: {free} MiB free while a guest was saved"
    assert "lsmlab images prune" in caught.value.hint
    assert "LSMLAB_HOME" in caught.value.hint
    assert list((home / "cache" / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    "error", [MachineError("it panicked"), OSError(errno.EIO, "Input/output error"), ValueError("x")], ids=str
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, cache.making("state", "a guest was saved"):
        raise error
    assert caught.value is error


def test_a_disk_that_takes_no_folder_any_more(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise FULL

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(HostError, match="the disk is full"), cache.making("state", "a guest was saved"):
        pytest.fail("there is no folder")


def test_too_little_space_is_said_beforehand(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "free_mib", lambda: 99)
    cache.need_mib(99, "a saved guest")
    with pytest.raises(HostError, match=r"home/cache: 99 MiB free; a saved guest takes up to 100 MiB") as caught:
        cache.need_mib(100, "a saved guest")
    assert "lsmlab images prune" in caught.value.hint


FILL = """
import contextlib
from lsmlab import cache, paths
from lsmlab.errors import LsmlabError
target = paths.cache() / "states" / "one"
for number, size in enumerate((1 << 20, 4 << 20)):
    try:
        with cache.making("state", "a guest was saved") as work:
            (work / "ram").write_bytes(bytes(size))
            cache.publish(work, target.with_name(str(number)), ("ram",), {})
    except LsmlabError as error:
        print(error.message)
with contextlib.suppress(OSError):
    (paths.cache() / "filler").write_bytes(bytes(4 << 20))
print(sorted(p.name for p in target.parent.iterdir()), list((paths.cache() / "scratch").iterdir()))
print(cache.drop(target.with_name("0")) >> 20, cache.free_mib())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk for the test")
def test_a_disk_that_really_fills_up_and_is_cleared(home: Path) -> None:
    home.mkdir()
    mount = 'mount -t tmpfs -o size=4m lsmlab-test "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, home, sys.executable, "-c", FILL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    message, left, freed = done.stdout.splitlines()
    assert re.fullmatch(rf"{home}/cache: the disk is full: \d MiB free while a guest was saved", message)
    assert left == "['0'] []"
    assert freed == "1 1"
