"""Stand-ins for guests: one that runs real commands in a folder of this machine, one that answers from a script."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from lsmlab.bench import Bench
from lsmlab.channel.base import Channel, CommandResult
from lsmlab.errors import ChannelError, CommandTimeoutError, MachineError
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.outcome import Environment
from lsmlab.progress import Progress, Silent
from lsmlab.terms import Kernel

MARK = "LSMLAB_FAKE_GUEST"
"""In the environment of every process of a fake guest: whose it is."""


class FakeChannel:
    """A channel that runs commands on this machine, in `root`. Relative paths are below it; /bin is the machine's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open = True
        self._mark = uuid.uuid4().hex

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """See `Channel.run`."""
        self._need_open()
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                list(argv),
                cwd=self.root,
                env={**os.environ, MARK: self._mark},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            return CommandResult(tuple(argv), 127, None, b"", f"{argv[0]}: {error.strerror}".encode(), 0.0)
        try:
            out, err = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise CommandTimeoutError(f"fake: {shlex.join(argv)[:200]}: not done after {timeout:.0f} s") from None
        self._need_open()  # it was ended with the guest
        code = process.returncode
        seconds = time.monotonic() - start
        return CommandResult(
            tuple(argv), code if code >= 0 else None, -code if code < 0 else None, out, err, round(seconds, 3)
        )

    def write_file(self, path: str, data: bytes) -> None:
        """See `Channel.write_file`."""
        self._need_open()
        try:
            (self.root / path).write_bytes(data)
        except OSError as error:
            raise ChannelError(f"fake: {path}: {error.strerror}") from error

    def _need_open(self) -> None:
        if not self.open:
            raise ChannelError("fake: the guest is gone")

    def kill_processes(self) -> None:
        """End every process that a command of this channel has left behind, whatever its session."""
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and f"{MARK}={self._mark}".encode() in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)


class FakeMachine:
    """A machine whose disk is a folder: a snapshot copies it, a restore ends its processes and puts the copy back."""

    def __init__(self, folder: Path) -> None:
        self._kept = folder / "snapshots"
        self._kept.mkdir(parents=True)
        self._disk = folder / "disk"
        self._disk.mkdir()
        self._channel = FakeChannel(self._disk)

    @property
    def channel(self) -> Channel:
        """See `Machine.channel`."""
        return self._channel

    @property
    def disk(self) -> Path:
        """The folder that commands run in."""
        return self._disk

    @property
    def running(self) -> bool:
        """False once it was stopped."""
        return self._channel.open

    def snapshot(self, name: str) -> None:
        """See `Machine.snapshot`."""
        self._need_running()
        shutil.rmtree(self._kept / name, ignore_errors=True)
        shutil.copytree(self._disk, self._kept / name, symlinks=True)

    def restore(self, name: str) -> None:
        """See `Machine.restore`."""
        self._need_running()
        if not (self._kept / name).is_dir():
            raise MachineError(f"fake: no snapshot {name!r}")
        self._channel.kill_processes()
        for entry in self._disk.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        shutil.copytree(self._kept / name, self._disk, symlinks=True, dirs_exist_ok=True)

    def console_tail(self, lines: int = 15) -> str:
        """See `Machine.console_tail`. The console is the file `console` on its disk."""
        console = self._disk / "console"
        if not self.running or not console.exists():
            return ""
        return "\n".join(console.read_text("utf-8", "backslashreplace").splitlines()[-lines:])

    def stop(self) -> None:
        """See `Machine.stop`."""
        self._channel.open = False
        self._channel.kill_processes()

    def _need_running(self) -> None:
        if not self.running:
            raise MachineError("fake: the guest was stopped")


Answer = CommandResult | Exception | Callable[[tuple[str, ...]], CommandResult]


def said(out: str | bytes = b"", *, err: str = "", code: int = 0) -> CommandResult:
    """What a scripted command did."""
    data = out.encode() if isinstance(out, str) else out
    return CommandResult((), code, None, data, err.encode(), 0.01)


def as_line(argv: Sequence[str]) -> str:
    """A command as scripts match it: the program and its arguments, without the text of a shell script of ours."""
    script = len(argv) > 3 and argv[0] in {"sh", "/bin/sh"} and argv[1] == "-c"
    return " ".join(argv[3:] if script else argv)


class ScriptedChannel:
    """Answers with the first of `answers` whose pattern fits the command's line; an exception is raised.

    A command that nobody foresaw fails the test. `lines` keeps what was asked, `written` what was written.
    """

    def __init__(self, answers: Sequence[tuple[str, Answer]]) -> None:
        self._answers = list(answers)
        self.lines: list[str] = []
        self.written: dict[str, bytes] = {}

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """See `Channel.run`."""
        line = as_line(argv)
        self.lines.append(line)
        for pattern, answer in self._answers:
            if re.match(pattern, line):
                if isinstance(answer, Exception):
                    raise answer
                found = answer(tuple(argv)) if callable(answer) else answer
                return CommandResult(
                    tuple(argv), found.exit_code, found.signal, found.stdout, found.stderr, found.seconds
                )
        raise AssertionError(f"nobody foresaw the command: {line}")

    def write_file(self, path: str, data: bytes) -> None:
        """See `Channel.write_file`."""
        self.lines.append(f"write {path}")
        self.written[path] = data


class ScriptedMachine:
    """A machine around a scripted channel; `restored` counts."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.running = True
        self.snapshots: list[str] = []
        self.restored = 0

    def snapshot(self, name: str) -> None:
        """See `Machine.snapshot`."""
        self.snapshots.append(name)

    def restore(self, name: str) -> None:
        """See `Machine.restore`."""
        if name not in self.snapshots:
            raise MachineError(f"no snapshot {name!r}")
        self.restored += 1

    def console_tail(self, lines: int = 15) -> str:
        """See `Machine.console_tail`."""
        return ""

    def stop(self) -> None:
        """See `Machine.stop`."""
        self.running = False


IMAGE = Image(
    lab="debian-13",
    folder=Path("/nonexistent/image"),
    digest="86" * 32,
    kernel_release="6.12.0-fake",
    packages={"nginx": "1.26.3"},
    built="2026-11-24T08:44:40+00:00",
)
ENVIRONMENT = Environment(
    lsmlab="0", image=IMAGE.digest, kernel=IMAGE.kernel_release, packages=IMAGE.packages, qemu="fake",
    accelerator="fake", memory_mib=768,
)  # fmt: skip


class FakeBench:
    """A bench whose guests come from `make`. `started` lists them as (kernel, task); all end with their block.

    `stop_all` stands for what Ctrl-C does to guests: it ends those that are there, and releases whoever waits for
    `stopped`.
    """

    def __init__(
        self,
        lab: Lab,
        make: Callable[[Kernel, str], ScriptedMachine | FakeMachine],
        progress: Progress | None = None,
    ) -> None:
        self.lab = lab
        self.image = IMAGE
        self.environment = ENVIRONMENT
        self.progress = progress or Silent()
        self.started: list[tuple[Kernel, str]] = []
        self.stopped = threading.Event()
        self._make = make
        self._alive: set[ScriptedMachine | FakeMachine] = set()
        self._closed = threading.Event()
        self._lock = threading.Lock()

    @property
    def as_bench(self) -> Bench:
        """Itself, for whoever asks for the real one's type."""
        return cast("Bench", self)

    @property
    def alive(self) -> int:
        """How many guests run."""
        return len(self._alive)

    def close(self) -> None:
        """See `Bench.close`."""
        self._closed.set()

    @contextlib.contextmanager
    def guest(self, kernel: Kernel, task: str) -> Iterator[ScriptedMachine | FakeMachine]:
        """See `Bench.guest`."""
        with self._lock:
            self.started.append((kernel, task))
        machine = self._make(kernel, task)
        with self._lock:
            self._alive.add(machine)
        try:
            if self._closed.is_set():
                raise MachineError("no guest is started: the run was interrupted")
            yield machine
        finally:
            machine.stop()
            with self._lock:
                self._alive.discard(machine)

    def stop_all(self) -> None:
        """End all guests, as `qemu.stop_all` does."""
        self.stopped.set()
        with self._lock:
            machines = list(self._alive)
        for machine in machines:
            machine.stop()
