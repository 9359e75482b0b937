"""Stand-ins for guests: one that does real work in a folder of this machine, one that answers from a script."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import re
import shlex
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lsmlab.bench import Bench, Budget
from lsmlab.channel.agent import command_result
from lsmlab.channel.base import Channel, CommandResult
from lsmlab.errors import ChannelError, CommandTimeoutError, MachineError
from lsmlab.guest import agent
from lsmlab.image import debian
from lsmlab.image.build import Image
from lsmlab.lab import Lab
from lsmlab.machine import states
from lsmlab.outcome import Environment
from lsmlab.progress import Progress, Silent
from lsmlab.terms import Kernel

MARK = "LSMLAB_FAKE_GUEST"
"""In the environment of every process of a fake guest: whose it is."""


HARMLESS = frozenset({"ping", "run", "write"})
"""The agent's operations that a fake guest does. The others look at this machine as a whole, or change it: its clock,
its memory."""


class FakeChannel:
    """A channel to the agent's own functions, in this process: commands run on this machine, in `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open = True
        self._mark = uuid.uuid4().hex

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        """See `Channel.ask`. Only what is `HARMLESS` is done."""
        self._need_open()
        if operation not in HARMLESS:
            raise ChannelError(f"fake: {operation}: not done on this machine")
        if operation == "run":  # in the folder, and marked
            arguments["argv"] = ["env", "-C", str(self.root), "--", f"{MARK}={self._mark}", *arguments["argv"]]
        try:
            answer = agent.OPERATIONS[operation](**json.loads(json.dumps(arguments)))
        except (agent.Refused, OSError, TypeError, ValueError, KeyError) as error:
            raise ChannelError(f"fake: {operation}: {error}") from error
        self._need_open()  # what was asked may have been ended with the guest
        return json.loads(json.dumps(answer))

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """See `Channel.run`."""
        words = base64.b64encode(stdin).decode()
        answer = self.ask("run", argv=list(argv), stdin=words, timeout=timeout)
        result = command_result(answer, tuple(argv), "fake")
        if answer["timed_out"]:
            raise CommandTimeoutError(f"fake: {shlex.join(argv)[:200]}: not done after {timeout:.0f} s")
        return result

    def write_file(self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None) -> None:
        """See `Channel.write_file`."""
        self.ask("write", path=path, data=base64.b64encode(data).decode(), mode=mode, owner=owner)

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

    stays = False

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


class ScriptedChannel:
    """Answers commands with the first of `answers` whose pattern fits the line, and questions with what `asked` has for
    the operation. An exception is raised; a function is called, with the words of the command or the arguments of the
    question. A file that is written is a command `write PATH`, and needs no answer.

    What nobody foresaw fails the test. `lines` keeps all that was done in its order, `questions` what was asked,
    `written` what was written, `rights` its mode and owner. Questions and answers come through JSON, as with a guest.
    """

    def __init__(self, answers: Sequence[tuple[str, Answer]] = (), asked: Mapping[str, Any] | None = None) -> None:
        self._answers = list(answers)
        self._asked = dict(asked or {})
        self.lines: list[str] = []
        self.questions: list[tuple[str, dict[str, Any]]] = []
        self.written: dict[str, bytes] = {}
        self.rights: dict[str, tuple[int | None, str | None]] = {}

    def _answer(self, line: str, words: tuple[str, ...]) -> CommandResult | None:
        self.lines.append(line)
        for pattern, answer in self._answers:
            if re.match(pattern, line):
                if isinstance(answer, Exception):
                    raise answer
                return answer(words) if callable(answer) else answer
        return None

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60) -> CommandResult:
        """See `Channel.run`."""
        words = tuple(argv)
        found = self._answer(" ".join(argv), words)
        if found is None:
            raise AssertionError(f"nobody foresaw the command: {shlex.join(argv)}")
        return CommandResult(words, found.exit_code, found.signal, found.stdout, found.stderr, found.seconds)

    def write_file(self, path: str, data: bytes, *, mode: int | None = None, owner: str | None = None) -> None:
        """See `Channel.write_file`. A function among the answers gets `write`, the path and the text."""
        self._answer(f"write {path}", ("write", path, data.decode("utf-8", "replace")))
        self.written[path] = data
        self.rights[path] = mode, owner

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        """See `Channel.ask`."""
        arguments = json.loads(json.dumps(arguments))
        self.lines.append(f"ask {operation}")
        self.questions.append((operation, arguments))
        if operation not in self._asked:
            raise AssertionError(f"nobody foresaw the question: {operation} {arguments}")
        answer = self._asked[operation]
        if isinstance(answer, Exception):
            raise answer
        return json.loads(json.dumps(answer(**arguments) if callable(answer) else answer))

    def asked_for(self, operation: str) -> list[dict[str, Any]]:
        """The arguments of each question for `operation`."""
        return [arguments for name, arguments in self.questions if name == operation]


class ScriptedMachine:
    """A machine around a scripted channel, whose `lines` get its snapshots and restores as well.

    `state` is what its script remembers: a snapshot keeps a copy of it, and a restore puts that back.
    """

    def __init__(self, channel: ScriptedChannel, state: dict[str, Any] | None = None) -> None:
        self.channel = channel
        self.running = True
        self.stays = False
        self._state = state if state is not None else {}
        self._kept: dict[str, dict[str, Any]] = {}

    @property
    def turns(self) -> list[str]:
        """Its snapshots and restores, in order."""
        return [line for line in self.channel.lines if line.startswith(("snapshot ", "restore "))]

    def snapshot(self, name: str) -> None:
        """See `Machine.snapshot`."""
        self._need_running()
        self.channel.lines.append(f"snapshot {name}")
        self._kept[name] = copy.deepcopy(self._state)

    def restore(self, name: str) -> None:
        """See `Machine.restore`."""
        self._need_running()
        self.channel.lines.append(f"restore {name}")
        if name not in self._kept:
            raise MachineError(f"no snapshot {name!r}")
        self._state.clear()
        self._state.update(copy.deepcopy(self._kept[name]))

    def console_tail(self, lines: int = 15) -> str:
        """See `Machine.console_tail`."""
        return ""

    def stop(self) -> None:
        """See `Machine.stop`."""
        self.running = False

    def _need_running(self) -> None:
        if not self.running:
            raise MachineError("scripted: QEMU ended")


IMAGE = Image(
    lab="debian-13",
    folder=Path("/nonexistent/image"),
    digest="86" * 32,
    kernel_release="6.12.0-fake",
    packages={"nginx": "1.26.3"},
    policies={},
    built="2026-11-24T08:44:40+00:00",
    root_arguments=debian.ROOT_ARGUMENTS,
    files=frozenset(debian.FILES),
)
ENVIRONMENT = Environment(
    lsmlab="0", image=IMAGE.digest, kernel=IMAGE.kernel_release, packages=IMAGE.packages, qemu="fake",
    accelerator="fake", memory_mib=768,
)  # fmt: skip


class FakeBench:
    """A bench whose guests come from `make`. `started` lists who asked for one, as (kernel, task); `made` counts those
    that there were. All end with their block.

    `stop_all` stands for what Ctrl-C does to guests: it ends those that are there, and releases whoever waits for
    `stopped`.
    """

    def __init__(
        self,
        lab: Lab,
        make: Callable[[Kernel, str], ScriptedMachine | FakeMachine],
        progress: Progress | None = None,
        *,
        guests: int = 4,
    ) -> None:
        self.lab = lab
        self.image = IMAGE
        self.budget = Budget(guests, "as the test says")
        self.environment = ENVIRONMENT
        self.progress = progress or Silent()
        self.started: list[tuple[Kernel, str]] = []
        self.made = 0
        self.stopped = threading.Event()
        self._make = make
        self._alive: set[ScriptedMachine | FakeMachine] = set()
        self._closed = threading.Event()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """See `Workbench.name`."""
        return self.lab.id

    def command_line(self, kernel: Kernel) -> str:
        """See `Workbench.command_line`."""
        return states.command_line(self.lab, self.image, kernel, "tcg")

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
    def guest(self, kernel: Kernel, task: str, *, kept_open: bool = False) -> Iterator[ScriptedMachine | FakeMachine]:
        """See `Bench.guest`."""
        with self._lock:
            self.started.append((kernel, task))
        self._check_open()
        machine = self._make(kernel, task)
        with self._lock:
            self.made += 1
            self._alive.add(machine)
        try:
            self._check_open()
            yield machine
        finally:
            machine.stop()
            with self._lock:
                self._alive.discard(machine)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise MachineError("no guest is started: the run was interrupted")

    def stop_all(self) -> None:
        """End all guests, as `qemu.stop_all` does."""
        self.stopped.set()
        with self._lock:
            machines = list(self._alive)
        for machine in machines:
            machine.stop()
