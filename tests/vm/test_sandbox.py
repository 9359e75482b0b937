"""What stands between a guest and this machine, seen from both sides of a running guest. SECURITY.md names these."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command import alive, gone_within

from lsmlab import attempt, host
from lsmlab.bench import Bench
from lsmlab.channel.base import Channel, CommandResult
from lsmlab.errors import MachineError
from lsmlab.machine import qemu
from lsmlab.machine.qemu import QemuMachine
from lsmlab.scenario import AllowedIf, Attempt, Canary
from lsmlab.terms import AttemptKind, Kernel

pytestmark = pytest.mark.lsmlab_vm

CARRIED = "A_KEY_OF_THIS_MACHINE"
INTERNET = ("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6", "packet", "netlink")
PCI = {
    "0x060000": "q35's host bridge", "0x060100": "its ISA bridge", "0x010601": "its SATA controller, with no disk",
    "0x0c0500": "its SMBus", "0x00ff00": "virtio-rng", "0x010000": "virtio-blk", "0x078000": "virtio-serial",
}  # fmt: skip
"""Every device that the guest has, by its class."""
CONNECT = """
import errno, socket, sys
for address in sys.argv[1:]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as link:
        link.settimeout(5)
        print(address, errno.errorcode.get(link.connect_ex((address, 9)), "connected"))
"""


@pytest.fixture(scope="module")
def guest(bench: Bench) -> Iterator[QemuMachine]:
    """The guest that all look at; started by somebody whose environment holds a secret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CARRIED, "of this machine")
        with bench.guest(Kernel.NONE, "sandbox", kept_open=True) as machine:
            yield machine


def proc(machine: QemuMachine) -> Path:
    return Path("/proc") / str(machine.pid)


def status(folder: Path) -> dict[str, list[str]]:
    """/proc/PID/status, each value in words."""
    lines = (line.partition(":") for line in (folder / "status").read_text("utf-8").splitlines())
    return {name: value.split() for name, _, value in lines}


def sh(machine: QemuMachine, script: str, *arguments: str) -> CommandResult:
    return machine.channel.run(["sh", "-c", script, "sh", *arguments])


# QEMU's process


def test_qemu_is_under_its_seccomp_filter(guest: QemuMachine) -> None:
    threads = [status(folder) for folder in (proc(guest) / "task").iterdir()]
    assert threads
    assert [(said["Seccomp"], said["NoNewPrivs"]) for said in threads] == [(["2"], ["1"])] * len(threads)


def test_qemu_uses_io_uring_where_it_may(guest: QemuMachine) -> None:
    opened = [str(link.readlink()) for link in (proc(guest) / "fd").iterdir()]
    assert ("anon_inode:[io_uring]" in opened) is (qemu.disk_engine() == "io_uring")


def test_qemu_has_no_rights_of_its_own(guest: QemuMachine) -> None:
    said = status(proc(guest))
    assert {said[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    if os.geteuid() != 0:
        assert (said["Uid"], said["Gid"]) == ([str(os.geteuid())] * 4, [str(os.getegid())] * 4)
        return
    assert int(said["Uid"][0]) in host.PASSING_UIDS, "as root, unless `lsmlab doctor` says that it cannot be helped"
    assert said["Uid"] == said["Gid"] == said["Uid"][:1] * 4
    assert set(said["Groups"]) <= {str(Path("/dev/kvm").stat().st_gid) if Path("/dev/kvm").exists() else ""} - {"0"}


def test_qemu_knows_nothing_of_our_environment(guest: QemuMachine) -> None:
    environment = (proc(guest) / "environ").read_bytes()
    assert CARRIED in os.environ
    assert CARRIED.encode() not in environment
    assert {entry.partition(b"=")[0] for entry in environment.split(b"\0") if entry} <= {
        b"PATH", b"LD_LIBRARY_PATH", b"PWD", b"OLDPWD", b"SHLVL", b"_",
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opened:
    """A descriptor of QEMU's."""

    target: str
    file: os.stat_result
    writable: bool


def descriptors(pid: int) -> list[Opened]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text("ascii").split()
        flags = int(info[info.index("flags:") + 1], 8)
        found.append(Opened(str(entry.readlink()), entry.stat(), flags & os.O_ACCMODE != os.O_RDONLY))
    return found


def sockets(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    return {one.target[8:-1] for one in descriptors(pid) if one.target.startswith("socket:[")}


def listed(pid: int, table: str) -> set[str]:
    """Every word of a table of /proc/PID/net, among them the inodes of its sockets."""
    file = Path(f"/proc/{pid}/net/{table}")
    return (
        {word for line in file.read_text("ascii").splitlines()[1:] for word in line.split()} if file.exists() else set()
    )


def test_qemu_has_no_socket_but_three_pairs_with_us(guest: QemuMachine) -> None:
    """Control, agent, terminal. They have no name: who is not lsmlab cannot come in."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = {str(os.fstat(server.fileno()).st_ino)}
        assert ours <= listed(os.getpid(), "tcp"), "what is looked at shows no socket"
    found = sockets(guest.pid)
    assert len(found) == 3
    assert not {table: found & listed(guest.pid, table) for table in INTERNET if found & listed(guest.pid, table)}
    lines = [line.split() for line in (proc(guest) / "net" / "unix").read_text("utf-8").splitlines()[1:]]
    named = {fields[6]: fields[7:] for fields in lines if fields[6] in found}
    assert named == {inode: [] for inode in found}, "each is a Unix socket without a path"


def test_qemu_opens_nothing_for_writing_but_the_overlay(bench: Bench, guest: QemuMachine) -> None:
    files = [one for one in descriptors(guest.pid) if stat.S_ISREG(one.file.st_mode)]
    below = {one.target for one in files if not one.writable}
    state = bench.state(Kernel.NONE, "sandbox").folder / "disk.qcow2"
    assert {str(bench.image.disk), str(state)} <= below
    written = {one.target for one in files if one.writable}
    assert len(written) == 1
    overlay = next(one for one in files if one.writable)
    assert overlay.target.startswith(str(bench._scratch)) and overlay.target.endswith(" (deleted)")
    assert overlay.file.st_nlink == 0, "it goes with QEMU, whatever ends it"


def test_what_a_guest_writes_to_its_disk_is_in_the_overlay_alone(bench: Bench, guest: QemuMachine) -> None:
    def look() -> tuple[list[tuple[int, int, int, int, int]], int]:
        below = [bench.image.disk, bench.state(Kernel.NONE, "sandbox").folder / "disk.qcow2"]
        seen = [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_blocks) for s in map(Path.stat, below)]
        overlay = next(one.file for one in descriptors(guest.pid) if one.writable and stat.S_ISREG(one.file.st_mode))
        return seen, overlay.st_blocks * 512

    before, small = look()
    sh(guest, "head -c 8388608 /dev/urandom > /root/noise && sync && blockdev --flushbufs /dev/vda").check()
    after, large = look()
    assert large - small > 7 << 20, "nothing was written"
    assert after == before


def test_qemu_starts_no_program(bench: Bench) -> None:
    """Asked over its monitor, which a guest cannot reach. What took QEMU over could not either."""
    folder = Path(tempfile.mkdtemp(prefix="lsmlab-test-"))
    folder.chmod(0o777)  # so that the rights of its user are no reason
    try:
        with bench.guest(Kernel.NONE, "sandbox program", kept_open=True) as machine:
            try:
                machine.monitor("migrate", uri=f"exec:cat > {folder}/here")
                deadline = time.monotonic() + 30
                while machine.monitor("query-migrate").get("status") not in {"failed", "completed"}:
                    assert time.monotonic() < deadline, "neither started nor refused"
                    time.sleep(0.01)
            except MachineError:
                pass  # the filter ends QEMU, or QEMU says that its child has ended
            assert list(folder.iterdir()) == []
    finally:
        shutil.rmtree(folder)


def test_nothing_outlives_a_guest(bench: Bench) -> None:
    with bench.guest(Kernel.NONE, "sandbox end", kept_open=True) as machine:
        pid, user = machine.pid, status(proc(machine))["Uid"][0]
        assert alive(pid)
    gone_within({pid}, 2)
    if os.geteuid() == 0:
        left = {
            entry.name
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and entry.exists() and owner(entry) == user
        }
        assert not left, "a process of its user goes on"
    assert {path.name for path in bench._scratch.iterdir()} <= {".lock"}


def owner(process: Path) -> str:
    try:
        return str(process.stat().st_uid)
    except OSError:
        return ""


# Files of this machine


def test_only_the_user_reaches_what_runs(bench: Bench, guest: QemuMachine) -> None:
    scratch = bench._scratch.stat()
    assert (scratch.st_uid, stat.S_IMODE(scratch.st_mode)) == (os.geteuid(), 0o700)
    ram = (bench.state(Kernel.NONE, "sandbox").folder / "ram").stat()
    assert (ram.st_uid, stat.S_IMODE(ram.st_mode)) == (os.geteuid(), 0o600)


# The guest's side


def test_a_guest_has_no_device_that_was_not_asked_for(guest: QemuMachine) -> None:
    found = sh(guest, "cat /sys/bus/pci/devices/*/class").check().out.split()
    assert sorted(found) == sorted(PCI)
    assert sh(guest, "ls /sys/bus/usb/devices 2>/dev/null").out == ""
    assert guest.monitor("human-monitor-command", **{"command-line": "info network"}).strip() == ""
    words = (proc(guest) / "cmdline").read_bytes().decode().split("\0")
    assert "-nodefaults" in words and "-no-user-config" in words
    assert not {"-net", "-netdev", "-nic"} & set(words)


def test_a_guest_has_loopback_alone(guest: QemuMachine) -> None:
    assert sh(guest, "ls /sys/class/net").check().out.split() == ["lo"]
    assert sh(guest, "ip -4 route show").check().out == ""
    assert sh(guest, "ip -6 route show default").check().out == ""
    outside = ["192.0.2.1", "10.0.2.2", "169.254.169.254", "2001:db8::1", *own_addresses()]
    said = guest.channel.run(["python3", "-c", CONNECT, "127.0.0.1", *outside]).check().out.split()
    reached = dict(zip(said[::2], said[1::2], strict=True))
    assert reached.pop("127.0.0.1") == "ECONNREFUSED", "a way there, and nobody at its end"
    assert reached == dict.fromkeys(outside, "ENETUNREACH")


def own_addresses() -> list[str]:
    """This machine's own IPv4 addresses, as far as its name leads to them."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    except OSError:
        return []
    return [address for address in sorted(found) if not address.startswith("127.")]


# What is random


class Overheard:
    """A channel that keeps what the agent is asked."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.asked: list[dict[str, Any]] = []

    def ask(self, operation: str, *, within: float = 30, **arguments: Any) -> Any:
        self.asked.append(arguments)
        return self.channel.ask(operation, within=within, **arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.channel, name)


def test_what_marks_an_attempt_is_random_each_time(guest: QemuMachine) -> None:
    """Also where the guest is not: it is restored from the same memory."""
    spec = Attempt(
        id="read",
        kind=AttemptKind.ATTACK,
        run=("cat", "/etc/motd"),
        canary=Canary(file="/etc/motd", line="lsmlab-{canary}:"),
        allowed_if=AllowedIf(output="lsmlab-{canary}:"),
    )
    channel: Any = Overheard(guest.channel)
    opened = attempt.open_window(channel, "dbus.service", "/etc/motd")
    guest.snapshot("marks")
    seen = []
    for _ in range(2):
        guest.restore("marks")
        seen.append(attempt.make(channel, spec, "dbus.service", opened))
    for made in seen:
        assert f"lsmlab-{made.canary}:" in made.output, "another canary was planted"
        assert f"auid={made.auid}" in made.log
    first, second = seen
    assert first.canary != second.canary
    assert first.auid != second.auid
    words = [opened_with["word"] for opened_with in channel.asked if "word" in opened_with]
    words += [asked["close"]["word"] for asked in channel.asked if "close" in asked]
    assert len(words) == len(set(words)) == 3
    assert all(re.fullmatch(r"lsmlab-[0-9a-f]{16}", word) for word in words)
