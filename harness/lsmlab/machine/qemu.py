"""A guest in QEMU: started from a kernel or from a saved state, driven over QMP, dying with us.

Everything the guest and we share is a file descriptor that was open before QEMU started: control and agent are socket
pairs, disks are opened by us, the overlay is unlinked once QEMU has it, and no path, port or file is left when either
side is killed. So QEMU needs no rights of its own: started by root, it runs as a user who owns nothing.
Source of the options: https://www.qemu.org/docs/master/system/invocation.html
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from lsmlab import host, portal
from lsmlab.channel.agent import AgentChannel
from lsmlab.channel.base import Channel
from lsmlab.errors import ChannelError, HostError, LsmlabError, MachineError
from lsmlab.machine.hardware import SSH_PORT, Boot, Hardware, OwnLoader

if TYPE_CHECKING:
    from lsmlab.channel.ssh import Access

QEMU = "qemu-system-x86_64"
QMP_SECONDS = 120.0
"""How long one monitor command may take: a snapshot on a busy disk is the slowest."""
KVM = Path("/dev/kvm")
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH")
"""What QEMU is told of our environment, where there may be keys that a guest is to know least of all."""
SSH_RETRY_SECONDS = 0.5
"""Between two tries to log in to a guest that is not up yet: each has waited for an answer already."""
SSH_AGAIN_SECONDS = 60.0
"""How long a login may take in a guest that was let in before."""
OVERLAY = "cluster_size=1M,extended_l2=on"
"""Snapshots are written to the overlay: in large clusters that takes a fifth less time. Their parts, of 32 KiB, keep a
guest's own small writes small."""
CONSOLE_BYTES = 1 << 16
"""The console's ring buffer lies in QEMU: a guest that floods it costs nothing. A power of two."""

GIVING_WAY = 3
"""The nice value of a guest that others go before: half of their weight."""

SILENT = logging.getLogger("lsmlab.qmp")
"""What the library of QMP logs to. Given a name for each guest, it would leave a logger for each in the process."""
SILENT.disabled = True

SEED_SET = 9
"""The number of the seed's set of descriptors; those of the disk's layers are counted from 0."""

_alive: set[QemuMachine] = set()
_alive_lock = threading.Lock()
_engine = ""
"""How QEMU reads and writes disks here, once it is known."""
_engine_lock = threading.Lock()
_stops = 0
"""How often all guests were stopped: one that was on its way at such a moment is stopped as well."""


class QemuMachine:
    """One QEMU process. Made by `start`; use `stop` in a finally."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], qmp: socket.socket, agent: AgentChannel) -> None:
        self.name = name
        self._process = process
        self._qmp_socket = qmp
        self._agent = agent
        self._access: Access | None = None
        self._client = QMPClient()
        self._client.logger = SILENT
        self._console_text = ""
        self.terminal_socket: socket.socket | None = None

    @classmethod
    def start(
        cls,
        name: str,
        hardware: Hardware,
        disk: Path,
        *,
        below: Path | None = None,
        boot: Boot | OwnLoader | None = None,
        incoming: Path | None = None,
        scratch: Path,
        keep_overlay: Path | None = None,
        timeout: float = 180,
        access: Access | None = None,
    ) -> QemuMachine:
        """Start a guest on an overlay over `disk`, from `boot` or from the RAM state in file `incoming`.

        `below` is what `disk` is itself an overlay over; neither is written to. The overlay lies in `scratch` and is
        unlinked, unless `keep_overlay` names where it shall stay. `access`: the agent is brought over SSH, and anew
        after each restore; None: over a port of QEMU's, where the image has it started. Blocks until the agent answers,
        at most `timeout` seconds. Raises MachineError with the console's last lines.
        """
        if (boot is None) == (incoming is None):
            raise ValueError("a guest starts from a kernel or from a saved state")
        stops = _stops
        overlay = keep_overlay or scratch / f"{name}-{secrets.token_hex(4)}.qcow2"
        # Relative where it is kept: the cache may then be moved as a whole
        backing = os.path.relpath(disk, overlay.parent) if keep_overlay else str(disk)
        create = [host.need("qemu-img"), "create", "-q", "-f", "qcow2", "-o", OVERLAY, "-F", "qcow2", "-b", backing]
        host.run([*create, str(overlay)], what="making the guest's disk")
        machine = None
        try:
            what = (name, hardware, [overlay, disk, *([below] if below else [])], boot, incoming)
            try:
                machine = cls._connected(stops, *what)
            except MachineError as error:
                if "io_uring" not in error.message:
                    raise
                _do_without_io_uring()  # also where another guest, started beside this one, has seen to it already
                machine = cls._connected(stops, *what)
            machine._come_up(incoming is not None, timeout, access)
            if keep_overlay is None:
                overlay.unlink()  # not sooner: a start from a saved state opens it again by name
        except BaseException as error:
            tail = machine.console_tail() if machine else ""
            if machine:
                machine.stop()
            overlay.unlink(missing_ok=True)
            if isinstance(error, LsmlabError):
                where = f"\n  last lines of its console:\n{_indent(tail)}" if tail else ""
                raise MachineError(f"guest {name} did not come up: {error.message}{where}", hint=error.hint) from error
            raise
        return machine

    @classmethod
    def _connected(cls, stops: int, *what: Any) -> QemuMachine:
        """A QEMU that answers. Killed where all guests were stopped since there were `stops` of that."""
        machine = cls._spawn(*what)
        try:
            if _stops != stops:  # looked at behind the entry in _alive: either this sees it, or it was killed
                machine._process.kill()
            machine._attach()
        except BaseException:
            machine.stop()
            raise
        return machine

    @classmethod
    def _spawn(
        cls,
        name: str,
        hardware: Hardware,
        disks: Sequence[Path],
        boot: Boot | OwnLoader | None,
        incoming: Path | None,
    ) -> QemuMachine:
        program = host.need(QEMU)
        rights = host.no_rights(program, KVM if hardware.accelerator == "kvm" else None)
        ours: list[socket.socket] = []
        with contextlib.ExitStack() as theirs:
            inherited: list[int] = []

            def pair() -> int:
                mine, its = socket.socketpair()
                ours.append(mine)
                inherited.append(theirs.enter_context(its).fileno())
                return inherited[-1]

            def opened(path: Path, flags: int = os.O_RDONLY) -> int:
                inherited.append(_open(path, flags))
                theirs.callback(os.close, inherited[-1])
                return inherited[-1]

            qmp, agent, terminal = pair(), pair(), pair()
            argv = [
                program, "-name", f"lsmlab-{name}", *hardware.arguments(), *_drive(disks, opened),
                "-device", "virtio-blk-pci,drive=disk",
                "-device", "virtio-serial-pci,id=serial",
                "-chardev", f"socket,id=agent,fd={agent}",
                "-device", "virtserialport,chardev=agent,name=lsmlab.agent",
                "-chardev", f"socket,id=terminal,fd={terminal}", "-device", "virtconsole,chardev=terminal",
                "-chardev", f"ringbuf,id=console,size={CONSOLE_BYTES}", "-serial", "chardev:console", "-no-reboot",
                "-chardev", f"socket,id=control,fd={qmp}", "-mon", "chardev=control,mode=control",
            ]  # fmt: skip
            if isinstance(boot, OwnLoader):
                argv += _seed(opened(boot.seed))
            elif boot is not None:
                for option, path in (("-kernel", boot.kernel), ("-initrd", boot.initrd)):
                    argv += [option, f"/proc/self/fd/{opened(path)}"]
                argv += ["-append", boot.command_line]
            elif incoming is not None:
                argv += ["-incoming", f"fd:{opened(incoming)}"]

            def spawn() -> subprocess.Popen[bytes]:
                return subprocess.Popen(
                    host.dying_with_us(argv, rights=rights),
                    env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=inherited,
                    start_new_session=True,  # Ctrl-C is ours to handle: the guest is stopped in order
                )

            try:
                process = portal.in_loop_thread(spawn)
            except OSError as error:
                raise MachineError(f"{QEMU} does not start: {error}") from error
        machine = cls(name, process, ours[0], AgentChannel(ours[1], name))
        machine.terminal_socket = ours[2]
        with _alive_lock:
            _alive.add(machine)
        return machine

    def _attach(self) -> None:
        try:
            portal.call(self._client.connect(self._qmp_socket), 30)
        except (QMPError, OSError, EOFError, TimeoutError, asyncio.CancelledError) as error:
            words = self._last_words()
            raise MachineError(f"QEMU ended or does not answer: {words or error}") from error
        self._agent.connect()

    def _come_up(self, from_state: bool, timeout: float, access: Access | None) -> None:
        if from_state:
            self._finish_incoming(time.monotonic() + 60)
        try:
            if access is not None:
                self.use_ssh(access, timeout)
            elif from_state:
                self._agent.wait_until_up(timeout)
            else:
                self._agent.bootstrap(timeout)
        except ChannelError as error:
            if self._process.poll() is not None:
                raise MachineError(f"QEMU ended: {self._last_words() or 'without a word'}") from error
            raise

    def use_ssh(self, access: Access, timeout: float) -> None:
        """Ask the guest over SSH from now on. One that has just been started answers when it is up.

        Raises ChannelError where it lets nobody in within `timeout` seconds.
        """
        from lsmlab.channel import ssh  # noqa: PLC0415 - paramiko takes longer to load than most commands run

        self._access = access
        place = access.place(self.name, self._ssh_port())
        deadline = time.monotonic() + timeout
        while True:
            try:
                channel = ssh.open_place(place, as_service=True)
            except ChannelError as error:
                if self._process.poll() is not None:
                    raise
                if time.monotonic() > deadline:
                    raise ChannelError(f"its sshd let nobody in within {timeout:.0f} s: {error.message}") from error
                time.sleep(SSH_RETRY_SECONDS)
                continue
            self._agent.close()
            self._agent = channel
            return

    def _ssh_port(self) -> int:
        """The port of 127.0.0.1 at which QEMU passes on to the guest's sshd."""
        said = self.monitor("human-monitor-command", **{"command-line": "info usernet"})
        found = re.search(rf"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+{SSH_PORT}\s", said)
        if found is None:
            raise MachineError(f"guest {self.name}: QEMU passes no port on to the guest: {said.strip()[:200]}")
        return int(found[1])

    def _finish_incoming(self, deadline: float) -> None:
        while True:
            status = self.monitor("query-migrate").get("status")
            if status == "completed":
                break
            if status in {"failed", "cancelled"} or time.monotonic() > deadline:
                raise MachineError(f"the saved state cannot be loaded: {status}: {self._last_words()}")
            time.sleep(0.01)
        self.monitor("cont")

    @property
    def channel(self) -> Channel:
        """See `Machine.channel`."""
        return self._agent

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """False once nothing more can be asked of the guest: QEMU has ended, or one of the connections to it is closed,
        which is seen a moment sooner where it is killed."""
        connected = self._client.runstate is Runstate.RUNNING and not self._agent.fault
        return connected and self._process.poll() is None

    def give_way(self) -> None:
        """Have other guests go first where processors are scarce. Where that cannot be had, nothing is said of it."""
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PGRP, self.pid, os.getpriority(os.PRIO_PROCESS, self.pid) + GIVING_WAY)
            # Where the kernel groups processes by session, it is the group that counts (sched(7), autogroup)
            Path(f"/proc/{self.pid}/autogroup").write_text(str(GIVING_WAY), "ascii")

    def monitor(self, command: str, **arguments: Any) -> Any:
        """One QMP command. Raises MachineError."""
        try:
            return portal.call(self._client.execute(command, arguments or None), QMP_SECONDS)
        except (QMPError, OSError, EOFError, TimeoutError, asyncio.CancelledError) as error:
            if not self.running and (words := self._last_words()):
                raise MachineError(f"guest {self.name}: QEMU ended: {words}") from error
            raise MachineError(f"guest {self.name}: {command}: {str(error) or type(error).__name__}") from error

    def _human(self, line: str) -> None:
        answer = self.monitor("human-monitor-command", **{"command-line": line})
        if answer.strip():
            raise MachineError(f"guest {self.name}: {line}: {answer.strip()}")

    @property
    def stays(self) -> bool:
        """See `Machine.stays`: its disk is thrown away."""
        return False

    def snapshot(self, name: str) -> None:
        """See `Machine.snapshot`."""
        self._human(f"savevm {name}")

    def restore(self, name: str) -> None:
        """See `Machine.restore`."""
        if self._access is not None:
            self._agent.drop()
        self._human(f"loadvm {name}")
        if self.monitor("query-status").get("status") != "running":
            self.monitor("cont")
        if self._access is not None:
            self.use_ssh(self._access, SSH_AGAIN_SECONDS)

    def power_off(self, timeout: float) -> None:
        """Have the guest shut itself down, and wait until it has. Raises MachineError."""
        with contextlib.suppress(ChannelError):  # the connection may end before the answer comes
            self.channel.run(["systemctl", "poweroff"])
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise MachineError(f"guest {self.name}: does not shut down within {timeout:.0f} s") from None
        if self._process.returncode:  # killed, or fallen over: its disk is not what the guest left
            raise MachineError(f"guest {self.name}: QEMU ended before the guest had: {self._last_words()}")

    def save(self, path: Path) -> None:
        """Write the RAM state to `path` and leave the guest paused. Raises MachineError, also for a full disk."""
        self.monitor("stop")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            portal.call(self._send_descriptor(descriptor), 30)
        finally:
            os.close(descriptor)
        # The default limit of 32 MiB/s is for a network (migrate-set-parameters, bytes per second)
        self.monitor("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.monitor("migrate", uri="fd:ram")
        deadline = time.monotonic() + QMP_SECONDS
        while True:
            progress = self.monitor("query-migrate")
            if progress.get("status") == "completed":
                return
            if progress.get("status") in {"failed", "cancelled"} or time.monotonic() > deadline:
                raise MachineError(f"guest {self.name}: saving its state: {progress.get('error-desc', progress)}")
            time.sleep(0.02)

    async def _send_descriptor(self, descriptor: int) -> None:
        self._client.send_fd_scm(descriptor)
        await self._client.execute("getfd", {"fdname": "ram"})

    def console_tail(self, lines: int = 15) -> str:
        """See `Machine.console_tail`. Control characters are taken out; empty once QEMU has ended."""
        try:
            text = self.monitor("ringbuf-read", device="console", size=CONSOLE_BYTES)
        except MachineError:
            return ""
        clean = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\n\t]", "", str(text))
        self._console_text = (self._console_text + clean)[-CONSOLE_BYTES:]
        return "\n".join([line for line in self._console_text.splitlines() if line.strip()][-lines:])

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        if self._process.poll() is None or self._process.stderr is None or self._process.stderr.closed:
            return ""
        os.set_blocking(self._process.stderr.fileno(), False)
        words = (self._process.stderr.read() or b"").decode("utf-8", "replace").strip()
        return words[-1000:] or f"exit status {self._process.returncode}"

    def stop(self) -> None:
        """See `Machine.stop`."""
        self._process.kill()
        with contextlib.suppress(Exception):
            self._process.wait(10)
        self._agent.close()
        if self._client.runstate is not Runstate.IDLE:
            with contextlib.suppress(Exception):
                portal.call(self._client.disconnect(), 5)
        for handle in (self.terminal_socket, self._process.stderr):
            if handle is not None:
                handle.close()
        with _alive_lock:
            _alive.discard(self)


def stop_all() -> None:
    """Stop every guest of this process, those that are just being started too: for Ctrl-C and the program's end.

    Never raises.
    """
    global _stops  # noqa: PLW0603 - of the process, as its guests are
    with _alive_lock:
        _stops += 1
        machines = list(_alive)
    for machine in machines:
        machine._process.kill()


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags)
    except OSError as error:
        raise MachineError(f"{path}: cannot be opened for a guest: {error.strerror}") from error


def disk_engine() -> str:
    """How QEMU reads and writes disks here: `io_uring`, where it may use that, or else `threads`.

    A snapshot is read in pieces of 32 KiB, and with threads each of them waits until another thread has had a
    processor: beside other guests a restore then takes twice as long and more.
    """
    global _engine  # noqa: PLW0603 - it is this machine's, and asked of it once
    with _engine_lock:
        _engine = _engine or ("io_uring" if _may_use_io_uring() else "threads")
        return _engine


def _may_use_io_uring() -> bool:
    """Whether qemu-img, with the rights that QEMU is given, reads its own file by io_uring."""
    program = host.need("qemu-img")
    tried = [program, "bench", "/proc/self/exe", "-i", "io_uring", "-c", "1", "-d", "1", "-s", "4096", "-f", "raw"]
    both = host.dying_with_us(["sh", "-c", 'exec "$@" 2>&1', "sh", *tried], rights=host.no_rights(program))
    try:
        said = host.run(both, what="trying io_uring", timeout=20)
    except (HostError, OSError):
        return False
    return b"io_uring" not in said  # some versions say that they do without it, and go on


def _do_without_io_uring() -> None:
    """Have QEMUs do without io_uring from now on: qemu-img may use it, and QEMU, perhaps of another build, may not."""
    global _engine  # noqa: PLW0603 - as above
    with _engine_lock:
        _engine = "threads"


def _drive(disks: Sequence[Path], opened: Callable[[Path, int], int]) -> list[str]:
    """QEMU's options for the overlay, `disks[0]`, and what lies below it, none of it opened by name.

    Of a set of descriptors QEMU takes the one whose mode is asked for; a start from a saved state reads the overlay
    before it writes. The names in the files' own headers do not count.
    """
    sets, drive, engine = [], "if=none,id=disk,cache=unsafe,discard=unmap", disk_engine()
    for number, disk in enumerate(disks):
        modes = (os.O_RDONLY,) if number else (os.O_RDONLY, os.O_RDWR)
        for flags in modes:
            sets += ["-add-fd", f"fd={opened(disk, flags)},set={number}"]
        layer = "backing." * number
        drive += f",{layer}driver=qcow2,{layer}file.driver=file,{layer}file.filename=/dev/fdset/{number}"
        drive += f",{layer}file.aio={engine}"
    return [*sets, "-drive", drive]


def _seed(descriptor: int) -> list[str]:
    """QEMU's options for the disk of cloud-init's source."""
    file = f"driver=raw,file.driver=file,file.filename=/dev/fdset/{SEED_SET}"
    return [
        "-add-fd", f"fd={descriptor},set={SEED_SET}", "-drive", f"if=none,id=seed,readonly=on,{file}",
        "-device", "virtio-blk-pci,drive=seed",
    ]  # fmt: skip


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
