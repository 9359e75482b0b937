"""Many flagship runs, a random fault at a random moment in each: no wrong verdict, nothing lost, nothing left.

Every run with a fault is followed by a clean one, which has to say CONTAINED; a run that ended before its fault came is
a clean one, and does not count. Prints a line for each fault and the figures; ends 1 where one verdict was wrong, an
outcome was lost or a process is left. About half a minute a fault.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from tabulate import tabulate

from lsmlab import discovery, run
from lsmlab.bench import Bench, open_bench
from lsmlab.channel.agent import AgentChannel
from lsmlab.errors import LsmlabError
from lsmlab.lab import Lab
from lsmlab.machine.qemu import QemuMachine
from lsmlab.outcome import Outcome
from lsmlab.progress import Silent
from lsmlab.store import Store
from lsmlab.terms import Kernel, Result, Verdict

FLAGSHIP = "nginx-reads-shadow"
RIGHT = {Verdict.CONTAINED, Verdict.ERROR, Verdict.INCONCLUSIVE}
"""What may be said of an experiment that contains, and that something happens to. All else is wrong."""
LONGEST = 11.0
"""Seconds into a run within which its fault comes."""
MISSES = 20
"""After so many clean outcomes instead there is something wrong with this machine."""


def kill_qemu(machine: QemuMachine) -> None:
    """The guest's process is killed."""
    os.kill(machine.pid, signal.SIGKILL)


def stop_auditd(machine: QemuMachine) -> None:
    """auditd ends, and stays away."""
    machine.channel.run(["sh", "-c", "systemctl mask --runtime auditd; pkill -KILL auditd"], timeout=20)


def fill_the_disk(machine: QemuMachine) -> None:
    """The guest's disk is filled to the last block."""
    fill = "fallocate -l $(($(stat -f -c '%f*%S' /))) /full; dd if=/dev/zero of=/full2 bs=4096 2>/dev/null; sync"
    machine.channel.run(["sh", "-c", fill], timeout=30)


def pause(machine: QemuMachine) -> None:
    """The guest stands still for one to five seconds."""
    machine.monitor("stop")
    time.sleep(random.uniform(1, 5))
    machine.monitor("cont")


def drop_the_channel(machine: QemuMachine) -> None:
    """The connection to the agent is closed."""
    cast(AgentChannel, machine.channel).close()


FAULTS: dict[str, Callable[[QemuMachine], None]] = {
    "QEMU killed": kill_qemu,
    "auditd stopped": stop_auditd,
    "disk full": fill_the_disk,
    "guest paused": pause,
    "channel dropped": drop_the_channel,
}


class Watched:
    """A bench that knows which of its guests run."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._lock = threading.Lock()
        self._running: list[QemuMachine] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._bench, name)

    @contextlib.contextmanager
    def guest(self, kernel: Kernel, task: str) -> Iterator[QemuMachine]:
        """See `Bench.guest`."""
        with self._bench.guest(kernel, task) as machine:
            with self._lock:
                self._running.append(machine)
            try:
                yield machine
            finally:
                with self._lock:
                    self._running.remove(machine)

    def one(self) -> QemuMachine | None:
        """One of the guests that run, any."""
        with self._lock:
            return random.choice(self._running) if self._running else None


def flagship(bench: Bench, lab: Lab, store: Store) -> list[Outcome]:
    """One run, both frameworks, recorded as it goes."""
    found = []
    for outcome in run.run(bench, run.cases(discovery.load_scenarios([FLAGSHIP]), lab)):
        store.add(outcome)
        found.append(outcome)
    return found


def with_fault(lab: Lab, store: Store, name: str) -> tuple[list[Outcome], str]:
    """One run with the fault at a random moment: its outcomes, and what was hit when; empty where it came too late."""
    moment = random.uniform(0, LONGEST)
    done = threading.Event()
    hit: list[str] = []

    def strike() -> None:
        start = time.monotonic()
        done.wait(moment)
        while not done.is_set():
            machine = watched.one()
            if machine is not None:
                hit.append(f"{machine.name} after {time.monotonic() - start:.1f} s")
                with contextlib.suppress(LsmlabError, OSError):
                    FAULTS[name](machine)
                return
            time.sleep(0.02)

    with open_bench(lab, Silent()) as bench:
        watched = Watched(bench)
        thread = threading.Thread(target=strike)
        thread.start()
        try:
            outcomes = flagship(cast(Bench, watched), lab, store)
        finally:
            done.set()
            thread.join()
    return outcomes, hit[0] if hit else ""


def clean_run(lab: Lab, store: Store) -> list[Outcome]:
    """One run without a fault."""
    with open_bench(lab, Silent()) as bench:
        return flagship(bench, lab, store)


def guests_left() -> list[str]:
    """Guests that were started by this process and still are: by any of its threads."""
    lists = (task / "children" for task in Path("/proc/self/task").iterdir())
    mine = [pid for children in lists for pid in children.read_text("ascii").split()]
    return [pid for pid in mine if b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wrong(outcome: Outcome) -> str:
    """What is wrong with an outcome, or nothing."""
    if outcome.verdict not in RIGHT:
        return f"{outcome.framework}: {outcome.verdict}: {outcome.reason}"
    enforcing = outcome.arms[-1]
    broken = next((a for a in enforcing.attempts if a.attempt == "read-shadow" and a.result is Result.ALLOWED), None)
    return f"{outcome.framework}: read-shadow allowed" if broken else ""


def main() -> int:
    """Run the soak; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, metavar="N", help="how many (default: 100)")
    parser.add_argument("--seed", type=int, metavar="N", help="repeat a run's faults and moments (default: random)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    random.seed(seed)
    print(f"{options.faults} faults, seed {seed}", flush=True)
    lab = discovery.load_lab("debian-13")
    counts: collections.Counter[tuple[str, Verdict]] = collections.Counter()
    problems: list[str] = []
    recorded = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "outcomes.sqlite")
        for number in range(options.faults):
            name = list(FAULTS)[number % len(FAULTS)]
            clean: list[Outcome] = []
            outcomes, hit = with_fault(lab, store, name)
            while not hit and len(clean) < MISSES:
                clean += outcomes
                outcomes, hit = with_fault(lab, store, name)
            if not hit:
                raise SystemExit(f"{number + 1}, {name}: no guest could be hit")
            counts.update((name, o.verdict) for o in outcomes)
            problems += [f"{number + 1}, {name}: {words}" for o in outcomes if (words := wrong(o))]
            clean += clean_run(lab, store)
            recorded += len(outcomes) + len(clean)
            problems += [
                f"{number + 1}, a clean run beside it: {o.framework}: {o.verdict}: {o.reason}"
                for o in clean
                if o.verdict is not Verdict.CONTAINED
            ]
            if store.count() != recorded:
                problems.append(f"{number + 1}: {recorded} outcomes recorded, {store.count()} kept")
            problems += [f"{number + 1}: process {pid} is left" for pid in guests_left()]
            said = ", ".join(f"{o.framework} {o.verdict}" for o in outcomes)
            print(f"{number + 1:3} {name}, {hit}: {said}", flush=True)
    minutes = (time.monotonic() - start) / 60
    verdicts = sorted({verdict for _, verdict in counts})
    rows = [(name, *(counts[name, verdict] for verdict in verdicts)) for name in FAULTS]
    print()
    print(tabulate(rows, headers=("fault", *verdicts), tablefmt="github"))
    print(f"\n{options.faults} faults, each with a clean run after it, in {minutes:.0f} min")
    print(f"{recorded} outcomes recorded and kept, {len(problems)} problems")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
