"""How many guests may run: the budget, and the places that all runs of a user share. A stub stands for each guest."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from entries import Notes, put_image

from lsmlab import bench, cache, discovery, host, inventory, paths
from lsmlab.bench import OVERHEAD_MIB, RESERVE_MIB, Bench, Budget, guest_budget
from lsmlab.errors import HostError, LsmlabError, MachineError
from lsmlab.lab import Lab
from lsmlab.machine import states
from lsmlab.terms import Kernel

NONE = Kernel.NONE
MEMORY = 768
EACH = MEMORY + OVERHEAD_MIB
WAITING = "waiting for other guests to end"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An LSMLAB_HOME of the test's own."""
    monkeypatch.setenv("LSMLAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(inventory.LIMIT_VARIABLE, raising=False)
    monkeypatch.setattr(bench, "PLACE_SECONDS", 0.002)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def lab() -> Lab:
    return discovery.load_lab("debian-13")


# The budget


Machine = Callable[[int, int], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Make this a machine of so many processors and so much available memory, MiB."""

    def make(processors: int, available: int) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)))
        monkeypatch.setattr(bench, "_available_mib", lambda: available)

    return make


@pytest.mark.parametrize(
    ("processors", "available", "guests"),
    [
        (1, 64_000, 2),
        (2, 64_000, 3),
        (8, 64_000, 9),
        (8, RESERVE_MIB + 3 * EACH, 3),
        (8, RESERVE_MIB + 3 * EACH - 1, 2),
        (2, RESERVE_MIB + EACH, 1),
    ],
)
def test_as_many_guests_as_processors_and_memory_allow(
    machine: Machine, processors: int, available: int, guests: int
) -> None:
    machine(processors, available)
    budget = guest_budget(MEMORY)
    assert budget == Budget(guests, f"{processors} processors, {available} MiB of memory available")


@pytest.mark.parametrize("available", [0, RESERVE_MIB, RESERVE_MIB + EACH - 1])
def test_too_little_memory_for_one_guest(machine: Machine, available: int) -> None:
    machine(8, available)
    with pytest.raises(HostError) as caught:
        guest_budget(MEMORY)
    words = f"{available} MiB of memory are available; a guest takes {EACH} MiB, and {RESERVE_MIB} MiB stay with this"
    assert caught.value.message.startswith(words)
    assert "--guests 1" in caught.value.hint


@pytest.mark.parametrize(
    ("available", "reason"),
    [
        (RESERVE_MIB + 9 * EACH, "as asked for"),
        (RESERVE_MIB + 4 * EACH, "as asked for"),
        (RESERVE_MIB + 4 * EACH - 1, f"as asked for; {RESERVE_MIB + 4 * EACH - 1} MiB of memory are enough for 3"),
        (RESERVE_MIB, f"as asked for; {RESERVE_MIB} MiB of memory are enough for 0"),
        (0, "as asked for; 0 MiB of memory are enough for 0"),
    ],
)
def test_who_asks_for_a_number_gets_it_and_is_told(machine: Machine, available: int, reason: str) -> None:
    machine(1, available)
    assert guest_budget(MEMORY, 4) == Budget(4, reason)


def test_the_memory_that_is_available_is_read_from_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < bench._available_mib() < 1 << 30
    text = "MemTotal:       16384000 kB\nMemFree:         1024000 kB\nMemAvailable:    4096000 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    assert bench._available_mib() == 4000
    monkeypatch.setattr(Path, "read_text", lambda *_: "MemTotal:       16384000 kB\n")
    assert bench._available_mib() == 0, "a kernel that does not say it"


def test_too_little_memory_is_said_before_anything_is_made(machine: Machine, lab: Lab, home: Path) -> None:
    machine(2, 100)
    with pytest.raises(HostError, match="100 MiB of memory"), bench.open_bench(lab, Notes()):
        pytest.fail("it opened")
    assert not home.exists()


# The places


class Guests:
    """Stands for a saved state, and for each guest from it; keeps how many ran at once."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.started = 0
        self.starting: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def start(self, _name: str, _scratch: Path) -> Guests:
        """See `SavedState.start`."""
        self.starting()
        with self._lock:
            self.started += 1
            self.running += 1
            self.most = max(self.most, self.running)
        return self

    def give_way(self) -> None:
        """See `QemuMachine.give_way`."""

    def stop(self) -> None:
        """See `Machine.stop`."""
        with self._lock:
            self.running -= 1


@pytest.fixture
def guests(monkeypatch: pytest.MonkeyPatch) -> Guests:
    made_up = Guests()
    monkeypatch.setattr(states, "ensure", lambda *_, **__: made_up)
    monkeypatch.setattr(host, "need", lambda program: f"/usr/bin/{program}")
    return made_up


class Run:
    """One run: its bench, and what it said."""

    def __init__(self, opened: Bench, notes: Notes) -> None:
        self.bench = opened
        self.notes = notes

    @property
    def waits(self) -> int:
        """How often it said that it waits for a place."""
        return self.notes.steps.count(WAITING)


Open = Callable[[int], Run]


@pytest.fixture
def run_of(guests: Guests, lab: Lab) -> Iterator[Open]:
    """Opens a run that may have so many guests at once; two of them are like two processes of one user."""
    put_image(lab)
    with contextlib.ExitStack() as opened:

        def call(number: int) -> Run:
            notes = Notes()
            return Run(opened.enter_context(bench.open_bench(lab, notes, accelerator="tcg", guests=number)), notes)

        yield call


class Arm:
    """One guest of `run` in a thread of its own, until `leave`."""

    def __init__(self, run: Run, **how: Any) -> None:
        self.inside = threading.Event()
        self.errors: list[LsmlabError] = []
        self._go = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(run.bench, how), daemon=True)
        self._thread.start()

    def _work(self, opened: Bench, how: dict[str, Any]) -> None:
        try:
            with opened.guest(NONE, "a task", **how):
                self.inside.set()
                self._go.wait(20)
        except LsmlabError as error:
            self.errors.append(error)

    def leave(self) -> None:
        self._go.set()
        self.ended()

    def ended(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_two_runs_share_the_places_of_this_machine(run_of: Open, guests: Guests) -> None:
    first, second = run_of(1), run_of(1)
    one = Arm(first)
    assert one.inside.wait(20)
    other = Arm(second)
    wait_until(lambda: second.waits)
    assert not other.inside.wait(0.05)
    assert guests.running == 1
    one.leave()
    assert other.inside.wait(20)
    other.leave()
    assert (first.waits, second.waits) == (0, 1), "it is said once"
    assert (guests.most, guests.running) == (1, 0)


def test_never_more_guests_than_places_however_many_ask(run_of: Open, guests: Guests) -> None:
    runs = [run_of(2), run_of(2)]
    guests.starting = lambda: time.sleep(0.002)
    together = threading.Barrier(8, timeout=20)

    def work(run: Run) -> None:
        together.wait()
        for _ in range(3):
            with run.bench.guest(NONE, "a task"):
                time.sleep(0.002)

    threads = [threading.Thread(target=work, args=(runs[number % 2],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (guests.started, guests.most, guests.running) == (24, 2, 0)


def test_runs_of_different_budgets_have_no_more_than_the_largest(run_of: Open, guests: Guests) -> None:
    small, large = run_of(1), run_of(2)
    arms = [Arm(small)]
    assert arms[0].inside.wait(20)
    arms += [Arm(large), Arm(large)]
    wait_until(lambda: guests.running == 2 and large.waits)
    time.sleep(0.03)
    assert guests.running == 2
    for arm in arms:
        arm.leave()
    assert guests.most == 2


HOLD = """
import signal
from types import SimpleNamespace
from lsmlab.bench import Bench, Budget
from lsmlab.progress import Silent
run = SimpleNamespace(budget=Budget(1, ""), progress=Silent(), _check_open=lambda: None)
with Bench._place(run, "a task"):
    print("held", flush=True)
    signal.pause()
"""


def test_who_waits_for_a_place_is_before_who_has_just_left_it(run_of: Open) -> None:
    busy, second = run_of(1), run_of(1)
    first = Arm(busy)
    assert first.inside.wait(20)
    waiting = Arm(second)
    wait_until(lambda: second.waits)
    first.leave()
    again = Arm(busy)
    assert waiting.inside.wait(20)
    assert not again.inside.is_set()
    waiting.leave()
    assert again.inside.wait(20)
    again.leave()


def test_the_place_of_a_process_that_is_killed_is_free(run_of: Open) -> None:
    waiter = run_of(1)
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            arm = Arm(waiter)
            wait_until(lambda: waiter.waits)
            cache.sweep()  # as every run does at its start: a place that is held stays held
            assert not arm.inside.wait(0.05)
        finally:
            process.kill()
            process.wait()
    assert arm.inside.wait(20)
    arm.leave()


def test_what_is_kept_open_takes_no_place_and_waits_for_none(run_of: Open, guests: Guests) -> None:
    run = run_of(1)
    looking = [Arm(run, kept_open=True) for _ in range(2)]
    assert all(arm.inside.wait(20) for arm in looking)
    one = Arm(run)
    assert one.inside.wait(20)
    late = Arm(run, kept_open=True)
    assert late.inside.wait(20)
    assert (guests.running, run.waits) == (4, 0)
    for arm in (*looking, one, late):
        arm.leave()
    assert guests.running == 0


def test_who_waits_for_a_place_can_be_stopped(run_of: Open, guests: Guests) -> None:
    first, second = run_of(1), run_of(1)
    one = Arm(first)
    assert one.inside.wait(20)
    other = Arm(second)
    wait_until(lambda: second.waits)
    second.bench.close()
    other.ended()
    assert [error.message for error in other.errors] == ["no guest is started: the run was interrupted"]
    assert not other.inside.is_set()
    assert guests.started == 1
    one.leave()
    assert one.errors == [], "the other run goes on"


def free_places(number: int) -> list[bool]:
    found = []
    for place in range(number):
        with cache.lock(paths.cache() / "locks" / f"guest-{place}", wait=False) as free:
            found.append(free)
    return found


def test_a_place_is_held_as_long_as_the_guest_and_no_longer(run_of: Open) -> None:
    run = run_of(2)
    with run.bench.guest(NONE, "one"):
        assert sorted(free_places(2)) == [False, True]
        with run.bench.guest(NONE, "two"):
            assert free_places(2) == [False, False]
        assert sorted(free_places(2)) == [False, True]
    assert free_places(2) == [True, True]


def test_a_place_is_free_again_where_the_work_fails(run_of: Open, guests: Guests) -> None:
    run = run_of(1)
    with pytest.raises(RuntimeError, match="boom"), run.bench.guest(NONE, "one"):
        raise RuntimeError("boom")
    assert (free_places(1), guests.running) == ([True], 0)


def test_a_guest_that_does_not_start_leaves_its_place(run_of: Open, guests: Guests) -> None:
    run = run_of(1)
    with run.bench.guest(NONE, "one"):  # the state is good: what fails later is not its fault
        pass

    def fail() -> None:
        raise MachineError("out of memory")

    guests.starting = fail
    with pytest.raises(MachineError, match="out of memory"), run.bench.guest(NONE, "two"):
        pytest.fail("it started")
    assert free_places(1) == [True]


def test_a_run_that_is_stopped_while_its_guest_starts_keeps_neither(run_of: Open, guests: Guests) -> None:
    run = run_of(1)
    guests.starting = run.bench.close
    with pytest.raises(MachineError, match="the run was interrupted"), run.bench.guest(NONE, "one"):
        pytest.fail("it was stopped")
    assert (free_places(1), guests.started, guests.running) == ([True], 1, 0)
