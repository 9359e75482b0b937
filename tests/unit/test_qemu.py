"""Guests of this process, where the program is asked to stop: one that is on its way then is not forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lsmlab import host
from lsmlab.errors import MachineError
from lsmlab.machine import qemu
from lsmlab.machine.qemu import Boot, Hardware, QemuMachine


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
