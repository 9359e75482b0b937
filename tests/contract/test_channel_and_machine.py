"""What every channel and machine must do, over the fake and over a real guest."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ssh_relay import reached

from contract.local_guest import AgentOverSsh, LocalAgent, python_3_9
from fakes import FakeMachine
from lsmlab import attempt, discovery
from lsmlab.admission import Changes
from lsmlab.bench import open_bench
from lsmlab.channel.agent import AgentChannel
from lsmlab.channel.base import Channel, CommandResult
from lsmlab.channel.ssh import Access, open_ssh
from lsmlab.errors import ChannelError, CommandTimeoutError, LsmlabError, MachineError
from lsmlab.image.seed import KeyPair
from lsmlab.machine.base import Machine
from lsmlab.machine.hardware import Boot, Network
from lsmlab.machine.qemu import QemuMachine
from lsmlab.machine.ssh import PARTS, SshMachine
from lsmlab.progress import Silent
from lsmlab.terms import Kernel

EVERY_BYTE = bytes(range(256))
AWKWARD = (
    "two words", " ", "", "a\nb\n", "it's \"quoted\"", "$HOME `id` $(id) \\ \\n", "*", "-n", "--", "é 🐧", "tab\there",
    "; exit 3", "a" * 20_000,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Guest:
    """A machine under test, a folder in it for the tests' files, and the device or file that is its console."""

    machine: Machine
    folder: str
    console: str

    @property
    def channel(self) -> Channel:
        return self.machine.channel

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def sh(self, script: str, *arguments: str, timeout: float = 60) -> CommandResult:
        return self.channel.run(["sh", "-c", script, "sh", *arguments], timeout=timeout)

    def answers(self) -> bool:
        return self.channel.run(["echo", "here"]).out == "here\n"

    def read(self, name: str) -> bytes:
        return self.channel.run(["cat", "--", self.path(name)]).check().stdout


Opener = Callable[[], AbstractContextManager[Guest]]


AGENTS = {"agent": sys.executable}
if oldest := python_3_9():
    AGENTS["agent-on-python-3.9"] = oldest
VM = pytest.param("qemu", marks=pytest.mark.lsmlab_vm)
VM_OVER_SSH = pytest.param("qemu-over-ssh", marks=[pytest.mark.lsmlab_vm, pytest.mark.ssh, pytest.mark.slow])
KEPT = pytest.param("kept", marks=[pytest.mark.lsmlab_vm, pytest.mark.ssh, pytest.mark.slow])
"""A machine that is there already and stays: to restore it is to undo."""
MACHINES = pytest.mark.parametrize("opener", ["fake", VM, VM_OVER_SSH], indirect=True)
"""For tests of a machine: the agent alone is none."""
ALL_MACHINES = pytest.mark.parametrize("opener", ["fake", VM, VM_OVER_SSH, KEPT], indirect=True)
"""For those whose promise holds where nothing but what was changed is put back: its own processes, console and
connection stay; and there is one of it, so that no second one can be opened beside the shared one."""


@pytest.fixture(scope="module", params=["fake", *AGENTS, "agent-over-ssh", VM, VM_OVER_SSH])
def opener(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opener]:
    """Opens a fresh machine, stopped at the end of the block."""
    if request.param == "fake":

        @contextlib.contextmanager
        def fake() -> Iterator[Guest]:
            machine = FakeMachine(tmp_path_factory.mktemp("fake"))
            try:
                yield Guest(machine, str(machine.disk), str(machine.disk / "console"))
            finally:
                machine.stop()

        yield fake
        return
    if request.param in AGENTS:

        @contextlib.contextmanager
        def local() -> Iterator[Guest]:
            folder = tmp_path_factory.mktemp("agent")
            machine = LocalAgent(folder, AGENTS[request.param])
            try:
                yield Guest(machine, str(folder), "")
            finally:
                machine.stop()
            assert machine.console_tail() == "", "the agent complains"

        yield local
        return
    if request.param == "agent-over-ssh":

        @contextlib.contextmanager
        def over_ssh() -> Iterator[Guest]:
            folder = tmp_path_factory.mktemp("ssh")
            with AgentOverSsh(folder) as machine:
                yield Guest(machine, str(folder), "")

        yield over_ssh
        return
    if request.param == "qemu-over-ssh":
        yield from over_ssh_in_a_guest(tmp_path_factory.mktemp("qemu-ssh"))
        return
    if request.param == "kept":
        yield from kept_machine(tmp_path_factory.mktemp("kept"))
        return
    with open_bench(discovery.load_lab("debian-13"), Silent()) as bench:

        @contextlib.contextmanager
        def qemu() -> Iterator[Guest]:
            with bench.guest(Kernel.NONE, "contract") as machine:
                machine.channel.run(["mkdir", "/root/contract"]).check()
                yield Guest(machine, "/root/contract", "/dev/console")

        yield qemu


LET_IN = """
set -e
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2
systemctl unmask --quiet ssh.service
mkdir -p -m 700 /root/.ssh
cat > /root/.ssh/authorized_keys
printf '%s' "$1" > /etc/ssh/ssh_host_ed25519_key
chmod 600 /etc/ssh/ssh_host_ed25519_key
mkdir -p /root/contract
systemctl start ssh.service
"""


def over_ssh_in_a_guest(folder: Path) -> Iterator[Opener]:
    """A guest with a network card that only this machine reaches, asked over SSH, as those of cloud images are."""
    user, machine_key = KeyPair.generate(), KeyPair.generate()
    (folder / "key").touch(0o600)
    (folder / "key").write_text(user.private)
    (folder / "known").write_text(f"{Access.HOST_NAME} {machine_key.public}\n")
    access = Access("root", folder / "key", folder / "known")
    with open_bench(discovery.load_lab("debian-13"), Silent()) as bench:
        made_of = dataclasses.replace(bench.hardware, network=Network.OURS)
        boot = Boot(bench.image.kernel, bench.image.initrd, bench.command_line(Kernel.NONE))
        disk, ram = folder / "disk.qcow2", folder / "ram"
        first = QemuMachine.start(
            "over-ssh", made_of, bench.image.disk, boot=boot, scratch=folder, keep_overlay=disk, timeout=300
        )
        try:
            let_in = ["sh", "-c", LET_IN, "sh", machine_key.private]
            first.channel.run(let_in, stdin=f"{user.public}\n".encode()).check()
            first.save(ram)
        finally:
            first.stop()

        @contextlib.contextmanager
        def opened() -> Iterator[Guest]:
            machine = QemuMachine.start(
                "over-ssh", made_of, disk, below=bench.image.disk, incoming=ram, scratch=folder, access=access
            )
            try:
                yield Guest(machine, "/root/contract", "/dev/console")
            finally:
                machine.stop()

        yield opened


def kept_machine(home: Path) -> Iterator[Opener]:
    """A guest that is treated as a machine of somebody's: each opening has a journal, which is undone at its end."""
    with (
        open_bench(discovery.load_lab("debian-13"), Silent()) as bench,
        bench.guest(Kernel.NONE, "kept") as there,
        reached(there, home) as port,
        pytest.MonkeyPatch.context() as patched,
    ):
        there.channel.run(["mkdir", "/root/contract"]).check()
        patched.setenv("HOME", str(home))
        patched.delenv("SSH_AUTH_SOCK", raising=False)

        @contextlib.contextmanager
        def opened() -> Iterator[Guest]:
            with contextlib.closing(open_ssh(f"root@127.0.0.1:{port}", PARTS)) as channel:
                machine = SshMachine(channel)
                try:
                    machine.begin(Changes(("/root/contract",), (), (), (), ()))
                    yield Guest(machine, "/root/contract", "")
                finally:
                    machine.stop()
                assert machine.problem == ""
            assert there.channel.run(["ls", "-A", "/root/contract"]).check().out == "", "nothing is left"
            assert not there.channel.run(["test", "-e", "/var/lib/lsmlab"]).ok

        yield opened


@pytest.fixture(scope="module")
def guest(opener: Opener) -> Iterator[Guest]:
    """The machine that the tests share: each uses files of its own names."""
    with opener() as shared:
        yield shared


@pytest.fixture
def fresh(opener: Opener) -> Iterator[Guest]:
    """A machine for tests that end theirs."""
    with opener() as own:
        yield own


# The network

OUT = """
import socket, sys
try:
    socket.create_connection(("10.0.2.2", int(sys.argv[1])), 5).close()
    print("this machine is reached")
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("opener", [VM_OVER_SSH], indirect=True)
def test_who_is_reached_over_ssh_reaches_nothing(guest: Guest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        said = guest.channel.run(["python3", "-c", OUT, str(server.getsockname()[1])]).check().out
        assert said in {"ConnectionRefusedError\n", "TimeoutError\n", "OSError\n"}
        with pytest.raises(TimeoutError):
            server.accept()


# Commands


@pytest.mark.parametrize("code", [0, 1, 3, 255])
def test_the_exit_status_comes_through(guest: Guest, code: int) -> None:
    result = guest.sh(f"exit {code}")
    assert (result.exit_code, result.signal, result.ok) == (code, None, code == 0)
    assert result.ended() == f"exit status {code}"
    assert 0 <= result.seconds < 60


@pytest.mark.parametrize("program", ["no-such-program-here", "/usr/bin/no-such-program-here", "/no/such/folder/x"])
def test_a_program_that_is_not_there_is_127(guest: Guest, program: str) -> None:
    result = guest.channel.run([program, "argument"])
    assert (result.exit_code, result.signal) == (127, None)
    assert program in result.err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_death_by_a_signal_is_told_from_an_exit_status(guest: Guest, number: signal.Signals) -> None:
    result = guest.sh(f"kill -{number.value} $$")
    assert (result.exit_code, result.signal, result.ok) == (None, number.value, False)
    assert result.ended() == f"signal {number.value}"


def test_the_command_is_in_the_result(guest: Guest) -> None:
    assert guest.channel.run(["true", "a b"]).argv == ("true", "a b")


@pytest.mark.parametrize("argument", AWKWARD, ids=range(len(AWKWARD)))
def test_an_argument_arrives_untouched(guest: Guest, argument: str) -> None:
    result = guest.channel.run(["printf", "%s|%s", argument, "end"]).check()
    assert result.out == f"{argument}|end"


def test_the_environment_finds_programs_and_speaks_plain_english(guest: Guest) -> None:
    result = guest.channel.run(["cat", "/no/such/file"])
    assert "No such file or directory" in result.err


# Input and output


def test_no_input_is_an_end_of_file(guest: Guest) -> None:
    assert guest.channel.run(["cat"], timeout=20).stdout == b""


@pytest.mark.parametrize(
    "data",
    [b"a word\n", b"no newline", b"\n", EVERY_BYTE * 2, b"\x00", b"\xff\xfe", "é 🐧\n".encode(), EVERY_BYTE * 4096],
    ids=["line", "word", "newline", "binary", "nul", "not-utf-8", "utf-8", "1-MiB"],
)
def test_input_comes_back(guest: Guest, data: bytes) -> None:
    result = guest.channel.run(["cat"], stdin=data)
    assert (result.exit_code, len(result.stdout)) == (0, len(data))
    assert result.stdout == data
    assert result.stderr == b""


def test_input_that_nobody_reads_does_no_harm(fresh: Guest) -> None:
    assert fresh.channel.run(["true"], stdin=EVERY_BYTE * 4096).ok
    assert fresh.answers()


def test_the_two_outputs_are_kept_apart(guest: Guest) -> None:
    result = guest.sh("echo one; echo two >&2; echo three; echo four >&2; exit 5")
    assert (result.out, result.err, result.exit_code) == ("one\nthree\n", "two\nfour\n", 5)


def test_output_that_is_no_text_is_shown_with_escapes(guest: Guest) -> None:
    result = guest.sh(r"printf 'a\377b\303\251'; printf '\200' >&2")
    assert (result.stdout, result.stderr) == (b"a\xffb\xc3\xa9", b"\x80")
    assert (result.out, result.err) == ("a\\xffbé", "\\x80")


def test_much_output_comes_whole(guest: Guest) -> None:
    size = 2 << 20
    result = guest.sh('yes 0123456789abcde | head -c "$1"; yes errors | head -c "$1" >&2', str(size))
    assert (len(result.stdout), len(result.stderr)) == (size, size)
    assert result.stdout == b"0123456789abcde\n" * (size // 16)
    assert result.stderr.startswith(b"errors\nerrors\n")


def test_a_whole_window_of_the_audit_log_comes_through(request: pytest.FixtureRequest, fresh: Guest) -> None:
    size = attempt.WINDOW_BYTES + 4096
    result = fresh.sh('head -c "$1" /dev/zero', str(size), timeout=120)
    assert len(result.stdout) == size
    assert fresh.answers()


def test_a_command_that_fails_is_a_result_and_check_an_error(guest: Guest) -> None:
    result = guest.sh("echo progress; echo 'it is broken' >&2; exit 9")
    with pytest.raises(ChannelError) as caught:
        result.check()
    message = str(caught.value)
    assert "it is broken" in message
    assert "exit status 9" in message
    assert "exit 9" in message
    with pytest.raises(ChannelError, match="only said here"):
        guest.sh("echo only said here; exit 1").check()
    with pytest.raises(ChannelError, match="signal 9"):
        guest.sh("kill -9 $$").check()
    fine = guest.sh("exit 0")
    assert fine.check() is fine


def test_a_command_that_takes_too_long_is_an_error_of_its_own(guest: Guest) -> None:
    start = time.monotonic()
    with pytest.raises(CommandTimeoutError, match="sleep"):
        guest.channel.run(["sleep", "60"], timeout=1)
    assert 1 <= time.monotonic() - start < 20
    assert guest.answers()


def test_a_command_that_takes_too_long_is_ended_with_its_children(guest: Guest) -> None:
    name = f"{random.randrange(10_000, 99_999)}.{random.randrange(10_000, 99_999)}"
    with pytest.raises(CommandTimeoutError):
        guest.sh(f"sleep {name} & sleep {name}; true", timeout=1)
    deadline = time.monotonic() + 10
    while guest.channel.run(["pgrep", "-x", "-f", f"sleep {name}"]).ok:
        assert time.monotonic() < deadline, "a child of the command goes on"


def test_a_child_left_behind_does_not_delay_the_result(guest: Guest) -> None:
    start = time.monotonic()
    result = guest.sh("sleep 55 & echo $!").check()
    assert time.monotonic() - start < 30
    guest.channel.run(["kill", result.out.strip()]).check()


def test_commands_run_side_by_side(guest: Guest) -> None:
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: guest.sh(f"sleep 0.5; echo {n}").out})) for n in range(6)
    ]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"{n}\n" for n in range(6)}
    assert time.monotonic() - start < 20


# Questions


def test_a_question_is_answered(guest: Guest) -> None:
    assert guest.channel.ask("ping") is None
    answer = guest.channel.ask("run", argv=["printf", "a\nb"])
    assert (answer["exit_code"], base64.b64decode(answer["out"])) == (0, b"a\nb")


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [("no-such-operation", {}), ("serve", {}), ("ping", {"more": 1}), ("write", {}), ("run", {"argv": ["a\0b"]})],
    ids=str,
)
def test_a_question_that_cannot_be_answered_is_an_error(
    guest: Guest, operation: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ChannelError, match=operation):
        guest.channel.ask(operation, **arguments)
    assert guest.answers()


# Files


@pytest.mark.parametrize(
    "data", [b"", b"text\n", EVERY_BYTE, EVERY_BYTE * (3 << 12)], ids=["empty", "text", "binary", "3-MiB"]
)
def test_a_file_is_written(guest: Guest, data: bytes) -> None:
    name = f"new-{len(data)}"
    guest.channel.write_file(guest.path(name), data)
    digest = guest.channel.run(["sha256sum", "--", guest.path(name)]).check().out.split()[0]
    assert digest == hashlib.sha256(data).hexdigest()
    assert int(guest.channel.run(["stat", "-c", "%s", guest.path(name)]).check().out) == len(data)


def test_a_file_is_overwritten_in_place(guest: Guest) -> None:
    path = guest.path("in-place")
    guest.channel.write_file(path, b"a long first content\n" * 100)
    guest.channel.run(["chmod", "0640", path]).check()
    before = guest.channel.run(["stat", "-c", "%i %a", path]).check().out
    guest.channel.write_file(path, b"short")
    assert guest.read("in-place") == b"short"
    assert guest.channel.run(["stat", "-c", "%i %a", path]).check().out == before


def test_a_file_with_an_awkward_name(guest: Guest) -> None:
    name = 'it\'s a "file" é'
    guest.channel.write_file(guest.path(name), b"x")
    assert guest.read(name) == b"x"


def test_a_file_is_written_with_its_folders_its_mode_and_its_owner(guest: Guest) -> None:
    owner, path = guest.sh('printf %s:%s "$(id -un)" "$(id -gn)"').check().out, guest.path("a/new/folder/file")
    for mode in (0o640, 0o4751):
        guest.channel.write_file(path, b"x", mode=mode, owner=owner)
        assert guest.channel.run(["stat", "-c", "%a %U:%G", path]).check().out == f"{mode:o} {owner}\n"


def test_a_file_that_cannot_be_written_is_an_error(guest: Guest) -> None:
    guest.channel.write_file(guest.path("a-file"), b"x")
    for name in ("a-file/below", "."):
        with pytest.raises(ChannelError, match=r"write: .*(a-file|directory)"):
            guest.channel.write_file(guest.path(name), b"x")
    with pytest.raises(ChannelError, match="no-such-user"):
        guest.channel.write_file(guest.path("owned"), b"x", owner="no-such-user:root")
    assert guest.answers()


# Machines


@ALL_MACHINES
def test_a_restore_brings_files_back(guest: Guest) -> None:
    guest.channel.write_file(guest.path("kept"), b"as it was")
    guest.machine.snapshot("files")
    for content in (b"changed", b"changed again"):  # the second restore is as good as the first
        guest.channel.write_file(guest.path("kept"), content)
        guest.channel.write_file(guest.path("added"), content)
        guest.channel.run(["sync"]).check()
        guest.machine.restore("files")
        assert guest.answers()
        assert guest.read("kept") == b"as it was"
        assert not guest.channel.run(["test", "-e", guest.path("added")]).ok


@MACHINES
def test_a_restore_forgets_processes(guest: Guest) -> None:
    sleep = ["sleep", f"{random.randrange(10_000, 99_999)}.{random.randrange(10_000, 99_999)}"]
    guest.machine.snapshot("processes")
    guest.sh(f"setsid {shlex.join(sleep)} > /dev/null 2>&1 < /dev/null &").check()
    found = ["pgrep", "-x", "-f", shlex.join(sleep)]
    deadline = time.monotonic() + 10
    while not guest.channel.run(found).ok:
        assert time.monotonic() < deadline, "the process did not start"
    guest.machine.restore("processes")
    assert guest.channel.run(found).exit_code == 1


@ALL_MACHINES
def test_a_snapshot_of_the_same_name_replaces_the_first(guest: Guest) -> None:
    for content in (b"first", b"second"):
        guest.channel.write_file(guest.path("twice"), content)
        guest.machine.snapshot("twice")
    guest.channel.write_file(guest.path("twice"), b"third")
    guest.machine.restore("twice")
    assert guest.read("twice") == b"second"


@ALL_MACHINES
def test_two_snapshots_live_side_by_side(guest: Guest) -> None:
    for name in ("one", "two"):
        guest.channel.write_file(guest.path("which"), name.encode())
        guest.machine.snapshot(name)
    for name in ("one", "two", "one"):
        guest.machine.restore(name)
        assert guest.read("which") == name.encode()


@ALL_MACHINES
def test_a_snapshot_that_is_not_there_is_an_error(guest: Guest) -> None:
    guest.channel.write_file(guest.path("known"), b"known")
    guest.machine.snapshot("known")
    with pytest.raises(MachineError):
        guest.machine.restore("no-such-snapshot")
    guest.machine.restore("known")  # and does not keep the next from working
    assert guest.read("known") == b"known"


@MACHINES
def test_the_console_can_be_read(guest: Guest) -> None:
    assert isinstance(guest.machine.console_tail(), str)
    guest.sh('printf "first line\\nlast words\\n" > "$1"', guest.console).check()
    deadline = time.monotonic() + 20
    while "last words" not in guest.machine.console_tail():
        assert time.monotonic() < deadline, guest.machine.console_tail()
        time.sleep(0.05)
    assert len(guest.machine.console_tail(1).splitlines()) == 1


@MACHINES
def test_a_stopped_machine_says_so_and_can_be_stopped_again(request: pytest.FixtureRequest, fresh: Guest) -> None:
    assert fresh.answers()
    fresh.machine.snapshot("before")
    fresh.machine.stop()
    fresh.machine.stop()
    with pytest.raises((ChannelError, MachineError)):
        fresh.channel.run(["true"])
    with pytest.raises(ChannelError):
        fresh.channel.write_file(fresh.path("late"), b"x")
    with pytest.raises(MachineError):
        fresh.machine.snapshot("late")
    with pytest.raises(MachineError):
        fresh.machine.restore("before")
    assert isinstance(fresh.machine.console_tail(), str)


def test_a_machine_that_dies_ends_the_command_that_waits(fresh: Guest) -> None:
    start = time.monotonic()
    end = threading.Timer(0.5, fresh.machine.stop)
    end.start()
    with pytest.raises(LsmlabError):
        fresh.channel.run(["sleep", "60"], timeout=60)
    end.join()
    assert time.monotonic() - start < 30


def test_a_qemu_that_was_stopped_says_so() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(["sleep", "60"], stderr=subprocess.PIPE)
        machine = QemuMachine("gone", process, ours, AgentChannel(theirs, "gone"))
        machine.stop()
        machine.stop()
        assert not machine.running
        assert machine.console_tail() == ""
        with pytest.raises(MachineError):
            machine.snapshot("late")
