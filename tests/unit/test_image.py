"""Images: what their digest hangs on, where their packages come from, the proof about dontaudit, and the cache."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

import pytest

from lsmlab import cache, discovery, paths
from lsmlab.errors import HostError, ImageError
from lsmlab.image import build, policy
from lsmlab.lab import Lab

ABOUT = {"lab": "debian-13", "packages": {"nginx": "1"}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An LSMLAB_HOME of the test's own."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    for name in ("LSMLAB_MIRROR", "LSMLAB_SECURITY_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a program on a PATH that has nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    return add


Stub = Callable[[str, str], None]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return discovery.load_lab("debian-13")


# The proof that a policy without dontaudit decides the same

SHIPPED = """\
(type httpd_t)
(allow httpd_t etc_t (file (read open)))
(dontaudit httpd_t shadow_t (file (read)))
(dontaudit httpd_t self (capability (net_admin)))
(booleanif (httpd_can_network_connect)
    (true
        (allow httpd_t port_t (tcp_socket (name_connect)))
        (dontaudit httpd_t port_t (udp_socket (name_bind)))
    )
)
(booleanif (not (allow_ypbind))
    (false
        (dontaudit httpd_t ypbind_t (fifo_file (read)))
    )
)
(typetransition httpd_t tmp_t file httpd_tmp_t)
"""
AUDITED = """\
(type httpd_t)
(allow httpd_t etc_t (file (read open)))
(booleanif (httpd_can_network_connect)
    (true
        (allow httpd_t port_t (tcp_socket (name_connect)))
    )
)
(typetransition httpd_t tmp_t file httpd_tmp_t)
"""


def test_a_policy_without_dontaudit_decides_the_same() -> None:
    assert policy.prove_same_decisions(SHIPPED, AUDITED) == 4


@pytest.mark.parametrize(
    "change",
    [
        ("(allow httpd_t etc_t (file (read open)))\n", ""),
        ("(file (read open))", "(file (read))"),
        ("(file (read open))", "(file (read open write))"),
        ("        (allow httpd_t port_t (tcp_socket (name_connect)))\n", ""),
        ("(true\n", "(false\n"),
        ("httpd_can_network_connect", "httpd_can_network_relay"),
        ("(typetransition httpd_t tmp_t file httpd_tmp_t)\n", ""),
        ("(type httpd_t)\n", "(type httpd_t)\n(allow httpd_t shadow_t (file (read)))\n"),
        ("file httpd_tmp_t)\n", "file httpd_tmp_t)\n(typepermissive httpd_t)\n"),
    ],
    ids=lambda change: change[1][:40].strip() or f"without {change[0][:40].strip()}",
)
def test_any_other_difference_is_an_error_that_shows_it(change: tuple[str, str]) -> None:
    audited = AUDITED.replace(*change)
    assert audited != AUDITED
    with pytest.raises(ImageError, match="decides otherwise than the distribution's: "):
        policy.prove_same_decisions(SHIPPED, audited)


def test_a_difference_at_the_end_is_shown_too() -> None:
    with pytest.raises(ImageError, match="typepermissive"):
        policy.prove_same_decisions(SHIPPED, AUDITED + "(typepermissive httpd_t)\n")


def test_the_first_difference_is_shown() -> None:
    with pytest.raises(ImageError) as caught:
        policy.prove_same_decisions(SHIPPED, AUDITED.replace("(read open)", "(read)"))
    assert "(allow httpd_t etc_t (file (read open))) / (allow httpd_t etc_t (file (read)))" in str(caught.value)


def test_a_dontaudit_that_is_left_is_an_error() -> None:
    with pytest.raises(ImageError, match="1 dontaudit rules are left"):
        policy.prove_same_decisions(SHIPPED, AUDITED + "(dontaudit httpd_t shadow_t (file (read)))\n")


@pytest.mark.parametrize(
    ("shipped", "audited"),
    [("", ""), (AUDITED, AUDITED), (SHIPPED, ""), ("(dontaudit a b (file (read)))", "(type a)")],
    ids=["empty", "no dontaudit", "no allow", "only a type"],
)
def test_comparing_nothing_proves_nothing(shipped: str, audited: str) -> None:
    with pytest.raises(ImageError, match="nothing was proved"):
        policy.prove_same_decisions(shipped, audited)


def test_decisions_leave_out_what_decides_nothing() -> None:
    left = policy.decisions(SHIPPED)
    assert "dontaudit" not in left
    assert "ypbind" not in left
    assert left == policy.decisions(AUDITED)


# The recipe


def with_image(lab: Lab, **changes: object) -> Lab:
    return lab.model_copy(update={"image": lab.image.model_copy(update=changes)})


def test_the_recipe_changes_with_what_goes_into_the_image(lab: Lab) -> None:
    others = [
        with_image(lab, packages=(*lab.image.packages, "apache2")),
        with_image(lab, packages=lab.image.packages[::-1]),
        with_image(lab, suite="sid"),
        with_image(lab, disk_mib=4096),
        with_image(lab, masked_units=()),
    ]
    digests = [build.recipe_digest(one) for one in [lab, *others]]
    assert len(set(digests)) == len(digests)
    assert all(len(d) == 64 for d in digests)


def test_the_recipe_does_not_change_with_what_does_not(lab: Lab) -> None:
    changes: list[dict[str, object]] = [
        {"memory_mib": 2048},
        {"title": "x"},
        {"services": {}},
        {"kernel_arguments": {}},
    ]
    for change in changes:
        assert build.recipe_digest(lab.model_copy(update=change)) == build.recipe_digest(lab), change


def test_the_recipe_changes_with_the_files_that_are_laid_over(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    overlay = package / "image" / "overlay" / "etc"
    overlay.mkdir(parents=True)
    (package / "image" / "prepare.sh").write_text("true\n")
    (overlay / "hosts").write_text("127.0.0.1 localhost\n")
    monkeypatch.setattr(resources, "files", lambda _: package)
    seen = [build.recipe_digest(lab)]
    assert build.recipe_digest(lab) == seen[0]
    for change in (
        lambda: (overlay / "hosts").write_text("127.0.0.1 lab\n"),
        lambda: (overlay / "hosts").rename(overlay / "hostname"),
        lambda: (overlay / "new").write_text(""),
        lambda: (package / "image" / "prepare.sh").write_text("false\n"),
    ):
        change()
        seen.append(build.recipe_digest(lab))
    assert len(set(seen)) == len(seen)


def test_the_recipe_changes_with_links_and_modes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    wants = package / "image" / "overlay" / "wants"
    wants.mkdir(parents=True)
    (package / "image" / "prepare.sh").write_text("true\n")
    (wants / "file").write_text("x")
    monkeypatch.setattr(resources, "files", lambda _: package)
    before = build.recipe_digest(lab)
    (wants / "a.service").symlink_to("/etc/systemd/system/a.service")
    linked = build.recipe_digest(lab)
    (wants / "file").chmod(0o755)
    assert len({before, linked, build.recipe_digest(lab)}) == 3


def test_two_labs_have_two_folders(lab: Lab) -> None:
    assert build.folder_of(lab, "a").name.startswith("debian-13-")
    assert build.folder_of(lab, "a") != build.folder_of(discovery.load_lab("debian-12"), "a")
    assert build.folder_of(lab, "a").parent == paths.cache() / "images"


# Where packages come from

DEBIAN = """
echo 'Debian|Debian|http://deb.example/debian/'
echo 'Docker|Docker CE|https://docker.example/'
echo 'Debian|Debian-Security|http://deb.example/security/'
echo 'Debian|Debian|http://second.example/debian/'
echo '||'
"""
KEYRING = Path("/dev/null")


@pytest.fixture
def keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "KEYRING", KEYRING)


@pytest.mark.usefixtures("keyring")
def test_packages_come_from_where_this_machines_apt_takes_them(stub: Stub) -> None:
    stub("apt-get", DEBIAN)
    option = f"[signed-by={KEYRING}]"
    assert build.package_sources("trixie") == [
        f"deb {option} http://deb.example/debian/ trixie main",
        f"deb {option} http://deb.example/debian/ trixie-updates main",
        f"deb {option} http://deb.example/security/ trixie-security main",
    ]


@pytest.mark.usefixtures("keyring")
def test_a_mirror_may_be_named(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("apt-get", "exit 1")
    monkeypatch.setenv("LSMLAB_MIRROR", "http://mirror.example/debian")
    sources = build.package_sources("bookworm")
    assert [line.split(" ", 2)[2] for line in sources] == [
        "http://mirror.example/debian bookworm main",
        "http://mirror.example/debian bookworm-updates main",
    ]
    monkeypatch.setenv("LSMLAB_SECURITY_MIRROR", "http://mirror.example/security")
    assert build.package_sources("bookworm")[2].endswith("http://mirror.example/security bookworm-security main")


@pytest.mark.usefixtures("keyring")
@pytest.mark.parametrize("listed", ["", "echo 'Ubuntu|Ubuntu|http://ubuntu.example/'", "echo nonsense"])
def test_a_machine_without_a_debian_archive(stub: Stub, listed: str) -> None:
    stub("apt-get", listed or ":")
    with pytest.raises(HostError, match="names no Debian archive") as caught:
        build.package_sources("trixie")
    assert "LSMLAB_MIRROR" in caught.value.hint


@pytest.mark.usefixtures("keyring")
def test_a_machine_without_apt_at_all(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="names no Debian archive"):
        build.package_sources("trixie")
    monkeypatch.setenv("LSMLAB_MIRROR", "http://mirror.example/debian")
    assert len(build.package_sources("trixie")) == 2


@pytest.mark.usefixtures("keyring")
def test_an_apt_that_fails_is_quoted(stub: Stub) -> None:
    stub("apt-get", 'echo "E: malformed line 1" >&2; exit 100')
    with pytest.raises(HostError, match="reading apt's sources failed") as caught:
        build.package_sources("trixie")
    assert "E: malformed line 1" in str(caught.value)


def test_a_keyring_that_is_missing(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("apt-get", DEBIAN)
    monkeypatch.setattr(build, "KEYRING", tmp_path / "none.gpg")
    with pytest.raises(HostError, match=r"none\.gpg is missing") as caught:
        build.package_sources("trixie")
    assert "debian-archive-keyring" in caught.value.hint


def test_apts_proxy_is_used_and_nothing_else(stub: Stub) -> None:
    wanted = [
        'Acquire::http::Proxy "http://proxy.example:3128/";',
        'Acquire::https::Proxy "DIRECT";',
        'Acquire::http::Proxy-Auto-Detect "/usr/bin/auto";',
        'Acquire::https::CaInfo "/etc/ssl/own.pem";',
        'Acquire::Retries "3";',
    ]
    others = [
        'APT::Architecture "amd64";',
        'Acquire::http::Proxy "";',
        'Dir::State "var/lib/apt";',
        'DPkg::Post-Invoke:: "rm -rf /";',
        "Acquire::https::Verify-Peer;",
    ]
    stub("apt-config", "\n".join(f"echo '{line}'" for line in (*wanted, *others)))
    assert build.proxy_settings().splitlines() == wanted


def test_no_proxy_and_no_apt_config(stub: Stub) -> None:
    assert build.proxy_settings() == ""
    stub("apt-config", "echo 'APT::Architecture \"amd64\";'")
    assert build.proxy_settings() == ""


# The cache


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
    assert sorted(p.name for p in entry.iterdir()) == ["disk", "kernel", cache.MANIFEST]
    manifest = cache.read_manifest(entry)
    assert manifest is not None
    assert {k: manifest[k] for k in ABOUT} == ABOUT
    assert manifest["files"]["disk"] == {"sha256": cache.file_digest(entry / "disk"), "bytes": 6000}
    assert check(entry) == ""
    assert list((paths.cache() / "scratch").iterdir()) == []


def test_publishing_replaces_an_older_entry(entry: Path) -> None:
    (entry / "left-over").touch()
    published(entry, disk=b"new")
    assert sorted(p.name for p in entry.iterdir()) == ["disk", cache.MANIFEST]
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


def test_an_image_is_found_only_when_it_is_whole(lab: Lab) -> None:
    assert build.find(lab) is None
    files = {name: name.encode() for name in build.FILES}
    with cache.scratch("image") as work:
        for name, content in files.items():
            (work / name).write_bytes(content)
        about = {"kernel_release": "6.12", "packages": {"nginx": "1"}, "built": "2026-11-24"}
        cache.publish(work, build.folder_of(lab, "a"), build.FILES, about)
    image = build.find(lab, full_check=True)
    assert image is not None
    assert (image.lab, image.kernel_release, image.packages) == ("debian-13", "6.12", {"nginx": "1"})
    assert image.digest == cache.file_digest(image.disk)
    for path in (image.disk, image.kernel, image.initrd, image.policy_tree):
        assert path.is_file()
    image.initrd.write_bytes(b"Initrd")
    assert build.find(lab, full_check=True) is None
    image.initrd.write_bytes(b"shorter or longer")
    assert build.find(lab) is None


@pytest.mark.parametrize("lacking", ["kernel_release", "packages", "built", "files"])
def test_a_manifest_of_another_shape_is_damage(lab: Lab, lacking: str) -> None:
    with cache.scratch("image") as work:
        for name in build.FILES:
            (work / name).touch()
        cache.publish(work, build.folder_of(lab, "a"), build.FILES, {"kernel_release": "", "packages": {}, "built": ""})
    manifest = build.folder_of(lab, "a") / cache.MANIFEST
    content = json.loads(manifest.read_text())
    content[lacking] = {"disk.qcow2": {}}
    if lacking != "files":
        del content[lacking]
    manifest.write_text(json.dumps(content))
    assert build.find(lab) is None


# Locks and scratch folders


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
        assert cache.sweep() == 0
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
    assert cache.sweep() == 1
    assert not left.exists()
    assert cache.sweep() == 0


def test_a_sweep_removes_what_never_got_its_lock(home: Path) -> None:
    folder = home / "cache" / "scratch" / "made-and-killed"
    (folder / "deep").mkdir(parents=True)
    assert cache.sweep() == 1
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
    assert cache.sweep() == 0
    assert not (home / "cache" / "scratch").exists()


def test_a_stray_file_does_not_keep_a_sweep_from_its_work(home: Path) -> None:
    root = home / "cache" / "scratch"
    (root / "left").mkdir(parents=True)
    (root / "disk.raw").touch()
    cache.sweep()
    assert not (root / "left").exists()


def test_runs_hold_the_cache_together_and_pruning_alone() -> None:
    with cache.in_use() as one, cache.in_use() as two:
        assert (one, two) == (True, True)
        with cache.in_use(exclusive=True) as pruning:
            assert pruning is False
    with cache.in_use(exclusive=True) as pruning:
        assert pruning is True
