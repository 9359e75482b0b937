"""A guest's process and our connections to it, where one of them ends before the other."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from lsmlab import host
from lsmlab.channel.agent import AgentChannel
from lsmlab.errors import MachineError
from lsmlab.machine import qemu
from lsmlab.machine.hardware import Boot, Hardware
from lsmlab.machine.qemu import QemuMachine


@pytest.mark.parametrize(
    ("code", "words", "engine"),
    [(0, "", "io_uring"), (0, "no io_uring: falling back", "threads"), (1, "", "threads"), (126, "", "threads")],
)
def test_io_uring_is_used_where_qemu_may_use_it(
    code: int, words: str, engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the machine is, and where it is off, or forbidden, or QEMU was built without."""
    program = tmp_path / "qemu-img"
    program.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/asked\necho "{words}" >&2\nexit {code}\n')
    program.chmod(0o755)
    need = host.need
    monkeypatch.setattr(host, "need", lambda name: str(program) if name == "qemu-img" else need(name))
    monkeypatch.setattr(qemu, "_engine", "")
    assert qemu.disk_engine() == engine
    assert "bench /proc/self/exe -i io_uring " in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("known", ["io_uring", "threads"], ids=["first to see it", "another guest saw it first"])
def test_a_qemu_that_refuses_io_uring_is_started_without_it(
    known: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Guests start side by side: who was told of io_uring before another one gave it up is refused later."""
    answers: list[str] = []

    class Spawned:
        def _attach(self) -> None:
            answers.append(qemu.disk_engine())
            if len(answers) == 1:
                raise MachineError("QEMU ended or does not answer: Unable to use io_uring")

        def _come_up(self, *_: Any) -> None: ...

        def console_tail(self) -> str:
            return ""

        def stop(self) -> None: ...

    def no_disk(argv: list[str], **_: Any) -> bytes:
        Path(argv[-1]).touch()
        return b""

    monkeypatch.setattr(qemu, "_engine", known)
    monkeypatch.setattr(host, "run", no_disk)
    monkeypatch.setattr(host, "need", str)
    monkeypatch.setattr(QemuMachine, "_spawn", lambda *_: Spawned())
    boot = Boot(tmp_path / "kernel", tmp_path / "initrd", "")
    QemuMachine.start("g", Hardware("tcg", 512, "x"), tmp_path / "disk", boot=boot, scratch=tmp_path)
    assert (len(answers), answers[-1]) == (2, "threads")


def test_a_guest_that_starts_while_all_are_stopped_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stopped: list[str] = []

    class JustSpawned:
        """A QEMU whose process is there, and that nobody has in his list yet."""

        @property
        def _process(self) -> JustSpawned:
            return self

        def kill(self) -> None:
            stopped.append("killed")

        def _attach(self) -> None:
            assert stopped, "it is waited for, up to minutes, though the program was asked to stop"
            raise MachineError("QEMU ended")

        def console_tail(self) -> str:
            return ""

        def stop(self) -> None:
            stopped.append("collected")

    def spawn(*_: Any) -> Any:
        qemu.stop_all()
        return JustSpawned()

    monkeypatch.setattr(host, "run", lambda *_, **__: b"")
    monkeypatch.setattr(host, "need", str)
    monkeypatch.setattr(QemuMachine, "_spawn", spawn)
    boot = Boot(tmp_path / "kernel", tmp_path / "initrd", "")
    with pytest.raises(MachineError, match="QEMU ended"):
        QemuMachine.start("g", Hardware("tcg", 512, "x"), tmp_path / "disk", boot=boot, scratch=tmp_path)
    assert stopped == ["killed", "collected"]


@pytest.mark.parametrize("closed", ["the agent's", "the monitor's"])
def test_a_guest_whose_connection_closed_does_not_run_though_its_process_is_not_seen_to_end_yet(closed: str) -> None:
    with contextlib.ExitStack() as held:
        (ours, its), (agent, its_agent) = (map(held.enter_context, socket.socketpair()) for _ in range(2))
        process = subprocess.Popen(["sleep", "61"], stderr=subprocess.PIPE)
        channel = AgentChannel(agent, "killed")
        machine = QemuMachine("killed", process, ours, channel)
        held.callback(machine.stop)
        threading.Thread(target=greet, args=(its,), daemon=True).start()
        machine._attach()
        running = [machine.running]
        (its_agent if closed == "the agent's" else its).shutdown(socket.SHUT_RDWR)
        while running[-1] and len(running) < 2000:
            time.sleep(0.01)
            running.append(machine.running)
        assert (running[0], running[-1], process.poll()) == (True, False, None)


def test_a_guest_leaves_no_logger_of_its_own_in_the_process() -> None:
    with contextlib.ExitStack() as held:
        (ours, its), (agent, _) = (map(held.enter_context, socket.socketpair()) for _ in range(2))
        process = subprocess.Popen(["sleep", "61"], stderr=subprocess.PIPE)
        before = set(logging.root.manager.loggerDict)
        machine = QemuMachine("a-logger-of-its-own", process, ours, AgentChannel(agent, "a-logger-of-its-own"))
        held.callback(machine.stop)
        threading.Thread(target=greet, args=(its,), daemon=True).start()
        machine._attach()
        assert set(logging.root.manager.loggerDict) == before


def greet(monitor: socket.socket) -> None:
    """QEMU's part of the monitor's first words."""
    version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
    with contextlib.suppress(OSError):
        monitor.sendall(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\r\n")
        while asked := monitor.recv(1 << 16):
            monitor.sendall(json.dumps({"return": {}, "id": json.loads(asked).get("id")}).encode() + b"\r\n")


def test_a_guest_that_gives_way_has_less_weight() -> None:
    with subprocess.Popen(["sleep", "100"], start_new_session=True) as process:
        try:
            guest = QemuMachine("guest", process, MagicMock(), MagicMock())
            guest.give_way()
            before = os.getpriority(os.PRIO_PROCESS, 0)
            assert os.getpriority(os.PRIO_PROCESS, process.pid) == min(before + qemu.GIVING_WAY, 19)
            group = Path(f"/proc/{process.pid}/autogroup")
            if group.exists():
                assert group.read_text("ascii").split()[-1] == str(qemu.GIVING_WAY)
        finally:
            process.kill()
        process.wait()
        guest.give_way()  # it has ended: nothing to be said
