"""The workbench: one lab made ready on this machine, and guests from it within a budget of memory and processors."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lsmlab import __version__, cache, host
from lsmlab.definition import digest_of
from lsmlab.errors import HostError, MachineError
from lsmlab.image import build
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.machine import accel, states
from lsmlab.machine.accel import Acceleration
from lsmlab.machine.qemu import QEMU, Hardware, QemuMachine
from lsmlab.machine.states import SavedState
from lsmlab.outcome import Environment
from lsmlab.progress import Progress
from lsmlab.terms import Kernel

OVERHEAD_MIB = 160
"""What a QEMU process takes besides its guest's memory."""
RESERVE_MIB = 512
"""Left to the host."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How many guests may run at once, and why."""

    guests: int
    reason: str


def guest_budget(memory_mib: int, wanted: int | None = None) -> Budget:
    """As many guests as processors and memory allow, or `wanted`. Raises HostError where not even one fits."""
    processors = len(os.sched_getaffinity(0))
    available = _available_mib()
    fitting = (available - RESERVE_MIB) // (memory_mib + OVERHEAD_MIB)
    if wanted is not None:
        return Budget(wanted, "as asked for")
    if fitting < 1:
        raise HostError(
            f"{available} MiB of memory are available; a guest takes {memory_mib + OVERHEAD_MIB} MiB, and "
            f"{RESERVE_MIB} MiB stay with this machine",
            hint="Free some memory, or say `--guests 1` to try all the same.",
        )
    return Budget(min(processors, fitting), f"{processors} processors, {available} MiB available")


def _available_mib() -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0


class Bench:
    """One lab, ready. Guests start from saved states, which are made on first use, each once."""

    def __init__(self, lab: Lab, progress: Progress, scratch: Path, *, accelerator: str = "auto") -> None:
        for program in (QEMU, "qemu-img", "setpriv"):
            host.need(program)  # now, and not after minutes of building an image
        self.lab = lab
        self.progress = progress
        self.image: Image = build.ensure(lab, progress)
        progress.step("accelerator", "proving the accelerator with the lab's kernel")
        self.acceleration: Acceleration = accel.choose(self.image.kernel, accelerator)
        progress.done("accelerator")
        self._version = host.version(QEMU, "--version")
        self._scratch = scratch
        self._locks = {kernel: threading.Lock() for kernel in Kernel}
        self._states: dict[Kernel, SavedState] = {}
        self._closed = threading.Event()

    def close(self) -> None:
        """Let no further guest start, boots included: the program was asked to stop."""
        self._closed.set()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise MachineError("no guest is started: the run was interrupted")

    @property
    def hardware(self) -> Hardware:
        """What every guest of this bench is made of."""
        return Hardware(self.acceleration.name, self.lab.memory_mib, self._version)

    @property
    def environment(self) -> Environment:
        """What an outcome says of all this."""
        return Environment(
            lsmlab=__version__,
            lab_digest=digest_of(self.lab.model_dump_json()),
            image=self.image.digest,
            kernel=self.image.kernel_release,
            packages=self.image.packages,
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
                self._states[kernel] = states.ensure(self.lab, self.image, kernel, self.hardware, self.progress, task)
            return self._states[kernel]

    @contextlib.contextmanager
    def guest(self, kernel: Kernel, task: str) -> Iterator[QemuMachine]:
        """A guest of one boot, stopped at the end of the block."""
        state = self.state(kernel, task)
        self.progress.step(task, "starting the guest")
        machine = state.start(task.replace(" ", "-").replace("/", "-")[:60], self._scratch)
        try:
            self._check_open()  # it may have been asked to stop between its start and now
            yield machine
        finally:
            machine.stop()


@contextlib.contextmanager
def open_bench(lab: Lab, progress: Progress, *, accelerator: str = "auto") -> Iterator[Bench]:
    """A bench, and its scratch folder for as long as the block lasts. Leftovers of killed runs are swept first."""
    cache.sweep()
    with cache.in_use(), cache.scratch("run") as folder:
        yield Bench(lab, progress, folder, accelerator=accelerator)
