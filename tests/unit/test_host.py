"""What this machine is to lsmlab: its system, its processor, and the user that guests run as where root starts them."""

from __future__ import annotations

import os
import platform
import pwd
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from entries import put_image

from lsmlab import discovery, doctor, host
from lsmlab.errors import HostError
from lsmlab.image import build
from lsmlab.machine.qemu import QEMU
from lsmlab.progress import Silent

CHANGED = "LSMLAB_TEST_CHANGED"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    host._suffice.cache_clear()
    yield
    host._suffice.cache_clear()


def test_an_ordinary_users_programs_run_as_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert host.no_rights("/usr/bin/env") == []
    assert host.dying_with_us(["true"])[1] == "--pdeathsig"


def test_no_account_has_such_an_id() -> None:
    accounts = {entry.pw_uid for entry in pwd.getpwall()}
    assert accounts
    assert not accounts & set(host.PASSING_UIDS)


@as_root
def test_roots_program_runs_as_a_user_of_its_own() -> None:
    argv = [host.need("sh"), "-c", "id -u; id -G; grep -E '^(CapPrm|CapEff|NoNewPrivs)' /proc/self/status"]
    said = []
    for _ in range(8):
        rights = host.no_rights(argv[0])
        done = subprocess.run(host.dying_with_us(argv, rights=rights), capture_output=True, text=True, check=True)
        said.append(done.stdout.split())
    users = {words[0] for words in said}
    assert {int(user) for user in users} <= set(host.PASSING_UIDS)
    assert len(users) > 1, "guests at the same time are kept apart"
    assert all(words[1:] == [words[0], "CapPrm:", "0" * 16, "CapEff:", "0" * 16, "NoNewPrivs:", "1"] for words in said)


@as_root
def test_a_root_that_cannot_be_another_user_runs_programs_as_it_is(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh")
    program.chmod(0o700)
    assert host.no_rights(str(program)) == []


@as_root
def test_a_device_is_opened_by_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o711)  # pytest's own folders are closed to others
    device = tmp_path / "kvm"
    device.touch()
    os.chown(device, 0, 4321)
    device.chmod(0o660)
    assert host.no_rights("/usr/bin/env", device)[-2:] == ["--groups", "4321"]
    host._suffice.cache_clear()
    device.chmod(0o600)
    assert host.no_rights("/usr/bin/env", device) == [], "KVM before a user of its own"
    device.chmod(0o666)
    os.chown(device, 0, 0)
    assert host.no_rights("/usr/bin/env", device)[-1:] == ["--clear-groups"], "the group root is no such group"


@as_root
def test_doctor_tells_where_guests_stay_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, device = tmp_path / "qemu", tmp_path / "kvm"
    device.touch(0o600)
    monkeypatch.setattr(host, "need", lambda name: str(program) if name == QEMU else f"/usr/bin/{name}")
    program.symlink_to("/usr/bin/env")
    for folder in [tmp_path, *tmp_path.parents[:2]]:
        folder.chmod(0o711)
    assert doctor._user_of_guests(None).ok
    denied = doctor._user_of_guests(device)
    assert not denied.ok and denied.found.startswith("root") and "ordinary user" in denied.advice


@pytest.mark.parametrize(
    ("system", "name"), [("Linux", ""), ("Darwin", "macOS"), ("Windows", "Windows"), ("FreeBSD", "FreeBSD")]
)
def test_another_system_is_told_before_a_program_is_missed(
    monkeypatch: pytest.MonkeyPatch, system: str, name: str
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    if not name:
        assert host.need("sh")
        return
    with pytest.raises(HostError, match=f"lsmlab runs on Linux; this is {name}") as caught:
        host.need("no-such-program")
    assert "a Linux virtual machine" in caught.value.hint


OPENSUSE = {"ID": "opensuse-leap", "ID_LIKE": "suse opensuse"}
ALMA = {"ID": "almalinux", "ID_LIKE": "rhel centos fedora"}


@pytest.mark.parametrize(
    ("said", "programs", "advice"),
    [
        ({"ID": "debian"}, [QEMU], "apt-get install qemu-system-x86"),
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, ["setpriv", "unshare"], "apt-get install util-linux"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, ["gpgv"], "apt-get install gpgv"),
        ({"ID": "fedora"}, [QEMU, "qemu-img"], "dnf install qemu-img qemu-system-x86-core"),
        (OPENSUSE, [QEMU, "qemu-img"], "zypper install qemu-img qemu-x86"),
        (OPENSUSE, ["mmdebstrap"], "Install mmdebstrap by this system's own means"),
        ({"ID": "manjaro", "ID_LIKE": "arch"}, [QEMU, "gpgv"], "pacman -S gnupg qemu-system-x86"),
        (ALMA, [QEMU, "qemu-img"], f"Install {QEMU}, qemu-img by this system's own means"),
        ({"ID": "gentoo"}, ["setpriv"], "Install setpriv by this system's own means"),
        ({}, ["setpriv"], "Install setpriv by this system's own means"),
        ({"ID": "debian"}, ["no-such-program"], "Install no-such-program by this system's own means"),
    ],
)
def test_what_to_install_is_said_as_the_distribution_calls_it(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], programs: list[str], advice: str
) -> None:
    monkeypatch.setattr(host, "os_release", lambda: said)
    assert host.to_install(*programs) == advice


def test_what_is_missing_is_said_so_by_errors_and_by_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "os_release", lambda: OPENSUSE)
    monkeypatch.setattr(host, "find", lambda _: None)
    with pytest.raises(HostError) as caught:
        host.need(QEMU)
    assert caught.value.hint.startswith("zypper install qemu-x86. ")
    assert doctor._program(QEMU, "--version", "runs the guests").advice == "zypper install qemu-x86"


def test_each_program_has_a_package_of_each_distribution() -> None:
    programs = {name for name, _, _ in (*doctor.TO_RUN, *doctor.TO_BUILD, *doctor.TO_PREPARE)}
    assert {*programs, "newuidmap"} <= set(host.PACKAGES)
    assert {len(row) for row in host.PACKAGES.values()} == {len(host.INSTALLERS)}


@pytest.mark.parametrize("name", ["debian-13", "fedora-44"])
def test_an_image_is_not_made_on_another_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    lab = discovery.load_lab(name)
    with pytest.raises(HostError) as caught:
        build.ensure(lab, Silent())
    assert caught.value.message == (
        "making an image takes an x86-64 machine, whose programs are executed; this one is aarch64"
    )
    assert f"`lsmlab images export {name}` there, `lsmlab images import FILE` here" in caught.value.hint
    (found,) = [f for f in doctor.examine(lab) if f.what == "processor"]
    assert (found.ok, found.needed, found.found) == (False, True, caught.value.message)
    assert found.advice == caught.value.hint
    assert doctor.needs(lab)["x86-64 processor"] is False
    put_image(lab)
    assert "x86-64 processor" not in doctor.needs(lab), "an image that was imported is run"
    (found,) = [f for f in doctor.examine(lab) if f.what == "processor"]
    assert (found.ok, found.needed) == (False, False)


def test_a_program_starts_while_the_environment_is_changed() -> None:
    failed: list[str] = []
    left = threading.Semaphore(1500)

    def start() -> None:
        while left.acquire(blocking=False):
            try:
                host.run(["/bin/true"], what="starting a program")
            except (OSError, HostError) as error:
                failed.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    number = 0
    try:
        while any(thread.is_alive() for thread in threads):
            number += 1
            os.environ[CHANGED] = "x" * (number % 900 + 1)
            if number % 50 == 0:
                del os.environ[CHANGED]
                time.sleep(0.0005)
    finally:
        os.environ.pop(CHANGED, None)
    assert failed == []


def test_no_program_starts_while_all_are_stopped() -> None:
    ended: list[str] = []

    def wait() -> None:
        with pytest.raises(HostError) as error:
            host.run(["sleep", "60"], what="sleeping")
        ended.append(error.value.message)

    thread = threading.Thread(target=wait)
    thread.start()
    while not host._running:
        time.sleep(0.01)
    start = time.monotonic()
    try:
        host.stop_all()
        thread.join(30)
        with pytest.raises(HostError, match="sleeping: interrupted"):
            host.run(["sleep", "60"], what="sleeping")
        assert host.run(["echo", "removed"], what="cleaning", cleaning=True) == b"removed\n"
    finally:
        host.go_on()
    assert time.monotonic() - start < 30
    assert len(ended) == 1
    assert host.run(["echo", "again"], what="going on") == b"again\n"


def test_a_program_that_was_just_being_started_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop between a program's start and the moment that it is known here."""
    started: list[subprocess.Popen[bytes]] = []

    class Started(subprocess.Popen[bytes]):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[call-overload]
            started.append(self)
            host.stop_all()

    monkeypatch.setattr(subprocess, "Popen", Started)
    try:
        with pytest.raises(HostError, match="sleeping: interrupted"):
            host.run(["sleep", "60"], what="sleeping")
    finally:
        host.go_on()
    (process,) = started
    assert process.wait(30) == -9
