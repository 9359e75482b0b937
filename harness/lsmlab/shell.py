"""A root shell in a guest, on the virtio console: terminal size, colours and keys as on any machine."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import shlex
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lsmlab import attempt, prepare
from lsmlab.bench import Bench
from lsmlab.channel.base import Channel, CommandResult
from lsmlab.definition import unknown_name
from lsmlab.errors import ChannelError, HostError, LsmlabError
from lsmlab.framework import FRAMEWORKS
from lsmlab.framework.base import PolicyUnderTest
from lsmlab.machine.qemu import QemuMachine
from lsmlab.scenario import Attempt, Scenario
from lsmlab.terms import Arm

if TYPE_CHECKING:
    from lsmlab.container.engine import Running

with contextlib.suppress(ImportError):  # Windows has none, and opens no shell: see `host.need_linux`
    import termios
    import tty

DETACH = b"\x1d"
"""Ctrl-]: leaves the shell, as in telnet and virsh console."""
FOREVER = 7 * 24 * 3600.0
PROMPT = re.compile(rb"[a-z-]+\x1b\[0m:[^\r\n]*# $")
"""The end of what /etc/profile.d/lsmlab.sh of the images has bash print."""
PROMPT_BYTES = 400

BY_HAND = "/run/lsmlab-attack"
ATTACK = f"""#!/usr/bin/python3 -I
# attack COMMAND...: run it as the service, as lsmlab does.
import base64, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as link, link.makefile("rwb") as stream:
    link.connect("{BY_HAND}")
    stream.write(json.dumps(sys.argv[1:]).encode() + b"\\n")
    stream.flush()
    done = json.loads(stream.read() or '"the agent does not answer"')
if isinstance(done, str):
    sys.exit(done)
os.write(1, base64.b64decode(done["out"]))
os.write(2, base64.b64decode(done["err"]))
sys.exit(124 if done["timed_out"] else done["exit_code"] if done["signal"] is None else 128 + done["signal"])
"""
ATTACK_INSIDE = """#!/usr/bin/python3 -I
# attack COMMAND...: run it in the scenario's container, as lsmlab does: the engine starts it.
import http.client, json, os, socket, struct, sys
class Engine(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/run/docker.sock")
def ask(method, path, body=None):
    link = Engine("engine")
    data = None if body is None else json.dumps(body)  # to a GET the engine answers, and closes, before it reads one
    link.request(method, path, data, {"Content-Type": "application/json", "Connection": "close"})
    answer = link.getresponse()
    said = answer.read()
    if answer.status >= 300:
        sys.exit(said.decode("utf-8", "replace"))
    return said
wanted = {"AttachStdout": True, "AttachStderr": True, "Cmd": COMMAND + sys.argv[1:]}
number = json.loads(ask("POST", "/containers/CONTAINER/exec", wanted))["Id"]
said = ask("POST", f"/exec/{number}/start", {"Detach": False, "Tty": False})
while said:
    stream, length = struct.unpack(">BxxxI", said[:8])
    os.write(stream, said[8:8 + length])
    said = said[8 + length:]
sys.exit(json.loads(ask("GET", f"/exec/{number}/json"))["ExitCode"])
"""


def open_on_arm(bench: Bench, arm: Arm, scenario: Scenario | None = None) -> None:
    """Give the terminal a root shell in a fresh guest of `arm`, set up for `scenario` where one is named."""
    need_terminal()
    with bench.guest(arm.kernel, f"shell {arm}", kept_open=True) as machine:
        _bring_into(bench, machine, arm, scenario, f"shell {arm}")
        bench.progress.done(f"shell {arm}")
        with bench.progress.paused():
            attach(machine)


def open_on_attempt(bench: Bench, scenario: Scenario, arm: Arm, attempt_id: str) -> None:
    """Make one attempt of `scenario` in a fresh guest of `arm`, and give the terminal a root shell in what it left."""
    need_terminal()
    spec = attempt_of(scenario, attempt_id)
    with bench.guest(arm.kernel, f"shell {arm}", kept_open=True) as machine:
        plan, container = _enter(bench, machine, arm, scenario, f"shell {arm}")
        bench.progress.step(f"shell {arm}", f"{spec.kind} {spec.id}")
        opened = attempt.open_window(machine.channel, plan.unit, plan.object_path)
        attempt.make(machine.channel, spec, plan.unit, opened, container)
        bench.progress.done(f"shell {arm}")
        with bench.progress.paused():
            attach(machine)


def open_before_attempt(
    bench: Bench,
    scenario: Scenario,
    arm: Arm,
    spec: Attempt,
    argv: Sequence[str] = (),
    *,
    started_in: Arm | None = None,
) -> CommandResult | None:
    """A root shell in a fresh guest of `arm` in the state just before an attempt, its command ready at the prompt.

    The canary is planted. With `argv` that command is run there instead, and its result returned. `started_in`: the arm
    that the service is started in, where it is another one.
    """
    with bench.guest(arm.kernel, f"rewind {arm}", kept_open=True) as machine:
        plan, container = _enter(bench, machine, arm, scenario, f"rewind {arm}", started_in)
        opened = attempt.open_window(machine.channel, plan.unit, plan.object_path)
        canary = attempt.plant(machine.channel, spec)
        typed = _by_hand(machine.channel, spec, opened, container)
        bench.progress.done(f"rewind {arm}")
        if argv:
            return machine.channel.run(argv, timeout=FOREVER)
        with bench.progress.paused():
            sys.stderr.write(_briefing(scenario, arm, spec, canary))
            attach(machine, typed=typed)
    return None


def attempt_of(scenario: Scenario, attempt_id: str) -> Attempt:
    """The attempt called `attempt_id`. Raises DefinitionError with the nearest name."""
    spec = next((a for a in scenario.attempts if a.id == attempt_id), None)
    if spec is None:
        raise unknown_name(f"attempt of scenario {scenario.id}", attempt_id, [a.id for a in scenario.attempts])
    return spec


def _by_hand(channel: Channel, spec: Attempt, opened: attempt.Opened, container: Running | None) -> str:
    """The command line that does what the attempt does. What it needs is put into the guest."""
    if spec.http is not None:
        method = [] if spec.http.method == "GET" and spec.http.body is None else ["--request", spec.http.method]
        body = [] if spec.http.body is None else ["--data-raw", spec.http.body, "--header", "Content-Type:"]
        return shlex.join(["curl", "--include", "--path-as-is", "--globoff", *method, *body, attempt.url_of(spec)])
    assert spec.run is not None
    attack = ATTACK
    if container is not None:
        attack = ATTACK_INSIDE.replace("CONTAINER", container.id).replace("COMMAND +", f"{container.command(())} +")
    if container is None:
        command = attempt.command_as(spec, opened.subject, attempt.fresh_auid())
        channel.ask("offer", path=BY_HAND, who=command["who"], timeout=spec.timeout)
    channel.write_file("/usr/local/bin/attack", attack.encode(), mode=0o755)
    return shlex.join(["attack", *spec.run])


def _briefing(scenario: Scenario, arm: Arm, spec: Attempt, canary: str) -> str:
    lines = [f"{scenario.title}: just before {spec.kind} {spec.id}, arm {arm}. Press Enter to make it."]
    if spec.canary is not None:
        lines.append(f"Planted in {spec.canary.file}: {canary}")
    if spec.allowed_if.effect is not None:
        lines.append(f"Its effect shows in: {shlex.join(spec.allowed_if.effect.run)}")
    lines.append("The kernel's record afterwards: tail /var/log/audit/audit.log")
    return "".join(f"{line}\n" for line in lines)


def run_on_arm(bench: Bench, arm: Arm, argv: Sequence[str], scenario: Scenario | None = None) -> CommandResult:
    """Run one command as root in a fresh guest of `arm`."""
    with bench.guest(arm.kernel, f"shell {arm}", kept_open=True) as machine:
        _bring_into(bench, machine, arm, scenario, f"shell {arm}")
        bench.progress.done(f"shell {arm}")
        return machine.channel.run(argv, timeout=FOREVER)


def _bring_into(bench: Bench, machine: QemuMachine, arm: Arm, scenario: Scenario | None, task: str) -> None:
    if scenario is not None:
        _enter(bench, machine, arm, scenario, task)
        return
    bench.progress.step(task, "entering the arm")
    prepare.mark(machine.channel, arm)
    FRAMEWORKS[arm.framework].enter(machine.channel, arm, None, PolicyUnderTest())


def _enter(
    bench: Bench, machine: QemuMachine, arm: Arm, scenario: Scenario, task: str, started_in: Arm | None = None
) -> tuple[prepare.Plan, Running | None]:
    bench.progress.step(task, "entering the arm")
    tell = functools.partial(bench.progress.step, task)
    with prepare.with_images(prepare.plan_of(scenario, bench.lab), scenario, bench.lab, bench.progress, task) as plan:
        prepared = prepare.bring_into(machine.channel, arm, plan, bench.image, tell, started_in=started_in)
        return plan, prepared.container


def need_terminal() -> None:
    """Raises HostError where standard input or output is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise HostError(
            "a shell needs a terminal, and standard input or output is none",
            hint="Give a command instead, behind `--`: ... -- ls -l /etc/shadow",
        )


def attach(machine: QemuMachine, *, typed: str = "") -> None:
    """Connect this terminal to the guest's console until the shell ends or Ctrl-] is pressed.

    `typed` is put at the first prompt, as if the user had typed it and not yet pressed Enter.
    """
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
        _pump(console, wake, typed.encode())
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


def _pump(console: socket.socket, wake: socket.socket, typed: bytes) -> None:
    keyboard, screen = sys.stdin.fileno(), sys.stdout.fileno()
    shown = b""
    while True:
        ready, _, _ = select.select([keyboard, console, wake], [], [])
        if console in ready:
            data = console.recv(65536)
            if not data:
                return
            os.write(screen, data)
            shown = (shown + data)[-PROMPT_BYTES:]
            if typed and PROMPT.search(shown):
                console.sendall(typed)
                typed = b""
        elif wake in ready:
            return
        if keyboard in ready:
            keys = os.read(keyboard, 4096)
            if not keys or DETACH in keys:
                return
            console.sendall(keys)
