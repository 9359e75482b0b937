"""Saved guests and the bench that uses them: made once, checked, waited for, held, and made anew where QEMU refuses."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from entries import Notes, age, hardware, put_image, put_state

from fakes import ScriptedChannel, said
from lsmlab import bench, cache, discovery, host, inventory, paths
from lsmlab.errors import CommandTimeoutError, DefinitionError, HostError, LsmlabError, MachineError
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.machine import states
from lsmlab.machine.hardware import Hardware
from lsmlab.machine.states import SavedState
from lsmlab.terms import Kernel

NONE = Kernel.NONE


class Guests:
    """Stands for `QemuMachine`: every boot and every start from a state, and what goes wrong with it."""

    def __init__(self) -> None:
        self.boots: list[str] = []
        self.starts: list[Path] = []
        self.refused: Callable[[Path], str] = lambda _: ""
        self.booting: Callable[[], object] = lambda: None
        self.saving: Callable[[], object] = lambda: None
        self.running = 0
        self.channel = MagicMock()
        self.channel.ask.return_value = [9]

    def start(self, name: str, _hardware: Any, disk: Path, **how: Any) -> Guests:
        """See `QemuMachine.start`."""
        if how.get("incoming") is None:
            self.boots.append(name)
            self.booting()
            how["keep_overlay"].write_bytes(b"an overlay")
        else:
            self.starts.append(disk.parent)
            refused = self.refused(disk.parent)
            if refused:
                raise MachineError(f"guest {name} did not come up: {refused}\n  last lines of its console:\n    x")
        self.running += 1
        return self

    def save(self, path: Path) -> None:
        """See `QemuMachine.save`."""
        path.write_bytes(b"RAM")
        self.saving()

    def give_way(self) -> None:
        """See `QemuMachine.give_way`."""

    def stop(self) -> None:
        """See `Machine.stop`."""
        self.running -= 1


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An LSMLAB_HOME of the test's own, and a current folder without labs."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(inventory.LIMIT_VARIABLE, raising=False)
    monkeypatch.setattr(cache, "POLL_SECONDS", 0.005)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> Guests:
    made_up = Guests()
    monkeypatch.setattr(states, "QemuMachine", made_up)
    monkeypatch.setattr(states, "settle", lambda *_: None)
    monkeypatch.setattr(cache, "free_mib", lambda: 100_000)
    return made_up


@pytest.fixture(scope="module")
def lab() -> Lab:
    return discovery.load_lab("debian-13")


@pytest.fixture
def image(lab: Lab) -> Image:
    return put_image(lab)


Ensure = Callable[..., SavedState]


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def ensure(lab: Lab, image: Image, notes: Notes) -> Iterator[Ensure]:
    """`states.ensure` of this lab; what it holds is held for the test."""
    with contextlib.ExitStack() as uses:

        def call(kernel: Kernel = NONE, **other: Any) -> SavedState:
            return states.ensure(lab, image, kernel, hardware(lab), notes, "a task", **{"uses": uses, **other})

        yield call


def folders() -> list[Path]:
    return sorted((paths.cache() / "states").glob("*"))


# One state


def test_a_state_is_booted_once_and_says_what_it_fits(
    ensure: Ensure, guests: Guests, lab: Lab, image: Image, notes: Notes
) -> None:
    first = ensure()
    assert ensure() == first
    assert guests.boots == ["debian-13-none"]
    assert guests.running == 0
    manifest = cache.read_manifest(first.folder)
    assert manifest is not None
    wanted = {
        "lab": "debian-13", "kernel": "none", "command_line": states.command_line(lab, image, NONE, "tcg"),
        "image": image.digest, "image_folder": image.folder.name,
        "qemu": hardware(lab).qemu_version, "accelerator": "tcg",
        "memory_mib": lab.memory_mib, "format": states.FORMAT,
    }  # fmt: skip
    assert wanted.items() <= manifest.items()
    assert manifest["cpu"]
    assert "host_cpu" not in manifest
    assert notes.notes == []
    assert cache.drop(first.folder) is None, "it is held for whoever asked for it"


def test_under_kvm_a_state_fits_this_machines_processor(
    lab: Lab, image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "CPU_INFO", tmp_path / "cpuinfo")
    template = "processor\t: 0\nmodel name\t: {}\nflags\t\t: {}\n\nprocessor\t: 1\nmodel name\t: other\nflags\t\t: {}\n"
    found: dict[str, set[str]] = {"tcg": set(), "kvm": set()}
    machines = [("AMD EPYC", "fpu vme", "x"), ("AMD EPYC", "fpu", "x"), ("Xeon", "fpu", "x"), ("Xeon", "fpu", "y")]
    for values in machines:
        (tmp_path / "cpuinfo").write_text(template.format(*values))
        for accelerator, keys in found.items():
            keys.add(states.folder_of(lab, image, NONE, hardware(lab, accelerator), "").name)
    assert {name: len(keys) for name, keys in found.items()} == {"tcg": 1, "kvm": 3}
    about = states.fits(lab, image, NONE, hardware(lab, "kvm"))
    assert about["host_cpu"] == "Xeon"
    assert len(about["host_cpu_flags"]) == 64


def spoil(folder: Path) -> None:
    (folder / "ram").write_bytes(b"ram")


def lose(folder: Path) -> None:
    (folder / "disk.qcow2").unlink()


def empty(folder: Path) -> None:
    (folder / cache.MANIFEST).write_text("")


def claim(folder: Path) -> None:
    file = folder / cache.MANIFEST
    file.write_text(file.read_text().replace('"memory_mib": ', '"memory_mib": 1'))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (spoil, "ram is damaged"),
        (lose, "disk.qcow2 is missing"),
        (empty, "its manifest cannot be read"),
        (claim, "its manifest has another memory_mib"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_state_is_said_and_made_anew(
    ensure: Ensure, guests: Guests, lab: Lab, notes: Notes, harm: Callable[[Path], None], words: str
) -> None:
    with contextlib.ExitStack() as uses:
        old = ensure(uses=uses)
    harm(old.folder)
    new = ensure()
    assert new.folder != old.folder
    assert folders() == [new.folder]
    assert len(guests.boots) == 2
    (note,) = notes.notes
    assert f"The saved state of {lab.id} (none) is damaged ({words}" in note


def test_a_damaged_state_that_another_run_uses_stays_for_that_run(ensure: Ensure, guests: Guests) -> None:
    with contextlib.ExitStack() as uses:
        old = ensure(uses=uses)
        spoil(old.folder)
        new = ensure()
        assert new.folder != old.folder
        assert (old.folder / "ram").exists()
        assert cache.read_manifest(old.folder) is None
        assert ensure() == new
    assert len(guests.boots) == 2


def test_what_changed_since_the_last_state_is_said(
    ensure: Ensure, guests: Guests, lab: Lab, image: Image, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure()
    ensure(Kernel.SELINUX)
    monkeypatch.setattr(states, "FORMAT", "of another time")
    put_state(lab, image, NONE, like=hardware(lab, "kvm"))
    ensure()
    assert notes.notes == ["The saved state of debian-13 (none) is stale (another format)."]
    assert len(guests.boots) == 3


def test_options_of_qemu_that_no_name_stands_for_are_told_as_well(
    ensure: Ensure, guests: Guests, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure()
    monkeypatch.setattr(Hardware, "arguments", lambda _: ["-machine", "another"])
    ensure()
    assert notes.notes == ["The saved state of debian-13 (none) is stale (another set of QEMU's options)."]
    assert len(guests.boots) == 2


def test_a_boot_that_fails_leaves_nothing(ensure: Ensure, guests: Guests, home: Path) -> None:
    def fail() -> None:
        raise MachineError("the guest panicked")

    guests.booting = fail
    with pytest.raises(MachineError, match="panicked"):
        ensure()
    assert folders() == []
    assert list((home / "cache" / "scratch").iterdir()) == []
    guests.booting = lambda: None
    ensure()
    assert len(guests.boots) == 2


@pytest.mark.parametrize("moment", ["booting", "saving"])
def test_a_disk_that_is_full_meanwhile(
    ensure: Ensure, guests: Guests, home: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def fail() -> None:
        monkeypatch.setattr(cache, "free_mib", lambda: 2)
        raise MachineError("saving its state: Unable to write to file")

    setattr(guests, moment, fail)
    with pytest.raises(HostError) as caught:
        ensure()
    assert f"{home}/cache: the disk is full: 2 MiB free while the booted state of debian-13 (none)" in str(caught.value)
    assert "lsmlab images prune" in str(caught.value)
    assert folders() == []
    assert list((home / "cache" / "scratch").iterdir()) == []


def test_a_disk_that_is_full_while_the_state_is_put_in_place(
    ensure: Ensure, guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(HostError, match="the disk is full"):
        ensure()
    assert folders() == []


def test_too_little_space_is_said_before_the_boot(
    ensure: Ensure, guests: Guests, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "free_mib", lambda: 9)
    with pytest.raises(HostError, match=f"9 MiB free; a saved guest takes up to {lab.memory_mib} MiB"):
        ensure()
    assert guests.boots == []


# Two runs that need the same state


def test_one_boots_and_the_other_waits(ensure: Ensure, guests: Guests, notes: Notes) -> None:
    go = threading.Event()
    guests.booting = lambda: go.wait(20)
    found: list[SavedState] = []
    threads = [threading.Thread(target=lambda: found.append(ensure())) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until_said(notes, "another run is booting this; waiting")
    time.sleep(0.05)
    go.set()
    for thread in threads:
        thread.join(20)
    assert len(guests.boots) == 1
    assert len(found) == 2
    assert found[0] == found[1]
    assert sum("waiting" in step for step in notes.steps) == 1


def wait_until_said(notes: Notes, words: str) -> None:
    deadline = time.monotonic() + 20
    while not any(words in step for step in notes.steps):
        assert time.monotonic() < deadline
        time.sleep(0.005)


# The bench


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with all that a bench asks for."""
    monkeypatch.setattr(host, "need", lambda program: f"/usr/bin/{program}")


@pytest.fixture
def opened(tools: None, guests: Guests, image: Image, lab: Lab, notes: Notes) -> Iterator[bench.Bench]:
    with bench.open_bench(lab, notes, accelerator="tcg") as found:
        yield found


def test_a_bench_holds_what_it_uses_and_no_more(
    tools: None, guests: Guests, image: Image, lab: Lab, notes: Notes
) -> None:
    unused = put_state(lab, image, Kernel.APPARMOR)
    with bench.open_bench(lab, notes, accelerator="tcg") as found:
        with found.guest(NONE, "one"):
            assert guests.running == 1
        held = [image.folder, found.state(NONE, "one").folder]
        done = inventory.prune(everything=True)
        assert [e.folder for e, _ in done.kept] == held
        assert [e.folder for e in done.removed] == [unused]
    done = inventory.prune(everything=True)
    assert {e.folder for e in done.removed} == set(held)


def test_a_wrong_limit_is_said_before_anything_is_made(
    tools: None, lab: Lab, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(inventory.LIMIT_VARIABLE, "a lot")
    with pytest.raises(DefinitionError, match="LSMLAB_CACHE_LIMIT=a lot"), bench.open_bench(lab, Notes()):
        pytest.fail("it opened")
    assert not home.exists()


def test_a_new_state_makes_the_limit_be_kept_and_stays(
    tools: None, guests: Guests, image: Image, lab: Lab, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = put_image(discovery.load_lab("debian-12"))
    age(other.folder, used=500)
    monkeypatch.setenv(inventory.LIMIT_VARIABLE, f"{(cache.size(paths.cache()) + 8192) / (1 << 30):.12f}")
    with bench.open_bench(lab, notes, accelerator="tcg") as found:
        assert other.folder.exists()
        state = found.state(NONE, "one")
        assert not other.folder.exists()
        assert state.folder.exists()
        assert image.folder.exists()
    assert any(f"removed image {other.folder.name}" in note for note in notes.notes)


# A state that QEMU refuses


def test_a_refused_state_is_said_and_booted_anew(
    opened: bench.Bench, guests: Guests, lab: Lab, image: Image, notes: Notes
) -> None:
    old = put_state(lab, image, NONE)
    guests.refused = lambda folder: "Unknown savevm section" if folder == old else ""
    with opened.guest(NONE, "one"), opened.guest(NONE, "two"):
        assert guests.running == 2
    assert guests.boots == ["debian-13-none"]
    assert guests.running == 0
    (new,) = folders()
    assert new != old
    assert guests.starts == [old, new, new]
    (note,) = notes.notes
    assert "The saved state of debian-13 (none) does not start (guest one did not come up: Unknown savevm" in note
    assert "booting it anew" in note
    assert "\n" not in note


def test_a_state_that_is_refused_again_is_an_error(opened: bench.Bench, guests: Guests) -> None:
    guests.refused = lambda _: "out of memory"
    for _ in range(3):
        with pytest.raises(MachineError, match="out of memory"), opened.guest(NONE, "one"):
            pytest.fail("it started")
    assert len(guests.boots) == 2, "once as there was none, once anew"
    assert len(folders()) == 1


def test_a_state_that_has_started_once_is_not_to_blame(opened: bench.Bench, guests: Guests, notes: Notes) -> None:
    with opened.guest(NONE, "one"):
        pass
    before = folders()
    guests.refused = lambda _: "cannot set up guest memory"
    with pytest.raises(MachineError, match="guest memory"), opened.guest(NONE, "two"):
        pytest.fail("it started")
    assert folders() == before
    assert notes.notes == []


def test_two_arms_whose_state_is_refused_boot_it_anew_once(
    opened: bench.Bench, guests: Guests, lab: Lab, image: Image, notes: Notes
) -> None:
    old = put_state(lab, image, NONE)
    both = threading.Barrier(2, timeout=20)

    def refused(folder: Path) -> str:
        if folder != old:
            return ""
        both.wait()
        return "Unknown savevm section"

    guests.refused = refused
    errors: list[LsmlabError] = []

    def arm(name: str) -> None:
        try:
            with opened.guest(NONE, name):
                pass
        except LsmlabError as error:
            errors.append(error)

    threads = [threading.Thread(target=arm, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors == []
    assert len(guests.boots) == 1
    assert len(notes.notes) == 1


def test_an_interrupted_run_blames_no_state(opened: bench.Bench, guests: Guests, lab: Lab, image: Image) -> None:
    old = put_state(lab, image, NONE)

    def killed(_: Path) -> str:
        opened.close()
        return "QEMU ended: killed"

    guests.refused = killed
    with pytest.raises(MachineError, match="the run was interrupted"), opened.guest(NONE, "one"):
        pytest.fail("it started")
    assert folders() == [old]
    assert cache.read_manifest(old) is not None


def test_an_interrupted_run_does_not_wait_for_another(
    opened: bench.Bench, guests: Guests, lab: Lab, image: Image, notes: Notes
) -> None:
    key = states.folder_of(lab, image, NONE, opened.hardware, "").name
    errors: list[LsmlabError] = []

    def arm() -> None:
        try:
            with opened.guest(NONE, "one"):
                pass
        except LsmlabError as error:
            errors.append(error)

    with cache.lock(paths.cache() / "locks" / f"state-{key}"):
        waiter = threading.Thread(target=arm)
        waiter.start()
        wait_until_said(notes, "another run is booting this; waiting")
        opened.close()
        waiter.join(2)
        assert not waiter.is_alive()
    assert [error.message for error in errors] == ["no guest is started: the run was interrupted"]
    assert guests.boots == []


# The boot


def test_a_boot_has_settled_when_udevs_workers_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    channel = MagicMock()
    channel.ask.side_effect = [[9, 10, 11], [9, 10], [9], [9, 12]]
    states._let_workers_end(channel)
    assert channel.ask.call_count == 3
    channel.ask.assert_called_with("pids", unit="systemd-udevd.service")


def test_udevs_workers_have_ended_when_a_state_is_saved(ensure: Ensure, guests: Guests) -> None:
    asked: list[Any] = []
    guests.saving = lambda: asked.extend(guests.channel.ask.call_args_list)
    ensure()
    assert asked[-1].args == ("pids",)
    assert asked[-1].kwargs == {"unit": "systemd-udevd.service"}


def test_a_boot_whose_workers_stay_is_saved_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "UDEV_SECONDS", 0.01)
    channel = MagicMock()
    channel.ask.return_value = [9, 10]
    states._let_workers_end(channel)
    assert channel.ask.call_count >= 1


@pytest.mark.parametrize(
    ("free_kib", "size"),
    [(48 << 10, 32 << 20), (40 << 20, 2 << 30), (1 << 20, (1 << 30) - (1 << 25)), (16 << 10, None), (40, None)],
)
def test_free_memory_is_cleared_by_a_program_that_ends_first_where_there_is_too_little(
    tmp_path: Path, free_kib: int, size: int | None
) -> None:
    meminfo, score = tmp_path / "meminfo", tmp_path / "score"
    meminfo.write_text(f"MemTotal: 99 kB\nMemFree: {free_kib} kB\n")
    program = states.CLEAR.replace("/proc/meminfo", str(meminfo)).replace("/proc/self/oom_score_adj", str(score))
    taken: list[tuple[int, int, bool, str]] = []

    def take(descriptor: int, size: int, *, flags: int) -> None:
        populated = bool(flags & 0x8000)  # asm-generic/mman.h
        taken.append((descriptor, size, populated, score.read_text()))

    memory = types.ModuleType("mmap")
    vars(memory).update(mmap=take, MAP_PRIVATE=mmap.MAP_PRIVATE, MAP_ANONYMOUS=mmap.MAP_ANONYMOUS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "mmap", memory)
        exec(program, {})  # noqa: S102 - as the guest's Python does
    assert taken == ([] if size is None else [(-1, size, True, "1000")])


@pytest.mark.parametrize(
    ("answer", "cleared"), [(said(), True), (said(code=1), False), (CommandTimeoutError("too long"), False)]
)
def test_memory_that_is_not_cleared_is_told(answer: Any, cleared: bool) -> None:
    channel = ScriptedChannel([(r"cat /proc/sys/vm/min_free_kbytes$", said("36864\n")), (r"python3 -I -c ", answer)])
    assert states._clear_free_memory(channel) is cleared
    steps = [line.partition(" ")[0] for line in channel.lines]
    assert steps == ["cat", "write", "python3", "write"]
    assert channel.written == {"/proc/sys/vm/min_free_kbytes": b"36864\n"}, "as it was"


def test_an_emulated_guest_goes_by_a_clock_that_a_restore_sets_back_and_has_its_libraries_at_one_place(
    lab: Lab, image: Image
) -> None:
    lines = {name: states.command_line(lab, image, NONE, name) for name in ("tcg", "kvm")}
    assert lines["tcg"].replace("tsc=unstable clocksource=hpet norandmaps ", "") == lines["kvm"] != lines["tcg"]
