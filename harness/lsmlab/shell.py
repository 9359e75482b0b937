"""A root shell in a guest, on the virtio console: terminal size, colours and keys as on any machine."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import termios
import threading
import tty
from collections.abc import Iterator, Sequence

from lsmlab import attempt, prepare
from lsmlab.bench import Bench
from lsmlab.channel.base import Channel, CommandResult
from lsmlab.errors import ChannelError, DefinitionError, HostError, LsmlabError
from lsmlab.framework import FRAMEWORKS
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.machine.qemu import QemuMachine
from lsmlab.scenario import Scenario
from lsmlab.terms import Arm

DETACH = b"\x1d"
"""Ctrl-]: leaves the shell, as in telnet and virsh console."""
FOREVER = 7 * 24 * 3600.0


def open_on_arm(bench: Bench, arm: Arm, scenario: Scenario | None = None) -> None:
    """Give the terminal a root shell in a fresh guest of `arm`, set up for `scenario` where one is named."""
    need_terminal()
    with bench.guest(arm.kernel, f"shell {arm}") as machine:
        _enter(bench, machine, arm, scenario)
        bench.progress.done(f"shell {arm}")
        with bench.progress.paused():
            attach(machine)


def open_on_attempt(bench: Bench, scenario: Scenario, arm: Arm, attempt_id: str) -> None:
    """Make one attempt of `scenario` in a fresh guest of `arm`, and give the terminal a root shell in what it left."""
    need_terminal()
    spec = next((a for a in scenario.attempts if a.id == attempt_id), None)
    if spec is None:
        raise DefinitionError(f"scenario {scenario.id} has no attempt {attempt_id!r}")
    with bench.guest(arm.kernel, f"shell {arm}") as machine:
        plan = _enter(bench, machine, arm, scenario)
        assert plan is not None
        bench.progress.step(f"shell {arm}", f"{spec.kind} {spec.id}")
        opened = attempt.open_window(machine.channel, plan.unit, plan.object_path)
        attempt.make(machine.channel, spec, plan.unit, opened)
        bench.progress.done(f"shell {arm}")
        with bench.progress.paused():
            attach(machine)


def run_on_arm(bench: Bench, arm: Arm, argv: Sequence[str], scenario: Scenario | None = None) -> CommandResult:
    """Run one command as root in a fresh guest of `arm`."""
    with bench.guest(arm.kernel, f"shell {arm}") as machine:
        _enter(bench, machine, arm, scenario)
        bench.progress.done(f"shell {arm}")
        return machine.channel.run(argv, timeout=FOREVER)


def _enter(bench: Bench, machine: QemuMachine, arm: Arm, scenario: Scenario | None) -> prepare.Plan | None:
    bench.progress.step(f"shell {arm}", "entering the arm")
    if scenario is not None:
        plan = prepare.plan_of(scenario, bench.lab)
        prepare.bring_into(machine.channel, arm, plan, bench.image)
        return plan
    prepare.mark(machine.channel, arm)
    FRAMEWORKS[arm.framework].enter(machine.channel, arm, PolicyUnderTest())
    return None


def need_terminal() -> None:
    """Raises HostError where standard input or output is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise HostError(
            "a shell needs a terminal, and standard input or output is none",
            hint="Give a command instead: lsmlab shell LAB --arm ARM -- id -Z",
        )


def attach(machine: QemuMachine) -> None:
    """Connect this terminal to the guest's console until the shell ends or Ctrl-] is pressed."""
    console = machine.terminal_socket
    assert console is not None
    _fit(machine.channel)
    ended = threading.Event()
    wake, waker = socket.socketpair()

    def wait_for_the_end() -> None:
        with contextlib.suppress(LsmlabError):
            machine.channel.run(["systemctl", "start", "--wait", "lsmlab-shell.service"], timeout=FOREVER)
        ended.set()
        with contextlib.suppress(OSError):
            waker.send(b"x")

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    sys.stderr.write("Root shell in the guest; it is thrown away afterwards. Leave with `exit` or Ctrl-].\r\n")
    with _raw(machine.channel), wake, waker:
        _pump(console, wake)
    sys.stderr.write("\n")


@contextlib.contextmanager
def _raw(channel: Channel) -> Iterator[None]:
    before = termios.tcgetattr(sys.stdin)
    resize = signal.getsignal(signal.SIGWINCH)

    def resized(*_: object) -> None:
        threading.Thread(target=_fit, args=(channel,), daemon=True).start()

    signal.signal(signal.SIGWINCH, resized)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGWINCH, resize)


def _fit(channel: Channel) -> None:
    """Tell the guest the terminal's size and kind."""
    columns, rows = shutil.get_terminal_size()
    with contextlib.suppress(ChannelError):
        channel.run(["stty", "-F", "/dev/hvc0", "rows", str(rows), "cols", str(columns)])
        channel.run(["systemctl", "set-environment", f"TERM={os.environ.get('TERM', 'vt220')}"])


def _pump(console: socket.socket, wake: socket.socket) -> None:
    keyboard, screen = sys.stdin.fileno(), sys.stdout.fileno()
    while True:
        ready, _, _ = select.select([keyboard, console, wake], [], [])
        if console in ready:
            data = console.recv(65536)
            if not data:
                return
            os.write(screen, data)
        elif wake in ready:
            return
        if keyboard in ready:
            typed = os.read(keyboard, 4096)
            if not typed or DETACH in typed:
                return
            console.sendall(typed)
