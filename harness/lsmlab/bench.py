"""The workbench: one lab made ready on this machine, and guests from it within a budget of memory and processors."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lsmlab import __version__, cache, host, inventory, paths
from lsmlab.definition import digest_of
from lsmlab.errors import HostError, MachineError
from lsmlab.image import build
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.machine import accel, qemu, states
from lsmlab.machine.accel import Acceleration
from lsmlab.machine.base import Machine
from lsmlab.machine.hardware import Hardware
from lsmlab.machine.qemu import QEMU, QemuMachine
from lsmlab.machine.states import SavedState
from lsmlab.outcome import Environment
from lsmlab.progress import Progress
from lsmlab.terms import Kernel

OVERHEAD_MIB = 160
"""What a QEMU process takes besides its guest's memory."""
RESERVE_MIB = 512
"""Left to the host."""
PLACE_SECONDS = 0.02
"""Between two looks for a free place."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How many guests may run at once, and why."""

    guests: int
    reason: str


def guest_budget(memory_mib: int, wanted: int | None = None) -> Budget:
    """As many guests as processors and memory allow, or `wanted`. Raises HostError where not even one fits.

    One more than there are processors: a guest that waits for its disk or for us leaves its processor to another.
    """
    processors = len(os.sched_getaffinity(0))
    available = _available_mib()
    fitting = (available - RESERVE_MIB) // (memory_mib + OVERHEAD_MIB)
    if wanted is not None:
        few = f"; {available} MiB of memory are enough for {max(fitting, 0)}" if fitting < wanted else ""
        return Budget(wanted, f"as asked for{few}")
    if fitting < 1:
        raise HostError(
            f"{available} MiB of memory are available; a guest takes {memory_mib + OVERHEAD_MIB} MiB, and "
            f"{RESERVE_MIB} MiB stay with this machine",
            hint="Free some memory, or say `--guests 1` to try all the same.",
        )
    return Budget(min(processors + 1, fitting), f"{processors} processors, {available} MiB of memory available")


def _available_mib() -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0


class Workbench(Protocol):
    """What an experiment needs: a lab, and its machines one after the other or side by side."""

    @property
    def name(self) -> str:
        """What an outcome calls the lab."""
        ...

    @property
    def lab(self) -> Lab:
        """What it is made of, and what its services are called; its id is the one whose expectations count."""
        ...

    @property
    def image(self) -> Image | None:
        """The disk of its guests; None for a machine that was there already."""
        ...

    @property
    def progress(self) -> Progress:
        """Told of each step."""
        ...

    @property
    def budget(self) -> Budget:
        """How many machines there are at once."""
        ...

    @property
    def environment(self) -> Environment:
        """What an outcome says of all this."""
        ...

    def command_line(self, kernel: Kernel) -> str:
        """What the kernel is booted with."""
        ...

    def guest(self, kernel: Kernel, task: str) -> AbstractContextManager[Machine]:
        """A machine for the length of the block. Raises MachineError."""
        ...

    def close(self) -> None:
        """Let no further machine start: the program was asked to stop."""
        ...


class Bench:
    """One lab, ready. Guests start from saved states, which are made on first use, each once."""

    def __init__(
        self,
        lab: Lab,
        progress: Progress,
        scratch: Path,
        *,
        uses: contextlib.ExitStack,
        limit: inventory.Limit,
        budget: Budget,
        accelerator: str = "auto",
        file: Path | None = None,
    ) -> None:
        for program in (QEMU, "qemu-img", "setpriv"):
            host.need(program)  # now, and not after minutes of building an image
        threading.Thread(target=_ask_early, daemon=True).start()
        self.lab = lab
        self.progress = progress
        self.image: Image = build.ensure(lab, progress, uses=uses, accelerator=accelerator, file=file)
        limit.keep()
        progress.step("accelerator", "proving the accelerator with the lab's kernel")
        self.acceleration: Acceleration = accel.choose(self.image.kernel, accelerator)
        if lab.needs_kvm and self.acceleration.name != "kvm":
            raise accel.kvm_needed(lab.id)
        progress.done("accelerator")
        self._version = host.version(QEMU, "--version")
        self._scratch = scratch
        self._locks = {kernel: threading.Lock() for kernel in Kernel}
        self._states: dict[Kernel, SavedState] = {}
        self._loaded: set[Kernel] = set()
        self._renewed: set[Kernel] = set()
        self._limit = limit
        self._uses = {kernel: uses.enter_context(contextlib.ExitStack()) for kernel in Kernel}
        self._closed = threading.Event()
        self.budget = budget

    @property
    def name(self) -> str:
        """See `Workbench.name`."""
        return self.lab.id

    def command_line(self, kernel: Kernel) -> str:
        """See `Workbench.command_line`."""
        return states.command_line(self.lab, self.image, kernel, self.acceleration.name)

    def close(self) -> None:
        """Let no further guest start, boots included: the program was asked to stop."""
        self._closed.set()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise MachineError("no guest is started: the run was interrupted")

    @property
    def hardware(self) -> Hardware:
        """What every guest of this bench is made of."""
        return Hardware(self.acceleration.name, self.lab.memory_mib, self._version, self.image.network)

    @property
    def environment(self) -> Environment:
        """What an outcome says of all this."""
        return Environment(
            lsmlab=__version__,
            lab_digest=digest_of(self.lab.model_dump_json()),
            image=self.image.digest,
            kernel=self.image.kernel_release,
            packages=self.image.packages,
            policies=self.image.policies,
            qemu=self._version,
            accelerator=self.acceleration.name,
            memory_mib=self.lab.memory_mib,
        )

    def state(self, kernel: Kernel, task: str) -> SavedState:
        """The saved state of one boot; booted on first use. Raises MachineError and FrameworkError."""
        with self._locks[kernel]:
            self._check_open()
            if kernel not in self._states:
                self.progress.step(task, f"looking for a booted guest (kernel: {kernel})")
                self._states[kernel] = states.ensure(
                    self.lab,
                    self.image,
                    kernel,
                    self.hardware,
                    self.progress,
                    task,
                    uses=self._uses[kernel],
                    check=self._check_open,
                )
                self._limit.keep()
            return self._states[kernel]

    def _start(self, kernel: Kernel, task: str, place: contextlib.ExitStack | None) -> QemuMachine:
        """A guest from the saved state. One that QEMU refuses is said and booted anew, once. Raises MachineError."""
        state = self.state(kernel, task)
        try:
            machine = self._start_from(state, task, place)
        except MachineError as error:
            if place is not None:
                place.close()  # who waits for a state holds no place
            self._give_up(kernel, state, error)
            machine = self._start_from(self.state(kernel, task), task, place)
        self._loaded.add(kernel)
        return machine

    def _start_from(self, state: SavedState, task: str, place: contextlib.ExitStack | None) -> QemuMachine:
        if place is not None:
            place.enter_context(self._place(task))
        self.progress.step(task, "starting the guest")
        return state.start(task.replace(" ", "-").replace("/", "-")[:60], self._scratch)

    @contextlib.contextmanager
    def _place(self, task: str) -> Iterator[None]:
        """One of the places for guests on this machine, which all runs of this user share; waits for one.

        One at a time waits for a place, the others for their turn: who has just left a place is behind them.
        """

        @functools.cache  # said once
        def waiting() -> None:
            self.progress.step(task, "waiting for other guests to end")

        with contextlib.ExitStack() as place:
            turn = paths.cache() / "locks" / "guest-turn"
            with cache.lock(turn, waiting=waiting, check=self._check_open):
                while not _take_place(self.budget.guests, place):
                    waiting()
                    self._check_open()
                    time.sleep(PLACE_SECONDS)
            yield

    def _give_up(self, kernel: Kernel, state: SavedState, error: MachineError) -> None:
        """Have nobody start from `state` again. Raises `error` where the state is not to blame, or was made anew."""
        with self._locks[kernel]:
            self._check_open()
            if self._states.get(kernel) is not state:
                return  # another arm was here first
            if kernel in self._loaded or kernel in self._renewed:
                raise error
            why = error.message.partition("\n")[0]
            self.progress.note(f"The saved state of {self.lab.id} ({kernel}) does not start ({why}): booting it anew.")
            self._renewed.add(kernel)
            del self._states[kernel]
            self._uses[kernel].close()
            states.discard(state.folder, self.progress)

    @contextlib.contextmanager
    def guest(self, kernel: Kernel, task: str, *, kept_open: bool = False) -> Iterator[QemuMachine]:
        """A guest of one boot, stopped at the end of the block.

        `kept_open`: by a person or a test session; it takes none of the places that experiments wait for.
        """
        with contextlib.ExitStack() as place:
            machine = self._start(kernel, task, None if kept_open else place)
            place.callback(machine.stop)
            if kernel is Kernel.NONE and not kept_open:  # it has one arm, where others have two that take longer each
                machine.give_way()
            self._check_open()  # it may have been asked to stop between its start and now
            yield machine


def _ask_early() -> None:
    """Ask how disks are read here, so that no guest waits for the answer. A guest asks again where that fails."""
    with contextlib.suppress(Exception):
        qemu.disk_engine()


def _take_place(number: int, held: contextlib.ExitStack) -> bool:
    """Have `held` hold one of the first `number` places, where one is free."""
    for place in range(number):
        with contextlib.ExitStack() as trial:
            if trial.enter_context(cache.lock(paths.cache() / "locks" / f"guest-{place}", wait=False)):
                held.push(trial.pop_all())
                return True
    return False


@contextlib.contextmanager
def guest_pool(bench: Workbench, name: str) -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Threads called `name`, as many as `bench` may have guests at once.

    Where the block is left by an exception, an interruption too, no further guest starts, and guests and programs of
    the host that run are ended. Either way the threads have ended when the block has.
    """
    pool = concurrent.futures.ThreadPoolExecutor(bench.budget.guests, thread_name_prefix=name)
    try:
        yield pool
    except BaseException:
        bench.close()  # first: who waits for a guest then starts none
        pool.shutdown(wait=False, cancel_futures=True)
        qemu.stop_all()
        host.stop_all()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        host.go_on()


@contextlib.contextmanager
def open_bench(
    lab: Lab, progress: Progress, *, accelerator: str = "auto", guests: int | None = None, file: Path | None = None
) -> Iterator[Bench]:
    """A bench, its scratch folder, and its hold on what it uses of the cache, for as long as the block lasts.

    `guests`: how many may run at once, where it is not left to processors and memory. `file`: see `build.ensure`.
    Leftovers of killed runs are swept first.
    """
    budget = guest_budget(lab.memory_mib, guests)
    limit = inventory.Limit(progress)
    cache.sweep()
    with contextlib.ExitStack() as uses, cache.scratch("run") as folder:
        yield Bench(lab, progress, folder, uses=uses, limit=limit, budget=budget, accelerator=accelerator, file=file)
